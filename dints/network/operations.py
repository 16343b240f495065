"""The operations that a path may hold: one table, from which everything else about them follows.

An entry is searched, costed, decoded, written, drawn, retrained and segmented with; nothing else
knows an operation by name. Files record the names, so that the order of the table may change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from dints.errors import UserError, cut, shown
from dints.network.strides import Strides, coarse_axes


@dataclass(frozen=True)
class Operation:
    """One kind of operation.

    Attributes:
        label: short, on drawings.
        colour: of the label's background.
        meaning: for a drawing's legend.
        maps: memory that a training step keeps for it, in feature maps of its output's size.
        build: makes it for a number of channels, which it keeps, as it keeps the size.
    """

    label: str
    colour: str
    meaning: str
    maps: int
    build: Callable[[int], nn.Module]


class ActivatedConvolutions(nn.Sequential):
    """ReLU, a chain of convolutions without bias, and InstanceNorm, by MONAI's names."""

    def __init__(
        self,
        channels: int,
        kernels: Sequence[tuple[int, int, int]],
        dilation: int = 1,
        groups: int = 1,
    ):
        super().__init__()
        self.acti = nn.ReLU()
        for number, kernel in enumerate(kernels):
            padding = tuple(dilation * (size // 2) for size in kernel)
            layer = nn.Conv3d(channels, channels, kernel, 1, padding, dilation, groups, bias=False)
            self.add_module(f"conv_{number}" if number else "conv", layer)
        self.norm = nn.InstanceNorm3d(channels, affine=True)


def _convolutions(*kernels: tuple[int, int, int], **settings) -> Callable[[int], nn.Module]:
    return partial(ActivatedConvolutions, kernels=kernels, **settings)


# The published five first, in their order. Their memory is MONAI's: the activation and each
# convolution and the norm.
OPERATIONS = {
    "skip_connect": Operation(
        "skip",
        "#FFFFFF",
        "no operation, at most the change of resolution",
        0,
        lambda channels: nn.Identity(),
    ),
    "conv_3x3x3": Operation("3x3x3", "#FFE9A8", "3x3x3 convolution", 3, _convolutions((3, 3, 3))),
    # A pseudo-3D pair is labelled after the plane that its first convolution spans.
    "conv_3x3x1": Operation(
        "P3D-xy",
        "#C9EBD9",
        "pseudo-3D: 3x3x1 + 1x1x3 convolutions",
        4,
        _convolutions((3, 3, 1), (1, 1, 3)),
    ),
    "conv_3x1x3": Operation(
        "P3D-xz",
        "#CFE4F7",
        "pseudo-3D: 3x1x3 + 1x3x1 convolutions",
        4,
        _convolutions((3, 1, 3), (1, 3, 1)),
    ),
    "conv_1x3x3": Operation(
        "P3D-yz",
        "#F3D6E6",
        "pseudo-3D: 1x3x3 + 3x1x1 convolutions",
        4,
        _convolutions((1, 3, 3), (3, 1, 1)),
    ),
}
PUBLISHED = ("skip_connect", "conv_3x3x3", "conv_3x3x1", "conv_3x1x3", "conv_1x3x3")
# Convolutions in the plane of two axes, for depths at which the third is coarse, by that axis.
PLANAR = {(0,): "plane_1x3x3", (1,): "plane_3x1x3", (2,): "plane_3x3x1"}
OPERATIONS |= {
    name: Operation(
        name.removeprefix("plane_"),
        "#FFD3B6",
        f"{name.removeprefix('plane_')} convolution, in the plane alone",
        3,
        _convolutions(tuple(1 if axis in axes else 3 for axis in range(3))),
    )
    for axes, name in PLANAR.items()
}


def operations_of(names: Sequence[str], strides: Strides) -> tuple[str, ...]:
    """Return the names; of none the published five, and those in the plane of coarse axes."""
    waiting = dict.fromkeys(coarse_axes(strides, depth) for depth in range(len(strides)))
    planar = [PLANAR[axes] for axes in waiting if axes in PLANAR]
    return check_names(names or (*PUBLISHED, *planar))


def check_names(names: Sequence[str], source: str = "--operations") -> tuple[str, ...]:
    """Return the names as a tuple.

    Raises:
        UserError: one is not in the table, or stands there twice.
    """
    for name in names:
        if name not in OPERATIONS:
            known = ", ".join(OPERATIONS)
            raise UserError(
                f"{source} names the operation {shown(name)}, which this version does "
                f"not have ({known})"
            )
    if len(names) == 0 or len(set(names)) < len(names):
        raise UserError(
            f"{source} names {cut(', '.join(names)) or 'no operation'}: name each operation once"
        )
    return tuple(names)
