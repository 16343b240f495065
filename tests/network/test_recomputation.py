"""With --checkpoint_activations a step keeps less and gives the same bits, whatever the architecture."""

from __future__ import annotations

import csv

import pytest
import torch
from architectures import chain, random_architecture
from commands import search, train
from tracing import assert_one_graph

from dints.network.architecture import save_architecture
from dints.network.cost import activation_bytes
from dints.network.found import FoundNetwork
from dints.network.space import SearchSpace, supernet

SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels
ARCHITECTURES = {"random": random_architecture(0, 4, 3), "one path a block": chain(0, 1, 2, 1, 0, num_depths=3)}


def found_network(name: str) -> tuple[FoundNetwork, FoundNetwork]:
    """Return a network, and the module that the choice is an attribute of."""
    network = FoundNetwork(ARCHITECTURES[name], 1, 3, SMALL)
    return network, network


def search_network() -> tuple[torch.nn.Module, SearchSpace]:
    network = supernet(SearchSpace(SMALL, num_blocks=3, num_depths=3), 1, 3)
    return network, network.dints_space


NETWORKS = {
    "supernet": search_network,
    **{name: lambda name=name: found_network(name) for name in ARCHITECTURES},
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_to_the_bit(network, precision):
    network, chosen = network
    image, gradients = torch.randn(1, 1, 16, 16, 16), []
    for chosen.checkpoint_activations in (False, True):
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
            scores = network(image)
        scores.float().square().sum().backward()
        gradients.append({name: value.grad for name, value in network.named_parameters() if value.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and len(plain) > 10
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_of_blocks_nothing_is_kept(network):
    """What is left is the stems': of the one path a block three quarters."""
    network, chosen = network
    network.to("meta")
    kept = [activation_bytes(network, (1, 1, 32, 32, 32)) for chosen.checkpoint_activations in (False, True)]
    assert kept[1] < 0.8 * kept[0]


def test_nothing_is_computed_twice_without_gradients(network, monkeypatch):
    network, chosen = network
    chosen.checkpoint_activations = True
    monkeypatch.setattr("dints.network.fast.recomputation.checkpoint", lambda *_, **__: pytest.fail("computed twice"))
    with torch.no_grad():
        network(torch.zeros(1, 1, 16, 16, 16))
    with pytest.raises(pytest.fail.Exception, match="computed twice"):
        network(torch.zeros(1, 1, 16, 16, 16))


@pytest.mark.slow
def test_it_compiles_as_one_graph(network):
    network, chosen = network
    chosen.checkpoint_activations = True
    assert_one_graph(network, torch.randn(1, 1, 16, 16, 16))


@pytest.mark.parametrize("stage", ["search", "train"])
def test_a_stages_numbers_are_the_same_with_it(stage, phantom, tmp_path):
    save_architecture(tmp_path / "arch.pth", ARCHITECTURES["random"])
    histories = []
    for flags in ("", "--checkpoint_activations"):
        folder, flags = tmp_path / f"run{len(histories)}", f"--num_epochs 2 --num_epochs_per_validation 2 {flags}"
        if stage == "search":
            search(phantom, folder, "--num_epochs_warmup 1", flags)
        else:
            train(phantom, folder, tmp_path / "arch.pth", flags)
        with (folder / "loss_history.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        histories.append([(row["loss"], row.get("architecture_loss"), row.get("entropy_a")) for row in rows])
    assert len(rows) == 2 and histories[0] == histories[1]
