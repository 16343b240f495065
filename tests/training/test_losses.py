"""The segmentation losses, against hand-computed values and MONAI's own."""

from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceCELoss
from monai.networks.utils import one_hot

from dints.errors import UserError
from dints.training.losses import LOSSES, check_loss, dice_ce


def test_dice_ce_of_two_classes_scores_the_foreground():
    """Four voxels with foreground probabilities 0.9, 0.6, 0.2, 0.1 and labels 1, 1, 0, 0."""
    probability = torch.tensor([0.9, 0.6, 0.2, 0.1])
    scores = torch.stack([(1 - probability).log(), probability.log()]).view(1, 2, 4, 1, 1)
    label = torch.tensor([1, 1, 0, 0], dtype=torch.uint8).view(1, 1, 4, 1, 1)
    dice = 1 - 2 * (0.9 + 0.6) / (0.81 + 0.36 + 0.04 + 0.01 + 2)
    cross_entropy = -sum(math.log(p) for p in (0.9, 0.6, 0.8, 0.9)) / 4
    assert float(dice_ce(scores, label)) == pytest.approx(dice + cross_entropy, abs=1e-5)


def test_dice_ce_of_many_classes_is_monais():
    scores, label = torch.randn(2, 4, 5, 6, 7), torch.randint(4, (2, 1, 5, 6, 7))
    kept = {"include_background": False, "squared_pred": True, "batch": True, "smooth_nr": 1e-5}
    reference = DiceCELoss(to_onehot_y=True, softmax=True, **kept)
    assert torch.allclose(dice_ce(scores, label), reference(scores, label))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_classes", [2, 5])
def test_a_perfect_prediction_costs_less_than_a_wrong_one(name, num_classes):
    label = torch.randint(num_classes, (2, 1, 6, 6, 6), dtype=torch.uint8)
    right, wrong = (
        float(LOSSES[name](40 * one_hot((label + shift) % num_classes, num_classes), label))
        for shift in (0, 1)
    )
    assert abs(right) < 1e-4 and wrong > 0.5


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("present", [[0], [1], [0, 2]], ids=str)
def test_gradients_are_finite_where_classes_are_absent(name, present):
    label = torch.tensor(present)[torch.randint(len(present), (1, 1, 6, 6, 6))]
    for factor in (0.0, 1.0, 300.0):  # 300: probabilities of exactly 0 and 1, class 1 nowhere
        scores = factor * torch.randn(1, 3, 6, 6, 6)
        scores[:, 1] -= 10 * factor
        scores.requires_grad_()
        LOSSES[name](scores, label).backward()
        assert torch.isfinite(scores.grad).all()
        assert scores.grad.abs().sum() > 0


def test_a_loss_that_is_not_in_the_table_is_refused():
    check_loss("dice_ce")
    with pytest.raises(UserError, match="--loss 'dice' is none of dice_ce"):
        check_loss("dice")
