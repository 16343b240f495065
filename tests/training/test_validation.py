"""Sliding window and scores, against hand-computed values and MONAI's own metric."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot
from small_run import ALONE, CPU, begun
from torch import nn

from dints.running.processes import Processes
from dints.training import validation
from dints.training.validation import Scores, Validation, count_overlap, scores_from_counts
from dints.training.windows import SlidingWindow

ABSENT = pytest.mark.fault("class absent from all validation cases")


def scores_of(pairs: list[tuple[torch.Tensor, torch.Tensor]], num_classes: int) -> Scores:
    counts = [count_overlap(predicted, reference, num_classes) for predicted, reference in pairs]
    return scores_from_counts(torch.stack(counts))


@pytest.mark.parametrize("num_classes", [2, 6])
def test_dice_equals_monais_metric(num_classes):
    """On random labels; half of the cases lack the last class of the reference."""
    torch.manual_seed(0)
    metric, pairs = DiceMetric(include_background=False, reduction="none", ignore_empty=True), []
    for case in range(6):
        reference = torch.randint(num_classes - case % 2, (1, 1, 7, 6, 5))
        noise = torch.randint(num_classes, reference.shape)
        predicted = torch.where(torch.rand(reference.shape) < 0.3, noise, reference)
        metric(one_hot(predicted, num_classes), one_hot(reference, num_classes))
        pairs.append((predicted.to(torch.uint8), reference.to(torch.uint8)))
    scores, expected = scores_of(pairs, num_classes), metric.aggregate()
    assert expected.isnan().any()
    assert torch.allclose(scores.dice.float(), expected, atol=1e-6, equal_nan=True)
    assert scores.per_class == pytest.approx(expected.nanmean(0).tolist(), abs=1e-6)


@ABSENT
@pytest.mark.fault("empty reference but a non-empty prediction")
def test_absent_classes_are_not_counted_but_false_positives_are():
    empty, ones, twos = torch.zeros(8), torch.ones(8), torch.full((8,), 2)
    half = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    #                    predicted, reference
    scores = scores_of([(half, ones), (ones, empty), (twos, ones), (empty, empty)], 4)
    dice = scores.dice.tolist()
    assert [row[0] for row in dice] == pytest.approx([2 / 3, math.nan, 0, math.nan], nan_ok=True)
    assert all(math.isnan(row[1]) and math.isnan(row[2]) for row in dice)
    assert scores.false_positives == [1, 1, 0]
    assert scores.per_class == [pytest.approx(1 / 3), None, None]
    assert scores.mean == pytest.approx(1 / 3)  # over the classes that occur
    text = scores.describe(("background", "x", "y", "z"))
    assert (
        text
        == "Dice 0.3333 (x 0.3333 (false positive cases: 1), y absent (false positive cases: 1), z "
        "absent)"
    )


@ABSENT
def test_without_any_foreground_there_is_no_mean():
    scores = scores_of([(torch.zeros(8), torch.zeros(8))], 3)
    assert (
        scores.per_class == [None, None]
        and scores.mean is None
        and scores.false_positives == [0, 0]
    )
    assert scores.describe(("background", "x", "y")) == "Dice not defined (x absent, y absent)"


def test_counts_are_exact_in_large_volumes():
    """float32 would lose single voxels above 2**24."""
    reference = torch.ones(2**24 + 3, dtype=torch.uint8)
    reference[:2] = 0
    counts = count_overlap(torch.ones_like(reference), reference, 2)
    assert counts.tolist() == [[2**24 + 1, 2**24 + 3, 2**24 + 1]]


# Sliding window and validation


def label_of(image: torch.Tensor) -> torch.Tensor:
    """Return how many of the values 0.25 and 0.5 each voxel exceeds."""
    return (image > 0.25).long() + (image > 0.5)


class Threshold(nn.Module):
    """Scores the classes of `label_of`; counts its windows."""

    def __init__(self):
        super().__init__()
        self.windows, self.modes, self.offset = 0, set(), nn.Parameter(torch.zeros(1))

    def forward(self, image):
        assert image.shape[2:] == (8, 8, 8)
        self.windows += len(image)
        self.modes.add(self.training)
        return 10 * one_hot(label_of(image), 3) + self.offset


@pytest.mark.fault("volume smaller than the patch")
@pytest.mark.parametrize(
    ("shape", "overlap"),
    [((8, 8, 8), 0.5), ((1, 20, 8), 0.0), ((23, 11, 17), 0.625), ((2, 2, 2), 0.5)],
)
def test_a_sliding_window_scores_every_voxel_of_any_size(shape, overlap):
    image = torch.rand(1, 1, *shape)
    with torch.no_grad():
        scores = SlidingWindow((8, 8, 8), overlap, 4)(image, Threshold())
    assert scores.shape == (1, 3, *shape) and scores.dtype == torch.float32
    assert torch.allclose(scores, 10 * one_hot(label_of(image), 3), atol=1e-4)


@pytest.mark.parametrize(("overlap", "windows"), [(0.0, 8), (0.5, 27)])
def test_overlap_takes_more_windows(overlap, windows):
    network = Threshold()
    with torch.no_grad():
        SlidingWindow((8, 8, 8), overlap, 4)(torch.rand(1, 1, 16, 16, 16), network)
    assert network.windows == windows


@dataclass(frozen=True)
class OneOfTwo(Processes):
    """A rank whose sum over the ranks is kept for the test to do."""

    given: list = field(default_factory=list)

    def largest(self, values):
        return values

    def sum(self, values):
        self.given.append(values.clone())
        return values


class Cases(list):
    """A rank's share of the cases."""

    num_cases = 0  # of all ranks


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    """Whole cases of different sizes with 15% noise in their labels; one lacks class 2."""
    generator, found = torch.Generator().manual_seed(0), []
    for number, shape in enumerate([(9, 12, 8), (8, 8, 8), (5, 9, 17), (20, 6, 8), (8, 13, 9)]):
        image = torch.rand(1, 1, *shape, generator=generator) * (0.5 if number == 2 else 1)
        noise = torch.rand(image.shape, generator=generator) < 0.15
        label = torch.where(noise, 0, label_of(image)).to(torch.uint8)
        found.append({"image": image, "label": label, "number": number})
    return found


def validate(
    batches: list[dict],
    num_cases: int,
    processes: Processes = ALONE,
    network: nn.Module | None = None,
) -> Scores | None:
    cases, run = Cases(batches), begun()
    cases.num_cases = num_cases
    run.processes, run.stop_signal = processes, SimpleNamespace(received=None)
    return Validation(cases, 3, SlidingWindow((8, 8, 8), 0.5, 4), run)(network or Threshold())


@pytest.mark.parametrize("training", [True, False])
def test_validation_scores_whole_cases_and_leaves_the_mode(batches, training):
    network = Threshold().train(training)
    scores = validate(batches, len(batches), network=network)
    assert network.training is training and network.modes == {False}
    for row, batch in zip(scores.dice.tolist(), batches, strict=True):
        for value, dice in enumerate(row, start=1):
            p, r = label_of(batch["image"]) == value, batch["label"] == value
            expected = 2 * (p & r).sum() / (p.sum() + r.sum()) if r.any() else math.nan
            assert dice == pytest.approx(float(expected), nan_ok=True)
    assert math.isnan(scores.dice[2, 1]) and 0.7 < scores.mean < 1


def test_large_volumes_are_scored_slab_by_slab_alike(batches, monkeypatch):
    """Of those that hold a patch; the others are padded, and are small."""
    whole, before = Threshold(), Threshold()
    expected = validate(batches, len(batches), network=before)
    monkeypatch.setattr(validation, "MANY_SCORES", 3 * 8**3)  # the second case has just as many
    calls, real = [], SlidingWindow.slabs
    monkeypatch.setattr(
        SlidingWindow, "slabs", lambda self, *a: calls.append(a[-1]) or real(self, *a)
    )
    scores = validate(batches, len(batches), network=whole)
    assert calls == [1, 1] and whole.windows == before.windows
    assert torch.equal(scores.dice.nan_to_num(-1), expected.dice.nan_to_num(-1))


def test_two_ranks_shares_add_up_to_the_whole(batches):
    whole, ranks = validate(batches, len(batches)), [OneOfTwo(rank, 2, CPU) for rank in range(2)]
    for rank in ranks:
        validate(batches[rank.rank :: 2], len(batches), rank)
    assert [len(rank.given) for rank in ranks] == [1, 1]  # one collective, whatever a rank holds
    together = scores_from_counts(ranks[0].given[0] + ranks[1].given[0])
    assert torch.equal(together.dice.nan_to_num(-1), whole.dice.nan_to_num(-1))
    assert together.false_positives == whole.false_positives


@pytest.mark.fault("fewer cases than ranks; a rank without validation cases")
def test_a_rank_without_cases_takes_part():
    rank = OneOfTwo(1, 2, CPU)
    scores = validate([], 1, rank)
    assert len(rank.given) == 1 and rank.given[0].shape == (1, 2, 3) and scores.mean is None


def test_without_cases_there_are_no_scores():
    assert validate([], 0) is None
