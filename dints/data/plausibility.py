"""Whether a volume to segment is like those that a model was trained on.

A header in metres, a lost affine or HU that are shifted by 1024 give a segmentation too, and a
wrong one. Ranges of the training cases are kept in the model file; a volume far outside of them is
reported in one line, and segmented.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dints.data.cases import Prepared
from dints.data.listing import Case
from dints.data.nifti import Header
from dints.data.tasks import Task

AXES = "right-left", "back-front", "bottom-top"
TIMES_OUTSIDE = 2.0  # voxel sizes and extents may be so many times beyond the training cases'
# Intensities may be so many times the width of the training cases' range beyond it
SPREADS_OUTSIDE = 1.5
LEAST_SPREAD = 0.1  # of normalised intensities, where training cases hardly differ
CASES = 16  # of a rank, that intensities are measured on: without a cache each is prepared for it
Ranges = Mapping[str, Sequence]


def sizes(header: Header) -> tuple[np.ndarray, np.ndarray]:
    """Return mm between voxels, and mm of the volume, along the axes of the body (`AXES`)."""
    # Of space, for each axis of the file
    axes = np.abs(header.affine[:3, :3] / header.spacing).argmax(0)
    if len({*axes.tolist()}) < 3:  # oblique by more than 45 degrees, so that two point the same way
        axes = np.arange(3)
    order = axes.argsort()
    return header.spacing[order], (header.spacing * header.shape)[order]


def ranges_of(cases: Sequence[Case], prepared: Sequence[Prepared], task: Task) -> dict[str, list]:
    """Measure the ranges of training cases: plain values, for a model file.

    Args:
        prepared: some of them, for intensities; only CT has comparable ones.
    """
    spacing, extent = zip(*(sizes(case.headers[0]) for case in cases), strict=True)
    found = {"spacing": _range(np.array(spacing)), "extent": _range(np.array(extent))}
    if task.intensity is not None:
        chosen = range(0, len(prepared), -(-len(prepared) // CASES))
        measured = [intensities(prepared[number].image) for number in chosen]
        found["intensity"] = _range(np.array(measured))
    return found


def joined(ranges: Sequence[Ranges]) -> dict[str, list]:
    """Join the ranges that several ranks measured."""
    return {
        key: _range(np.concatenate([np.array(one[key]).reshape(2, -1) for one in ranges]))
        for key in dict(ranges[0])
    }


def intensities(image: np.ndarray) -> np.ndarray:
    """Return mean and standard deviation of a CT volume (channels, x, y, z) in its window."""
    image = np.asarray(image[:, ::2, ::2, ::2], np.float32)
    return np.array([image.mean(), image.std()])


def unusual(case: Case, ranges: Ranges) -> list[str]:
    """List facts of a case's header that are unlike the training cases."""
    header, found = case.headers[0], []
    if int(header.nifti["sform_code"]) == int(header.nifti["qform_code"]) == 0:
        found.append(
            "its header does not say where it lies (no sform or qform): right and left may be "
            "exchanged"
        )
    for key, values in zip(("spacing", "extent"), sizes(header), strict=True):
        low, high = np.array(ranges[key]) if key in ranges else (np.zeros(3), np.full(3, np.inf))
        what = {"spacing": "mm between voxels", "extent": "mm"}[key]
        for axis, value, least, most in zip(AXES, values, low, high, strict=True):
            if not least / TIMES_OUTSIDE <= value <= most * TIMES_OUTSIDE:
                found.append(
                    f"{value:.4g} {what} {axis}, where training cases have {least:.4g} to "
                    f"{most:.4g}"
                )
    return found


def unusual_intensities(image: np.ndarray, ranges: Ranges) -> list[str]:
    """List facts of a preprocessed image that are unlike the training cases; of CT alone."""
    if "intensity" not in ranges:
        return []
    found, names = [], ("mean", "spread")
    for what, value, low, high in zip(names, intensities(image), *ranges["intensity"], strict=True):
        margin = SPREADS_OUTSIDE * max(high - low, LEAST_SPREAD)
        if not low - margin <= value <= high + margin:
            found.append(
                f"the {what} of its intensities in the window is {value:.2f}, where training cases "
                f"have {low:.2f} to {high:.2f}: are they in Hounsfield units?"
            )
    return found


def _range(values: np.ndarray) -> list[list[float]]:
    """Return smallest and largest of each column, rounded, as plain values."""
    return [[float(f"{value:.6g}") for value in row] for row in (values.min(0), values.max(0))]
