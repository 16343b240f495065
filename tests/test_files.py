"""Files that are written whole or not at all, and read without running anything in them."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from dints.errors import UserError
from dints.files import replacing
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


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/state.pth cannot be written"):
        save_atomically({}, tmp_path / "file" / "state.pth")


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
