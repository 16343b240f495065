"""Make architectures without a search: baselines for searched ones, and a start for those who do
not search.

    python -m dints.network.baselines --output_root runs/baselines --u_shaped_skip --num_blocks 9
    --num_depths 3 python -m dints.network.baselines --output_root runs/baselines --random 5
    --ram_ratio 0.2 0.3 --seed 0

Each is an arch file for train_dints.py. A U shape and all paths hold 3x3x3 convolutions, and
--u_shaped_skip makes the U's long paths skip connections. Random ones are drawn uniformly from all
connected architectures whose memory is within a band, as a share of every path active with its
dearest operation: the share of a search's --ram_budget fixed and --max_ram_ratio.

Nearly all architectures have about the same memory: rejection alone would never reach a band far
from it. Therefore they are drawn with probabilities proportional to exp(tilt * memory), whose bulk
the tilt moves to the band. Draws within it are then kept with probability exp(-tilt * memory), up
to a factor, which makes all equal again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax

from dints import __version__
from dints.errors import UserError, exit_on_user_error
from dints.network import decoding
from dints.network.architecture import (
    Architecture,
    depth_sizes,
    from_codes,
    paths,
    save_architecture,
)
from dints.network.operations import OPERATIONS, PUBLISHED, check_names

CONVOLUTION, SKIP = "conv_3x3x3", "skip_connect"
MAX_BLOCKS, MAX_DEPTHS = 1000, 6  # at 7 depths a block has half a million children
MAX_DRAWS, BATCH = 100_000, 500
# Only the smallest or largest are left at this tilt, and logarithms of probabilities are still
# right to 7 digits.
MAX_TILT = 1e9
# Feature maps that MONAI counts for a change of resolution, by the target's depth less the
# source's.
CHANGES_OF_RESOLUTION = {0: 0, -1: 6, 1: 7}


def u_shaped(
    num_blocks: int,
    num_depths: int,
    operations: Sequence[str] = PUBLISHED,
    skip_connections: bool = False,
) -> Architecture:
    """Make a U: down a depth a block, along the bottom while blocks are left, and up; every depth
    on the way continues.

    It starts and ends at depth 0. Where the blocks are too few for the deepest level, it reaches
    ``num_blocks // 2``. Every path holds conv_3x3x3.

    Args:
        skip_connections: above the bottom, let a depth's first and last path hold conv_3x3x3 and
            those between
            skip_connect, which cost nothing: a U-Net's skip connections. More blocks then are more
                convolutions at
            the bottom, where they are cheap.

    Raises:
        UserError: a size is out of range, or the operations lack conv_3x3x3, or skip_connect where
            that is asked for.
    """
    operations = _checked(num_blocks, num_depths, operations)
    bottom = [min(row, num_blocks - row, num_depths - 1) for row in range(num_blocks + 1)]
    arch_code_a = np.zeros((num_blocks, 3 * num_depths - 2), dtype=np.int64)
    passed_by = np.zeros(arch_code_a.shape, dtype=bool)
    for block, (before, after) in enumerate(zip(bottom, bottom[1:], strict=False)):
        for path, (source, target) in enumerate(paths(num_depths)):
            goes_on = source == target <= min(before, after)
            arch_code_a[block, path] = goes_on or (source, target) == (before, after)
            passed_by[block, path] = source == target < min(before, after)
    if not skip_connections:
        return _convolutional(arch_code_a, operations, "u_shaped")
    return _convolutional(arch_code_a, operations, "u_shaped_skip", skipping=passed_by)


def all_paths(
    num_blocks: int, num_depths: int, operations: Sequence[str] = PUBLISHED
) -> Architecture:
    """Make every path active, with conv_3x3x3.

    Raises:
        UserError: a size is out of range, or the operations lack conv_3x3x3.
    """
    operations = _checked(num_blocks, num_depths, operations)
    return _convolutional(
        np.ones((num_blocks, 3 * num_depths - 2), dtype=np.int64), operations, "all_paths"
    )


def random_architecture(
    num_blocks: int, num_depths: int, low: float, high: float, *settings, **more
) -> Architecture:
    """Draw one architecture as `random_architectures` does, with the same arguments."""
    return next(random_architectures(num_blocks, num_depths, low, high, *settings, **more))


def random_architectures(
    num_blocks: int,
    num_depths: int,
    low: float,
    high: float,
    generator: np.random.Generator,
    operations: Sequence[str] = PUBLISHED,
    keep_finest: bool = False,
) -> Iterator[Architecture]:
    """Draw without end, uniformly from the connected architectures whose `ram_ratio` is from
    ``low`` to ``high``.

    Two are the same if they have the same active paths with the same operations on them.

    Args:
        keep_finest: draw only from those that keep the path along depth 0 active in every block.

    Raises:
        UserError: a size is out of range, or no architecture is found in the band; the message
            names what is possible.
    """
    operations = _checked(num_blocks, num_depths, operations)
    choice = _Choice(num_blocks, num_depths, operations, keep_finest)
    possible = (
        f"with {num_blocks} blocks, {num_depths} depths and the operations {', '.join(operations)}"
        f"{', the finest path kept' * keep_finest}, ratios from {_rounded_up(choice.least_ratio)} "
        "to 1 are possible"
    )
    if not (low <= high and low <= 1 and high >= choice.least_ratio):
        raise UserError(
            f"--ram_ratio {low:g} {high:g} is no band with an architecture in it: {possible}"
        )
    tilt, edge = _tilt_to(choice, low, high)
    tilted, draws_in_vain = _Tilted(choice, tilt), 0
    made = {
        "baseline": "random",
        "ram_ratio_band": [float(low), float(high)],
        "keep_finest": keep_finest,
    }
    while draws_in_vain < MAX_DRAWS:
        arch_code_a, arch_code_c = tilted.draw(generator, BATCH)
        ratios = _ratios(choice.costs, arch_code_a, arch_code_c)
        equalised = np.exp(-tilt * (ratios.clip(low, high) - edge))  # at most 1, and 1 at the edge
        kept = (ratios >= low) & (ratios <= high) & (generator.random(BATCH) < equalised)
        draws_in_vain = 0 if kept.any() else draws_in_vain + BATCH
        for index in np.flatnonzero(kept):
            yield _architecture(arch_code_a[index], arch_code_c[index], operations, made)
    raise UserError(
        f"--ram_ratio {low:g} {high:g}: none of {MAX_DRAWS:,} draws is within, so give a wider "
        f"band; {possible}"
    )


def ram_ratio(architecture: Architecture) -> float:
    """Return the memory of the architecture as a share of every path active with its dearest
    operation.

    It is that of `SearchSpace.ram_ratio_of`, where channel_mul makes whole numbers of channels.
    """
    costs = _path_costs(architecture.num_depths, architecture.operations)
    return float(_ratios(costs, architecture.arch_code_a, architecture.arch_code_c))


def least_ram_ratio(
    num_blocks: int,
    num_depths: int,
    operations: Sequence[str] = PUBLISHED,
    keep_finest: bool = False,
) -> float:
    """Return the `ram_ratio` of the smallest architecture that `random_architecture` may draw."""
    return _Choice(
        num_blocks, num_depths, _checked(num_blocks, num_depths, operations), keep_finest
    ).least_ratio


class _Choice:
    """All connected architectures of a size.

    Attributes:
        children: (children, paths), which paths a child has, in the order of the patterns from
            which children start.
        starts, ends: (children,), these patterns, and those in which children end. Only patterns
            from which a child starts count, from 0.
        first: (patterns + 1,), the first child of each pattern, and past the last the number of
            children.
        costs: (paths, operations), memory of a path with an operation.
        dearest: memory of every path active with its dearest operation.
        least_ratio: of the smallest architecture.
    """

    def __init__(
        self, num_blocks: int, num_depths: int, operations: tuple[str, ...], keep_finest: bool
    ):
        self.num_blocks = num_blocks
        # path 0 leads from depth 0 to depth 0
        children = np.array(decoding.subsets(3 * num_depths - 2, keep_finest))
        starts, ends = (
            decoding.patterns(children, depths, num_depths)
            for depths in np.array(paths(num_depths)).T
        )
        order = starts.argsort(kind="stable")
        used, self.starts = np.unique(starts[order], return_inverse=True)
        self.children, self.ends = children[order], np.searchsorted(used, ends[order])
        self.first = np.searchsorted(self.starts, np.arange(len(used) + 1))
        self.costs = _path_costs(num_depths, operations)
        self.dearest = num_blocks * self.costs.max(-1).sum()
        cheapest = np.tile(self.children @ self.costs.min(-1), (num_blocks, 1))
        self.least_ratio = decoding.least_memory(cheapest, self.starts, self.ends) / self.dearest


class _Tilted:
    """The connected architectures, each with a probability proportional to exp(tilt * its memory
    ratio).

    A beginning of an architecture matters to what follows by the pattern alone in which it ends. So
    the sum over all ways on is known for each pattern, block by block from the last, and each
    block's child is drawn by its share in it.

    Attributes:
        operations: (paths, operations), probabilities of an active path's operations.
        first_patterns: (patterns,), probabilities of the nodes from which the first block starts.
        blocks: for each block (children,), a child's probability where the one before ends in the
            child's start.
        expected_ratio: the mean of the memory ratio.
    """

    def __init__(self, choice: _Choice, tilt: float):
        self.choice = choice
        ratios = choice.costs / choice.dearest
        self.operations = softmax(tilt * ratios, -1)
        log_children = choice.children @ logsumexp(tilt * ratios, -1)
        mean_children = choice.children @ (self.operations * ratios).sum(-1)
        log_ways_on, mean_on = np.zeros((2, len(choice.first) - 1))
        self.blocks = []
        for _ in range(choice.num_blocks):
            log_ways = log_children + log_ways_on[choice.ends]
            log_ways_on = np.logaddexp.reduceat(log_ways, choice.first[:-1])
            probs = np.exp(log_ways - log_ways_on[choice.starts])
            mean_on = np.add.reduceat(
                probs * (mean_children + mean_on[choice.ends]), choice.first[:-1]
            )
            self.blocks.insert(0, probs)
        self.first_patterns = softmax(log_ways_on)
        self.expected_ratio = self.first_patterns @ mean_on

    def draw(self, generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ``arch_code_a`` and ``arch_code_c`` of ``count`` independent draws, (count,
        blocks, paths) each.
        """
        drawn = np.zeros((count, len(self.blocks)), dtype=np.int64)
        reached = generator.choice(len(self.first_patterns), count, p=self.first_patterns)
        for block, probs in enumerate(self.blocks):
            for pattern in np.unique(reached):
                first, last = self.choice.first[pattern : pattern + 2]
                here, share = reached == pattern, probs[first:last]
                # The shares add up to 1 but for rounding, on which NumPy insists.
                drawn[here, block] = first + generator.choice(
                    last - first, here.sum(), p=share / share.sum()
                )
            reached = self.choice.ends[drawn[:, block]]
        arch_code_a = self.choice.children[drawn]
        kinds = [generator.choice(len(probs), drawn.shape, p=probs) for probs in self.operations]
        return arch_code_a, np.stack(kinds, -1) * arch_code_a


def _tilt_to(choice: _Choice, low: float, high: float) -> tuple[float, float]:
    """Return the tilt with which most draws are kept, and the edge of the band at which all are.

    Where most architectures are within the band, that is no tilt. Else it is the one by which the
    mean is at the edge
    nearest to them: there are ever fewer architectures beyond it, so that this is where those in
        the band are.
    """
    mean = _Tilted(choice, 0.0).expected_ratio
    if low <= mean <= high:
        return 0.0, low
    edge, tilt = (low, 1.0) if mean < low else (high, -1.0)

    def beyond(tilt: float) -> float:
        return _Tilted(choice, tilt).expected_ratio - edge

    while beyond(tilt) * (mean - edge) > 0:
        tilt *= 2
        if abs(tilt) > MAX_TILT:  # the edge is the smallest or the largest ratio that there is
            return tilt, edge
    return brentq(beyond, 0.0, tilt, rtol=1e-6), edge


def _path_costs(num_depths: int, operations: Sequence[str]) -> np.ndarray:
    """Return (paths, operations): memory of a path with an operation, as a search space at
    channel_mul 1 has it.
    """
    sizes = depth_sizes([32 * 2**depth for depth in range(num_depths)])
    maps = np.array([OPERATIONS[name].maps for name in operations])
    return np.stack(
        [
            (1 + CHANGES_OF_RESOLUTION[target - source] + maps) * sizes[target]
            for source, target in paths(num_depths)
        ]
    )


def _ratios(costs: np.ndarray, arch_code_a: np.ndarray, arch_code_c: np.ndarray) -> np.ndarray:
    """Return the memory ratio of one or more architectures, (..., blocks, paths).

    Costs are whole multiples of a power of two: their sum is exact, and the ratio the same number
        everywhere.
    """
    num_blocks, num_paths = arch_code_a.shape[-2:]
    memory = costs[np.arange(num_paths), arch_code_c] * arch_code_a
    return memory.sum((-2, -1)) / (num_blocks * costs.max(-1).sum())


def _architecture(
    arch_code_a: np.ndarray, arch_code_c: np.ndarray, operations: tuple[str, ...], made: dict
) -> Architecture:
    """Make the architecture of these paths; it knows how it was ``made``, and its ``ram_ratio``."""
    num_depths = (arch_code_a.shape[1] + 2) // 3
    ratio = float(_ratios(_path_costs(num_depths, operations), arch_code_a, arch_code_c))
    return from_codes(arch_code_a, arch_code_c, operations, info={"ram_ratio": ratio, **made})


def _convolutional(
    arch_code_a: np.ndarray,
    operations: tuple[str, ...],
    kind: str,
    skipping: np.ndarray | None = None,
) -> Architecture:
    """Make the architecture with a convolution on every active path, but for those of ``skipping``
    (as arch_code_a).
    """
    for name in (CONVOLUTION, *[SKIP] * (skipping is not None)):
        if name not in operations:
            raise UserError(
                f"--operations {' '.join(operations)} lacks {name}, which paths are to hold: add it"
            )
    arch_code_c = arch_code_a * operations.index(CONVOLUTION)
    if skipping is not None:
        arch_code_c[skipping] = operations.index(SKIP)
    return _architecture(arch_code_a, arch_code_c, operations, {"baseline": kind})


def _checked(num_blocks: int, num_depths: int, operations: Sequence[str]) -> tuple[str, ...]:
    """Return the operations as a tuple, or raise `UserError` where they or the sizes are out of
    range.
    """
    for name, value, least, most in (
        ("num_blocks", num_blocks, 1, MAX_BLOCKS),
        ("num_depths", num_depths, 2, MAX_DEPTHS),
    ):
        if not least <= value <= most:
            raise UserError(f"--{name} is {value}: give {least} to {most}")
    return check_names(operations)


def _rounded_up(ratio: float) -> str:
    """Write a lower limit with two digits, so that what is written is allowed."""
    unit = 10.0 ** (math.floor(math.log10(ratio)) - 1)
    return f"{math.ceil(ratio / unit) * unit:.2g}"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dints.network.baselines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output_root", type=Path, required=True, help="folder to write into, made if absent")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--u_shaped", action="store_true", help="write u_shaped_<blocks>x<depths>.pth"
    )
    kind.add_argument(
        "--u_shaped_skip",
        action="store_true",
        help="write u_shaped_skip_<blocks>x<depths>.pth, a U whose long paths are skip connections",
    )
    kind.add_argument(
        "--all_paths", action="store_true", help="write all_paths_<blocks>x<depths>.pth"
    )
    kind.add_argument(
        "--random", type=int, metavar="N", help="write random_<seed>_<number>.pth, N of them"
    )
    add(
        "--ram_ratio",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="band of the random ones' memory, up to 1",
    )
    add(
        "--keep_finest",
        action="store_true",
        help="random ones: keep the path along depth 0 in every block",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="random ones: a number's architecture does not depend on N (default: 0)",
    )
    add(
        "--use_downsample",
        choices=("yes", "no"),
        default="yes",
        help="whether the network halves the image before its first node, as published (default: "
        "%(default)s)",
    )
    add(
        "--num_blocks",
        type=int,
        default=12,
        help="blocks, one after another (default: %(default)s)",
    )
    add(
        "--num_depths",
        type=int,
        default=4,
        help="resolutions, each half of the last (default: %(default)s)",
    )
    add(
        "--operations",
        nargs="+",
        metavar="NAME",
        default=PUBLISHED,
        help="of a path (default: the published five)",
    )
    args = parser.parse_args(argv)
    if (args.random is None) != (args.ram_ratio is None):
        parser.error("--random and --ram_ratio go together")
    if args.seed < 0 or args.random is not None and args.random < 1:
        parser.error("--seed must be at least 0, and --random at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    sizes = {
        "num_blocks": args.num_blocks,
        "num_depths": args.num_depths,
        "operations": args.operations,
    }
    size = f"{args.num_blocks}x{args.num_depths}"
    if args.u_shaped or args.u_shaped_skip:
        name = "u_shaped_skip" if args.u_shaped_skip else "u_shaped"
        makers = {f"{name}_{size}": partial(u_shaped, **sizes, skip_connections=args.u_shaped_skip)}
    elif args.all_paths:
        makers = {f"all_paths_{size}": partial(all_paths, **sizes)}
    else:
        low, high = args.ram_ratio
        make = partial(
            _numbered, args.seed, low=low, high=high, keep_finest=args.keep_finest, **sizes
        )
        makers = {
            f"random_{args.seed}_{number}": partial(make, number) for number in range(args.random)
        }
    for name, make in makers.items():
        path = args.output_root / f"{name}.pth"
        if path.exists():
            raise UserError(
                f"{path} exists: name another --output_root or --seed, or remove the file"
            )
        architecture = replace(make(), use_downsample=args.use_downsample == "yes")
        architecture.info["version"] = __version__
        save_architecture(path, architecture)
        active, ratio = architecture.arch_code_a, architecture.info["ram_ratio"]
        print(f"{path}: ram ratio {ratio:.4f}, {active.sum()} of {active.size} paths", flush=True)


def _numbered(seed: int, number: int, **settings) -> Architecture:
    """Draw random architecture ``number`` of a seed: the same, however many others are drawn."""
    architecture = random_architecture(generator=np.random.default_rng([seed, number]), **settings)
    architecture.info.update(seed=seed, number=number)
    return architecture


if __name__ == "__main__":
    exit_on_user_error(main)
