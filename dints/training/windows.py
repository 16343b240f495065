"""Sliding windows: a network's class scores of a whole volume, at once or slab by slab."""

from __future__ import annotations

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
    """Return the axis along which slabs of a volume take least memory: the longest, whose planes are smallest."""
    return int(np.argmax(shape))


@dataclass(frozen=True)
class SlidingWindow:
    """Computes class scores of an image from overlapping patches, weighted by a Gaussian around each one's centre.

    Images smaller than a patch are padded by reflection, as in training; where an image is too small for that (less
    than a third of the patch), by its border voxels.
    """

    patch_size: tuple[int, int, int]
    overlap: float
    batch_size: int

    def __call__(self, image: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """Return (1, classes, *spatial) of an image (1, channels, *spatial)."""
        reflectable = all(
            (patch - size + 1) // 2 < size for patch, size in zip(self.patch_size, image.shape[2:], strict=True)
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
    def probabilities(self, image: np.ndarray, network: nn.Module, precision: Precision) -> np.ndarray:
        """Return class probabilities (classes, *spatial), float32, of an image (channels, *spatial), float32."""
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
        """Yield class scores, slab by slab along an axis; together they are those of the whole volume.

        Of all classes' scores only as many planes are kept as a patch has, in the machine's memory; on a GPU lies no
        more than a batch of windows. So memory grows with the area of a plane, and not with the volume.

        Args:
            image: (channels, *spatial), on the CPU, and nowhere smaller than a patch.

        Yields:
            a slab's first plane, and (classes, *slab), float32, on the CPU.
        """
        shape, patch = image.shape[1:], self.patch_size
        weights, kept = compute_importance_map(patch, mode="gaussian", sigma_scale=0.125), _Kept(shape, patch, axis)
        places = _places(shape, patch, self.overlap, axis)
        for number, (start, windows) in enumerate(places):
            for first in range(0, len(windows), self.batch_size):
                batch = windows[first : first + self.batch_size]
                patches = torch.stack([image[(slice(None), *place)] for place in batch]).to(precision.device)
                with precision.autocast():
                    scores = network(patches)
                for place, of_window in zip(batch, scores.float().cpu(), strict=True):
                    kept.add(place, of_window, weights)
                del patches, scores, of_window  # before the next ones are computed
            end = places[number + 1][0] if number + 1 < len(places) else shape[axis]
            for first in range(start, end, PLANES):
                yield first, kept.mean_scores(first, min(first + PLANES, end))
            kept.move_to(end)


class _Kept:
    """The planes to which windows still add, from ``start`` on, as many as a patch has."""

    def __init__(self, shape: Sequence[int], patch_size: Sequence[int], axis: int):
        self.axis, self.start = axis, 0
        self.shape = [size if other != axis else patch_size[axis] for other, size in enumerate(shape)]
        self.scores, self.counts = None, torch.zeros(self.shape)

    def add(self, place: Sequence[slice], scores: torch.Tensor, weights: torch.Tensor) -> None:
        if self.scores is None:
            self.scores = torch.zeros(len(scores), *self.shape)
        place = list(place)
        along = place[self.axis]
        place[self.axis] = slice(along.start - self.start, along.stop - self.start)
        self.scores[(slice(None), *place)] += scores * weights
        self.counts[tuple(place)] += weights

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
                target.copy_(values.select(axis, plane + count)) if plane + count < kept else target.zero_()
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
