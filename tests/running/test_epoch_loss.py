"""An epoch's losses: their mean, and the end of a training that diverged."""

from __future__ import annotations

import math

import pytest
import torch
from small_run import ALONE

from dints.errors import UserError
from dints.running.epoch_loss import CHECK_EVERY, MAX_IN_A_ROW, EpochLoss

pytestmark = pytest.mark.fault("non-finite loss on one rank")


def epoch_loss(*values: float, loss: EpochLoss | None = None) -> EpochLoss:
    """Add steps that were computed, after 120 others, from the cases "case 121", "case 122", ..."""
    loss = loss or EpochLoss("loss", ALONE)
    for value in values:
        loss.add(torch.tensor(value), 120 + loss.steps, [f"case {121 + loss.steps}"])
    return loss


def test_the_mean_is_of_the_steps_whose_loss_is_finite():
    assert epoch_loss(1.0, 2.0, 6.0).mean() == 3.0
    assert epoch_loss(0.5, math.nan, 0.25, math.inf, -math.inf, 0.75).mean() == 0.5
    assert epoch_loss().mean() is None


def test_many_in_a_row_are_an_error_with_the_first_ones_iteration_and_cases():
    loss = epoch_loss(0.5, math.nan, 0.5, *[math.nan] * (MAX_IN_A_ROW - 1))
    assert loss.mean() == 0.5
    loss.start()  # the next epoch
    expected = rf"at iteration 124 \(cases case 124\), and in {MAX_IN_A_ROW} steps in a row"
    with pytest.raises(UserError, match=f"the loss is not finite {expected}.*--learning_rate"):
        epoch_loss(math.nan, loss=loss).mean()
    with pytest.raises(UserError, match="at iteration 121 "):  # noticed within the epoch
        epoch_loss(*[math.nan] * CHECK_EVERY)
    with pytest.raises(UserError, match=r"at iteration 121 \(cases case 121\)"):
        epoch_loss(math.nan, math.nan).mean()  # it has no finite loss


def test_a_stored_epoch_continues():
    values = [0.1, math.nan, 0.3, 0.7, 1e-9]
    second = EpochLoss("loss", ALONE)
    second.load_state_dict(epoch_loss(*values[:3]).state_dict())
    assert epoch_loss(*values[3:], loss=second).mean() == epoch_loss(*values).mean()
