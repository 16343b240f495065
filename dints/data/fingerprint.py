"""Spacing, intensity window and patch size of a dataset that is not in the table: measured.

It is kept in the run folder as ``task.json``, for people and for the runs that follow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dints import files
from dints.data.cases import read_image, read_label, resampling_of
from dints.data.listing import Case
from dints.data.tasks import Task
from dints.errors import UserError
from dints.running.machine import threads

log = logging.getLogger(__name__)

FILE = "task.json"
SAMPLES = 10_000  # foreground voxels of a case that the window is measured on, evenly spread
PERCENTILES = (0.5, 99.5)
SMALL_VOLUME = 64**3  # voxels up to which the first halving loses more than it saves
LARGEST_PATCH = 96**3  # voxels
COARSE = 2.0  # an axis waits while its spacing is this many times the finest axis's
FEWEST = 8  # voxels of an axis that is halved


@dataclass(frozen=True)
class Fingerprint:
    """The facts that a `Task` needs and a ``dataset.json`` lacks.

    Attributes:
        dataset: digest of the cases' files (names and sizes), whose fingerprint this is.
        num_cases: that were measured.
        spacing: median over the cases, mm, in RAS order.
        shape: median voxels of the cases at that spacing.
        intensity: 0.5 and 99.5 percentile of the foreground's voxels, for CT; None: z-score.
    """

    dataset: str
    num_cases: int
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    intensity: tuple[float, float] | None

    def patch_size(self, strides: str, num_depths: int) -> tuple[int, int, int]:
        """Return a patch of the proportions of the cases, of 96^3 voxels at most.

        It is no larger than the cases, if so they can be halved at each depth and before the first.

        Args:
            strides, num_depths: as those of `network_strides`.
        """
        steps = np.array([2**num_depths] * 3)
        if strides == "auto":
            steps = np.prod(halvings(self.spacing, self.shape, num_depths), 0)
        shape, size = np.array(self.shape), steps.copy()
        while True:
            larger = size + np.diag(steps)  # a row an axis that grows
            fits = (larger <= np.maximum(shape, size)).all(1) & (larger.prod(1) <= LARGEST_PATCH)
            if not fits.any():
                return tuple(size.tolist())
            size = larger[np.where(fits, size / shape, np.inf).argmin()]

    def at(self, spacing: tuple[float, float, float] | None) -> Fingerprint:
        """Return it for cases that are resampled to another spacing, if one is given."""
        if spacing is None:
            return self
        shape = np.round(np.array(self.shape) * self.spacing / np.array(spacing)).astype(int)
        return replace(self, spacing=tuple(spacing), shape=tuple(shape.clip(1).tolist()))

    def applied_to(self, task: Task, strides: str, num_depths: int) -> Task:
        patch_size = self.patch_size(strides, num_depths)
        return replace(task, spacing=self.spacing, intensity=self.intensity, patch_size=patch_size)


def halvings(
    spacing: Sequence[float], shape: Sequence[int], count: int
) -> list[tuple[int, int, int]]:
    """Return ``count`` strides of 1 and 2, by nnU-Net's rule (Isensee et al., Nat. Methods 2021).

    An axis is halved where its spacing is less than twice the finest one and it has 8 voxels. Where
    no such axis has 8, all are halved: the depth is to be smaller than the one before.

    Args:
        spacing: in mm.
        shape: in voxels.
    """
    spacing, shape, strides = np.array(spacing, float), np.array(shape, float), []
    for _ in range(count):
        fine = spacing < COARSE * spacing.min()
        large = fine & (shape >= FEWEST)
        halved = large if large.any() else fine
        strides.append(tuple(int(step) for step in 1 + halved))
        spacing, shape = spacing * strides[-1], shape / strides[-1]
    return strides


def fingerprint(
    cases: Sequence[Case], task: Task, folders: Sequence[Path], num_threads: int
) -> Fingerprint:
    """Take what one of ``folders`` holds of the same dataset, or else measure all cases.

    Args:
        task: not yet measured: its spacing is None.

    Raises:
        UserError: a case cannot be read, or none has any foreground.
    """
    digest = _digest(cases)
    for folder in folders:
        known = _stored(folder / FILE)
        if known is not None and known.dataset == digest:
            log.info("spacing, window and patch size are those in %s", folder / FILE)
            return known
    spacing = np.median([_spacing(resampling_of(case, task).affine) for case in cases], axis=0)
    spacing = tuple(round(float(size), 4) for size in spacing)
    shapes = [resampling_of(case, replace(task, spacing=spacing)).shape for case in cases]
    intensity = _window(cases, task, num_threads) if task.modality == "CT" else None
    shape = tuple(int(size) for size in np.median(shapes, axis=0))
    return Fingerprint(digest, len(cases), spacing, shape, intensity)


def write_task(folder: Path, task: Task, measured: Fingerprint | None) -> None:
    """Keep what a run works with as ``task.json``, and what was measured for it."""
    found = None if measured is None else asdict(measured)
    content = {"task": task.to_dict(), "fingerprint": found}
    files.write_atomically(folder / FILE, json.dumps(content, indent=2) + "\n")


def halves_first(choice: str, cases: Sequence[Case], task: Task) -> bool:
    """Tell whether a network is to halve the image first; ``auto``: unless volumes are small.

    Args:
        cases: what ``auto`` looks at, on the task's grid.
    """
    if choice != "auto":
        return choice == "yes"
    voxels = int(np.median([np.prod(resampling_of(case, task).shape) for case in cases]))
    log.info(
        "volumes have %d voxels in the median: the network works at %s resolution (up to %d at "
        "full; --use_downsample)",
        *(voxels, "half" if voxels > SMALL_VOLUME else "full", SMALL_VOLUME),
    )
    return voxels > SMALL_VOLUME


def network_strides(
    strides: str, use_downsample: str, num_depths: int, cases: Sequence[Case], task: Task
) -> tuple[tuple[int, int, int], ...]:
    """Return the strides of a network's depths, as `dints.network.strides` defines them.

    Args:
        strides: ``isotropic``: of all axes; ``auto``: as `halvings` plans for the median volume.
        use_downsample: whether the network halves the image first; see `halves_first`.
        cases: that are planned for, on the task's grid.
    """
    is_halved = halves_first(use_downsample, cases, task)
    count = num_depths if is_halved else num_depths - 1
    planned = [(2, 2, 2)] * count
    if strides == "auto":
        grids = [resampling_of(case, task) for case in cases]
        spacing = np.median([_spacing(grid.affine) for grid in grids], axis=0)
        shape = np.median([grid.shape for grid in grids], axis=0)
        planned = halvings(spacing, shape, count)
        log.info(
            "spacing %s mm, %s voxels in the median: depths are reduced by %s (--strides)",
            " x ".join(f"{size:.3g}" for size in spacing),
            " x ".join(f"{size:g}" for size in shape),
            ", ".join("x".join(map(str, stride)) for stride in planned),
        )
    return tuple(planned) if is_halved else ((1, 1, 1), *planned)


def _stored(path: Path) -> Fingerprint | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
        spacing, shape, intensity = (values[key] for key in ("spacing", "shape", "intensity"))
        return Fingerprint(
            str(values["dataset"]),
            int(values["num_cases"]),
            tuple(float(spacing[axis]) for axis in range(3)),
            tuple(int(shape[axis]) for axis in range(3)),
            None if intensity is None else (float(intensity[0]), float(intensity[1])),
        )
    except (OSError, ValueError, TypeError, LookupError):  # none there, or not ours: it is measured
        return None


def _digest(cases: Sequence[Case]) -> str:
    listed = [(Path(path).name, os.path.getsize(path)) for case in cases for path in case.files]
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def _spacing(affine: np.ndarray) -> np.ndarray:
    return np.linalg.norm(affine[:3, :3], axis=0)


def _window(cases: Sequence[Case], task: Task, num_threads: int) -> tuple[float, float]:
    """Measure percentiles of the foreground's intensities; every case counts alike."""

    def sample(case: Case) -> np.ndarray:
        foreground = read_label(case.label_header, task).ravel() > 0
        image, _ = read_image(case)
        values = np.concatenate([channel.ravel()[foreground] for channel in image])
        return values[:: max(1, len(values) // SAMPLES)].astype(np.float32)

    silent = None if log.isEnabledFor(logging.INFO) else True
    with threads(num_threads) as pool:
        samples = list(
            tqdm(pool.imap(sample, cases), "intensities", len(cases), unit="case", disable=silent)
        )
    values = np.concatenate(samples)
    if not len(values):
        raise UserError("no case has any foreground: look at the labels, which --check lists")
    low, high = (float(value) for value in np.percentile(values, PERCENTILES))
    return low, max(high, low + 1)
