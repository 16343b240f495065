"""Loss, schedule, step, sliding window and scores, against hand-computed values and MONAI's own metric."""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot
from torch import nn

from dints import engine
from dints.errors import UserError
from dints.runtime import Precision, Processes
from dints.tasks import Task

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
FP32 = Precision("fp32", CPU)
TASK = Task("Toy", "CT", 1, ("background", "organ", "lesion"), patch_size=(8, 8, 8))


def perfect_scores(label: torch.Tensor, num_classes: int) -> torch.Tensor:
    return 40 * one_hot(label, num_classes)


# Loss, schedule, step


def test_loss_of_two_classes_scores_the_foreground():
    """Four voxels with foreground probabilities 0.9, 0.6, 0.2, 0.1 and labels 1, 1, 0, 0."""
    probability = torch.tensor([0.9, 0.6, 0.2, 0.1])
    scores = torch.stack([(1 - probability).log(), probability.log()]).view(1, 2, 4, 1, 1)
    label = torch.tensor([1, 1, 0, 0], dtype=torch.uint8).view(1, 1, 4, 1, 1)
    dice = 1 - 2 * (0.9 + 0.6) / (0.81 + 0.36 + 0.04 + 0.01 + 2)
    cross_entropy = -sum(math.log(p) for p in (0.9, 0.6, 0.8, 0.9)) / 4
    assert float(engine.segmentation_loss()(scores, label)) == pytest.approx(dice + cross_entropy, abs=1e-5)


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_much(num_classes):
    label = torch.randint(num_classes, (2, 1, 6, 6, 6), dtype=torch.uint8)
    loss = engine.segmentation_loss()
    assert float(loss(perfect_scores(label, num_classes), label)) == pytest.approx(0, abs=1e-4)
    assert float(loss(perfect_scores((label + 1) % num_classes, num_classes), label)) > 10


def test_loss_of_many_classes_is_monais():
    scores, label = torch.randn(2, 4, 5, 6, 7), torch.randint(4, (2, 1, 5, 6, 7))
    reference = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, squared_pred=True, batch=True, smooth_nr=1e-5
    )
    assert torch.allclose(engine.segmentation_loss()(scores, label), reference(scores, label))


@pytest.mark.parametrize("present", [[0], [1], [0, 2]], ids=str)
def test_gradients_are_finite_where_classes_are_absent(present):
    label = torch.tensor(present)[torch.randint(len(present), (1, 1, 6, 6, 6))]
    for factor in (0.0, 1.0, 300.0):  # 300: probabilities of exactly 0 and 1, class 1 nowhere
        scores = factor * torch.randn(1, 3, 6, 6, 6)
        scores[:, 1] -= 10 * factor
        scores.requires_grad_()
        engine.segmentation_loss()(scores, label).backward()
        assert torch.isfinite(scores.grad).all()
        assert scores.grad.abs().sum() > 0


def test_stepped_halves_at_each_milestone():
    expected = {0: 8, 0.2: 8, 0.21: 4, 0.4: 4, 0.6: 2, 0.8: 2, 0.81: 1, 1: 1}
    assert {share: engine.stepped(8, share, (0.2, 0.4, 0.8)) for share in expected} == expected
    assert engine.stepped(0.025, 1.0, ()) == 0.025


def test_set_learning_rate_reaches_every_group():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 5.0}], lr=1.0)
    engine.set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_step_lowers_the_loss(precision):
    torch.manual_seed(0)
    network = nn.Conv3d(1, 3, 3, padding=1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    image = torch.randn(2, 1, 8, 8, 8)
    batch = {"image": image, "label": (image > -0.5).to(torch.uint8) + (image > 0.5)}
    precision = Precision(precision, CPU)
    scaler, criterion = precision.scaler(), engine.segmentation_loss()
    losses = [engine.weights_step(network, batch, criterion, optimizer, scaler, precision) for _ in range(60)]
    assert losses[0].dtype == torch.float32 and not losses[0].requires_grad
    assert losses[-1] < 0.6 * losses[0]


def test_weights_step_starts_from_no_gradient():
    network = nn.Conv3d(1, 2, 1)
    batch = {"image": torch.randn(1, 1, 4, 4, 4), "label": torch.ones(1, 1, 4, 4, 4, dtype=torch.uint8)}
    optimizer = torch.optim.SGD(network.parameters(), 0.0)  # so that both steps have the same gradient
    gradients = []
    for _ in range(2):
        engine.weights_step(network, batch, engine.segmentation_loss(), optimizer, FP32.scaler(), FP32)
        gradients.append(network.weight.grad.clone())
    assert torch.equal(*gradients)


def epoch_loss(*values: float, iteration: int = 121) -> engine.EpochLoss:
    """Of steps that were computed from the cases "case 121", "case 122", ..."""
    loss = engine.EpochLoss("loss", ALONE)
    for number, value in enumerate(values, iteration):
        loss.add(torch.tensor(value), number, [f"case {number}"])
    return loss


def test_epoch_loss_is_the_mean_of_its_steps():
    assert epoch_loss(1.0, 2.0, 6.0).mean() == 3.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_steps_whose_loss_is_not_finite_do_not_count(value):
    assert epoch_loss(0.5, value, 0.25, value, value, 0.75).mean() == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_many_in_a_row_are_an_error_with_the_first_ones_iteration_and_cases(value):
    steps = [0.5, value, 0.5, *[value] * engine.MAX_IN_A_ROW]
    message = (
        rf"the loss is not finite at iteration 124 \(cases case 124\), and in {engine.MAX_IN_A_ROW} steps in a row"
    )
    with pytest.raises(UserError, match=message + ".*--learning_rate"):
        epoch_loss(*steps).mean()
    loss = epoch_loss(*steps[:-1])
    assert loss.mean() == 0.5
    loss.start()  # the next epoch
    loss.add(torch.tensor(value), 128, ["case 128"])
    with pytest.raises(UserError, match=message):
        loss.mean()


def test_many_in_a_row_are_noticed_within_an_epoch():
    with pytest.raises(UserError, match="at iteration 121 "):
        epoch_loss(*[math.nan] * (engine.CHECK_EVERY + 1))


def test_an_epoch_without_any_finite_loss_is_an_error():
    with pytest.raises(UserError, match=r"at iteration 121 \(cases case 121\)"):
        epoch_loss(math.nan, math.nan).mean()


def test_epoch_loss_goes_on_in_the_middle_of_an_epoch():
    values = [0.1, math.nan, 0.3, 0.7, 1e-9]
    first, second = epoch_loss(*values[:3]), engine.EpochLoss("loss", ALONE)
    second.load_state_dict(first.state_dict())
    for number, value in enumerate(values[3:], 124):
        second.add(torch.tensor(value), number, [])
    assert second.mean() == epoch_loss(*values).mean()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_step_whose_loss_is_not_finite_changes_nothing(precision, step):
    """Nor does it spoil the momentum, though it be the first one."""

    def trained(steps: list[float]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = nn.Conv3d(1, 2, 1)
        optimizer, kind = engine.sgd(network.parameters(), 0.1), Precision(precision, CPU)
        for value in steps:
            image = torch.full((1, 1, 4, 4, 4), value)
            batch = {"image": image, "label": torch.ones(1, 1, 4, 4, 4, dtype=torch.uint8)}
            engine.weights_step(network, batch, engine.segmentation_loss(), optimizer, kind.scaler(), kind)
        return [*network.parameters(), *(state["momentum_buffer"] for state in optimizer.state.values())]

    sound = [1.0, 2.0, 3.0]
    spoilt = [*sound[:step], math.nan, *sound[step:]]
    assert all(map(torch.equal, trained(sound), trained(spoilt)))


def test_gradients_that_the_fp16_scaler_refuses_are_no_error():
    """It skips the step, and the loss, which is finite, goes on."""
    network, label = nn.Conv3d(1, 2, 1), torch.ones(1, 1, 4, 4, 4, dtype=torch.uint8)
    network.weight.register_hook(lambda gradient: gradient * math.inf)
    before = network.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batch = {"image": torch.randn(1, 1, 4, 4, 4), "label": label}
    loss = engine.EpochLoss("loss", ALONE)
    optimizer = engine.sgd(network.parameters(), 0.1)
    loss.add(engine.weights_step(network, batch, engine.segmentation_loss(), optimizer, scaler, FP32), 1, [])
    assert math.isfinite(loss.mean()) and torch.equal(network.weight, before) and scaler.get_scale() == 512


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_weights_step_clips_the_norm_of_all_gradients(scale):
    torch.manual_seed(0)
    batch = {"image": torch.randn(1, 1, 4, 4, 4), "label": torch.ones(1, 1, 4, 4, 4, dtype=torch.uint8)}
    network = nn.Conv3d(1, 2, 1)
    norms = []
    for limit in (None, 1e6, 0.01):
        twin = copy.deepcopy(network)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(twin.parameters(), 1.0)  # whose step is the gradient
        engine.weights_step(twin, batch, engine.segmentation_loss(), optimizer, scaler, FP32, limit)
        steps = [a - b for a, b in zip(twin.parameters(), network.parameters(), strict=True)]
        norms.append(torch.cat([step.detach().flatten() for step in steps]).norm().item())
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.1
    assert norms[2] == pytest.approx(0.01, rel=1e-3)


def test_sgd_is_pytorchs_published_settings():
    results = []
    for build in (engine.sgd, lambda p, rate: torch.optim.SGD(p, rate, momentum=0.9, weight_decay=4e-5)):
        torch.manual_seed(0)
        network = nn.Conv3d(2, 2, 3)
        optimizer = build(network.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.ones(1, 2, 4, 4, 4)).square().sum().backward()
            optimizer.step()
        results.append(network.weight.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("num_epochs", "every", "expected"), [(6, 2, [1, 3, 5]), (7, 3, [2, 5, 6]), (2, 100, [1]), (3, 1, [0, 1, 2])]
)
def test_validation_epochs_are_regular_and_include_the_last(num_epochs, every, expected):
    args = argparse.Namespace(num_epochs=num_epochs, num_epochs_per_validation=every)
    assert [epoch for epoch in range(num_epochs) if engine.is_validation_epoch(epoch, args)] == expected


# Scores


def scores_of(pairs: list[tuple[torch.Tensor, torch.Tensor]], num_classes: int) -> engine.Scores:
    counts = [engine.count_overlap(predicted, reference, num_classes) for predicted, reference in pairs]
    return engine.scores_from_counts(torch.stack(counts))


@pytest.mark.parametrize("num_classes", [2, 3, 6])
def test_dice_equals_monais_metric(num_classes):
    """On random labels; half of the cases lack the last class of the reference."""
    torch.manual_seed(0)
    metric, pairs = DiceMetric(include_background=False, reduction="none", ignore_empty=True), []
    for case in range(6):
        reference = torch.randint(num_classes - case % 2, (1, 1, 7, 6, 5))
        predicted = torch.where(
            torch.rand(reference.shape) < 0.3, torch.randint(num_classes, reference.shape), reference
        )
        metric(one_hot(predicted, num_classes), one_hot(reference, num_classes))
        pairs.append((predicted.to(torch.uint8), reference.to(torch.uint8)))
    scores = scores_of(pairs, num_classes)
    expected = metric.aggregate()
    assert expected.isnan().any()
    assert torch.allclose(scores.dice.float(), expected, atol=1e-6, equal_nan=True)
    assert scores.per_class == pytest.approx(expected.nanmean(0).tolist(), abs=1e-6)


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
    assert text == "Dice 0.3333 (x 0.3333 (false positive cases: 1), y absent (false positive cases: 1), z absent)"


def test_without_any_foreground_there_is_no_mean():
    scores = scores_of([(torch.zeros(8), torch.zeros(8))], 3)
    assert scores.per_class == [None, None] and scores.mean is None and scores.false_positives == [0, 0]
    assert scores.describe(("background", "x", "y")) == "Dice not defined (x absent, y absent)"


def test_counts_are_exact_in_large_volumes():
    """float32 would lose single voxels above 2**24."""
    reference = torch.ones(2**24 + 3, dtype=torch.uint8)
    reference[:2] = 0
    counts = engine.count_overlap(torch.ones_like(reference), reference, 2)
    assert counts.tolist() == [[2**24 + 1, 2**24 + 3, 2**24 + 1]]


# Sliding window and validation


class Threshold(nn.Module):
    """Class scores that say how many of the values 0.25 and 0.5 a voxel exceeds; counts its windows."""

    def __init__(self):
        super().__init__()
        self.windows, self.modes, self.offset = 0, set(), nn.Parameter(torch.zeros(1))

    def forward(self, image):
        assert image.shape[2:] == (8, 8, 8)
        self.windows += len(image)
        self.modes.add(self.training)
        label = (image > 0.25).long() + (image > 0.5)
        return 10 * one_hot(label, 3) + self.offset


@pytest.mark.parametrize(
    "shape", [(8, 8, 8), (7, 6, 5), (3, 9, 8), (2, 2, 2), (1, 20, 8), (23, 11, 17), (9, 4, 30)], ids=str
)
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.625])
def test_sliding_window_scores_every_voxel_of_any_size(shape, overlap):
    image = torch.rand(1, 1, *shape)
    network = Threshold()
    with torch.no_grad():
        scores = engine.SlidingWindow((8, 8, 8), overlap, 4)(image, network)
    assert scores.shape == (1, 3, *shape) and scores.dtype == torch.float32
    assert torch.allclose(scores, 10 * one_hot((image > 0.25).long() + (image > 0.5), 3), atol=1e-4)


def test_overlap_takes_more_windows():
    windows = []
    for overlap in (0.0, 0.5):
        network = Threshold()
        with torch.no_grad():
            engine.SlidingWindow((8, 8, 8), overlap, 4)(torch.rand(1, 1, 16, 16, 16), network)
        windows.append(network.windows)
    assert windows == [8, 27]


@dataclass(frozen=True)
class OneOfTwo(Processes):
    """A rank whose sum over the ranks is kept for the test to do."""

    given: list = field(default_factory=list)

    def sum(self, values):
        self.given.append(values.clone())
        return values


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    """Whole cases of different sizes with 15% noise in their labels; one lacks class 2."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, shape in enumerate([(9, 12, 8), (8, 8, 8), (5, 9, 17), (20, 6, 8), (8, 13, 9)]):
        image = torch.rand(1, 1, *shape, generator=generator) * (0.5 if number == 2 else 1)
        label = (image > 0.25).long() + (image > 0.5)
        noise = torch.rand(label.shape, generator=generator) < 0.15
        found.append({"image": image, "label": torch.where(noise, 0, label).to(torch.uint8), "number": number})
    return found


def validate(network, loader, num_cases, processes=ALONE):
    window = engine.SlidingWindow(TASK.patch_size, 0.5, 4)
    return engine.validate(network, loader, num_cases, TASK, window, FP32, processes)


@pytest.mark.parametrize("training", [True, False])
def test_validate_scores_whole_cases_and_leaves_the_mode(batches, training):
    network = Threshold().train(training)
    scores = validate(network, batches, len(batches))
    assert network.training is training and network.modes == {False}
    for row, batch in zip(scores.dice.tolist(), batches, strict=True):
        predicted = (batch["image"] > 0.25).long() + (batch["image"] > 0.5)
        for value, dice in enumerate(row, start=1):
            p, r = predicted == value, batch["label"] == value
            expected = 2 * (p & r).sum() / (p.sum() + r.sum()) if r.any() else math.nan
            assert dice == pytest.approx(float(expected), nan_ok=True)
    assert math.isnan(scores.dice[2, 1]) and 0.7 < scores.mean < 1


def test_two_ranks_shares_add_up_to_the_whole(batches):
    whole = validate(Threshold(), batches, len(batches))
    ranks = [OneOfTwo(rank, 2, CPU) for rank in range(2)]
    for rank in ranks:
        validate(Threshold(), batches[rank.rank :: 2], len(batches), rank)
    assert [len(rank.given) for rank in ranks] == [1, 1]  # one collective, whatever a rank holds
    together = engine.scores_from_counts(ranks[0].given[0] + ranks[1].given[0])
    assert torch.equal(together.dice.nan_to_num(-1), whole.dice.nan_to_num(-1))
    assert together.false_positives == whole.false_positives


def test_a_rank_without_cases_takes_part(batches):
    rank = OneOfTwo(1, 2, CPU)
    scores = validate(Threshold(), [], 1, rank)
    assert len(rank.given) == 1 and rank.given[0].shape == (1, 2, 3) and scores.mean is None


def test_without_cases_there_are_no_scores():
    assert validate(Threshold(), [], 0) is None
