"""The run folder: made, probed, and locked against a second run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from dints.errors import UserError
from dints.running.processes import Processes
from dints.running.run_folder import opened

ALONE = Processes(0, 1, torch.device("cpu"))
TWO_RUNS = pytest.mark.fault("two runs in one output folder")


@TWO_RUNS
def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(tmp_path):
    second = opened(tmp_path / "run", ALONE)
    with opened(tmp_path / "run", ALONE), pytest.raises(UserError, match="another run is writing into"):
        second.__enter__()
    with opened(tmp_path / "run", ALONE) as folder:
        assert folder.is_dir()


@TWO_RUNS
def test_a_kill_frees_the_folder_though_a_worker_lives_on(tmp_path):
    """As the workers of a killed process do, for some seconds, while the launcher starts it again."""
    reading, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        with opened(tmp_path / "run", ALONE):
            worker = os.fork()
            if worker:
                os.write(ready, b"%d" % worker)
            time.sleep(60)
    worker = int(os.read(reading, 9))
    try:
        with pytest.raises(UserError, match="another run"), opened(tmp_path / "run", ALONE):
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with opened(tmp_path / "run", ALONE):
            os.kill(worker, 0)  # it is there
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.fault("output folder read-only")
@pytest.mark.parametrize("place", ["a file", "below a file", "denied"])
def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path, place):
    (file := tmp_path / "file").write_text("")
    root = {"a file": file, "below a file": file / "run", "denied": Path("/sys/kernel")}[place]
    if place == "denied" and not root.is_dir():
        pytest.skip("needs a folder that is closed even to root, such as Linux' /sys")
    with pytest.raises(UserError, match=f"--output_root {root} cannot be written"), opened(root, ALONE):
        pass


@pytest.mark.fault("SIGKILL while saving")
def test_partial_files_of_a_killed_run_are_swept(tmp_path):
    (tmp_path / ".latest.pth.123.partial").write_bytes(b"half")
    (tmp_path / "candidates").mkdir()
    (tmp_path / "candidates/.latest.pth.123.partial").write_bytes(b"half")
    with opened(tmp_path, ALONE):
        assert not list(tmp_path.rglob("*.partial"))


def test_files_of_other_runs_and_programs_are_not_swept(tmp_path):
    """A run's folder may lie in another one's, and another program may call its files so."""
    kept = [tmp_path / "fold_0/.latest.pth.123.partial", tmp_path / ".download.partial", tmp_path / "x.1.partial"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    (tmp_path / "fold_0/.lock").touch()
    with opened(tmp_path, ALONE):
        assert all(path.exists() for path in kept)
