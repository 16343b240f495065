"""MONAI's `DiNTS` over a `TopologyInstance` is the oracle of the discrete network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import published
import pytest
import torch
from architectures import chain, connected, everything, random_architecture
from monai.networks.nets.dints import DiNTS
from tracing import assert_one_graph

from dints.errors import UserError
from dints.network.architecture import Architecture
from dints.network.discrete import DiscreteNetwork, check_patch_size
from dints.network.weights import fitting_state

SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels
UP_AND_DOWN = chain(2, 1, 0, 1, num_depths=3, operation=4)
# Of all inputs used and not, and the deepest output used and not; of all operations
ARCHITECTURES = {
    "all paths": everything(2, 3),
    "down and up": chain(0, 1, 2, 1, 0, num_depths=3, operation=4),
    "deepest nodes only": chain(2, 2, num_depths=3, operation=2),
    "all inputs, finest output": connected(np.array([[1, 1, 0, 0]]), np.full((1, 4), 3)),
    "random, 4 depths": random_architecture(7, 4, 4),
    "full resolution, all paths": replace(everything(2, 3), use_downsample=False),
    "full resolution, up and down": replace(UP_AND_DOWN, use_downsample=False),
}


def without_unused_stems(state: dict, architecture: Architecture) -> dict:
    """Leave out MONAI's stems at inactive inputs and below the deepest output."""
    inputs, outputs = (np.flatnonzero(architecture.node_a[row]) for row in (0, -1))
    depths = range(architecture.num_depths)
    unused = [f"stem_down.{depth}." for depth in depths if depth not in inputs]
    unused += [f"stem_up.{depth}." for depth in depths if depth > max(outputs)]
    return {key: value for key, value in state.items() if not key.startswith(tuple(unused))}


def both_networks(architecture: Architecture) -> tuple[DiNTS, DiscreteNetwork]:
    """Build MONAI's network and ours, with equal weights."""
    torch.manual_seed(0)
    theirs = published.network(architecture, 2, 3, SMALL)
    ours = DiscreteNetwork(architecture, 2, 3, SMALL)
    ours.load_state_dict(fitting_state(ours, theirs.state_dict(), "MONAI's", ours.unused_stems))
    return theirs, ours


def scores_and_gradients(
    network: torch.nn.Module, num_depths: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the scores, and the gradients of the image and each parameter, 0 if it has none."""
    generator = torch.Generator().manual_seed(1)
    voxels = (2 ** (num_depths + 1),) * 3
    image, mix = (
        torch.randn(2, channels, *voxels, generator=generator).to(dtype) for channels in (2, 3)
    )
    network, image = network.to(dtype), image.requires_grad_()
    network.zero_grad()
    scores = network(image)
    (scores * mix).mean().backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in network.named_parameters()
    }
    return {"scores": scores.detach(), "image": image.grad, **gradients}


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_it_is_monais_network(architecture):
    """In fp32 it is as exact; there the digits that are lost depend on the processor."""
    theirs, ours = both_networks(architecture)
    assert list(ours.state_dict()) == list(without_unused_stems(theirs.state_dict(), architecture))
    rounded, found_rounded, expected, found = (
        scores_and_gradients(network, architecture.num_depths, dtype)
        for dtype in (torch.float32, torch.float64)
        for network in (theirs, ours)
    )
    for name, values in found.items():
        largest = float(expected[name].abs().max())
        assert values.abs().max() > 0, f"{name} does not train"
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-9 * largest)
        error, allowed = (
            (values[name] - expected[name]).abs().max() for values in (found_rounded, rounded)
        )
        assert error <= 4 * allowed + 1e-4 * largest, f"{name}: {error:.1e} of {largest:.1e}"
    for name in expected.keys() - found.keys():  # what we leave out never trains in MONAI's network
        assert not expected[name].any(), name


def test_it_compiles_as_one_graph_and_exports():
    network = DiscreteNetwork(ARCHITECTURES["down and up"], 2, 3, SMALL)
    image = torch.randn(1, 2, 16, 16, 16)
    assert_one_graph(network, image)
    network.eval()
    exported = torch.export.export(network, (image,))
    # runs on any machine
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(image), network(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("num_depths", "use_downsample", "patch_size", "suggestion"),
    [
        (4, True, (80, 48, 16), None),
        (2, False, (6, 6, 6), None),
        (3, True, (8, 8, 8), (16, 16, 16)),
        (3, True, (4, 4, 20), (8, 8, 16)),
        (4, True, (-32, 32, 32), (16, 32, 32)),
        (4, False, (8, 8, 12), (8, 8, 16)),
    ],
    ids=str,
)
def test_patch_sizes_that_do_not_fit_are_refused_with_one_that_does(
    num_depths, use_downsample, patch_size, suggestion
):
    """No size is refused that the network can compute, and none passes that it cannot."""
    architecture = replace(everything(1, num_depths), use_downsample=use_downsample)
    with torch.device("meta"):
        network = DiscreteNetwork(architecture, 1, 2, SMALL)
    if suggestion is not None:
        size, suggested = (" ".join(map(str, values)) for values in (patch_size, suggestion))
        message = f"--window {size} does not fit {num_depths} depths.* for example {suggested}$"
        with pytest.raises(UserError, match=message):
            check_patch_size(patch_size, num_depths, use_downsample, flag="--window")
        with pytest.raises((RuntimeError, ValueError)):
            network(torch.zeros(1, 1, *patch_size, device="meta"))
    fitting = suggestion or patch_size
    check_patch_size(fitting, num_depths, use_downsample)
    assert network(torch.zeros(1, 1, *fitting, device="meta")).shape == (1, 2, *fitting)
