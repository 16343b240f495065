"""Uniformity is checked against every architecture of a tiny space, memory against that of a
`SearchSpace`.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import islice, product

import numpy as np
import pytest
from architectures import connected
from architectures import random_architecture as any_architecture
from scipy.stats import chi2

from dints import __version__
from dints.errors import UserError
from dints.network import baselines
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
SIZES = [(1, 2), (4, 4), (9, 3), (12, 6)]


def ends(architecture: Architecture) -> list[list[tuple[int, int]]]:
    """List the (source, target) depths of each block's active paths."""
    every = paths(architecture.num_depths)
    return [
        sorted(every[path] for path in block.nonzero()[0]) for block in architecture.arch_code_a
    ]


def codes(architecture: Architecture) -> tuple[int, ...]:
    """Return an operation per path, -1 where there is none."""
    return tuple(
        np.where(architecture.arch_code_a, architecture.arch_code_c, -1).flatten().tolist()
    )


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
    assert architecture.info["baseline"] == "u_shaped_skip" and ends(architecture) == ends(plain)
    skipping = [
        [
            path
            for path, operation in zip(block, codes[active == 1], strict=True)
            if names[operation] == "skip_connect"
        ]
        for block, codes, active in zip(
            ends(architecture), architecture.arch_code_c, architecture.arch_code_a, strict=True
        )
    ]
    assert skipping == [[], [(0, 0)], [(0, 0), (1, 1)], [(0, 0), (1, 1)], [(0, 0)], []]
    assert not plain.arch_code_c.any()  # conv_3x3x3 on all, as before
    with pytest.raises(UserError, match="lacks skip_connect"):
        u_shaped(6, 3, ("conv_3x3x3",), skip_connections=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_u_shapes_are_symmetric_and_as_deep_as_they_can_be(size):
    architecture = u_shaped(*size)
    used = architecture.node_a.nonzero()
    assert used[1].max() == min(size[1] - 1, size[0] // 2)
    assert (
        np.flatnonzero(architecture.node_a[0]).tolist()
        == np.flatnonzero(architecture.node_a[-1]).tolist()
        == [0]
    )
    mirrored = [
        sorted((target, source) for source, target in block)
        for block in reversed(ends(architecture))
    ]
    assert mirrored == ends(architecture)
    changes = [sum(source != target for source, target in block) for block in ends(architecture)]
    assert max(changes) <= 1 and sum(changes) == 2 * used[1].max()


@pytest.mark.parametrize("make", [u_shaped, all_paths])
def test_the_convolution_is_found_by_its_name(make):
    for names in (PUBLISHED, ("conv_3x3x1", "skip_connect", "conv_3x3x3"), ("conv_3x3x3",)):
        architecture = make(3, 3, names)
        assert architecture.operations == names and architecture.info["baseline"] == make.__name__
        held = architecture.arch_code_c[architecture.arch_code_a == 1]
        assert {names[operation] for operation in held} == {"conv_3x3x3"}
        assert architecture.arch_code_c[architecture.arch_code_a == 0].sum() == 0


def test_all_paths_are_active():
    assert all_paths(4, 3).arch_code_a.tolist() == [[1] * 7] * 4


@pytest.mark.parametrize("names", [PUBLISHED, TWO, ("conv_1x3x3", "skip_connect")], ids=len)
def test_memory_is_that_of_a_search_space(names):
    for size, width in (((2, 2), 1 / 32), ((3, 4), 3 / 32), ((2, 5), 1 / 16)):
        space = SearchSpace(width, *size, names)
        for seed in range(10):
            architecture = any_architecture(seed, *size, operations=names)
            expected = space.ram_ratio_of(architecture.arch_code_a, architecture.arch_code_c)
            assert ram_ratio(architecture) == expected  # to the last bit
        assert u_shaped(*size).info["ram_ratio"] == ram_ratio(u_shaped(*size))


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


@pytest.mark.parametrize("keep_finest", [False, True])
@pytest.mark.parametrize("band", [(0, 0.25), (0.6, 0.65), (0.8, 1)], ids=str)
def test_every_architecture_in_the_band_is_drawn_equally_often(band, keep_finest):
    wanted = {
        combination
        for combination, ratio in every_architecture().items()
        if band[0] <= ratio <= band[1]
        and not (keep_finest and -1 in (combination[0], combination[4]))
    }
    assert len(wanted) > 10
    expected = 20
    draws = random_architectures(2, 2, *band, np.random.default_rng(0), TWO, keep_finest)
    counts = Counter(map(codes, islice(draws, expected * len(wanted))))
    assert counts.keys() <= wanted
    statistic = sum((counts[combination] - expected) ** 2 / expected for combination in wanted)
    lowest, highest = chi2.ppf([1e-4, 1 - 1e-4], len(wanted) - 1)
    assert lowest < statistic < highest


@pytest.mark.parametrize("keep_finest", [False, True])
@pytest.mark.parametrize("band", [(0.04, 0.05), (0.47, 0.5), (1, 1)], ids=str)
def test_tails_of_the_published_size_are_reached(band, keep_finest):
    generator = np.random.default_rng(1)
    draws = random_architectures(12, 4, *band, generator, keep_finest=keep_finest)
    for architecture in islice(draws, 5):
        assert band[0] <= ram_ratio(architecture) == architecture.info["ram_ratio"] <= band[1]
        assert architecture.arch_code_a[:, 0].all() or not keep_finest
        assert architecture.arch_code_c[architecture.arch_code_a == 0].sum() == 0


@pytest.mark.parametrize("keep_finest", [False, True])
def test_the_smallest_and_a_ratio_that_was_drawn_are_bands_too(keep_finest):
    # skip_connect at depth 3, or at depth 0
    smallest = 0.5 / 800.5 if not keep_finest else 32 / 800.5
    architecture = random_architecture(
        12, 4, 0, smallest, np.random.default_rng(0), keep_finest=keep_finest
    )
    assert ends(architecture) == [[(0, 0) if keep_finest else (3, 3)]] * 12
    ratio = random_architecture(3, 2, 0.2, 0.3, np.random.default_rng(0), TWO, keep_finest).info[
        "ram_ratio"
    ]
    again = random_architecture(3, 2, ratio, ratio, np.random.default_rng(1), TWO, keep_finest)
    assert again.info["ram_ratio"] == ratio


def test_bad_bands_are_refused_with_what_is_possible():
    def draw(low: float, high: float, keep_finest: bool = False) -> None:
        random_architecture(12, 4, low, high, np.random.default_rng(0), keep_finest=keep_finest)

    for band in ((0.4, 0.3), (1.01, 2), (0, 0.0006), (float("nan"), 1)):
        with pytest.raises(
            UserError,
            match=r"is no band .* ratios from 0\.00063 to 1 are "
            r"possible",
        ):
            draw(*band)
    with pytest.raises(
        UserError,
        match=r"is no band .*, the finest path kept, ratios from 0\.04 "
        r"to 1 are possible",
    ):
        draw(0, 0.039, keep_finest=True)
    # The sums of 12 blocks' costs are multiples of 1/2 of 9606.
    with pytest.raises(
        UserError,
        match=r"none of 100,000 draws .* wider band; .* from 0\.00063 to "
        r"1 are possible",
    ):
        draw(0.50001, 0.50002)


def test_sizes_and_operations_are_refused_by_name():
    for make in (
        u_shaped,
        all_paths,
        lambda *given: random_architecture(*given[:2], 0, 1, np.random.default_rng()),
    ):
        for size in ((0, 3), (1001, 3)):
            with pytest.raises(UserError, match=r"--num_blocks is \d+: give 1 to 1000"):
                make(*size)
        for size in ((3, 1), (3, 7)):
            with pytest.raises(UserError, match="--num_depths is .: give 2 to 6"):
                make(*size)
    for make in (u_shaped, all_paths):
        with pytest.raises(UserError, match="lacks conv_3x3x3"):
            make(3, 3, ("skip_connect", "conv_3x3x1"))
        with pytest.raises(UserError, match="names the operation 'conv_9'"):
            make(3, 3, ("conv_3x3x3", "conv_9"))


def test_the_command_writes_each_kind(tmp_path, capsys):
    small = ["--output_root", str(tmp_path / "made"), "--num_blocks", "3", "--num_depths", "2"]
    main([*small, "--u_shaped"])
    made = load_architecture(tmp_path / "made" / "u_shaped_3x2.pth")
    assert codes(made) == codes(u_shaped(3, 2)) and made.info == {
        **u_shaped(3, 2).info,
        "version": __version__,
    }
    said = (
        f"{tmp_path / 'made' / 'u_shaped_3x2.pth'}: ram ratio {ram_ratio(made):.4f}, 6 of 12 "
        "paths\n"
    )
    assert capsys.readouterr().out == said
    with pytest.raises(UserError, match=r"u_shaped_3x2\.pth exists"):
        main([*small, "--u_shaped"])
    main([*small, "--u_shaped_skip"])
    skip = load_architecture(tmp_path / "made" / "u_shaped_skip_3x2.pth")
    assert codes(skip) == codes(u_shaped(3, 2, skip_connections=True))
    main([*small, "--all_paths", "--operations", "conv_3x3x3", "--use_downsample", "no"])
    every = load_architecture(tmp_path / "made" / "all_paths_3x2.pth")
    assert every.operations == ("conv_3x3x3",) and not every.use_downsample


def test_the_command_numbers_random_ones(tmp_path):
    def write(folder: str, number: int, *settings: str) -> dict[str, Architecture]:
        root = tmp_path / folder
        small = [
            "--output_root",
            str(root),
            "--num_blocks",
            "3",
            "--num_depths",
            "3",
            "--ram_ratio",
            "0.1",
            "0.2",
        ]
        main([*small, "--random", str(number), *settings])
        return {path.name: load_architecture(path) for path in sorted(root.iterdir())}

    three, one = write("three", 3, "--seed", "7"), write("one", 1, "--seed", "7")
    assert list(three) == [f"random_7_{number}.pth" for number in range(3)]
    assert codes(three["random_7_0.pth"]) == codes(one["random_7_0.pth"])
    assert len(set(map(codes, three.values()))) == 3
    (drawn,) = write("finest", 1, "--keep_finest").values()
    assert drawn.arch_code_a[:, 0].all() and 0.1 <= drawn.info["ram_ratio"] <= 0.2
    facts = {
        "baseline": "random",
        "ram_ratio_band": [0.1, 0.2],
        "keep_finest": True,
        "seed": 0,
        "number": 0,
    }
    assert drawn.info == {**facts, "ram_ratio": ram_ratio(drawn), "version": __version__}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "one of the arguments --u_shaped --u_shaped_skip --all_paths --random is required"),
        (["--random", "1"], "--random and --ram_ratio go together"),
        (["--random", "0", "--ram_ratio", "0", "1"], "and --random at least 1"),
    ],
)
def test_flags_that_do_not_go_together(flags, complaint, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--output_root", str(tmp_path / "none"), *flags])
    assert complaint in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_the_command_ends_with_one_line_and_waits_for_no_monai(tmp_path):
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        baselines.__name__,
        "--output_root",
        str(tmp_path),
    ]
    refused = subprocess.run(
        [*command, "--u_shaped", "--num_depths", "1"], capture_output=True, text=True
    )
    *imported, said = refused.stderr.splitlines()
    assert (refused.returncode, refused.stdout, said) == (
        1,
        "",
        "error: --num_depths is 1: give 2 to 6",
    )
    assert any("torch" in line for line in imported) and not any(
        "monai" in line for line in imported
    )
