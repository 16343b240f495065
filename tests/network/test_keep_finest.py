"""A space that keeps the finest path is MONAI's, given that this path is active: made sure there, or filtered for."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from architectures import connected
from monai.networks.nets.dints import DiNTS, TopologySearch
from published import quiet

import search_dints
from dints.errors import UserError
from dints.network.architecture import Architecture, load_architecture, save_architecture
from dints.network.decoding import subsets
from dints.network.space import SearchSpace, supernet

INPUT = (2, 1, 64, 96, 32)
SMALL = 1 / 16  # channel_mul
SURE = 1000.0  # a sigmoid of 1


def with_alphas(space: TopologySearch, seed: int, spread: float = 1.0) -> TopologySearch:
    """Draw alphas; that of the finest path is so low that it would never be kept for its own sake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in (space.log_alpha_a, space.log_alpha_c):
            alpha.normal_(0, spread, generator=generator)
        space.log_alpha_a[:, 0] -= 8
    return space


def twins(seed: int, *size: int) -> tuple[TopologySearch, SearchSpace]:
    """Make MONAI's space and ours that keeps the finest path, in float64 and with the same alphas."""
    shape = dict(zip(("num_blocks", "num_depths"), size, strict=True), channel_mul=SMALL)
    theirs, ours = quiet(TopologySearch, **shape).double(), SearchSpace(**shape, keep_finest=True).double()
    ours.load_state_dict(with_alphas(theirs, seed).state_dict())
    return theirs, ours


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (2, 4)], ids=str)
def test_probabilities_are_conditional_on_the_path(size):
    theirs, ours = twins(0, *size)
    every, wanted = np.array(subsets(3 * size[1] - 2)), theirs.get_prob_a(child=True)[0].detach().numpy()
    kept = every[:, 0] == 1
    expected = wanted[:, kept] / wanted[:, kept].sum(-1, keepdims=True)
    children, path_probs = (probs.detach().numpy() for probs in ours.get_prob_a(child=True))
    np.testing.assert_array_equal(ours.child_list, every[kept])
    np.testing.assert_allclose(children, expected, rtol=1e-12)
    np.testing.assert_allclose(path_probs, expected @ every[kept], rtol=1e-12)
    assert (path_probs[:, 0] == 1).all() and torch.equal(ours.get_prob_a()[1], ours.get_prob_a(child=True)[1])
    extreme = torch.tensor([-1000.0, -40.0, 40.0, 1000.0])[torch.arange(ours.log_alpha_a.numel()) % 4]
    with torch.no_grad():
        path_probs = ours.log_alpha_a.copy_(extreme.view_as(ours.log_alpha_a)).sigmoid()
    path_probs[:, 0] = 1
    torch.testing.assert_close(ours.get_prob_a()[1], path_probs)
    assert ours.float().get_prob_a(child=True)[0].isfinite().all()


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (3, 4)], ids=str)
def test_regularisers_are_monais_where_the_path_is_sure_and_do_not_move_it(size):
    theirs, ours = twins(1, *size)
    with torch.no_grad():
        theirs.log_alpha_a[:, 0] = SURE
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
    torch.testing.assert_close(ours.get_ram_cost_usage(INPUT), usage, rtol=1e-9, atol=0)
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
    own = supernet(ours, 2, 3).double()
    own.load_state_dict(monais.state_dict())
    with torch.no_grad():
        theirs.log_alpha_a[:, 0] = SURE
    image, mix = torch.randn(1, 2, 16, 16, 16).double(), torch.randn(1, 3, 16, 16, 16).double()
    expected, scores = monais(image), own(image)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    for output in (expected, scores):
        (output * mix).mean().backward()
    theirs_of = dict(monais.named_parameters())
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_of[name].grad, rtol=1e-7, atol=1e-12, msg=name.__add__)
    assert (ours.log_alpha_a.grad[:, 0] == 0).all() and (ours.log_alpha_a.grad[:, 1:] != 0).all()


def every_architecture(plain: SearchSpace) -> list[tuple[float, float, Architecture]]:
    """List length, memory ratio and architecture of every sequence of children with the finest path, by their lengths.

    The lengths are those of probabilities given that path, from the probabilities of a space that does not keep it.
    """
    probs = plain.get_prob_a(child=True)[0].detach().numpy().astype(float)
    kept = np.flatnonzero(plain.child_list[:, 0] == 1)
    lengths = -np.log(probs[:, kept] / probs[:, kept].sum(-1, keepdims=True) + 1e-5)
    arch_code_c = plain.log_alpha_c.argmax(-1).numpy()
    found = []
    for numbers in product(range(len(kept)), repeat=plain.num_blocks):
        arch_code_a = plain.child_list[kept[list(numbers)]]
        try:
            architecture = connected(arch_code_a, arch_code_c)
        except UserError:
            continue
        length = lengths[range(plain.num_blocks), numbers].sum()
        found.append((length, plain.ram_ratio_of(arch_code_a, arch_code_c), architecture))
    return sorted(found, key=lambda entry: entry[0])


@pytest.mark.parametrize("size", [(1, 2), (3, 2), (2, 3)], ids=str)
def test_the_most_probable_ones_are_those_of_all_that_keep_the_path(size):
    plain, ours = (SearchSpace(SMALL, *size, keep_finest=keep_finest) for keep_finest in (False, True))
    for seed in range(2):
        ours.load_state_dict(with_alphas(plain, seed).state_dict())
        every = every_architecture(plain)
        ratios = [ratio for _, ratio, _ in every]
        assert not all(plain.decode()[1][:, 0])
        for budget in (None, min(ratios), *np.quantile(ratios, [0.1, 0.5]), 1.0):
            fitting = [codes for codes in every if budget is None or codes[1] <= budget * (1 + 1e-9)]
            found = ours.architectures(20, budget)
            assert [one.arch_code_a.tolist() for one in found] == [one.arch_code_a.tolist() for *_, one in fitting[:20]]
            np.testing.assert_array_equal(found[0].node_a, ours.decode(budget)[0])
            logs = [one.info["log_probability"] for one in found]
            np.testing.assert_allclose(logs, [-length for length, *_ in fitting[:20]], rtol=1e-5)
        with pytest.raises(UserError, match="max_ram_ratio .* is below that of the smallest connected architecture"):
            ours.decode(0.99 * min(ratios))


def test_the_smallest_feasible_ratio_is_of_those_that_keep_the_path():
    for size in ((3, 2), (2, 3)):
        plain, ours = (SearchSpace(SMALL, *size, keep_finest=keep_finest) for keep_finest in (False, True))
        with torch.no_grad():
            plain.log_alpha_c.zero_()[..., 4] = 1  # one of the dearest
        least = min(ratio for _, ratio, _ in every_architecture(plain))
        assert ours.feasible_ram_ratio() == pytest.approx(least) and least > plain.feasible_ram_ratio()


def test_at_the_published_size_the_path_is_in_all_that_is_decoded(tmp_path):
    plain, ours = (SearchSpace(SMALL, 12, 4, keep_finest=keep_finest) for keep_finest in (False, True))
    for spread in (0.01, 1.0, 40.0):
        ours.load_state_dict(with_alphas(plain, 0, spread).state_dict())
        assert not plain.architecture().arch_code_a[:, 0].all()
        found = ours.architecture()
        for one in [found, *ours.architectures(5), *ours.architectures(5, 0.6 * found.info["ram_ratio"])]:
            assert one.arch_code_a[:, 0].all() and one.arch_code_a_max[:, 0].all() and one.node_a[:, 0].all()
    save_architecture(tmp_path / "arch.pth", found)
    assert load_architecture(tmp_path / "arch.pth").info["keep_finest"] is True
    assert "keep_finest" not in plain.architecture().info


def test_the_parameters_are_the_same_and_the_paths_own_do_not_count():
    torch.manual_seed(0)
    plain = supernet(SearchSpace(SMALL, 2, 3), 1, 2)
    torch.manual_seed(0)
    ours = supernet(SearchSpace(SMALL, 2, 3, keep_finest=True), 1, 2)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items())
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        before = ours(image), *ours.dints_space.get_prob_a(child=True)
        ours.dints_space.log_alpha_a[:, 0] = -30
        after = ours(image), *ours.dints_space.get_prob_a(child=True)
    assert all(map(torch.equal, before, after))
