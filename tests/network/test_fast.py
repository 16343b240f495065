"""A fast network computes what the plain one does: values, gradients and state, in every way."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from architectures import chain, everything, random_architecture
from torch import nn
from tracing import assert_one_graph

from dints.network import discrete
from dints.network import space as space_module
from dints.network.cells import cell_of
from dints.network.cost import activation_bytes
from dints.network.discrete import DiscreteNetwork
from dints.network.fast import composition
from dints.network.fast.acceleration import accelerate
from dints.network.fast.composition import composed
from dints.network.fast.mixing import cells_together, mix
from dints.network.operations import OPERATIONS, PUBLISHED, ActivatedConvolutions, Operation
from dints.network.space import SearchSpace, supernet_of

CHAIN = chain(0, 1, 2, 1, 0, num_depths=3)
CHANNELS = 3


def search_network() -> nn.Module:
    network = supernet_of(SearchSpace(1 / 8, 2, 3), 1, 3)
    for alpha in (network.dints_space.log_alpha_a, network.dints_space.log_alpha_c):
        nn.init.normal_(alpha)
    return network


NETWORKS = {
    "supernet": search_network,
    "every path": lambda: DiscreteNetwork(everything(2, 3), 1, 3, 1 / 8),
    "random": lambda: DiscreteNetwork(random_architecture(0, 4, 3), 1, 3, 1 / 8),
}


@pytest.fixture(params=NETWORKS)
def make(request):
    """Return a function that makes the network, always with the same weights."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return NETWORKS[request.param]()

    return made


@pytest.fixture
def plain(make, monkeypatch) -> nn.Module:
    with monkeypatch.context() as patch:
        for module in (discrete, space_module):
            patch.setattr(module, "accelerate", lambda network: network)
        return make()


def scores_and_gradients(network: nn.Module, kind: torch.dtype) -> dict[str, torch.Tensor]:
    """Compute in this type, bfloat16 by autocast; of the weights, those that have a gradient."""
    generator = torch.Generator().manual_seed(1)
    image, noise = (
        torch.randn(2, channels, 16, 16, 16, generator=generator) for channels in (1, 3)
    )
    exact = torch.float64 if kind == torch.float64 else torch.float32
    network = network.to(exact)
    network.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        scores = network(image.to(exact))
    (scores.to(exact) * noise).mean().backward()
    weights = {name: each for name, each in network.named_parameters() if each.grad is not None}
    return {"scores": scores.detach(), **{name: each.grad for name, each in weights.items()}}


def assert_near(values: dict, expected: dict, tolerance: float) -> None:
    assert values.keys() == expected.keys() and len(values) > 10
    for name, value in values.items():
        error = (value.double() - expected[name].double()).norm()
        size = expected[name].double().norm()
        assert error <= tolerance * size + 1e-12, f"{name}: {error / size:.1e}"


@pytest.mark.parametrize("channels", [0, 4, 1000], ids="composed up to {} channels".format)
def test_a_fast_network_is_the_plain_one(make, plain, channels, monkeypatch):
    monkeypatch.setattr(composition, "MAX_CHANNELS_ON_CPU", channels)
    fast = make()
    kinds = {type(layer) for layer in plain.modules()} ^ {type(layer) for layer in fast.modules()}
    assert kinds  # else the comparison shows nothing
    state = plain.state_dict()
    assert fast.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in fast.state_dict().items())
    for kind, tolerance in ((torch.float64, 1e-8), (torch.float32, 5e-3)):
        assert_near(scores_and_gradients(fast, kind), scores_and_gradients(plain, kind), tolerance)


def test_in_bfloat16_it_is_as_near_to_fp32_as_the_plain_one(make, plain):
    exact = scores_and_gradients(plain, torch.float64)
    errors = []
    for network in (make(), plain):
        rounded = scores_and_gradients(network, torch.bfloat16)
        differences = [(rounded[name].double() - value).norm() for name, value in exact.items()]
        errors.append(torch.stack(differences).norm())
    assert errors[0] < 1.5 * errors[1] + 0.02 * exact["scores"].norm()


def test_as_on_a_gpu_it_is_the_plain_one(make, plain, as_on_gpu):
    results = [scores_and_gradients(network, torch.float64) for network in (make(), plain)]
    assert_near(*results, 1e-8)


def test_copies_are_fast_too_and_a_second_call_changes_nothing(make):
    network, image = make(), torch.randn(1, 1, 16, 16, 16)
    kinds = [type(module) for module in network.modules()]
    copied = copy.deepcopy(accelerate(network))
    for each in (network, copied):
        assert [type(module) for module in each.modules()] == kinds
    before = network(image)
    for weight in copied.parameters():
        weight.data.add_(1e-3)
    assert torch.equal(network(image), before) and not torch.equal(copied(image), before)


def test_a_gpu_takes_cells_one_at_a_time_and_always_composes():
    together = [cells_together(3, torch.device(device)) for device in ("cpu", "cuda")]
    wide = torch.empty(1, 64, 4, 4, 4)
    assert together == [3, 1]
    assert composition.pays(wide.to("meta")) and not composition.pays(wide)
    assert composition.pays(torch.empty(1, 8, 4, 4, 4))


class TestComposition:
    OTHERS = {
        "dilated": partial(ActivatedConvolutions, kernels=[(3, 3, 3)], dilation=2),
        "grouped": partial(ActivatedConvolutions, kernels=[(3, 3, 3)], groups=CHANNELS),
        # together 5x5x5, and other borders
        "twice": partial(ActivatedConvolutions, kernels=[(3, 3, 3), (3, 3, 3)]),
        "three": partial(ActivatedConvolutions, kernels=[(3, 1, 1), (1, 3, 1), (1, 1, 3)]),
    }

    def cells(
        self, count: int, names: tuple[str, ...] = PUBLISHED
    ) -> tuple[nn.ModuleList, list, torch.Tensor]:
        """Make cells that keep the size, their images and their operations' weights, in float64."""
        torch.manual_seed(0)
        cells = [cell_of(names)(CHANNELS, CHANNELS, 0) for _ in range(count)]
        cells = nn.ModuleList(cells).double()
        for weight in cells.parameters():
            nn.init.normal_(weight)
        settings = {"dtype": torch.double, "requires_grad": True}
        images = [torch.randn(2, CHANNELS, 5, 6, 7, **settings) for _ in range(count)]
        return cells, images, torch.rand(count, len(names), **settings)

    def mixed_by_monai(self, *inputs) -> torch.Tensor:
        return sum(cell(image, weight) for cell, image, weight in zip(*inputs, strict=True))

    @pytest.mark.parametrize("together", [1, 3], ids=["one at a time, as on a GPU", "side by side"])
    def test_a_mix_and_its_gradients_are_those_of_the_cells(self, together, monkeypatch):
        monkeypatch.setattr("dints.network.fast.mixing.cells_together", lambda *_: together)
        cells, images, weights = self.cells(3)
        wanted, results = [*images, weights, *cells.parameters()], []
        parts = composed(cells, weights, together)
        assert len(parts) == 3 // together and parts[0].operations == (1, 2, 3, 4)
        expected = self.mixed_by_monai(cells, images, weights)
        noise = torch.randn_like(expected)
        for mixed in (expected, mix(cells, images, weights, parts)):
            results.append([mixed, *torch.autograd.grad((mixed * noise).sum(), wanted)])
        for expected, value in zip(*results, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
        # Else each of hundreds would be copied.
        assert all(gradient.is_contiguous() for gradient in results[1][5:])

    @pytest.mark.parametrize("name", OTHERS)
    def test_what_does_not_compose_to_3x3x3_is_computed_as_before(self, name, monkeypatch):
        monkeypatch.setitem(OPERATIONS, name, Operation("", "", "", 3, self.OTHERS[name]))
        cells, images, weights = self.cells(2, ("skip_connect", name, "conv_3x1x3"))
        parts = composed(cells, weights, 2)
        assert parts[0].operations == ((1, 2) if name == "three" else (2,))
        expected = self.mixed_by_monai(cells, images, weights)
        found = mix(cells, images, weights, parts)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        cells, _, weights = self.cells(2, ("skip_connect",))
        assert composed(cells, weights, 2) is None


def recomputing(network: nn.Module, wanted: bool = True) -> nn.Module:
    part = network if isinstance(network, DiscreteNetwork) else network.dints_space
    part.checkpoint_activations = wanted
    return network


class TestRecomputation:
    """With --checkpoint_activations a step keeps less and gives the same bits."""

    @pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
    def test_gradients_are_the_same_to_the_bit(self, make, kind):
        kept, recomputed = (
            scores_and_gradients(recomputing(make(), wanted), kind) for wanted in (False, True)
        )
        assert kept.keys() == recomputed.keys()
        assert all(torch.equal(kept[name], recomputed[name]) for name in kept)

    def test_of_blocks_nothing_is_kept_and_nothing_computed_twice_without_gradients(
        self, make, monkeypatch
    ):
        """The rest is the stems'."""
        network = make().to("meta")
        kept, less = (
            activation_bytes(recomputing(network, wanted), (1, 1, 32, 32, 32))
            for wanted in (False, True)
        )
        assert less < 0.8 * kept
        place = "dints.network.fast.recomputation.checkpoint"
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("computed twice"))
        image = torch.zeros(1, 1, 16, 16, 16, device="meta")
        with torch.no_grad():
            network(image)
        with pytest.raises(pytest.fail.Exception, match="computed twice"):
            network(image)

    def test_it_compiles_as_one_graph(self):
        network = DiscreteNetwork(CHAIN, 1, 3, 1 / 8)
        assert_one_graph(recomputing(network), torch.randn(1, 1, 16, 16, 16))
