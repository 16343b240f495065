"""How a script ends."""

from __future__ import annotations

import signal

import pytest

from dints.errors import PartlyDone, ProcessLost, Stopped, UserError, exit_on_user_error

STOPPED = Stopped(signal.SIGTERM, "after iteration 7, with its state in run/latest.pth")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("file\nx.pth\x1b is bad"), 1, "error: file x.pth? is bad\n"),
        (PartlyDone("2 of 3 are missing"), 3, "error: 2 of 3 are missing\n"),
        (ProcessLost("rank 1 is gone"), 1, "error: rank 1 is gone\n"),
        (STOPPED, 143, "stopped after iteration 7, with its state in run/latest.pth: the same command continues it: "),
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on with what is saved\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_a_person_can_mend_ends_with_one_line_and_a_code(error, code, line, capsys):
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(fail)
    said = capsys.readouterr().err
    assert ended.value.code == code and said.startswith(line) and said.count("\n") == 1


def test_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(lambda: 1 / 0)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("Traceback") and "ZeroDivisionError" in said
