"""A trained network as a function of a volume."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dints.data import plausibility
from dints.data.cases import preprocess_image
from dints.data.grid import Resampling
from dints.errors import UserError
from dints.network.model_file import Model, load_model
from dints.running.machine import choose_device
from dints.running.precision import choose_precision
from dints.running.processes import Processes
from dints.training.steps import compiled
from dints.training.validation import SlidingWindow

log = logging.getLogger(__name__)


class Predictor:
    """Segments one volume after another.

        predictor = Predictor("best_metric_model.pth")
        image = nibabel.load("scan.nii.gz")
        labels = predictor(image.get_fdata(), image.affine)

    Args:
        model: a model file of train_dints.py, or what `load_model` made of one.
        device: ``auto``, ``cuda`` or ``cpu``.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        overlap: of neighbouring windows, 0 to 1; None: as the model was validated.
        batch_size: windows per forward pass.
        compile: ``on``: through `torch.compile`, which takes minutes at the first volume.

    Raises:
        UserError: no model file, or what the device lacks.
    """

    def __init__(
        self,
        model: str | Path | Model,
        device: str = "auto",
        precision: str = "auto",
        overlap: float | None = None,
        batch_size: int = 6,
        compile: str = "off",
    ):
        self.model = model if isinstance(model, Model) else load_model(model)
        self.task, self.ranges = self.model.task, self.model.info.get("ranges", {})
        self.precision = choose_precision(precision, Processes(0, 1, choose_device(device)))
        overlap = self.model.info.get("overlap_ratio", 0.5) if overlap is None else overlap
        self.window = SlidingWindow(self.task.patch_size, overlap, batch_size)
        self.model.network.to(self.precision.device).eval()
        self.network = compiled(self.model.network, compile, self.precision.device)

    def __call__(self, image: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Return the label of each voxel (x, y, z), uint8, of an image on its own grid.

        Class probabilities are resampled to that grid, not labels, so that borders stay smooth.

        Args:
            image: (x, y, z), or (channels, x, y, z), of any type of numbers; for CT in Hounsfield units.
            affine: (4, 4), voxel indices to mm, +x to the right, +y to the front, +z to the top, as nibabel has it.

        Raises:
            UserError: the image has other channels than the model, or voxels that are not finite.
        """
        return self.segment(lambda: image, affine, "the image")

    def segment(self, read: Callable[[], np.ndarray], affine: np.ndarray, name: str) -> np.ndarray:
        """Do the same with an image that is read here, so that its memory is free again before the network computes.

        Args:
            name: for messages.
        """
        image, affine = np.asarray(read()), np.asarray(affine, np.float64)
        image = image[None] if image.ndim == 3 else image
        if image.ndim != 4 or len(image) != self.task.num_channels or affine.shape != (4, 4):
            raise UserError(
                f"{name} has shape {image.shape} and an affine of {affine.shape}: the model takes (x, y, z) or "
                f"({self.task.num_channels}, x, y, z), and (4, 4)"
            )
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise UserError(f"{name} has NaN or infinite voxels: replace them")
        resampling = Resampling(image.shape[1:], affine, self.task.spacing)
        prepared = np.ascontiguousarray(preprocess_image(image, resampling, self.task))
        del image
        for doubt in plausibility.doubts_of_intensities(prepared, self.ranges):
            log.warning("%s is unusual: %s", name, doubt)
        probabilities = self.window.probabilities(prepared, self.network, self.precision)
        del prepared
        return most_probable(probabilities, resampling)


def most_probable(probabilities: np.ndarray, resampling: Resampling) -> np.ndarray:
    """Return the most probable class of each voxel of the file that ``resampling`` starts from.

    Args:
        probabilities: (classes, *spatial), on the grid that it leads to.
    """
    highest = np.array(resampling.undo(probabilities[:1])[0])
    labels = np.zeros(highest.shape, np.uint8)
    for value in range(1, len(probabilities)):  # one class at a time: on a large CT each takes a GB
        probability = resampling.undo(probabilities[value : value + 1])[0]
        labels[probability > highest] = value
        np.maximum(highest, probability, out=highest)
    return labels
