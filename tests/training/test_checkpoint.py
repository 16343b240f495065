"""The state that a run goes on from: kept twice, checked, never half; and what is refused."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from states import progress_of

import search_dints
from dints import options
from dints.errors import UserError
from dints.running.precision import Precision
from dints.running.processes import Processes
from dints.training import checkpoint as module
from dints.training.checkpoint import Checkpoint, configured, find_state
from dints.training.progress import Progress

CPU = torch.device("cpu")
CONFIGURATION = {"num_epochs": 3, "seed": 0, "processes": 1}
KILL = pytest.mark.fault("SIGKILL while saving")


def layer(value: float, size: int = 4) -> torch.nn.Linear:
    network = torch.nn.Linear(size, size)
    torch.nn.init.constant_(network.weight, value)
    return network


def begun(folder: Path, network: torch.nn.Module, precision: str = "fp32", resume: str = "auto") -> Checkpoint:
    """Begin a run as a script does: go on with what is in the folder, or save a new run's state."""
    found = find_state(folder, CONFIGURATION, resume)
    checkpoint = Checkpoint(
        folder, CONFIGURATION, {"network": network}, Precision(precision, CPU), Processes(0, 1, CPU)
    )
    checkpoint.restore(found)
    return checkpoint


def save(folder: Path, *values: float, size: int = 4, **more: str) -> Checkpoint:
    """Save a run's state with each of these values, after one step each."""
    network = layer(0.0, size)
    checkpoint = begun(folder, network, **more)
    for value in values:
        torch.nn.init.constant_(network.weight, value)
        checkpoint.progress.step_done()
        checkpoint.save()
    return checkpoint


def restored(folder: Path, size: int = 4, **more: str) -> tuple[float, Progress]:
    network = layer(-1.0, size)
    progress = begun(folder, network, **more).progress
    (value,) = network.weight.unique().tolist()
    return value, progress


# Saving and continuing


def test_a_run_saves_before_it_begins(tmp_path):
    assert restored(tmp_path) == (-1.0, Progress())
    state = torch.load(tmp_path / "latest.pth", weights_only=True)
    assert state["format"] == module.FORMAT and state["precision"] == "fp32" and state["configuration"] == CONFIGURATION


def test_what_was_saved_is_restored(tmp_path):
    save(tmp_path, 1.0, 2.0, precision="bf16")
    value, progress = restored(tmp_path, resume="must")
    assert (value, progress.step, progress.iteration) == (2.0, 2, 2)
    assert find_state(tmp_path, CONFIGURATION).precision == "bf16"


@KILL
def test_the_two_newest_are_kept(tmp_path):
    save(tmp_path, 1.0, 2.0, 3.0)
    assert {path.name: progress_of(tmp_path, path.name)["iteration"] for path in tmp_path.iterdir()} == {
        "latest.pth": 3,
        "previous.pth": 2,
    }


def flip_a_bit(path: Path) -> None:
    """Flip one in the middle of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 8
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit": flip_a_bit,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_text("not a checkpoint"),
    "missing": lambda path: path.unlink(),  # killed between the two renames
}


@KILL
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, damage, caplog):
    save(tmp_path, 1.0, 2.0, size=200)
    DAMAGES[damage](tmp_path / "latest.pth")
    value, progress = restored(tmp_path, size=200)
    assert (value, progress.iteration) == (1.0, 1)
    assert ("previous.pth, the one before" in caplog.text) == (damage != "missing")
    # And the good one is not thrown away for the damaged one by the next save.
    begun(tmp_path, layer(5.0, 200)).save()
    for path in tmp_path.iterdir():
        module._load(path)


@KILL
@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "missing"])
def test_two_damaged_ones_are_refused(tmp_path, damage):
    save(tmp_path, 1.0, 2.0, size=200)
    for name in ("latest.pth", "previous.pth"):
        DAMAGES[damage](tmp_path / name)
    with pytest.raises(UserError, match="previous.pth"):
        find_state(tmp_path, CONFIGURATION)


@pytest.mark.fault("one-bit damage in tensor data")
def test_every_flipped_bit_of_a_tensor_is_noticed(tmp_path):
    save(tmp_path, 1.0, size=64)
    path = tmp_path / "latest.pth"
    whole = path.read_bytes()
    start = whole.index(torch.ones(64 * 64).numpy().tobytes())
    for place in range(start, start + 64 * 64 * 4, 511):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            module._load(path)


@pytest.mark.fault("disk full while saving")
def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    checkpoint = save(tmp_path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(UserError, match=r"latest.pth needs 0.0 MiB, and 0.0 are free on its disk: free some space"):
            checkpoint.save()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="latest.pth cannot be written: No space left on device"):
            checkpoint.save()
    assert restored(tmp_path)[0] == 1.0 and not list(tmp_path.glob(".*"))


@pytest.mark.fault("non-finite loss on one rank")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    save(tmp_path, 1.0)
    network = layer(0.0)
    checkpoint = begun(tmp_path, network)
    network.weight.data[0, 0] = value
    with pytest.raises(UserError, match="the training diverged: weights are not finite, and are not saved; lower"):
        checkpoint.save()
    assert restored(tmp_path)[0] == 1.0


# Refusals


@pytest.mark.fault("resume with other data or other flags")
def test_every_setting_that_differs_is_named(tmp_path):
    save(tmp_path, 1.0)
    with pytest.raises(UserError, match="num_epochs was 3 and is 4, seed was 0 and is 1"):
        find_state(tmp_path, {**CONFIGURATION, "num_epochs": 4, "seed": 1})


def test_an_option_that_is_newer_than_the_run_does_not_stop_it(tmp_path):
    save(tmp_path, 1.0)
    assert find_state(tmp_path, {**CONFIGURATION, "new": None}) is not None
    with pytest.raises(UserError, match="new was None and is 5"):
        find_state(tmp_path, {**CONFIGURATION, "new": 5})


@pytest.mark.fault("world size changes between stop and resume")
def test_another_number_of_processes_needs_a_flag(tmp_path, caplog):
    save(tmp_path, 1.0)
    other = {**CONFIGURATION, "processes": 2}
    with pytest.raises(UserError, match="processes was 1 and is 2.*--allow_other_num_processes"):
        find_state(tmp_path, other)
    assert find_state(tmp_path, other, allow_other_num_processes=True).path == tmp_path / "latest.pth"
    assert "had 1 processes and has 2: it continues, but not to the result that it would have had" in caplog.text
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        find_state(tmp_path, {**other, "seed": 1}, allow_other_num_processes=True)


def test_never_starts_afresh_and_leaves_nothing_to_continue(tmp_path):
    save(tmp_path, 1.0, 2.0)
    assert find_state(tmp_path, {"other": 1}, resume="never") is None
    assert not list(tmp_path.iterdir())


def test_must_needs_something_to_continue(tmp_path):
    with pytest.raises(UserError, match="--resume must, but there is no .*latest.pth"):
        find_state(tmp_path, CONFIGURATION, resume="must")


@pytest.mark.fault("non-empty output folder of another run")
@pytest.mark.parametrize("name", ["Events", "loss_history.csv", "search_code_600.pth", "best_metric_model.pth"])
def test_results_without_a_state_are_not_overwritten(tmp_path, name):
    (tmp_path / name).mkdir() if name == "Events" else (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"holds results .{name}. but no latest.pth to continue from: .*--resume never"):
        find_state(tmp_path, CONFIGURATION)
    assert find_state(tmp_path, CONFIGURATION, resume="never") is None


@pytest.mark.parametrize("content", [[1, 2], {"configuration": {}}])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "latest.pth")
    with pytest.raises(UserError, match="latest.pth is not a run's checkpoint"):
        find_state(tmp_path, CONFIGURATION)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    save(tmp_path, 1.0)
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(UserError, match="has the format 1, and this version writes 2: .*--resume never"):
        find_state(tmp_path, CONFIGURATION)


@pytest.mark.fault("resume with other data or other flags")
def test_the_configuration_knows_contents_but_not_places():
    def configuration(root: str, cases: list[str], *more: str) -> dict:
        args = search_dints.parse_args(["--root", root, "--output_root", f"runs/{root}", *more])
        return configured(options.course(args), 1, cases=cases)

    first = configuration("here", ["a", "b"])
    manner = ["--timeout_minutes", "3", "--warning_signal", "USR2", "--cache", "disk", "--num_workers", "3"]
    assert first == configuration("there", ["a", "b"], *manner)
    assert first != configuration("here", ["a", "b"], "--seed", "1")
    assert first != configuration("here", ["a", "c"])
