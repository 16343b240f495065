"""Patches are flipped along the axes along which classes lie as often one way as the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dints.data.leniency import Leniency
from dints.data.opening import open_dataset
from toys import ALONE, TASK, open_pair, save

from dints.data import flips
from dints.data.augmentation import chain
from dints.data.cache import Cache
from dints.data.cases import Case, class_centres
from dints.data.listing import split_fold
from dints.data.loaders import TrainingLoader, training_loader
from dints.data.tasks import Task
from dints.running.processes import Processes


def case_of(folder: Path, *corners: tuple[int, int, int]) -> Case:
    """Make a case with a block of each class at its corner, class 1 first."""
    label = np.zeros((20, 20, 20), np.uint8)
    for value, corner in enumerate(corners, 1):
        label[tuple(slice(start, start + 4) for start in corner)] = value
    image = np.random.default_rng(0).normal(100, 60, label.shape).astype(np.float32)
    return open_pair(save(folder / "image.nii.gz", image), save(folder / "label.nii.gz", label))


def loader_of(
    cases: list[Case], processes: Processes = ALONE, mode: str = "ram", folder: Path = Path()
) -> TrainingLoader:
    cache = Cache(mode, folder, TASK, Leniency(), 1)
    return training_loader(cases, cache, processes, batch_size=1, steps=1, num_workers=0)


FRONT = [(2, 2, 2), (2, 12, 12)], [(12, 2, 12), (2, 12, 2)]  # class 1 behind class 2; on either side otherwise


@pytest.fixture(scope="module")
def one_sided(tmp_path_factory) -> list[Case]:
    """Six cases in which class 1 lies behind class 2, and as often on either side of it otherwise."""
    return [case_of(tmp_path_factory.mktemp("case"), *FRONT[number % 2]) for number in range(6)]


@pytest.mark.parametrize("mode", ["ram", "disk", "none"])
def test_an_axis_with_a_class_always_on_one_side_of_another_is_left_out(one_sided, mode, tmp_path, caplog):
    caplog.set_level("INFO")
    loader = loader_of(one_sided, mode=mode, folder=tmp_path)
    found = flips.choose(["auto"], [loader], TASK, ALONE)
    assert found.axes == (0, 2)
    assert found.reasons[1] == "flips along Y: no; organ is nearer to the front than lesion in 0 of 6 cases"
    assert found.reasons[0] == "flips along X: yes; organ is nearer to the right than lesion in 3 of 6 cases"
    assert all(reason in caplog.text for reason in found.reasons)


def test_symmetric_labels_are_flipped_along_all_axes(tmp_path):
    corners = ([(2, 2, 2), (12, 12, 12)], [(12, 12, 2), (2, 2, 12)], [(2, 12, 12), (12, 2, 2)])
    cases = [case_of(tmp_path / f"{a}{b}", *blocks[::b]) for a, blocks in enumerate(corners) for b in (1, -1)]
    found = flips.choose(["auto"], [loader_of(cases)], TASK, ALONE)
    assert found.axes == (0, 1, 2) and all("in 3 of 6 cases" in reason for reason in found.reasons)


def test_patches_are_flipped_along_the_chosen_axes_only(one_sided):
    drawn = {}
    for axes in ((0, 1, 2), (0, 2), ()):
        loader = loader_of(one_sided)
        loader.augment_by(chain(flip_axes=axes))
        samples = loader.loader.dataset
        drawn[axes] = [samples[epoch, 0, index][2] for epoch in range(20) for index in range(6)]
    for axes, draws in drawn.items():
        flipped = [set(draw["flip"]) for draw in draws]
        assert flipped == [set(draw["flip"]) & {*axes} for draw in drawn[0, 1, 2]]
        assert set().union(*flipped) == {*axes}
        rest = [{name: value for name, value in draw.items() if name != "flip"} for draw in draws]
        assert rest == [{name: value for name, value in draw.items() if name != "flip"} for draw in drawn[0, 1, 2]]


def test_all_loaders_and_all_ranks_count(one_sided):
    sides = [
        flips.sides_of([loader_of(cases, Processes(rank, 2, torch.device("cpu")))], TASK, ALONE)
        for cases in (one_sided[:4], one_sided[4:])
        for rank in range(2)
    ]
    whole = flips.sides_of([loader_of(one_sided[:4]), loader_of(one_sided[4:])], TASK, ALONE)
    assert torch.equal(sum(sides), whole) and whole.sum((0, 2)).tolist() == [6, 6, 6]


@pytest.mark.parametrize(
    ("choice", "axes"), [(["all"], (0, 1, 2)), (["none"], ()), (["X"], (0,)), (["Z", "X"], (0, 2)), (["Y"], (1,))]
)
def test_what_is_given_is_not_measured(one_sided, choice, axes):
    assert flips.choose(choice, [loader_of(one_sided)], TASK, ALONE) == flips.Flips(axes)


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        ((0, 0), True),  # classes that never meet
        ((1, 0), True),  # one case tells nothing
        ((2, 0), True),
        ((3, 0), False),
        ((0, 3), False),
        ((50, 50), True),
        ((70, 30), True),
        ((80, 20), False),
        ((12, 144), False),
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
    assert found.axes == (1, 2) and "left is nearer to the right than right in 1 of 100 cases" in found.reasons[0]
    assert flips.Flips(**{key: tuple(value) for key, value in found.to_dict().items()}) == found


def test_one_class_is_flipped_along_all_axes():
    task = Task("Toy", "CT", 1, ("background", "spleen"))
    assert flips.allowed(np.zeros((0, 3, 2)), task).axes == (0, 1, 2)


def test_centres_are_the_mean_voxels_of_classes():
    label = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.uint8)
    centres = class_centres(label, 4)
    for value in (1, 2):
        np.testing.assert_allclose(centres[value], np.argwhere(label == value).mean(0), rtol=1e-6)
    assert np.isnan(centres[[0, 3]]).all() and centres.dtype == np.float32


def test_real_hippocampi_are_flipped_along_no_axis_but_perhaps_the_first(task04):
    dataset = open_dataset(task04)
    training, _ = split_fold(dataset.cases, fold=0, num_folds=4)
    cache = Cache("ram", Path(), dataset.task, Leniency(), 2)
    loader = training_loader(training, cache, ALONE, batch_size=1, steps=1, num_workers=0)
    found = flips.choose(["auto"], [loader], dataset.task, ALONE)
    assert not {1, 2} & {*found.axes}
    assert "Anterior is nearer to the front than Posterior in 156 of 156 cases" in found.reasons[1]
