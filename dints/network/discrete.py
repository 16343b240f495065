"""The discrete network: built from an architecture, with nothing that never trains."""

from __future__ import annotations

import contextlib
import io

import torch
from monai.networks.nets.dints import DiNTS, TopologyInstance
from torch import nn

from dints.errors import UserError
from dints.network.architecture import Architecture, paths
from dints.network.cells import cell_of
from dints.network.fast.acceleration import accelerate
from dints.network.fast.recomputation import kept_or_recomputed


class DiscreteNetwork(DiNTS):
    """MONAI's `DiNTS` over a `TopologyInstance`, with the architecture as Python ints and nothing
    that never trains.

    State dicts of MONAI's network fit, but for the stems that this architecture does not use; see
    `load_weights`.

    Args:
        architecture: what to build.
        in_channels: image channels.
        num_classes: output channels, background included.
        channel_mul: times 32, 64, 128, ... channels from the full resolution down.

    Attributes:
        checkpoint_activations: keep only what goes from block to block for the backward pass.
    """

    checkpoint_activations = False

    def __init__(
        self,
        architecture: Architecture,
        in_channels: int,
        num_classes: int,
        channel_mul: float = 1.0,
    ):
        with contextlib.redirect_stdout(io.StringIO()):  # MONAI prints its advice about patch sizes
            space = TopologyInstance(
                arch_code=[architecture.arch_code_a, architecture.arch_code_c],
                cell=cell_of(architecture.operations),
                channel_mul=channel_mul,
                num_blocks=architecture.num_blocks,
                num_depths=architecture.num_depths,
                use_downsample=architecture.use_downsample,
            )
        node_a = torch.from_numpy(architecture.node_a)
        super().__init__(
            space,
            in_channels,
            num_classes,
            use_downsample=architecture.use_downsample,
            node_a=node_a,
        )
        ends = paths(architecture.num_depths)
        self.inputs = [int(depth) for depth in architecture.node_a[0].nonzero()[0]]
        self.blocks = [
            [(str((block, int(path))), *ends[path]) for path in active.nonzero()[0]]
            for block, active in enumerate(architecture.arch_code_a)
        ]
        self.deepest_output = int(architecture.node_a[-1].nonzero()[0].max())
        unused = [
            ("stem_down", depth) for depth in range(self.num_depths) if depth not in self.inputs
        ]
        unused += [("stem_up", depth) for depth in range(self.deepest_output + 1, self.num_depths)]
        for stems, depth in unused:
            del getattr(self, stems)[str(depth)]
        accelerate(self)
        # openings of MONAI's keys
        self.unused_stems = tuple(f"{stems}.{depth}." for stems, depth in unused)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return class scores (batch, classes, *spatial) of images (batch, channels, *spatial)."""
        features = {depth: self.stem_down[str(depth)](x) for depth in self.inputs}
        for block in self.blocks:
            features = kept_or_recomputed(
                self.checkpoint_activations, self._computed, block, features
            )
        up = None
        for depth in range(self.deepest_output, -1, -1):
            terms = [term for term in (features.get(depth), up) if term is not None]
            up = self.stem_up[str(depth)](sum(terms[1:], terms[0]))
        return self.stem_finals(up)

    def _computed(
        self, block: list[tuple[str, int, int]], features: dict[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Return a block's feature maps by their depth, of those of the block before."""
        outputs = {}
        for name, source, target in block:
            output = self.dints_space.cell_tree[name](features[source], None)
            outputs[target] = outputs[target] + output if target in outputs else output
        return outputs


def check_patch_size(
    patch_size: tuple[int, int, int],
    num_depths: int,
    use_downsample: bool = True,
    flag: str = "--patch_size",
) -> None:
    """Raise `UserError` unless ``num_depths`` can halve ``patch_size`` down to the deepest."""
    step = _step(num_depths, use_downsample)
    if any(size <= 0 or size % step for size in patch_size) or all(
        size <= step for size in patch_size
    ):
        nearest = [max(step, round(size / step) * step) for size in patch_size]
        # InstanceNorm needs more than one voxel at the deepest level
        if all(size <= step for size in nearest):
            nearest = [2 * step] * 3
        raise UserError(
            f"{flag} {' '.join(map(str, patch_size))} does not fit {num_depths} depths, which need "
            f"multiples of {step} and more than {step} in one direction: for example "
            f"{' '.join(map(str, nearest))}"
        )


def patch_step(architecture: Architecture) -> int:
    """Return what the network's images must be a multiple of along each axis, in voxels."""
    return _step(architecture.num_depths, architecture.use_downsample)


def _step(num_depths: int, use_downsample: bool) -> int:
    return 2 ** (num_depths if use_downsample else num_depths - 1)


def count_parameters(network: nn.Module) -> int:
    """Count the trainable numbers in the network."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
