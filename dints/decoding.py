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
    """The children (blocks,) of the shortest sequence; of equally short ones, MONAI's choice."""
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
    """The memory of the smallest sequence."""
    return _to_go(_undominated_children(np.ones_like(memory), memory, starts, ends), math.inf)[0].min()


def shortest_sequence_within(
    budget: float, lengths: np.ndarray, memory: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """The children (blocks,) of the shortest sequence whose memory is at most ``budget``, which some must keep.

    A constrained shortest path, solved exactly as by Handler and Zang (1980): a price on memory gives a sequence that
    fits, and for every beginning of a sequence a lower bound on how long it must become. Beginnings that may still
    become shorter than the best sequence so far are then extended block by block, all at once.
    """
    shortest = shortest_sequence(lengths, starts, ends)
    if memory[np.arange(len(memory)), shortest].sum() <= budget:
        return shortest
    blocks = _undominated_children(lengths, memory, starts, ends)
    price, best = _relax(blocks, budget)
    for width in (
        300,
        3000,
        None,
    ):  # the narrow searches are quick and seldom miss; the last drops most by their result
        best = _search(blocks, budget, price, best, width)
    return np.array([block.children[index] for block, index in zip(blocks, best.indices, strict=True)])


class _Block(NamedTuple):
    """Those of a block's children that matter, in the order of their starts."""

    children: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    memory: np.ndarray

    def costs(self, price: float) -> np.ndarray:
        return self.memory if price == math.inf else self.lengths + price * self.memory


class _Sequence(NamedTuple):
    indices: list[int]  # into the arrays of each `_Block`
    length: float
    memory: float


def _undominated(groups: np.ndarray, lengths: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Indices, in the order of groups, of the entries than which no other of their group is shorter and smaller."""
    order = np.lexsort((lengths, memory, groups))
    # A group's entries come from the smallest to the largest, and each must be shorter than all before it. Shifting the
    # groups below one another lets the running minimum start afresh with each.
    shifted = lengths[order] - groups[order] * (lengths.max(initial=0) + 1)
    return order[np.diff(np.minimum.accumulate(shifted), prepend=np.inf) < 0]


def _undominated_children(
    lengths: np.ndarray, memory: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> list[_Block]:
    blocks = []
    for block_lengths, block_memory in zip(lengths, memory, strict=True):
        kept = _undominated(starts * (ends.max() + 1) + ends, block_lengths, block_memory)
        blocks.append(_Block(kept, starts[kept], ends[kept], block_lengths[kept], block_memory[kept]))
    return blocks


def _to_go(blocks: list[_Block], price: float) -> np.ndarray:
    """(blocks + 1, patterns): the least of length + ``price`` * memory from a pattern before each block to the end."""
    to_go = np.full((len(blocks) + 1, blocks[0].starts.max() + 1), np.inf)
    to_go[-1] = 0
    for row in reversed(range(len(blocks))):
        block = blocks[row]
        np.minimum.at(to_go[row], block.starts, block.costs(price) + to_go[row + 1][block.ends])
    return to_go


def _cheapest(blocks: list[_Block], price: float) -> _Sequence:
    """The sequence with the least length + ``price`` * memory."""
    to_go = _to_go(blocks, price)
    pattern = to_go[0].argmin()
    indices, length, memory = [], 0.0, 0.0
    for block, ahead in zip(blocks, to_go[1:], strict=True):
        first, last = np.searchsorted(block.starts, [pattern, pattern + 1])
        index = first + (block.costs(price)[first:last] + ahead[block.ends[first:last]]).argmin()
        indices.append(index)
        length, memory, pattern = length + block.lengths[index], memory + block.memory[index], block.ends[index]
    return _Sequence(indices, length, memory)


def _relax(blocks: list[_Block], budget: float) -> tuple[float, _Sequence]:
    """The price of memory at which length + price * (memory - budget) bounds best, and the shortest seen that fits."""
    too_large, fits = _cheapest(blocks, 0.0), _cheapest(blocks, math.inf)
    while True:
        price = (fits.length - too_large.length) / (too_large.memory - fits.memory)  # at which both cost the same
        cheaper = _cheapest(blocks, price)
        gain = too_large.length - cheaper.length + price * (too_large.memory - cheaper.memory)
        if gain <= TOLERANCE or not too_large.length < cheaper.length < fits.length:  # the latter only by rounding
            return price, fits
        if cheaper.memory <= budget:
            fits = cheaper
        else:
            too_large = cheaper


def _search(blocks: list[_Block], budget: float, price: float, best: _Sequence, width: int | None) -> _Sequence:
    """The shortest sequence that fits; with a ``width``, the best one met when only so many beginnings are followed."""
    least_costs, least_memories = _to_go(blocks, price)[1:], _to_go(blocks, math.inf)[1:]
    ends = np.arange(least_costs.shape[1])  # of the beginnings so far, with their lengths and memory
    lengths, memory = np.zeros((2, len(ends)))
    steps = []
    for block, least_cost, least_memory in zip(blocks, least_costs, least_memories, strict=True):
        before, index = _continuations(ends, block.starts)
        lengths, memory = lengths[before] + block.lengths[index], memory[before] + block.memory[index]
        ends = block.ends[index]
        bounds = lengths + price * (memory - budget) + least_cost[ends]
        kept = np.flatnonzero((memory + least_memory[ends] <= budget) & (bounds < best.length - TOLERANCE))
        kept = kept[_undominated(ends[kept], lengths[kept], memory[kept])]
        if width is not None and len(kept) > width:
            kept = kept[bounds[kept].argpartition(width)[:width]]
        lengths, memory, ends = lengths[kept], memory[kept], ends[kept]
        steps.append((before[kept], index[kept]))
    if not lengths.size or lengths.min() >= best.length:
        return best
    last = beginning = lengths.argmin()
    indices = []
    for before, index in reversed(steps):
        indices.append(index[beginning])
        beginning = before[beginning]
    return _Sequence(indices[::-1], lengths[last], memory[last])


def _continuations(ends: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (index into ``ends``, index into the sorted ``starts``) of equal entries."""
    first, last = np.searchsorted(starts, ends), np.searchsorted(starts, ends, side="right")
    counts = last - first
    before = np.repeat(np.arange(len(ends)), counts)
    return before, np.arange(len(before)) - np.repeat(counts.cumsum() - counts - first, counts)
