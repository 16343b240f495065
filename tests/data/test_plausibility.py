"""Volumes that are unlike the training cases are told, those that are like them are not, and header units count."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dints.data.leniency import Leniency
from dints.data.opening import open_dataset

from dints.data.cases import Prepared, open_cases, preprocess_image, read_image
from dints.data.formats import list_cases
from dints.data.listing import split_fold
from dints.data.nifti import read_header, save_segmentation
from dints.data.phantom import write_phantom
from dints.data.plausibility import doubts, doubts_of_intensities, joined, ranges_of, sizes
from dints.data.tasks import Task

TASK = Task("Toy", "CT", 1, ("background", "organ"), spacing=(2.0, 2.0, 2.0), intensity=(-100.0, 300.0))


def written(path: Path, shape: tuple[int, ...], affine: np.ndarray, unit: str = "mm", code: int = 1) -> Path:
    image = nib.Nifti1Image(np.zeros(shape, np.int16), affine)
    image.header.set_xyzt_units(unit)
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    nib.save(image, path)
    return path


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (np.diag([1.0, 2, 3]), (1, 2, 3)),
        (np.diag([-1.0, -2, 3]), (1, 2, 3)),
        (np.array([[0, 0, 2.5], [-1.5, 0, 0], [0, 1, 0]]), (2.5, 1.5, 1)),
    ],
)
def test_sizes_are_those_along_the_axes_of_the_body(tmp_path, axes, expected):
    affine = np.eye(4)
    affine[:3, :3] = axes
    spacing, extent = sizes(read_header(str(written(tmp_path / "a.nii", (10, 10, 10), affine))))
    assert spacing == pytest.approx(expected) and extent == pytest.approx(10 * np.array(expected))


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e-3), ("mm", 1), ("micron", 1e3), ("unknown", 1)])
def test_a_headers_unit_counts_and_its_segmentation_has_it_too(tmp_path, unit, factor):
    affine = np.diag([-2.0 * factor, 1.5 * factor, 3 * factor, 1])
    affine[:3, 3] = np.array([40, -30, 10]) * factor
    header = read_header(str(written(tmp_path / "a.nii", (4, 5, 6), affine, unit)))
    assert header.spacing == pytest.approx([2, 1.5, 3]) and header.affine[:3, 3] == pytest.approx([40, -30, 10])
    save_segmentation(np.ones((4, 5, 6), np.uint8), header, tmp_path / "b.nii")
    segmentation = nib.load(tmp_path / "b.nii")
    assert np.allclose(segmentation.affine, affine) and segmentation.header.get_xyzt_units()[0] == unit


class TestDoubts:
    @pytest.fixture(scope="class")
    def ranges(self, phantom):
        """Measure the phantom's training cases."""
        dataset = open_dataset(phantom)
        prepared = [self.prepared(case, dataset.task) for case in dataset.cases]
        return ranges_of(dataset.cases, prepared, dataset.task), dataset

    def image(self, case, task, change=lambda voxels: voxels) -> np.ndarray:
        voxels, _ = read_image(case.images, Leniency())
        return preprocess_image(change(voxels.astype(np.float32)), case.resampling(task), task)

    def prepared(self, case, task) -> Prepared:
        return Prepared(self.image(case, task).astype(np.float16), None, None, None)

    def test_none_of_other_cases_of_the_phantom(self, ranges, tmp_path):
        found, dataset = ranges
        others = open_dataset(write_phantom(tmp_path / "Task00_Phantom", 6, 1, seed=7))
        for case in others.cases:
            assert doubts(case, found) == [] and doubts_of_intensities(self.image(case, dataset.task), found) == []

    def test_none_of_real_cases_of_another_fold(self, task04):
        dataset = open_dataset(task04)
        training_cases, validation_cases = split_fold(dataset.cases, 4, 0)
        found = ranges_of(training_cases, [], dataset.task)
        assert [doubt for case in validation_cases for doubt in doubts(case, found)] == []
        assert "intensity" not in found  # no Hounsfield units

    @pytest.mark.parametrize(
        ("change", "expected"),
        [(lambda hu: hu + 1024, "the mean of its intensities"), (lambda hu: 0.5 + hu / 4000, "the spread of its")],
        ids=["shifted by 1024", "from 0 to 1"],
    )
    def test_other_units_of_intensity(self, ranges, change, expected):
        found, dataset = ranges
        told = doubts_of_intensities(self.image(dataset.cases[0], dataset.task, change), found)
        assert any(doubt.startswith(expected) and "Hounsfield" in doubt for doubt in told), told

    @pytest.mark.parametrize(
        ("affine", "code", "expected"),
        [
            (np.diag([0.002, 0.002, 0.002, 1]), 1, "0.002 mm between voxels right-left, where training cases have"),
            (np.diag([2.0, 2, 1100, 1]), 1, "1100 mm between voxels bottom-top"),
            (np.diag([2.0, 2, 2, 1]), 0, "does not say where it lies"),
        ],
        ids=["metres", "slices of 1.1 m", "no place"],
    )
    def test_headers(self, ranges, tmp_path, affine, code, expected):
        path = written(tmp_path / "case.nii", (40, 40, 40), affine, code=code)
        (tmp_path / "dataset.json").write_text('{"test": ["case.nii"]}')
        task = Task("Toy", "CT", 1, ("background", "organ"), spacing=None)
        (case,) = open_cases(list_cases(tmp_path, key="test"), task, Leniency())
        assert case.files == (str(path),)
        assert any(expected in doubt for doubt in doubts(case, ranges[0]))

    def test_a_model_without_ranges_doubts_no_sizes(self, ranges):
        assert doubts(ranges[1].cases[0], {}) == [] == doubts_of_intensities(np.ones((1, 4, 4, 4)), {})


def test_ranges_of_ranks_are_joined():
    ranges = [{"spacing": [[1.0, 2.0], [3.0, 4.0]]}, {"spacing": [[2.0, 1.0], [2.5, 9.0]]}]
    assert joined(ranges) == {"spacing": [[1.0, 1.0], [3.0, 9.0]]}
