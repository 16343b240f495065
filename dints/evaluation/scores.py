"""A case's scores: one row a class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dints.evaluation.lesions import compare_lesions
from dints.evaluation.surfaces import surface_distances

NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """Scores of a class in a case; NaN where a score is not defined.

    A class that the reference does not have is left out of every score but one; that it was
    predicted is counted as a false positive case. ``dice_nnunet`` is nnU-Net v2's Dice instead
    (``nnunetv2/evaluation/evaluate_predictions.py``, ``compute_metrics``): NaN where both masks are
    empty (``tp + fp + fn == 0``), which its ``nanmean`` over the cases leaves out, else 2 tp / (2
    tp + fp + fn), which is 0 for a false positive case and counts.

    Attributes:
        case, label: its name; its class's name.
        dice: Dice of the voxels.
        surface_dice: normalised surface Dice at the tolerance.
        hausdorff95_mm: 95% Hausdorff distance; infinite where the class was missed.
        reference_ml, prediction_ml: volumes.
        volume_error: the predicted volume's error, relative to the reference's; negative where too
            little is predicted.
        lesion_f1: F1 of its lesions, of which were ``lesions_detected``, ``lesions_missed`` and
            ``lesions_false``.
        false_positive: whether it was predicted where the reference does not have it.
    """

    case: str
    label: str
    dice: float
    dice_nnunet: float
    surface_dice: float
    hausdorff95_mm: float
    volume_error: float
    lesion_f1: float
    reference_ml: float
    prediction_ml: float
    lesions_detected: int
    lesions_missed: int
    lesions_false: int
    false_positive: bool


SCORES = ("dice", "dice_nnunet", "surface_dice", "hausdorff95_mm", "volume_error", "lesion_f1")


def score_case(
    case: str,
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    classes: Mapping[int, str],
    *,
    tolerance_mm: float = 1.0,
    lesion_iou: float = 0.0,
) -> list[Row]:
    """Score labels (x, y, z), uint8, of one grid, ``spacing`` in mm: a row for each class."""
    rows = []
    for label, name in classes.items():
        masks = _cropped(reference == label, prediction == label)
        rows.append(Row(case, name, **_scores(*masks, spacing, tolerance_mm, lesion_iou)))
    return rows


def _scores(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    tolerance_mm: float,
    lesion_iou: float,
) -> dict:
    in_reference, predicted = np.count_nonzero(reference), np.count_nonzero(prediction)
    common = np.count_nonzero(reference & prediction)
    voxel_ml = math.prod(spacing) / 1000
    lesions = compare_lesions(reference, prediction, lesion_iou)
    dice = 2 * common / (in_reference + predicted) if in_reference or predicted else NAN
    scores = {
        "dice": NAN,
        "dice_nnunet": dice,
        "surface_dice": NAN,
        "hausdorff95_mm": NAN,
        "volume_error": NAN,
        "lesion_f1": NAN,
        "reference_ml": in_reference * voxel_ml,
        "prediction_ml": predicted * voxel_ml,
        "lesions_detected": lesions.detected,
        "lesions_missed": lesions.missed,
        "lesions_false": lesions.false,
        "false_positive": bool(predicted and not in_reference),
    }
    if in_reference:
        distances = surface_distances(reference, prediction, spacing)
        scores |= {
            "dice": dice,
            "surface_dice": distances.surface_dice(tolerance_mm),
            "hausdorff95_mm": distances.hausdorff(95),
            "volume_error": (predicted - in_reference) / in_reference,
            "lesion_f1": lesions.f1,
        }
    return scores


def _cropped(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut two masks to the box that holds both, in C order; an empty one is left where both are."""
    either, box = reference | prediction, []
    for axis in range(3):
        held = np.flatnonzero(either.any(tuple({0, 1, 2} - {axis})))
        box.append(slice(held[0], held[-1] + 1) if len(held) else slice(0, 0))
    return np.ascontiguousarray(reference[tuple(box)]), np.ascontiguousarray(prediction[tuple(box)])
