"""Make architectures without a search: baselines for searched ones, and a start without a search.

    python -m dints.network.baselines --kind u_shaped_skip --num_blocks 9 --num_depths 3
    python -m dints.network.baselines --kind random --ram_ratio 0.2 0.3 --seed 0

Each is an arch file for train_dints.py. A U shape and all paths hold 3x3x3 convolutions, and
u_shaped_skip makes the U's long paths skip connections. Random ones are drawn uniformly from all
connected architectures whose memory is within a band, as a share of every path active with its
dearest operation: the share of a search's --ram_budget fixed and --max_ram_ratio.

Nearly all architectures have about the same memory: rejection alone would never reach a band far
from it. Therefore they are drawn with probabilities proportional to exp(tilt * memory), whose bulk
the tilt moves to the band. Draws within it are then kept with probability exp(-tilt * memory), up
to a factor, which makes all equal again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from dints.options import Settings, number, option, parse, same_option
from dints.settings import SpaceSettings

CONVOLUTION, SKIP = "conv_3x3x3", "skip_connect"
KINDS = ("u_shaped", "u_shaped_skip", "all_paths", "random")
MAX_DEPTHS = 6  # of random ones: at 7 depths a block has half a million children
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
    """Make a U: down a depth a block, along the bottom while blocks are left, and up.

    Every depth on the way continues. The U starts and ends at depth 0. Where the blocks are too few
    for the deepest level, it reaches ``num_blocks // 2``. Every path holds conv_3x3x3.

    Args:
        skip_connections: above the bottom, let a depth's first and last path hold conv_3x3x3 and
            those between skip_connect, which cost nothing: a U-Net's skip connections. More blocks
            then are more convolutions at the bottom, where they are cheap.

    Raises:
        UserError: the operations lack conv_3x3x3, or skip_connect where that is asked for.
    """
    bottom = [min(row, num_blocks - row, num_depths - 1) for row in range(num_blocks + 1)]
    arch_code_a = np.zeros((num_blocks, 3 * num_depths - 2), dtype=np.int64)
    arch_code_c = np.zeros_like(arch_code_a)
    for block, (before, after) in enumerate(zip(bottom, bottom[1:], strict=False)):
        for path, (source, target) in enumerate(paths(num_depths)):
            continues = source == target <= min(before, after)
            if continues or (source, target) == (before, after):
                passes_by = skip_connections and source == target < min(before, after)
                arch_code_a[block, path] = 1
                arch_code_c[block, path] = _index(SKIP if passes_by else CONVOLUTION, operations)
    return from_codes(arch_code_a, arch_code_c, operations)


def all_paths(
    num_blocks: int, num_depths: int, operations: Sequence[str] = PUBLISHED
) -> Architecture:
    """Make every path active, with conv_3x3x3; raise `UserError` where the operations lack it."""
    codes = np.ones((num_blocks, 3 * num_depths - 2), dtype=np.int64)
    return from_codes(codes, codes * _index(CONVOLUTION, operations), operations)


def _index(name: str, operations: Sequence[str]) -> int:
    if name not in operations:
        raise UserError(
            f"--operations {' '.join(operations)} lacks {name}, which paths are to hold: add it"
        )
    return operations.index(name)


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
    """Draw uniformly, without end, from the connected architectures of `ram_ratio` low to high.

    Two are the same if they have the same active paths with the same operations on them.

    Args:
        keep_finest: draw only from those that keep the path along depth 0 active in every block.

    Raises:
        UserError: there are too many depths, or no architecture is found in the band.
    """
    choice = _Choice(num_blocks, num_depths, operations, keep_finest)
    none = UserError(
        f"--ram_ratio {low:g} {high:g}: no architecture of {num_blocks} blocks and {num_depths} "
        f"depths was found there; give a wider band of ratios from {choice.least_ratio:.3g} to 1"
    )
    if not (low <= high and low <= 1 and high >= choice.least_ratio):
        raise none
    tilt, edge = _tilt_to(choice, low, high)
    tilted, draws_in_vain = _Tilted(choice, tilt), 0
    while draws_in_vain < MAX_DRAWS:
        arch_code_a, arch_code_c = tilted.draw(generator, BATCH)
        ratios = _ratios(choice.costs, arch_code_a, arch_code_c)
        equalised = np.exp(-tilt * (ratios.clip(low, high) - edge))  # at most 1, and 1 at the edge
        kept = (ratios >= low) & (ratios <= high) & (generator.random(BATCH) < equalised)
        draws_in_vain = 0 if kept.any() else draws_in_vain + BATCH
        for index in np.flatnonzero(kept):
            info = {"ram_ratio": float(ratios[index])}
            yield from_codes(arch_code_a[index], arch_code_c[index], operations, info=info)
    raise none


def ram_ratio(architecture: Architecture) -> float:
    """Return the memory of the architecture as a share of every path active with its dearest
    operation.

    It is that of `SearchSpace.ram_ratio_of`, where channel_mul makes whole numbers of channels.
    """
    costs = _path_costs(architecture.num_depths, architecture.operations)
    return float(_ratios(costs, architecture.arch_code_a, architecture.arch_code_c))


def least_ram_ratio(
    num_blocks: int, num_depths: int, operations: Sequence[str], keep_finest: bool
) -> float:
    """Return the `ram_ratio` of the smallest architecture that `random_architecture` may draw."""
    return _Choice(num_blocks, num_depths, operations, keep_finest).least_ratio


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
        self, num_blocks: int, num_depths: int, operations: Sequence[str], keep_finest: bool
    ):
        if num_depths > MAX_DEPTHS:
            raise UserError(
                f"--num_depths {num_depths} is too many for random ones: at most {MAX_DEPTHS}"
            )
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
        """Return both codes of ``count`` independent draws, (count, blocks, paths) each."""
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
    """Return (paths, operations): memory of each, as a space at channel_mul 1 has it."""
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


@dataclass(frozen=True, kw_only=True)
class BaselineSettings(Settings):
    """Baseline."""

    kind: str = option("of the architecture", choices=KINDS)
    ram_ratio: tuple[float, ...] | None = option(
        "band of a random one's memory, up to 1",
        default=None,
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    seed: int = option("of a random one", default=0, type=number(int, 0))
    num_blocks: int = same_option(SpaceSettings, "num_blocks")
    num_depths: int = same_option(SpaceSettings, "num_depths")
    operations: tuple[str, ...] = same_option(SpaceSettings, "operations")
    keep_finest: bool = same_option(SpaceSettings, "keep_finest")
    use_downsample: str = option(
        "halve the image before the first node, as published", default="yes", choices=("yes", "no")
    )
    output_root: Path = option("folder of the arch file", default=Path("."), type=Path)

    def complaints(self) -> Iterable[str]:
        if (self.kind == "random") != (self.ram_ratio is not None):
            yield "--kind random and --ram_ratio go together"


@dataclass(frozen=True, kw_only=True)
class Command(Settings):
    """All of its command line."""

    baseline: BaselineSettings


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(Command, __doc__, argv).baseline
    size = settings.num_blocks, settings.num_depths
    operations = check_names(settings.operations or PUBLISHED)
    name = f"{settings.kind}_{settings.num_blocks}x{settings.num_depths}"
    info = {"baseline": settings.kind, "version": __version__}
    if settings.kind == "random":
        generator = np.random.default_rng(settings.seed)
        band = settings.ram_ratio
        made = random_architecture(*size, *band, generator, operations, settings.keep_finest)
        name, info["seed"] = f"{name}_{settings.seed}", settings.seed
    elif settings.kind == "all_paths":
        made = all_paths(*size, operations)
    else:
        made = u_shaped(*size, operations, skip_connections=settings.kind == "u_shaped_skip")
    info["ram_ratio"] = ram_ratio(made)
    path = settings.output_root / f"{name}.pth"
    if path.exists():
        raise UserError(f"{path} exists: give another --output_root or --seed, or remove the file")
    save_architecture(
        path, replace(made, use_downsample=settings.use_downsample == "yes", info=info)
    )
    print(f"{path}: ram ratio {info['ram_ratio']:.4f}")


if __name__ == "__main__":
    exit_on_user_error(main)
