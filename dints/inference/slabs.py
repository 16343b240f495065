"""Large volumes slab by slab: class scores are blended, decided and forgotten along one axis."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from dints.data.grid import Resampling
from dints.inference.decision import Decision, decided, joined
from dints.running.precision import Precision
from dints.training.windows import SlidingWindow, slab_axis

Slab = tuple[int, np.ndarray]  # its first plane; (classes, planes, *plane)


def fits(shape: Sequence[int], window: SlidingWindow, resampling: Resampling) -> bool:
    """Tell whether a volume can be done slab by slab: it needs neither padding nor shearing."""
    return window.fits(shape) and resampling.is_separable


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
    axis = slab_axis(image.shape[1:])
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


def probabilities(
    image: np.ndarray, network: nn.Module, window: SlidingWindow, precision: Precision, axis: int
) -> Iterator[Slab]:
    """Yield, slab by slab along an axis, the class probabilities of `SlidingWindow`.

    Args:
        image: (channels, *spatial), nowhere smaller than a patch.
    """
    for first, scores in window.slabs(torch.from_numpy(image), network, precision, axis):
        yield first, scores.softmax(0).cpu().numpy()
