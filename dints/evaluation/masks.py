"""Two folders of masks: pairs of files, and all checks of them before anything is scored."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dints.data.listing import ENDING
from dints.data.nifti import Header, read_header, read_voxels
from dints.data.tasks import MAX_CLASSES
from dints.errors import UserError

log = logging.getLogger(__name__)

AFFINE_TOLERANCE = 1e-3  # of an affine's entries, as of a label and its image


@dataclass(frozen=True)
class Pair:
    """A case's reference, and its prediction if there is one.

    Attributes:
        trust_shapes: believe that a reference of the prediction's shape has its place, whatever its
            header says.
    """

    name: str
    reference: Path
    prediction: Path | None
    trust_shapes: bool = False

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return labels (x, y, z) of reference and prediction, uint8, and the spacing (3,) in mm.

        A missing prediction is empty.

        Raises:
            UserError: a file is damaged, no mask, or not on the reference's grid.
        """
        header = read_header(str(self.reference))
        reference = _read_mask(header)
        if self.prediction is None:
            return reference, np.zeros_like(reference), header.spacing
        other = read_header(str(self.prediction))
        if other.shape != header.shape:
            raise UserError(
                f"{self.prediction} has {_voxels(other)} voxels and {self.reference} "
                f"{_voxels(header)}: resample it to the reference's grid"
            )
        difference = np.abs(other.affine - header.affine).max()
        if difference > AFFINE_TOLERANCE and not self.trust_shapes:
            raise UserError(
                f"{self.prediction} has another affine than {self.reference} (an entry differs by "
                f"{difference:.4g}): resample it to the reference's grid, or correct its header"
            )
        return reference, _read_mask(other), (other if self.trust_shapes else header).spacing


def pair_files(
    prediction: Path, reference: Path, *, allow_missing: bool = False, predicted_only: bool = False
) -> list[Pair]:
    """Find the cases of two folders: files of one name, up to the ending, .nii or .nii.gz.

    Args:
        allow_missing: keep a reference without a prediction, as a case without one.
        predicted_only: leave such a reference out.

    Raises:
        UserError: a folder is none or has no masks; a name is there twice; a prediction has no
            reference; or a prediction is missing.
    """
    predictions = _named_files(prediction, "--prediction")
    references = _named_files(reference, "--reference")
    extra = [predictions[name].name for name in predictions if name not in references]
    if extra:
        raise UserError(
            f"--prediction {prediction} has {len(extra)} masks without a reference of that name in "
            f"{reference}, for example {extra[0]}: remove them, or give their references"
        )
    missing = [references[name].name for name in references if name not in predictions]
    if missing and not allow_missing and not predicted_only:
        raise UserError(
            f"--prediction {prediction} lacks {len(missing)} of the {len(references)} cases of "
            f"{reference}, for example {missing[0]}: add them, let them count as empty with "
            "--allow_missing, or leave them out with --predicted_only"
        )
    if missing and predicted_only:
        counts = len(missing), len(references)
        log.info("%d of %d references have no prediction and are left out", *counts)
    names = [name for name in references if name in predictions or allow_missing]
    return [Pair(name, references[name], predictions.get(name)) for name in names]


def _named_files(folder: Path, flag: str) -> dict[str, Path]:
    """List the masks of a folder by name without ending, sorted; hidden files are no masks."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"{flag} {folder} cannot be listed ({error.strerror}): give a folder of masks"
        ) from error
    named: dict[str, Path] = {}
    for path in found:
        if path.name.startswith(".") or not ENDING.search(path.name):
            continue
        name = ENDING.sub("", path.name)
        if name in named:
            raise UserError(
                f"{flag} {folder} has both {named[name].name} and {path.name}: remove one"
            )
        named[name] = path
    if not named:
        raise UserError(f"{flag} {folder} has no .nii or .nii.gz file: give a folder of masks")
    return named


def _read_mask(header: Header) -> np.ndarray:
    """Return the labels of a file (x, y, z), uint8."""
    if header.num_channels != 1:
        raise UserError(
            f"{header.path} has {header.num_channels} volumes ({_voxels(header)} voxels each): "
            "give masks of one, 3D"
        )
    (voxels,) = read_voxels(header)
    low, high = voxels.min(), voxels.max()
    if not (low >= 0 and high < MAX_CLASSES):  # so that NaN is refused too
        raise UserError(
            f"{header.path} has values from {low} to {high}, where labels are 0 to "
            f"{MAX_CLASSES - 1}: give masks, not images"
        )
    labels = voxels.astype(np.uint8)
    if voxels.dtype.kind == "f" and (wrong := voxels[labels != voxels]).size:
        raise UserError(
            f"{header.path} has the value {wrong[0]!s}, which is no integer label: give masks, not "
            "probabilities, and resample them to the nearest neighbour"
        )
    return labels


def _voxels(header: Header) -> str:
    return " x ".join(map(str, header.shape))


def labels_in(mask: np.ndarray) -> set[int]:
    """Return the foreground labels that occur in a mask."""
    return set(np.flatnonzero(np.bincount(mask.ravel("K"))).tolist()) - {0}


def classes_of(
    pairs: Sequence[Pair], found: Sequence[tuple[set[int], set[int]]], names: Sequence[str] | None
) -> dict:
    """Return the name of each foreground class by its label.

    Args:
        found: the labels in reference and prediction of each pair.
        names: of the labels 0, 1, 2, ...; None: those that occur in the references are the classes.

    Raises:
        UserError: a mask has a label that is no class, or there is no class.
    """
    if names is None:
        labels = set().union(*(reference for reference, _ in found))
        classes = {label: str(label) for label in sorted(labels)}
        known = f"references have {', '.join(classes.values())}"
    else:
        classes = {label: name for label, name in enumerate(names) if label}
        known = f"--labels has 1 to {len(classes)}"
    if not classes:
        raise UserError(f"no reference beside {pairs[0].reference} has any label: give --labels")
    for pair, (reference, prediction) in zip(pairs, found, strict=True):
        for path, labels in ((pair.reference, reference), (pair.prediction, prediction)):
            if unknown := sorted(labels - classes.keys()):
                raise UserError(
                    f"{path} has the label {unknown[0]}, and {known}: correct it, or name all "
                    "classes with --labels"
                )
    return classes
