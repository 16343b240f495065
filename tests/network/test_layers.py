"""PyTorch's own layers are the oracle of dints/network/fast/layers.py."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from fractions import Fraction
from functools import cache

import published
import pytest
import torch
import torch.nn.functional as F
from architectures import chain, everything
from monai.networks.blocks.dints_block import FactorizedIncreaseBlock
from monai.networks.nets.dints import DiNTS, TopologySearch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tracing import assert_one_graph

import search_dints
from dints.data.tasks import TASKS
from dints.network.fast import layers
from dints.network.fast.acceleration import accelerate
from dints.network.fast.layers import Convolution, InstanceNorm, convolve, convolve_side_by_side
from dints.network.found import FoundNetwork
from dints.network.space import SearchSpace, supernet
from dints.network.weights import fitting_state
from dints.running.precision import Precision
from dints.running.processes import Processes
from dints.training import steps

# Batch, input and output channels, kernel, stride, spatial size, and how that is computed in fp32.
SHAPES = {
    "many voxels": (1, 16, 16, (3, 3, 3), 1, (16, 16, 16), "oneDNN"),
    "batch of two": (2, 16, 16, (3, 3, 3), 1, (16, 16, 16), "oneDNN without AVX-512"),
    "pads the first axis": (1, 32, 32, (3, 3, 1), 1, (16, 8, 16), "oneDNN"),
    "pads the first and last axis": (1, 32, 32, (3, 1, 3), 1, (8, 16, 16), "oneDNN"),
    "does not pad the first axis": (1, 32, 32, (1, 3, 3), 1, (8, 16, 16), "oneDNN"),
    "one row of the kernel": (1, 64, 64, (3, 1, 1), 1, (16, 16, 8), "oneDNN"),
    "stem": (1, 16, 32, (3, 3, 3), 2, (32, 32, 32), "oneDNN"),
    "few voxels, many weights": (1, 80, 160, (3, 3, 3), 1, (2, 4, 2), "product"),
    "few voxels, two images": (2, 80, 80, (3, 1, 3), 1, (2, 4, 2), "product"),
    "few voxels, stride": (3, 40, 80, (3, 3, 3), 2, (5, 4, 3), "product"),
    "few voxels in each of many images": (6, 64, 64, (3, 3, 3), 1, (4, 4, 2), "oneDNN without AVX-512"),
    "few voxels, few weights": (1, 8, 8, (3, 3, 3), 1, (4, 4, 4), "PyTorch"),
    "one voxel in the kernel": (1, 32, 64, (1, 1, 1), 1, (16, 16, 16), "PyTorch"),
    "one voxel in the kernel, stride": (2, 16, 8, (1, 1, 1), 2, (9, 8, 7), "PyTorch"),
    "two planes": (1, 32, 32, (3, 3, 3), 1, (2, 16, 16), "oneDNN"),
    "odd sizes": (1, 17, 23, (3, 3, 3), 1, (13, 15, 17), "oneDNN"),
}
MANY_AND_FEW_VOXELS = pytest.mark.parametrize("size", [(16, 16, 16), (2, 2, 2)], ids=["many voxels", "few voxels"])


@pytest.fixture(params=[True, False], ids=["AVX-512", "AVX2"])
def has_avx512(request, monkeypatch):
    """Compute as on processors with and without AVX-512: every one can do both, though not as fast."""
    monkeypatch.setattr(layers, "_HAS_AVX512", request.param)
    return request.param


def pair(channels: int, outputs: int, kernel, stride: int = 1, **options) -> tuple[nn.Conv3d, nn.Conv3d]:
    """Make PyTorch's convolution and ours with the same weights."""
    torch.manual_seed(0)
    padding = [size // 2 for size in kernel]
    plain = nn.Conv3d(channels, outputs, kernel, stride, padding, **{"bias": False, **options})
    return plain, accelerate(copy.deepcopy(plain))


def assert_same(plain, ours, image: torch.Tensor, parameters=((), ()), image_trained=True, tolerance=1e-5) -> None:
    """Compare results and gradients, by ``parameters`` of both and by the image: equal but for rounding."""
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
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def way(convolution: nn.Module, image: torch.Tensor) -> str:
    """Tell how a convolution is computed."""
    with Operations() as operations:
        convolution(image)
    ways = {"mkldnn_convolution.default": "oneDNN", "_linear_pointwise.default": "product"}
    return next((ways[name] for name in operations.names if name in ways), "PyTorch")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_convolution_is_pytorchs_and_each_shape_goes_its_way(shape, has_avx512):
    batch, channels, outputs, kernel, stride, size, expected = shape
    torch.manual_seed(0)
    image = torch.randn(batch, channels, *size)
    for trained in (("image", "weight"), ("image",), ("weight",)):
        plain, ours = (each.requires_grad_("weight" in trained) for each in pair(channels, outputs, kernel, stride))
        parameters = [list(each.parameters()) if "weight" in trained else [] for each in (plain, ours)]
        assert_same(plain, ours, image, parameters, image_trained="image" in trained)
    if expected == "oneDNN without AVX-512":
        expected = "PyTorch" if has_avx512 else "oneDNN"
    # Without oneDNN, on a processor that is not x86 or has no AVX2, everything stays PyTorch's.
    assert (way(plain, image), way(ours, image)) == ("PyTorch", expected if layers._HAS_ONEDNN else "PyTorch")


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}], ids=str
)
def test_other_convolutions_stay_pytorchs(options):
    plain, ours = pair(32, 32, (3, 3, 3), **options)
    image = torch.randn(1, 32, 16, 16, 16)
    assert way(ours, image) == "PyTorch"
    assert torch.equal(ours(image), plain(image))


@MANY_AND_FEW_VOXELS
def test_other_types_and_places_stay_pytorchs(size):
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


@pytest.mark.parametrize(("size", "expected"), [((16, 16, 16), "PyTorch"), ((2, 2, 2), "product")], ids=str)
def test_under_autocast_products_stay_in_fp32(size, expected):
    """Their results are nearer to the truth than PyTorch's in bf16."""
    plain, ours = pair(64, 64, (3, 3, 3))
    image = torch.randn(1, 64, *size).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert way(ours, image) == (expected if layers._HAS_ONEDNN else "PyTorch")
        result, theirs = ours(image), plain(image)
        result.float().square().sum().backward()
    assert ours.weight.grad.dtype == torch.float32
    assert_nearer(result, theirs, copy.deepcopy(plain).double()(image.double()))


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 16, 16), (1, 4, 4), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 3), (3, 1, 1), (1, 3, 3), (5, 5, 5)], ids=str)
def test_gradients_in_bf16_are_right_where_pytorchs_are_what_lay_in_memory(size, kernel):
    plain, ours = pair(16, 16, kernel)
    image = torch.randn(1, 16, *size)
    mix = torch.randn(1, 16, *size)
    (expected,) = torch.autograd.grad((plain(image) * mix).sum(), plain.weight)
    for _ in range(3):
        unwritten = [torch.full_like(expected, torch.nan) for _ in range(4)]
        del unwritten  # the next tensors get their memory
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = ours(image)
        (found,) = torch.autograd.grad((result.float() * mix).sum(), ours.weight)
        assert result.dtype == torch.bfloat16
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


UNIT = 2**-9  # of bfloat16: the largest relative error of rounding a number to it
# Tests of bf16 against fp32: of the output, the last axis; and batch and the other axes, which take turns.
WIDTHS = (*range(1, 9), 12, 24)
OTHERS = ((1, 2, 4), (2, 1, 2), (1, 4, 3))
CHANNELS = (1, 3, 8, 16, 32, 128)


@cache
def kinds() -> list[tuple]:
    """List what a network is made of: kernel, stride, padding, whether with a bias, and output for input channels."""
    found = set()
    for use_downsample in (True, False):
        architecture = replace(everything(2, 3), use_downsample=use_downsample)
        with torch.device("meta"):
            network = FoundNetwork(architecture, 1, 2, 1 / 16)
        for layer in network.modules():
            if isinstance(layer, nn.Conv3d):
                ratio = Fraction(layer.out_channels, layer.in_channels)
                found.add((layer.kernel_size, layer.stride, layer.padding, layer.bias is not None, ratio))
    return sorted(found)


def in_numbers_of_bfloat16(*shape: int) -> torch.Tensor:
    """Draw numbers that bfloat16 has, so that nothing but what is computed is rounded."""
    return torch.randn(shape).bfloat16().float()


def results_in(kind: torch.dtype, call, image: torch.Tensor, mix: torch.Tensor, parameters) -> list[torch.Tensor]:
    """Return the result of ``call`` in this type, and the gradients by the image and the parameters."""
    image = image.to(kind).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == torch.bfloat16):
        result = call(image)
    assert result.dtype == kind
    unwritten = [torch.full_like(each, torch.nan) for each in (image, *parameters, *parameters)]
    del unwritten  # the gradients get their memory
    return [result.detach(), *torch.autograd.grad(result, [image, *parameters], mix.to(kind))]


def errors_in_bfloat16(ours, plain, image, mix, of_ours, of_plain) -> list[float]:
    """Return how far `results_in` bf16 are from fp32's, by the norms that these have where no terms cancel by chance.

    Those are known from the squares of all numbers: of independent terms, the squares add.
    """
    found = results_in(torch.bfloat16, ours, image, mix, of_ours)
    expected = results_in(torch.float32, plain, image, mix, of_plain)
    with torch.no_grad():
        before = [each.clone() for each in of_plain]
        torch._foreach_mul_(of_plain, of_plain)
        image, mix = image.square(), mix.square()
    squares = results_in(torch.float32, plain, image, mix, of_plain)
    with torch.no_grad():
        torch._foreach_copy_(of_plain, before)
    return [
        ((got.float() - right).norm() / square.sum().sqrt()).item()
        for got, right, square in zip(found, expected, squares, strict=True)
    ]


def test_bfloat16_is_fp32_in_every_shape_of_a_network_on_this_machine():
    """A failure here is a kernel of this machine that is wrong: `layers._by_pytorch` has to go around it.

    Products are summed in fp32, rounded once, and a weight's gradient again where a batch is summed. Without AVX-512
    PyTorch rounds an image's gradient after each voxel of the kernel: errors that add like the steps of a random walk.
    """
    torch.manual_seed(0)
    wrong, number = [], 0
    for kernel, stride, padding, bias, ratio in kinds():
        tolerance = UNIT * (2 + math.sqrt(math.prod(kernel)))
        for channels in {max(count, ratio.denominator) for count in CHANNELS if count * max(ratio, 1) <= 128}:
            plain = nn.Conv3d(channels, int(channels * ratio), kernel, stride, padding, bias=bias)
            for parameter in plain.parameters():
                parameter.data = in_numbers_of_bfloat16(*parameter.shape) / 4
            ours = accelerate(copy.deepcopy(plain))
            for width in WIDTHS:
                number += 1
                batch, *other = OTHERS[number % len(OTHERS)]
                size = [count * step for count, step in zip((*other, width), stride, strict=True)]
                if stride == kernel or number % 2 and math.prod(stride) > 1 == math.prod(kernel):
                    size = [max(count - 1, 1) for count in size]  # as the second half of a change of resolution sees it
                image = in_numbers_of_bfloat16(batch, plain.in_channels, *size)
                mix = in_numbers_of_bfloat16(*plain(image).shape)
                found = errors_in_bfloat16(ours, plain, image, mix, [*ours.parameters()], [*plain.parameters()])
                if not max(found) <= tolerance:
                    wrong.append((kernel, stride, tuple(image.shape), plain.out_channels, found))
    assert number > 500
    assert not wrong, f"{len(wrong)} of {number} shapes, the first: {wrong[0]}"


class Faulty(TorchDispatchMode):
    """Has the faults of oneDNN 3.12 in bfloat16: NaN where results, or memory that nobody wrote, would be wrong."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default and args[0].dtype == torch.bfloat16:
            return self._broken(result) if self._strides_wrongly(args[0], args[1], args[3], args[4]) else result
        if function is torch.ops.aten.convolution_backward.default and args[1].dtype == torch.bfloat16:
            of_image, of_weight, of_bias = result
            _, image, weight, _, stride, padding = args[:6]
            if self._strides_wrongly(image, weight, stride, padding):
                of_image = of_image if of_image is None else self._broken(of_image)
            if padding[0] and image.shape[2] < weight.shape[2] and of_weight is not None:
                of_weight = self._broken(of_weight)
            return of_image, of_weight, of_bias
        return result

    def _broken(self, result: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return torch.full_like(result, torch.nan)

    @staticmethod
    def _strides_wrongly(image, weight, stride, padding) -> bool:
        outputs = (image.shape[4] + 2 * padding[2] - weight.shape[4]) // stride[2] + 1
        larger = any(step > size for step, size in zip(stride, weight.shape[2:], strict=True))
        return larger or (outputs == 1 and stride[2] > 1)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [
        ((3, 3, 3), 2, (4, 6, 2)),
        ((3, 3, 3), 2, (8, 8, 1)),
        ((3, 3, 3), (1, 1, 2), (2, 4, 2)),
        ((3, 3, 3), 2, (2, 8, 4)),
        ((1, 1, 1), 2, (4, 6, 8)),
        ((1, 1, 1), 2, (3, 5, 1)),
        ((3, 1, 1), 1, (2, 4, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_no_faulty_kernel_is_called(kernel, stride, size, bias):
    torch.manual_seed(0)
    plain, ours = pair(3, 8, kernel, stride, bias=bias)
    image = in_numbers_of_bfloat16(2, 3, *size)
    mix = in_numbers_of_bfloat16(*plain(image).shape)
    with Faulty() as faulty:
        theirs = results_in(torch.bfloat16, plain, image, mix, [*plain.parameters()])
        assert faulty.seen and any(each.isnan().any() for each in theirs)
        faulty.seen = 0
        errors = errors_in_bfloat16(ours, plain, image, mix, [*ours.parameters()], [*plain.parameters()])
        assert max(errors) < 0.02 and not faulty.seen
        assert torch.isfinite(copy.deepcopy(ours).bfloat16()(image.bfloat16())).all()  # without autocast
        assert torch.isfinite(ours(image[0])).all()  # without a batch axis
    assert not faulty.seen


@pytest.mark.parametrize("groups", [1, 2])
def test_no_faulty_kernel_is_called_for_several_at_once(groups):
    """Of two planes, with as many voxels as it takes to join convolutions to one call."""
    torch.manual_seed(0)
    plain = [nn.Conv3d(2, 2, 3, padding=1, bias=False) for _ in range(groups)]
    weights = [convolution.weight for convolution in plain]
    ours = accelerate(nn.ModuleList(copy.deepcopy(plain)))
    image, mix = in_numbers_of_bfloat16(1, 2 * groups, 2, 8, 8), in_numbers_of_bfloat16(1, 2 * groups, 2, 8, 8)

    def one_by_one(whole):
        return torch.cat([each(part) for each, part in zip(plain, whole.chunk(groups, 1), strict=True)], 1)

    with Faulty() as faulty:
        for call, own in (
            (lambda whole: convolve_side_by_side(ours, whole), [*ours.parameters()]),
            (lambda whole: convolve(torch.cat(weights), whole, groups), weights),
        ):
            assert max(errors_in_bfloat16(call, one_by_one, image, mix, own, weights)) < 0.02
    assert not faulty.seen


@pytest.mark.parametrize("use_downsample", [True, False])
def test_networks_meet_no_faulty_kernel(use_downsample):
    """Of patches whose deepest level is one voxel wide and two high, as the recipes' thinnest are."""
    torch.manual_seed(0)
    image = torch.randn(1, 1, *((8, 16, 4) if use_downsample else (4, 8, 2)))
    architecture = replace(everything(2, 2), use_downsample=use_downsample)
    space = SearchSpace(1 / 16, 2, 2, use_downsample=use_downsample)
    for network in (FoundNetwork(architecture, 1, 2, 1 / 16), supernet(space, 1, 2)):
        expected = network(image)
        with Faulty() as faulty:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores = network(image)
            scores.float().square().sum().backward()
        assert not faulty.seen
        assert (scores - expected).norm() < 0.1 * expected.norm()
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)


def test_a_compiler_is_given_no_faulty_kernel():
    torch.manual_seed(0)
    network = FoundNetwork(chain(0, 1, 0, num_depths=2), 1, 2, 1 / 16)
    image, faulty = torch.randn(1, 1, 8, 16, 4), Faulty()

    def on_this_machine(graph, _):
        def run(*inputs):
            with faulty:
                return graph(*inputs)

        return run

    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = torch.compile(network, fullgraph=True, dynamic=False, backend=on_this_machine)(image)
    with faulty:
        scores.float().square().sum().backward()
    assert not faulty.seen
    assert (scores - network(image)).norm() < 0.1 * network(image).norm()


@pytest.mark.parametrize("size", [(16, 8, 8), (4, 4, 4), (2, 2, 2), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 3, 1), (1, 1, 1)], ids=str)
def test_convolutions_side_by_side_are_those_one_by_one(size, batch, kernel, has_avx512):
    channels, groups = 40, 3
    torch.manual_seed(0)
    plain = [nn.Conv3d(channels, channels, kernel, 1, [k // 2 for k in kernel], bias=False) for _ in range(groups)]
    ours = accelerate(nn.ModuleList(copy.deepcopy(plain)))
    assert_same(
        lambda whole: torch.cat([each(part) for each, part in zip(plain, whole.chunk(groups, 1), strict=True)], 1),
        lambda whole: convolve_side_by_side(ours, whole),
        torch.randn(batch, groups * channels, *size),
        [[convolution.weight for convolution in convolutions] for convolutions in (plain, ours)],
    )


@pytest.mark.parametrize("size", [(16, 8, 8), (2, 2, 2), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm(size, batch, affine):
    torch.manual_seed(0)
    plain = nn.InstanceNorm3d(6, affine=affine)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    ours = accelerate(copy.deepcopy(plain))
    image = 3 * torch.randn(batch, 6, *size) + 5
    parameters = [list(norm.parameters()) for norm in (plain, ours)]
    assert_same(plain, ours, image, parameters, tolerance=1e-4 if size == (3, 1, 1) else 1e-5)
    torch.testing.assert_close(ours(image[0]), plain(image[0]), rtol=1e-4, atol=1e-5)  # without a batch axis


def test_instance_norm_refuses_what_pytorch_refuses():
    norm = accelerate(nn.InstanceNorm3d(6))
    for shape, message in (((2, 6, 1, 1, 1), "more than 1 spatial element"), ((2, 6, 1), "expected 4D or 5D input")):
        with pytest.raises(ValueError, match=message):
            norm(torch.randn(shape))


@pytest.mark.parametrize("size", [(2, 2, 2), (4, 4, 4), (8, 8, 8), (1, 2, 3), (5, 7, 11)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_upsample(size, batch):
    torch.manual_seed(0)
    plain = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True)
    ours = accelerate(copy.deepcopy(plain))
    image = torch.randn(batch, 3, *size)
    assert_same(plain, ours, image)
    assert torch.equal(ours(image.double()), plain(image.double()))
    half = image.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, theirs = ours(half), plain(half)
    assert_nearer(result, theirs, plain(half.double()))


def test_single_voxels_with_a_stride_and_padding():
    plain = nn.Conv3d(4, 6, 1, (2, 1, 3), padding=(1, 0, 1))
    image = torch.randn(2, 4, 5, 6, 7)
    assert_same(plain, accelerate(copy.deepcopy(plain)), image)
    plain.padding = (0, 0, 0)
    ours = accelerate(copy.deepcopy(plain))
    assert_same(plain, ours, image, (tuple(plain.parameters()), tuple(ours.parameters())))
    with Operations() as operations:
        ours(image)
    assert "clone.default" in operations.names or not layers._HAS_ONEDNN


@pytest.mark.parametrize("size", [(2, 2, 2), (8, 8, 8), (5, 7, 11)], ids=str)
def test_doubling_before_a_convolution(size):
    torch.manual_seed(0)
    plain = FactorizedIncreaseBlock(6, 3)
    ours = accelerate(copy.deepcopy(plain))
    image = torch.randn(2, 6, *size)
    assert_same(plain, ours, image, (tuple(plain.parameters()), tuple(ours.parameters())), tolerance=1e-4)
    exact = copy.deepcopy(plain).double()
    gradients = []
    for block, kind in ((exact, torch.float64), (plain, torch.bfloat16), (ours, torch.bfloat16)):
        given = image.bfloat16().to(kind).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind is torch.bfloat16):
            result = block(given)
        assert result.is_contiguous() and result.dtype == kind
        mix = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
        wanted = [given, *block.parameters()]
        gradients.append([result.detach(), *torch.autograd.grad((result * mix).sum(), wanted)])
    for expected, theirs, found in zip(*gradients, strict=True):
        errors = [(value - expected).norm() / expected.norm() for value in (found, theirs)]
        assert errors[0] < max(1.5 * errors[1], 0.01)  # bfloat16 keeps 0.004


def doubled_by_pytorch(image: torch.Tensor) -> torch.Tensor:
    return F.interpolate(image, scale_factor=2, mode="trilinear", align_corners=True)


def doubling() -> nn.Module:
    return accelerate(nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True))


@pytest.mark.parametrize("size", [(2, 2, 2), (1, 1, 1), (1, 2, 3), (5, 1, 11), (24, 3, 1), (16, 12, 20)], ids=str)
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_doubling_as_on_a_gpu_is_pytorchs(size, kind, tolerance, as_on_gpu):
    torch.manual_seed(0)
    image, mix = torch.randn(2, 3, *size, dtype=kind), torch.randn(2, 3, *(2 * count for count in size), dtype=kind)
    results = []
    for call in (doubled_by_pytorch, doubling()):
        given = image.clone().requires_grad_()
        result = call(given)
        results.append((result.detach(), *torch.autograd.grad(result, given, mix)))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == kind and found.shape == expected.shape and found.is_contiguous()
        assert (found - expected).norm() < tolerance * expected.norm()


def test_gradients_of_doubling_as_on_a_gpu(as_on_gpu):
    image = torch.randn(1, 2, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(doubling(), image)
    assert torch.autograd.gradgradcheck(doubling(), image)


def test_doubling_as_on_a_gpu_adds_nothing_in_place_and_keeps_no_volume(as_on_gpu):
    """PyTorch's own backward pass adds to the gradient from many threads at once, in whatever order."""
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes() // 4)
        return tensor

    image = torch.randn(1, 4, 6, 8, 10, requires_grad=True)
    with Operations() as operations, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        doubling()(image).sum().backward()
    assert {name for name in operations.names if "mm" in name} == {"mm.default", "bmm.default"}
    assert not [name for name in operations.names if "upsample_trilinear" in name or "scatter" in name]
    assert sorted(kept) == [2 * 6 * 6, 2 * 8 * 8, 2 * 10 * 10]  # the matrices


def as_atomics_add(gradient: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Compute the gradient of doubling as GPUs do with atomics: each of 64 or so terms is rounded, and each sum."""
    matrix = layers._doubling_of_volume(*size)
    total = torch.zeros(*gradient.shape[:2], math.prod(size), dtype=gradient.dtype)
    for share, of_voxel in zip(matrix, gradient.flatten(2).unbind(-1), strict=True):
        total += (of_voxel.float()[..., None] * share).to(gradient.dtype)
    return total.view(*gradient.shape[:2], *size)


@pytest.mark.parametrize("size", [(6, 6, 6), (4, 3, 8)], ids=str)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_doubling_in_two_bytes_is_nearer_than_atomics(size, kind, as_on_gpu):
    torch.manual_seed(0)
    image = torch.randn(1, 8, *size).to(kind).requires_grad_()
    mix = torch.randn(1, 8, *(2 * count for count in size)).to(kind)
    with torch.autocast("cpu", dtype=kind):
        result = doubling()(image)
        assert doubling()(image.float()).dtype == torch.float32  # as PyTorch has it
    (found,) = torch.autograd.grad(result, image, mix)
    exact = image.detach().double().requires_grad_()
    expected = doubled_by_pytorch(exact)
    (gradient,) = torch.autograd.grad(expected, exact, mix.double())
    assert result.dtype == found.dtype == kind
    errors = [((each - gradient).norm() / gradient.norm()).item() for each in (found, as_atomics_add(mix, size))]
    assert errors[0] < 0.7 * errors[1]
    assert (result - expected).norm() < torch.finfo(kind).eps * expected.norm()


def test_the_matrices_are_kept_but_not_of_what_is_traced(as_on_gpu):
    layers._doubling.cache_clear()
    image, module = torch.randn(1, 1, 3, 3, 3), doubling()
    torch.export.export(module, (image,))
    assert layers._doubling.cache_info().currsize == 0
    with torch.inference_mode():
        module(image)
    module(image.clone().requires_grad_()).sum().backward()  # they serve a training as well
    assert layers._doubling.cache_info().currsize == 1


@pytest.mark.parametrize("kind", ["found network", "supernet"])
def test_networks_as_on_a_gpu_are_monais(kind, as_on_gpu):
    torch.manual_seed(0)
    if kind == "supernet":
        size = {"num_blocks": 2, "num_depths": 3, "channel_mul": 1 / 16}
        theirs, ours = DiNTS(published.quiet(TopologySearch, **size), 2, 3), supernet(SearchSpace(**size), 2, 3)
        ours.load_state_dict(theirs.state_dict())
    else:
        theirs, ours = published.network(everything(2, 3), 2, 3, 1 / 16), FoundNetwork(everything(2, 3), 2, 3, 1 / 16)
        ours.load_state_dict(fitting_state(ours, theirs.state_dict(), "MONAI's", ours.unused_stems))
    image, mix = torch.randn(2, 2, 16, 32, 16).double(), torch.randn(2, 3, 16, 32, 16).double()
    found = []
    for network in (theirs.double(), ours.double()):
        with Operations() as operations:
            scores = network(image)
        (scores * mix).mean().backward()
        found.append((scores, dict(network.named_parameters())))
    assert "bmm.default" in operations.names
    (expected, of_theirs), (scores, of_ours) = found
    assert (scores - expected).norm() < 1e-9 * expected.norm()
    for name, parameter in of_ours.items():
        if parameter.grad is not None:
            assert (parameter.grad - of_theirs[name].grad).norm() < 1e-9 * of_theirs[name].grad.norm(), name


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_steps_of_both_stages_as_on_a_gpu(name, monkeypatch):
    """They take the losses and gradients that they take with PyTorch's upsampling."""
    cpu = torch.device("cpu")
    alone, task = Processes(0, 1, cpu), replace(TASKS["Task07_Pancreas"], patch_size=(16, 16, 16))
    settings = "--root . --output_root . --channel_mul 0.0625 --num_blocks 2 --num_depths 3 --patch_size 16 16 16"
    shape = (2, task.num_channels, 16, 16, 16)
    batch = {"image": torch.rand(shape), "label": torch.randint(0, 3, shape, dtype=torch.uint8), "cases": ["a", "b"]}
    monkeypatch.setattr(layers, "_can_take", lambda image: False)
    found = []
    for on_gpu in (False, True):
        monkeypatch.setattr(layers, "_is_on_gpu", lambda image, on_gpu=on_gpu: on_gpu)
        torch.manual_seed(0)
        searched = search_dints.Supernet(search_dints.parse_args(settings.split()), task, Precision(name, cpu), alone)
        losses = [search_dints.weights_step(searched, batch), search_dints.architecture_step(searched, batch, 0.5)]
        network = FoundNetwork(everything(2, 3), task.num_channels, task.num_classes, 1 / 16)
        training = steps.weights_training(network, network.parameters(), Precision(name, cpu), alone, learning_rate=0.1)
        losses.append(steps.weights_step(training, batch))
        found.append(torch.stack([loss.detach().float() for loss in losses]))
    torch.testing.assert_close(*found, rtol=1e-5 if name == "fp32" else 0.02, atol=0)


def test_a_network_as_on_a_gpu_compiles_as_one_graph(as_on_gpu):
    torch.manual_seed(0)
    assert_one_graph(FoundNetwork(chain(0, 1, 0, num_depths=2), 1, 2, 1 / 16), torch.randn(1, 1, 8, 8, 8))


@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
def test_upsampling_by_one_is_nothing(mode):
    plain = nn.Upsample(scale_factor=1 / 2**0, mode=mode, align_corners=True if mode == "trilinear" else None)
    image = torch.randn(2, 3, 5, 7, 11)
    assert torch.equal(plain(image), image) and accelerate(copy.deepcopy(plain))(image) is image


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 2, "mode": "trilinear"},
        {"scale_factor": 2},
        {"scale_factor": 0.5, "mode": "trilinear", "align_corners": True},
        {"size": 8, "mode": "trilinear", "align_corners": True},
    ],
    ids=str,
)
def test_other_upsampling_stays_pytorchs(options):
    assert type(accelerate(nn.Upsample(**options))) is nn.Upsample


def test_only_the_class_of_a_layer_changes():
    kinds = [nn.Conv3d(2, 2, 3), nn.Sequential(nn.Conv2d(2, 2, 3)), nn.ConvTranspose3d(2, 2, 3)]
    kinds += [nn.InstanceNorm3d(2, affine=True), nn.InstanceNorm3d(2, track_running_stats=True), nn.InstanceNorm2d(2)]
    network = nn.Sequential(*kinds)
    state, parameters = network.state_dict(), list(network.parameters())
    assert accelerate(network) is network
    types = [nn.Sequential, nn.Conv2d, nn.ConvTranspose3d, InstanceNorm, nn.InstanceNorm3d, nn.InstanceNorm2d]
    assert [type(layer) for layer in network.modules()][1:] == [Convolution, *types]
    assert network.state_dict().keys() == state.keys()
    assert all(mine is given for mine, given in zip(network.parameters(), parameters, strict=True))


@MANY_AND_FEW_VOXELS
def test_the_same_bits_every_time(size):
    """A continued run must round as the first one did."""
    _, ours = pair(64, 64, (3, 3, 3))
    image = torch.randn(1, 64, *size)
    gradients = []
    for _ in range(3):
        ours.zero_grad()
        ours(image).square().sum().backward()
        gradients.append(ours.weight.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
