"""Decoding: the most probable sequence of children, one per block, each starting from the nodes where the last ends.

A child's length is the negative logarithm of its probability, so that the most probable sequence is the shortest one.
Of the blocks so far, all that the next one needs to know is the pattern of nodes in which they end. In common:

    lengths       (blocks, children)  positive
    memory        (blocks, children)  of the feature maps on a child's paths, in any unit
    starts, ends  (children,)         the patterns, counted from 0, from which a child starts and in which it ends
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

TOLERANCE = 1e-9  # sequences whose lengths differ by less are equally good; rounding errors are far below it


def shortest_sequence(lengths: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the children (blocks,) of the shortest sequence; of equally short ones, MONAI's choice."""
    shortest = np.zeros(starts.max() + 1)
    last_children = []  # per block: on the shortest way to each pattern, the child that arrives there
    for block in lengths:
        total = shortest[starts] + block
        order = total.argsort(kind="stable")
        _, shortest_to_pattern = np.unique(ends[order], return_index=True)  # some child ends in each pattern
        last_children.append(order[shortest_to_pattern])
        shortest = total[last_children[-1]]
    children, pattern = [], shortest.argmin()
    for last_child in reversed(last_children):
        children.append(last_child[pattern])
        pattern = starts[children[-1]]
    return np.array(children[::-1])


def least_memory(memory: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> float:
    """Return the memory of the smallest sequence."""
    return _ways_on(_useful_children(np.ones_like(memory), memory, starts, ends), math.inf).costs[0].min()


def shortest_sequence_within(
    budget: float, lengths: np.ndarray, memory: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Return the children (blocks,) of the shortest sequence of at most ``budget`` memory, not below `least_memory`.

    A constrained shortest path, found exactly, after Handler and Zang (Networks 10, 1980): a price on memory gives a
    sequence that fits, and for every beginning of a sequence a bound on how short it can become. The beginnings that
    may still become shorter than the shortest known sequence are extended block by block, all at once.
    """
    shortest = shortest_sequence(lengths, starts, ends)
    if memory[np.arange(len(memory)), shortest].sum() <= budget:
        return shortest
    blocks = _useful_children(lengths, memory, starts, ends)
    price, found = _price(blocks, budget)
    for width in (300, None):  # the first search is quick, and with what it finds the second has little left to follow
        found = _search(blocks, budget, price, found, width)
    return np.array([block.children[index] for block, index in zip(blocks, found.indices, strict=True)])


class _Block(NamedTuple):
    """The children of a block that may be of use, in the order of their starts."""

    children: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    memory: np.ndarray

    def costs(self, price: float) -> np.ndarray:
        return self.memory if price == math.inf else self.lengths + price * self.memory


class _Sequence(NamedTuple):
    indices: list[int]  # of a child in each `_Block`
    length: float
    memory: float


class _WaysOn(NamedTuple):
    """The cheapest way to the end from each pattern before each block, and past the last: (blocks + 1, patterns)."""

    costs: np.ndarray
    lengths: np.ndarray
    memory: np.ndarray
    indices: np.ndarray  # of the first child on the way in its `_Block`; (blocks, patterns)

    def follow(self, blocks: list[_Block], row: int, pattern: int) -> list[int]:
        """Return the indices of the children from ``pattern`` before block ``row`` to the end."""
        indices = []
        for block, index in zip(blocks[row:], self.indices[row:], strict=True):
            indices.append(index[pattern])
            pattern = block.ends[indices[-1]]
        return indices


def _undominated(groups: np.ndarray, lengths: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Return the indices, group by group, of the entries that are shorter than all smaller ones of their group."""
    order = np.lexsort((lengths, memory, groups))
    # Each group is shifted below the one before, so that the running minimum starts afresh.
    shifted = lengths[order] - groups[order] * (lengths.max(initial=0) + 1)
    return order[np.diff(np.minimum.accumulate(shifted), prepend=np.inf) < 0]


def _useful_children(lengths: np.ndarray, memory: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> list[_Block]:
    blocks = []
    for block_lengths, block_memory in zip(lengths, memory, strict=True):
        kept = _undominated(starts * (ends.max() + 1) + ends, block_lengths, block_memory)
        blocks.append(_Block(kept, starts[kept], ends[kept], block_lengths[kept], block_memory[kept]))
    return blocks


def _ways_on(blocks: list[_Block], price: float) -> _WaysOn:
    """Find the ways where a sequence costs its length + ``price`` * its memory, or at an infinite price its memory."""
    patterns = np.arange(blocks[0].starts.max() + 1)
    costs, lengths, memory = np.zeros((3, len(blocks) + 1, len(patterns)))
    indices = np.zeros((len(blocks), len(patterns)), dtype=np.int64)
    for row in reversed(range(len(blocks))):
        block = blocks[row]
        totals = block.costs(price) + costs[row + 1][block.ends]
        cheapest = np.lexsort((totals, block.starts))[np.searchsorted(block.starts, patterns)]
        ends = block.ends[cheapest]
        indices[row], costs[row] = cheapest, totals[cheapest]
        lengths[row] = block.lengths[cheapest] + lengths[row + 1][ends]
        memory[row] = block.memory[cheapest] + memory[row + 1][ends]
    return _WaysOn(costs, lengths, memory, indices)


def _cheapest(blocks: list[_Block], price: float) -> _Sequence:
    ways_on = _ways_on(blocks, price)
    pattern = ways_on.costs[0].argmin()
    return _Sequence(ways_on.follow(blocks, 0, pattern), ways_on.lengths[0, pattern], ways_on.memory[0, pattern])


def _price(blocks: list[_Block], budget: float) -> tuple[float, _Sequence]:
    """Find the price of memory that gives the best bound, and the shortest sequence met on the way that fits."""
    too_large, fits = _cheapest(blocks, 0.0), _cheapest(blocks, math.inf)
    while True:
        price = (fits.length - too_large.length) / (too_large.memory - fits.memory)  # at which they cost the same
        cheaper = _cheapest(blocks, price)
        gain = too_large.length - cheaper.length + price * (too_large.memory - cheaper.memory)
        # It lies between the two if it costs less, but for rounding, which must not keep the loop from ending.
        if gain <= TOLERANCE or not too_large.length < cheaper.length < fits.length:
            return price, fits
        if cheaper.memory <= budget:
            fits = cheaper
        else:
            too_large = cheaper


def _search(blocks: list[_Block], budget: float, price: float, found: _Sequence, width: int | None) -> _Sequence:
    """Find the shortest sequence that fits, given ``found``; with a ``width``, follow only so many beginnings."""
    ways_on, least_memory = _ways_on(blocks, price), _ways_on(blocks, math.inf).costs
    ends = np.arange(ways_on.costs.shape[1])  # of the beginnings so far; there is one of no blocks in each pattern
    lengths, memory = np.zeros((2, len(ends)))
    steps = []  # per block, for each beginning: which one it continues, and by which child
    for row, block in enumerate(blocks, start=1):
        before, index = _continuations(ends, block.starts)
        lengths, memory = lengths[before] + block.lengths[index], memory[before] + block.memory[index]
        ends = block.ends[index]
        steps.append((before, index))
        # Each beginning with its cheapest way on is a sequence; where that one fits, it may be the shortest yet.
        totals = np.where(memory + ways_on.memory[row][ends] <= budget, lengths + ways_on.lengths[row][ends], np.inf)
        if totals.min(initial=np.inf) < found.length:
            best = totals.argmin()
            indices = _retrace(steps, best) + ways_on.follow(blocks, row, ends[best])
            found = _Sequence(indices, totals[best], memory[best] + ways_on.memory[row, ends[best]])
        bounds = lengths + ways_on.costs[row][ends] + price * (memory - budget)
        kept = np.flatnonzero((bounds < found.length - TOLERANCE) & (memory + least_memory[row][ends] <= budget))
        kept = kept[_undominated(ends[kept], lengths[kept], memory[kept])]
        if width is not None and len(kept) > width:
            kept = kept[bounds[kept].argpartition(width)[:width]]
        lengths, memory, ends = lengths[kept], memory[kept], ends[kept]
        steps[-1] = before[kept], index[kept]
    return found


def _continuations(ends: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List all pairs (index into ``ends``, index into the sorted ``starts``) of equal entries."""
    first, last = np.searchsorted(starts, ends), np.searchsorted(starts, ends, side="right")
    counts = last - first
    before = np.repeat(np.arange(len(ends)), counts)
    return before, np.arange(len(before)) - np.repeat(counts.cumsum() - counts - first, counts)


def _retrace(steps: list[tuple[np.ndarray, np.ndarray]], beginning: int) -> list[int]:
    """Return the indices of the children of a beginning that is an entry of the last step."""
    indices = []
    for before, index in reversed(steps):
        indices.append(index[beginning])
        beginning = before[beginning]
    return indices[::-1]
