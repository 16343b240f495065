"""One case: its files are read, compared with each other and the task, and preprocessed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dints.data.crops import CropMasks, crop_masks
from dints.data.grid import Resampling, in_c_order
from dints.data.listing import Case, ReadOptions
from dints.data.nifti import Header, read_voxels
from dints.data.tasks import MAX_CLASSES, Task
from dints.errors import UserError
from dints.running.machine import threads

log = logging.getLogger(__name__)

AFFINE_TOLERANCE = 1e-3  # by which a label's affine may differ from its image's, an entry
# Voxels of a case on the task's grid; a whole body at 1 mm has a quarter of them
MAX_GRID = 1 << 31


@dataclass(frozen=True)
class Prepared:
    """A case as it is cached: on the task's grid, with the task's intensities.

    Attributes:
        image: (channels, x, y, z), float16.
        label: (x, y, z), uint8.
        masks: where patches are cut out.
        centres: (classes, 3), float32, of the classes' voxels, in voxels; NaN for an absent class.
    """

    image: np.ndarray
    label: np.ndarray
    masks: CropMasks
    centres: np.ndarray


def resampling_of(case: Case, task: Task) -> Resampling:
    """Return the way from the files' voxels to the task's grid."""
    return Resampling(case.shape, case.affine, task.spacing)


def check_cases(cases: Sequence[Case], task: Task) -> None:
    """Read all headers, and compare each case's with each other and with the task.

    Raises:
        UserError: some cases cannot be trained on; they are counted, and the first one's fault is
            named.
    """
    faults = [fault for fault in first_faults(cases, task) if fault is not None]
    if len(faults) > 1:
        raise UserError(
            f"{len(faults)} of {len(cases)} cases cannot be used (search_dints.py --check lists "
            f"them), for example {faults[0]}"
        )
    for fault in faults:
        raise fault


def first_faults(
    cases: Sequence[Case], task: Task, check: Callable[[Case], None] = lambda case: None
) -> list[UserError | None]:
    """Return for each case its first fault, as `check_cases` finds it, or None.

    Args:
        check: raises `UserError` for a case that the caller cannot use; it comes first.
    """

    def attempt(case: Case) -> UserError | None:
        try:
            check(case)
            check_case(case, task)
        except UserError as error:
            return error

    with threads(8) as pool:  # they wait for the disk more than they compute
        return pool.map(attempt, cases)


def check_case(case: Case, task: Task) -> None:
    """Raise the first of `case_faults` as a `UserError`."""
    for fault in case_faults(case, task):
        raise UserError(fault)


def case_faults(case: Case, task: Task, trust_shapes: bool | None = None) -> Iterator[str]:
    """Yield the faults of a case's headers, with which it cannot be trained on.

    Args:
        trust_shapes: in place of the case's own.
    """
    trust_shapes = case.options.trust_shapes if trust_shapes is None else trust_shapes
    first, label = case.headers[0], case.label_header
    if case.num_channels != task.num_channels:
        yield (
            f"{first.path} has {case.num_channels} channel{'' if case.num_channels == 1 else 's'} "
            f"of shape {first.shape}; {task.name} has {task.num_channels}: fix or remove the case, "
            "or the channels in dataset.json"
        )
    grid = resampling_of(case, task).shape
    if np.prod(grid, dtype=object) > MAX_GRID or max(grid) == 1 < max(first.shape):
        yield (
            f"{first.path} would become {' x '.join(map(str, grid))} voxels at a spacing of "
            f"{' x '.join(f'{size:.4g}' for size in task.spacing)} mm; its own is "
            f"{' x '.join(f'{size:.4g}' for size in first.spacing)} mm: fix its header, give "
            "another --spacing, or remove the case"
        )
    for other in [*case.headers[1:], *([] if label is None else [label])]:
        if other.shape != first.shape:
            yield (
                f"{other.path} has shape {other.shape}, but its image {first.path} has "
                f"{first.shape}: fix or remove the case"
            )
        elif not trust_shapes and np.abs(other.affine - first.affine).max() > AFFINE_TOLERANCE:
            yield (
                f"{other.path} lies elsewhere than its image {first.path} (their affines differ by "
                f"up to {np.abs(other.affine - first.affine).max():.3g}): fix or remove the case, "
                "or give --trust_shapes to take the image's place for both"
            )
    if label is not None and label.num_channels != 1:
        yield (
            f"{label.path} has {label.num_channels} channels, and a label has 1: fix or remove the "
            "case"
        )


def read_image(case: Case) -> tuple[np.ndarray, int]:
    """Read the voxels (channels, x, y, z) of a case's image files, and count those replaced.

    Raises:
        UserError: a file is damaged, or has voxels that are not finite.
    """
    read = [read_image_file(header, case.options) for header in case.headers]
    files, counts = zip(*read, strict=True)
    return files[0] if len(files) == 1 else np.concatenate(files), sum(counts)


def read_image_file(header: Header, options: ReadOptions) -> tuple[np.ndarray, int]:
    """Read one image file as `read_image`."""
    voxels = read_voxels(header)
    if voxels.dtype.kind != "f":
        return voxels, 0
    with np.errstate(over="ignore"):
        voxels = voxels.astype(np.float32, copy=False)
    bad = ~np.isfinite(voxels)
    count = int(bad.sum())
    if count and options.replace_nonfinite is None:
        raise UserError(
            f"{header.path} has {count} NaN or infinite voxels: fix or remove the case, or give "
            "--replace_nonfinite VALUE"
        )
    return np.where(bad, np.float32(options.replace_nonfinite), voxels) if count else voxels, count


def read_label(header: Header, task: Task) -> np.ndarray:
    """Read the label's voxels (x, y, z) as uint8; whole numbers in any type are accepted.

    Raises:
        UserError: the file is damaged, or holds a value that is not one of the task's labels.
    """
    (voxels,) = read_voxels(header)
    with np.errstate(invalid="ignore"):
        label = voxels.astype(np.uint8)
    wrong = (label != voxels) | (label >= task.num_classes)
    if wrong.any():
        values = np.unique(voxels[wrong])
        first = str(values[0]).removesuffix(".0")  # all digits: 1.0000001 is not 1
        others = f" and {len(values) - 1} more" if len(values) > 1 else ""
        if len(values) > MAX_CLASSES:
            raise UserError(
                f"{header.path} holds {values[0]:g}{others} in {int(wrong.sum())} voxels, where "
                f"{task.name} has the labels 0 to {task.num_classes - 1}: it looks like an image: "
                "give the label's path in dataset.json"
            )
        raise UserError(
            f"{header.path} holds the label {first}{others} in {int(wrong.sum())} voxels; "
            f"{task.name} has the labels 0 to {task.num_classes - 1}: fix or remove the case, or "
            "the labels in dataset.json"
        )
    return label


def preprocess_image(voxels: np.ndarray, resampling: Resampling, task: Task) -> np.ndarray:
    """Return the image (channels, *grid), float32, as the network sees it."""
    return normalise(resampling.apply(voxels), task)


def normalise(image: np.ndarray, task: Task) -> np.ndarray:
    """Map the task's window to 0..1, or z-score each channel's non-zero voxels, in place."""
    if task.intensity is not None:
        low, high = task.intensity
        image -= low
        image *= 1 / (high - low)
        return np.clip(image, 0, 1, out=image)
    for channel in image:
        nonzero = channel != 0
        values = channel[nonzero].astype(np.float64)
        if len(values):
            channel[nonzero] = (values - values.mean()) / (values.std() or 1.0)
    return image


def prepare(case: Case, task: Task) -> Prepared:
    """Read and preprocess a case with a label.

    Raises:
        UserError: a file is damaged, or its voxels cannot be learned from.
    """
    resampling = resampling_of(case, task)
    voxels, replaced = read_image(case)
    if replaced:
        value = case.options.replace_nonfinite
        log.warning("%s: %d NaN or infinite voxels become %g", case.name, replaced, value)
    image = in_c_order(preprocess_image(voxels, resampling, task), torch.float16)
    del voxels
    label = resampling.apply(read_label(case.label_header, task)[None], nearest=True)
    label = in_c_order(label, torch.uint8)[0]
    masks = crop_masks(label, task.num_classes)
    return Prepared(image, label, masks, class_centres(label, task.num_classes))


def class_centres(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Return `Prepared.centres` of a label (x, y, z), uint8: each class's mean voxel."""
    centres = np.full((num_classes, 3), np.nan, np.float32)
    for value in range(1, num_classes):
        voxels = np.unravel_index(np.flatnonzero(label == value), label.shape)
        if len(voxels[0]):
            centres[value] = [along.mean() for along in voxels]
    return centres
