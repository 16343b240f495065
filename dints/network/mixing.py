"""What the search spends its time on: the sum of all operations of all paths that lead to one node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets.dints import Cell
from torch import nn

from dints.network.cpu_layers import convolve_side_by_side, instance_norm
from dints.network.operations import ActivatedConvolutions


def mix(cells: Sequence[Cell], images: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Return what the sum of ``cell(image, weight)`` computes, operations of one kind in few calls for all cells.

    Args:
        images: each cell's input; the outputs have the same shape.
        weights: (cells, operations).
    """
    if images[0].device.type == "cpu":  # a call costs more than what the deeper levels compute in it
        return _mix_side_by_side(cells, images, weights)
    # Grouped 3D convolutions are known to be slow in cuDNN; we had no GPU to measure them on.
    parts = [slice(index, index + 1) for index in range(len(cells))]
    return _sum([_mix_side_by_side(cells[part], images[part], weights[part]) for part in parts])


def _mix_side_by_side(cells: Sequence[Cell], images: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    images = [cell.preprocess(image) for cell, image in zip(cells, images, strict=True)]
    joined = torch.cat(images, 1) if len(images) > 1 else images[0]
    operations = list(zip(*(cell.op.ops for cell in cells), strict=True))  # of each operation, the cells' blocks
    weights = weights.unbind(1)
    plain = [index for index, blocks in enumerate(operations) if _is_plain(blocks[0])]
    skips = [index for index, blocks in enumerate(operations) if type(blocks[0]) is nn.Identity]
    terms = []
    if plain:
        terms.append(_convolved([operations[index] for index in plain], [weights[index] for index in plain], joined))
    for index in skips:
        of_cells = joined.unflatten(1, (len(cells), -1)) * weights[index].view(-1, 1, *[1] * (joined.ndim - 2))
        terms.append(of_cells.sum(1, dtype=joined.dtype))
    for index in set(range(len(operations))) - {*plain, *skips}:
        for block, image, weight in zip(operations[index], images, weights[index], strict=True):
            terms.append((block(image) * weight).to(joined.dtype))
    return _sum(terms)


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
