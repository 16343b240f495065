"""Every sequence of children, where there are few enough to try them all, is the oracle of decoding."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import pytest
import torch

from dints.errors import UserError
from dints.network.space import SearchSpace


@cache
def space_of(num_blocks: int, num_depths: int) -> SearchSpace:
    return SearchSpace(num_blocks=num_blocks, num_depths=num_depths, channel_mul=1 / 16)


def with_alphas(seed: int, spread: float, *size: int) -> SearchSpace:
    space, generator = space_of(*size), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in (space.log_alpha_a, space.log_alpha_c):
            alpha.normal_(0, spread, generator=generator)
    return space


def lengths_of_children(space: SearchSpace) -> np.ndarray:
    """Return what decoding minimises the sum of, from the children's probabilities: (blocks, children)."""
    return -np.log(space.get_prob_a(child=True)[0].detach().numpy().astype(float) + 1e-5)


def length(space: SearchSpace, arch_code_a: np.ndarray) -> float:
    """Return the length of an architecture, from its children one by one."""
    rows = [(space.child_list == paths).all(-1).argmax() for paths in arch_code_a]
    return lengths_of_children(space)[range(len(rows)), rows].sum()


def all_architectures(space: SearchSpace) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths and ratios of every connected sequence of children."""
    arch_code_c = space.log_alpha_c.argmax(-1).numpy()
    lengths, ratios = lengths_of_children(space), np.zeros((space.num_blocks, len(space.child_list)))
    for block, number in np.ndindex(ratios.shape):
        arch_code_a = np.zeros(arch_code_c.shape)
        arch_code_a[block] = space.child_list[number]
        ratios[block, number] = space.ram_ratio_of(arch_code_a, arch_code_c)
    connected = space.ends[:, None] == space.starts[None]
    total, memory, last = lengths[0], ratios[0], np.arange(len(space.child_list))
    for block in range(1, space.num_blocks):
        before, child = connected[last].nonzero()
        total, memory, last = total[before] + lengths[block][child], memory[before] + ratios[block][child], child
    return total, memory


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("size", [(1, 2), (3, 2), (4, 2), (2, 3)], ids=str)
def test_no_architecture_within_the_budget_is_more_probable(size, spread):
    for seed in range(3):
        space = with_alphas(seed, spread, *size)
        lengths, ratios = all_architectures(space)
        for budget in [ratios.min(), *np.quantile(ratios, [0.05, 0.2, 0.5, 0.9]), 1.0]:
            _, arch_code_a, arch_code_c, _ = space.decode(budget)
            assert space.ram_ratio_of(arch_code_a, arch_code_c) <= budget * (1 + 1e-8)
            best = lengths[ratios <= budget * (1 + 1e-9)].min()
            assert length(space, arch_code_a) == pytest.approx(best, abs=1e-7)
        with pytest.raises(UserError, match="max_ram_ratio .* is below that of the smallest connected architecture"):
            space.decode(0.99 * ratios.min())


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0])
@pytest.mark.parametrize("size", [(1, 2), (3, 2), (2, 3)], ids=str)
def test_the_most_probable_architectures_are_those_of_all(size, spread):
    """At spread 0 all are equally probable. 500 are more than some of the spaces and budgets have."""
    space = with_alphas(0, spread, *size)
    lengths, ratios = all_architectures(space)
    for budget in [None, ratios.min(), *np.quantile(ratios, [0.05, 0.3, 0.8]), 1.0]:
        fitting = np.sort(lengths[ratios <= (1 if budget is None else budget) * (1 + 1e-9)])
        for count in (1, 2, 30, 500):
            found = space.architectures(count, budget, seed=7)
            assert len({one.arch_code_a.tobytes() for one in found}) == len(found)
            logs = [one.info["log_probability"] for one in found]
            np.testing.assert_allclose(logs, -fitting[:count], rtol=0, atol=1e-5)  # float32
            np.testing.assert_array_equal(found[0].arch_code_a, space.decode(budget)[1])
            for rank, one in enumerate(found, start=1):
                assert budget is None or one.info["ram_ratio"] <= budget * (1 + 1e-8)
                assert one.info["ram_ratio"] == space.ram_ratio_of(one.arch_code_a, one.arch_code_c)
                assert (one.info["rank"], one.info["seed"]) == (rank, 7)
            for one in found[:: max(1, len(found) // 5)]:
                assert length(space, one.arch_code_a) == pytest.approx(-one.info["log_probability"], abs=1e-5)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_within_a_budget_are_those_of_many_that_fit(spread):
    """At the published size, where all cannot be tried: the budget is such that half of many architectures fit."""
    space = with_alphas(0, spread, 12, 4)
    many = space.architectures(300)
    budget = np.median([one.info["ram_ratio"] for one in many])
    fitting = [one.arch_code_a.tolist() for one in many if one.info["ram_ratio"] <= budget * (1 + 1e-9)]
    found = [one.arch_code_a.tolist() for one in space.architectures(64, budget)]
    assert 64 < len(fitting) < 300 and found == fitting[:64]


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1000.0])
def test_of_equally_probable_ones_the_same_are_taken_again_and_the_first_is_the_decoded_one(spread):
    """At spread 30, children's probabilities round to 0 or 1, and sequences of the same length abound."""
    for seed in range(2):
        space = with_alphas(seed, spread, 12, 4)
        free = space.architecture().info["ram_ratio"]
        for budget in (None, *(max(share * free, space.feasible_ram_ratio()) for share in (0.5, 0.7, 0.9))):
            found, again = ([one.arch_code_a.tolist() for one in space.architectures(20, budget)] for _ in range(2))
            assert found == again and found[0] == space.decode(budget)[1].tolist()
            assert len(set(map(str, found))) == len(found)


def test_none_is_no_number_of_architectures():
    for count in (0, -1):
        with pytest.raises(UserError, match=f"{count} architectures cannot be decoded: give 1 or more"):
            space_of(1, 2).architectures(count)


def test_a_loose_budget_changes_nothing_and_a_ratio_that_was_reported_can_be_kept():
    for seed in range(5):
        space = with_alphas(seed, 1.0, 12, 4)
        free = space.architecture()
        for expected, found in zip(space.decode(), space.decode(free.info["ram_ratio"]), strict=True):
            np.testing.assert_array_equal(found, expected)
        tight = space.architecture(0.5 * free.info["ram_ratio"])
        assert tight.info["ram_ratio"] <= 0.5 * free.info["ram_ratio"]
        again = space.architecture(tight.info["ram_ratio"])
        np.testing.assert_array_equal(again.arch_code_a, tight.arch_code_a)


@pytest.mark.parametrize("spread", [0.0, 1.0, 1000.0])
def test_the_published_size_and_five_depths_take_seconds_at_most(spread):
    for size in ((12, 4), (3, 5)):
        space = with_alphas(0, spread, *size)
        free = space.architecture().info["ram_ratio"]
        for share in (0.1, 0.5, 0.9):
            start = time.monotonic()
            assert space.architecture(max(share * free, space.feasible_ram_ratio())).info["ram_ratio"] <= free
            assert time.monotonic() - start < 60


def test_the_smallest_feasible_ratio_holds_for_any_operations():
    space = with_alphas(0, 1.0, 3, 3)
    least = space.feasible_ram_ratio()
    for operation in range(5):
        with torch.no_grad():
            space.log_alpha_c.zero_()[..., operation] = 1
        assert space.architecture(least).info["ram_ratio"] <= least * (1 + 1e-8)


def test_operations_count_in_the_fixed_budget_of_the_regulariser_alone():
    """All paths active with one operation each: the published share is the same for all, the fixed one is not."""
    space = with_alphas(0, 1.0, 2, 3)
    shares = {"published": [], "fixed": []}
    with torch.no_grad():
        for active in (0.0, 30.0):
            for operation in range(5):
                space.log_alpha_a.fill_(active)
                space.log_alpha_c.fill_(-30)[..., operation] = 30
                for budget, values in shares.items():
                    values.append(space.ram_ratio((1, 1, 32, 32, 32), budget).item())
    assert np.ptp(shares["published"][:5]) < 1e-6 and shares["published"][5:] == pytest.approx([1] * 5)
    skip, conv3d, *p3d = shares["fixed"][5:]
    assert skip < conv3d < p3d[0] and p3d == pytest.approx([1, 1, 1])
    assert shares["fixed"][0] < shares["fixed"][1] < shares["fixed"][2] < 1


class Ratio(torch.nn.Module):
    def __init__(self, space: SearchSpace, budget: str):
        super().__init__()
        self.space, self.budget = space, budget

    def forward(self) -> torch.Tensor:
        return self.space.ram_ratio((1, 1, 32, 32, 32), self.budget)


@pytest.mark.parametrize("budget", ["published", "fixed"])
def test_gradients_of_the_regulariser(budget):
    space = SearchSpace(num_blocks=2, num_depths=2, channel_mul=1 / 16).double()
    torch.manual_seed(0)
    module = Ratio(space, budget)
    alphas = [torch.randn_like(alpha).requires_grad_() for alpha in (space.log_alpha_a, space.log_alpha_c)]

    def ratio(log_alpha_a: torch.Tensor, log_alpha_c: torch.Tensor) -> torch.Tensor:
        given = {"space.log_alpha_a": log_alpha_a, "space.log_alpha_c": log_alpha_c}
        return torch.func.functional_call(module, given, ())

    assert torch.autograd.gradcheck(ratio, alphas)
    assert all(gradient.abs().max() > 1e-3 for gradient in torch.autograd.grad(ratio(*alphas), alphas))
