"""Lesions, the connected parts of a mask, found and missed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

# voxels that share a face, an edge or a corner are one lesion's
TOUCHING = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class Lesions:
    """Lesions of a case and class.

    Attributes:
        detected, missed: of the reference.
        false: of the prediction, that are none of the reference's.
    """

    detected: int
    missed: int
    false: int

    @property
    def f1(self) -> float:
        """F1 = 2 detected / (2 detected + missed + false); NaN where there are none."""
        count = 2 * self.detected + self.missed + self.false
        return 2 * self.detected / count if count else float("nan")


def compare_lesions(reference: np.ndarray, prediction: np.ndarray, min_iou: float = 0.0) -> Lesions:
    """Count lesions, components of 26 neighbours, of two bool masks of one shape (x, y, z).

    Two lesions match if they have a voxel in common and their intersection over union is at least
    ``min_iou``. With 0 a lesion is detected by any voxel, which is the rule of the ATLAS, ISLES
    2022 and WMH challenges; one predicted blob then detects all that it covers. 0.1 is usual where
    detection is judged in 3D (nnDetection). Above 0.5 a lesion matches one at most.
    """
    reference_parts, num_reference = ndimage.label(reference, TOUCHING)
    predicted_parts, num_predicted = ndimage.label(prediction, TOUCHING)
    common = reference & prediction
    pairs = reference_parts[common].astype(np.int64) * (num_predicted + 1) + predicted_parts[common]
    pairs, overlaps = np.unique(pairs, return_counts=True)
    of_reference, of_prediction = np.divmod(pairs, num_predicted + 1)
    sizes = (
        np.bincount(reference_parts.ravel())[of_reference]
        + np.bincount(predicted_parts.ravel())[of_prediction]
    )
    matched = overlaps >= min_iou * (sizes - overlaps)
    detected = len(np.unique(of_reference[matched]))
    matching = len(np.unique(of_prediction[matched]))
    return Lesions(detected, num_reference - detected, num_predicted - matching)
