"""The state that a run goes on from: ``latest.pth`` and the one before, saved, found and restored."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from dints import files, torch_files
from dints.errors import UserError
from dints.running.precision import Precision
from dints.running.processes import Processes
from dints.training.progress import Progress

log = logging.getLogger(__name__)

FORMAT = 1  # of latest.pth; a file of another one is refused
LATEST, PREVIOUS = "latest.pth", "previous.pth"
RESULTS = ("Events", "*_history.csv", "search_code_*.pth", "best_metric_model.pth", "progress.yaml")


class Diverged(UserError):
    """A training's weights are not finite."""


class Found(NamedTuple):
    """The state that a run continues from.

    Attributes:
        path: its file.
        precision: that the run has, whatever would be chosen now.
    """

    path: Path
    precision: str


def find_state(
    folder: Path, configuration: dict, resume: str = "auto", allow_other_num_processes: bool = False
) -> Found | None:
    """Find what a run in ``folder`` continues from; None for a new run.

    Args:
        configuration: what decides the run's course, see `configured`; a stored run with another one is not continued.
        resume: ``auto``: continue if there is a state; ``must``: there must be one; ``never``: remove it.
        allow_other_num_processes: continue a run that had another number of processes.

    Raises:
        UserError: there is nothing to continue, or it belongs to another run; every setting that differs is named.
    """
    latest, previous = folder / LATEST, folder / PREVIOUS
    stored = [path for path in (latest, previous) if path.exists()]
    if resume == "never":
        remove_states(folder)  # or a run that is killed early would continue the old one
        return None
    if not stored:
        if resume == "must":
            raise UserError(f"--resume must, but there is no {latest}")
        _refuse_results(folder)
        return None
    path, state = _newest_whole(stored)
    compare(path, state["configuration"], configuration, allow_other_num_processes)
    if path == previous and latest.exists():  # a damaged one must not take the place of this one
        latest.unlink()
    return Found(path, state["precision"])


def remove_states(folder: Path) -> None:
    """Remove the states that a run in ``folder`` would continue from."""
    for name in (LATEST, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def configured(flags: Mapping[str, object], num_processes: int, **contents: object) -> dict:
    """Put what decides a run's course into plain values: flags, number of processes, and digests of ``contents``."""
    return {
        **flags,
        "processes": num_processes,
        **{name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in contents.items()},
    }


def _newest_whole(stored: list[Path]) -> tuple[Path, dict]:
    for path in stored:
        try:
            return path, _load(path)
        except UserError as error:
            if path == stored[-1]:
                raise
            log.warning("%s; continuing from %s, the one before", error, stored[-1])
    raise AssertionError("unreachable: the last one is taken, or its error raised")


def _refuse_results(folder: Path) -> None:
    """Refuse results without a state: a run saves its state before anything else, so another one wrote them."""
    found = [path.name for pattern in RESULTS for path in folder.glob(pattern)]
    if found:
        raise UserError(
            f"--output_root {folder} holds results ({', '.join(sorted(found)[:3])}) but no {LATEST} "
            "to continue from: give another folder, or --resume never to overwrite them"
        )


def compare(path: Path, stored: dict, wanted: dict, allow_other_num_processes: bool = False) -> None:
    """Raise `UserError` where the configuration stored in ``path`` is not the wanted one, with all that differs."""
    keys = sorted({*stored, *wanted})
    differing = [key for key in keys if stored.get(key) != wanted.get(key)]
    if differing == ["processes"] and allow_other_num_processes:
        log.warning(
            "the run had %d processes and has %d: it continues, but not to the result that it would have had",
            stored["processes"],
            wanted["processes"],
        )
        return
    if differing:
        changes = [f"{key} was {stored.get(key)!r} and is {wanted.get(key)!r}" for key in differing]
        others = ", --allow_other_num_processes" if differing == ["processes"] else ""
        raise UserError(
            f"{path} belongs to a run with other settings ({', '.join(changes)}): use those again to continue "
            f"it{others}, --resume never to start afresh in this folder, or another --output_root"
        )


class Checkpoint:
    """``latest.pth``, all that continuing a run needs, and ``previous.pth``, the one before.

    The file is a zip archive with a checksum for each tensor; a damaged one is told from a whole one, and the one
    before is taken.

    Args:
        folder: the run folder.
        configuration: what decides the run's course, see `configured`.
        parts: networks, optimizers and whatever else has a ``state_dict``, by name.

    Attributes:
        progress: how far the run has come.
        saved_at: time of the last save, of the monotonic clock.
    """

    def __init__(
        self,
        folder: Path,
        configuration: dict,
        parts: Mapping[str, object],
        precision: Precision,
        processes: Processes,
    ):
        self.latest, self.previous = folder / LATEST, folder / PREVIOUS
        self.configuration, self.parts, self.precision = configuration, parts, precision
        self.processes, self.progress, self.saved_at = processes, Progress(), time.monotonic()

    def restore(self, found: Found | None) -> Progress:
        """Load the state that `find_state` found into the parts, or save that of a new run."""
        if found is None:
            self.save()
            return self.progress
        state = torch_files.load_safely(found.path)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.progress = Progress(**state["progress"])
        if state["configuration"]["processes"] != self.processes.world_size and self.progress.step:
            self.progress.iteration, self.progress.step = self.progress.recorded_iteration, 0
        log.info("continuing after epoch %d, iteration %d", self.progress.epoch, self.progress.iteration)
        return self.progress

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
                "precision": self.precision.name,
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


def _load(path: Path) -> dict:
    """Return the content of a checkpoint that is whole, bit for bit as it was written.

    Raises:
        UserError: it is damaged, foreign, or of another version.
    """
    state = torch_files.load_safely(path)
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
    finite: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in _tensors(parts):
        if tensor.is_floating_point():
            finite.setdefault(tensor.device, []).append(tensor.isfinite().all())
    if not all(torch.stack(answers).all() for answers in finite.values()):  # one wait, and not one a tensor
        raise Diverged(
            "the training diverged: weights are not finite, and are not saved; lower --learning_rate, set "
            "--max_gradient_norm, or try --precision fp32. latest.pth is from before"
        )
