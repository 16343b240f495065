"""Safe files, the run folder, checkpoints, seeds and precision."""

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

from dints import runtime
from dints.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
ALONE = runtime.Processes(rank=0, world_size=1, device=torch.device("cpu"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "state.pth"
    runtime.save_atomically({"value": torch.arange(3)}, path)
    with pytest.raises(ZeroDivisionError), runtime.replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert runtime.load_safely(path)["value"].tolist() == [0, 1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pth"]


def test_a_kill_while_saving_keeps_the_old_file(tmp_path):
    path = tmp_path / "state.pth"
    runtime.save_atomically({"value": 1}, path)
    program = f"""
        import os, signal
        from dints import runtime
        with runtime.replacing({str(path)!r}) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=CHECKOUT)
    assert done.returncode == -signal.SIGKILL
    assert runtime.load_safely(path) == {"value": 1}


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/state.pth cannot be written"):
        runtime.save_atomically({}, tmp_path / "file" / "state.pth")


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_runs_nothing_from_the_file(tmp_path):
    torch.save({"node_a": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth asks for .*mkdir"):
        runtime.load_safely(tmp_path / "evil.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(UserError, match="plain.pkl"):
        runtime.load_safely(tmp_path / "plain.pkl")
    assert not (tmp_path / "ran").exists()


def test_numpy_arrays_and_scalars_load(tmp_path):
    content = {"array": np.arange(6).reshape(2, 3), "float": np.float64(0.5), "bool": np.array([True])}
    torch.save(content, tmp_path / "arrays.pth")
    loaded = runtime.load_safely(tmp_path / "arrays.pth")
    assert (loaded["array"] == content["array"]).all() and loaded["float"] == 0.5 and loaded["bool"][0]


def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(tmp_path):
    second = runtime.run_folder(tmp_path / "run", ALONE)
    with runtime.run_folder(tmp_path / "run", ALONE), pytest.raises(UserError, match="another run is writing into"):
        second.__enter__()
    with runtime.run_folder(tmp_path / "run", ALONE) as folder:
        assert folder.is_dir()


@pytest.mark.parametrize("place", ["a file", "below a file", "denied"])
def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    root = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "denied": Path("/sys/kernel")}[
        place
    ]
    if place == "denied" and not root.is_dir():
        pytest.skip("needs a folder that is closed even to root, such as Linux' /sys")
    with pytest.raises(UserError, match=f"--output_root {root} cannot be written"), runtime.run_folder(root, ALONE):
        pass


def test_seeds_depend_on_every_part_and_on_no_process():
    seeds = [runtime.seed_from(*parts) for parts in ((0, "weights", 1, 2), (0, "weights", 2, 1), (1, "weights", 1, 2))]
    assert len(set(seeds)) == 3
    program = "from dints import runtime; print(runtime.seed_from(0, 'weights', 1, 2))"
    other = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert int(other.stdout) == seeds[0]


@pytest.mark.parametrize(("wanted", "message"), [("fp16", "--precision fp16 needs a GPU")])
def test_precisions_that_the_device_lacks_are_refused(wanted, message):
    with pytest.raises(UserError, match=message):
        runtime.choose_precision(wanted, ALONE)


def test_precision_auto_on_a_cpu_is_the_faster_one(monkeypatch):
    for faster in ("fp32", "bf16"):
        monkeypatch.setattr(
            runtime, "_seconds_of_convolution", lambda p, faster=faster: 1.0 if p.name == faster else 2.0
        )
        assert runtime.choose_precision("auto", ALONE).name == faster


def test_measuring_the_precision_draws_no_random_number():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    runtime.choose_precision("auto", ALONE)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="--device cuda, but PyTorch sees no GPU"), runtime.started("cuda"):
        pass
