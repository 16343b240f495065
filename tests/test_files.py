"""Files that are written whole or not at all, and read without running anything in them."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from dints import files
from dints.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "state.pth"
    files.save_atomically({"value": torch.arange(3)}, path)
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert files.load_safely(path)["value"].tolist() == [0, 1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pth"]


def test_a_kill_while_saving_keeps_the_old_file(tmp_path):
    path = tmp_path / "state.pth"
    files.save_atomically({"value": 1}, path)
    program = f"""
        import os, signal
        from dints import files
        with files.replacing({str(path)!r}) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=CHECKOUT)
    assert done.returncode == -signal.SIGKILL
    assert files.load_safely(path) == {"value": 1}


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/state.pth cannot be written"):
        files.save_atomically({}, tmp_path / "file" / "state.pth")


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_runs_nothing_from_the_file(tmp_path):
    torch.save({"node_a": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth asks for .*mkdir"):
        files.load_safely(tmp_path / "evil.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(UserError, match="plain.pkl"):
        files.load_safely(tmp_path / "plain.pkl")
    assert not (tmp_path / "ran").exists()


def test_numpy_arrays_and_scalars_load(tmp_path):
    content = {"array": np.arange(6).reshape(2, 3), "float": np.float64(0.5), "bool": np.array([True])}
    torch.save(content, tmp_path / "arrays.pth")
    loaded = files.load_safely(tmp_path / "arrays.pth")
    assert (loaded["array"] == content["array"]).all() and loaded["float"] == 0.5 and loaded["bool"][0]
