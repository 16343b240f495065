"""MONAI's `Cell`, which holds the operations of a path, with those of our table."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import torch
from monai.networks.nets.dints import Cell, MixedOp
from torch import nn

from dints.network.operations import OPERATIONS


@cache
def cell_of(names: tuple[str, ...]) -> type[Cell]:
    """Return the class of cells whose operations have these names, in this order."""

    class TableCell(Cell):
        OPS3D = {name: partial(_built, name) for name in names}

        def __init__(
            self, c_prev: int, c: int, rate: int, arch_code_c: torch.Tensor | None = None, *settings
        ):
            # the change of resolution, without operations
            super().__init__(c_prev, c, rate, np.zeros(0), *settings)
            self.op = MixedOp(c, type(self).OPS3D, arch_code_c)

    return TableCell


def _built(name: str, channels: int) -> nn.Module:
    """Build an operation, with the memory that MONAI's space asks each of its operations for."""
    operation = OPERATIONS[name].build(channels)
    operation.ram_cost = OPERATIONS[name].maps
    return operation
