"""Costs are counted by hand for a small network; for others the oracle is a run on the CPU."""

from __future__ import annotations

import pytest
import torch
from architectures import chain, random_architecture, stand_in
from torch import nn

from dints.errors import UserError
from dints.network import cost as module
from dints.network.cost import Cost, cost, fitting_channel_mul
from dints.network.discrete import DiscreteNetwork, count_parameters
from dints.network.fast.layers import Convolution, InstanceNorm, Upsample

CPU = torch.device("cpu")
SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels
# one block with one 3x3x3 convolution at half the image's resolution
TINY = chain(0, 0, num_depths=2)


def test_counts_by_hand():
    """The layers of ``TINY`` are listed here: 8x8x8 voxels are 512, at half the resolution 64."""
    weights = (  # voxels, input channels * output channels * kernel
        (512, 1 * 2 * 27),  # stem, full resolution
        (64, 2 * 4 * 27),  # half
        (64, 4 * 4 * 27),  # cell
        (64, 4 * 2 * 27),  # back
        (512, 2 * 2 * 27),
        (512, 2 * 2 * 1),  # classes
    )
    norms, bias = (2, 4, 4, 2, 2), 2  # channels
    kept = (
        # image as resampled, convolved, activated (the last is also the next one's input)
        512 * (1 + 2 + 2)
        + 64 * (4 + 4 + 4 + 4 + 2)  # convolved, activated; cell convolved, activated; convolved
        + 512 * (2 + 2 + 2)  # activated, convolved, normalised
        # mean and deviation of each channel, and the norm's weights, repeated for the batch
        + 3 * sum(norms)
    )
    assert cost(TINY, 1, 2, (8, 8, 8), SMALL) == Cost(
        parameters=sum(size for _, size in weights) + 2 * sum(norms) + bias,
        gmac=sum(voxels * size for voxels, size in weights) / 1e9,
        activation_mib=4 * kept / 2**20,
        input_shape=(1, 1, 8, 8, 8),
        channel_mul=SMALL,
    )


def run_for_real(network: DiscreteNetwork, image: torch.Tensor) -> tuple[int, int, int]:
    """Count parameters, multiply-adds and kept bytes of a forward pass on the CPU."""
    multiply_adds, kept = [], {}

    def note_convolution(convolution: nn.Conv3d, _, output: torch.Tensor) -> None:
        multiply_adds.append(output.numel() * convolution.weight[0].numel())

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            layer.register_forward_hook(note_convolution)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = network(image)
    for parameter in network.parameters():
        kept.pop(parameter.data_ptr(), None)
    scores.sum().backward()  # until here, nothing that is kept was freed
    kept_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return count_parameters(network), sum(multiply_adds), kept_bytes


@pytest.mark.parametrize(
    ("architecture", "channels", "classes", "patch_size", "channel_mul", "batch_size"),
    [
        (random_architecture(0, 3, 3), 2, 3, (16, 8, 24), 1 / 8, 1),
        (chain(1, 0, 1, 2, num_depths=3, operation=0), 1, 3, (16, 16, 16), 0.3, 2),
    ],
)
def test_counts_are_those_of_a_real_run(
    architecture, channels, classes, patch_size, channel_mul, batch_size
):
    image = torch.randn(batch_size, channels, *patch_size)
    found = cost(architecture, channels, classes, patch_size, channel_mul, batch_size)
    network = DiscreteNetwork(architecture, channels, classes, channel_mul)
    kept_on_cpu = run_for_real(network, image)[2]
    for layer in network.modules():  # back to PyTorch's own, as on a GPU
        if type(layer) in (Convolution, InstanceNorm, Upsample):
            layer.__class__ = type(layer).__base__
    parameters, multiply_adds, kept = run_for_real(network, image)
    assert found.parameters == parameters
    assert found.gmac * 1e9 == pytest.approx(multiply_adds, rel=1e-12)
    assert found.activation_mib * 2**20 == kept
    assert kept_on_cpu == pytest.approx(kept, rel=0.05)
    assert found.input_shape == image.shape and found.channel_mul == channel_mul


def test_a_network_as_large_as_the_published_one():
    assert cost(stand_in(), 1, 2, (96, 96, 96)).lines() == [
        "152.4 M parameters, 334.4 GMAC, 3,836 MiB activations",
        "at 1x1x96x96x96 (channel_mul 1)",
    ]


def test_measured_on_the_cpu():
    generator = torch.random.get_rng_state()
    found = cost(TINY, 1, 2, (16, 16, 16), SMALL, device=CPU)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert found.latency_ms > 0
    assert found.device.startswith(f"{torch.get_num_threads()} thread")
    assert f"ms a forward pass on {found.device}"[:60] in found.lines()[1]
    assert all(len(line) < 100 for line in found.lines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": (8, 8, 6)}, "--patch_size 8 8 6 does not fit 2 depths, .* example 8 8 8"),
        ({"channel_mul": 1e300}, r"channel_mul 1e\+300, .* too large"),
        (
            {"patch_size": (2**21, 2**21, 2**21)},
            "input of 1x1x2097152x2097152x2097152: .* too large",
        ),
    ],
)
def test_what_no_network_has(change, message):
    size = {"in_channels": 1, "num_classes": 2, "patch_size": (8, 8, 8), "channel_mul": SMALL}
    with pytest.raises(UserError, match=message) as caught:
        cost(TINY, **{**size, **change})
    assert "\n" not in str(caught.value)


def test_lack_of_memory_and_nothing_else_is_the_users_affair(monkeypatch):
    patch_size = (2**17,) * 3  # an image of 8 PiB, beyond what a processor addresses
    message = "memory of .* too small .* 1x1x131072x131072x131072: lower --channel_mul or --patch"
    with pytest.raises(UserError, match=message):
        cost(TINY, 1, 2, patch_size, SMALL, device=CPU)

    def fail(*_):
        raise RuntimeError("another fault")

    monkeypatch.setattr(module, "_forward_ms", fail)
    with pytest.raises(RuntimeError, match="another fault"):
        cost(TINY, 1, 2, (8, 8, 8), SMALL, device=CPU)


def test_the_channel_mul_that_fills_a_memory():
    architecture, shape = chain(0, 1, 0, num_depths=2), (1, 2, (16, 8, 8))

    def mib(steps: int, batch_size: int = 1) -> float:
        counted = cost(architecture, *shape, steps / 32, batch_size)
        # fp32: weight, gradient, momentum, moving average
        of_weights = 4 * 4 * counted.parameters / 2**20
        assert counted.step_mib == counted.activation_mib + of_weights
        return counted.step_mib

    least, wide = mib(1), mib(41, 2)  # exactly, where weights take most of it too
    assert fitting_channel_mul(architecture, least, *shape) == 1 / 32
    assert fitting_channel_mul(architecture, wide, *shape, batch_size=2) == 41 / 32
    assert fitting_channel_mul(architecture, wide - 2**-20, *shape, batch_size=2) == 40 / 32
    message = f"smallest channel_mul, 1/32, a training step takes {least:.4g} MiB"
    with pytest.raises(UserError, match=message):
        fitting_channel_mul(architecture, 0.999 * least, *shape)
    for memory in (0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--memory_mib is .*: give a positive number"):
            fitting_channel_mul(architecture, memory, *shape)
