"""Safe files, the run folder, checkpoints, seeds and precision."""

import argparse
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


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(UserError, match="--output_root .*run cannot be written"),
        runtime.run_folder(tmp_path / "run", ALONE),
    ):
        pass


class TestCheckpoint:
    configuration = {"num_epochs": 3, "seed": 0}

    def save(self, folder: Path) -> torch.nn.Linear:
        checkpoint = runtime.Checkpoint(folder, "auto", self.configuration, ALONE)
        layer = torch.nn.Linear(2, 2)
        progress = runtime.Progress(epoch=1, iteration=7, best_dice=0.5)
        checkpoint.save({"network": layer}, progress, runtime.Precision("fp32", ALONE.device))
        return layer

    def test_restores_what_was_saved(self, tmp_path):
        saved = self.save(tmp_path)
        checkpoint = runtime.Checkpoint(tmp_path, "must", self.configuration, ALONE)
        layer = torch.nn.Linear(2, 2)
        progress = checkpoint.restore({"network": layer})
        assert torch.equal(layer.weight, saved.weight)
        assert (progress.epoch, progress.iteration, progress.best_dice) == (1, 7, 0.5)
        assert checkpoint.precision == "fp32"

    def test_names_every_setting_that_differs(self, tmp_path):
        self.save(tmp_path)
        with pytest.raises(UserError, match="num_epochs was 3 and is 4, seed was 0 and is 1"):
            runtime.Checkpoint(tmp_path, "auto", {"num_epochs": 4, "seed": 1}, ALONE)

    def test_never_starts_afresh(self, tmp_path):
        self.save(tmp_path)
        checkpoint = runtime.Checkpoint(tmp_path, "never", {"num_epochs": 4}, ALONE)
        assert checkpoint.restore({}) == runtime.Progress()

    def test_must_needs_something_to_continue(self, tmp_path):
        with pytest.raises(UserError, match="--resume must, but there is no .*latest.pth"):
            runtime.Checkpoint(tmp_path, "must", {}, ALONE)

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
    def test_refuses_what_is_no_checkpoint(self, tmp_path, content):
        if content is None:
            torch.save([1, 2], tmp_path / "latest.pth")
        else:
            (tmp_path / "latest.pth").write_bytes(content)
        with pytest.raises(UserError, match="latest.pth"):
            runtime.Checkpoint(tmp_path, "auto", {}, ALONE)


def test_the_configuration_knows_contents_but_not_places():
    def configured(root: str, seed: int, cases: list[str]) -> dict:
        args = argparse.Namespace(root=Path(root), output_root=Path("out"), seed=seed, num_workers=3)
        return runtime.configuration(args, ALONE, cases=cases)

    first = configured("here", 0, ["a", "b"])
    assert first == configured("there", 0, ["a", "b"])
    assert first != configured("here", 1, ["a", "b"])
    assert first != configured("here", 0, ["a", "c"])


def test_seeds_depend_on_every_part_and_on_no_process():
    seeds = [runtime.seed_from(*parts) for parts in ((0, "weights", 1, 2), (0, "weights", 2, 1), (1, "weights", 1, 2))]
    assert len(set(seeds)) == 3
    program = "from dints import runtime; print(runtime.seed_from(0, 'weights', 1, 2))"
    other = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert int(other.stdout) == seeds[0]


def test_progress_keeps_the_best_validation():
    progress = runtime.Progress(epoch=1, iteration=10)
    assert progress.note_validation(0.5, Path("a"))
    progress.epoch, progress.iteration = 2, 20
    assert not progress.note_validation(0.4, Path("b"))
    assert (progress.best_dice, progress.best_iteration, progress.best_path) == (0.5, 10, "a")
    progress.epoch, progress.iteration = 3, 30
    assert progress.note_validation(0.6, Path("c"))
    assert (progress.best_dice, progress.best_epoch, progress.best_path) == (0.6, 3, "c")


def test_without_validation_cases_the_newest_is_the_best():
    progress = runtime.Progress()
    for iteration in (10, 20):
        progress.iteration = iteration
        assert progress.note_validation(None, Path(f"{iteration}"))
    assert progress.best_path == "20" and progress.best_dice is None


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
