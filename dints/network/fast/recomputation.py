"""Activation checkpointing: a part is computed twice, so that autograd need not keep it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def kept_or_recomputed(recompute: bool, part: Callable[..., T], *inputs: object) -> T:
    """Return ``part(*inputs)``.

    Args:
        recompute: autograd keeps the inputs only; the backward pass computes the part once more, to
            the same bits where the device's kernels give the same bits twice. The part must draw no
            random numbers.
    """
    if not (recompute and torch.is_grad_enabled()):
        return part(*inputs)
    return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
