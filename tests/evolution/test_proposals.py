"""Candidates are connected, different from each other, and each fills the memory; mutants are near
their parents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from architectures import chain, everything, halving
from architectures import random_architecture as some_architecture

from dints.errors import UserError
from dints.evolution import proposals
from dints.evolution.proposals import (
    CHANGES,
    KINDS,
    Candidate,
    Limits,
    memory_of_share,
    mutants,
    mutated,
    proposed,
)
from dints.network.architecture import Architecture, from_codes
from dints.network.cost import cost
from dints.network.operations import PUBLISHED
from dints.network.strides import isotropic

LIMITS = Limits(1.5, 3, PUBLISHED, isotropic(3, False), False, (2, 1, 16, 16, 16), 3)


GIVEN = [halving(some_architecture(seed, 3, 3), False) for seed in (1, 2)]


@pytest.fixture(autouse=True)
def fitting(monkeypatch) -> Callable[[], None]:
    """Give all one width, since to count costs takes long; return a function that undoes that."""
    real = proposals.fitting_channel_mul
    monkeypatch.setattr(proposals, "fitting_channel_mul", lambda *_: 5 / 32)
    return lambda: monkeypatch.setattr(proposals, "fitting_channel_mul", real)


@pytest.fixture
def members() -> list[Candidate]:
    return proposed(9, KINDS, LIMITS, GIVEN, seed=0)


def test_all_that_are_given_come_first_and_then_kinds_in_turn_none_twice(members):
    names = ["given_1", "given_2", "by_hand_1", "random_1", "by_hand_2", "random_2"]
    assert [member.name for member in members[:6]] == names
    given = [member.architecture.codes() for member in members[:2]]
    assert given == [architecture.codes() for architecture in GIVEN]
    assert len({str(member.architecture.codes()) for member in members}) == 9
    assert len(proposed(3, KINDS, LIMITS, [GIVEN[0]] * 2, seed=0)) == 3


def test_the_same_seed_gives_the_same_candidates_and_another_one_others(members):
    def codes(candidates):
        return [(one.name, one.architecture.codes(), one.channel_mul) for one in candidates]

    assert codes(proposed(9, KINDS, LIMITS, GIVEN, seed=0)) == codes(members)
    others = {str(code) for _, code, _ in codes(proposed(9, ["random"], LIMITS, [], seed=1))}
    randoms = (member for member in members if member.kind == "random")
    assert not others & {str(member.architecture.codes()) for member in randoms}


def test_each_fills_the_memory_but_for_one_channel(fitting):
    fitting()
    for member in proposed(3, KINDS, LIMITS, GIVEN[:1], seed=0):
        least, more = (
            cost(member.architecture, 1, 3, (16, 16, 16), width, batch_size=2).step_mib
            for width in (member.channel_mul, member.channel_mul + 1 / 32)
        )
        assert least <= LIMITS.memory_mib < more, member.name


@pytest.mark.parametrize(("widest", "stepped"), [(5, 5), (8, 8), (21, 16)])
def test_widths_for_a_gpu_are_multiples_of_eight_channels_where_so_many_fit(
    monkeypatch, widest, stepped
):
    monkeypatch.setattr(proposals, "fitting_channel_mul", lambda *_: widest / 32)
    assert 32 * replace(LIMITS, channel_step=8).channel_mul(GIVEN[0]) == stepped


def test_random_ones_keep_the_finest_resolution_and_are_of_many_densities():
    drawn = [member.architecture for member in proposed(12, ["random"], LIMITS, [], seed=0)]
    assert all(one.arch_code_a[:, 0].all() and not one.use_downsample for one in drawn)
    ratios = [one.info["ram_ratio"] for one in drawn]
    assert np.median(ratios) < 0.25 and max(ratios) > 0.45  # as many wide ones as narrow ones


def test_the_stem_is_that_of_the_space():
    halving_limits = replace(LIMITS, strides=isotropic(3))
    members = proposed(4, ["by_hand", "random"], halving_limits, [], seed=0)
    assert all(member.architecture.use_downsample for member in members)


def test_without_the_operations_of_hand_made_ones_there_are_others():
    def made(*operations: str) -> list[str]:
        limits = replace(LIMITS, operations=operations)
        return [member.kind for member in proposed(3, ["by_hand", "random"], limits, [], seed=0)]

    assert made("skip_connect", "conv_3x3x1") == ["random"] * 3
    # The second U would be the first one
    assert made("conv_3x3x3") == ["by_hand", "random", "random"]


def test_a_share_of_every_path_is_that_of_the_dearest_network():
    space = 4, ("skip_connect", "conv_3x3x3", "conv_3x3x1"), isotropic(3, False)
    shapes = (2, 1, 16, 16, 16), 3
    half = memory_of_share(0.5, *space, 0.25, *shapes)
    assert memory_of_share(1.0, *space, 0.25, *shapes) == 2 * half
    every_path = np.ones((4, 7), dtype=int)
    of_all = [
        cost(
            from_codes(every_path, kind * every_path, *space[1:]), 1, 3, (16, 16, 16), 0.25, 2
        ).step_mib
        for kind in range(3)
    ]
    assert 2 * half == max(of_all) == of_all[2] > of_all[1]


def test_too_few_are_an_error_with_a_reason(monkeypatch):
    few = r"--proposals by_hand give \d candidates .* and 9 are needed: there are no more"
    with pytest.raises(UserError, match=few):
        proposed(9, ["by_hand"], LIMITS, [], seed=0)

    def refuse(*_) -> float:
        raise UserError("it is too large")

    monkeypatch.setattr(proposals, "fitting_channel_mul", refuse)
    with pytest.raises(
        UserError, match="give 0 candidates for --memory_mib 1.5, .*it is too large"
    ):
        proposed(2, KINDS, LIMITS, [], seed=0)
    with pytest.raises(UserError, match="cannot compete: it is too large"):
        proposed(2, KINDS, LIMITS, GIVEN, seed=0)


class TestMutants:
    def test_are_new_and_name_their_parents(self, members):
        parents = members[:2]
        made = mutants(8, parents, members, LIMITS, seed=0)
        assert [mutant.parent for mutant in made] == [
            parents[number % 2].name for number in range(8)
        ]
        assert [mutant.name for mutant in made] == [f"mutant_{number}" for number in range(1, 9)]
        assert len({str(one.architecture.codes()) for one in (*members, *made)}) == len(members) + 8

    def test_keep_the_finest_resolution_where_that_is_asked_for(self):
        generator, parent, left = np.random.default_rng(0), everything(3, 3), []
        for keep_finest in (True, False):
            made = [
                one for one in (mutated(parent, keep_finest, generator) for _ in range(300)) if one
            ]
            left.append(sum(not one.arch_code_a[:, 0].all() for one in made))
        assert left[0] == 0 < left[1]

    def test_each_change_occurs(self):
        generator, parent = np.random.default_rng(0), some_architecture(3, 4, 3)
        seen = {
            change
            for _ in range(300)
            for change in changes(parent, mutated(parent, False, generator))
        }
        assert seen == set(CHANGES)

    def test_there_are_fewer_where_no_more_are_found(self, members, monkeypatch):
        draws = iter([members[0].architecture, everything(3, 3), None, everything(3, 3)])
        monkeypatch.setattr(proposals, "mutated", lambda *_: next(draws, None))
        (made,) = mutants(8, members[:2], members[:1], LIMITS, seed=0)
        assert made.architecture.codes() == everything(3, 3).codes()

    def test_a_chain_that_cannot_lose_its_path_stays(self):
        parent = chain(0, 0, num_depths=2)
        made = [mutated(parent, False, np.random.default_rng(seed)) for seed in range(50)]
        assert all(one is None or one.arch_code_a.any(-1).all() for one in made)


def changes(parent: Architecture, mutant: Architecture | None) -> set[str]:
    """Tell what differs, where it can be told."""
    if mutant is None:
        return set()
    if mutant.use_downsample != parent.use_downsample:
        return {"stem"}
    if mutant.num_blocks != parent.num_blocks:
        return {"block"}
    return {"operation" if (mutant.arch_code_a == parent.arch_code_a).all() else "path"}
