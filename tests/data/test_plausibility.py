"""Volumes that are unlike the training cases are reported; those that are like them are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from toys import opened

from dints.data.cases import Prepared, preprocess_image, read_image, resampling_of
from dints.data.dataset import Fold
from dints.data.listing import Case
from dints.data.nifti import read_header
from dints.data.phantom import write_phantom
from dints.data.plausibility import joined, ranges_of, sizes, unusual, unusual_intensities
from dints.data.tasks import Task


def written(path: Path, shape: tuple[int, ...], affine: np.ndarray, code: int = 1) -> str:
    image = nib.Nifti1Image(np.zeros(shape, np.int16), affine)
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    nib.save(image, path)
    return str(path)


def image_of(case: Case, task: Task, change: Callable = lambda voxels: voxels) -> np.ndarray:
    voxels, _ = read_image(case)
    changed = change(voxels.astype(np.float32))
    return preprocess_image(changed, resampling_of(case, task), task)


def test_sizes_are_those_along_the_axes_of_the_body(tmp_path):
    affine = np.eye(4)
    affine[:3, :3] = [[0, 0, 2.5], [-1.5, 0, 0], [0, 1, 0]]
    spacing, extent = sizes(read_header(written(tmp_path / "a.nii", (10, 10, 20), affine)))
    assert spacing == pytest.approx((2.5, 1.5, 1)) and extent == pytest.approx((50, 15, 10))


@pytest.fixture(scope="module")
def fold(phantom) -> Fold:
    return opened(phantom)


@pytest.fixture(scope="module")
def ranges(fold) -> dict:
    """Measure the phantom's training cases."""
    images = [image_of(case, fold.task).astype(np.float16) for case in fold.cases]
    prepared = [Prepared(image, None, None, None) for image in images]
    return ranges_of(fold.cases, prepared, fold.task)


def test_other_cases_of_the_phantom_are_like_these(fold, ranges, tmp_path):
    for case in opened(write_phantom(tmp_path / "Task00_Phantom", 2, 0, seed=7)).cases:
        assert unusual(case, ranges) == []
        assert unusual_intensities(image_of(case, fold.task), ranges) == []
    mri = replace(fold.task, intensity=None)
    assert "intensity" not in ranges_of(fold.cases, [], mri)  # no Hounsfield units


@pytest.mark.parametrize(
    ("change", "expected"),
    [(lambda hu: hu + 1024, "the mean of its"), (lambda hu: 0.5 + hu / 4000, "the spread of its")],
    ids=["shifted by 1024", "from 0 to 1"],
)
def test_other_units_of_intensity_are_reported(fold, ranges, change, expected):
    found = unusual_intensities(image_of(fold.cases[0], fold.task, change), ranges)
    assert any(remark.startswith(expected) and "Hounsfield" in remark for remark in found), found


@pytest.mark.parametrize(
    ("affine", "code", "expected"),
    [
        (np.diag([0.002, 2, 2, 1]), 1, "0.002 mm between voxels right-left, where"),
        (np.diag([2.0, 2, 1100, 1]), 1, "1100 mm between voxels bottom-top"),
        (np.diag([2.0, 2, 2, 1]), 0, "does not say where it lies"),
    ],
    ids=["metres", "slices of 1.1 m", "no place"],
)
def test_unusual_headers_are_reported(ranges, tmp_path, affine, code, expected):
    case = Case("case", (written(tmp_path / "case.nii", (40, 40, 40), affine, code),))
    assert any(expected in remark for remark in unusual(case, ranges))
    assert unusual_intensities(np.ones((1, 4, 4, 4)), {}) == []
    if code:  # a model file without ranges
        assert unusual(case, {}) == []


def test_ranges_of_ranks_are_joined():
    one, other = [[1.0, 2.0], [3.0, 4.0]], [[2.0, 1.0], [2.5, 9.0]]
    assert joined([{"spacing": one}, {"spacing": other}]) == {"spacing": [[1.0, 1.0], [3.0, 9.0]]}
