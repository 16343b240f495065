"""The scripts need nothing of POSIX for one process; what does need it says so."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import CHECKOUT, SPACE, TINY, only_error, run

from dints import system
from dints.files import locked

RUN = CHECKOUT / "tests/without_posix.py"


@pytest.mark.slow
def test_every_stage_and_tool_runs_without_posix(phantom, tmp_path):
    """In one process, one after another: importing takes longest."""
    data = f"--root {phantom} --num_folds 3 {TINY}"
    found, model = tmp_path / "search/search_code_6.pth", tmp_path / "train/best_metric_model.pth"
    masks, references = tmp_path / "masks", phantom / "labelsTr"
    commands = (
        "download_msd_datasets.py -h",
        f"decode_plot.py --search_space --directory {tmp_path}",
        f"search_dints.py {data} {SPACE} --output_root {tmp_path}/search --num_epochs 2 --num_epochs_warmup 1",
        f"decode_plot.py --checkpoint {found} --directory {tmp_path} --filename found",
        f"train_dints.py {data} --output_root {tmp_path}/train --arch_ckpt {found} --num_epochs 1 --cache disk",
        f"infer_dints.py --checkpoint {model} --root {phantom} --output_root {masks} --device cpu --precision fp32",
        f"evaluate.py --prediction {masks} --reference {references} --predicted_only --output_root {tmp_path}/scores",
    )
    done = run(RUN, " then ".join(commands))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    made = ("graph.gv", "found.gv", "scores/summary.json", "masks/scores.csv", "dints_cache")
    assert {name for name in made if (tmp_path / name).exists()} == {*made}
    assert "Download, check and unpack" in done.stdout


def test_the_launcher_says_that_it_needs_posix(tmp_path):
    (tmp_path / "script.py").write_text("import os, signal\nprint(hasattr(os, 'fork'), hasattr(signal, 'SIGHUP'))")
    done = run(RUN, tmp_path / "script.py", "then launch/agent.py")
    assert "launch/agent.py needs Linux or macOS" in only_error(done)
    assert done.stdout == "False False\n"  # what stands in for Windows does take things away


def test_a_user_without_a_name_is_given_one():
    """As with docker run --user: MONAI, when it is imported, ends with a KeyError where there is none."""
    code = (
        "import getpass, pwd\ndef none(_): raise KeyError\npwd.getpwuid = none\nimport dints\nprint(getpass.getuser())"
    )
    environment = {key: os.environ[key] for key in os.environ.keys() - {"LOGNAME", "USER", "LNAME", "USERNAME"}}
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert done.stdout == "user\n", done.stderr


class Region:
    """Locks as Windows does, which cannot wait: the first two times another process has it."""

    LK_NBLCK = 2

    def __init__(self, failures: int):
        self.failures = failures

    def locking(self, file: int, mode: int, count: int) -> None:
        assert mode == self.LK_NBLCK and count == 1 and os.fstat(file)
        self.failures -= 1
        if self.failures >= 0:
            raise PermissionError(errno.EACCES, "Permission denied")


def test_a_lock_of_windows_is_waited_for_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.setattr(system, "SECONDS_BETWEEN_TRIES", 0.001)
    monkeypatch.setattr(system, "msvcrt", region := Region(2), raising=False)
    with locked(tmp_path / "new" / "lock"):
        assert region.failures == -1
    region.failures = 1
    with pytest.raises(BlockingIOError), locked(tmp_path / "new" / "lock", wait=False):
        pass


def test_a_lock_is_one_threads_and_freed_whatever_happens(tmp_path):
    order = []

    def other() -> None:
        with locked(tmp_path / "lock"):
            order.append("other")

    thread = threading.Thread(target=other)
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock"):
        thread.start()
        time.sleep(0.05)
        order.append("first")
        raise ZeroDivisionError
    thread.join(10)
    assert order == ["first", "other"]
    with locked(tmp_path / "lock", wait=False), pytest.raises(BlockingIOError):
        locked(tmp_path / "lock", wait=False).__enter__()


def test_free_memory_is_what_windows_says(monkeypatch):
    def tell(pointer) -> None:
        status = pointer._obj
        assert status.length == 64
        status.free = 7 << 30

    monkeypatch.delattr(os, "sysconf")
    kernel = SimpleNamespace(GlobalMemoryStatusEx=tell)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    assert system.free_memory() == 7 << 30


def test_nothing_else_asks_for_what_windows_lacks():
    """So that one place knows the difference; the launcher needs POSIX, and says so before."""
    names = ("fcntl", "msvcrt", "signal.SIGHUP", "signal.SIGUSR", "signal.SIGCHLD", "os.fork", "sysconf", "statvfs")
    names += ("sched_getaffinity", "O_DIRECTORY", "register_at_fork", "killpg", "getuid")
    names += ("import resource", "import pwd")
    own = [path for path in CHECKOUT.glob("*.py")] + sorted((CHECKOUT / "dints").rglob("*.py"))
    found = [
        (path.name, name)
        for path in [*own, CHECKOUT / "launch/folds.py"]
        for name in names
        if path != Path(system.__file__) and name in path.read_text(encoding="utf-8")
    ]
    assert found == []
