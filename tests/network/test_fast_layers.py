"""PyTorch's own layers are the oracle of dints/network/fast/layers.py."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from architectures import chain, everything
from monai.networks.blocks.dints_block import FactorizedIncreaseBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tracing import assert_one_graph

from dints.network.discrete import DiscreteNetwork
from dints.network.fast import layers
from dints.network.fast.acceleration import accelerate
from dints.network.fast.layers import (
    Convolution,
    InstanceNorm,
    Upsample,
    convolve_side_by_side,
)
from dints.network.space import SearchSpace, supernet_of

# Batch, input and output channels, kernel, stride, spatial size, and how that is computed in fp32.
SHAPES = {
    "many voxels": (1, 16, 16, (3, 3, 3), 1, (16, 16, 16), "oneDNN"),
    "batch of two": (2, 16, 16, (3, 3, 3), 1, (16, 16, 16), "oneDNN without AVX-512"),
    "pads the first axis": (1, 32, 32, (3, 3, 1), 1, (16, 8, 16), "oneDNN"),
    "few voxels, many weights": (1, 80, 160, (3, 3, 3), 1, (2, 4, 2), "product"),
    "few voxels, stride": (3, 40, 80, (3, 3, 3), 2, (5, 4, 3), "product"),
    "few voxels, few weights": (1, 8, 8, (3, 3, 3), 1, (4, 4, 4), "PyTorch"),
    "one voxel in the kernel, stride": (2, 16, 8, (1, 1, 1), 2, (9, 8, 7), "PyTorch"),
    "odd sizes": (1, 17, 23, (3, 3, 3), 1, (13, 15, 17), "oneDNN"),
}


@pytest.fixture(params=[True, False], ids=["AVX-512", "AVX2"])
def has_avx512(request, monkeypatch):
    """Compute as on processors with and without AVX-512: every one can do both, at a speed."""
    monkeypatch.setattr(layers, "_HAS_AVX512", request.param)
    return request.param


def pair(
    channels: int, outputs: int, kernel, stride: int = 1, **options
) -> tuple[nn.Conv3d, nn.Conv3d]:
    """Make PyTorch's convolution and ours with the same weights."""
    torch.manual_seed(0)
    padding = [size // 2 for size in kernel]
    plain = nn.Conv3d(channels, outputs, kernel, stride, padding, **{"bias": False, **options})
    return plain, accelerate(copy.deepcopy(plain))


def assert_same(
    plain, ours, image: torch.Tensor, parameters=((), ()), image_trained=True, tolerance=1e-5
) -> None:
    """Compare results and gradients, by ``parameters`` of both and the image, but for rounding."""
    results = []
    for module, trained in zip((plain, ours), parameters, strict=True):
        own_image = image.clone().requires_grad_(image_trained)
        result = module(own_image)
        mix = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
        wanted = [*([own_image] if image_trained else []), *trained]
        results.append((result.detach(), *torch.autograd.grad((result * mix).sum(), wanted)))
    for expected, found in zip(*results, strict=True):
        assert expected.dtype == found.dtype and expected.shape == found.shape
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=10 * tolerance, atol=tolerance * scale)


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def way(convolution: nn.Module, image: torch.Tensor) -> str:
    """Tell how a convolution is computed."""
    with Operations() as operations:
        operations.names = []
        convolution(image)
    ways = {"mkldnn_convolution.default": "oneDNN", "_linear_pointwise.default": "product"}
    return next((ways[name] for name in operations.names if name in ways), "PyTorch")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_convolution_is_pytorchs_and_each_shape_goes_its_way(shape, has_avx512):
    batch, channels, outputs, kernel, stride, size, expected = shape
    torch.manual_seed(0)
    image = torch.randn(batch, channels, *size)
    plain, ours = pair(channels, outputs, kernel, stride)
    both = [list(plain.parameters()), list(ours.parameters())]
    for parameters, image_trained in ((both, True), (([], []), True), (both, False)):
        assert_same(plain, ours, image, parameters, image_trained)
    if expected == "oneDNN without AVX-512":
        expected = "PyTorch" if has_avx512 else "oneDNN"
    # Without oneDNN, on a processor that is not x86 or has no AVX2, everything stays PyTorch's.
    expected = expected if layers._HAS_ONEDNN else "PyTorch"
    assert (way(plain, image), way(ours, image)) == ("PyTorch", expected)


def test_other_convolutions_types_and_places_stay_pytorchs():
    image = torch.randn(1, 64, 8, 8, 8)
    for options in ({"bias": True}, {"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}):
        plain, ours = pair(64, 64, (3, 3, 3), **options)
        assert way(ours, image) == "PyTorch" and torch.equal(ours(image), plain(image))
    for size in ((8, 8, 8), (2, 2, 2)):
        _, ours = pair(64, 64, (3, 3, 3))
        image = torch.randn(1, 64, *size)
        with torch.backends.mkldnn.flags(enabled=False):
            assert way(ours, image) == "PyTorch"
        for there in (torch.float64, torch.bfloat16, "meta"):
            assert way(copy.deepcopy(ours).to(there), image.to(there)) == "PyTorch"
        assert ours(image[0]).shape == (64, *size)  # without a batch axis


def assert_nearer(result: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> None:
    """Assert that our bfloat16 is no further from the truth than PyTorch's."""
    assert result.dtype == theirs.dtype == torch.bfloat16
    assert (result - truth).abs().max() <= (theirs - truth).abs().max()


@pytest.mark.parametrize(("side", "expected"), [(8, "PyTorch"), (2, "product")])
def test_under_autocast_products_stay_in_fp32(side, expected):
    """Their results are nearer to the truth than PyTorch's in bf16."""
    plain, ours = pair(64, 64, (3, 3, 3))
    image = torch.randn(1, 64, side, side, side).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert way(ours, image) == (expected if layers._HAS_ONEDNN else "PyTorch")
        result, theirs = ours(image), plain(image)
        result.float().square().sum().backward()
    assert ours.weight.grad.dtype == torch.float32
    assert_nearer(result, theirs, copy.deepcopy(plain).double()(image.double()))


def results_in(kind: torch.dtype, call, image: torch.Tensor, parameters) -> list[torch.Tensor]:
    """Return the result in this type, and the gradients by the image and the parameters."""
    image = image.to(kind).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == torch.bfloat16):
        result = call(image)
    assert result.dtype == kind
    mix = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    unwritten = [torch.full_like(each, torch.nan) for each in (image, *parameters, *parameters)]
    del unwritten  # the gradients get their memory
    return [result.detach(), *torch.autograd.grad(result, [image, *parameters], mix.to(kind))]


def is_near_to_fp32(ours: nn.Module, plain: nn.Module, image: torch.Tensor) -> bool:
    """Tell whether bf16 has fp32's results; those of a wrong kernel are NaN, or far away."""
    image = image.bfloat16().float()
    found = results_in(torch.bfloat16, ours, image, [*ours.parameters()])
    expected = results_in(torch.float32, plain, image, [*plain.parameters()])
    return all(
        (got.float() - right).norm() <= 0.03 * (1 + right.norm())
        for got, right in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("use_downsample", [True, False])
def test_bfloat16_is_fp32_in_every_shape_of_a_network_on_this_machine(use_downsample):
    """A failure is a kernel of this machine that is wrong: `layers._by_pytorch` goes around it."""
    torch.manual_seed(0)
    architecture = replace(everything(2, 3), use_downsample=use_downsample)
    network = DiscreteNetwork(architecture, 1, 2, 1 / 16)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv3d)]
    wrong, number = [], 0
    for ours in {layer.extra_repr(): layer for layer in convolutions}.values():
        plain = copy.deepcopy(ours)
        plain.__class__ = nn.Conv3d
        for width in (1, 2, 3, 4, 7, 16):  # of the output, the last axis
            number += 1
            batch, *other = ((1, 2, 4), (2, 1, 2), (1, 4, 3))[number % 3]
            size = [count * step for count, step in zip((*other, width), ours.stride, strict=True)]
            image = torch.randn(batch, ours.in_channels, *size)
            # the second half of a change of resolution sees one voxel less
            for seen in (image, image[..., :-1])[: 1 + (math.prod(ours.stride) > 1)]:
                if not is_near_to_fp32(ours, plain, seen):
                    wrong.append((ours, seen.shape))
    assert number > 50 and not wrong


class Faulty(TorchDispatchMode):
    """Has oneDNN 3.12's faults in bfloat16: NaN where results, or unwritten memory, are wrong."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default and args[0].dtype == torch.bfloat16:
            image, weight, _, stride, padding = args[:5]
            wrong = self._strides_wrongly(image, weight, stride, padding)
            return self._broken(result) if wrong else result
        backward = torch.ops.aten.convolution_backward.default
        if function is not backward or args[1].dtype != torch.bfloat16:
            return result
        of_image, of_weight, of_bias = result
        _, image, weight, _, stride, padding = args[:6]
        if of_image is not None and self._strides_wrongly(image, weight, stride, padding):
            of_image = self._broken(of_image)
        if of_weight is not None and padding[0] and image.shape[2] < weight.shape[2]:
            of_weight = self._broken(of_weight)
        return of_image, of_weight, of_bias

    def _broken(self, result: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return torch.full_like(result, torch.nan)

    @staticmethod
    def _strides_wrongly(image, weight, stride, padding) -> bool:
        outputs = (image.shape[4] + 2 * padding[2] - weight.shape[4]) // stride[2] + 1
        larger = any(step > size for step, size in zip(stride, weight.shape[2:], strict=True))
        return larger or (outputs == 1 and stride[2] > 1)


def one_by_one(convolutions):
    """Return a function that computes each of the convolutions on its share of the channels."""

    def call(whole: torch.Tensor) -> torch.Tensor:
        shares = zip(convolutions, whole.chunk(len(convolutions), 1), strict=True)
        return torch.cat([convolution(share) for convolution, share in shares], 1)

    return call


@pytest.mark.parametrize("use_downsample", [True, False])
def test_networks_meet_no_faulty_kernel(use_downsample, monkeypatch):
    """Of patches whose deepest level is one voxel wide and two high, as the thinnest are."""
    torch.manual_seed(0)
    image = torch.randn(1, 1, *((8, 16, 4) if use_downsample else (4, 8, 2)))
    architecture = replace(everything(2, 2), use_downsample=use_downsample)
    space = SearchSpace(1 / 16, 2, 2, use_downsample=use_downsample)
    for network in (DiscreteNetwork(architecture, 1, 2, 1 / 16), supernet_of(space, 1, 2)):
        expected = network(image)
        with Faulty() as faulty:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores = network(image)
            scores.float().square().sum().backward()
        assert not faulty.seen
        assert (scores - expected).norm() < 0.1 * expected.norm()
        gradients = [each.grad for each in network.parameters() if each.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
    monkeypatch.setattr(layers, "_is_computed_in_bfloat16", lambda image: False)
    with faulty, torch.autocast("cpu", dtype=torch.bfloat16):
        network(image).float().sum().backward()
    assert faulty.seen  # where nothing goes around it


def test_a_compiler_is_given_no_faulty_kernel():
    torch.manual_seed(0)
    network = DiscreteNetwork(chain(0, 1, 0, num_depths=2), 1, 2, 1 / 16)
    image, faulty = torch.randn(1, 1, 8, 16, 4), Faulty()

    def backend(graph, _):
        def run(*inputs):
            with faulty:
                return graph(*inputs)

        return run

    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = compiled(image)
    with faulty:
        scores.float().square().sum().backward()
    assert not faulty.seen
    assert (scores - network(image)).norm() < 0.1 * network(image).norm()


@pytest.mark.parametrize(
    ("size", "batch", "kernel"),
    [((16, 8, 8), 2, (3, 3, 1)), ((4, 4, 4), 2, (1, 1, 1)), ((2, 1, 2), 1, (3, 3, 3))],
    ids=str,
)
def test_convolutions_side_by_side_are_those_one_by_one(size, batch, kernel, has_avx512):
    channels, groups = 40, 3
    torch.manual_seed(0)
    plain = nn.ModuleList([pair(channels, channels, kernel)[0] for _ in range(groups)])
    for weight in plain.parameters():  # each its own
        nn.init.normal_(weight, std=0.1)
    ours = accelerate(copy.deepcopy(plain))
    image = torch.randn(batch, groups * channels, *size)
    parameters = [*plain.parameters()], [*ours.parameters()]
    joined = partial(convolve_side_by_side, ours)
    assert_same(one_by_one(plain), joined, image, parameters)


@pytest.mark.parametrize(
    ("size", "batch", "affine"),
    [((16, 8, 8), 1, True), ((2, 2, 2), 2, False), ((3, 1, 1), 2, True)],
    ids=str,
)
def test_instance_norm(size, batch, affine):
    torch.manual_seed(0)
    plain = nn.InstanceNorm3d(6, affine=affine)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    ours = accelerate(copy.deepcopy(plain))
    image = 3 * torch.randn(batch, 6, *size) + 5
    parameters = [list(norm.parameters()) for norm in (plain, ours)]
    assert_same(plain, ours, image, parameters, tolerance=1e-4 if size == (3, 1, 1) else 1e-5)
    # without a batch axis
    torch.testing.assert_close(ours(image[0]), plain(image[0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        ours(torch.randn(2, 6, 1, 1, 1))


def upsamples() -> tuple[nn.Module, nn.Module]:
    """Make PyTorch's doubling and ours."""
    plain = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True)
    return plain, accelerate(copy.deepcopy(plain))


@pytest.mark.parametrize(("size", "batch"), [((2, 2, 2), 2), ((5, 7, 11), 1)], ids=str)
def test_upsample(size, batch):
    torch.manual_seed(0)
    (plain, ours), image = upsamples(), torch.randn(batch, 3, *size)
    assert_same(plain, ours, image)
    assert torch.equal(ours(image.double()), plain(image.double()))
    half = image.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, theirs = ours(half), plain(half)
    assert_nearer(result, theirs, plain(half.double()))


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 1, 11), (16, 12, 20)], ids=str)
def test_upsample_as_on_a_gpu(size, as_on_gpu):
    torch.manual_seed(0)
    (plain, ours), image = upsamples(), torch.randn(2, 3, *size)
    for kind, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        assert_same(plain, ours, image.to(kind), tolerance=tolerance)
        assert ours(image.to(kind)).is_contiguous()


def test_doubling_before_a_convolution():
    torch.manual_seed(0)
    plain = FactorizedIncreaseBlock(6, 3)
    ours, image = accelerate(copy.deepcopy(plain)), torch.randn(2, 6, 5, 7, 11)
    assert_same(plain, ours, image, ([*plain.parameters()], [*ours.parameters()]), tolerance=1e-4)
    assert is_near_to_fp32(ours, plain, image)


def test_the_matrices_are_kept_but_not_of_what_is_traced(as_on_gpu):
    layers._doubling.cache_clear()
    image, (_, module) = torch.randn(1, 1, 3, 3, 3), upsamples()
    torch.export.export(module, (image,))
    assert layers._doubling.cache_info().currsize == 0
    with torch.inference_mode():
        module(image)
    module(image.clone().requires_grad_()).sum().backward()  # they serve a training as well
    assert layers._doubling.cache_info().currsize == 1


def test_a_network_as_on_a_gpu_compiles_as_one_graph(as_on_gpu):
    torch.manual_seed(0)
    network = DiscreteNetwork(chain(0, 1, 0, num_depths=2), 1, 2, 1 / 16)
    assert_one_graph(network, torch.randn(1, 1, 8, 8, 8))


def test_which_layers_change_and_only_by_their_class():
    doubling = {"mode": "trilinear", "align_corners": True}
    expected = [
        (nn.Conv3d(2, 2, 3), Convolution),
        (nn.InstanceNorm3d(2, affine=True), InstanceNorm),
        (nn.InstanceNorm3d(2, track_running_stats=True), nn.InstanceNorm3d),
        (nn.Upsample(scale_factor=2, **doubling), Upsample),
        (nn.Upsample(scale_factor=1 / 2**0, **doubling), nn.Identity),
        (nn.Upsample(scale_factor=2, mode="trilinear"), nn.Upsample),
        (nn.Upsample(scale_factor=0.5, **doubling), nn.Upsample),
    ]
    network = nn.Sequential(*(layer for layer, _ in expected))
    state, parameters = network.state_dict(), list(network.parameters())
    assert accelerate(network) is network
    assert [type(layer) for layer in network] == [kind for _, kind in expected]
    assert network.state_dict().keys() == state.keys()
    assert all(mine is given for mine, given in zip(network.parameters(), parameters, strict=True))
