"""Sliding windows: a network's class scores of a whole volume, at once or slab by slab."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference
from torch import nn

from dints.running.precision import Precision

PLANES = 8  # that are decided at a time


def slab_axis(shape: Sequence[int]) -> int:
    """Return the axis along which slabs of a volume take least memory: the longest, whose planes
    are smallest.
    """
    return int(np.argmax(shape))


@dataclass(frozen=True)
class SlidingWindow:
    """Computes class scores of an image from overlapping patches, weighted by a Gaussian around
    each one's centre.

    Images smaller than a patch are padded by reflection, as in training; where an image is too
    small for that (less than a third of the patch), by its border voxels.
    """

    patch_size: tuple[int, int, int]
    overlap: float
    batch_size: int

    def __call__(self, image: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """Return (1, classes, *spatial) of an image (1, channels, *spatial)."""
        reflectable = all(
            (patch - size + 1) // 2 < size
            for patch, size in zip(self.patch_size, image.shape[2:], strict=True)
        )
        return sliding_window_inference(
            image,
            self.patch_size,
            self.batch_size,
            network,
            overlap=self.overlap,
            mode="gaussian",
            padding_mode="reflect" if reflectable else "replicate",
        )

    @torch.no_grad()
    def probabilities(
        self, image: np.ndarray, network: nn.Module, precision: Precision
    ) -> np.ndarray:
        """Return class probabilities (classes, *spatial), float32, of an image (channels,
        *spatial), float32.
        """
        with precision.autocast():
            scores = self(torch.from_numpy(image[None]).to(precision.device), network)[0]
        return scores.float().softmax(0).cpu().numpy()

    def fits(self, shape: Sequence[int]) -> bool:
        """Tell whether a volume can be done slab by slab: one that needs no padding."""
        return all(size >= patch for size, patch in zip(shape, self.patch_size, strict=True))

    @torch.no_grad()
    def slabs(
        self, image: torch.Tensor, network: nn.Module, precision: Precision, axis: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield class scores, slab by slab along an axis; together they are those of the whole
        volume.

        Of all classes' scores only as many planes are kept as a patch has, on the GPU where they
        fit, so that it does not wait for a CPU to add them up. So memory grows with the area of a
        plane, and not with the volume.

        Args:
            image: (channels, *spatial), on the CPU, and nowhere smaller than a patch.

        Yields:
            a slab's first plane, and (classes, *slab), float32, where they were added up.
        """
        shape, patch = image.shape[1:], self.patch_size
        kept = _Kept(shape, patch, axis)
        places = _places(shape, patch, self.overlap, axis)
        for number, (start, windows) in enumerate(places):
            for first in range(0, len(windows), self.batch_size):
                batch = windows[first : first + self.batch_size]
                patches = torch.stack([image[(slice(None), *place)] for place in batch]).to(
                    precision.device
                )
                with precision.autocast():
                    scores = network(patches)
                kept.add(batch, scores.float())
                del patches, scores  # before the next ones are computed
            end = places[number + 1][0] if number + 1 < len(places) else shape[axis]
            for first in range(start, end, PLANES):
                yield first, kept.mean_scores(first, min(first + PLANES, end))
            kept.move_to(end)


def place_of_sums(num_bytes: int, device: torch.device) -> torch.device:
    """Return where scores of so many bytes are added up: on the device that computes them, or on
    the CPU.

    A GPU must have twice as much free beside what PyTorch holds, which is what the network's passes
    take. So it is to be asked after the first pass, as large as any that follow.
    """
    if device.type == "cuda" and 2 * num_bytes > torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


class _Kept:
    """The planes to which windows still add, from ``start`` on, as many as a patch has."""

    def __init__(self, shape: Sequence[int], patch_size: Sequence[int], axis: int):
        self.axis, self.start = axis, 0
        self.shape = [
            size if other != axis else patch_size[axis] for other, size in enumerate(shape)
        ]
        self.weights = compute_importance_map(patch_size, mode="gaussian", sigma_scale=0.125)
        self.scores = self.counts = None

    def add(self, places: Sequence[Sequence[slice]], scores: torch.Tensor) -> None:
        """Add the scores (windows, classes, *patch) of windows, on the device that computed
        them.
        """
        if self.scores is None:
            count = scores.shape[1]
            device = place_of_sums(
                (count + 1) * math.prod(self.shape) * scores.element_size(), scores.device
            )
            self.scores = torch.zeros(count, *self.shape, device=device)
            self.counts, self.weights = (
                torch.zeros(self.shape, device=device),
                self.weights.to(device),
            )
        for place, of_window in zip(places, scores.to(self.scores.device), strict=True):
            place = list(place)
            along = place[self.axis]
            place[self.axis] = slice(along.start - self.start, along.stop - self.start)
            self.scores[(slice(None), *place)] += of_window * self.weights
            self.counts[tuple(place)] += self.weights

    def mean_scores(self, first: int, end: int) -> torch.Tensor:
        """Return those of planes to which no more windows will add."""
        counts = self.counts.narrow(self.axis, first - self.start, end - first)
        scores = self.scores.narrow(1 + self.axis, first - self.start, end - first)
        return scores / counts

    def move_to(self, start: int) -> None:
        """Forget the planes before ``start``."""
        count, kept = start - self.start, self.counts.shape[self.axis]
        for values, axis in ((self.scores, 1 + self.axis), (self.counts, self.axis)):
            for plane in range(kept):  # one after another, so that no second copy of all is needed
                target = values.select(axis, plane)
                target.copy_(
                    values.select(axis, plane + count)
                ) if plane + count < kept else target.zero_()
        self.start = start


def _places(
    shape: Sequence[int], patch_size: Sequence[int], overlap: float, axis: int
) -> list[tuple[int, list[tuple[slice, ...]]]]:
    """List the windows of a volume, MONAI's, by where they begin along an axis, in its order."""
    steps = [
        size if patch == size else max(int(patch * (1 - overlap)), 1)
        for patch, size in zip(patch_size, shape, strict=True)
    ]
    by_start: dict[int, list[tuple[slice, ...]]] = {}
    for place in dense_patch_slices(shape, patch_size, steps):
        by_start.setdefault(place[axis].start, []).append(place)
    return sorted(by_start.items())
