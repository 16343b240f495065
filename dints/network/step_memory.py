"""What a training step needs of the machine's memory, counted before a case is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from dints import launcher
from dints.data.loaders import bytes_ahead
from dints.data.tasks import Task
from dints.network.architecture import Architecture, from_codes
from dints.network.cost import activation_bytes
from dints.network.discrete import DiscreteNetwork
from dints.running import machine
from dints.settings import MachineSettings, PatchSettings, RunSettings

# Bytes of activations a voxel, channel of the first level and block: counting begins where so many
# might not fit. A network of 12 blocks and 4 depths keeps a fifth of it with every path active.
GENEROUS = 64


class StepSettings(Protocol):
    """The settings of a script that trains, as far as a step's memory depends on them."""

    patches: PatchSettings
    run: RunSettings
    machine: MachineSettings


def check_memory(
    task: Task,
    architecture: Architecture | None,
    channel_mul: float,
    settings: StepSettings,
    *,
    num_loaders: int = 1,
    memory_mib: float | None = None,
) -> None:
    """Refuse patches that this machine cannot hold and, on a CPU, a step's activations.

    All is counted low, so that nothing is refused that would have worked: of patches those that are
    held for certain, and of activations nine tenths, and half of that where the precision may be
    one of two bytes.

    Args:
        architecture: that is trained; None where ``memory_mib`` is given.
        num_loaders: that prepare batches at the same time.
        memory_mib: that candidates fill with a step, counted in fp32; see
            `dints.network.cost.step_mib`.

    Raises:
        UserError: it does not suffice.
    """
    batch_size, device = settings.patches.num_images_per_batch, machine.planned_device(settings)
    processes = launcher.local_world_size()
    ahead = bytes_ahead(task, batch_size, settings.run.num_workers, device)
    patches = processes * num_loaders * ahead
    flag = "--num_images_per_batch"
    of = f"--patch_size {' '.join(map(str, task.patch_size))} and {flag} {batch_size}"
    remedy = f"lower --patch_size, {flag} or --num_workers"
    machine.check_memory(patches, f"{of}: the patches that are prepared ahead take", remedy)
    if device != "cpu":
        return
    recomputes = settings.machine.checkpoint_activations
    if memory_mib is not None:
        step = memory_mib * 2**20
        of, remedy = f"candidates fill --memory_mib {memory_mib:.6g}", "give a smaller one"
    else:
        input_shape = (batch_size, task.num_channels, *task.patch_size)
        generous = GENEROUS * batch_size * math.prod(task.patch_size) * 32 * channel_mul
        if patches + processes * generous * architecture.num_blocks < machine.available_memory():
            return
        with torch.device("meta"):
            network = DiscreteNetwork(
                architecture, task.num_channels, task.num_classes, channel_mul
            )
        step = _at_the_peak(network, input_shape, recomputes)
        remedy += "" if recomputes else ", give --checkpoint_activations"
    # On a CPU some layers keep less than counted.
    share = 0.9 if settings.machine.precision == "fp32" else 0.45
    needed = patches + int(processes * step * share)
    needs = f"{of}: a training step on the CPU takes"
    machine.check_memory(needed, needs, f"{remedy}, or use a GPU")


def _at_the_peak(
    network: DiscreteNetwork, input_shape: tuple[int, ...], checkpoint_activations: bool
) -> float:
    """Return the bytes that are kept at once; of blocks that are computed again one's, no less."""
    whole = activation_bytes(network, input_shape)
    if not checkpoint_activations:
        return whole
    network.checkpoint_activations = True
    stems = activation_bytes(network, input_shape)
    return stems + (whole - stems) / len(network.blocks)


def within_supernet(
    num_blocks: int, num_depths: int, operations: Sequence[str], use_downsample: bool
) -> Architecture:
    """Return an architecture that keeps less than such a supernet: all paths, one operation."""
    codes = np.ones((num_blocks, 3 * num_depths - 2), dtype=np.int64)
    return from_codes(codes, codes * (len(operations) - 1), operations, use_downsample)
