"""Lesions are components of 26 neighbours, and match by overlap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from dints.evaluation.lesions import Lesions, compare_lesions


def mask(*boxes: tuple[int, int]) -> np.ndarray:
    """Make a bar along x that is set between the given ends."""
    voxels = np.zeros((40, 3, 3), bool)
    for start, end in boxes:
        voxels[start:end, 1, 1] = True
    return voxels


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ([(0, 4), (10, 14), (20, 24)], [(0, 4), (13, 17), (30, 34)], Lesions(2, 1, 1)),
        ([(0, 4), (10, 14)], [(0, 14)], Lesions(2, 0, 0)),  # a blob detects all that it covers
        ([(0, 14)], [(0, 4), (10, 14)], Lesions(1, 0, 0)),  # both parts belong to it
        ([(0, 4)], [], Lesions(0, 1, 0)),
        ([], [(0, 4), (6, 7)], Lesions(0, 0, 2)),
        ([], [], Lesions(0, 0, 0)),
        ([(0, 4)], [(4, 8)], Lesions(0, 1, 1)),  # neighbours have no voxel in common
    ],
)
def test_any_voxel_in_common_detects(reference, prediction, expected):
    found = compare_lesions(mask(*reference), mask(*prediction))
    assert found == expected
    parts = 2 * expected.detected + expected.missed + expected.false
    assert math.isnan(found.f1) if not parts else found.f1 == 2 * expected.detected / parts


def test_intersection_over_union_can_be_asked_for():
    reference, prediction = mask((0, 4), (10, 14)), mask((1, 5), (13, 17))  # 3 of 5, and 1 of 7
    assert compare_lesions(reference, prediction, 0.1) == Lesions(2, 0, 0)
    assert compare_lesions(reference, prediction, 0.15) == Lesions(1, 1, 1)
    assert compare_lesions(reference, prediction, 0.6) == Lesions(1, 1, 1)
    assert compare_lesions(reference, prediction, 0.61) == Lesions(0, 2, 2)


def test_corners_connect():
    diagonal = np.eye(4, dtype=bool)[:, :, None] & np.eye(4, dtype=bool)[:, None]
    assert compare_lesions(diagonal, np.zeros_like(diagonal)) == Lesions(0, 1, 0)


def test_it_is_what_pairs_one_by_one_say(min_iou=0.1):
    rng = np.random.default_rng(0)
    masks = [ndimage.gaussian_filter(rng.normal(size=(30, 30, 20)), 1) > 0.15 for _ in range(2)]
    parts = [ndimage.label(mask, np.ones((3, 3, 3))) for mask in masks]
    sets = [[labels == number for number in range(1, count + 1)] for labels, count in parts]
    matches = np.array(
        [
            [(a & b).any() and (a & b).sum() / (a | b).sum() >= min_iou for b in sets[1]]
            for a in sets[0]
        ]
    )
    assert min(matches.shape) > 10
    detected, matching = matches.any(1).sum(), matches.any(0).sum()
    expected = Lesions(detected, len(sets[0]) - detected, len(sets[1]) - matching)
    assert compare_lesions(*masks, min_iou) == expected
