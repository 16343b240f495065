"""Operations that are composed compute what MONAI's cells compute, one by one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from dints.network.cells import cell_of
from dints.network.fast import composition
from dints.network.fast.composition import composed
from dints.network.fast.mixing import cells_together, mix
from dints.network.operations import OPERATIONS, PUBLISHED, ActivatedConvolutions, Operation
from dints.network.space import SearchSpace, supernet

CPU = torch.device("cpu")
CHANNELS = 3


def cells_and_images(count: int, names: tuple[str, ...] = PUBLISHED) -> tuple[nn.ModuleList, list, torch.Tensor]:
    """Make cells without a change of resolution, an image for each, and weights of their operations, in float64."""
    torch.manual_seed(0)
    cells = nn.ModuleList([cell_of(names)(CHANNELS, CHANNELS, 0) for _ in range(count)]).double()
    for weight in cells.parameters():
        nn.init.normal_(weight)
    images = [torch.randn(2, CHANNELS, 5, 6, 7, dtype=torch.double, requires_grad=True) for _ in range(count)]
    return cells, images, torch.rand(count, len(names), dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("together", [True, False], ids=["side by side", "one at a time, as on a GPU"])
def test_a_mix_and_its_gradients_are_those_of_the_cells(together, monkeypatch):
    if not together:
        monkeypatch.setattr("dints.network.fast.mixing.cells_together", lambda count, device: 1)
    cells, images, weights = cells_and_images(3)
    wanted, results = [*images, weights, *cells.parameters()], []
    parts = composed(cells, weights, 3 if together else 1)
    assert len(parts) == (1 if together else 3) and parts[0].operations == (1, 2, 3, 4)
    for mixed in (
        sum(cell(image, weight) for cell, image, weight in zip(cells, images, weights, strict=True)),
        mix(cells, images, weights, parts),
    ):
        noise = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
        results.append([mixed, *torch.autograd.grad((mixed * noise).sum(), wanted)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_zeros_beyond_the_border_are_composed_too():
    """Of each pair by itself, and at every border: the image is as small as the kernel."""
    for name in ("conv_3x3x1", "conv_3x1x3", "conv_1x3x3"):
        (cell,), (image,), weights = cells_and_images(1, (name,))
        (part,) = composed([cell], weights, 1)
        block, small = cell.op.ops[0], image[..., :3, :3, :3]
        chain = list(block)[1:-1]
        expected = chain[1](chain[0](small))
        torch.testing.assert_close(nn.functional.conv3d(small, part.kernels, padding=1), expected)


OTHERS = {
    "dilated": partial(ActivatedConvolutions, kernels=[(3, 3, 3)], dilation=2),
    "grouped": partial(ActivatedConvolutions, kernels=[(3, 3, 3)], groups=CHANNELS),
    "twice": partial(ActivatedConvolutions, kernels=[(3, 3, 3), (3, 3, 3)]),  # together 5x5x5, and other borders
    "small": partial(ActivatedConvolutions, kernels=[(1, 1, 1)]),
    "three": partial(ActivatedConvolutions, kernels=[(3, 1, 1), (1, 3, 1), (1, 1, 3)]),
}


@pytest.mark.parametrize(("name", "composes"), [*((name, name == "three") for name in OTHERS)])
def test_what_does_not_compose_to_3x3x3_is_computed_as_before(name, composes, monkeypatch):
    monkeypatch.setitem(OPERATIONS, name, Operation("", "", "", 3, OTHERS[name]))
    cells, images, weights = cells_and_images(2, ("skip_connect", name, "conv_3x1x3"))
    parts = composed(cells, weights, 2)
    assert parts[0].operations == ((1, 2) if composes else (2,))
    expected = sum(cell(image, weight) for cell, image, weight in zip(cells, images, weights, strict=True))
    torch.testing.assert_close(mix(cells, images, weights, parts), expected, rtol=1e-10, atol=1e-10)


def test_where_nothing_composes_there_is_nothing():
    cells, _, weights = cells_and_images(2, ("skip_connect",))
    assert composed(cells, weights, 2) is None


def test_a_whole_supernet_is_the_same_with_and_without(monkeypatch):
    torch.manual_seed(0)
    network = supernet(SearchSpace(0.125, 3, 3), 1, 2).double()
    for alpha in (network.dints_space.log_alpha_a, network.dints_space.log_alpha_c):
        nn.init.normal_(alpha)
    image, results = torch.randn(2, 1, 16, 16, 16, dtype=torch.double), []
    for channels in (0, 4, 1000):  # none, those of the finest resolution, all
        monkeypatch.setattr(composition, "MAX_CHANNELS_ON_CPU", channels)
        scores = network(image)
        wanted = [weight for weight in network.parameters()]
        gradients = torch.autograd.grad(scores.square().mean(), wanted, allow_unused=True)
        results.append([scores, *(gradient for gradient in gradients if gradient is not None)])
    for other in results[1:]:
        for expected, found in zip(results[0], other, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_kernels_are_cast_once_to_what_autocast_computes_in():
    cells, _, weights = cells_and_images(2)
    cells, weights = cells.float(), weights.detach().float()
    exact = composed(cells, weights, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = composed(cells, weights, 1)
    for one, other in zip(exact, cast, strict=True):
        assert other.kernels.dtype == torch.bfloat16 and other.scale.dtype == torch.float32
        assert torch.equal(other.kernels, one.kernels.bfloat16())  # composed in fp32 all the same


def test_gradients_of_stacked_weights_lie_as_the_weights_do():
    """Else each of hundreds would be copied."""
    cells, images, weights = cells_and_images(2)
    mixed = mix(cells, images, weights, composed(cells, weights, 2))
    assert all(gradient.is_contiguous() for gradient in torch.autograd.grad(mixed.sum(), list(cells.parameters())))


def test_a_gpu_always_composes_and_takes_a_cell_at_a_time():
    wide = torch.empty(1, 64, 4, 4, 4)
    assert composition.pays(wide.to("meta")) and not composition.pays(wide)
    assert composition.pays(torch.empty(1, 8, 4, 4, 4))
    assert cells_together(3, CPU) == 3 and cells_together(3, torch.device("cuda")) == 1
