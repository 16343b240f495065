"""The state that a run is resumed from: saved, found and restored."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from dints import files, torch_files
from dints.errors import UserError, cut
from dints.running.differences import differences
from dints.running.failures import lacks_memory
from dints.running.precision import Precision
from dints.running.processes import Processes
from dints.running.progress import Progress
from dints.running.run_folder import LATEST, PREVIOUS

log = logging.getLogger(__name__)

RESULTS = ("Events", "*_history.csv", "search_code_*.pth", "best_metric_model.pth", "progress.yaml")
# What parts raise for a state that is not theirs.
_MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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
        configuration: plain values that decide what the run computes, ``processes`` among them; a
            stored run with another one is not continued.
        resume: ``must``: there must be a state. ``never`` is done with:
            `dints.running.run_folder.start_afresh`.
        allow_other_num_processes: continue a run that had another number of processes.

    Raises:
        UserError: there is nothing to continue, or it belongs to another run; every setting that
            differs is named.
    """
    latest, previous = folder / LATEST, folder / PREVIOUS
    stored = [path for path in (latest, previous) if path.exists()]
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
    """Refuse results without a state: as a run saves that first, another one wrote them."""
    found = [path.name for pattern in RESULTS for path in folder.glob(pattern)]
    if found:
        raise UserError(
            f"--output_root {folder} holds results ({', '.join(sorted(found)[:3])}) but no "
            f"{LATEST} to continue from: give another folder, or --resume never to move them away"
        )


def compare(
    path: Path, stored: dict, wanted: dict, allow_other_num_processes: bool = False
) -> None:
    """Refuse the configuration stored in ``path`` if it is not the wanted one; name the changes."""
    differing = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
    if differing == ["processes"] and allow_other_num_processes:
        log.warning(
            "the run had %d processes and has %d: it continues, but not to the result that it "
            "would have had",
            stored["processes"],
            wanted["processes"],
        )
        return
    if differing:
        changes = [
            change
            for key in differing
            for change in differences(key, stored.get(key), wanted.get(key))
        ]
        others = ", --allow_other_num_processes" if differing == ["processes"] else ""
        raise UserError(
            f"{path} belongs to a run with other settings ({', '.join(changes)}): use those again "
            f"to continue it{others}, --resume never to start afresh in this folder, or another "
            "--output_root"
        )


class Checkpoint:
    """``latest.pth``, all that continuing a run needs, and ``previous.pth``, the one before.

    The file is a zip archive with a checksum for each tensor; a damaged one is recognised, and the
    one before is taken.

    Args:
        folder: the run folder.
        configuration: as for `find_state`.
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
        """Load the state that `find_state` found into the parts, or save that of a new run.

        Raises:
            UserError: a part is not there, or is that of another network or optimizer.
        """
        if found is None:
            self.progress.run = self.processes.on_main(lambda: uuid.uuid4().hex)
            self.save()
            return self.progress
        state = torch_files.load_safely(found.path)
        for name, part in self.parts.items():
            _load_part(part, name, state["parts"], found.path)
        self.progress = Progress(**state["progress"])
        if state["configuration"]["processes"] != self.processes.world_size and self.progress.step:
            self.progress.iteration, self.progress.step = self.progress.recorded_iteration, 0
        log.info(
            "continuing after epoch %d, iteration %d", self.progress.epoch, self.progress.iteration
        )
        return self.progress

    def save(self) -> None:
        """Write the state on rank 0, the last one kept beside it; every rank must call it.

        Raises:
            UserError: a weight is not finite, or the disk is full; the files that are there stay.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        if self.processes.is_main:
            content = {
                "configuration": self.configuration,
                "precision": self.precision.name,
                "progress": asdict(self.progress),
                "parts": parts,
            }
            _check_finite(parts)
            needed = sum(tensor.nbytes for tensor in _tensors(parts))
            free = shutil.disk_usage(self.latest.parent).free
            if needed > free:
                raise UserError(
                    f"{self.latest} needs {needed / 2**20:.1f} MiB, and {free / 2**20:.1f} are "
                    "free on its disk: free some space, then the same command continues from the "
                    "last save"
                )
            with files.replacing(self.latest, keep=self.previous) as file:
                torch.save(content, file)
        self.saved_at = time.monotonic()


def _load_part(part: object, name: str, states: Mapping[str, object], path: Path) -> None:
    if name not in states:
        raise UserError(
            f"{path} has no state of the part {name}: continue with the version of the scripts "
            "that wrote it, or start afresh with --resume never"
        )
    try:
        part.load_state_dict(states[name])
    except _MISFITS as error:
        if lacks_memory(error):
            raise
        reason = f"{type(error).__name__}: {cut(' '.join(str(error).split()), 200)}"
        raise UserError(
            f"{path} does not fit this run: its {name} cannot be loaded ({reason}); move it away "
            f"to continue from {PREVIOUS}, or start afresh with --resume never"
        ) from error


def _load(path: Path) -> dict:
    """Return the content of a checkpoint that is whole, bit for bit as it was written."""
    state = torch_files.load_safely(path)
    kinds = {"configuration": dict, "precision": str, "progress": dict, "parts": dict}
    is_ours = isinstance(state, dict) and all(
        isinstance(state.get(key), kind) for key, kind in kinds.items()
    )
    if not is_ours or state["progress"].keys() != asdict(Progress()).keys():
        raise UserError(
            f"{path} is not a run's checkpoint of this version: move it away, or give another "
            "--output_root"
        )
    try:
        # PyTorch writes checksums, and does not look at them
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        damaged = error
    if damaged is not None:
        raise UserError(f"{path} is damaged (checksum of {damaged}): remove it")
    return state


def _tensors(content: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in a nested state."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, (Mapping, list, tuple)):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(value)


def _check_finite(parts: Mapping[str, object]) -> None:
    """Raise rather than let a state take the place of a good one that no training recovers from."""
    finite: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in _tensors(parts):
        if tensor.is_floating_point():
            finite.setdefault(tensor.device, []).append(tensor.isfinite().all())
    # one wait, and not one a tensor
    if not all(torch.stack(answers).all() for answers in finite.values()):
        raise Diverged(
            "the training diverged: weights are not finite, and are not saved; lower "
            "--learning_rate, set --max_gradient_norm, or try --precision fp32. latest.pth is from "
            "before"
        )
