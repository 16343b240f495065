"""A case's rows: Dice in both conventions, volumes, and scores that an absent class leaves out."""

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


def box(*ends: int) -> np.ndarray:
    mask = np.zeros((10, 10, 10), np.uint8)
    if ends:
        mask[ends[0] : ends[1], 2:6, 2:6] = 1
    return mask


def test_dice_and_volumes_are_counts_of_voxels():
    reference, prediction = labels(0), labels(10)
    rows = score_case("a", reference, prediction, SPACING, {1: "one", 2: "two"})
    assert [(row.case, row.label) for row in rows] == [("a", "one"), ("a", "two")]
    for label, row in enumerate(rows, start=1):
        first, second = reference == label, prediction == label
        dice = 2 * (first & second).sum() / (first.sum() + second.sum())
        assert row.dice == row.dice_nnunet == pytest.approx(dice, abs=1e-12)
        volumes = first.sum() * 0.002, second.sum() * 0.002
        assert (row.reference_ml, row.prediction_ml) == pytest.approx(volumes)
        assert row.volume_error == pytest.approx(second.sum() / first.sum() - 1)


def test_voxels_around_the_masks_do_not_matter():
    masks = labels(0)[3:12, 2:9, 1:7], labels(1)[3:12, 2:9, 1:7]
    padded = [np.pad(mask, 9) for mask in masks]
    assert score_case("a", *masks, SPACING, {1: "1"}) == score_case("a", *padded, SPACING, {1: "1"})


def test_both_conventions_for_an_absent_class():
    pairs = ((box(), box()), (box(), box(2, 6)), (box(2, 6), box()))
    neither, false_positive, missed = (score_case("a", *p, SPACING, {1: "1"})[0] for p in pairs)
    assert all(math.isnan(getattr(neither, score)) for score in SCORES)
    assert not neither.false_positive and not missed.false_positive
    assert false_positive.dice_nnunet == 0 and false_positive.false_positive
    defined = [score for score in SCORES if not math.isnan(getattr(false_positive, score))]
    assert defined == ["dice_nnunet"]
    assert (false_positive.lesions_false, false_positive.reference_ml) == (1, 0)
    assert (missed.dice, missed.dice_nnunet, missed.surface_dice, missed.lesion_f1) == (0, 0, 0, 0)
    assert (missed.hausdorff95_mm, missed.volume_error) == (math.inf, -1)


def test_tolerance_and_overlap_are_handed_on():
    strict, lenient = (
        score_case("a", box(2, 6), box(3, 7), SPACING, {1: "1"}, tolerance_mm=mm, lesion_iou=iou)[0]
        for mm, iou in ((0.7, 0.9), (0.9, 0.5))
    )
    assert strict.surface_dice < 1 and strict.lesion_f1 == 0
    assert lenient.surface_dice == lenient.lesion_f1 == 1
