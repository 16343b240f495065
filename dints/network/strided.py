"""MONAI's networks with strides per axis: the same layers and parameters, other factors."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Iterable

import torch
from monai.networks.blocks.dints_block import FactorizedReduceBlock
from monai.networks.nets.dints import DiNTS

from dints.network.strides import WHOLE, Strides, isotropic, reductions


class StridedReduce(FactorizedReduceBlock):
    """MONAI's reduction by two convolutions, the second one voxel on, along the halved axes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a map of which each axis is as much smaller as the convolutions' stride says."""
        x = self.act(x)
        shifted = x[(..., *(slice(step - 1, None) for step in self.conv_1.stride))]
        return self.norm(torch.cat([self.conv_1(x), self.conv_2(shifted)], 1))


def stride_network(network: DiNTS, strides: Strides) -> None:
    """Change the factors of a network that MONAI built, where they are not MONAI's own."""
    if strides == isotropic(network.num_depths, strides[0] != WHOLE):
        return
    for depth, less in enumerate(reductions(strides).tolist()):
        if str(depth) in network.stem_down:
            down = network.stem_down[str(depth)].mod
            down[0].scale_factor = _of_axes(1 / factor for factor in less)
            if strides[0] != WHOLE:
                down[4].stride = strides[0]
        if str(depth) in network.stem_up:
            network.stem_up[str(depth)].mod[3].scale_factor = _of_axes(strides[depth])
    space = network.dints_space
    for name, cell in space.cell_tree.items():
        _, path = literal_eval(name)
        source, target = space.arch_code2in[path], space.arch_code2out[path]
        if target > source:
            cell.preprocess.__class__ = StridedReduce
            cell.preprocess.conv_1.stride = cell.preprocess.conv_2.stride = strides[target]
        elif target < source:
            cell.preprocess.up.scale_factor = _of_axes(strides[source])


def _of_axes(factors: Iterable[float]) -> float | tuple[float, ...]:
    """Return factors as `torch.nn.Upsample` has them, a single one where they are equal."""
    factors = tuple(float(factor) for factor in factors)
    return factors[0] if len(set(factors)) == 1 else factors
