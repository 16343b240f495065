"""What a discrete network costs: parameters, multiply-adds, a step's memory, a pass's time."""

from __future__ import annotations

import math
import platform
import re
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dints.errors import UserError
from dints.network.architecture import Architecture
from dints.network.discrete import DiscreteNetwork, check_patch_size, count_parameters
from dints.running.failures import lacks_memory

MIB = 2**20
MAX_CHANNELS = 2**31  # at the first level, up to which `fitting_channel_mul` looks
BYTES_A_PARAMETER = 16  # of a training in fp32: weight, gradient, SGD's momentum and moving average


@dataclass(frozen=True)
class Cost:
    """The cost of a network, and the settings it holds for; everything is in fp32.

    Attributes:
        parameters: trainable numbers.
        gmac: multiply-adds of the convolutions in one forward pass, in 10^9.
        activation_mib: what autograd keeps of one forward pass for the backward one. Counted,
            therefore the same on every device; parameters, gradients, the optimizer, the loss and
            work space come on top.
        input_shape: (batch, channels, *patch_size).
        channel_mul: the network's width, as times 32, 64, ... channels.
        device: name of what the next was measured on; None: it was not.
        latency_ms: time of a forward pass without gradients.
    """

    parameters: int
    gmac: float
    activation_mib: float
    input_shape: tuple[int, ...]
    channel_mul: float
    device: str | None = None
    latency_ms: float | None = None

    @property
    def step_mib(self) -> float:
        """What a training step keeps on the device; see `step_mib`."""
        return step_mib(self.parameters, self.activation_mib)

    def to_dict(self) -> dict:
        """Return plain types only, for arch files, which ``weights_only=True`` reads."""
        return {**asdict(self), "input_shape": list(self.input_shape)}

    def lines(self) -> list[str]:
        """Say in two lines of under 100 characters what it costs, for which input and device."""
        million = self.parameters >= 1e6
        parameters = f"{_short(self.parameters / 1e6)} M" if million else f"{self.parameters:,}"
        amounts = (
            f"{parameters} parameters, {_short(self.gmac)} GMAC, "
            f"{_short(self.activation_mib)} MiB activations"
        )
        settings = f"at {'x'.join(map(str, self.input_shape))} (channel_mul {self.channel_mul:g})"
        if self.latency_ms is not None:
            settings += f", {_short(self.latency_ms)} ms a forward pass on {self.device}"
        return [line[:99] for line in (amounts, settings)]  # cuts a long name of a device


def cost(
    architecture: Architecture,
    in_channels: int,
    num_classes: int,
    patch_size: tuple[int, int, int],
    channel_mul: float = 1.0,
    batch_size: int = 1,
    device: torch.device | None = None,
) -> Cost:
    """Count what the architecture's network costs and, with a ``device``, measure it there.

    Counting takes seconds and no memory. Measuring builds the network with random weights on the
    device, and takes about 5 s at most. Global random generators are left as they were.

    Raises:
        UserError: the patch size does not fit the depths, a number is too large, or the device
            lacks the memory.
    """
    check_patch_size(patch_size, architecture.num_depths, architecture.use_downsample)
    settings = (architecture, in_channels, num_classes, channel_mul)
    input_shape = (batch_size, in_channels, *patch_size)
    try:
        counted = counts(partial(DiscreteNetwork, *settings), input_shape)
    # torch's three ways to say that a size has no 64 bits
    except (OverflowError, RuntimeError, TypeError) as error:
        raise UserError(
            f"no network has channel_mul {channel_mul:g}, {num_classes} classes and an input of "
            f"{'x'.join(map(str, input_shape))}: one of these is too large"
        ) from error
    measured = {} if device is None else _measure(settings, input_shape, device)
    return Cost(**counted, input_shape=input_shape, channel_mul=channel_mul, **measured)


def counts(make: Callable[[], nn.Module], input_shape: tuple[int, ...]) -> dict[str, float]:
    """Count what a network costs: ``parameters``, ``gmac`` and ``activation_mib`` of `Cost`.

    It is made and passed through on the meta device, which has shapes but no numbers: that takes
    seconds and no memory. There the layers compute in PyTorch's own way, as on a GPU. The FLOP
    counter knows it, unlike that of `dints.network.fast.layers`, which on a CPU keeps a few percent
    more or less.

    Args:
        input_shape: (batch, channels, *patch_size).
    """
    with torch.device("meta"):
        network = make()
    with FlopCounterMode(display=False) as counter:
        activations = activation_bytes(network, input_shape)
    return {
        "parameters": count_parameters(network),
        # the counter takes a multiply-add as two operations
        "gmac": counter.get_total_flops() / 2 / 1e9,
        "activation_mib": activations / MIB,
    }


def step_mib(parameters: int, activation_mib: float) -> float:
    """Return the MiB that a training step keeps on the device, in fp32.

    By this memory networks are called equal. Not in it: the batch, the loss, and what kernels need
    while they run.

    Args:
        parameters, activation_mib: of `counts`.
    """
    return activation_mib + BYTES_A_PARAMETER * parameters / MIB


def fitting_channel_mul(
    architecture: Architecture,
    memory_mib: float,
    in_channels: int,
    num_classes: int,
    patch_size: tuple[int, int, int],
    batch_size: int = 1,
) -> float:
    """Return the largest ``channel_mul`` at which a training step stays within ``memory_mib``.

    In steps of 1/32 every feature map has a whole number of channels, and all of them grow in
    proportion to the width: two widths give the activations of all, three the parameters.

    Raises:
        UserError: even the smallest is too large, or the patch size does not fit.
    """
    if not 0 < memory_mib < math.inf:
        raise UserError(f"--memory_mib is {memory_mib:g}: give a positive number of MiB")
    one, two = (
        cost(architecture, in_channels, num_classes, patch_size, steps / 32, batch_size)
        for steps in (1, 2)
    )
    if one.step_mib > memory_mib:
        raise UserError(
            f"--memory_mib {memory_mib:g} is too small: at the smallest channel_mul, 1/32, a "
            f"training step takes {one.step_mib:.4g} MiB; give at least that, or a smaller "
            "--patch_size or --num_images_per_batch"
        )
    with torch.device("meta"):
        third = DiscreteNetwork(architecture, in_channels, num_classes, 3 / 32)
    bend = count_parameters(third) - 2 * two.parameters + one.parameters

    def step_mib_at(steps: int) -> float:  # exact: all are multiples of a byte
        before, pairs = steps - 1, (steps - 1) * (steps - 2) // 2
        parameters = one.parameters + before * (two.parameters - one.parameters) + pairs * bend
        activation_mib = one.activation_mib + before * (two.activation_mib - one.activation_mib)
        return step_mib(parameters, activation_mib)

    widths = range(
        1, min(2 + int((memory_mib - one.step_mib) / (two.step_mib - one.step_mib)), MAX_CHANNELS)
    )
    return bisect_right(widths, memory_mib, key=step_mib_at) / 32


def activation_bytes(network: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Count what autograd keeps of a forward pass, of a network on the meta device.

    Args:
        input_shape: (batch, channels, *patch_size).
    """
    kept = []  # holds the tensors, so that no two storages have one address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.empty(input_shape, device="meta"))
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    storages = {
        storage._cdata: storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in kept)
    }
    return sum(size for address, size in storages.items() if address not in weights)


def _measure(
    settings: tuple, input_shape: tuple[int, ...], device: torch.device
) -> dict[str, str | float]:
    name = device_name(device, torch.get_num_threads())
    try:
        with torch.random.fork_rng(devices=[]):  # both are drawn on the CPU
            network = DiscreteNetwork(*settings).to(device)
            image = torch.randn(input_shape).to(device)
        return {"device": name, "latency_ms": _forward_ms(network, image)}
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise UserError(
            f"the memory of {name} is too small for a network of channel_mul {settings[-1]:g} with "
            f"an input of {'x'.join(map(str, input_shape))}: lower --channel_mul or --patch_size, "
            "or give another --device"
        ) from error


@torch.no_grad()
def _forward_ms(network: nn.Module, image: torch.Tensor) -> float:
    """Return the median of up to 10 passes within 5 s after one to warm up; of slow ones the first.

    It is the only one where it leaves no time for a second.
    """
    seconds = []
    while len(seconds) <= 10 and (not seconds or sum(seconds) + seconds[-1] < 5):
        start = time.perf_counter()
        network(image)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[1:] or seconds)


def device_name(device: torch.device, threads: int) -> str:
    """Return the product's name without what makers add; of a CPU also how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = model[1] if model else platform.processor() or platform.machine()
    name = " ".join(re.sub(r"\(R\)|\(TM\)|\bCPU\b|@.*|\d+-Core|\bProcessor\b", "", name).split())
    return f"{threads} thread{'s' * (threads > 1)} of {name}"


def _short(value: float) -> str:
    """Write four digits, or all before the point where there are more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
