"""A space that keeps the finest path is MONAI's, given that this path is active: made sure there,
or filtered for.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.nets.dints import DiNTS, TopologySearch
from published import quiet

import search_dints
from dints.network.architecture import load_architecture, save_architecture
from dints.network.decoding import subsets
from dints.network.space import CERTAIN, SearchSpace, supernet_of

INPUT = (2, 1, 64, 96, 32)
SMALL = 1 / 16  # channel_mul


def twins(seed: int, *size: int) -> tuple[TopologySearch, SearchSpace]:
    """Make MONAI's space and ours that keeps the finest path, in float64 and with the same
    alphas.
    """
    shape = dict(zip(("num_blocks", "num_depths"), size, strict=True), channel_mul=SMALL)
    theirs, ours = (
        quiet(TopologySearch, **shape).double(),
        SearchSpace(**shape, keep_finest=True).double(),
    )
    generator = torch.Generator().manual_seed(seed)
    for alpha in (theirs.log_alpha_a, theirs.log_alpha_c):
        alpha.data.normal_(generator=generator)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("size", [(2, 2), (2, 4)], ids=str)
def test_probabilities_are_conditional_on_the_path(size):
    theirs, ours = twins(0, *size)
    every, wanted = (
        np.array(subsets(3 * size[1] - 2)),
        theirs.get_prob_a(child=True)[0].detach().numpy(),
    )
    kept = every[:, 0] == 1
    expected = wanted[:, kept] / wanted[:, kept].sum(-1, keepdims=True)
    children, path_probs = (probs.detach().numpy() for probs in ours.get_prob_a(child=True))
    np.testing.assert_array_equal(ours.child_list, every[kept])
    np.testing.assert_allclose(children, expected, rtol=1e-12)
    np.testing.assert_allclose(path_probs, expected @ every[kept], rtol=1e-12)
    assert (path_probs[:, 0] == 1).all() and torch.equal(
        ours.get_prob_a()[1], ours.get_prob_a(child=True)[1]
    )
    extreme = torch.tensor([-1000.0, -40.0, 40.0, 1000.0])[
        torch.arange(ours.log_alpha_a.numel()) % 4
    ]
    with torch.no_grad():
        path_probs = ours.log_alpha_a.copy_(extreme.view_as(ours.log_alpha_a)).sigmoid()
    path_probs[:, 0] = 1
    torch.testing.assert_close(ours.get_prob_a()[1], path_probs)
    assert ours.float().get_prob_a(child=True)[0].isfinite().all()


@pytest.mark.parametrize("size", [(2, 2), (3, 4)], ids=str)
def test_regularisers_are_monais_where_the_path_is_sure_and_do_not_move_it(size):
    theirs, ours = twins(1, *size)
    with torch.no_grad():
        theirs.log_alpha_a[:, 0] = CERTAIN
    children, usage = theirs.get_prob_a(child=True)[0], theirs.get_ram_cost_usage(INPUT)
    kept = children[:, np.array(subsets(3 * size[1] - 2))[:, 0] == 1]
    # MONAI also counts the patterns without the finest node, whose probability is 0.
    left_out = (2 ** (size[1] - 1) - 1) * (size[0] - 1)
    expected = {
        "entropy_a": -(kept * (kept + 1e-5).log()).mean(),
        "topology": theirs.get_topology_entropy(children) + left_out * np.log1p(1e-5),
        "ram_ratio": usage / theirs.get_ram_cost_usage(INPUT, full=True),
    }
    found = search_dints.regularisers(ours, INPUT, "published")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=0, msg=name.__add__)
        moved, expected_moves = (
            torch.autograd.grad(of_space, space.log_alpha_a, retain_graph=True)[0]
            for of_space, space in ((found[name], ours), (value, theirs))
        )
        torch.testing.assert_close(moved, expected_moves, rtol=1e-9, atol=1e-12, msg=name.__add__)
        assert (moved[:, 0] == 0).all() and (moved[:, 1:] != 0).any(), name


def test_the_supernet_and_its_gradients_are_monais_where_the_path_is_sure():
    theirs, ours = twins(2, 2, 3)
    torch.manual_seed(0)
    monais = DiNTS(theirs, 2, 3).double()
    own = supernet_of(ours, 2, 3).double()
    own.load_state_dict(monais.state_dict())
    with torch.no_grad():
        theirs.log_alpha_a[:, 0] = CERTAIN
    image, mix = torch.randn(1, 2, 16, 16, 16).double(), torch.randn(1, 3, 16, 16, 16).double()
    expected, scores = monais(image), own(image)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    for output in (expected, scores):
        (output * mix).mean().backward()
    theirs_of = dict(monais.named_parameters())
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs_of[name].grad, rtol=1e-7, atol=1e-12, msg=name.__add__
        )
    assert (ours.log_alpha_a.grad[:, 0] == 0).all() and (ours.log_alpha_a.grad[:, 1:] != 0).all()


def test_the_parameters_are_those_of_a_plain_space_and_files_say_it(tmp_path):
    networks = []
    for keep_finest in (False, True):
        torch.manual_seed(0)
        networks.append(supernet_of(SearchSpace(SMALL, 2, 3, keep_finest=keep_finest), 1, 2))
    plain, ours = networks
    assert plain.state_dict().keys() == ours.state_dict().keys()
    assert all(
        torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items()
    )
    save_architecture(tmp_path / "arch.pth", ours.dints_space.architecture())
    assert load_architecture(tmp_path / "arch.pth").info["keep_finest"] is True
    assert "keep_finest" not in plain.dints_space.architecture().info
