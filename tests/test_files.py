"""Files that are written whole or not at all, and read without running anything in them."""

from __future__ import annotations

import os
import pickle
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dints.errors import UserError
from dints.files import replacing, write_atomically
from dints.torch_files import load_safely, save_atomically


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "state.pth"
    save_atomically({"value": torch.arange(3)}, path)
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert load_safely(path)["value"].tolist() == [0, 1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pth"]


@pytest.mark.fault("SIGKILL while saving")
def test_a_kill_while_saving_keeps_the_old_file(tmp_path):
    path = tmp_path / "state.pth"
    save_atomically({"value": 1}, path)
    pid = os.fork()
    if pid == 0:
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert load_safely(path) == {"value": 1}


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    """And the folder's entry too before the writer goes on, so that a power cut leaves the old or the new one."""
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replaced"), replace(*paths)))
    write_atomically(tmp_path / "file", "whole")
    assert calls == [len("whole"), "replaced", "folder"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/state.pth cannot be written"):
        save_atomically({}, tmp_path / "file" / "state.pth")


@pytest.mark.fault("disk full while saving")
def test_a_file_that_does_not_fit_keeps_the_old_one_and_tells_why(tmp_path):
    """Of the error of a write PyTorch makes a RuntimeError that does not name it."""
    save_atomically({"value": 1}, tmp_path / "state.pth")
    code = (
        "import resource, signal, sys, torch; from dints.torch_files import save_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
        "save_atomically(torch.zeros(99999), sys.argv[1])"
    )
    command = [sys.executable, "-c", code, tmp_path / "state.pth"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(f"UserError: {tmp_path}/state.pth cannot be written: File too large")
    assert load_safely(tmp_path / "state.pth") == {"value": 1}


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.fault("malicious pickle")
def test_loading_runs_nothing_from_the_file(tmp_path):
    torch.save({"node_a": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth asks for .*mkdir"):
        load_safely(tmp_path / "evil.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(UserError, match="plain.pkl"):
        load_safely(tmp_path / "plain.pkl")
    assert not (tmp_path / "ran").exists()


def test_numpy_arrays_and_scalars_load(tmp_path):
    content = {"array": np.arange(6).reshape(2, 3), "float": np.float64(0.5), "bool": np.array([True])}
    torch.save(content, tmp_path / "arrays.pth")
    loaded = load_safely(tmp_path / "arrays.pth")
    assert (loaded["array"] == content["array"]).all() and loaded["float"] == 0.5 and loaded["bool"][0]
