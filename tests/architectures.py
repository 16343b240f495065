"""Tests make architectures with these."""

from __future__ import annotations

import numpy as np

from dints.network.architecture import Architecture, paths


def random_architecture(seed: int, num_blocks: int, num_depths: int, info: dict | None = None) -> Architecture:
    """Blocks of random paths, each leaving from exactly the nodes that the block before reached."""
    rng = np.random.default_rng(seed)
    sources, targets = np.array(paths(num_depths)).T
    reached = rng.choice(num_depths, rng.integers(1, num_depths + 1), replace=False)
    arch_code_a = np.zeros((num_blocks, len(sources)), dtype=int)
    for block in arch_code_a:
        for depth in np.unique(reached):
            leaving = np.flatnonzero(sources == depth)
            block[rng.choice(leaving, rng.integers(1, len(leaving) + 1), replace=False)] = 1
        reached = targets[block == 1]
    return connected(arch_code_a, rng.integers(0, 5, arch_code_a.shape), info)


def chain(*depths: int, num_depths: int, operation: int = 1) -> Architecture:
    """One path per block, through nodes at these depths."""
    arch_code_a = [[ends == step for ends in paths(num_depths)] for step in zip(depths, depths[1:], strict=False)]
    return connected(np.array(arch_code_a), np.full(np.shape(arch_code_a), operation))


def connected(arch_code_a: np.ndarray, arch_code_c: np.ndarray, info: dict | None = None) -> Architecture:
    """The architecture of these paths and operations, with the nodes that the paths use."""
    num_blocks, num_depths = len(arch_code_a), (arch_code_a.shape[1] + 2) // 3
    node_a = np.zeros((num_blocks + 1, num_depths), dtype=int)
    for block, path in np.argwhere(arch_code_a):
        source, target = paths(num_depths)[path]
        node_a[block, source] = node_a[block + 1, target] = 1
    return Architecture(node_a, arch_code_a, arch_code_c, info=info or {})
