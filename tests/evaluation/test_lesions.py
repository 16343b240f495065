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
    ("reference", "prediction", "expected", "f1"),
    [
        ([(0, 4), (10, 14), (20, 24)], [(0, 4), (13, 17), (30, 34)], Lesions(2, 1, 1), 2 / 3),
        ([(0, 4), (10, 14)], [(0, 14)], Lesions(2, 0, 0), 1),  # a blob detects all that it covers
        ([(0, 4)], [(4, 8)], Lesions(0, 1, 1), 0),  # neighbours have no voxel in common
        ([], [], Lesions(0, 0, 0), math.nan),
    ],
)
def test_any_voxel_in_common_detects(reference, prediction, expected, f1):
    found = compare_lesions(mask(*reference), mask(*prediction))
    assert found == expected and found.f1 == pytest.approx(f1, nan_ok=True)


def test_it_is_as_pairs_one_by_one(min_iou=0.1):
    rng = np.random.default_rng(0)
    masks = [ndimage.gaussian_filter(rng.normal(size=(30, 30, 20)), 1) > 0.15 for _ in range(2)]
    parts = [ndimage.label(mask, np.ones((3, 3, 3))) for mask in masks]
    sets = [[labels == number for number in range(1, count + 1)] for labels, count in parts]

    def matches(a: np.ndarray, b: np.ndarray) -> bool:
        return (a & b).any() and (a & b).sum() / (a | b).sum() >= min_iou

    matched = np.array([[matches(a, b) for b in sets[1]] for a in sets[0]])
    assert min(matched.shape) > 10
    detected, matching = matched.any(1).sum(), matched.any(0).sum()
    expected = Lesions(detected, len(sets[0]) - detected, len(sets[1]) - matching)
    assert compare_lesions(*masks, min_iou) == expected
