"""A fold: every header once, the task with its overrides, and refusals that need no voxel."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_run import begun
from toys import CLASSES, measurable, opened, write_dataset

from dints.data import listing
from dints.data.cache import open_cache
from dints.data.cases import prepare
from dints.data.loaders import training_loader, validation_loader
from dints.data.tasks import TASKS
from dints.errors import UserError
from dints.settings import PatchSettings

SHAPES = [((20, 24, 16), (1, 1, 3)), ((16, 30, 20), (1, 1, 4)), ((24, 20, 18), (2, 2, 5))]


def write(root: Path, *, nnunet: bool = False) -> Path:
    return write_dataset(root, measurable(SHAPES), ["CT"], nnunet=nnunet)


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """Count how often the header of each file is read."""
    counts, read_header = Counter(), listing.read_header

    def read_and_count(path: str):
        counts[path] += 1
        return read_header(path)

    monkeypatch.setattr(listing, "read_header", read_and_count)
    return counts


@pytest.mark.parametrize(
    ("name", "nnunet", "mode"),
    [("Task09_Spleen", False, "ram"), ("Mine", True, "none")],
)
def test_every_header_is_read_once(tmp_path, reads, name, nnunet, mode):
    """From the opening to batches, whether the dataset is measured or known from the table."""
    root = write(tmp_path / name, nnunet=nnunet)
    fold = opened(root, fold=0, num_folds=3, patch_size=(16, 16, 16))
    run = begun(tmp_path / "run", cache=mode, num_workers=0)
    cache = open_cache(fold, run)
    patches = PatchSettings(num_images_per_batch=2, flip_axes=("all",))
    loader = training_loader(fold.training, cache, patches, run, steps=2)
    assert len([*loader.epoch(0), *validation_loader(fold.validation, cache, run)]) == 3
    assert (fold.measured is None) == (name in TASKS)
    assert reads == {file: 1 for case in fold.cases for file in case.files} and len(reads) == 6


def test_an_opened_case_travels_to_other_ranks_and_is_prepared_there(tmp_path, reads):
    fold = opened(write(tmp_path / "Mine"))
    reads.clear()
    case, travelled = fold.cases[0], pickle.loads(pickle.dumps(fold.cases[0]))
    ours, theirs = (prepare(each, fold.task) for each in (case, travelled))
    assert travelled == case and not reads
    assert np.array_equal(ours.image, theirs.image) and np.array_equal(ours.label, theirs.label)


def test_settings_override_the_known_and_the_measured_task(tmp_path, caplog):
    given = {"spacing": (2.0, 2.0, 3.0), "intensity_range": (0.0, 5.0), "patch_size": (16, 32, 48)}
    with caplog.at_level("INFO"):
        mine = opened(write(tmp_path / "Mine"), **given).task
    assert "Mine: spacing 2 x 2 x 3 mm, intensity 0 to 5, patch 16 x 32 x 48" in caplog.text
    (tmp_path / "Mine").rename(tmp_path / "Task09_Spleen")
    spleen = opened(tmp_path / "Task09_Spleen", **given).task
    for task in (mine, spleen):
        assert (task.spacing, task.intensity, task.patch_size) == tuple(given.values())
    plain = opened(tmp_path / "Task09_Spleen").task
    assert plain == replace(TASKS["Task09_Spleen"], class_names=CLASSES)


@pytest.mark.parametrize(
    ("patch_size", "says"),
    [
        ((16, 16, 16), None),
        ((24, 24, 32), "3 of 3 cases are smaller than the patch (along X 2, Z 3): they are"),
    ],
)
def test_cases_that_are_smaller_than_the_patch_are_counted_once(tmp_path, caplog, patch_size, says):
    """On the task's grid."""
    shapes = [((20, 24, 16), (1, 1, 2)), ((16, 30, 20), (1, 1, 2)), ((48, 24, 36), (0.5, 1, 1))]
    root = write_dataset(tmp_path / "Mine", measurable(shapes), ["CT"])
    with caplog.at_level("INFO"):
        opened(root, spacing=(1.0, 1.0, 2.0), patch_size=patch_size)
    messages = [record.getMessage() for record in caplog.records]
    found = [message for message in messages if "smaller than the patch" in message]
    assert len(found) == (says is not None)
    assert not found or found[0].startswith(says) and "--patch_size" in found[0]


@pytest.mark.parametrize(
    ("name", "spacing", "grid"),
    [("Mine", "0.01", r"\d{3,} x \d{3,} x \d{3,}"), ("Task09_Spleen", "1e+06", "1 x 1 x 1")],
)
def test_a_spacing_that_makes_cases_too_large_or_a_single_voxel_is_refused(
    tmp_path, name, spacing, grid
):
    at = re.escape(" x ".join([spacing] * 3))
    says = f"^3 of 3 cases cannot be used .* become {grid} voxels at a spacing of {at} mm"
    with pytest.raises(UserError, match=f"{says}.* another --spacing"):
        opened(write(tmp_path / name), spacing=(float(spacing),) * 3)


def test_task04_is_halved_as_ever(task04):
    """The halves decide every search: these are those of searches on record."""
    fold = opened(task04, fold=0, num_folds=4)
    assert fold.task == TASKS["Task04_Hippocampus"] and fold.measured is None
    assert (len(fold.training), len(fold.validation)) == (156, 52)
    weights, arch = fold.halves(0)
    assert len(weights) == len(arch) == 78
    assert {case.name for case in [*weights, *arch]} == {case.name for case in fold.training}
    assert fold.halves(0) == (weights, arch) != fold.halves(1)
    odd = replace(fold, training=fold.training[:5])
    numbers = [[case.name.removeprefix("hippocampus_") for case in half] for half in odd.halves(0)]
    assert numbers == [["041", "015"], ["007", "024", "004"]]
