"""MONAI's sum of ``cell(image, weight)`` is the oracle of dints/network/fast/mixing.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dints.network.cells import cell_of
from dints.network.fast.mixing import mix
from dints.network.operations import PUBLISHED

# Channels and edge of the input of a cell that leads to 4 channels of 8x8x8 voxels, by its change of resolution.
INPUTS = {-1: (2, 16), 0: (4, 8), 1: (8, 4)}


def inputs(*rates: int) -> tuple[nn.ModuleList, list[torch.Tensor], torch.Tensor]:
    """Make cells, an image for each, and weights of their operations."""
    torch.manual_seed(0)
    cells = nn.ModuleList([cell_of(PUBLISHED)(INPUTS[rate][0], 4, rate) for rate in rates])
    images = [torch.randn(2, INPUTS[rate][0], *[INPUTS[rate][1]] * 3) for rate in rates]
    weights = torch.rand(len(rates), len(PUBLISHED))
    return cells, [image.requires_grad_() for image in images], weights.requires_grad_()


def one_by_one(cells, images, weights: torch.Tensor) -> torch.Tensor:
    """Mix as MONAI does."""
    return sum(cell(image, weight) for cell, image, weight in zip(cells, images, weights, strict=True))


@pytest.mark.parametrize("rates", [(0,), (-1,), (0, 1), (-1, 0, 1)], ids=str)
def test_cells_side_by_side_are_cells_one_by_one(rates):
    cells, images, weights = inputs(*rates)
    wanted = [*images, weights, *cells.parameters()]
    results = []
    for way in (one_by_one, mix):
        mixed = way(cells, images, weights)
        by_a_mix = (mixed * torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1))).sum()
        results.append([mixed, *torch.autograd.grad(by_a_mix, wanted)])
    for expected, found in zip(*results, strict=True):
        scale = expected.detach().abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale)


def test_no_published_operation_is_computed_by_itself():
    cells, images, weights = inputs(-1, 0, 1)
    called = []
    for operation in (operation for cell in cells for operation in cell.op.ops):
        operation.register_forward_hook(lambda module, *_: called.append(module))
    mix(cells, images, weights)
    assert called == []
    one_by_one(cells, images, weights)
    assert len(called) == 3 * len(PUBLISHED)


def test_on_another_device_cells_are_taken_one_at_a_time():
    cells, images, weights = inputs(0, 0, 0)
    there = [image.detach().to("meta") for image in images]
    sizes = []
    for cell in cells.to("meta"):
        cell.op.ops[1].acti.register_forward_hook(lambda module, given, _: sizes.append(tuple(given[0].shape)))
    assert mix(cells, there, weights.to("meta")).shape == (2, 4, 8, 8, 8)
    assert sizes == [(2, 4, 8, 8, 8)] * 3  # side by side, it would be one of 12 channels


def test_under_autocast_the_type_is_the_images_and_the_error_is_monais():
    cells, images, weights = inputs(0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        lower = [image.bfloat16() for image in images]
        expected, found = (way(cells, lower, weights) for way in (one_by_one, mix))
    assert found.dtype == torch.bfloat16
    truth = one_by_one(cells, images, weights).detach()
    assert (found - truth).abs().max() < 2 * (expected - truth).abs().max()
