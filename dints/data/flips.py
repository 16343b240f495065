"""The axes that patches are flipped along: those along which classes lie either way.

Where one class is always in front of another, and little but its place tells which it is, a flipped
patch shows the one under the name of the other. The hippocampus is such a task: its anterior part
is the mirror image of its posterior one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from dints.data.cases import Prepared
from dints.data.tasks import Task
from dints.running.processes import Processes

log = logging.getLogger(__name__)

ALL = (0, 1, 2)
AXES = ("X", "Y", "Z")
SIDES = ("right", "front", "top")  # to which the axes of RAS lead
LEAST_SHARE = 0.25  # of the cases in which a class must lie on the rarer side of another one


@dataclass(frozen=True)
class Flips:
    """The axes that patches are flipped along.

    Attributes:
        axes: their numbers.
        reasons: a line for people about each axis, where labels decided.
    """

    axes: tuple[int, ...]
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        """Return plain types, for model files."""
        return {"axes": list(self.axes), "reasons": list(self.reasons)}


def choose_flips(
    choice: Sequence[str], cases: Sequence[Prepared], task: Task, processes: Processes
) -> Flips:
    """Choose the axes along which patches are to be flipped.

    Args:
        choice: ``all``, ``none`` or ``auto``, or names of axes.
        cases: this rank's training cases, which ``auto`` measures; every rank must call it.
    """
    if "auto" in choice:
        flips = allowed(processes.sum(sides_of(cases, task, processes)).cpu().numpy(), task)
        for reason in flips.reasons:
            log.info("%s", reason)
        return flips
    return Flips(tuple(axis for axis in ALL if "all" in choice or AXES[axis] in choice))


def sides_of(cases: Sequence[Prepared], task: Task, processes: Processes) -> torch.Tensor:
    """Count the sides of classes from each other in these cases: (pairs, 3 axes, 2 sides).

    Pairs are those of `class_pairs`; the sides are: the first one's centre beyond the second one's
    along the axis, or not.
    """
    pairs = np.array(class_pairs(task), np.int64).reshape(-1, 2)
    counts = torch.zeros(len(pairs), 3, 2, dtype=torch.float64)
    for case in cases:
        # NaN where one is absent: on neither side
        ahead = case.centres[pairs[:, 0]] - case.centres[pairs[:, 1]]
        counts += torch.from_numpy(np.stack([ahead > 0, ahead <= 0], -1))
    return counts.to(processes.device)


def class_pairs(task: Task) -> list[tuple[int, int]]:
    """List the pairs of foreground classes."""
    return list(combinations(range(1, task.num_classes), 2))


def allowed(sides: np.ndarray, task: Task) -> Flips:
    """Allow an axis unless a class lies on the same side of another one in nearly all cases.

    Args:
        sides: what `sides_of` counts, over all cases.
    """
    if not len(sides):
        return Flips(ALL, ("flips along X, Y, Z: one class, which no other can be taken for",))
    # One case more on each side, or a single case would already tell; nothing is known of classes
    # that never meet.
    shares = (sides.min(-1) + 1) / (sides.sum(-1) + 2)
    axes, reasons = [], []
    for axis in ALL:
        pair = shares[:, axis].argmin()
        first, second = (task.class_names[value] for value in class_pairs(task)[pair])
        is_allowed = shares[pair, axis] >= LEAST_SHARE
        if is_allowed:
            axes.append(axis)
        ahead, cases = sides[pair, axis, 0], sides[pair, axis].sum()
        reasons.append(
            f"flips along {AXES[axis]}: {'yes' if is_allowed else 'no'}; {first} is nearer to the "
            f"{SIDES[axis]} than {second} in {ahead:.0f} of {cases:.0f} cases"
        )
    return Flips(tuple(axes), tuple(reasons))
