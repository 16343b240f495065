"""Makes architectures for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dints.network.architecture import Architecture, from_codes, paths
from dints.network.operations import PUBLISHED

# As large as the published network (96x96x96 voxels, 1 channel, 2 classes): 152.36 M parameters,
# every stem used, and 334.4 GMAC. It is NOT the published architecture, which we do not have: a
# random connected one, with operations exchanged until both numbers fitted. A row per block, a
# character per path: its operation, or none.
STAND_IN = """
    .21.1141.1
    201.0.4..1
    14.11.001.
    344.041011
    13.4.2.031
    04042..21.
    312313321.
    0.41313011
    2423.2.41.
    1002.3241.
    1433...031
    4..0101.11
"""


def stand_in() -> Architecture:
    """Return an architecture that costs what the published one does."""
    codes = np.array([list(row) for row in STAND_IN.split()])
    return connected((codes != ".").astype(int), np.where(codes == ".", "0", codes).astype(int))


def random_architecture(
    seed: int,
    num_blocks: int,
    num_depths: int,
    info: dict | None = None,
    operations: Sequence[str] = PUBLISHED,
) -> Architecture:
    """Make blocks of random paths, each leaving from the nodes that the one before reached."""
    rng = np.random.default_rng(seed)
    sources, targets = np.array(paths(num_depths)).T
    reached = rng.choice(num_depths, rng.integers(1, num_depths + 1), replace=False)
    arch_code_a = np.zeros((num_blocks, len(sources)), dtype=int)
    for block in arch_code_a:
        for depth in np.unique(reached):
            leaving = np.flatnonzero(sources == depth)
            block[rng.choice(leaving, rng.integers(1, len(leaving) + 1), replace=False)] = 1
        reached = targets[block == 1]
    return connected(
        arch_code_a, rng.integers(0, len(operations), arch_code_a.shape), info, operations
    )


def everything(
    num_blocks: int, num_depths: int, operations: Sequence[str] = PUBLISHED
) -> Architecture:
    """Make every path active, with the operations in turn."""
    shape = (num_blocks, 3 * num_depths - 2)
    codes = np.arange(np.prod(shape)).reshape(shape) % len(operations)
    return connected(np.ones(shape, dtype=int), codes, operations=operations)


def chain(*depths: int, num_depths: int, operation: int = 1) -> Architecture:
    """Make one path per block, through nodes at these depths."""
    arch_code_a = [
        [ends == step for ends in paths(num_depths)]
        for step in zip(depths, depths[1:], strict=False)
    ]
    return connected(np.array(arch_code_a), np.full(np.shape(arch_code_a), operation))


def connected(
    arch_code_a: np.ndarray,
    arch_code_c: np.ndarray,
    info: dict | None = None,
    operations: Sequence[str] = PUBLISHED,
) -> Architecture:
    """Make the architecture of these paths and operations, with the nodes that the paths use."""
    return from_codes(np.asarray(arch_code_a), np.asarray(arch_code_c), operations, info=info)
