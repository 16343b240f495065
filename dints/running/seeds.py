"""Seeds that depend on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def seed_from(*parts: int | str) -> int:
    """Return a seed (32 bits) that depends on all of ``parts`` only: not on the number of ranks,
    worker or history.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def permutation(count: int, *parts: int | str) -> list[int]:
    """Return the numbers below ``count`` in an order that depends on all of ``parts`` only, as
    `seed_from` does.
    """
    return np.random.default_rng(seed_from(*parts)).permutation(count).tolist()


def seed_everything(*parts: int | str) -> None:
    """Seed the global generators, so that what is not seeded sample by sample is reproducible
    too.
    """
    seed = seed_from(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed)
