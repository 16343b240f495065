"""How far a run has come, and its best validation so far."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dints.errors import shown

log = logging.getLogger(__name__)

# kinds, where not None
BEST = {"best_dice": float, "best_epoch": int, "best_iteration": int, "best_path": str}
NOTHING_FOUND = 0.0005  # Dice that people read as 0


@dataclass
class Progress:
    """How far a run has come, and its best validation so far (``best_*`` are None before the
    first).

    Attributes:
        run: identity of the run, which its model file has too; empty where the run began before
            there was one.
        epoch: how many are completed, with their validation.
        step: steps done in the epoch that is running.
        iteration: steps done in all.
        seconds: spent on them and on validations.
        seconds_per_iteration: in the last epoch.
        seconds_in_epoch: that its steps took, without those before a stop.
    """

    epoch: int = 0
    step: int = 0
    iteration: int = 0
    seconds: float = 0.0
    seconds_per_iteration: float = 0.0
    seconds_in_epoch: float = 0.0
    best_dice: float | None = None
    best_epoch: int | None = None
    best_iteration: int | None = None
    best_path: str | None = None
    run: str = field(default="", compare=False)

    @staticmethod
    def from_dict(values: Mapping[str, object]) -> Progress:
        """Return the progress in a checkpoint; an attribute that an older one lacks has its
        default.

        Raises:
            ValueError, TypeError: they are not what the attributes are.
        """
        progress = Progress(**values)
        for name, default in asdict(Progress()).items():
            value, kind = getattr(progress, name), BEST.get(name, type(default))
            is_kind = type(value) is kind or (kind is float and type(value) is int)
            is_sound = is_kind and (kind is str or (math.isfinite(value) and value >= 0))
            if not is_sound and not (value is None and name in BEST):
                raise ValueError(f"{name} is {shown(value)}")
        return progress

    @property
    def current_epoch(self) -> int:
        """Number, from 1, of the epoch that is running or, between two, was completed."""
        return self.epoch + (self.step > 0)

    @property
    def recorded_iteration(self) -> int:
        """The last iteration of the epochs that are completed: what comes after it is done again or
        gone on with.
        """
        return self.iteration - self.step

    def step_done(self) -> None:
        self.step, self.iteration = self.step + 1, self.iteration + 1

    def epoch_done(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0

    def note_validation(self, dice: float | None, path: Path) -> bool:
        """Take over a validation's result if it is the best; without any (no cases), the newest
        network is the best.
        """
        if dice is not None and self.best_dice is not None and dice <= self.best_dice:
            return False
        self.best_dice, self.best_epoch, self.best_iteration = (
            dice,
            self.current_epoch,
            self.iteration,
        )
        self.best_path = str(path)
        return True

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of what is done inside; where these are an epoch's steps, of each one."""
        start, first = time.monotonic(), self.iteration
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.seconds += seconds
            if self.iteration > first:
                self.seconds_in_epoch = seconds
                self.seconds_per_iteration = seconds / (self.iteration - first)


def remark_on_dice(best: float | None, iterations: int, num_cases: int) -> None:
    """Say at the end of a training what may be wrong where its best validation, of so many cases,
    found nothing.
    """
    if num_cases and best is None:
        log.info(
            "there is no Dice: none of the %d validation cases has any foreground; --check lists "
            "what labels hold, and another --fold has other cases",
            num_cases,
        )
    elif num_cases and best < NOTHING_FOUND:
        log.info(
            "Dice stayed 0 in all validations. Likely causes: too few iterations (%d); a "
            "--learning_rate at which the loss does not fall (loss_history.csv); classes that the "
            "%d validation cases lack (--check lists them)",
            iterations,
            num_cases,
        )
