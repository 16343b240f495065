"""The choice of post-processing follows nnU-Net's rule, by the Dice of components that are left."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import ndimage

from dints.evaluation.choice import choose, choose_checked, parts_of
from dints.evaluation.postprocessing import Postprocessing, Rule

NAMES = ("background", "a", "b")
SPACING = (1.0, 1.0, 2.0)


def labels(*bars: tuple[int, int, int]) -> np.ndarray:
    """Make labels with bars along x, of 2 mm3 a voxel: label, first and end."""
    found = np.zeros((60, 1, 1), np.uint8)
    for label, start, end in bars:
        found[start:end] = label
    return found


def case(reference: list[tuple[int, int, int]], prediction: list[tuple[int, int, int]]):
    return parts_of(labels(*reference), labels(*prediction), SPACING, len(NAMES))


def dice(reference: np.ndarray, prediction: np.ndarray) -> list[float]:
    values = []
    for label in (1, 2):
        first, second = reference == label, prediction == label
        count = first.sum() + second.sum()
        values.append(2 * (first & second).sum() / count if count else np.nan)
    return values


def test_dice_is_that_of_the_voxels_that_are_left():
    rng = np.random.default_rng(0)
    fields = (ndimage.gaussian_filter(rng.normal(size=(24, 20, 16)), 1) for _ in range(2))
    reference, prediction = (np.digitize(f, [0.15, 0.25]).astype(np.uint8) for f in fields)
    prediction[:, :, 10:] = 0
    parts = parts_of(reference, prediction, SPACING, 3)
    assert len(parts.label) > 20
    rules = [Rule(), Rule(True), Rule(min_volume_mm3=5), Rule(True, 1e6)]
    seen = set()
    for whole, first, second in product((False, True), rules, rules):
        postprocessing = Postprocessing(NAMES, whole, (first, second))
        left = postprocessing.apply(prediction, SPACING)
        assert parts.dice(postprocessing) == pytest.approx(dice(reference, left), nan_ok=True)
        seen.add(np.count_nonzero(left))
    assert len(seen) > 10


def test_a_removal_that_helps_is_chosen():
    """A far blob of each class is no organ's."""
    organs = [(1, 0, 10), (2, 10, 20)]
    cases = [case(organs, [*organs, (1, 30, 33), (2, 40, 42)])] * 2
    chosen, steps = choose(cases, NAMES)
    # what more there is helps nothing
    assert chosen.largest_foreground and chosen.rules == (Rule(), Rule())
    assert [step.kept for step in steps] == [True, False, False]
    assert steps[0].before == pytest.approx((20 / 23 + 20 / 22) / 2) and steps[0].after == 1
    assert "all classes together" in steps[0].what


def test_the_whole_is_not_cut_where_one_class_falls_though_the_mean_rises():
    cases = [case([(1, 0, 10), (2, 30, 32)], [(1, 0, 10), (1, 40, 49), (2, 30, 32), (2, 55, 56)])]
    cases += [case([(1, 0, 10)], [(1, 0, 10), (1, 40, 49)])]
    chosen, steps = choose(cases, NAMES)
    assert not chosen.largest_foreground and steps[0].what.endswith("together")
    assert chosen.rules[0] == Rule(True)  # each class by itself is better
    assert chosen.rules[1].largest


def test_small_parts_are_removed_up_to_the_best_volume():
    """Parts of 2 and 4 mm3 are wrong, one of 10 is right: 5 mm3 is the smallest to help most."""
    reference, whole = [(1, 0, 10), (1, 20, 25)], [(1, 0, 30)]
    cases = [case(reference, [*reference, (1, 30, 31), (1, 40, 42)]), case(whole, whole)]
    chosen, steps = choose(cases, NAMES)
    assert chosen.rules == (Rule(min_volume_mm3=5.0), Rule())
    assert steps[-1].what == "components of a below 5 mm3" and steps[-1].after == 1


def test_what_could_be_all_of_a_class_is_no_small_part():
    """A reference has 2 voxels (4 mm3) of it: a wrong part of 3 voxels is left."""
    reference = [(1, 0, 10), (1, 12, 19)]
    cases = [case(reference, [*reference, (1, 30, 33)]), case([(1, 0, 2)], [(1, 0, 2)])]
    chosen, steps = choose(cases, NAMES)
    assert not chosen.removes and not any("below" in step.what for step in steps)
    chosen, _ = choose(cases[:1], NAMES)
    assert chosen.rules[0] == Rule(min_volume_mm3=10.0)


def test_a_false_positive_case_counts_as_in_nnunet():
    """Dice 0 where the class is predicted in vain, no Dice once it is removed."""
    in_vain = case([(2, 0, 9)], [(2, 0, 9), (1, 30, 31)])
    chosen, _ = choose([in_vain, case([(1, 0, 10), (2, 30, 39)], [(1, 0, 8), (2, 30, 39)])], NAMES)
    assert chosen.rules[0] == Rule(min_volume_mm3=5.0)


def test_what_the_other_folds_choose_must_not_harm_a_folds_cases():
    """Four cases with a blob choose a removal that harms the two of the other fold."""
    blob = case([(1, 0, 10)], [(1, 0, 10), (1, 30, 36)])
    two_parts = case([(1, 0, 10), (1, 30, 38)], [(1, 0, 10), (1, 30, 38)])
    chosen, steps = choose([blob] * 4 + [two_parts] * 2, NAMES)
    assert chosen.removes and steps[0].kept and steps[0].after > steps[0].before
    found = choose_checked([[blob] * 4, [two_parts] * 2], NAMES)
    assert found.expected[0] == pytest.approx((4 * 20 / 26 + 2 * 20 / 28) / 6)
    assert found.expected[0] < steps[0].before
    assert found.harms and not found.chosen.removes
    assert [step.what for step in found.steps] == [step.what for step in steps]
    assert not any(step.kept for step in found.steps)
    mixed = [[blob, blob, two_parts]] * 2  # the others choose alike, and it helps
    assert choose_checked(mixed, NAMES).chosen == chosen and not choose_checked(mixed, NAMES).harms
