"""Where there are few sequences of children, all of them are tried: the oracle of decoding."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import pytest
import torch

from dints.errors import UserError
from dints.network.space import SearchSpace

SMALL = 1 / 16  # channel_mul


@cache
def space_of(num_blocks: int, num_depths: int, keep_finest: bool = False) -> SearchSpace:
    return SearchSpace(SMALL, num_blocks, num_depths, keep_finest=keep_finest)


def with_alphas(seed: int, spread: float, *size) -> SearchSpace:
    """Draw alphas; those of the finest path are so low that it is never kept for its own sake."""
    space, generator = space_of(*size), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in (space.log_alpha_a, space.log_alpha_c):
            alpha.normal_(0, spread, generator=generator)
        space.log_alpha_a[:, 0] -= 8 * space.keep_finest
    return space


def lengths_of_children(space: SearchSpace) -> np.ndarray:
    """Return what decoding minimises the sum of: (blocks, children)."""
    return -np.log(space.get_prob_a(child=True)[0].detach().numpy().astype(float) + 1e-5)


def length(space: SearchSpace, arch_code_a: np.ndarray) -> float:
    """Return the length of an architecture, from its children one by one."""
    rows = [(space.child_list == paths).all(-1).argmax() for paths in arch_code_a]
    return lengths_of_children(space)[range(len(rows)), rows].sum()


def all_architectures(space: SearchSpace) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths and ratios of every connected sequence of children."""
    arch_code_c = space.log_alpha_c.argmax(-1).numpy()
    lengths = lengths_of_children(space)
    ratios = np.zeros((space.num_blocks, len(space.child_list)))
    for block, number in np.ndindex(ratios.shape):
        arch_code_a = np.zeros(arch_code_c.shape)
        arch_code_a[block] = space.child_list[number]
        ratios[block, number] = space.ram_ratio_of(arch_code_a, arch_code_c)
    connected = space.ends[:, None] == space.starts[None]
    total, memory, last = lengths[0], ratios[0], np.arange(len(space.child_list))
    for block in range(1, space.num_blocks):
        before, last = connected[last].nonzero()
        total = total[before] + lengths[block][last]
        memory = memory[before] + ratios[block][last]
    return total, memory


@pytest.mark.parametrize("spread", [0.0, 4.0])  # at 0 all are equally probable
@pytest.mark.parametrize("size", [(1, 2), (4, 2), (2, 3), (3, 3, True)], ids=str)
def test_no_architecture_within_the_budget_is_more_probable(size, spread):
    space = with_alphas(0, spread, *size)
    lengths, ratios = all_architectures(space)
    assert length(space, space.decode()[1]) == pytest.approx(lengths.min(), abs=1e-6)
    for budget in [ratios.min(), *np.quantile(ratios, [0.05, 0.5, 0.9]), 1.0]:
        found = space.architecture(budget)
        ratio = space.ram_ratio_of(found.arch_code_a, found.arch_code_c)
        assert found.info["ram_ratio"] == ratio <= budget * (1 + 1e-8)
        best = lengths[ratios <= budget * (1 + 1e-9)].min()
        assert length(space, found.arch_code_a) == pytest.approx(best, abs=1e-6)
        assert found.arch_code_a[:, 0].all() or not space.keep_finest
    with pytest.raises(UserError, match="max_ram_ratio .* is below that of the smallest connected"):
        space.decode(0.99 * ratios.min())


def test_a_loose_budget_changes_nothing_and_a_reported_ratio_can_be_kept():
    space = with_alphas(0, 1.0, 12, 4)
    free = space.architecture()
    ratio = free.info["ram_ratio"]
    assert space.architecture(ratio).codes() == free.codes()
    tight = space.architecture(0.5 * ratio)
    assert tight.info["ram_ratio"] <= 0.5 * ratio
    assert space.architecture(tight.info["ram_ratio"]).codes() == tight.codes()


@pytest.mark.parametrize("size", [(12, 4), (3, 5), (12, 4, True)], ids=str)
def test_the_published_size_and_five_depths_take_seconds_at_most(size):
    """At spread 1000 children's probabilities are 0 or 1, and sequences of one length abound."""
    for spread in (0.0, 1000.0):
        space = with_alphas(0, spread, *size)
        free, least = space.architecture().info["ram_ratio"], space.feasible_ram_ratio()
        start, budget = time.monotonic(), max(0.5 * free, least)
        found = space.architecture(budget)
        assert found.info["ram_ratio"] <= budget * (1 + 1e-8) and time.monotonic() - start < 60


@pytest.mark.parametrize("keep_finest", [False, True])
def test_the_smallest_feasible_ratio_holds_for_any_operations(keep_finest):
    space = with_alphas(0, 1.0, 3, 3, keep_finest)
    least = space.feasible_ram_ratio()
    for operation in range(5):
        with torch.no_grad():
            space.log_alpha_c.zero_()[..., operation] = 1
        assert space.architecture(least).info["ram_ratio"] <= least * (1 + 1e-8)
    # the last operation is one of the dearest
    assert least == pytest.approx(all_architectures(space)[1].min())
