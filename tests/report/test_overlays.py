"""Pictures show the patient's right on the left, voxels of their size, and masks' outlines."""

from __future__ import annotations

import base64
import io
import re

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from dints.data.tasks import Task
from dints.report.overlays import View, data_uri, outline, overlay, percentiles

CT = Task("Toy", "CT", 1, ("background", "a", "b"), intensity=(0.0, 100.0))
SPACING = np.array([2.0, 1.0, 4.0])


def pixels(uri: str) -> np.ndarray:
    content = io.BytesIO(base64.b64decode(uri.partition(",")[2]))
    return np.asarray(Image.open(content).convert("L")).astype(int)


def corners(path: str) -> np.ndarray:
    """Return the points of each corner of a path of one loop, in voxels."""
    start, moves = re.fullmatch(r"M(.*?)l(.*)z", path).groups()
    steps = np.array([start.split(), *np.array(moves.split()).reshape(-1, 2)], int)
    return steps.cumsum(0) / 2


def body() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make image, mask and affine, RAS: class 1 is right, in front and above, and bright."""
    mask = np.zeros((20, 30, 12), np.uint8)
    mask[14:18, 22:27, 8:11] = 1
    return (80 * mask + 10.0)[None].astype(np.float32), mask, np.diag([*SPACING, 1])


def turned(codes: str, *volumes: np.ndarray) -> list[np.ndarray]:
    """Return volumes (x, y, z) and their affine as a file of another orientation has them."""
    images = [nib.Nifti1Image(volume, np.diag([*SPACING, 1])) for volume in volumes]
    start, end = map(nib.orientations.axcodes2ornt, ("RAS", codes))
    turn = nib.orientations.ornt_transform(start, end)
    images = [image.as_reoriented(turn) for image in images]
    return [*(np.asarray(image.dataobj) for image in images), images[0].affine]


class TestOverlay:
    def of(self, codes: str = "RAS", **options: int) -> dict[str, View]:
        image, mask, _ = body()
        image, mask, affine = turned(codes, image[0], mask)
        drawn = overlay(image[None], mask, None, affine, CT, **options)
        return {view.name: view for view in drawn.views}

    @pytest.mark.parametrize("codes", ["LPS", "PIR"])
    def test_it_is_the_same_however_the_file_is_turned(self, codes):
        assert self.of(codes) == self.of()

    @pytest.mark.parametrize(
        ("name", "letters"), [("axial", "RLAP"), ("coronal", "RLSI"), ("sagittal", "APSI")]
    )
    def test_right_is_left_and_front_and_top_are_above(self, name, letters):
        """The structure lies to the right, in front and above."""
        view = self.of()[name]
        assert view.letters == letters
        rows, columns = (pixels(view.planes[0].image) > 127).nonzero()
        height, width = pixels(view.planes[0].image).shape
        (line,) = view.planes[0].outlines
        middle = columns.mean() + 0.5, rows.mean() + 0.5
        assert middle[0] < width / 2 and middle[1] < height / 2
        assert corners(line.path).mean(0) == pytest.approx(middle)

    def test_planes_are_those_of_most_errors_or_else_of_most_structure(self):
        image, mask, affine = body()
        reference = mask.copy()
        reference[3, 4, 5] = 2
        wrong, alone, right = (
            overlay(image, mask, other, affine, CT) for other in (reference, None, mask)
        )
        assert [view.shown for view in wrong.views] == [6, 5, 4]
        assert wrong.chosen == "with most errors"
        for found in (alone, right):
            assert [view.shown for view in found.views] == [9, 23, 15]
            assert found.chosen == "with most of what was found"
        kinds = [(line.kind, line.label) for line in wrong.views[0].planes[0].outlines]
        assert kinds == [("reference", 2)]
        nothing = overlay(image, 0 * mask, None, affine, CT)
        assert nothing.chosen == "midway" and [view.shown for view in nothing.views] == [7, 16, 11]

    def test_many_planes_go_through_the_structure_and_hold_the_one_that_is_shown(self):
        views = self.of(most_planes=6)
        for view in views.values():
            numbers = [plane.number for plane in view.planes]
            assert view.shown in numbers and len(numbers) <= 6
            assert len(set(np.diff(numbers))) == 1 and numbers[0] >= 1 and numbers[-1] <= view.count
        assert sum(len(plane.outlines) for plane in views["axial"].planes) >= 2


def test_an_outline_runs_between_voxels_within_and_without():
    mask = np.zeros((5, 7), bool)
    mask[1:3, 2:6] = True
    path, top = outline(mask)
    found = corners(path)
    assert {*found[:, 0]} == {2.0, 2.5, 5.5, 6.0} and {*found[:, 1]} == {1.0, 1.5, 2.5, 3.0}
    # straight runs have no points between
    assert len(found) == 8 and 2 <= top[0] <= 6 and top[1] == 1.0
    assert outline(np.ones((2, 2), bool))[0].count("M") == 1  # up to the border


def test_windows():
    shown = pixels(data_uri(np.array([[-50, 0, 50, 100, 900]]), (0, 100), 400))
    assert shown.tolist() == [[0, 0, 128, 255, 255]]
    assert max(pixels(data_uri(np.zeros((900, 300)), (0, 1), 400)).shape) == 400
    low, high = percentiles(np.array([0.0] * 100 + list(range(1, 101))))
    assert 1 < low < 3 and 99 < high < 101  # of the non-zero ones
    assert percentiles(np.zeros(5)) == (0.0, 1.0)
    for value in (-3e38, 1e10):
        even = np.full((2, 3), value, np.float32)
        assert pixels(data_uri(even, percentiles(even), 400)).tolist() == [[0] * 3] * 2
