"""Files that are written whole or not at all, and read without running anything in them."""

from __future__ import annotations

import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dints import files
from dints.errors import UserError
from dints.files import replacing, write_atomically
from dints.network.architecture import load_architecture
from dints.network.model_file import load_model
from dints.network.weights import load_weights
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
    """And the folder's entry too before the writer goes on, so that a power cut leaves the old or
    the new one.
    """
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append(
            "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size
        )
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
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, "
        "(9999, 9999))\nsave_atomically(torch.zeros(99999), sys.argv[1])"
    )
    command = [sys.executable, "-c", code, tmp_path / "state.pth"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(
        f"UserError: {tmp_path}/state.pth cannot be written: File too large"
    )
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
    content = {
        "array": np.arange(6).reshape(2, 3),
        "float": np.float64(0.5),
        "bool": np.array([True]),
    }
    torch.save(content, tmp_path / "arrays.pth")
    loaded = load_safely(tmp_path / "arrays.pth")
    assert (
        (loaded["array"] == content["array"]).all() and loaded["float"] == 0.5 and loaded["bool"][0]
    )


@pytest.mark.parametrize("path", ["file", "file/in", "file/in/it"])
def test_a_folder_that_is_a_file_is_named_before_the_work(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as refusal:
        files.check_folder(tmp_path / path, "--output_root")
    says = f"{tmp_path / path} cannot be written: {tmp_path}/file is a file: give a folder"
    assert str(refusal.value) == f"--output_root {says}"
    with pytest.raises(UserError, match=f"{tmp_path}/file is a file: give a folder"):
        files.write_atomically(tmp_path / path / "x", "")


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path):
    files.check_folder(tmp_path / "a/b", "--output_root")
    assert list((tmp_path / "a/b").iterdir()) == []


def test_a_lock_is_one_threads_and_freed_whatever_happens(tmp_path):
    order = []

    def other() -> None:
        with files.locked(tmp_path / "new" / "lock"):
            order.append("other")

    thread = threading.Thread(target=other)
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path / "new" / "lock"):
        thread.start()
        with pytest.raises(BlockingIOError), files.locked(tmp_path / "new" / "lock", wait=False):
            pass
        order.append("first")
        raise ZeroDivisionError
    thread.join(10)
    assert order == ["first", "other"]


@pytest.mark.fault("two runs in one output folder")
def test_a_lock_ends_with_a_kill_though_a_forked_worker_lives_on(tmp_path):
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with files.locked(tmp_path / "lock"):
            worker = os.fork()
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            os.write(told, str(worker).encode())
            time.sleep(30)
    worker = int(os.read(ready, 20))
    with pytest.raises(BlockingIOError), files.locked(tmp_path / "lock", wait=False):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.kill(worker, 0)
    with files.locked(tmp_path / "lock", wait=False):
        os.kill(worker, signal.SIGKILL)


KINDS = {
    "an architecture": {"arch_code_a": 0},
    "a model file of train_dints.py": {"state_dict": {}, "architecture": {}},
    "the saved state of a run": {"parts": {}, "progress": {}},
}


@pytest.mark.parametrize(
    ("load", "kind"),
    [
        (load_architecture, "a model file of train_dints.py"),
        (load_architecture, "the saved state of a run"),
        (load_model, "an architecture"),
        (load_model, "the saved state of a run"),
        (lambda path: load_weights(torch.nn.Linear(1, 1), path), "an architecture"),
    ],
)
def test_one_of_our_files_in_place_of_another_is_recognised(tmp_path, load, kind):
    save_atomically(KINDS[kind], tmp_path / "file.pth")
    with pytest.raises(UserError, match=f"it is {kind}.*give"):
        load(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("search_code_6.pth", "does not exist: did you mean {folder}/search_code_60.pth?"),
        ("nothing like it", "does not exist: check its path"),
        ("no folder/search_code_60.pth", "does not exist: check its path"),
        (
            ".",
            "is a folder, not a file: give one of those in it, as latest.pth, search_code_60.pth",
        ),
    ],
)
def test_a_file_that_is_none_is_refused_with_what_lies_there(tmp_path, path, says):
    for name in ("search_code_60.pth", "latest.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as refusal:
        load_safely(tmp_path / path)
    assert str(refusal.value) == f"{tmp_path / path} {says.format(folder=tmp_path)}"
