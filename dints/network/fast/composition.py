"""Chained convolutions as one: without a norm or an activation between them, their kernels compose
to a larger one.

The pairs of the pseudo-3D operations are such chains, each along axes of its own: together a 3x3x3
convolution, zeros beyond the border included. So the convolving operations of a cell are one
convolution to as many times the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import NamedTuple

import torch
from monai.networks.nets.dints import Cell
from torch import nn

from dints.network.operations import ActivatedConvolutions

KERNEL = (3, 3, 3)  # to which all of them compose
# Measured on AMD EPYC (Zen 4): at 16 as fast, at 32 slower. Fixed, so that a continued run rounds
# as the first one did.
MAX_CHANNELS_ON_CPU = 8


class Composed(NamedTuple):
    """Operations of a few cells, as one convolution and one InstanceNorm of each cell's activated
    image.

    Attributes:
        kernels: (cells * operations * channels, channels, 3, 3, 3), in the type that is computed
            in.
        scale, shift: (cells * operations * channels,), of the norm, times the operations' weights.
        operations: their numbers among those of a cell.
        others: the weights of the other operations by their numbers, (cells,).
    """

    kernels: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    operations: tuple[int, ...]
    others: dict[int, torch.Tensor]


def pays(image: torch.Tensor) -> bool:
    """Tell whether one composed convolution takes less time than the chains, at feature maps like
    ``image``.

    On a GPU it saves five calls in six, and what the chains keep for the backward pass. On a CPU,
    which feels the 1.7 times as many multiply-adds, it does where channels are few.
    """
    return image.device.type != "cpu" or image.shape[1] <= MAX_CHANNELS_ON_CPU


def composed(cells: Sequence[Cell], weights: torch.Tensor, together: int) -> list[Composed] | None:
    """Compose the operations of all cells of one width at once: a call for all costs no more than
    one for each.

    Args:
        cells: that have equal channels.
        weights: of their operations, (cells, operations).
        together: how many neighbouring cells each result is for.

    Returns:
        one for every ``together`` cells; None where no operation can be composed.
    """
    kinds = list(zip(*(cell.op.ops for cell in cells), strict=True))
    operations = tuple(number for number, blocks in enumerate(kinds) if _composes(blocks[0]))
    if not operations:
        return None
    chosen = [kinds[number] for number in operations]
    kernels = _in_computing_type(torch.cat([_kernels(blocks) for blocks in chosen], 1))
    # (cells, operations, 1); a list as the index would be sent to a GPU, which the host would wait
    # for.
    of_norms = torch.stack([weights[:, number] for number in operations], 1).unsqueeze(-1)
    scale, shift = (
        (
            of_norms
            * torch.stack(
                [torch.stack([getattr(block.norm, name) for block in blocks]) for blocks in chosen],
                1,
            )
        )
        for name in ("weight", "bias")
    )
    # Each is split once for all cells: a slice for each would be a gradient as large as the whole,
    # and their sum.
    left = [number for number in range(len(kinds)) if number not in operations]
    others = (
        zip(*(weights[:, number].split(together) for number in left), strict=True)
        if left
        else repeat(())
    )
    parts = zip(*(values.split(together) for values in (kernels, scale, shift)), strict=True)
    return [
        Composed(
            part.flatten(0, 1),
            up.flatten(),
            by.flatten(),
            operations,
            dict(zip(left, rest, strict=True)),
        )
        for (part, up, by), rest in zip(parts, others, strict=False)
    ]


def _composes(block: nn.Module) -> bool:
    """Tell whether an operation is a chain of plain convolutions that composes to `KERNEL`."""
    if type(block) is not ActivatedConvolutions:
        return False
    chain = _convolutions(block)
    if any(
        layer.groups > 1 or set(layer.dilation) != {1} or set(layer.stride) != {1}
        for layer in chain
    ):
        return False
    along_axes = zip(*(layer.kernel_size for layer in chain), strict=True)
    return all(
        sorted(sizes)[:-1] == [1] * (len(chain) - 1) and max(sizes) == 3 for sizes in along_axes
    )


def _convolutions(block: ActivatedConvolutions) -> list[nn.Conv3d]:
    return list(block)[1:-1]


def _kernels(blocks: Sequence[ActivatedConvolutions]) -> torch.Tensor:
    """Return (blocks, channels, channels, 3, 3, 3) of one operation's blocks."""
    first, *more = zip(*map(_convolutions, blocks), strict=True)
    kernels = torch.stack([layer.weight for layer in first])
    with _without_autocast(kernels):  # a product in bf16 would be rounded twice
        for layers in more:
            kernels = _chained(
                kernels, _AsItLies.apply(torch.stack([layer.weight for layer in layers]))
            )
    return kernels


def _chained(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Compose kernels (blocks, out, in, x, y, z), the second of which see what the first ones give.

    Along each axis one of them has the size 1.
    """
    blocks, middle, channels, *sizes = first.shape
    _, out, _, *more = second.shape
    product = second.flatten(3).transpose(2, 3).reshape(blocks, -1, middle) @ first.reshape(
        blocks, middle, -1
    )
    spread = product.view(blocks, out, *more, channels, *sizes).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
    return spread.reshape(blocks, out, channels, *(a * b for a, b in zip(more, sizes, strict=True)))


class _AsItLies(torch.autograd.Function):
    """Gives a gradient the tensor's layout: else each stacked weight would copy its own."""

    @staticmethod
    def forward(ctx, values):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous()


def _without_autocast(values: torch.Tensor) -> AbstractContextManager:
    """Return a context without autocast, which devices without numbers do not know."""
    return (
        torch.autocast(values.device.type, enabled=False)
        if _knows_autocast(values)
        else nullcontext()
    )


def _knows_autocast(values: torch.Tensor) -> bool:
    # `torch.amp.is_autocast_available`, which PyTorch 2.11 cannot compile
    return values.device.type != "meta"


def _in_computing_type(kernels: torch.Tensor) -> torch.Tensor:
    """Cast to what autocast would cast each cell's to."""
    device_type = kernels.device.type
    if not (_knows_autocast(kernels) and torch.is_autocast_enabled(device_type)):
        return kernels
    return kernels.to(torch.get_autocast_dtype(device_type))
