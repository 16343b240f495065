"""The state that a run resumes from: kept twice, checked, never half; and refusals."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_run import ALONE, CPU
from states import progress_of

import search_dints
from dints.data.tasks import TASKS
from dints.errors import UserError
from dints.options import course
from dints.running import checkpoint as module
from dints.running.checkpoint import Checkpoint, find_state
from dints.running.precision import Precision
from dints.running.progress import Progress

SPLEEN = TASKS["Task09_Spleen"]
CASES = [f"case_{number}.nii.gz" for number in range(6)]
CONFIGURATION = {"seed": 0, "processes": 1, "task": SPLEEN.to_dict(), "cases": CASES}
CONFIGURATION["codes"] = [[[0]]]
KILL = pytest.mark.fault("SIGKILL while saving")
OTHER_FLAGS = pytest.mark.fault("resume with other data or other flags")


def parts_of(value: float, size: int = 64) -> dict:
    network = torch.nn.Linear(size, size)
    torch.nn.init.constant_(network.weight, value)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    return {"network": network, "optimizer": optimizer}


def begun(folder: Path, parts: dict, precision: str = "fp32", resume: str = "auto") -> Checkpoint:
    """Begin a run as a script does: resume the one in the folder, or save a new one's state."""
    found = find_state(folder, CONFIGURATION, resume)
    checkpoint = Checkpoint(folder, CONFIGURATION, parts, Precision(precision, CPU), ALONE)
    checkpoint.restore(found)
    return checkpoint


def save(folder: Path, *values: float, precision: str = "fp32") -> Checkpoint:
    """Save a run's state with each of these values, after one step each."""
    parts = parts_of(0.0)
    checkpoint = begun(folder, parts, precision)
    for value in values:
        torch.nn.init.constant_(parts["network"].weight, value)
        checkpoint.progress.step_done()
        checkpoint.save()
    return checkpoint


def restored(folder: Path, resume: str = "auto") -> tuple[float, Progress]:
    parts = parts_of(-1.0)
    progress = begun(folder, parts, resume=resume).progress
    (value,) = parts["network"].weight.unique().tolist()
    return value, progress


def test_a_run_saves_before_it_begins_and_keeps_its_identity(tmp_path):
    value, progress = restored(tmp_path)
    assert (value, progress) == (-1.0, Progress()) and len(progress.run) == 32
    assert restored(tmp_path)[1].run == progress.run
    (tmp_path / "other").mkdir()
    assert restored(tmp_path / "other")[1].run != progress.run


@KILL
def test_the_newest_is_restored_and_the_one_before_is_kept(tmp_path):
    save(tmp_path, 1.0, 2.0, 3.0, precision="bf16")
    names = {path.name: progress_of(tmp_path, path.name)["step"] for path in tmp_path.iterdir()}
    assert names == {"latest.pth": 3, "previous.pth": 2}
    value, progress = restored(tmp_path, resume="must")
    assert (value, progress.step, progress.iteration) == (3.0, 3, 3)
    assert find_state(tmp_path, CONFIGURATION).precision == "bf16"


def flip_a_bit(path: Path, offset: int = 0) -> None:
    content = bytearray(path.read_bytes())
    weights = torch.full((64 * 64,), 2.0 if path.name == "latest.pth" else 1.0)
    content[content.index(weights.numpy().tobytes()) + offset] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit": flip_a_bit,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "foreign": lambda path: torch.save({"parts": {}}, path),
    "another version": lambda path: torch.save(
        torch.load(path, weights_only=True) | {"progress": {"epoch": 1}}, path
    ),
    "missing": lambda path: path.unlink(),  # killed between the two renames
}


@KILL
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, damage, caplog):
    save(tmp_path, 1.0, 2.0)
    DAMAGES[damage](tmp_path / "latest.pth")
    value, progress = restored(tmp_path)
    assert (value, progress.iteration) == (1.0, 1)
    assert ("previous.pth, the one before" in caplog.text) == (damage != "missing")
    # And the good one is not thrown away for the damaged one by the next save.
    begun(tmp_path, parts_of(5.0)).save()
    for path in tmp_path.iterdir():
        module._load(path)
    if damage == "bit":
        for name in ("latest.pth", "previous.pth"):
            os.truncate(tmp_path / name, 99)
        with pytest.raises(UserError, match="previous.pth"):
            find_state(tmp_path, CONFIGURATION)


@pytest.mark.fault("one-bit damage in tensor data")
def test_every_flipped_bit_of_a_tensor_is_noticed(tmp_path):
    save(tmp_path, 2.0)
    whole = (tmp_path / "latest.pth").read_bytes()
    for offset in range(0, 64 * 64 * 4, 4095):
        flip_a_bit(tmp_path / "latest.pth", offset)
        with pytest.raises(UserError, match="is damaged"):
            module._load(tmp_path / "latest.pth")
        (tmp_path / "latest.pth").write_bytes(whole)


@pytest.mark.fault("disk full while saving")
def test_a_full_disk_keeps_the_files_that_are_there(tmp_path, monkeypatch):
    checkpoint = save(tmp_path, 1.0)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    full = "latest.pth needs 0.0 MiB, and 0.0 are free on its disk"
    with pytest.raises(UserError, match=full):
        checkpoint.save()
    assert restored(tmp_path)[0] == 1.0 and not list(tmp_path.glob(".*"))


@pytest.mark.fault("non-finite loss on one rank")
def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    save(tmp_path, 1.0)
    parts = parts_of(0.0)
    checkpoint = begun(tmp_path, parts)
    parts["network"].weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match="the training diverged: weights are not finite, and are"):
        checkpoint.save()
    assert restored(tmp_path)[0] == 1.0


# Refusals


@pytest.mark.fault("non-empty output folder of another run")
def test_a_folder_without_a_state(tmp_path):
    with pytest.raises(UserError, match="--resume must, but there is no .*latest.pth"):
        find_state(tmp_path, CONFIGURATION, resume="must")
    (tmp_path / "search_code_600.pth").write_text("")
    with pytest.raises(UserError, match="holds results .search_code_600.pth. but no latest.pth to"):
        find_state(tmp_path, CONFIGURATION)


@pytest.mark.fault("world size changes between stop and resume")
def test_another_number_of_processes_needs_a_flag(tmp_path):
    save(tmp_path, 1.0)
    other = {**CONFIGURATION, "processes": 2}
    with pytest.raises(UserError, match="processes was 1 and is 2.*--allow_other_num_processes"):
        find_state(tmp_path, other)
    assert find_state(tmp_path, other, allow_other_num_processes=True) is not None
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        find_state(tmp_path, {**other, "seed": 1}, allow_other_num_processes=True)


@OTHER_FLAGS
@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"seed": 1, "loss": "dice"}, "loss was None and is 'dice', seed was 0 and is 1"),
        (
            {"task": replace(SPLEEN, intensity=None).to_dict()},
            "task intensity was [-125.0, 275.0] and is None",
        ),
        (
            {"cases": [*CASES[:5], "new_1", "new_2", "new_3", "new_4"]},
            "of the cases 4 came (new_1, new_2, new_3, ...) and 1 went (case_5.nii.gz)",
        ),
        ({"cases": CASES[::-1]}, "the cases are in another order"),
        ({"codes": [[[1]]]}, "codes changed"),
    ],
)
def test_every_setting_that_differs_is_named(tmp_path, other, says):
    save(tmp_path, 1.0)
    message = re.escape(f"belongs to a run with other settings ({says}): use those again")
    with pytest.raises(UserError, match=message):
        find_state(tmp_path, {**CONFIGURATION, **other})


@OTHER_FLAGS
def test_the_configuration_has_all_that_decides_a_run_but_no_places():
    def configuration(root: str, more: str = "") -> dict:
        flags = ["--root", root, "--output_root", f"runs/{root}", *more.split()]
        return course(search_dints.parse_args(flags))

    first = configuration("here")
    others = "--timeout_minutes 3 --cache disk --num_workers 3 --cuda_graphs"
    assert first == configuration("there", others)
    for flags in ("--seed 1", "--loss other", "--spacing 1 1 2", "--checkpoint other.pth"):
        assert first != configuration("here", flags)


@pytest.mark.parametrize(
    "parts",
    [{"network": {}}, {"network": {"weight": torch.zeros(9, 4)}}, {"optimizer": {}}],
    ids=["no tensors", "other shape", "no network"],
)
def test_a_state_of_another_network_is_refused_in_one_short_line(tmp_path, parts):
    save(tmp_path, 1.0)
    state = torch.load(tmp_path / "latest.pth", weights_only=True)
    torch.save({**state, "parts": parts}, tmp_path / "latest.pth")
    with pytest.raises(UserError, match="latest.pth .*network.*--resume never") as refused:
        begun(tmp_path, parts_of(0.0))
    assert len(str(refused.value)) < 1000
