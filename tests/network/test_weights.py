"""Weights in files are loaded where they fit; of others one line says why they do not."""

from __future__ import annotations

import math

import pytest
import torch
from architectures import chain
from monai.networks.nets.dints import DiNTS, TopologySearch
from published import network as monai_network
from published import quiet

from dints.errors import UserError
from dints.network.architecture import Architecture
from dints.network.discrete import DiscreteNetwork
from dints.network.space import SearchSpace, supernet_of
from dints.network.weights import fitting_state, load_weights

SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels
UP = chain(2, 1, 0, num_depths=4, operation=0)


def state_of(architecture: Architecture, classes: int = 3) -> dict:
    """Return the state of MONAI's network, with stems that the architecture does not use."""
    return monai_network(architecture, 2, classes, SMALL).state_dict()


def our_supernet() -> DiNTS:
    return supernet_of(SearchSpace(SMALL, num_blocks=1, num_depths=2), 1, 2)


@pytest.mark.parametrize(
    ("form", "prefix"), [("state dict", "module."), ("model file", ""), ("latest.pth", "module.")]
)
def test_weights_of_monais_networks_and_of_every_file_of_ours_are_loaded(tmp_path, form, prefix):
    theirs = DiNTS(quiet(TopologySearch, channel_mul=SMALL, num_blocks=1, num_depths=2), 1, 2)
    found = DiscreteNetwork(UP, 2, 3, SMALL)
    for network, state, unused in (
        (our_supernet(), theirs.state_dict(), ()),
        (found, state_of(UP), found.unused_stems),
    ):
        prefixed = {prefix + key: value for key, value in state.items()}
        parts = {"network": prefixed, "optimizer": {"state": {}}}
        content = {
            "state dict": prefixed,
            "model file": {"state_dict": prefixed, "task": {}},
            "latest.pth": {"parts": parts, "configuration": {}},
        }
        torch.save(content[form], tmp_path / "weights.pth")
        load_weights(network, tmp_path / "weights.pth", unused)
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


BIAS = "stem_finals.1.bias"
SHAPES = r"has 2 tensors of another shape, .*1.weight \(4, 2, .* not \(3"
MISFITS = {
    "another path": (lambda fit: state_of(chain(2, 2, 1, num_depths=4)), "lacks 6 tensors .*cell"),
    "more classes": (lambda fit: state_of(UP, 4), SHAPES),
    "a supernet": (lambda fit: our_supernet().state_dict(), "lacks [0-9]+ tensors that the net"),
    "one missing": (lambda fit: {k: fit[k] for k in fit if k != BIAS}, f"lacks 1 tensors .*{BIAS}"),
    "one more": (
        lambda fit: {**fit, "x" * 10**6: torch.ones(2)},
        r"has 1 tensors that the network lacks, for example x+\.\.\.; give",
    ),
    "NaN": (
        lambda fit: {**fit, BIAS: torch.tensor([0, math.nan, 0])},
        f"are NaN or infinite in 1 .* {BIAS}: give",
    ),
}
NO_WEIGHTS = [
    *(None, {}, {"state_dict": 5}, {"parts": 5}, {"epoch": 5, BIAS: torch.zeros(3)}),
    *({5: torch.ones(2)}, {BIAS: torch.zeros(3, dtype=torch.int64)}),
    *({BIAS: torch.zeros(3, device="meta")}, {BIAS: torch.zeros(3).to_sparse()}),
]


def assert_refused(content: object, fault: str) -> None:
    network = DiscreteNetwork(UP, 2, 3, SMALL)
    with pytest.raises(UserError, match=f"weights.pth .*{fault}") as caught:
        fitting_state(network, content, "weights.pth", network.unused_stems)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.fault("weights of another architecture")
@pytest.mark.parametrize(("change", "fault"), MISFITS.values(), ids=MISFITS)
def test_weights_that_do_not_fit_are_refused(change, fault):
    assert_refused(change(state_of(UP)), fault)


@pytest.mark.fault("truncated, empty or foreign file")
@pytest.mark.parametrize("content", NO_WEIGHTS, ids=lambda content: str(content)[:30])
def test_what_holds_no_weights_is_refused(content):
    assert_refused(content, "does not hold network weights: give a state dict, or a model file")


def test_stems_may_be_left_over_only_where_the_caller_says_so_and_a_refusal_changes_nothing(
    tmp_path,
):
    network = DiscreteNetwork(UP, 2, 3, SMALL)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    torch.save(state_of(UP), tmp_path / "weights.pth")
    message = r"weights\.pth .* has [0-9]+ tensors that the network lacks, for example stem_down\.0"
    with pytest.raises(UserError, match=message):
        load_weights(network, tmp_path / "weights.pth")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
