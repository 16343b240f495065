"""What competes: architectures of several kinds, each as wide as fills one and the same memory.

given      arch files, of a gradient search for example
by_hand    U shapes
random     drawn uniformly from those of a density that keep the finest resolution
mutant     one of the best, with a path, an operation, a block or the first halving changed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dints.errors import UserError
from dints.network import baselines
from dints.network.architecture import Architecture, from_codes, paths
from dints.network.cost import cost, fitting_channel_mul
from dints.network.operations import OPERATIONS
from dints.network.step_memory import within_supernet
from dints.network.strides import WHOLE, Strides, halved_first
from dints.running.seeds import seed_from

KINDS = ("by_hand", "random")  # that are made; others are given
CHANGES = ("path", "operation", "block", "stem")
SHARES = (0.35, 0.35, 0.2, 0.1)  # of the mutations
TRIES = 200  # until a mutation makes a network that is connected, fits and is new
IN_VAIN = 20  # proposals in a row that are too large or known, after which there are no more
# what the first level's channels are a multiple of: tensor cores take eight
CHANNEL_STEP = {"cpu": 1, "cuda": 8}
DENSEST = 0.7  # memory ratio of random ones: denser ones have hardly any width left at equal memory


@dataclass(frozen=True)
class Candidate:
    """An architecture that competes, at the width at which it fills the memory.

    Attributes:
        name: of it and of its folder.
        kind: how it was proposed, one of `KINDS`, ``given`` or ``mutant``.
        parent: name of the one that a mutant is made of.
    """

    name: str
    kind: str
    architecture: Architecture
    channel_mul: float
    parent: str | None = None

    def described(self, dice: float, **info: object) -> Architecture:
        """Return the architecture with what is to be known about it later; train_dints.py goes by
        its width.
        """
        ratio = baselines.ram_ratio(self.architecture)
        facts = {"dice": dice, "ram_ratio": ratio, "channel_mul": self.channel_mul}
        return replace(
            self.architecture, info={**facts, "candidate": self.name, "kind": self.kind, **info}
        )


@dataclass(frozen=True)
class Limits:
    """What every candidate keeps to.

    Attributes:
        memory_mib: that a training step may take; see `dints.network.cost.step_mib`.
        num_blocks, strides: of the space; mutants may leave the first and halve first or not.
        keep_finest: the path along depth 0 stays active in every block.
        input_shape: (batch, channels, *patch_size) of a training step.
        channel_step: channels at the first level are a multiple of this, where so many fit; see
            `CHANNEL_STEP`.
    """

    memory_mib: float
    num_blocks: int
    operations: tuple[str, ...]
    strides: Strides
    keep_finest: bool
    input_shape: tuple[int, ...]
    num_classes: int
    channel_step: int = 1

    def check(self) -> None:
        """Raise `UserError` where no network would fit: not even one path of the space, at its
        narrowest.
        """
        arch_code_a = np.zeros((self.num_blocks, 3 * len(self.strides) - 2), dtype=np.int64)
        arch_code_a[:, 0] = 1
        self.channel_mul(from_codes(arch_code_a, 0 * arch_code_a, self.operations, self.strides))

    def channel_mul(self, architecture: Architecture) -> float:
        """Return the width at which the architecture fills the memory, but for what a multiple
        leaves.

        Raises:
            UserError: the memory does not hold even its narrowest network, or its patches cannot be
                halved so often.
        """
        batch_size, in_channels, *patch_size = self.input_shape
        widest = fitting_channel_mul(
            architecture,
            self.memory_mib,
            in_channels,
            self.num_classes,
            tuple(patch_size),
            batch_size,
        )
        channels = round(32 * widest)
        return (channels - channels % self.channel_step or channels) / 32


def memory_of_share(
    share: float,
    num_blocks: int,
    operations: tuple[str, ...],
    strides: Strides,
    channel_mul: float,
    input_shape: tuple[int, ...],
    num_classes: int,
) -> float:
    """Return a share of what a step with every path, its dearest operation on each, takes at a
    width, in MiB.

    Args:
        input_shape: (batch, channels, *patch_size) of a training step.
    """
    dearest_last = sorted(operations, key=lambda name: OPERATIONS[name].maps)
    largest = within_supernet(num_blocks, dearest_last, strides)
    batch_size, in_channels, *patch_size = input_shape
    return (
        share
        * cost(
            largest, in_channels, num_classes, tuple(patch_size), channel_mul, batch_size
        ).step_mib
    )


def proposed(
    count: int, kinds: Sequence[str], limits: Limits, given: Sequence[Architecture], seed: int
) -> list[Candidate]:
    """Propose ``count`` different candidates: all that are given, then the kinds in turn.

    Args:
        kinds: of `KINDS`.
        given: as many as ``count`` at most.

    Raises:
        UserError: one that is given does not fit into the memory, or fewer than ``count`` do; the
            message has the reason of the last that did not.
    """
    generator = np.random.default_rng(seed_from(seed, "proposals"))
    makers = {"by_hand": partial(_by_hand, limits), "random": partial(_random, limits, generator)}
    candidates, in_vain, reason = _Distinct(limits), 0, "there are no more"
    for architecture in given:
        try:
            candidates.add("given", architecture)
        except UserError as error:
            raise UserError(f"{architecture.source} cannot compete: {error}") from error
    waiting = [(kind, makers[kind]()) for kind in kinds]
    # there is no end of random ones
    while len(candidates.members) < count and waiting and in_vain < IN_VAIN:
        kind, source = waiting.pop(0)
        architecture = next(source, None)
        if architecture is None:
            continue
        waiting.append((kind, source))
        try:
            in_vain = 0 if candidates.add(kind, architecture) else in_vain + 1
        except UserError as error:
            in_vain, reason = in_vain + 1, str(error)
    if len(candidates.members) < count:
        raise UserError(
            f"--proposals {' '.join(kinds)} give {len(candidates.members)} candidates for "
            f"--memory_mib {limits.memory_mib:g}, and {count} are needed: {reason}"
        )
    return candidates.members


def mutants(
    count: int, parents: Sequence[Candidate], others: Sequence[Candidate], limits: Limits, seed: int
) -> list[Candidate]:
    """Make ``count`` mutants, of the parents in turn, that differ from ``others`` and from each
    other.

    There are fewer if a parent has no more.
    """
    generator = np.random.default_rng(seed_from(seed, "mutants"))
    candidates, made = _Distinct(limits, others), []
    for number in range(count):
        parent = parents[number % len(parents)]
        for _ in range(TRIES):
            architecture = mutated(parent.architecture, limits.keep_finest, generator)
            try:
                member = architecture and candidates.add("mutant", architecture, parent.name)
            except UserError:  # too large, or its patches cannot be halved so often
                continue
            if member:
                made.append(member)
                break
        else:
            break
    return made


class _Distinct:
    """Gathers candidates, each architecture once; a name is its kind with a number."""

    def __init__(self, limits: Limits, members: Sequence[Candidate] = ()):
        self.limits, self.members = limits, list(members)
        self.known = [_network(candidate.architecture) for candidate in members]

    def add(
        self, kind: str, architecture: Architecture, parent: str | None = None
    ) -> Candidate | None:
        """Add an architecture, if it is new, at the width that fills the memory."""
        if _network(architecture) in self.known:
            return None
        number = 1 + sum(member.kind == kind for member in self.members)
        channel_mul = self.limits.channel_mul(architecture)
        member = Candidate(f"{kind}_{number}", kind, architecture, channel_mul, parent)
        self.known.append(_network(architecture))
        self.members.append(member)
        return member


def _by_hand(limits: Limits) -> Iterator[Architecture]:
    blocks, depths = limits.num_blocks, len(limits.strides)
    lacking = {baselines.CONVOLUTION, baselines.SKIP} - {*limits.operations}
    if baselines.CONVOLUTION in lacking:
        return
    skipping = partial(baselines.u_shaped, skip_connections=not lacking)
    for make, num_blocks, num_depths in (
        (skipping, blocks, depths),
        (baselines.u_shaped, blocks, depths),
        (skipping, 2 * (depths - 1) + 5, depths),
        (skipping, blocks, depths - 1),
    ):
        if num_depths >= 2:
            strides = limits.strides[:num_depths]
            yield make(num_blocks, num_depths, limits.operations, strides=strides)


def _random(limits: Limits, generator: np.random.Generator) -> Iterator[Architecture]:
    """Draw architectures of all densities: the logarithm of the memory ratio uniformly, then an
    architecture near it.

    At equal memory the width goes down as the ratio goes up, so that this tries narrow ones and
    wide ones alike.
    """
    size = limits.num_blocks, len(limits.strides)
    settings = {"operations": limits.operations, "keep_finest": True, "strides": limits.strides}
    least = baselines.least_ram_ratio(limits.num_blocks, **settings)
    while True:
        high = np.exp(
            generator.uniform(*np.log((min(1.1 * least, 1.0), max(1.1 * least, DENSEST))))
        )
        try:
            yield baselines.random_architecture(
                *size, max(least, 0.95 * high), high, generator, **settings
            )
        except UserError:  # a space so small that it has none of this density
            yield baselines.random_architecture(*size, least, 1.0, generator, **settings)


def mutated(
    architecture: Architecture, keep_finest: bool, generator: np.random.Generator
) -> Architecture | None:
    """Return a copy with a path, an operation, a block or the first halving changed; None where the
    draw has no sense.

    A draw changes one thing in two cases of three, else more. Blocks are doubled or left out where
    what is left stays connected. Several paths change at a time where a node comes or goes.
    """
    arch_code_a, arch_code_c = architecture.arch_code_a.copy(), architecture.arch_code_c.copy()
    strides = architecture.strides
    for _ in range(generator.geometric(2 / 3)):
        change = generator.choice(CHANGES, p=SHARES)
        if change == "stem":
            strides = halved_first(strides, use_downsample=strides[0] == WHOLE)
        elif change == "block":
            arch_code_a, arch_code_c = _other_blocks(arch_code_a, arch_code_c, generator)
        elif change == "operation" and arch_code_a.any():
            place = tuple(generator.choice(np.argwhere(arch_code_a)))
            arch_code_c[place] = generator.integers(len(architecture.operations))
        elif change == "path":
            arch_code_a, arch_code_c = _other_paths(
                architecture, arch_code_a, arch_code_c, generator
            )
    keeps = not keep_finest or arch_code_a[:, 0].all()  # path 0 leads from depth 0 to depth 0
    if not keeps or not _is_connected(arch_code_a):
        return None
    made = from_codes(arch_code_a, arch_code_c, architecture.operations, strides)
    return None if _network(made) == _network(architecture) else made


def _network(architecture: Architecture) -> tuple:
    """Return what is equal for equal networks: operations count on active paths only."""
    active = architecture.arch_code_a
    codes = active.tolist(), (architecture.arch_code_c * active).tolist()
    return *codes, architecture.strides


def _other_paths(
    architecture: Architecture,
    arch_code_a: np.ndarray,
    arch_code_c: np.ndarray,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Switch one to three paths of a block and the next one, with operations drawn for those that
    come.
    """
    arch_code_a, arch_code_c = arch_code_a.copy(), arch_code_c.copy()
    first, (num_blocks, num_paths) = generator.integers(len(arch_code_a)), arch_code_a.shape
    for _ in range(generator.integers(1, 4)):
        place = min(first + generator.integers(2), num_blocks - 1), generator.integers(num_paths)
        arch_code_a[place] = 1 - arch_code_a[place]
        arch_code_c[place] = generator.integers(len(architecture.operations)) * arch_code_a[place]
    return arch_code_a, arch_code_c


def _other_blocks(
    arch_code_a: np.ndarray, arch_code_c: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Leave out a block, unless it is the only one, or put its double behind it."""
    block = generator.integers(len(arch_code_a))
    if len(arch_code_a) > 1 and generator.random() < 0.5:
        return np.delete(arch_code_a, block, 0), np.delete(arch_code_c, block, 0)
    rows = np.insert(np.arange(len(arch_code_a)), block, block)
    return arch_code_a[rows], arch_code_c[rows]


def _is_connected(arch_code_a: np.ndarray) -> bool:
    """Tell whether each block has a path, and leaves from just the nodes that the one before
    reaches.
    """
    sources, targets = np.array(paths((arch_code_a.shape[1] + 2) // 3)).T
    depths = np.arange(targets.max() + 1)
    left, reached = (arch_code_a @ (ends[:, None] == depths) > 0 for ends in (sources, targets))
    return bool(arch_code_a.any(-1).all() and (reached[:-1] == left[1:]).all())
