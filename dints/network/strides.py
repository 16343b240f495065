"""Strides: the factor by which each depth of a network is smaller than the one before, per axis.

A network of D depths has D strides of 1 or 2 along X, Y and Z. The first leads from the image to
depth 0; all are 1 there unless the stem halves the image. MONAI's networks have 2s elsewhere.
`dints.data.fingerprint.halvings` plans others for anisotropic volumes.
"""

from __future__ import annotations

import numpy as np

Strides = tuple[tuple[int, int, int], ...]

WHOLE, HALF = (1, 1, 1), (2, 2, 2)


def isotropic(num_depths: int, use_downsample: bool = True) -> Strides:
    """Return the strides of MONAI's network."""
    return (HALF if use_downsample else WHOLE, *[HALF] * (num_depths - 1))


def halved_first(strides: Strides, use_downsample: bool) -> Strides:
    """Return the same halvings, with or without the stem's: one more at the bottom, or one less."""
    if (strides[0] != WHOLE) == use_downsample:
        return strides
    return (*strides[1:], strides[-1]) if use_downsample else (WHOLE, *strides[:-1])


def patch_step(strides: Strides) -> tuple[int, int, int]:
    """Return the voxels of which an image's size along each axis must be a multiple."""
    return tuple(int(step) for step in np.prod(strides, 0))


def reductions(strides: Strides) -> np.ndarray:
    """Return (depths, 3): how many times smaller each depth is than depth 0, along each axis."""
    return np.cumprod([WHOLE, *strides[1:]], 0)


def coarse_axes(strides: Strides, depth: int) -> tuple[int, ...]:
    """Return the axes that wait at a depth: not halved so far, nor next, where others are."""
    until_next = np.array(strides[: depth + 2]) == 1
    waits = until_next.all(0)
    is_last = depth + 1 >= len(strides)
    return () if is_last or waits.all() else tuple(np.flatnonzero(waits).tolist())
