"""dints/convolution.py: `torch.nn.Conv3d` is the oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dints.convolution import Convolution, accelerated

# Batch, input and output channels, kernel, stride, spatial size: what search and retraining compute on a CPU, of every
# kind that oneDNN takes over and of some that it does not.
SHAPES = {
    "many voxels": (1, 16, 16, (3, 3, 3), 1, (16, 16, 16)),
    "batch of two": (2, 16, 16, (3, 3, 3), 1, (16, 16, 16)),
    "pads the first axis": (1, 32, 32, (3, 3, 1), 1, (16, 8, 16)),
    "pads the first and last axis": (1, 32, 32, (3, 1, 3), 1, (8, 16, 16)),
    "does not pad the first axis": (1, 32, 32, (1, 3, 3), 1, (8, 16, 16)),
    "one row of the kernel": (1, 64, 64, (3, 1, 1), 1, (16, 16, 8)),
    "stem": (1, 16, 32, (3, 3, 3), 2, (32, 32, 32)),
    "few voxels, many weights": (1, 160, 160, (3, 3, 3), 1, (2, 4, 2)),
    "few voxels, few weights": (1, 8, 8, (3, 3, 3), 1, (4, 4, 4)),
    "one voxel in the kernel": (1, 32, 64, (1, 1, 1), 1, (16, 16, 16)),
    "odd sizes": (1, 17, 23, (3, 3, 3), 1, (13, 15, 17)),
}


def pair(channels: int, outputs: int, kernel, stride: int, **options) -> tuple[nn.Conv3d, nn.Conv3d]:
    """PyTorch's convolution and ours with the same weights."""
    padding = [size // 2 for size in kernel]
    plain = nn.Conv3d(channels, outputs, kernel, stride, padding, **{"bias": False, **options})
    return plain, accelerated(copy.deepcopy(plain))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("trained", ["image and weight", "image", "weight"])
def test_results_and_gradients(shape, trained):
    torch.manual_seed(0)
    batch, channels, outputs, kernel, stride, size = shape
    image = torch.randn(batch, channels, *size)
    results = []
    for convolution in pair(channels, outputs, kernel, stride):
        convolution.weight.requires_grad_("weight" in trained)
        own_image = image.clone().requires_grad_("image" in trained)
        result = convolution(own_image)
        mix = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
        (result * mix).sum().backward()
        results.append((result.detach(), own_image.grad, convolution.weight.grad))
    for expected, found in zip(*results, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def calls_onednn(convolution: nn.Module, image: torch.Tensor) -> bool:
    with Operations() as operations:
        convolution(image)
    return "mkldnn_convolution.default" in operations.names


@pytest.mark.parametrize(
    ("name", "expected"), [(name, not name.endswith(("few weights", "voxel in the kernel"))) for name in SHAPES]
)
def test_it_is_used_where_it_pays(name, expected):
    batch, channels, outputs, kernel, stride, size = SHAPES[name]
    plain, ours = pair(channels, outputs, kernel, stride)
    image = torch.randn(batch, channels, *size)
    assert calls_onednn(ours, image) == expected
    assert not calls_onednn(plain, image)


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}], ids=str
)
def test_other_convolutions_stay_pytorchs(options):
    plain, ours = pair(32, 32, (3, 3, 3), 1, **options)
    image = torch.randn(1, 32, 16, 16, 16)
    assert not calls_onednn(ours, image)
    assert torch.equal(ours(image), plain(image))


def test_other_types_and_places_stay_pytorchs():
    _, ours = pair(32, 32, (3, 3, 3), 1)
    image = torch.randn(1, 32, 16, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not calls_onednn(ours, image) and ours(image).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not calls_onednn(ours, image)
    assert not calls_onednn(copy.deepcopy(ours).double(), image.double())
    assert not calls_onednn(copy.deepcopy(ours).to("meta"), image.to("meta"))
    assert ours(image[0]).shape == (32, 16, 16, 16)  # without a batch axis


def test_state_and_class():
    network = nn.Sequential(nn.Conv3d(2, 2, 3), nn.Sequential(nn.Conv2d(2, 2, 3)), nn.ConvTranspose3d(2, 2, 3))
    state, parameters = network.state_dict(), list(network.parameters())
    assert accelerated(network) is network
    assert [type(layer) for layer in network.modules()][1:] == [
        Convolution,
        nn.Sequential,
        nn.Conv2d,
        nn.ConvTranspose3d,
    ]
    assert network.state_dict().keys() == state.keys()
    assert all(mine is given for mine, given in zip(network.parameters(), parameters, strict=True))


def test_the_same_bits_every_time():
    """As a continued run must round as the first one did."""
    _, ours = pair(32, 32, (3, 3, 3), 1)
    image = torch.randn(1, 32, 16, 16, 16)
    gradients = []
    for _ in range(3):
        ours.zero_grad()
        ours(image).square().sum().backward()
        gradients.append(ours.weight.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
