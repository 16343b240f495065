"""How far a run has come, and its best validation so far."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

NOTHING_FOUND = 0.0005  # Dice that people read as 0


@dataclass
class Progress:
    """How far a run has come, and its best validation (``best_*`` are None before the first).

    Attributes:
        run: identity of the run, which its model file has too.
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

    @property
    def current_epoch(self) -> int:
        """Number, from 1, of the epoch that is running or, between two, was completed."""
        return self.epoch + (self.step > 0)

    @property
    def recorded_iteration(self) -> int:
        """The last iteration of the epochs that are completed."""
        return self.iteration - self.step

    def step_done(self) -> None:
        self.step, self.iteration = self.step + 1, self.iteration + 1

    def epoch_done(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0

    def note_validation(self, dice: float | None, path: Path) -> bool:
        """Take over a validation's result if it is the best; without cases, the newest is."""
        if dice is not None and self.best_dice is not None and dice <= self.best_dice:
            return False
        self.best_dice, self.best_path = dice, str(path)
        self.best_epoch, self.best_iteration = self.current_epoch, self.iteration
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
    """Say at the end what may be wrong where the best of all validations found nothing."""
    if num_cases and best is None:
        log.info(
            "there is no Dice: none of the %d validation cases has any foreground; --check lists "
            "what labels hold, and another --fold has other cases",
            num_cases,
        )
    elif num_cases and best < NOTHING_FOUND:
        log.info(
            "Dice stayed 0 in all validations: %d iterations may be too few, or --learning_rate "
            "wrong (see loss_history.csv)",
            iterations,
        )
