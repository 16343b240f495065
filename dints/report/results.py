"""A case of a batch: its scores, its volumes, remarks on it, and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dints.data import plausibility
from dints.data.cases import normalise, read_image, read_label
from dints.data.listing import Case
from dints.data.nifti import read_header
from dints.data.tasks import Task
from dints.evaluation.scores import NAN, Row, score_case
from dints.report.overlays import Overlay, overlay

TOLERANCE_MM = 1.0  # of the surface Dice, as of evaluate.py
WHISKERS = 1.5  # of a box plot, in quartile distances: volumes beyond are reported
LEAST_CASES = 8  # that a volume is compared with


@dataclass(frozen=True)
class Result:
    """The facts of a case that the page shows.

    Attributes:
        rows: its scores, a row a class; empty where there is no reference.
        volumes: ml of each foreground class, as segmented.
        remarks: what is unlike the training cases.
    """

    name: str
    rows: tuple[Row, ...]
    volumes: tuple[float, ...]
    remarks: tuple[str, ...]
    overlay: Overlay

    @property
    def dice(self) -> float:
        """Mean Dice of the classes that the reference has; NaN where there is none."""
        return _mean([row.dice for row in self.rows])

    @property
    def rank(self) -> float:
        """Its order among others: the mean with nnU-Net's Dice, 0 for false positives."""
        mean = _mean([row.dice_nnunet for row in self.rows])
        return 1.0 if math.isnan(mean) else mean


def look_at(case: Case, output: Path, task: Task, ranges: plausibility.Ranges) -> Result:
    """Read a case's image, its label if it has one, and its segmentation, and compare them.

    Args:
        output: the segmentation's file.
        ranges: of the training cases.

    Raises:
        UserError: a file is missing or damaged.
    """
    image, prediction, reference = _read(case, output, task)
    header, classes = case.headers[0], dict(enumerate(task.class_names[1:], start=1))
    rows, masks = [], (reference, prediction, header.spacing)
    if reference is not None:
        rows = score_case(case.name, *masks, classes, tolerance_mm=TOLERANCE_MM)
    counts = np.bincount(prediction.ravel("K"), minlength=task.num_classes)[1:]
    volumes = counts * math.prod(header.spacing) / 1000
    remarks = plausibility.unusual(case, ranges)
    # of the file's own voxels: resampling hardly changes their mean and spread
    if "intensity" in ranges:
        sampled = image[:, ::2, ::2, ::2].astype(np.float32)
        remarks += plausibility.unusual_intensities(normalise(sampled, task), ranges)
    picture = overlay(image, prediction, reference, header.affine, task)
    return Result(case.name, tuple(rows), tuple(volumes.tolist()), tuple(remarks), picture)


def picture_of(case: Case, output: Path, task: Task, most_planes: int) -> Overlay:
    """Return a case's picture of many planes; arguments and errors are those of `look_at`."""
    volumes = _read(case, output, task)
    return overlay(*volumes, case.headers[0].affine, task, most_planes)


def _read(case: Case, output: Path, task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return image (channels, x, y, z), segmentation and label (x, y, z)."""
    image, _ = read_image(case)
    prediction = read_label(read_header(str(output)), task)
    return image, prediction, None if case.label is None else read_label(case.label_header, task)


def unusual_volumes(volumes: np.ndarray, class_names: Sequence[str]) -> list[list[str]]:
    """Tell for each case which of its volumes is far from the others'.

    Args:
        volumes: (cases, classes), ml.
        class_names: of the foreground.
    """
    found = [[] for _ in volumes]
    if len(volumes) < LEAST_CASES:
        return found
    for name, of_class in zip(class_names, volumes.T, strict=True):
        low, high = np.percentile(of_class, (25, 75))
        margin = WHISKERS * (high - low)
        for number in np.flatnonzero((of_class < low - margin) | (of_class > high + margin)):
            found[number].append(
                f"{name} has {of_class[number]:.3g} ml, where half of these cases have {low:.3g} "
                f"to {high:.3g} ml"
            )
    return found


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else NAN
