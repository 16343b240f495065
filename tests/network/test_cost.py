"""What a network costs is counted by hand for a small one; for others the oracle is a real run on
the CPU.
"""

from __future__ import annotations

from pathlib import Path

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
    weights = {  # input channels * output channels * kernel
        "stem, full": (512, 1 * 2 * 27),
        "stem, half": (64, 2 * 4 * 27),
        "cell": (64, 4 * 4 * 27),
        "back": (64, 4 * 2 * 27),
        "full again": (512, 2 * 2 * 27),
        "classes": (512, 2 * 2 * 1),
    }
    norms = (2, 4, 4, 2, 2)  # channels
    bias = 2
    kept = (
        # image as resampled, convolved, activated (the last is also the next one's input)
        512 * (1 + 2 + 2)
        + 64 * (4 + 4 + 4 + 4 + 2)  # convolved, activated; cell convolved, activated; convolved
        + 512 * (2 + 2 + 2)  # activated, convolved, normalised
        # mean and deviation of each channel, and the norm's weights, repeated for the batch
        + 3 * sum(norms)
    )
    found = cost(TINY, 1, 2, (8, 8, 8), SMALL)
    assert found == Cost(
        parameters=sum(size for _, size in weights.values()) + 2 * sum(norms) + bias,
        gmac=sum(voxels * size for voxels, size in weights.values()) / 1e9,
        activation_mib=4 * kept / 2**20,
        input_shape=(1, 1, 8, 8, 8),
        channel_mul=SMALL,
    )
    assert (
        found.parameters == 1060
        and found.gmac == 140_288e-9
        and found.activation_mib == 27_304 / 2**20
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
    return (
        count_parameters(network),
        sum(multiply_adds),
        sum(t.untyped_storage().nbytes() for t in kept.values()),
    )


@pytest.mark.parametrize(
    ("architecture", "channels", "classes", "patch_size", "channel_mul", "batch_size"),
    [
        (random_architecture(0, 3, 3), 2, 3, (16, 8, 24), 1 / 8, 1),
        # large enough for dints.network.fast.layers
        (random_architecture(4, 3, 4), 1, 2, (32, 32, 32), 1 / 4, 1),
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
    found = cost(stand_in(), 1, 2, (96, 96, 96))
    amounts, settings = (
        "152.4 M parameters, 334.4 GMAC, 3,836 MiB activations",
        ("at 1x1x96x96x96 (channel_mul 1)"),
    )
    assert found.lines() == [amounts, settings]


def test_measured_on_the_cpu():
    generator = torch.random.get_rng_state()
    found = cost(TINY, 1, 2, (16, 16, 16), SMALL, device=CPU)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert found.measured_mib is None
    assert found.device.startswith(f"{torch.get_num_threads()} thread")
    assert found.latency_ms > 0  # how it is timed: below


class Clock(nn.Module):
    """Takes its times, one after another, by its own clock, and notes whether gradients were
    wanted.
    """

    def __init__(self, *seconds: float):
        super().__init__()
        self.now, self.seconds, self.gradients = 0.0, list(seconds), []

    def forward(self, _: torch.Tensor) -> None:
        self.gradients.append(torch.is_grad_enabled())
        self.now += self.seconds.pop(0)


@pytest.mark.parametrize(
    ("seconds", "passes", "expected_ms"),
    [
        ((0.2, 0.02, 0.02, 0.2, *[0.02] * 20), 11, 20),  # neither the warm-up nor an outlier counts
        ((0.6, 0.1), 1, 600),  # no time for a second pass
    ],
)
def test_time_of_a_pass(monkeypatch, seconds, passes, expected_ms):
    network = Clock(*seconds)
    monkeypatch.setattr(module.time, "perf_counter", lambda: network.now)
    assert module._forward_ms(network, torch.zeros(1), limit=1.0) == pytest.approx(expected_ms)
    assert network.gradients == [False] * passes


def test_peak_is_that_of_one_step(monkeypatch):
    """It is the second step's, whose gradients count, over what was there before; checked where
    there is no GPU.
    """
    network = nn.Linear(2, 2)
    calls = []

    def allocated(device: torch.device) -> int:
        calls.append("before" if network.weight.grad is None else "before, with gradients")
        return 100 * 2**20

    def peak(device: torch.device) -> int:
        calls.append("peak" if network.weight.grad is not None else "peak, without gradients")
        return 350 * 2**20

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    assert module._peak_mib(network, torch.ones(1, 2)) == 250
    assert calls == ["reset", "before", "reset", "before", "peak"]


def test_lines_are_short_and_say_for_what_the_numbers_hold():
    device = "16 threads of " + 50 * "x"
    measured = Cost(
        1_052_360_000, 12_334.4, 99_876.4, (2, 4, 96, 96, 32), 0.5, device, 14.0, 123_456.7
    )
    assert measured.lines() == [
        "1,052 M parameters, 12,334 GMAC, 99,876 MiB activations, 123,457 MiB measured in a step",
        f"at 2x4x96x96x32 (channel_mul 0.5), 14 ms a forward pass on {device}"[:99],
    ]
    counted = Cost(1060, 0.000140288, 0.026, (1, 1, 8, 8, 8), 0.0625)
    assert counted.lines() == [
        "1,060 parameters, 0.0001403 GMAC, 0.026 MiB activations",
        "at 1x1x8x8x8 (channel_mul 0.0625)",
    ]


def test_name_of_a_cpu(monkeypatch):
    model = "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(
        Path, "read_text", lambda path: f"processor\t: 0\nmodel name\t: {model}\nstepping\t: 1\n"
    )
    assert module.device_name(CPU, 1) == "1 thread of Intel Xeon Platinum 8481C"
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as where there is no /proc
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    assert module.device_name(CPU, 8) == "8 threads of aarch64"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"patch_size": (8, 8, 6)},
            "--patch_size 8 8 6 does not fit 2 depths, .* for example 8 8 8",
        ),
        ({"in_channels": 0}, "in_channels is 0: give at least 1"),
        ({"channel_mul": 0.03}, "channel_mul is 0.03: give at least 0.03125"),
        ({"channel_mul": float("nan")}, "channel_mul is nan: give"),
        ({"channel_mul": 1e300}, r"channel_mul 1e\+300, .* too large"),
        ({"patch_size": (2**21, 2**21, 2**21)}, "patch_size 2097152 2097152 2097152 .* too large"),
        ({"in_channels": 10**30}, "in_channels 10{30}, .* too large"),
    ],
)
def test_what_no_network_has(change, message):
    settings = {
        "in_channels": 1,
        "num_classes": 2,
        "patch_size": (8, 8, 8),
        "channel_mul": SMALL,
        **change,
    }
    with pytest.raises(UserError, match=message) as caught:
        cost(TINY, **settings)
    assert "\n" not in str(caught.value)


def test_lack_of_memory_and_nothing_else_is_the_users_affair(monkeypatch):
    patch_size = (2**17,) * 3  # an image of 8 PiB, beyond what a processor addresses
    message = (
        "memory of .* too small .* channel_mul 0.0625 .* 1x1x131072x131072x131072: lower "
        "--channel_mul or --patch"
    )
    with pytest.raises(UserError, match=message):
        cost(TINY, 1, 2, patch_size, SMALL, device=CPU)

    def fail(*_):
        raise RuntimeError("another fault")

    monkeypatch.setattr(module, "_forward_ms", fail)
    with pytest.raises(RuntimeError, match="another fault"):
        cost(TINY, 1, 2, (8, 8, 8), SMALL, device=CPU)


def test_the_channel_mul_that_fills_a_memory():
    architecture, shape = chain(0, 1, 1, 0, num_depths=2), (1, 2, (16, 8, 8))

    def mib(steps: int, batch_size: int) -> float:
        counted = cost(architecture, *shape, steps / 32, batch_size)
        # fp32: weight, gradient, momentum, moving average
        of_weights = 4 * 4 * counted.parameters / 2**20
        assert counted.step_mib == counted.activation_mib + of_weights
        return counted.activation_mib + of_weights

    assert fitting_channel_mul(architecture, mib(1, 1), *shape) == 1 / 32
    assert fitting_channel_mul(architecture, mib(9, 2), *shape, batch_size=2) == 9 / 32
    for batch_size in (1, 2):  # exactly, where weights take most of it too
        assert fitting_channel_mul(architecture, mib(41, batch_size), *shape, batch_size) == 41 / 32
        assert (
            fitting_channel_mul(architecture, mib(41, batch_size) - 2**-20, *shape, batch_size)
            == 40 / 32
        )
    with pytest.raises(
        UserError,
        match=r"smallest channel_mul, 1/32, a training step takes "
        rf"{mib(1, 1):.4g} MiB",
    ):
        fitting_channel_mul(architecture, 0.999 * mib(1, 1), *shape)
    for memory in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--memory_mib is .*: give a positive number"):
            fitting_channel_mul(architecture, memory, *shape)
