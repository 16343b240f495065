"""Prepared cases between epochs and runs: in memory, in shared files, or prepared each time.

A case takes 2 bytes a voxel and channel (float16), 1 for the label and at most 1/8 a class for the
crop masks. Files are memory-mapped: only what is cut out of them is read, and the system keeps in
memory what it has room for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dints import files
from dints.data.cases import Prepared, prepare, read_image, read_label, resampling_of
from dints.data.changes import check_unchanged, digest
from dints.data.crops import CropMasks
from dints.data.dataset import Fold
from dints.data.fingerprint import write_task
from dints.data.listing import Case
from dints.data.tasks import Task
from dints.errors import UserError
from dints.running import machine
from dints.running.run import Run

log = logging.getLogger(__name__)

# What ``auto`` gives to the cache of the memory that is free; the rest is for training
SHARE_OF_MEMORY = 0.5
# Bytes that cases take which are prepared at the same time, but for a single larger one
WORKING_MEMORY = 1 << 30
# A voxel and channel, while a case is prepared: the file's, interpolated along two axes, float16.
WORKING_BYTES = 16


@dataclass(frozen=True)
class Cache:
    """Where prepared cases are kept.

    Attributes:
        mode: ``ram``, ``disk`` or ``none``.
        folder: of ``disk``.
        num_threads: that prepare cases at the same time.
    """

    mode: str
    folder: Path
    task: Task
    num_threads: int

    def hold(self, cases: Sequence[Case], what: str) -> Sequence[Prepared]:
        """Prepare the cases now; in mode ``none``, check them and prepare each when asked.

        Args:
            what: the cases are, for messages.

        Raises:
            UserError: a case cannot be read or learned from, or the folder cannot be written.
        """
        if self.mode == "ram":
            return PreparedCases(self._for_each(self._tensors, cases, what), _from_tensors)
        if self.mode == "disk":
            return PreparedCases(self._for_each(self._store, cases, what), _map_entry)
        self._for_each(self._check, cases, what)
        return PreparedCases(cases, self._prepare)

    def _for_each(self, function: Callable, cases: Sequence[Case], what: str) -> list:
        if not cases:
            return []
        log.info("reading %d cases (%s)", len(cases), what)
        silent = None if log.isEnabledFor(logging.INFO) else True
        with machine.threads(self.num_threads) as pool:
            done = pool.imap(function, cases)
            return list(tqdm(done, what, len(cases), unit="case", leave=False, disable=silent))

    def _prepare(self, case: Case) -> Prepared:
        return prepare(case, self.task)

    def _tensors(self, case: Case) -> list[torch.Tensor]:
        """Prepare a case; workers share tensors' memory, however they are started."""
        return [torch.from_numpy(array) for array in _arrays(self._prepare(case))]

    def _check(self, case: Case) -> None:
        read_image(case)
        read_label(case.label_header, self.task)

    def _store(self, case: Case) -> Path:
        """Return the entry of a case; one process writes it if it is not there, others wait."""
        entry = self.folder / self._key(case)
        try:
            with files.locked(entry.with_suffix(".lock")):
                if not _is_whole(entry):
                    _write_entry(entry, self._prepare(case))
            return entry
        except OSError as error:
            raise UserError(
                f"--cache_dir {self.folder} cannot be used: {error.strerror or error}; free some "
                "space, or give another folder"
            ) from error

    def _key(self, case: Case) -> str:
        """Name an entry after all that it depends on: the files' content, the task, and the code.

        The headers count as they were read: a file that changed since makes an entry that no later
        run takes.
        """
        task, digests = self.task, [self._digest(path) for path in case.files]
        facts = [task.spacing, task.intensity, task.num_channels, task.num_classes]
        facts += [header.nifti.binaryblock for header in (*case.headers, case.label_header)]
        facts += [astuple(case.options), _code_digest(), digests]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]

    def _digest(self, path: str) -> str:
        """Return a file's digest, noted until its size or time of change differs."""
        name = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32]
        note, noted = self.folder / "digests" / f"{name}.json", None
        with suppress(OSError, ValueError):
            noted = json.loads(note.read_text(encoding="utf-8"))
        found = digest(path, noted)
        if found != noted:
            files.write_atomically(note, json.dumps(found))
        return found[-1]


def open_cache(fold: Fold, run: Run, on_every_rank: bool = False) -> Cache:
    """Check that the files are those of the run, and choose where prepared cases are kept.

    Says how much memory that takes and how much there is, and writes the task into the run folder.

    Args:
        on_every_rank: each rank will hold all of the cases, and not its share.

    Raises:
        UserError: a file was replaced, or the cache that ``--cache`` asks for does not fit.
    """
    settings, processes, task = run.settings, run.processes, fold.task
    allowed = settings.allow_changed_data
    run.on_main(check_unchanged, run.folder, fold.cases, run.is_continued, allowed)
    run.on_main(write_task, run.folder, task, fold.measured)
    grids = [(case.shape, resampling_of(case, task).shape) for case in fold.cases]
    voxels = [max(math.prod(shape) for shape in shapes) for shapes in grids]
    needed = int(sum(voxels) * (2 * task.num_channels + 1 + task.num_classes / 8))
    needed = needed * (processes.world_size if on_every_rank else 1) // processes.num_nodes
    folder = settings.cache_folder.absolute()
    facts = len(voxels), needed, folder, processes.num_nodes
    mode = run.on_main(_choose_mode, settings.cache, *facts)
    at_once = max(1, WORKING_MEMORY // (max(voxels, default=1) * task.num_channels * WORKING_BYTES))
    return Cache(mode, folder, task, min(machine.cores_per_process(), at_once))


def _choose_mode(mode: str, num_cases: int, needed: int, folder: Path, num_nodes: int) -> str:
    memory, disk = machine.available_memory(), _free_bytes(folder)
    if mode == "auto":
        mode = "ram" if needed <= SHARE_OF_MEMORY * memory else "disk" if needed < disk else "none"
    where = " on each node" if num_nodes > 1 else ""
    log.info(
        "cache %s: %d cases take %s%s; free are %s of memory and %s in %s",
        *(mode, num_cases, machine.gib(needed), where),
        *(machine.gib(memory), machine.gib(disk), folder),
    )
    if mode == "ram" and needed > memory:
        raise UserError(
            f"--cache ram: {num_cases} cases take {machine.gib(needed)} of memory, and "
            f"{machine.gib(memory)} are free: use --cache disk, a larger machine, or more nodes"
        )
    return mode


def _free_bytes(folder: Path) -> int:
    """Return what is free on the disk that the folder is on, or will be."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


@dataclass(frozen=True)
class PreparedCases(Sequence):
    """Prepared cases; each is loaded when it is asked for.

    Attributes:
        kept: of each case, its arrays in memory, its entry on disk, or its files.
        load: makes a case of that.
    """

    kept: Sequence
    load: Callable[[object], Prepared]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Prepared:
        return self.load(self.kept[index])


ARRAYS = ("image", "label", "boxes", "starts", "bits", "centres")


def _arrays(prepared: Prepared) -> list[np.ndarray]:
    """Return the arrays of a case, in the order of `ARRAYS`."""
    masks = prepared.masks
    return [
        *(prepared.image, prepared.label, masks.boxes, masks.starts, masks.bits, prepared.centres)
    ]


def _from_arrays(arrays: Sequence[np.ndarray]) -> Prepared:
    image, label, boxes, starts, bits, centres = arrays
    return Prepared(image, label, CropMasks(boxes, starts, bits), centres)


def _from_tensors(tensors: Sequence[torch.Tensor]) -> Prepared:
    return _from_arrays([tensor.numpy() for tensor in tensors])


def _map_entry(entry: Path) -> Prepared:
    paths = [entry / f"{name}.npy" for name in ARRAYS]
    # A map is never unpickled.
    return _from_arrays([np.load(path, mmap_mode="r") for path in paths])  # noqa: TID251


def _is_whole(entry: Path) -> bool:
    """Tell whether the entry is there and can be mapped; one that cannot is removed."""
    if not entry.exists():
        return False
    try:
        _map_entry(entry)
        return True
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s is damaged (%s) and is made again", entry, error)
        shutil.rmtree(entry)
        return False


def _write_entry(entry: Path, prepared: Prepared) -> None:
    """Write the entry's files into a folder beside it, then give that its name."""
    partial = entry.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock is ours
    partial.mkdir(parents=True)
    for name, array in zip(ARRAYS, _arrays(prepared), strict=True):
        with open(partial / f"{name}.npy", "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
    partial.rename(entry)


def _code_digest() -> str:
    """Return the digest of this folder's modules: no entry outlives a change of its code."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()
