"""The segmentation losses: one table, of which ``--loss`` chooses.

Runs and model files record a loss by its name: give a changed one a new name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.losses import DiceLoss
from torch.nn import functional as F

from dints.errors import UserError, shown

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Of the foreground classes, over the whole batch.
_dice = DiceLoss(
    include_background=False,
    to_onehot_y=True,
    softmax=True,
    squared_pred=True,
    batch=True,
    smooth_nr=1e-5,
    smooth_dr=1e-5,
)


def dice_ce(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the sum of soft Dice and cross-entropy."""
    return _dice(scores, label) + F.cross_entropy(scores, label[:, 0].long())


# Functions of class scores (batch, classes, *spatial), before softmax, and labels (batch, 1,
# *spatial).
LOSSES: dict[str, Loss] = {
    "dice_ce": dice_ce,
}


def check_loss(name: str) -> None:
    """Refuse the name of a loss that is not in the table."""
    if name not in LOSSES:
        raise UserError(f"--loss {shown(name)} is none of {', '.join(LOSSES)}")
