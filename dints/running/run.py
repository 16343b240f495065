"""A run in its folder: what is stored of it, when it saves and stops, and its history."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from dints.errors import Stopped
from dints.running import run_folder
from dints.running.checkpoint import Checkpoint, Found, find_state
from dints.running.epoch_loss import EpochLoss
from dints.running.history import History, Scores
from dints.running.precision import Precision, choose_precision
from dints.running.processes import Processes, started
from dints.running.progress import Progress
from dints.running.seeds import seed_everything
from dints.running.stop_signal import StopSignal
from dints.settings import MachineSettings, RunSettings

Item = TypeVar("Item")


@contextmanager
def open_run(settings: RunSettings, machine: MachineSettings) -> Iterator[Run]:
    """Join the processes that the launcher started, and lock the run folder."""
    with (
        started(machine.device, machine.timeout_minutes) as processes,
        run_folder.opened(settings.output_root, processes) as folder,
    ):
        yield Run(folder, processes, settings, machine)


class Run:
    """A run in its folder. The loop stays in the script:

        run.begin(configuration)
        ...                                         # networks and loaders
        run.restore(network=network, **weights.parts)
        for epoch in run.epochs(num_epochs):
            for batch in run.steps(loader):
                run.record("loss", weights.step(batch), batch)
            run.end_epoch(learning_rate=weights.learning_rate)
            if is_validation_epoch(epoch):
                scores = validation(network)
                if run.note_validation(scores, path):
                    ...                             # write the network
                run.end_validation(scores)

    A run that is asked to stop does so before a step or a case of a validation: its state is saved,
    and `Stopped` is raised on all ranks. The same command then resumes it there.

    Args:
        folder: of everything that it writes.
        machine: how it computes.
        stop_signal: that may have come before the run.

    Attributes:
        found: the stored state that it resumes from; None for a new run.
        is_continued: the folder has a part of this very run.
        precision: that it computes in, once it has begun.
        progress: how far it has come, once it is restored.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        settings: RunSettings,
        machine: MachineSettings,
        stop_signal: StopSignal | None = None,
    ):
        self.folder, self.processes = folder, processes
        self.settings, self.machine = settings, machine
        self.stop_signal = stop_signal
        self.found: Found | None = None
        self.is_continued = False
        self.precision: Precision | None = None
        self.progress = Progress()
        self.losses: dict[str, EpochLoss] = {}
        self.history: History | None = None
        self.seconds_waited = 0.0  # for batches, in the epoch's steps

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def is_main(self) -> bool:
        return self.processes.is_main

    def on_main(self, function: Callable[..., Item], *args) -> Item:
        """Call ``function`` on rank 0 and return its result on every rank."""
        return self.processes.on_main(function, *args)

    def within(self, folder: Path) -> Run:
        """Return a run of this process alone in a folder below, which stops with this one."""
        settings = replace(self.settings, output_root=folder, resume="auto")
        machine = replace(self.machine, precision=self.precision.name)
        run = Run(folder, self.processes.alone(), settings, machine, self.stop_signal)
        run.precision = self.precision
        return run

    def start_afresh(self, inputs: Sequence[Path | None]) -> None:
        """Move away what an earlier run has left in the folder, if ``--resume never`` asks for it.

        Args:
            inputs: files that this run reads, which must not be moved.
        """
        if self.settings.resume == "never":
            run_folder.start_afresh(self.folder, self.processes, inputs)

    def begin(
        self, configuration: Mapping[str, object], inputs: Sequence[Path | None] = ()
    ) -> None:
        """Find the state that the folder has of this very run, and choose the precision.

        Args:
            configuration: plain values that decide what the run computes.
            inputs: as for `start_afresh`.

        Raises:
            UserError: the folder has another run; every setting that differs is named.
        """
        self.start_afresh(inputs)
        settings = self.settings
        self.configuration = {**configuration, "processes": self.processes.world_size}
        allow = settings.allow_other_num_processes
        stored = (self.folder, self.configuration, settings.resume, allow)
        self.found = self.on_main(find_state, *stored)
        self.is_continued = self.found is not None
        name = self.found.precision if self.found else self.machine.precision
        self.precision = choose_precision(name, self.processes)

    def restore(
        self, losses: Sequence[str] = (), class_names: Sequence[str] | None = None, **parts: object
    ) -> None:
        """Load the stored state into the parts, or save that of a new run.

        Args:
            losses: names of those that `record` will gather.
            class_names: of the task, background first; None: no history is written.
            parts: networks, optimizers and whatever else has a ``state_dict``.
        """
        # Not before: until there is a state, a signal ends the process at once.
        self.stop_signal = self.stop_signal or StopSignal(self.settings.warning_signal)
        self.losses = {name: EpochLoss(name, self.processes) for name in losses}
        all_parts = {**parts, **self.losses}
        self.checkpoint = Checkpoint(
            self.folder, self.configuration, all_parts, self.precision, self.processes
        )
        self.progress = self.checkpoint.restore(self.found)
        if class_names is not None:
            first = self.progress.recorded_iteration
            self.history = History(self.folder, class_names, first, self.is_main)

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """Yield the epochs, from 0, that are left to do."""
        for epoch in range(self.progress.epoch, num_epochs):
            seed_everything(self.seed, epoch, self.processes.rank)
            if self.progress.step == 0:
                for loss in self.losses.values():
                    loss.start()
            yield epoch
            if self.progress.epoch == epoch:  # it had no validation
                self.progress.epoch_done()
        if self.history is not None:
            self.history.close()

    def steps(self, *loaders: object, until: int | None = None) -> Iterator:
        """Yield the batches of the epoch that are left to do; of several loaders, a batch of each.

        Args:
            loaders: `dints.data.loaders.TrainingLoader`; None stands for one that gives None.
            until: the iteration at which to end within an epoch.
        """
        place = self.progress.epoch, self.progress.step
        batches = zip(
            *(itertools.repeat(None) if one is None else one.epoch(*place) for one in loaders),
            strict=False,
        )
        if until is not None:
            batches = itertools.islice(batches, until - self.progress.iteration)
        used = [loader for loader in loaders if loader is not None]
        waited = sum(loader.seconds_waited for loader in used)
        for batch in self._with_stops(batches):
            yield batch if len(loaders) > 1 else batch[0]
            self.progress.step_done()
        self.seconds_waited = sum(loader.seconds_waited for loader in used) - waited

    def volumes(self, cases: Iterable[Item]) -> Iterator[Item]:
        """Yield a validation's cases until a rank is asked to stop."""
        with self._saved_when_stopped(), self.progress.timed():
            for case in cases:
                if self.stop_signal.received is not None:
                    break
                yield case
            (stop,) = self.processes.largest([self.stop_signal.received or 0])
            if stop:
                raise Stopped(stop)

    def record(self, name: str, loss: torch.Tensor, batch: Mapping[str, object]) -> None:
        """Count a step's loss, which stays on the device.

        Raises:
            UserError: the training diverged.
        """
        self.losses[name].add(loss, self.progress.iteration, batch["cases"])

    def end_epoch(self, **values: float | None) -> None:
        """Add a row to the history: the mean losses, ``values``, and the share of waiting."""
        means = {name: loss.mean() for name, loss in self.losses.items()}
        seconds = self.progress.seconds_in_epoch
        waiting = self.seconds_waited / seconds if seconds else 0.0
        self.history.add_epoch(self.progress, {**means, **values, "data_wait": waiting})

    def note_validation(self, scores: Scores | None, path: Path) -> bool:
        """Take over a validation's result if it is the best, and tell so.

        Args:
            scores: None: there are no validation cases, and the newest network counts as the
                best.
            path: the file that the network is written to.
        """
        return self.progress.note_validation(scores and scores.mean, path)

    def end_validation(self, scores: Scores | None) -> None:
        """End an epoch that was validated: add it to the history, and save."""
        if self.progress.step:
            self.progress.epoch_done()
        self.history.add_validation(self.progress, scores)
        self.checkpoint.save()

    def _with_stops(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Yield batches; before each, save if it is time, and stop if a rank was asked to."""
        with self._saved_when_stopped(), self.progress.timed():
            while True:
                batch = self._next(batches)
                unsaved = time.monotonic() - self.checkpoint.saved_at
                saves = int(self.is_main and unsaved >= 60 * self.settings.save_minutes)
                stop, save = self.processes.largest([self.stop_signal.received or 0, saves])
                if stop:
                    raise Stopped(stop)
                if save:
                    self.checkpoint.save()
                if batch is None:
                    # Else the time of the last steps would count nowhere.
                    self.processes.wait_for_device()
                    return
                yield batch

    def _next(self, batches: Iterator[Item]) -> Item | None:
        try:
            return next(batches, None)
        except RuntimeError:  # a worker was stopped by the signal too
            if self.stop_signal.received is None:
                raise
            return None

    @contextmanager
    def _saved_when_stopped(self) -> Iterator[None]:
        """Save the state after the last step where `Stopped` is raised inside, and let it pass."""
        try:
            yield
        except Stopped as stopped:
            self.checkpoint.save()
            stopped.saved = (
                f"after iteration {self.progress.iteration}, with its state in "
                f"{self.checkpoint.latest}"
            )
            raise
