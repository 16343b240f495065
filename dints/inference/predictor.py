"""A trained network, or several, as a function of a volume."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dints.data import plausibility
from dints.data.cases import preprocess_image
from dints.data.flips import ALL
from dints.data.grid import Resampling
from dints.data.tasks import Task
from dints.errors import UserError
from dints.inference import slabs
from dints.inference.decision import Decision, decided
from dints.network.model_file import Model, load_model
from dints.running.machine import check_memory, choose_device
from dints.running.precision import choose_precision
from dints.running.processes import Processes
from dints.training.steps import compiled
from dints.training.windows import SlidingWindow

log = logging.getLogger(__name__)


class Predictor:
    """Segments one volume after another.

        predictor = Predictor("best_metric_model.pth")
        image = nibabel.load("scan.nii.gz")
        labels = predictor(image.get_fdata(), image.affine)

    Args:
        models: a model file of train_dints.py, or what `load_model` made of one; or several, as of
            the folds of a dataset, whose class probabilities are averaged.
        device: ``auto``, ``cuda`` or ``cpu``.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        overlap: of neighbouring windows, 0 to 1; None: as the model was validated.
        batch_size: windows per forward pass.
        mirrored: average also over all flips of the volume along the axes that the models were
            trained to flip, which takes 2, 4 or 8 times as long.
        compile: ``on``: through `torch.compile`, which takes minutes at the first volume.

    Attributes:
        axes: that volumes are flipped along.
        training_cases: names of those that any of the models was trained on.
        validation_cases: of those that one was validated on, and none trained.

    Raises:
        UserError: no model file, models of different tasks, none that was trained with flips, or
            what the device lacks, as memory for one window.
    """

    def __init__(
        self,
        models: str | Path | Model | Sequence[str | Path | Model],
        device: str = "auto",
        precision: str = "auto",
        overlap: float | None = None,
        batch_size: int = 6,
        mirrored: bool = False,
        compile: str = "off",
    ):
        models = [models] if isinstance(models, (str, Path, Model)) else models
        self.models = [model if isinstance(model, Model) else load_model(model) for model in models]
        first = self.models[0]
        self.task, self.ranges = first.task, first.info.get("ranges", {})
        _check_alike(self.models)
        device = choose_device(device)
        _check_memory(self.task, device)
        self.training_cases = _named(self.models, "training_cases")
        self.validation_cases = _named(self.models, "validation_cases") - self.training_cases
        self.axes = _axes_of(self.models) if mirrored else ()
        self.precision = choose_precision(precision, Processes(0, 1, device))
        overlap = first.info.get("overlap_ratio", 0.5) if overlap is None else overlap
        self.window = SlidingWindow(self.task.patch_size, overlap, batch_size)
        device = self.precision.device
        self.networks = [model.network.to(device).eval() for model in self.models]
        if compile == "on":
            self.networks = compiled_networks(self.networks, batch_size, device)

    def __call__(self, image: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Return the label of each voxel (x, y, z), uint8, of an image on its own grid.

        Class probabilities are resampled to that grid, not labels, so that borders stay smooth.

        Args:
            image: (x, y, z), or (channels, x, y, z), of any type of numbers; for CT in Hounsfield
                units.
            affine: (4, 4), voxel indices to mm, +x to the right, +y to the front, +z to the top, as
                nibabel has it.

        Raises:
            UserError: the image has other channels than the model, or voxels that are not finite.
        """
        return self.segment(lambda: image, affine, "the image").labels

    def segment(
        self,
        read: Callable[[], np.ndarray],
        affine: np.ndarray,
        name: str,
        maps: Collection[str] = (),
    ) -> Decision:
        """Segment an image that is read here, so that its memory is free while networks compute.

        Args:
            name: for messages.
            maps: ``probabilities`` or ``uncertainty``, where they are wanted too.
        """
        image, affine = np.asarray(read()), np.asarray(affine, np.float64)
        image = image[None] if image.ndim == 3 else image
        if image.ndim != 4 or len(image) != self.task.num_channels or affine.shape != (4, 4):
            raise UserError(
                f"{name} has shape {image.shape} and an affine of {affine.shape}: the model takes "
                f"(x, y, z) or ({self.task.num_channels}, x, y, z), and (4, 4)"
            )
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise UserError(f"{name} has NaN or infinite voxels: replace them")
        resampling = Resampling(image.shape[1:], affine, self.task.spacing)
        prepared = np.ascontiguousarray(preprocess_image(image, resampling, self.task))
        del image
        for remark in plausibility.unusual_intensities(prepared, self.ranges):
            log.warning("%s is unusual: %s", name, remark)
        if not self.axes and slabs.fits(resampling.shape, self.window, resampling):
            return slabs.segmented(
                prepared, self.networks, self.window, self.precision, resampling, maps
            )
        probabilities = self._probabilities(prepared)
        del prepared
        classes = (resampling.undo(of_class[None])[0] for of_class in probabilities)
        return decided(classes, len(probabilities), maps)

    def _probabilities(self, image: np.ndarray) -> np.ndarray:
        """Return the mean over networks and flips of probabilities (classes, *spatial), float32."""
        # The volume is flipped and not its windows, which would lie elsewhere in one that is
        # flipped to begin with.
        counts = range(len(self.axes) + 1)
        flips = [axes for count in counts for axes in combinations(self.axes, count)]
        total = None
        for network, axes in product(self.networks, flips):
            along = [1 + axis for axis in axes]
            flipped = np.ascontiguousarray(np.flip(image, along))
            probabilities = self.window.probabilities(flipped, network, self.precision)
            probabilities = np.flip(probabilities, along)
            total = probabilities if total is None else np.add(total, probabilities, out=total)
        total /= len(self.networks) * len(flips)
        return total


def compiled_networks(
    networks: Sequence[nn.Module], batch_size: int, device: torch.device
) -> list[nn.Module]:
    """Put networks through `torch.compile`, each for batches of one size.

    So each is compiled once: PyTorch does it eight times a function, and they share one `forward`.
    """
    torch._dynamo.config.recompile_limit += len(networks)
    return [FullBatches(compiled(network, "on", device), batch_size) for network in networks]


class FullBatches(nn.Module):
    """A network that sees batches of one size: smaller ones are filled up with zeros."""

    def __init__(self, network: nn.Module, batch_size: int):
        super().__init__()
        self.network, self.batch_size = network, batch_size

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        missing = windows.new_zeros(self.batch_size - len(windows), *windows.shape[1:])
        return self.network(torch.cat([windows, missing]))[: len(windows)]


def _check_alike(models: Sequence[Model]) -> None:
    """Raise `UserError` unless all models have the same classes, and prepare images alike."""
    first = models[0].task
    for number, model in enumerate(models[1:], start=2):
        for name in ("class_names", "num_channels", "spacing", "intensity", "patch_size"):
            value, expected = getattr(model.task, name), getattr(first, name)
            if value != expected:
                raise UserError(
                    f"model {number} has {name} {value}, and the first one {expected}: give models "
                    "of one task"
                )


def _check_memory(task: Task, device: torch.device) -> None:
    """Raise `UserError` where the device cannot hold a window: image, scores in 2 bytes and in 4.

    A volume has one at least, however small it is: it is padded to that.
    """
    needed = math.prod(task.patch_size) * (4 * task.num_channels + 6 * task.num_classes)
    size = " x ".join(map(str, task.patch_size))
    remedy = "use a machine with more of it, or a model trained with smaller patches (--patch_size)"
    check_memory(needed, f"the model's windows have {size} voxels, and one takes", remedy, device)


def _axes_of(models: Sequence[Model]) -> tuple[int, ...]:
    """Return the axes that all models were trained to flip; weights of MONAI's flip all."""
    chosen = [{*model.info.get("flips", {"axes": ALL})["axes"]} for model in models]
    axes = tuple(sorted(set.intersection(*chosen)))
    if not axes:
        raise UserError("the models were not trained with flips: leave --tta out")
    return axes


def _named(models: Sequence[Model], key: str) -> set[str]:
    return {name for model in models for name in model.info.get(key, [])}
