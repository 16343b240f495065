"""How a script ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from dints.errors import (
    MAX_SHOWN,
    PartlyDone,
    ProcessLost,
    Stopped,
    UserError,
    exit_on_user_error,
    shown,
)

STOPPED = Stopped(signal.SIGTERM, "after iteration 7, with its state in run/latest.pth")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("file\nx.pth\x1b is bad"), 1, "error: file x.pth? is bad\n"),
        (PartlyDone("2 of 3 are missing"), 3, "error: 2 of 3 are missing\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            1,
            f"error: {sys.executable} has no module torch: ",
        ),
        (ProcessLost("rank 1 is gone"), 1, "error: rank 1 is gone\n"),
        (
            STOPPED,
            143,
            "stopped after iteration 7, with its state in run/latest.pth: the same "
            "command continues it: ",
        ),
        (KeyboardInterrupt(), 130, "interrupted: the same command resumes from the last save\n"),
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


@pytest.mark.parametrize(
    "given", [["--resume", "never"], ["--resume=never"], ["--resume", "never", "--resume=never"]]
)
def test_the_command_that_continues_does_not_start_afresh(given, monkeypatch, capsys):
    def fail() -> None:
        raise STOPPED

    monkeypatch.setattr(sys, "argv", ["train_dints.py", *given, "--output_root", "my run"])
    with pytest.raises(SystemExit):
        exit_on_user_error(fail)
    assert capsys.readouterr().err.endswith(
        ": the same command without --resume never continues it: train_dints.py --output_root 'my "
        "run'\n"
    )


def nested(depth: int, width: int) -> list:
    """Return a list in lists that would be endless if written out, and takes no memory."""
    value = ["x"] * width
    for _ in range(depth):
        value = [value] * width
    return value


@pytest.mark.parametrize(
    ("value", "start"),
    [
        ("x" * 10**6, "'xxx"),
        (nested(10**5, 1), "[["),
        (nested(100, 100), "[["),
        ({"k" * 10**6: 1}, "{'kkk"),
        (10**5000, "a int that cannot be shown (ValueError)"),
        (torch.zeros(1).expand(10**9), "tensor("),
        ([0.2, 0.4, 0.6, 0.8], "[0.2, 0.4, 0.6, 0.8]"),
    ],
    ids=["text", "deep", "endless", "key", "number", "tensor", "list"],
)
def test_values_in_messages_are_cut(value, start):
    text = shown(value)
    assert text.startswith(start) and len(text) <= MAX_SHOWN


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_tells_of_a_batch_that_is_done_in_part_and_all_leave_alike(
    rank, monkeypatch, capsys
):
    def fail() -> None:
        raise PartlyDone("2 of 3 are missing")

    for name, value in {"RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(fail)
    assert ended.value.code == 3 and capsys.readouterr().err == "error: 2 of 3 are missing\n" * (
        rank == 0
    )


def test_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(lambda: 1 / 0)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" in said and "ZeroDivisionError" in said


def test_a_name_that_the_terminal_cannot_show_ends_no_script():
    code = (
        "import sys; from dints.errors import exit_on_user_error; exit_on_user_error(print, "
        "'L\u00e9ber')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert done.stdout == b"L\\xe9ber\n" and done.returncode == 0, done.stderr


PRINTS = "from dints.errors import exit_on_user_error; exit_on_user_error(print, 'a')"


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_leaves_ends_a_script_without_a_word(buffered):
    """As in "--describe | head"; 141 is what a shell gives for programs that die of it."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], env=environment, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert done.stderr == b"" and done.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_output_that_cannot_be_written_is_an_error_of_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr == (
        "error: the output cannot be written: No space left on device: print it elsewhere\n"
    )
    assert done.returncode == 1


def test_another_broken_pipe_keeps_its_traceback(capsys):
    def fail() -> None:
        raise BrokenPipeError(32, "of a worker")

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(fail)
    assert ended.value.code == 1 and "of a worker" in capsys.readouterr().err
