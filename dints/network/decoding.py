"""Decoding: the most probable sequence of children, one per block.

Each child starts from the nodes in which the one before ends. A child's length is the negative
logarithm of its probability, so that the most probable sequence is the shortest one. In common:

    lengths       (blocks, children)  positive
    memory        (blocks, children)  of the feature maps on a child's paths, in any unit
    starts, ends  (children,)         the patterns, counted from 0, from which a child starts and in
                                      which it ends; each is the start of a child and the end of one
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np

TOLERANCE = 1e-9  # lengths that differ by less are equal; rounding errors are far below it


def subsets(count: int, with_first: bool = False) -> list[tuple[int, ...]]:
    """List the subsets of ``count`` nodes or paths, 1 for a member, without the empty one, in
    MONAI's order.

    Args:
        with_first: only those that have the first one.
    """
    members = list(product((0, 1), repeat=count))[1:]
    return [subset for subset in members if subset[0] == 1] if with_first else members


def patterns(children: np.ndarray, path_depths: np.ndarray, num_depths: int) -> np.ndarray:
    """Return for each child the index, in ``subsets(num_depths)``, of the nodes at that end of its
    active paths.

    Args:
        children: (children, paths).
        path_depths: (paths,), the depth of each path's node at that end.
    """
    touched = np.stack(
        [children[:, path_depths == depth].any(-1) for depth in range(num_depths)], -1
    )
    return touched @ (2 ** np.arange(num_depths)[::-1]) - 1


def shortest_sequence(lengths: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the shortest sequence's children, (blocks,); of equally short ones MONAI's choice."""
    shortest = np.zeros(starts.max() + 1)  # of the sequences so far that end in a pattern
    last_children = []
    for block in lengths:
        totals = shortest[starts] + block
        order = np.lexsort((totals, ends))
        last_children.append(order[np.searchsorted(ends[order], np.arange(len(shortest)))])
        shortest = totals[last_children[-1]]
    pattern, sequence = shortest.argmin(), []
    for last in reversed(last_children):
        sequence.insert(0, last[pattern])
        pattern = starts[sequence[0]]
    return np.array(sequence)


def least_memory(memory: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> float:
    """Return the memory of the smallest sequence."""
    return _total(memory, shortest_sequence(memory, starts, ends))


def shortest_sequence_within(
    budget: float, lengths: np.ndarray, memory: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Return the shortest sequence of at most ``budget`` memory, which is not below `least_memory`.

    It is a constrained shortest path, found exactly, after Handler and Zang (Networks 10, 1980): a
    price on memory gives a sequence that fits, and for every prefix of a sequence a bound on how
    short it can become. The prefixes that may still become shorter than the best known sequence are
    extended block by block, all at once.
    """
    shortest = shortest_sequence(lengths, starts, ends)
    if _total(memory, shortest) <= budget:
        return shortest
    price, best = _price(budget, lengths, memory, starts, ends)
    costs_to_go, memory_to_go = (
        _to_go(costs, starts, ends) for costs in (lengths + price * memory, memory)
    )

    reached = np.arange(starts.max() + 1)  # the pattern in which each prefix ends
    prefixes = np.zeros((len(reached), 0), dtype=np.int64)
    length, used = np.zeros((2, len(reached)))
    for block, (of_children, memory_of_children) in enumerate(zip(lengths, memory, strict=True)):
        useful = _undominated(starts * (ends.max() + 1) + ends, of_children, memory_of_children)
        prefix, child = _extensions(reached, useful, starts)
        length, used = length[prefix] + of_children[child], used[prefix] + memory_of_children[child]
        bounds = length + price * (used - budget) + costs_to_go[block + 1][ends[child]]
        is_shorter = bounds < _total(lengths, best) - TOLERANCE
        kept = np.flatnonzero(is_shorter & (used + memory_to_go[block + 1][ends[child]] <= budget))
        kept = kept[_undominated(ends[child[kept]], length[kept], used[kept])]
        prefixes = np.column_stack([prefixes[prefix[kept]], child[kept]])
        reached, length, used = ends[child[kept]], length[kept], used[kept]
    return prefixes[length.argmin()] if len(prefixes) else best


def _total(values: np.ndarray, sequence: np.ndarray) -> float:
    """Add up the ``values`` (blocks, children) of a sequence's children."""
    return values[np.arange(len(values)), sequence].sum()


def _price(
    budget: float, lengths: np.ndarray, memory: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[float, np.ndarray]:
    """Find the price of memory with the best bounds, and the shortest fitting sequence met."""
    too_large, fits = (shortest_sequence(costs, starts, ends) for costs in (lengths, memory))
    while True:
        longer = _total(lengths, fits) - _total(lengths, too_large)
        # at which they cost the same
        price = longer / (_total(memory, too_large) - _total(memory, fits))
        costs = lengths + price * memory
        cheaper = shortest_sequence(costs, starts, ends)
        gain = _total(costs, too_large) - _total(costs, cheaper)
        # It lies between the two if it costs less, but for rounding, which must not keep the loop
        # from ending.
        lies_between = _total(lengths, too_large) < _total(lengths, cheaper) < _total(lengths, fits)
        if gain <= TOLERANCE or not lies_between:
            return price, fits
        if _total(memory, cheaper) <= budget:
            fits = cheaper
        else:
            too_large = cheaper


def _to_go(costs: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the least cost to the end: (blocks + 1, patterns), before each block and after."""
    rows = [np.zeros(starts.max() + 1)]
    for block in reversed(costs):
        least = np.full_like(rows[0], math.inf)
        np.minimum.at(least, starts, block + rows[0][ends])
        rows.insert(0, least)
    return np.stack(rows)


def _undominated(groups: np.ndarray, lengths: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Return the indices of the entries that are shorter than all smaller ones of their group."""
    order = np.lexsort((lengths, memory, groups))
    # Each group is shifted below the one before, so that the running minimum starts afresh.
    shifted = lengths[order] - groups[order] * (lengths.max(initial=0) + 1)
    return order[np.diff(np.minimum.accumulate(shifted), prepend=np.inf) < 0]


def _extensions(
    reached: np.ndarray, children: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """List the pairs (index of a prefix, child that starts where it ends).

    Args:
        reached: (prefixes,), the pattern in which each ends.
        children: in the order of their starts.
    """
    first, last = (np.searchsorted(starts[children], reached, side) for side in ("left", "right"))
    counts = last - first
    prefix = np.repeat(np.arange(len(reached)), counts)
    place = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return prefix, children[first[prefix] + place]
