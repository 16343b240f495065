"""Large volumes slab by slab: class scores are blended, decided and forgotten along one axis of the volume.

Of all classes' scores only as many planes are kept as a patch has, in the machine's memory; on a GPU lies no more than
a batch of windows. So memory grows with the area of a plane, and not with the volume.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import nn

from dints.data.grid import Resampling
from dints.inference.decision import Decision, decided, joined
from dints.running.precision import Precision
from dints.training.validation import SlidingWindow

PLANES = 8  # that are decided at a time
Slab = tuple[int, np.ndarray]  # its first plane; (classes, planes, *plane)


def fits(shape: Sequence[int], patch_size: Sequence[int], resampling: Resampling) -> bool:
    """Tell whether a volume can be done slab by slab: one that needs no padding, nor shearing on the way back."""
    return all(size >= patch for size, patch in zip(shape, patch_size, strict=True)) and resampling.is_separable


def segmented(
    image: np.ndarray,
    networks: Sequence[nn.Module],
    window: SlidingWindow,
    precision: Precision,
    resampling: Resampling,
    maps: Collection[str] = (),
) -> Decision:
    """Decide each voxel of the file that ``resampling`` starts from.

    Args:
        image: (channels, *spatial), on the grid that it leads to.
        maps: as for `decided`.
    """
    axis = int(np.argmax(image.shape[1:]))  # along the longest, planes are smallest
    streams = [probabilities(image, network, window, precision, axis) for network in networks]
    undone = resampling.undone_by_slabs(_means(streams), axis)
    return joined([decided(slab, len(slab), maps) for slab in undone], axis, resampling)


def _means(streams: Sequence[Iterator[Slab]]) -> Iterator[Slab]:
    """Average the slabs of several networks, which have the same places."""
    for slabs in zip(*streams, strict=True):
        start, total = slabs[0]
        for _, probs in slabs[1:]:
            total += probs
        total /= len(slabs)
        yield start, total


@torch.no_grad()
def probabilities(
    image: np.ndarray, network: nn.Module, window: SlidingWindow, precision: Precision, axis: int
) -> Iterator[Slab]:
    """Yield class probabilities, slab by slab along an axis; together they are those of `SlidingWindow.probabilities`.

    Args:
        image: (channels, *spatial), nowhere smaller than a patch.
    """
    shape, patch = image.shape[1:], window.patch_size
    weights = compute_importance_map(patch, mode="gaussian", sigma_scale=0.125)
    source, kept = torch.from_numpy(image), None
    places = _places(shape, patch, window.overlap, axis)
    for number, (start, windows) in enumerate(places):
        if kept is None:
            kept = _Kept(shape, patch, axis)
        for first in range(0, len(windows), window.batch_size):
            batch = windows[first : first + window.batch_size]
            patches = torch.stack([source[(slice(None), *place)] for place in batch]).to(precision.device)
            with precision.autocast():
                scores = network(patches)
            for place, of_window in zip(batch, scores.float().cpu(), strict=True):
                kept.add(place, of_window, weights)
            del patches, scores, of_window  # before the next ones are computed
        end = places[number + 1][0] if number + 1 < len(places) else shape[axis]
        for first in range(start, end, PLANES):
            yield first, kept.probabilities(first, min(first + PLANES, end))
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

    def probabilities(self, first: int, end: int) -> np.ndarray:
        """Return those of planes to which no more windows will add."""
        counts = self.counts.narrow(self.axis, first - self.start, end - first)
        scores = self.scores.narrow(1 + self.axis, first - self.start, end - first)
        return (scores / counts).softmax(0).numpy()

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
