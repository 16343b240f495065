"""From class probabilities to labels, and to the maps that people may want beside them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import xlogy

from dints.data.grid import Resampling

MAPS = ("probabilities", "uncertainty")
UNITS = 255  # of a map's voxel: what it holds for 1


@dataclass(frozen=True)
class Decision:
    """What was decided of a volume or a part of it.

    Attributes:
        labels: (x, y, z), uint8: the most probable class.
        probabilities: (classes, x, y, z), uint8, in 255ths; None unless it was wanted.
        uncertainty: (x, y, z), uint8, in 255ths: the entropy of the probabilities over that of
            classes which are all equally probable; None unless it was wanted.
    """

    labels: np.ndarray
    probabilities: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


def decided(
    classes: Iterable[np.ndarray], num_classes: int, maps: Collection[str] = ()
) -> Decision:
    """Decide a volume, or a part of it.

    Args:
        classes: probabilities (x, y, z) of one class after another: of a large CT, those of all
            take many GB.
        maps: which of `MAPS` are wanted.
    """
    labels = highest = entropy = None
    kept = []
    for value, probability in enumerate(classes):
        if labels is None:
            labels, highest = np.zeros(probability.shape, np.uint8), np.array(probability)
        else:
            labels[probability > highest] = value
            np.maximum(highest, probability, out=highest)
        if "probabilities" in maps:
            kept.append(_in_units(probability))
        if "uncertainty" in maps:
            term = xlogy(probability, probability)
            entropy = -term if entropy is None else entropy - term
    return Decision(
        labels,
        np.stack(kept) if kept else None,
        None if entropy is None else _in_units(entropy / math.log(num_classes)),
    )


def joined(parts: Sequence[Decision], axis: int, resampling: Resampling) -> Decision:
    """Join parts of a volume along an axis, and turn it back to the order of its file."""
    labels = np.concatenate([part.labels for part in parts], axis)
    probabilities = uncertainty = None
    if parts[0].probabilities is not None:
        turned = np.concatenate([part.probabilities for part in parts], 1 + axis)
        probabilities = np.stack([resampling.as_in_file(of_class) for of_class in turned])
    if parts[0].uncertainty is not None:
        uncertainty = resampling.as_in_file(
            np.concatenate([part.uncertainty for part in parts], axis)
        )
    return Decision(resampling.as_in_file(labels), probabilities, uncertainty)


def _in_units(values: np.ndarray) -> np.ndarray:
    return np.rint(values.clip(0, 1) * UNITS).astype(np.uint8)
