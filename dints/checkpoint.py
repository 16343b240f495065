"""How a run goes on whatever stops it: its progress, the state to continue from, and stopping when asked to."""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import signal
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from dints import files
from dints.errors import Stopped, UserError
from dints.runtime import Precision, Processes

log = logging.getLogger(__name__)

FORMAT = 1  # of latest.pth; a file of another one is refused
RESULTS = ("Events", "*_history.csv", "search_code_*.pth", "best_metric_model.pth", "progress.yaml")
Batch = TypeVar("Batch")


@dataclass
class Progress:
    """How far a run has come, and its best validation so far (``best_*`` are None before the first).

    Attributes:
        epoch: that are completed, with their validation.
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

    @property
    def current_epoch(self) -> int:
        """Number, from 1, of the epoch that is running or, between two, was completed."""
        return self.epoch + (self.step > 0)

    @property
    def recorded_iteration(self) -> int:
        """The last iteration of the epochs that are completed: what comes after it is done again or gone on with."""
        return self.iteration - self.step

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

    def step_done(self) -> None:
        self.step, self.iteration = self.step + 1, self.iteration + 1

    def epoch_done(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0

    def note_validation(self, dice: float | None, path: Path) -> bool:
        """Take over a validation's result if it is the best; without any (no cases), the newest network is the best."""
        if dice is not None and self.best_dice is not None and dice <= self.best_dice:
            return False
        self.best_dice, self.best_epoch, self.best_iteration, self.best_path = (
            dice,
            self.current_epoch,
            self.iteration,
            str(path),
        )
        return True


class Checkpoint:
    """``latest.pth``, all that continuing a run needs, and ``previous.pth``, the one before.

    The file is a zip archive with a checksum for each tensor; a damaged one is told from a whole one, and the one
    before is taken. Signals that ask the run to stop are heeded between two steps, on every rank after the same one.

    Args:
        folder: the run folder.
        args: ``resume``, ``save_minutes``, ``warning_signal`` and ``allow_other_num_processes`` of the command line.
        configuration: what decides the run's course; a stored run with another one is not continued.

    Raises:
        UserError: there is nothing to continue, or it belongs to another run; every setting that differs is named.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, configuration: dict, processes: Processes):
        self.latest, self.previous = folder / "latest.pth", folder / "previous.pth"
        self.configuration, self.processes, self.save_minutes = configuration, processes, args.save_minutes
        self.signals = (signal.SIGTERM, signal.SIGINT, getattr(signal, f"SIG{args.warning_signal}"))
        self.received: int | None = None  # signal, and when
        self.received_at = 0.0
        # The file to continue from, and the precision that the run has; None for a new run.
        self.source, self.precision = processes.on_main(self._find, args)
        self.progress, self.parts, self.saved_at = Progress(), {}, time.monotonic()

    # Continuing

    def _find(self, args: argparse.Namespace) -> tuple[Path | None, str | None]:
        stored = [path for path in (self.latest, self.previous) if path.exists()]
        if args.resume == "never":
            for path in stored:  # or a run that is killed early would continue the old one
                path.unlink()
            return None, None
        if not stored:
            if args.resume == "must":
                raise UserError(f"--resume must, but there is no {self.latest}")
            self._refuse_results()
            return None, None
        for path in stored:
            try:
                state = _load(path)
            except UserError as error:
                if path == stored[-1]:
                    raise
                log.warning("%s; continuing from %s, the one before", error, stored[-1])
                continue
            self._compare(path, state["configuration"], args.allow_other_num_processes)
            if path == self.previous and self.latest.exists():  # a damaged one must not take the place of this one
                self.latest.unlink()
            return path, state["precision"]
        raise AssertionError("unreachable: the last one is taken, or its error raised")

    def _refuse_results(self) -> None:
        """A run saves its state before it writes anything else, so results without a state are of another origin."""
        found = [path.name for pattern in RESULTS for path in self.latest.parent.glob(pattern)]
        if found:
            raise UserError(
                f"--output_root {self.latest.parent} holds results ({', '.join(sorted(found)[:3])}) but no latest.pth "
                "to continue from: give another folder, or --resume never to overwrite them"
            )

    def _compare(self, path: Path, stored: dict, allow_other_num_processes: bool) -> None:
        keys = sorted({*stored, *self.configuration})
        differing = [key for key in keys if stored.get(key) != self.configuration.get(key)]
        if differing == ["processes"] and allow_other_num_processes:
            log.warning(
                "the run had %d processes and has %d: it continues, but not to the result that it would have had",
                stored["processes"],
                self.configuration["processes"],
            )
            return
        if differing:
            changes = [f"{key} was {stored.get(key)!r} and is {self.configuration.get(key)!r}" for key in differing]
            others = ", --allow_other_num_processes" if differing == ["processes"] else ""
            raise UserError(
                f"{path} belongs to a run with other settings ({', '.join(changes)}): use those again to continue "
                f"it{others}, --resume never to start afresh in this folder, or another --output_root"
            )

    def restore(self, parts: Mapping[str, object], precision: Precision) -> Progress:
        """Load the stored state into ``parts``, or save that of a new run; from here on, signals are heeded.

        Args:
            parts: networks, optimizers and whatever else has a ``state_dict``, by name; `save` saves them.
        """
        self.parts, self.precision = parts, precision.name
        if self.source is not None:
            state = files.load_safely(self.source)
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            self.progress = Progress(**state["progress"])
            if state["configuration"]["processes"] != self.processes.world_size and self.progress.step:
                self.progress.iteration, self.progress.step = self.progress.recorded_iteration, 0
            log.info("continuing after epoch %d, iteration %d", self.progress.epoch, self.progress.iteration)
        for number in self.signals:
            signal.signal(number, self._note_signal)
        if self.source is None:
            self.save()
        return self.progress

    # Saving

    def save(self) -> None:
        """Write the state on rank 0, the last one kept beside it; every rank must call it.

        Raises:
            UserError: a weight is not finite, or the disk is full; the files that are there stay.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        if self.processes.is_main:
            content = {
                "format": FORMAT,
                "configuration": self.configuration,
                "precision": self.precision,
                "progress": asdict(self.progress),
                "parts": parts,
            }
            _check_finite(parts)
            needed, free = sum(t.nbytes for t in _tensors(parts)), shutil.disk_usage(self.latest.parent).free
            if needed > free:
                raise UserError(
                    f"{self.latest} needs {needed / 2**20:.1f} MiB, and {free / 2**20:.1f} are free on its disk: free "
                    "some space, then the same command continues from the last save"
                )
            with files.replacing(self.latest, keep=self.previous) as file:
                torch.save(content, file)
        self.saved_at = time.monotonic()

    # Stopping

    def _note_signal(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        # A second Ctrl-C does not wait; but a launcher may pass on what the scheduler has sent to all.
        if self.received == number == signal.SIGINT and now - self.received_at > 1:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.received_at = number, now

    def steps(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield an epoch's batches; before each, count the step before it, save if it is time, stop if asked to.

        Raises:
            Stopped: after the same step on every rank.
        """
        batches = iter(batches)
        while True:
            batch = self._next(batches)
            is_due = time.monotonic() - self.saved_at >= 60 * self.save_minutes
            stop, save = self._agree(self.received or 0, is_due and self.processes.is_main)
            if stop:
                raise Stopped(stop)
            if save:
                self.save()
            if batch is None:
                return
            yield batch
            self.progress.step_done()

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        try:
            return next(batches, None)
        except RuntimeError:  # a worker was stopped by the signal too
            if self.received is None:
                raise
            return None

    def unless_stopped(self, cases: Iterable[Batch]) -> Iterator[Batch]:
        """Yield cases until this rank is asked to stop; `stop_if_asked` then tells whether any rank was."""
        for case in cases:
            if self.received is not None:
                return
            yield case

    def stop_if_asked(self) -> None:
        """Raise `Stopped` on every rank if any was asked to stop."""
        (stop,) = self._agree(self.received or 0)
        if stop:
            raise Stopped(stop)

    def _agree(self, *values: int) -> list[int]:
        """The largest of each value over the ranks."""
        if self.processes.world_size == 1:
            return list(values)
        return self.processes.agree(torch.tensor(values)).tolist()

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Save the state of the last step done where `Stopped` is raised inside, and let it pass."""
        try:
            yield
        except Stopped as stopped:
            self.save()
            if self.processes.is_main:
                stopped.saved = f"after iteration {self.progress.iteration}, with its state in {self.latest}"
            raise


def configuration(args: argparse.Namespace, processes: Processes, **contents: object) -> dict:
    """What decides a run's course, as plain values: flags, number of processes, and digests of ``contents``.

    Left out are the flags that say where files are (what is in them counts: give it as ``contents``) and how the work
    is carried out.
    """
    places = {"output_root", "root", "json", "arch_ckpt", "allow_outside_root"}
    manner = {"resume", "save_minutes", "num_workers", "cache", "cache_dir", "check", "local_rank", "device"}
    manner |= {"warning_signal", "timeout_minutes", "allow_other_num_processes"}
    flags = {name: value for name, value in vars(args).items() if name not in places | manner}
    return {
        **{name: str(value) if isinstance(value, Path) else value for name, value in flags.items()},
        "processes": processes.world_size,
        **{name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in contents.items()},
    }


def _load(path: Path) -> dict:
    """The content of a checkpoint that is whole, bit for bit as it was written.

    Raises:
        UserError: it is damaged, foreign, or of another version.
    """
    state = files.load_safely(path)
    keys = {"configuration", "precision", "progress", "parts"}
    if not isinstance(state, dict) or not keys <= state.keys():
        raise UserError(f"{path} is not a run's checkpoint: move it away, or give another --output_root")
    if state.get("format") != FORMAT:
        raise UserError(
            f"{path} has the format {state.get('format')}, and this version writes {FORMAT}: continue with the version "
            "that it is of, or start afresh with --resume never"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch writes checksums, and does not look at them
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        damaged = error
    if damaged is not None:
        raise UserError(f"{path} is damaged (checksum of {damaged}): remove it")
    return state


def _tensors(content: object) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _tensors(value)


def _check_finite(parts: Mapping[str, object]) -> None:
    """Raise rather than let a state take the place of a good one that no training recovers from."""
    for tensor in _tensors(parts):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                "the training diverged: weights are not finite, and are not saved; lower --learning_rate, set "
                "--max_gradient_norm, or try --precision fp32. latest.pth is from before"
            )
