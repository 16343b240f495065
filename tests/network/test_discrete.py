"""MONAI's `DiNTS` over a `TopologyInstance` is the oracle of the discrete network."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import published
import pytest
import torch
from architectures import chain, connected, everything, random_architecture, stand_in
from monai.networks.nets.dints import DiNTS
from tracing import assert_one_graph

from dints.errors import UserError
from dints.network.architecture import Architecture, load_architecture
from dints.network.discrete import DiscreteNetwork, check_patch_size, count_parameters
from dints.network.weights import fitting_state

SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels


def monai_network(
    architecture: Architecture, channels: int = 2, classes: int = 3, channel_mul: float = SMALL
) -> DiNTS:
    return published.network(architecture, channels, classes, channel_mul)


def without_unused_stems(state: dict, architecture: Architecture) -> dict:
    """Leave of MONAI's keys those that remain when stems at inactive inputs and below the deepest
    output go.
    """
    inputs, outputs = (np.flatnonzero(architecture.node_a[row]) for row in (0, -1))
    unused = [f"stem_down.{d}." for d in range(architecture.num_depths) if d not in inputs]
    unused += [f"stem_up.{d}." for d in range(architecture.num_depths) if d > max(outputs)]
    return {key: value for key, value in state.items() if not key.startswith(tuple(unused))}


ARCHITECTURES = {
    "all paths, 2 depths": everything(3, 2),
    "all paths, 4 depths": everything(2, 4),
    "finest nodes only": chain(0, 0, 0, num_depths=3),
    "deepest nodes only": chain(3, 3, num_depths=4, operation=2),
    "down and up": chain(0, 1, 2, 1, 0, num_depths=3, operation=4),
    "up": chain(2, 1, 0, num_depths=4, operation=0),
    "all inputs, finest output": connected(np.array([[1, 1, 0, 0]]), np.full((1, 4), 3)),
    "random 1": random_architecture(1, 3, 3),
    "random, 4 depths": random_architecture(7, 4, 4),
    **{
        f"full resolution, {name}": replace(architecture, use_downsample=False)
        for name, architecture in (
            ("all paths", everything(2, 3)),
            ("down and up", chain(0, 1, 2, 1, 0, num_depths=3)),
            ("up", chain(2, 1, 0, num_depths=3, operation=4)),
        )
    },
}


def both_networks(architecture: Architecture) -> tuple[DiNTS, DiscreteNetwork]:
    """Build MONAI's network and ours, with equal weights."""
    torch.manual_seed(0)
    theirs, ours = monai_network(architecture), DiscreteNetwork(architecture, 2, 3, SMALL)
    ours.load_state_dict(fitting_state(ours, theirs.state_dict(), "MONAI's", ours.unused_stems))
    return theirs, ours


def scores_and_gradients(
    network: torch.nn.Module, num_depths: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the scores of a random image, and the gradients of the image and of each parameter, 0
    if it has none.
    """
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
    theirs, ours = both_networks(architecture)
    assert list(ours.state_dict()) == list(without_unused_stems(theirs.state_dict(), architecture))
    expected, found = (
        scores_and_gradients(net, architecture.num_depths, torch.float64) for net in (theirs, ours)
    )
    for name, values in found.items():
        assert values.abs().max() > 0, f"{name} does not train"
        torch.testing.assert_close(
            values, expected[name], rtol=1e-9, atol=1e-9 * float(expected[name].abs().max())
        )
    for name in expected.keys() - found.keys():  # what we leave out never trains in MONAI's network
        assert not expected[name].any(), name


@pytest.mark.parametrize(
    "name", ["all paths, 4 depths", "random, 4 depths", "full resolution, all paths"]
)
def test_in_fp32_it_is_as_exact_as_monais(name):
    """Where a norm has few voxels, which digits are lost depends on the processor; how many, on the
    network.
    """
    architecture = ARCHITECTURES[name]
    theirs, ours = both_networks(architecture)
    kinds = ((theirs, torch.float32), (ours, torch.float32), (theirs, torch.float64))
    rounded, found, exact = (
        scores_and_gradients(net, architecture.num_depths, dtype) for net, dtype in kinds
    )
    for name, values in found.items():
        largest = exact[name].abs().max()
        error, allowed = (
            (values - exact[name]).abs().max(),
            4 * (rounded[name] - exact[name]).abs().max(),
        )
        assert error <= allowed + 1e-4 * largest, f"{name}: {error:.1e} of {largest:.1e}"


def test_the_architectures_above_cover_what_can_be():
    used = {int(op) for a in ARCHITECTURES.values() for op in a.arch_code_c[a.arch_code_a == 1]}
    assert used == set(range(5))
    stems = {(bool(a.node_a[0].all()), bool(a.node_a[-1, -1])) for a in ARCHITECTURES.values()}
    assert stems == {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random 1", "down and up"])
def test_it_compiles_as_one_graph(name):
    torch.manual_seed(0)
    assert_one_graph(
        DiscreteNetwork(ARCHITECTURES[name], 2, 3, SMALL), torch.randn(1, 2, 16, 16, 16)
    )


def test_it_exports():
    network = DiscreteNetwork(ARCHITECTURES["random 1"], 2, 3, SMALL).eval()
    image = torch.randn(1, 2, 16, 16, 16)
    exported = torch.export.export(network, (image,))
    # runs on any machine
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(image), network(image), rtol=1e-4, atol=1e-5)


def on_meta(architecture: Architecture, *settings) -> DiscreteNetwork:
    """Make the network without memory for its weights."""
    with torch.device("meta"):
        return DiscreteNetwork(architecture, *settings)


def test_parameters_of_a_stand_in_for_the_published_architecture():
    """They are 152.36 M, as published; as it uses every stem, MONAI's network of it has as many."""
    assert f"{count_parameters(on_meta(stand_in(), 1, 2)) / 1e6:.2f}" == "152.36"
    with torch.device("meta"):
        assert count_parameters(monai_network(stand_in(), 1, 2, 1.0)) == count_parameters(
            on_meta(stand_in(), 1, 2)
        )


def test_parameters_of_the_published_architecture():
    """They are counted in the real file, where there is one: it is in no package registry."""
    file = os.environ.get("DINTS_CVPR_ARCH")
    if not file:
        pytest.skip(
            "DINTS_CVPR_ARCH does not name the published architecture file (12 blocks, 4 depths)"
        )
    architecture = load_architecture(file, num_blocks=12, num_depths=4)
    with torch.device("meta"):  # MONAI's network, with every stem
        assert f"{count_parameters(monai_network(architecture, 1, 2, 1.0)) / 1e6:.2f}" == "152.36"
    assert count_parameters(on_meta(architecture, 1, 2)) <= 152_365_000


@pytest.mark.parametrize(
    ("num_depths", "use_downsample", "patch_size", "suggestion"),
    [
        (3, True, (8, 8, 16), None),
        (4, True, (80, 48, 16), None),
        (4, False, (8, 8, 16), None),
        (2, False, (6, 6, 6), None),
        (3, True, (8, 8, 8), (16, 16, 16)),
        (3, True, (4, 4, 20), (8, 8, 16)),
        (3, True, (32, 32, 0), (32, 32, 8)),
        (4, True, (-32, 32, 32), (16, 32, 32)),
        (4, False, (8, 8, 8), (16, 16, 16)),
        (4, False, (8, 8, 12), (8, 8, 16)),
    ],
    ids=str,
)
def test_patch_sizes_that_do_not_fit_are_refused_with_one_that_does(
    num_depths, use_downsample, patch_size, suggestion
):
    """The check refuses nothing that the network could do, and lets nothing pass that it could
    not.
    """
    network = on_meta(
        replace(everything(1, num_depths), use_downsample=use_downsample), 1, 2, SMALL
    )
    if suggestion is not None:
        with pytest.raises(UserError) as caught:
            check_patch_size(patch_size, num_depths, use_downsample, flag="--window")
        size, suggested = (" ".join(map(str, values)) for values in (patch_size, suggestion))
        assert str(caught.value).startswith(f"--window {size} does not fit {num_depths} depths")
        assert str(caught.value).endswith(f"for example {suggested}")
        if 0 not in patch_size:  # PyTorch 2.11 computes nothing of nothing
            with pytest.raises((RuntimeError, ValueError)):
                network(torch.zeros(1, 1, *patch_size, device="meta"))
    fitting = suggestion or patch_size
    check_patch_size(fitting, num_depths, use_downsample)
    assert network(torch.zeros(1, 1, *fitting, device="meta")).shape == (1, 2, *fitting)
