"""Weights in files are loaded where they fit the network, and of others one line says why they do
not.
"""

from __future__ import annotations

import math

import pytest
import torch
from architectures import chain
from monai.networks.nets.dints import DiNTS, TopologySearch
from published import network as monai_network
from published import quiet
from torch import nn

from dints.errors import UserError
from dints.network.architecture import Architecture
from dints.network.discrete import DiscreteNetwork
from dints.network.space import SearchSpace, supernet_of
from dints.network.weights import fitting_state, load_weights

SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels
UP = chain(2, 1, 0, num_depths=4, operation=0)


def state_of(
    architecture: Architecture, channels: int = 2, classes: int = 3, channel_mul: float = SMALL
) -> dict:
    """Return the state of MONAI's network, with stems that the architecture does not use."""
    return monai_network(architecture, channels, classes, channel_mul).state_dict()


def our_supernet() -> DiNTS:
    return supernet_of(SearchSpace(SMALL, num_blocks=1, num_depths=2), 1, 2)


def assert_loads(network: nn.Module, content: object, expected: dict, path, unused=()) -> None:
    """Load a file of this content, and compare the network's state with the expected one."""
    torch.save(content, path)
    load_weights(network, path, unused)
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", ["state dict", "model file", "latest.pth"])
def test_weights_of_monais_networks_and_of_every_file_of_ours_are_loaded(tmp_path, form, prefix):
    theirs = DiNTS(quiet(TopologySearch, channel_mul=SMALL, num_blocks=1, num_depths=2), 1, 2)
    found = DiscreteNetwork(UP, 2, 3, SMALL)
    for network, state, unused in (
        (our_supernet(), theirs.state_dict(), ()),
        (found, state_of(UP), found.unused_stems),
    ):
        prefixed = {prefix + key: value for key, value in state.items()}
        content = {
            "state dict": prefixed,
            "model file": {"state_dict": prefixed, "task": {}},
            "latest.pth": {
                "parts": {"network": prefixed, "optimizer": {"state": {}}},
                "configuration": {},
            },
        }
        assert_loads(network, content[form], state, tmp_path / "weights.pth", unused)


def test_stems_may_be_left_over_only_where_the_caller_says_so(tmp_path):
    with pytest.raises(
        UserError,
        match=r"has [0-9]+ tensors that the network lacks, for example "
        r"stem_down\.0",
    ):
        assert_loads(DiscreteNetwork(UP, 2, 3, SMALL), state_of(UP), {}, tmp_path / "weights.pth")


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


BIAS = "stem_finals.1.bias"
MISFITS = {
    "another path": (
        lambda fit: state_of(chain(2, 2, 1, num_depths=4)),
        "lacks 6 tensors .*, for example dints_space",
    ),
    "more classes": (
        lambda fit: state_of(UP, 2, 4),
        r"has 2 tensors of another shape, .*1.weight "
        r"\(4, 2, .* not \(3",
    ),
    "a supernet": (
        lambda fit: our_supernet().state_dict(),
        "lacks [0-9]+ tensors that the network has",
    ),
    "one missing": (lambda fit: without(fit, BIAS), f"lacks 1 tensors .*{BIAS}"),
    **{
        key: (
            lambda fit, key=key: {**fit, key: torch.ones(2)},
            f"has 1 tensors that the network lacks, .*example {key}",
        )
        for key in ("head.bias", "stem_down.2.mod.9.bias")
    },
    "a long name": (
        lambda fit: {**fit, "x" * 10**6: torch.ones(2)},
        r"has 1 tensors .* example "
        r"x+\.\.\.; give",
    ),
    "NaN": (
        lambda fit: {**fit, BIAS: torch.tensor([0, math.nan, 0])},
        f"are NaN or infinite in 1 .* {BIAS}: give",
    ),
}
NO_WEIGHTS = [
    *(None, {}, {"state_dict": 5}, {"parts": {"network": {}}}, {"parts": 5}),
    *({"epoch": 5, BIAS: torch.zeros(3)}, {5: torch.ones(2), BIAS: torch.zeros(3)}),
    *({BIAS: torch.zeros(3).to(dtype)} for dtype in (torch.int64, torch.float8_e4m3fn)),
    *({BIAS: value} for value in (torch.zeros(3, device="meta"), torch.zeros(3).to_sparse())),
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
    assert_refused(
        content,
        "does not hold network weights: give a state dict, or a model file of train_dints.py",
    )


def test_a_refused_file_changes_no_weight(tmp_path):
    network = our_supernet()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for content, fault in (
        (without(before, BIAS), f"lacks 1 tensors that the network has, for example {BIAS}"),
        ({**before, BIAS: torch.full_like(before[BIAS], math.inf)}, "infinite in 1 tensors"),
    ):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(UserError, match=rf"{tmp_path}/weights\.pth .*{fault}"):
            load_weights(network, tmp_path / "weights.pth")
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
