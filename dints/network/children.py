"""The children of a block, the patterns between which they lead, and the sizes of feature maps: plain NumPy.

`dints.network.space` gives a probability to each child, `dints.network.unsearched` draws them without a search. Here is
what both have in common, so that the second need not build a supernet to know the sizes of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np


def switchings(count: int, first_on: bool = False) -> list[tuple[int, ...]]:
    """List the ways to switch ``count`` nodes or paths on and off, without that of all off, in MONAI's order.

    Args:
        first_on: only those with the first one on.
    """
    ways = list(product((0, 1), repeat=count))[1:]
    return [way for way in ways if way[0] == 1] if first_on else ways


def patterns(children: np.ndarray, path_depths: np.ndarray, num_depths: int) -> np.ndarray:
    """Return for each child the index, in ``switchings(num_depths)``, of the nodes at that end of its active paths.

    Args:
        children: (children, paths).
        path_depths: (paths,), the depth of each path's node at that end.
    """
    touched = np.stack([children[:, path_depths == depth].any(-1) for depth in range(num_depths)], -1)
    return touched @ (2 ** np.arange(num_depths)[::-1]) - 1


def depth_sizes(channels: Sequence[int]) -> list[float]:
    """Return how large the depths' feature maps are, relative to each other: each depth halves three axes."""
    return [count / 8**depth for depth, count in enumerate(channels)]
