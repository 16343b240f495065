"""What the search spends its time on: the sum of all operations of all paths that lead to one node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets.dints import Cell
from torch import nn

from dints.network.composition import Composed
from dints.network.cpu_layers import convolve, convolve_side_by_side, instance_norm
from dints.network.operations import ActivatedConvolutions


def mix(
    cells: Sequence[Cell],
    images: Sequence[torch.Tensor],
    weights: torch.Tensor,
    parts: Sequence[Composed] | None = None,
) -> torch.Tensor:
    """Return what the sum of ``cell(image, weight)`` computes, operations of one kind in few calls for all cells.

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

    All of them on a CPU, where a call costs more than what the deeper levels compute in it. On a GPU each by itself:
    grouped 3D convolutions are known to be slow in cuDNN; we had no GPU to measure them on.
    """
    return count if device.type == "cpu" else 1


def _mix_side_by_side(
    cells: Sequence[Cell], images: Sequence[torch.Tensor], weights: torch.Tensor, composed: Composed | None
) -> torch.Tensor:
    images = [cell.preprocess(image) for cell, image in zip(cells, images, strict=True)]
    joined = torch.cat(images, 1) if len(images) > 1 else images[0]
    operations = list(zip(*(cell.op.ops for cell in cells), strict=True))  # of each operation, the cells' blocks
    left = dict(enumerate(weights.unbind(1))) if composed is None else composed.others
    plain = [number for number in left if _is_plain(operations[number][0])]
    skips = [number for number in left if type(operations[number][0]) is nn.Identity]
    terms = []
    if composed is not None:
        terms.append(_convolved_at_once(operations[composed.operations[0]], composed, joined))
    if plain:
        terms.append(_convolved([operations[number] for number in plain], [left[number] for number in plain], joined))
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
    """Sum the composed operations of cells whose images are side by side in ``image``; ``blocks`` are any of theirs."""
    features = convolve(composed.kernels, blocks[0].acti(image), len(blocks))
    normalised = instance_norm(features, composed.scale, composed.shift, blocks[0].norm.eps)
    channels = composed.kernels.shape[1]
    return normalised.unflatten(1, (-1, channels)).sum(1, dtype=image.dtype)  # else autocast would make it fp32


def _is_plain(block: nn.Module) -> bool:
    """Tell whether an operation can be computed side by side: ReLU, plain convolutions, InstanceNorm."""
    return type(block) is ActivatedConvolutions and block.conv.groups == 1 and set(block.conv.dilation) == {1}


def _convolved(
    operations: Sequence[Sequence[ActivatedConvolutions]], weights: Sequence[torch.Tensor], image: torch.Tensor
) -> torch.Tensor:
    """Sum plain operations of cells whose images are side by side in ``image``.

    The activation, with which every operation begins, is computed once; the weights scale the affine parameters of the
    InstanceNorm with which every operation ends, in one call for all of them.

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
    return normalised.unflatten(1, (len(norms), -1)).sum(1, dtype=image.dtype)  # else autocast would make it fp32


def _sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(terms[1:], terms[0])
