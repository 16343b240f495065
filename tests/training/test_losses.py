"""The segmentation loss, against hand-computed values and MONAI's own, and an epoch's losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss
from monai.networks.utils import one_hot
from torch import nn
from torch.nn import functional as F

from dints.errors import UserError
from dints.running.processes import Processes
from dints.torch_files import is_plain
from dints.training import losses
from dints.training.losses import CHECK_EVERY, MAX_IN_A_ROW, EpochLoss, segmentation_loss

ALONE = Processes(0, 1, torch.device("cpu"))
NONFINITE = pytest.mark.fault("non-finite loss on one rank")


def test_loss_of_two_classes_scores_the_foreground():
    """Four voxels with foreground probabilities 0.9, 0.6, 0.2, 0.1 and labels 1, 1, 0, 0."""
    probability = torch.tensor([0.9, 0.6, 0.2, 0.1])
    scores = torch.stack([(1 - probability).log(), probability.log()]).view(1, 2, 4, 1, 1)
    label = torch.tensor([1, 1, 0, 0], dtype=torch.uint8).view(1, 1, 4, 1, 1)
    dice = 1 - 2 * (0.9 + 0.6) / (0.81 + 0.36 + 0.04 + 0.01 + 2)
    cross_entropy = -sum(math.log(p) for p in (0.9, 0.6, 0.8, 0.9)) / 4
    assert float(segmentation_loss(scores, label)) == pytest.approx(dice + cross_entropy, abs=1e-5)


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_much(num_classes):
    label = torch.randint(num_classes, (2, 1, 6, 6, 6), dtype=torch.uint8)
    for shift, least, most in ((0, -1e-4, 1e-4), (1, 10, 100)):
        loss = float(segmentation_loss(40 * one_hot((label + shift) % num_classes, num_classes), label))
        assert least < loss < most


def test_loss_of_many_classes_is_monais():
    scores, label = torch.randn(2, 4, 5, 6, 7), torch.randint(4, (2, 1, 5, 6, 7))
    reference = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, squared_pred=True, batch=True, smooth_nr=1e-5
    )
    assert torch.allclose(segmentation_loss(scores, label), reference(scores, label))


def test_the_loss_is_the_weighted_sum_of_its_terms(monkeypatch):
    monkeypatch.setattr(
        losses, "TERMS", ((2.0, lambda scores, label: scores.sum()), (0.5, lambda _, label: label.sum()))
    )
    assert segmentation_loss(torch.tensor([1.0, 3.0]), torch.tensor([4.0])) == 2 * 4 + 0.5 * 4


# What it is, for runs that are continued


def term_of(sharpness: float) -> Callable:
    def term(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return sharpness * scores.mean()

    return term


class OwnTerm(nn.Module):
    """Stands for one that a person wrote."""

    def __init__(self, gamma: float):
        super().__init__()
        self.gamma, self.inner = gamma, DiceLoss(softmax=True)
        self.register_buffer("of_classes", torch.tensor([0.5, 2.0]))


def described(*terms: object) -> list:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "TERMS", terms)
        return losses.describe.__wrapped__()


def test_the_loss_is_described_in_plain_values():
    dice, cross_entropy = losses.describe()
    assert (dice["name"], dice["weight"], cross_entropy["name"]) == ("DiceLoss", 1.0, "_cross_entropy")
    assert dice["settings"]["smooth_nr"] == 1e-5 and dice["settings"]["include_background"] is False
    assert "source" not in dice and len(cross_entropy["source"]) == 16
    (own,) = described((1.0, OwnTerm(2.0)))
    assert own["settings"]["gamma"] == 2.0 and own["settings"]["of_classes"] == [0.5, 2.0] and len(own["source"]) == 16
    assert own["settings"]["inner"]["settings"]["softmax"] is True
    assert is_plain(described((1, OwnTerm(2.0)), (1, term_of(2)), (1, partial(F.mse_loss, reduction="sum")), (1, max)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((1.0, F.mse_loss),), ((2.0, F.mse_loss),)),
        (((1.0, F.mse_loss),), ((1.0, F.l1_loss),)),
        (((1.0, F.mse_loss),), ((1.0, F.mse_loss), (1.0, F.l1_loss))),
        (((1.0, DiceLoss(smooth_nr=1e-5)),), ((1.0, DiceLoss(smooth_nr=1e-4)),)),
        (((1.0, nn.CrossEntropyLoss(torch.ones(3))),), ((1.0, nn.CrossEntropyLoss(2 * torch.ones(3))),)),
        (((1.0, nn.CrossEntropyLoss(torch.ones(300))),), ((1.0, nn.CrossEntropyLoss(2 * torch.ones(300))),)),
        (((1.0, OwnTerm(2.0)),), ((1.0, OwnTerm(3.0)),)),
        (((1.0, term_of(2)),), ((1.0, term_of(3)),)),
        (((1.0, partial(F.mse_loss, reduction="sum")),), ((1.0, partial(F.mse_loss, reduction="mean")),)),
        (
            ((1.0, lambda scores, label: scores.sum()),),
            ((1.0, lambda scores, label: scores.mean()),),
        ),
    ],
    ids=["weight", "function", "number", "setting", "classes", "many_classes", "own", "closure", "partial", "source"],
)
def test_another_loss_has_another_description(first, second):
    assert described(*first) == described(*first) != described(*second)


@pytest.mark.parametrize("present", [[0], [1], [0, 2]], ids=str)
def test_gradients_are_finite_where_classes_are_absent(present):
    label = torch.tensor(present)[torch.randint(len(present), (1, 1, 6, 6, 6))]
    for factor in (0.0, 1.0, 300.0):  # 300: probabilities of exactly 0 and 1, class 1 nowhere
        scores = factor * torch.randn(1, 3, 6, 6, 6)
        scores[:, 1] -= 10 * factor
        scores.requires_grad_()
        segmentation_loss(scores, label).backward()
        assert torch.isfinite(scores.grad).all()
        assert scores.grad.abs().sum() > 0


# An epoch's losses


def epoch_loss(*values: float, goes_on: EpochLoss | None = None) -> EpochLoss:
    """Add steps that were computed, after 120 others, from the cases "case 121", "case 122", ..."""
    loss = goes_on or EpochLoss("loss", ALONE)
    for value in values:
        loss.add(torch.tensor(value), 120 + loss.steps, [f"case {121 + loss.steps}"])
    return loss


@NONFINITE
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_mean_is_of_the_steps_whose_loss_is_finite(value):
    assert epoch_loss(1.0, 2.0, 6.0).mean() == 3.0
    assert epoch_loss(0.5, value, 0.25, value, value, 0.75).mean() == 0.5


@NONFINITE
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_many_in_a_row_are_an_error_with_the_first_ones_iteration_and_cases(value):
    message = rf"the loss is not finite at iteration 124 \(cases case 124\), and in {MAX_IN_A_ROW} steps in a row"
    loss = epoch_loss(0.5, value, 0.5, *[value] * (MAX_IN_A_ROW - 1))
    assert loss.mean() == 0.5
    loss.start()  # the next epoch
    with pytest.raises(UserError, match=message + ".*--learning_rate"):
        epoch_loss(value, goes_on=loss).mean()


@NONFINITE
def test_many_in_a_row_are_noticed_within_an_epoch():
    with pytest.raises(UserError, match="at iteration 121 "):
        epoch_loss(*[math.nan] * CHECK_EVERY)


@NONFINITE
def test_an_epoch_without_any_finite_loss_is_an_error():
    with pytest.raises(UserError, match=r"at iteration 121 \(cases case 121\)"):
        epoch_loss(math.nan, math.nan).mean()


def test_epoch_loss_goes_on_in_the_middle_of_an_epoch():
    values = [0.1, math.nan, 0.3, 0.7, 1e-9]
    second = EpochLoss("loss", ALONE)
    second.load_state_dict(epoch_loss(*values[:3]).state_dict())
    assert epoch_loss(*values[3:], goes_on=second).mean() == epoch_loss(*values).mean()
