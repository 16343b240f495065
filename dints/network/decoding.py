"""Decoding: the most probable sequences of children, one per block, each starting from the nodes where the last ends.

A child's length is the negative logarithm of its probability, so that the most probable sequence is the shortest one.
Of the blocks so far, all that the next one needs to know is the pattern of nodes in which they end. In common:

    lengths       (blocks, children)  positive
    memory        (blocks, children)  of the feature maps on a child's paths, in any unit
    starts, ends  (children,)         the patterns, counted from 0, from which a child starts and in which it ends;
                                      some child starts from each of them, and some child ends in it
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

TOLERANCE = 1e-9  # sequences whose lengths differ by less are equally good; rounding errors are far below it


def shortest_sequences(count: int, lengths: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the children of the ``count`` shortest sequences, shortest first: (count or all that there are, blocks).

    The first one is the same for any ``count``; of equally short ones, it is MONAI's choice.
    """
    # Of the sequences so far that end in a pattern, the shortest ones; fewer are filled up with infinite lengths.
    shortest = np.full((starts.max() + 1, count), np.inf)
    shortest[:, 0] = 0.0
    steps = []  # per block, for each of them: the child with which it ends, and the rank of what it continues
    for block in lengths:
        totals = (shortest[starts] + block[:, None]).ravel()
        order = totals.argsort(kind="stable")
        order = order[ends[order // count].argsort(kind="stable")]  # pattern by pattern
        first = np.searchsorted(ends[order // count], np.arange(len(shortest)))
        kept = order[first[:, None] + np.arange(count)]
        steps.append(np.divmod(kept, count))
        shortest = totals[kept]
    best = shortest.argsort(axis=None, kind="stable")[:count]
    pattern, rank = np.divmod(best[np.isfinite(shortest.flat[best])], count)
    sequences = np.zeros((len(pattern), len(lengths)), dtype=np.int64)
    for row in reversed(range(len(lengths))):
        child, rank_before = steps[row]
        sequences[:, row], rank = child[pattern, rank], rank_before[pattern, rank]
        pattern = starts[sequences[:, row]]
    return sequences


def least_memory(memory: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> float:
    """Return the memory of the smallest sequence."""
    return _ways_on(_useful_children(np.ones_like(memory), memory, starts, ends, 1), math.inf).costs[0].min()


def shortest_sequences_within(
    count: int, budget: float, lengths: np.ndarray, memory: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Return what `shortest_sequences` does, of the sequences of at most ``budget`` memory, not below `least_memory`.

    Constrained shortest paths, found exactly, after Handler and Zang (Networks 10, 1980): a price on memory gives
    sequences that fit, and for every beginning of a sequence a bound on how short it can become. The beginnings that
    may still become shorter than the last of ``count`` known sequences are extended block by block, all at once.
    """
    shortest = shortest_sequences(count, lengths, starts, ends)
    if (_sums(memory, shortest) <= budget).all():
        return shortest
    blocks = _useful_children(lengths, memory, starts, ends, count)
    price, fits = _price(blocks, budget)
    known = _Known(fits.children[None], np.array([fits.length]))
    if count > 1:
        first = shortest_sequences_within(1, budget, lengths, memory, starts, ends)
        # No sequence that is equally short may come before it: it is the first one for any count.
        known = _Known(first, _sums(lengths, first) - TOLERANCE)
        smallest = shortest_sequences(count, memory, starts, ends)
        cheapest = shortest_sequences(count, lengths + price * memory, starts, ends)
        more = np.concatenate([shortest, smallest, cheapest])
        more = more[_sums(memory, more) <= budget]
        known = known.joined(more, _sums(lengths, more), count)
    # The first search is quick, and with what it finds the second has little left to follow.
    for width in (max(300, 10 * count), None):
        known = _search(blocks, budget, price, known, count, width)
    return known.children


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
    children: np.ndarray
    length: float
    memory: float


class _Known(NamedTuple):
    """The shortest sequences that are known, in order of their lengths."""

    children: np.ndarray  # (sequences, blocks)
    lengths: np.ndarray

    def limit(self, count: int) -> float:
        """Return what another one's length has to be below, to make it one of the ``count`` shortest."""
        return self.lengths[-1] if len(self.lengths) == count else math.inf

    def joined(self, children: np.ndarray, lengths: np.ndarray, count: int) -> _Known:
        """Return the ``count`` shortest of these and others; of equally short ones, those that were known before."""
        children, lengths = np.concatenate([self.children, children]), np.concatenate([self.lengths, lengths])
        distinct = np.sort(np.unique(children, axis=0, return_index=True)[1])
        shortest = distinct[lengths[distinct].argsort(kind="stable")[:count]]
        return _Known(children[shortest], lengths[shortest])


class _WaysOn(NamedTuple):
    """The cheapest way to the end from each pattern before each block, and past the last: (blocks + 1, patterns)."""

    costs: np.ndarray
    lengths: np.ndarray
    memory: np.ndarray
    indices: np.ndarray  # of the first child on the way in its `_Block`; (blocks, patterns)

    def follow(self, blocks: list[_Block], row: int, patterns: np.ndarray) -> list[np.ndarray]:
        """Return the children from each of ``patterns`` before block ``row`` to the end, block by block."""
        children = []
        for block, index in zip(blocks[row:], self.indices[row:], strict=True):
            children.append(block.children[index[patterns]])
            patterns = block.ends[index[patterns]]
        return children


def _sums(values: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """Add up the ``values`` (blocks, children) of each sequence's children."""
    return values[np.arange(len(values)), sequences].sum(-1)


def _undominated(groups: np.ndarray, lengths: np.ndarray, memory: np.ndarray, count: int) -> np.ndarray:
    """Return the indices, group by group, of the entries that the ``count`` shortest sequences may need.

    They can do without an entry for which there are ``count`` others in its group, neither longer nor larger. A round
    takes the entries that are shorter than all smaller ones of their group; what is left after it is neither shorter
    nor smaller than one that it took. So what ``count`` rounds leave is not needed.
    """
    order = np.lexsort((lengths, memory, groups))
    # Each group is shifted below the one before, so that the running minimum starts afresh.
    shifted = lengths[order] - groups[order] * (lengths.max(initial=0) + 1)
    left = np.arange(len(order))
    for _ in range(min(count, len(order))):
        left = left[np.diff(np.minimum.accumulate(shifted[left]), prepend=np.inf) >= 0]
    return np.delete(order, left)


def _useful_children(
    lengths: np.ndarray, memory: np.ndarray, starts: np.ndarray, ends: np.ndarray, count: int
) -> list[_Block]:
    blocks = []
    for block_lengths, block_memory in zip(lengths, memory, strict=True):
        kept = _undominated(starts * (ends.max() + 1) + ends, block_lengths, block_memory, count)
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
    children = np.array(ways_on.follow(blocks, 0, pattern))
    return _Sequence(children, ways_on.lengths[0, pattern], ways_on.memory[0, pattern])


def _price(blocks: list[_Block], budget: float) -> tuple[float, _Sequence]:
    """Find the price of memory that gives the best bound, and the shortest sequence met on the way that fits."""
    too_large, fits = _cheapest(blocks, 0.0), _cheapest(blocks, math.inf)
    if too_large.memory <= budget:  # where only some of the shortest sequences are too large
        return 0.0, too_large
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


def _search(blocks: list[_Block], budget: float, price: float, known: _Known, count: int, width: int | None) -> _Known:
    """Find the ``count`` shortest sequences that fit; with a ``width``, follow only so many beginnings."""
    ways_on, least_memory = _ways_on(blocks, price), _ways_on(blocks, math.inf).costs
    ends = np.arange(ways_on.costs.shape[1])  # of the beginnings so far; there is one of no blocks in each pattern
    lengths, memory = np.zeros((2, len(ends)))
    steps = []  # per block, for each beginning: which one it continues, and by which child
    for row, block in enumerate(blocks, start=1):
        slack = known.limit(count) - lengths - price * (memory - budget)
        before, index = _continuations(ends, slack, block, block.costs(price) + ways_on.costs[row][block.ends])
        lengths, memory = lengths[before] + block.lengths[index], memory[before] + block.memory[index]
        ends = block.ends[index]
        steps.append((before, block.children[index]))
        # Each beginning with its cheapest way on is a sequence; where that one fits, it may be one of the shortest.
        totals = np.where(memory + ways_on.memory[row][ends] <= budget, lengths + ways_on.lengths[row][ends], np.inf)
        best = totals.argsort(kind="stable")[:count]
        best = best[totals[best] < known.limit(count)]
        children = np.stack(_retrace(steps, best) + ways_on.follow(blocks, row, ends[best]), -1)
        known = known.joined(children, totals[best], count)
        bounds = lengths + ways_on.costs[row][ends] + price * (memory - budget)
        limit = known.limit(count) - TOLERANCE
        kept = np.flatnonzero((bounds < limit) & (memory + least_memory[row][ends] <= budget))
        kept = kept[_undominated(ends[kept], lengths[kept], memory[kept], count)]
        if width is not None and len(kept) > width:
            kept = kept[bounds[kept].argpartition(width)[:width]]
        lengths, memory, ends = lengths[kept], memory[kept], ends[kept]
        steps[-1] = tuple(step[kept] for step in steps[-1])
    return known


def _continuations(
    ends: np.ndarray, slack: np.ndarray, block: _Block, costs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """List the pairs (index of a beginning, index of a child that starts where it ends and costs less than its slack).

    Args:
        ends, slack: (beginnings,)
        costs: of the block's children, positive.
    """
    shift = costs.max() + 1  # sets the starts apart, so that one order holds for all
    order = np.lexsort((costs, block.starts))
    first = np.searchsorted(block.starts, ends)
    last = np.searchsorted(block.starts * shift + costs[order], ends * shift + slack.clip(0, shift))
    counts = last - first
    before = np.repeat(np.arange(len(ends)), counts)
    index = order[np.arange(len(before)) - np.repeat(counts.cumsum() - counts - first, counts)]
    return before, index[np.lexsort((index, before))]


def _retrace(steps: list[tuple[np.ndarray, np.ndarray]], beginnings: np.ndarray) -> list[np.ndarray]:
    """Return the children, block by block, of beginnings that are entries of the last step."""
    children = []
    for before, child in reversed(steps):
        children.append(child[beginnings])
        beginnings = before[beginnings]
    return children[::-1]
