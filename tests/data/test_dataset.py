"""Datasets opened: every header once, the task with its overrides, and what is refused before voxels are read."""

from __future__ import annotations

import pickle
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from toys import ALONE, measurable, write_dataset

import search_dints
from dints.data import cases as cases_module
from dints.data import nifti
from dints.data.cache import open_cache
from dints.data.cases import prepare
from dints.data.loaders import training_loader, validation_loader
from dints.data.opening import names, open_dataset
from dints.data.tasks import TASKS
from dints.errors import UserError

CLASSES = ("background", "a", "b")
SHAPES = [((20, 24, 16), (1, 1, 3)), ((16, 30, 20), (1, 1, 4)), ((24, 20, 18), (2, 2, 5))]


def write(root: Path, *, nnunet: bool = False) -> Path:
    return write_dataset(root, measurable(SHAPES), ["CT"], CLASSES, nnunet=nnunet)


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """Count how often the header of each file is read, whichever module asks for it."""
    counts = Counter()

    def read_and_count(path: str) -> nifti.Header:
        counts[path] += 1
        return read_header(path)

    read_header = nifti.read_header
    for name, module in list(sys.modules.items()):
        if name.startswith("dints.") and getattr(module, "read_header", None) is read_header:
            monkeypatch.setattr(module, "read_header", read_and_count)
    assert cases_module.read_header is read_and_count
    return counts


@pytest.mark.parametrize("mode", ["ram", "disk", "none"])
@pytest.mark.parametrize(("name", "nnunet"), [("Task09_Spleen", False), ("Mine", False), ("Mine", True)])
def test_every_header_is_read_once(tmp_path, reads, name, nnunet, mode):
    """It is read once from the opening of a dataset to its batches, whether it is measured or known from the table."""
    dataset = open_dataset(write(tmp_path / name, nnunet=nnunet), patch_size=(16, 16, 16))
    cache = open_cache(dataset.cases, dataset.task, tmp_path / "cache", ALONE, mode=mode)
    loader = training_loader(dataset.cases[1:], cache, ALONE, batch_size=2, steps=2, num_workers=0)
    assert len([*loader.epoch(0), *validation_loader(dataset.cases[:1], cache, ALONE)]) == 3
    assert (dataset.measured is None) == (name in TASKS)
    assert reads == {file: 1 for case in dataset.cases for file in case.files} and len(reads) == 6


def test_an_opened_case_travels_to_other_ranks_and_is_prepared_there(tmp_path, reads):
    dataset = open_dataset(write(tmp_path / "Mine"))
    reads.clear()
    case, travelled = dataset.cases[0], pickle.loads(pickle.dumps(dataset.cases[0]))
    ours, theirs = (prepare(each, dataset.task, dataset.leniency) for each in (case, travelled))
    assert travelled.files == case.files and not reads
    assert np.array_equal(ours.image, theirs.image) and np.array_equal(ours.label, theirs.label)


def test_what_is_given_takes_the_place_of_what_is_known_and_what_is_measured(tmp_path, caplog):
    given = {"spacing": [2.0, 2.0, 3.0], "intensity": [0.0, 5.0], "patch_size": [16, 32, 48]}
    with caplog.at_level("INFO"):
        mine = open_dataset(write(tmp_path / "Mine"), **given).task
    assert "Mine: spacing 2 x 2 x 3 mm, intensity 0 to 5, patch 16 x 32 x 48" in caplog.text
    (tmp_path / "Mine").rename(tmp_path / "Task09_Spleen")
    spleen = open_dataset(tmp_path / "Task09_Spleen", **given).task
    for task in (mine, spleen):
        assert (task.spacing, task.intensity, task.patch_size) == ((2, 2, 3), (0, 5), (16, 32, 48))
    plain = open_dataset(tmp_path / "Task09_Spleen", spacing=None).task
    assert (plain.spacing, plain.intensity) == (TASKS["Task09_Spleen"].spacing, TASKS["Task09_Spleen"].intensity)
    assert plain.class_names == CLASSES


@pytest.mark.parametrize(
    ("patch_size", "says"),
    [
        ((16, 16, 16), None),
        ((17, 16, 16), "1 of 3 cases are smaller than the patch (along X 1): they are padded to it by reflection, "),
        ((24, 24, 32), "3 of 3 cases are smaller than the patch (along X 2, Z 3): they are padded to it"),
    ],
)
def test_cases_that_are_smaller_than_the_patch_are_counted_once(tmp_path, caplog, patch_size, says):
    """On the task's grid; a measured dataset's patches are 32 at least, so that small volumes are padded in most."""
    shapes = [((20, 24, 16), (1, 1, 2)), ((16, 30, 20), (1, 1, 2)), ((48, 24, 36), (0.5, 1, 1))]
    with caplog.at_level("INFO"):
        root = write_dataset(tmp_path / "Mine", measurable(shapes), ["CT"], CLASSES)
        open_dataset(root, spacing=(1.0, 1.0, 2.0), patch_size=patch_size)
    said = [record.getMessage() for record in caplog.records if "smaller than the patch" in record.getMessage()]
    assert len(said) == (says is not None)
    assert not said or said[0].startswith(says) and "--patch_size" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("name", ["Task09_Spleen", "Mine"])
@pytest.mark.parametrize(("spacing", "grid"), [("0.01", r"\d{3,} x \d{3,} x \d{3,}"), ("1e+06", "1 x 1 x 1")])
def test_a_spacing_that_makes_cases_too_large_or_a_single_voxel_is_refused(tmp_path, name, spacing, grid):
    at = re.escape(" x ".join([spacing] * 3))
    says = f"^3 of 3 cases cannot be used .* would become {grid} voxels at a spacing of {at} mm.* another --spacing"
    with pytest.raises(UserError, match=says):
        open_dataset(write(tmp_path / name), spacing=(float(spacing),) * 3)


def test_a_patch_that_the_network_cannot_take_is_reported_with_the_nearest_that_it_can(tmp_path):
    flags = ["--root", write(tmp_path / "Mine"), "--output_root", tmp_path / "run", "--patch_size", 96, 40, 30]
    with pytest.raises(UserError, match="--patch_size 96 40 30 does not fit 4 depths.* for example 96 (32|48) 32"):
        search_dints.prepare(search_dints.parse_args([*map(str, flags)]))


def test_cases_are_called_by_their_image_files(tmp_path):
    write_dataset(tmp_path, ((np.ones((9, 9, 9, 2)), np.ones((9, 9, 9)), np.eye(4)),), ["a", "b"], CLASSES, nnunet=True)
    assert names(open_dataset(tmp_path).cases) == ["case_0_0000.nii.gz", "case_0_0001.nii.gz"]


def test_task04_is_opened_with_the_tables_facts(task04):
    dataset = open_dataset(task04)
    assert dataset.task == TASKS["Task04_Hippocampus"] and dataset.measured is None and len(dataset.cases) == 208
    assert names(dataset.cases[:1]) == ["hippocampus_003.nii.gz"]
