"""Uniformity is checked against every architecture of a tiny space, memory against a space's."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import islice, product

import numpy as np
import pytest
from architectures import connected
from architectures import random_architecture as any_architecture
from scipy.stats import chi2

from dints.errors import UserError
from dints.network.architecture import Architecture, load_architecture, paths
from dints.network.baselines import (
    all_paths,
    main,
    ram_ratio,
    random_architecture,
    random_architectures,
    u_shaped,
)
from dints.network.operations import PUBLISHED
from dints.network.space import SearchSpace

TWO = ("skip_connect", "conv_3x3x3")


def ends(architecture: Architecture, operation: str = "") -> list[list[tuple[int, int]]]:
    """List each block's active paths (of this operation) by their (source, target) depths."""
    every, names = paths(architecture.num_depths), architecture.operations
    return [
        sorted(
            every[path]
            for path in active.nonzero()[0]
            if not operation or names[codes[path]] == operation
        )
        for active, codes in zip(architecture.arch_code_a, architecture.arch_code_c, strict=True)
    ]


def codes(architecture: Architecture) -> tuple[int, ...]:
    """Return an operation per path, -1 where there is none."""
    codes = np.where(architecture.arch_code_a, architecture.arch_code_c, -1)
    return tuple(codes.flatten().tolist())


def test_the_u_shape_of_five_blocks_and_three_depths():
    assert ends(u_shaped(5, 3)) == [
        [(0, 0), (0, 1)],
        [(0, 0), (1, 1), (1, 2)],
        [(0, 0), (1, 1), (2, 2)],
        [(0, 0), (1, 1), (2, 1)],
        [(0, 0), (1, 0)],
    ]


def test_its_long_paths_may_be_skip_connections():
    names = ("conv_3x3x3", "conv_1x3x3", "skip_connect")
    architecture, plain = u_shaped(6, 3, names, skip_connections=True), u_shaped(6, 3, names)
    assert ends(architecture) == ends(plain) == ends(plain, "conv_3x3x3")
    skipping = [[], [(0, 0)], [(0, 0), (1, 1)], [(0, 0), (1, 1)], [(0, 0)], []]
    assert ends(architecture, "skip_connect") == skipping


def test_all_paths_hold_the_convolution_which_is_found_by_its_name():
    names = ("conv_3x3x1", "skip_connect", "conv_3x3x3")
    architecture = all_paths(4, 3, names)
    assert codes(architecture) == (2,) * 28 and architecture.operations == names
    for make in (u_shaped, all_paths):
        with pytest.raises(UserError, match="lacks conv_3x3x3"):
            make(3, 3, ("skip_connect", "conv_3x3x1"))


@pytest.mark.parametrize("names", [PUBLISHED, ("conv_1x3x3", "skip_connect")], ids=len)
def test_memory_is_that_of_a_search_space(names):
    for size, width in (((2, 2), 1 / 32), ((3, 4), 3 / 32)):
        space = SearchSpace(width, *size, names)
        for seed in range(5):
            architecture = any_architecture(seed, *size, operations=names)
            expected = space.ram_ratio_of(architecture.arch_code_a, architecture.arch_code_c)
            assert ram_ratio(architecture) == expected  # to the last bit


@cache
def every_architecture() -> dict[tuple[int, ...], float]:
    """Return the memory ratio of every architecture of 2 blocks, 2 depths and 2 operations."""
    space, found = SearchSpace(1 / 32, 2, 2, TWO), {}
    for combination in product((-1, 0, 1), repeat=8):
        operations = np.reshape(combination, (2, 4))
        arch_code_a, arch_code_c = (operations >= 0).astype(int), operations.clip(0)
        try:
            connected(arch_code_a, arch_code_c, operations=TWO)
        except UserError:
            continue
        found[combination] = space.ram_ratio_of(arch_code_a, arch_code_c)
    return found


@pytest.mark.parametrize(
    ("band", "keep_finest"), [((0, 0.25), False), ((0.6, 0.65), True), ((0.8, 1), True)], ids=str
)
def test_every_architecture_in_the_band_is_drawn_equally_often(band, keep_finest):
    wanted = {
        combination
        for combination, ratio in every_architecture().items()
        if band[0] <= ratio <= band[1]
        and not (keep_finest and -1 in (combination[0], combination[4]))
    }
    assert len(wanted) > 10
    expected = 10
    draws = random_architectures(2, 2, *band, np.random.default_rng(0), TWO, keep_finest)
    counts = Counter(map(codes, islice(draws, expected * len(wanted))))
    assert counts.keys() <= wanted
    statistic = sum((counts[combination] - expected) ** 2 / expected for combination in wanted)
    lowest, highest = chi2.ppf([1e-4, 1 - 1e-4], len(wanted) - 1)
    assert lowest < statistic < highest


@pytest.mark.parametrize("keep_finest", [False, True])
def test_tails_and_single_ratios_of_the_published_size_are_reached(keep_finest):
    generator = np.random.default_rng(1)
    for band in ((0.04, 0.05), (0.47, 0.5), (1, 1)):
        drawn = random_architecture(12, 4, *band, generator, keep_finest=keep_finest)
        assert band[0] <= ram_ratio(drawn) == drawn.info["ram_ratio"] <= band[1]
        assert drawn.arch_code_a[:, 0].all() or not keep_finest
        assert drawn.arch_code_c[drawn.arch_code_a == 0].sum() == 0
    # skip_connect at depth 3, or at depth 0
    smallest = 0.5 / 800.5 if not keep_finest else 32 / 800.5
    drawn = random_architecture(12, 4, 0, smallest, generator, keep_finest=keep_finest)
    assert ends(drawn) == [[(0, 0) if keep_finest else (3, 3)]] * 12


def test_bad_bands_and_sizes_are_refused_with_what_is_possible():
    def draw(low: float, high: float, num_depths: int = 4) -> None:
        random_architecture(12, num_depths, low, high, np.random.default_rng(0))

    # In the last, there is none: the sums of 12 blocks' costs are multiples of 1/2 of 9606.
    for band in ((0.4, 0.3), (0, 0.0006), (float("nan"), 1), (0.50001, 0.50002)):
        with pytest.raises(UserError, match=r"no architecture .* wider band .* 0\.000625 to 1"):
            draw(*band)
    with pytest.raises(UserError, match="--num_depths 7 is too many .* at most 6"):
        draw(0, 1, 7)


def test_the_command_writes_each_kind(tmp_path, capsys):
    def write(kind: str, *flags: str) -> Architecture:
        size = ["--num_blocks", "3", "--num_depths", "2", "--output_root", str(tmp_path)]
        main(["--kind", kind, *size, *flags])
        path, _, _ = capsys.readouterr().out.partition(": ram ratio")
        return load_architecture(path)

    assert codes(write("u_shaped")) == codes(u_shaped(3, 2))
    assert codes(write("u_shaped_skip")) == codes(u_shaped(3, 2, skip_connections=True))
    every = write("all_paths", "--operations", "conv_3x3x3", "--use_downsample", "no")
    assert every.operations == ("conv_3x3x3",) and not every.use_downsample
    drawn = write("random", "--ram_ratio", "0.3", "0.5", "--seed", "7", "--keep_finest")
    assert drawn.arch_code_a[:, 0].all() and 0.3 <= drawn.info["ram_ratio"] <= 0.5
    assert drawn.info["baseline"] == "random" and drawn.info["seed"] == 7
    with pytest.raises(UserError, match=r"u_shaped_3x2\.pth exists"):
        write("u_shaped")
    with pytest.raises(SystemExit, match="2"):
        write("random")
    assert "--kind random and --ram_ratio go together" in capsys.readouterr().err
