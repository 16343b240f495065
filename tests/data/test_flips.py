"""Patches are flipped along the axes along which classes lie as often one way as the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toys import ALONE, CLASSES, TASK, cache_of, opened

from dints.data import flips
from dints.data.cases import Prepared, class_centres
from dints.data.flips import Flips, choose_flips, sides_of
from dints.data.tasks import Task

Corner = tuple[int, int, int]


def case_of(*corners: Corner) -> Prepared:
    """Make a case with a block of each class at its corner, class 1 first."""
    label = np.zeros((20, 20, 20), np.uint8)
    for value, corner in enumerate(corners, 1):
        label[tuple(slice(start, start + 4) for start in corner)] = value
    return Prepared(None, label, None, class_centres(label, TASK.num_classes))


def choose(choice: list[str], cases: list[Prepared], task: Task = TASK) -> Flips:
    return choose_flips(choice, cases, task, ALONE)


# Class 1 behind class 2, and as often on either side of it otherwise.
BEHIND = [(2, 2, 2), (2, 12, 12)], [(12, 2, 12), (2, 12, 2)]
ONE_SIDED = [case_of(*BEHIND[number % 2]) for number in range(6)]


def test_an_axis_with_a_class_always_on_one_side_of_another_is_left_out(caplog):
    caplog.set_level("INFO")
    found = choose(["auto"], ONE_SIDED)
    assert found.axes == (0, 2)
    says = "flips along {}; organ is nearer to the {} than lesion in {} of 6 cases"
    assert found.reasons[:2] == (
        says.format("X: yes", "right", 3),
        says.format("Y: no", "front", 0),
    )
    assert all(reason in caplog.text for reason in found.reasons)


def test_all_ranks_count():
    ranks = [sides_of(ONE_SIDED[rank::2], TASK, ALONE) for rank in range(2)]
    whole = sides_of(ONE_SIDED, TASK, ALONE)
    assert torch.equal(sum(ranks), whole) and whole.sum((0, 2)).tolist() == [6, 6, 6]


@pytest.mark.parametrize(
    ("choice", "axes"), [(["all"], (0, 1, 2)), (["none"], ()), (["Z", "X"], (0, 2))]
)
def test_given_axes_are_not_measured(choice, axes):
    assert choose(choice, ONE_SIDED) == Flips(axes)


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        ((0, 0), True),  # classes that never meet
        ((2, 0), True),  # few cases tell nothing
        ((0, 3), False),
        ((70, 30), True),
        ((80, 20), False),
    ],
)
def test_how_one_sided_is_too_one_sided(ways, expected):
    sides = np.full((1, 3, 2), 50)
    sides[0, 1] = ways
    assert (1 in flips.allowed(sides, TASK).axes) == expected


def test_the_most_one_sided_pair_decides():
    task = Task("Toy", "CT", 1, ("background", "left", "right", "middle"))
    sides = np.full((3, 3, 2), 50)
    sides[flips.class_pairs(task).index((1, 2)), 0] = 1, 99
    found = flips.allowed(sides, task)
    assert found.axes == (1, 2)
    assert "left is nearer to the right than right in 1 of 100 cases" in found.reasons[0]
    one_class = Task("Toy", "CT", 1, CLASSES[:2])
    assert flips.allowed(np.zeros((0, 3, 2)), one_class).axes == (0, 1, 2)


def test_centres_are_the_mean_voxels_of_classes():
    label = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.uint8)
    centres = class_centres(label, 4)
    for value in (1, 2):
        expected = np.argwhere(label == value).mean(0)
        np.testing.assert_allclose(centres[value], expected, rtol=1e-6)
    assert np.isnan(centres[[0, 3]]).all() and centres.dtype == np.float32


@pytest.mark.slow
def test_real_hippocampi_are_flipped_along_no_axis_but_perhaps_the_first(task04):
    fold = opened(task04, fold=0, num_folds=2)
    held = cache_of("ram", Path(), fold.task).hold(fold.training[:60], "test")
    found = choose(["auto"], held, fold.task)
    assert not {1, 2} & {*found.axes}
    says = "Anterior is nearer to the front than Posterior in 60 of 60 cases"
    assert says in found.reasons[1]
