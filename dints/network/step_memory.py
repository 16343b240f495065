"""What a training step needs of the machine's memory, counted before a case is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dints import launcher
from dints.data.loaders import bytes_ahead
from dints.data.tasks import Task
from dints.network.architecture import Architecture, from_codes
from dints.network.cost import activation_bytes
from dints.network.found import FoundNetwork
from dints.running import machine

# Bytes of activations a voxel, channel of the first level and block: counting begins where so many might not fit. A
# network of 12 blocks and 4 depths keeps a fifth of it with every path active.
GENEROUS = 64


def check(
    task: Task,
    architecture: Architecture | None,
    channel_mul: float,
    *,
    batch_size: int,
    num_workers: int | None,
    device: str,
    precision: str = "auto",
    checkpoint_activations: bool = False,
    num_loaders: int = 1,
    flag: str = "--num_images_per_batch",
    memory_mib: float | None = None,
) -> None:
    """Raise `UserError` where this machine cannot hold its processes' patches and, on a CPU, a step's activations.

    All is counted low, so that nothing is refused that would have worked: of patches what is held for certain, and of
    activations nine tenths, and half of that where the precision may be one of two bytes.

    Args:
        architecture: that is trained; None: activations are not counted.
        batch_size, num_workers: as for `dints.data.loaders.training_loader`.
        device: as for `dints.running.machine.choose_device`.
        checkpoint_activations: as `FoundNetwork` has it.
        num_loaders: that prepare batches at the same time.
        flag: that sets ``batch_size``.
        memory_mib: that candidates fill with what a step keeps, counted in fp32; see `dints.network.cost.step_mib`.
    """
    processes, device = launcher.local_world_size(), machine.device_type(device)
    patches = processes * num_loaders * bytes_ahead(task, batch_size, num_workers, device)
    size = " ".join(map(str, task.patch_size))
    of = f"--patch_size {size} and {flag} {batch_size}"
    remedy = f"lower --patch_size, {flag} or --num_workers"
    machine.check_memory(patches, f"{of}: the patches that are prepared ahead take", remedy)
    if device != "cpu" or (architecture is None and memory_mib is None):
        return
    share = 0.9 if precision == "fp32" else 0.45  # on a CPU some layers keep less than counted
    step = "a training step on the CPU takes"
    if memory_mib is not None:
        needed = patches + int(processes * memory_mib * 2**20 * share)
        what = f"candidates fill --memory_mib {memory_mib:.6g}: {step}"
        machine.check_memory(needed, what, "give a smaller one, or use a GPU")
        return
    voxels = batch_size * math.prod(task.patch_size)
    generous = GENEROUS * voxels * 32 * channel_mul * architecture.num_blocks
    if patches + processes * generous < machine.available_memory():
        return
    with torch.device("meta"):
        network = FoundNetwork(architecture, task.num_channels, task.num_classes, channel_mul)
    activations = _at_the_peak(network, (batch_size, task.num_channels, *task.patch_size), checkpoint_activations)
    needed = patches + int(processes * activations * share)
    remedy += ", or use a GPU" if checkpoint_activations else ", give --checkpoint_activations, or use a GPU"
    machine.check_memory(needed, f"{of}: {step}", remedy)


def _at_the_peak(network: FoundNetwork, input_shape: tuple[int, ...], checkpoint_activations: bool) -> float:
    """Return the bytes that are kept at once, of blocks that are computed again only the average one's: no less."""
    whole = activation_bytes(network, input_shape)
    if not checkpoint_activations:
        return whole
    network.checkpoint_activations = True
    stems = activation_bytes(network, input_shape)
    return stems + (whole - stems) / len(network.blocks)


def within_supernet(num_blocks: int, num_depths: int, operations: Sequence[str], use_downsample: bool) -> Architecture:
    """Return an architecture that keeps less than the supernet of such a space: on every path the last operation."""
    codes = np.ones((num_blocks, 3 * num_depths - 2), dtype=np.int64)
    return from_codes(codes, codes * (len(operations) - 1), operations, use_downsample)
