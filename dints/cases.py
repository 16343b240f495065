"""One case: its files read, held against each other and against the task, and made what the network sees."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

import numpy as np
import torch

from dints.crops import CropMasks, crop_masks
from dints.dataset import Case
from dints.errors import UserError
from dints.tasks import Task
from dints.volumes import Header, Resampling, in_c_order, read_header, read_voxels

log = logging.getLogger(__name__)

AFFINE_TOLERANCE = 1e-3  # by which a label's affine may differ from its image's, an entry
MAX_GRID = 1 << 31  # voxels of a case on the task's grid; a whole body at 1 mm has a quarter of them


@dataclass(frozen=True)
class Leniency:
    """What a user lets pass in files that would be refused.

    Attributes:
        trust_shapes: an affine of a label other than its image's; the image's is taken.
        replace_nonfinite: NaN and infinite voxels of images; they become this value.
    """

    trust_shapes: bool = False
    replace_nonfinite: float | None = None

    @staticmethod
    def from_args(args: argparse.Namespace) -> Leniency:
        return Leniency(args.trust_shapes, args.replace_nonfinite)


@dataclass(frozen=True)
class Headers:
    """Of one case's files."""

    images: tuple[Header, ...]
    label: Header | None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images[0].shape

    @property
    def num_channels(self) -> int:
        return sum(image.num_channels for image in self.images)

    def resampling(self, task: Task) -> Resampling:
        """The way from the files' voxels to the task's grid."""
        return Resampling(self.shape, self.images[0].affine, task.spacing)


@dataclass(frozen=True)
class Prepared:
    """A case as it is cached: on the task's grid, with the task's intensities.

    Attributes:
        image: (channels, x, y, z), float16.
        label: (x, y, z), uint8.
        masks: where patches are cut out.
    """

    image: np.ndarray
    label: np.ndarray
    masks: CropMasks


def read_headers(case: Case) -> Headers:
    """The headers of a case's files, each one readable by itself."""
    images = tuple(read_header(path) for path in case.images)
    return Headers(images, None if case.label is None else read_header(case.label))


def header_faults(headers: Headers, task: Task, leniency: Leniency) -> Iterator[str]:
    """What a case's headers say against training on it."""
    first = headers.images[0]
    if headers.num_channels != task.num_channels:
        yield (
            f"{first.path} has {headers.num_channels} channels of shape {first.shape}; {task.name} has "
            f"{task.num_channels}: mend or remove the case, or the channels in dataset.json"
        )
    grid = headers.resampling(task).shape
    if np.prod(grid, dtype=object) > MAX_GRID:
        yield (
            f"{first.path} would become {' x '.join(map(str, grid))} voxels at a spacing of "
            f"{' x '.join(f'{size:.4g}' for size in task.spacing)} mm; its own is "
            f"{' x '.join(f'{size:.4g}' for size in first.spacing)} mm: mend its header, give another --spacing, or "
            "remove the case"
        )
    others = [*headers.images[1:], *([] if headers.label is None else [headers.label])]
    for other in others:
        if other.shape != first.shape:
            yield (
                f"{other.path} has shape {other.shape}, but its image {first.path} has {first.shape}: "
                "mend or remove the case"
            )
        elif not leniency.trust_shapes and np.abs(other.affine - first.affine).max() > AFFINE_TOLERANCE:
            yield (
                f"{other.path} lies elsewhere than its image {first.path} (their affines differ by up to "
                f"{np.abs(other.affine - first.affine).max():.3g}): mend or remove the case, or give --trust_shapes to "
                "take the image's place for both"
            )
    if headers.label is not None and headers.label.num_channels != 1:
        yield (
            f"{headers.label.path} has {headers.label.num_channels} channels, and a label has 1: mend or remove "
            "the case"
        )


def checked_headers(case: Case, task: Task, leniency: Leniency) -> Headers:
    """As `read_headers`.

    Raises:
        UserError: the first of `header_faults`.
    """
    headers = read_headers(case)
    for fault in header_faults(headers, task, leniency):
        raise UserError(fault)
    return headers


def check_headers(cases: Sequence[Case], task: Task, leniency: Leniency) -> list[Headers]:
    """The headers of all cases, read at the same time.

    Raises:
        UserError: some cases cannot be trained on; they are counted, and the first one's fault is told.
    """

    def check(case: Case) -> Headers | UserError:
        try:
            return checked_headers(case, task, leniency)
        except UserError as error:
            return error

    with ThreadPool(8) as pool:  # they wait for the disk more than they compute
        results = pool.map(check, cases)
    faults = [result for result in results if isinstance(result, UserError)]
    if len(faults) > 1:
        raise UserError(
            f"{len(faults)} of {len(cases)} cases cannot be used (search_dints.py --check lists them), for example "
            f"{faults[0]}"
        )
    for fault in faults:
        raise fault
    return results


def read_image(headers: Headers, leniency: Leniency) -> tuple[np.ndarray, int]:
    """The image's voxels (channels, x, y, z) as the files hold them, and how many of them were replaced.

    Raises:
        UserError: a file is damaged, or has voxels that are not finite.
    """
    files, replaced = [], 0
    for header in headers.images:
        voxels = read_voxels(header)
        if voxels.dtype.kind == "f":
            with np.errstate(over="ignore"):
                voxels = voxels.astype(np.float32, copy=False)
            bad = ~np.isfinite(voxels)
            count = int(bad.sum())
            if count and leniency.replace_nonfinite is None:
                raise UserError(
                    f"{header.path} has {count} NaN or infinite voxels: mend or remove the case, or give "
                    "--replace_nonfinite VALUE"
                )
            if count:
                voxels = np.where(bad, np.float32(leniency.replace_nonfinite), voxels)
                replaced += count
        files.append(voxels)
    return files[0] if len(files) == 1 else np.concatenate(files), replaced


def read_label(header: Header, task: Task) -> np.ndarray:
    """The label's voxels (x, y, z) as uint8; whole numbers in any type are accepted.

    Raises:
        UserError: the file is damaged, or holds a value that is not one of the task's labels.
    """
    (voxels,) = read_voxels(header)
    with np.errstate(invalid="ignore"):
        label = voxels.astype(np.uint8)
    wrong = (label != voxels) | (label >= task.num_classes)
    if wrong.any():
        values = np.unique(voxels[wrong])
        others = f" and {len(values) - 1} more" if len(values) > 1 else ""
        raise UserError(
            f"{header.path} holds the label {values[0]:g}{others} in {int(wrong.sum())} voxels; {task.name} has the "
            f"labels 0 to {task.num_classes - 1}: mend or remove the case, or the labels in dataset.json"
        )
    return label


def preprocess_image(voxels: np.ndarray, resampling: Resampling, task: Task) -> np.ndarray:
    """The image (channels, *grid), float32, as the network sees it."""
    return normalise(resampling.apply(voxels), task)


def normalise(image: np.ndarray, task: Task) -> np.ndarray:
    """Map the task's window to 0..1, clipped; without one, z-score the non-zero voxels of each channel. In place."""
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


def prepare(case: Case, task: Task, leniency: Leniency) -> Prepared:
    """Read, check and preprocess a case with a label.

    Raises:
        UserError: the case cannot be read or learned from.
    """
    headers = checked_headers(case, task, leniency)
    resampling = headers.resampling(task)
    voxels, replaced = read_image(headers, leniency)
    if replaced:
        log.warning("%s: %d NaN or infinite voxels become %g", case.name, replaced, leniency.replace_nonfinite)
    image = in_c_order(preprocess_image(voxels, resampling, task), torch.float16)
    del voxels
    label = in_c_order(resampling.apply(read_label(headers.label, task)[None], nearest=True), torch.uint8)[0]
    return Prepared(image, label, crop_masks(label, task.num_classes))
