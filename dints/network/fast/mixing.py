"""The search space's forward pass in few calls for all operations of all paths into a node."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from monai.networks.nets.dints import Cell, TopologySearch
from torch import nn

from dints.network.fast.composition import Composed, composed, pays
from dints.network.fast.layers import convolve, convolve_side_by_side, instance_norm
from dints.network.fast.recomputation import kept_or_recomputed
from dints.network.operations import ActivatedConvolutions


class JointMixing:
    """Replaces the forward pass of a `SearchSpace`, which computes path by path."""

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        """Mix all paths and operations by their probabilities, as `SearchSpace.forward` does."""
        # A path's probability scales the sum of its operations, so it may scale each of their
        # weights instead.
        weights = self.get_prob_a()[1].unsqueeze(-1) * F.softmax(self.log_alpha_c, -1)
        targets = [target for _, target in self.paths]  # the paths into a node stand side by side
        paths_into = [
            slice(targets.index(depth), targets.index(depth) + targets.count(depth))
            for depth in range(self.num_depths)
        ]
        of_depths = [
            _composed(self, into, image, weights) for into, image in zip(paths_into, x, strict=True)
        ]
        for block in range(self.num_blocks):
            nodes = [
                (into, of_blocks[block])
                for into, of_blocks in zip(paths_into, of_depths, strict=True)
            ]
            x = kept_or_recomputed(
                self.checkpoint_activations, _mixed, self, block, x, weights[block], nodes
            )
        return x


@cache
def mixing_jointly(space: type[TopologySearch]) -> type[TopologySearch]:
    """Return the class of such spaces with the forward pass of `JointMixing`."""
    return type(space.__name__, (JointMixing, space), {})


def _mixed(
    space: JointMixing,
    block: int,
    x: list[torch.Tensor],
    weights: torch.Tensor,
    nodes: Sequence[tuple[slice, Sequence[Composed] | None]],
) -> list[torch.Tensor]:
    """Return a block's feature maps, of those of the block before.

    Args:
        weights: (paths, operations).
        nodes: for each, the paths into it, and what is composed of their operations.
    """
    outputs = []
    for into, parts in nodes:
        paths = range(into.start, into.stop)
        cells = [space.cell_tree[str((block, path))] for path in paths]
        images = [x[space.paths[path][0]] for path in paths]
        outputs.append(mix(cells, images, weights[into], parts))
    return outputs


def _composed(
    space: JointMixing, into: slice, image: torch.Tensor, weights: torch.Tensor
) -> Sequence[Sequence[Composed] | None]:
    """Compose, by block, what the paths ``into`` a depth hold, where that pays for ``image``."""
    if not pays(image):
        return [None] * space.num_blocks
    paths = range(into.start, into.stop)
    cells = [
        space.cell_tree[str((block, path))] for block in range(space.num_blocks) for path in paths
    ]
    parts = composed(
        cells, weights[:, into].flatten(0, 1), cells_together(len(paths), image.device)
    )
    if parts is None:
        return [None] * space.num_blocks
    in_a_block = len(parts) // space.num_blocks
    return [parts[start : start + in_a_block] for start in range(0, len(parts), in_a_block)]


def mix(
    cells: Sequence[Cell],
    images: Sequence[torch.Tensor],
    weights: torch.Tensor,
    parts: Sequence[Composed] | None = None,
) -> torch.Tensor:
    """Return what the sum of ``cell(image, weight)`` computes, operations of one kind in few calls
    for all cells.

    Args:
        images: each cell's input; the outputs have the same shape.
        weights: (cells, operations).
        parts: operations that are composed, for as many cells at a time as `cells_together` says.
    """
    together = cells_together(len(cells), images[0].device)
    terms = [
        _mix_side_by_side(cells[start:end], images[start:end], weights[start:end], part)
        for start, end, part in zip(
            range(0, len(cells), together),
            range(together, len(cells) + 1, together),
            parts or [None] * (len(cells) // together),
            strict=True,
        )
    ]
    return _sum(terms)


def cells_together(count: int, device: torch.device) -> int:
    """Return how many of the cells into a node are computed in one call.

    All of them on a CPU, where a call costs more than what the deeper levels compute in it. On a
    GPU each by itself: grouped 3D convolutions are known to be slow in cuDNN.
    """
    return count if device.type == "cpu" else 1


def _mix_side_by_side(
    cells: Sequence[Cell],
    images: Sequence[torch.Tensor],
    weights: torch.Tensor,
    composed: Composed | None,
) -> torch.Tensor:
    images = [cell.preprocess(image) for cell, image in zip(cells, images, strict=True)]
    joined = torch.cat(images, 1) if len(images) > 1 else images[0]
    # of each operation, the cells' blocks
    operations = list(zip(*(cell.op.ops for cell in cells), strict=True))
    left = dict(enumerate(weights.unbind(1))) if composed is None else composed.others
    plain = [number for number in left if _is_plain(operations[number][0])]
    skips = [number for number in left if type(operations[number][0]) is nn.Identity]
    terms = []
    if composed is not None:
        terms.append(_convolved_at_once(operations[composed.operations[0]], composed, joined))
    if plain:
        terms.append(
            _convolved(
                [operations[number] for number in plain], [left[number] for number in plain], joined
            )
        )
    for number in skips:
        terms.append(_scaled(joined, left[number]))
    for number in left.keys() - {*plain, *skips}:
        for block, image, weight in zip(operations[number], images, left[number], strict=True):
            terms.append((block(image) * weight).to(joined.dtype))
    return _sum(terms)


def _scaled(image: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum cells that are side by side in ``image``, each times its weight."""
    if len(weights) == 1:
        return image * weights.squeeze(0)
    of_cells = image.unflatten(1, (len(weights), -1)) * weights.view(-1, 1, *[1] * (image.ndim - 2))
    return of_cells.sum(1, dtype=image.dtype)


def _convolved_at_once(
    blocks: Sequence[ActivatedConvolutions], composed: Composed, image: torch.Tensor
) -> torch.Tensor:
    """Sum composed operations of cells that are side by side; ``blocks`` are any of theirs."""
    features = convolve(composed.kernels, blocks[0].acti(image), len(blocks))
    normalised = instance_norm(features, composed.scale, composed.shift, blocks[0].norm.eps)
    channels = composed.kernels.shape[1]
    # else autocast would make it fp32
    return normalised.unflatten(1, (-1, channels)).sum(1, dtype=image.dtype)


def _is_plain(block: nn.Module) -> bool:
    """Tell whether an operation is ReLU, plain convolutions and InstanceNorm."""
    return (
        type(block) is ActivatedConvolutions
        and block.conv.groups == 1
        and set(block.conv.dilation) == {1}
    )


def _convolved(
    operations: Sequence[Sequence[ActivatedConvolutions]],
    weights: Sequence[torch.Tensor],
    image: torch.Tensor,
) -> torch.Tensor:
    """Sum plain operations of cells whose images are side by side in ``image``.

    The activation, with which every operation begins, is computed once; the weights scale the
    affine parameters of the InstanceNorm with which every operation ends, in one call for all of
    them.

    Args:
        operations: of each operation, the cells' blocks.
        weights: of each operation, (cells,).
    """
    activated = operations[0][0].acti(image)
    features = []
    for blocks in operations:
        feature = activated
        for convolutions in zip(*(list(block)[1:-1] for block in blocks), strict=True):
            feature = convolve_side_by_side(convolutions, feature)
        features.append(feature)
    norms = [block.norm for blocks in operations for block in blocks]
    of_norms = torch.stack(list(weights)).reshape(-1, 1)
    normalised = instance_norm(
        torch.cat(features, 1),
        (of_norms * torch.stack([norm.weight for norm in norms])).flatten(),
        (of_norms * torch.stack([norm.bias for norm in norms])).flatten(),
        norms[0].eps,
    )
    # else autocast would make it fp32
    return normalised.unflatten(1, (len(norms), -1)).sum(1, dtype=image.dtype)


def _sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(terms[1:], terms[0])
