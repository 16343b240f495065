"""Stopping when asked to: signals, heeded by all ranks after the same step, and saving from time to time."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from dints import system
from dints.errors import Stopped
from dints.running.processes import Processes
from dints.training.checkpoint import Checkpoint

Batch = TypeVar("Batch")


class Requests:
    """Notes that this process was asked to stop, from here on: by SIGTERM, SIGINT or the warning signal.

    Args:
        warning_signal: name without SIG, which schedulers send ahead of a time limit.

    Attributes:
        received: the first signal's number, once there was one.
    """

    def __init__(self, warning_signal: str = "USR1"):
        self.received: int | None = None
        self.received_at = 0.0
        for number in system.signals("SIGTERM", "SIGINT", f"SIG{warning_signal}"):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        # A second Ctrl-C does not wait; but a launcher may pass on what the scheduler has sent to all.
        if self.received == number == signal.SIGINT and now - self.received_at > 1:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.received_at = number, now


class Stops:
    """The places of a training at which it may stop or save: between two steps, and between two volumes.

    A run that stops is saved, and raises `Stopped` on all ranks.

    Args:
        checkpoint: what is saved.
        requests: to stop, which may have begun before the training.
        save_minutes: longest time between two saves.
    """

    def __init__(self, checkpoint: Checkpoint, processes: Processes, requests: Requests, save_minutes: float = 10.0):
        self.checkpoint, self.processes, self.save_minutes = checkpoint, processes, save_minutes
        self.requests = requests

    def steps(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield an epoch's batches; before each, save if it is time, and stop if any rank was asked to."""
        batches = iter(batches)
        with self._saved_when_stopped(), self.checkpoint.progress.timed():
            while True:
                batch = self._next(batches)
                is_due = time.monotonic() - self.checkpoint.saved_at >= 60 * self.save_minutes
                saves = int(is_due and self.processes.is_main)
                stop, save = self.processes.largest([self.requests.received or 0, saves])
                if stop:
                    raise Stopped(stop)
                if save:
                    self.checkpoint.save()
                if batch is None:
                    self.processes.wait_for_device()  # else the time of its last steps would count nowhere
                    return
                yield batch

    def volumes(self, cases: Iterable[Batch]) -> Iterator[Batch]:
        """Yield a validation's cases until this rank is asked to stop; then stop if any rank was."""
        with self._saved_when_stopped(), self.checkpoint.progress.timed():
            for case in cases:
                if self.requests.received is not None:
                    break
                yield case
            (stop,) = self.processes.largest([self.requests.received or 0])
            if stop:
                raise Stopped(stop)

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        try:
            return next(batches, None)
        except RuntimeError:  # a worker was stopped by the signal too
            if self.requests.received is None:
                raise
            return None

    @contextmanager
    def _saved_when_stopped(self) -> Iterator[None]:
        """Save the state after the last step done where `Stopped` is raised inside, and let it pass."""
        try:
            yield
        except Stopped as stopped:
            self.checkpoint.save()
            iteration = self.checkpoint.progress.iteration
            stopped.saved = f"after iteration {iteration}, with its state in {self.checkpoint.latest}"
            raise
