"""A case's rows: Dice in both conventions, volumes, and what is left out where a class is
absent.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from dints.evaluation.scores import SCORES, score_case

SPACING = (0.8, 1.0, 2.5)


def labels(seed: int) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(20, 18, 12)), 1.5)
    return np.digitize(field, [0.05, 0.15]).astype(np.uint8)


def test_dice_and_volumes_are_counts_of_voxels(seed=0):
    reference, prediction = labels(seed), labels(seed + 10)
    for row, label in zip(
        score_case("a", reference, prediction, SPACING, {1: "one", 2: "two"}), (1, 2), strict=True
    ):
        first, second = (
            set(map(tuple, np.argwhere(mask == label))) for mask in (reference, prediction)
        )
        dice = 2 * len(first & second) / (len(first) + len(second))
        assert row.dice == row.dice_nnunet == pytest.approx(dice, abs=1e-12)
        assert (
            row.reference_ml == pytest.approx(len(first) * 0.002)
            and row.prediction_ml == len(second) * 0.002
        )
        assert row.volume_error == pytest.approx((len(second) - len(first)) / len(first))
        assert (row.case, row.label, row.false_positive) == ("a", ["one", "two"][label - 1], False)


def test_what_lies_around_the_masks_does_not_matter():
    reference, prediction = labels(0)[3:12, 2:9, 1:7], labels(1)[3:12, 2:9, 1:7]
    small, large = (
        score_case(
            "a", *(np.pad(mask, width) for mask in (reference, prediction)), SPACING, {1: "1"}
        )
        for width in (0, 9)
    )
    assert small == large


def box(*ends: int) -> np.ndarray:
    mask = np.zeros((10, 10, 10), np.uint8)
    if ends:
        mask[ends[0] : ends[1], 2:6, 2:6] = 1
    return mask


def test_both_conventions_for_an_absent_class():
    (neither,) = score_case("a", box(), box(), SPACING, {1: "1"})
    assert (
        all(math.isnan(getattr(neither, score)) for score in SCORES) and not neither.false_positive
    )

    (false_positive,) = score_case("a", box(), box(2, 6), SPACING, {1: "1"})
    assert false_positive.dice_nnunet == 0 and false_positive.false_positive
    assert all(
        math.isnan(getattr(false_positive, score)) for score in SCORES if score != "dice_nnunet"
    )
    assert (false_positive.lesions_false, false_positive.reference_ml) == (1, 0)

    (missed,) = score_case("a", box(2, 6), box(), SPACING, {1: "1"})
    assert (missed.dice, missed.dice_nnunet, missed.surface_dice, missed.lesion_f1) == (0, 0, 0, 0)
    assert (missed.hausdorff95_mm, missed.volume_error, missed.false_positive) == (
        math.inf,
        -1,
        False,
    )


def test_tolerance_and_overlap_are_handed_on():
    settings = {"tolerance_mm": 0.9, "lesion_iou": 0.9}
    strict, lenient = (
        score_case("a", box(2, 6), box(3, 7), SPACING, {1: "1"}, **chosen)[0]
        for chosen in ({**settings, "tolerance_mm": 0.7}, {**settings, "lesion_iou": 0.5})
    )
    assert strict.surface_dice < 1 and strict.lesion_f1 == 0
    assert lenient.surface_dice == lenient.lesion_f1 == 1
    assert strict.hausdorff95_mm == pytest.approx(0.8)
