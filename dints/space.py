"""The search space: MONAI's `TopologySearch`, with the same parameters and results, computed stably in few operations.

A block has ``P = 3 * depths - 2`` paths between the nodes of two neighbouring rows. A *child* is one way to switch them
on or off (all off excluded, so ``2**P - 1`` of them); a *pattern* is a set of active nodes (``2**depths - 1`` of them).
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets.dints import Cell, TopologySearch
from torch import nn

from dints import decoding
from dints.acceleration import convolve_side_by_side, instance_norm
from dints.architecture import Architecture, paths
from dints.errors import UserError


class SearchSpace(TopologySearch):
    """MONAI's search space; state dicts move both ways.

    Differences: probabilities are right for any alpha (MONAI's are NaN from -20 down); the regularisers are matrix
    products (MONAI: 31,000 operations at 12 blocks and 4 depths); `decode` is a shortest path over patterns (MONAI:
    over a dense matrix of all children, 2 GB); nothing is printed, and the space works on any device it is moved to.
    """

    def __init__(self, *args, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()):  # MONAI prints its advice about patch sizes
            super().__init__(*args, **kwargs)
        self.paths = paths(self.num_depths)
        self.standard = all(_is_standard(cell) for cell in self.cell_tree.values())
        leaves, reaches = (np.array(ends) for ends in zip(*self.paths, strict=True))
        # The paths into a node stand side by side.
        self.paths_into = [range(*np.searchsorted(reaches, (depth, depth + 1))) for depth in range(self.num_depths)]
        self.starts = _patterns(self.child_list, leaves, self.num_depths)
        self.ends = _patterns(self.child_list, reaches, self.num_depths)
        num_patterns = 2**self.num_depths - 1
        for name, constant in (
            ("child_switches", torch.from_numpy(np.hstack([self.child_list, 1 - self.child_list])).float()),  # on, off
            ("child_starts", F.one_hot(torch.from_numpy(self.starts), num_patterns).float()),
            ("child_ends", F.one_hot(torch.from_numpy(self.ends), num_patterns).float()),
            ("operation_costs", torch.from_numpy(self.ram_cost).float()),
            ("targets", F.one_hot(torch.from_numpy(reaches), self.num_depths).T.float()),  # (depths, paths)
        ):
            self.register_buffer(name, constant, persistent=False)
        # A depth's feature map relative to others', and with these every path active with its dearest operation.
        self.depth_sizes = [
            channels / 2 ** (self._spatial_dims * depth)
            for depth, channels in enumerate(self.filter_nums[: self.num_depths])
        ]
        self.dearest_memory = ((1 + self.ram_cost.max(-1)) * np.array(self.depth_sizes)[reaches]).sum()

    def gen_mtx(self, depth: int) -> tuple[dict, list[tuple], list[tuple]]:
        """All node patterns and children in MONAI's order; its table of transfer matrices is not needed here."""
        patterns, children = (list(product((0, 1), repeat=length))[1:] for length in (depth, 3 * depth - 2))
        return {}, patterns, children

    def get_prob_a(self, child: bool = False) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Path probabilities, given that each block has at least one active path.

        Returns:
            the children's probabilities (blocks, children) if ``child``, else None, and the paths' (blocks, paths).
        """
        log_on, log_off = F.logsigmoid(self.log_alpha_a), F.logsigmoid(-self.log_alpha_a)
        # Some path is active: either the first is, or it is not and the second is, ... This sum keeps the digits that
        # 1 - prod(1 - p) loses when all p are small.
        all_before_off = F.pad(log_off.cumsum(-1)[:, :-1], (1, 0))
        log_norm = torch.logsumexp(log_on + all_before_off, -1, keepdim=True)
        path_probs = torch.exp(log_on - log_norm)
        if not child:
            return None, path_probs
        log_child = torch.cat([log_on, log_off], -1) @ self.child_switches.T
        return torch.exp(log_child - log_norm), path_probs

    def get_topology_entropy(self, probs: torch.Tensor) -> torch.Tensor:
        """Cross-entropy between the patterns in which a block ends and in which the next one starts.

        Args:
            probs: the children's probabilities (blocks, children).
        """
        ends, starts = probs[:-1] @ self.child_ends, probs[1:] @ self.child_starts
        return -(ends * torch.log(starts + 1e-5) + (1 - ends) * torch.log(1 - starts + 1e-5)).sum()

    def get_ram_cost_usage(self, in_size: tuple[int, ...], full: bool = False) -> torch.Tensor:
        """Expected size in MiB of the feature maps that a step keeps.

        Args:
            in_size: shape of the network's input, (batch, channels, *spatial).
            full: as if every path were active; the operations keep their probabilities and their gradient.
        """
        active = torch.ones_like(self.log_alpha_a) if full else self.get_prob_a()[1]
        return (active * self._expected_costs() * self._sizes(in_size)).sum() * 32 / 8 / 1024**2

    def _sizes(self, in_size: tuple[int, ...]) -> torch.Tensor:
        """(paths,): numbers in the feature map that each path leads to."""
        spatial = np.array(in_size[-self._spatial_dims :])
        voxels = [(spatial // 2**depth).prod() for depth in range(self.num_depths)]
        # MONAI halves the size once for the stem's downsampling, not once per axis; so do we, to get its values.
        sizes = in_size[0] * np.array(voxels) * self.filter_nums[: self.num_depths] / 2 ** int(self.use_downsample)
        return self._of_depths(sizes.tolist())

    def ram_ratio(
        self, in_size: tuple[int, ...], budget: str = "published", path_probs: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Expected memory as a share of a budget, with its gradient.

        Args:
            in_size: as for `get_ram_cost_usage`.
            budget: ``published``: every path active with the present operations, which therefore cancel (all networks
                with all paths read the same); ``fixed``: every path active with its dearest operation, a constant, so
                that operations count.
            path_probs: those of `get_prob_a`, where they are at hand.
        """
        path_probs = self.get_prob_a()[1] if path_probs is None else path_probs
        sizes = self._sizes(in_size) if budget == "published" else self._of_depths(self.depth_sizes)
        memory = self._expected_costs() * sizes
        return (path_probs * memory).sum() / (memory.sum() if budget == "published" else self.dearest_memory)

    def _expected_costs(self) -> torch.Tensor:
        """(blocks, paths): feature maps that a path keeps, in output sizes: the output and those of its operations."""
        return 1 + (self.operation_costs * F.softmax(self.log_alpha_c, -1)).sum(-1)

    def _of_depths(self, values: Sequence[float]) -> torch.Tensor:
        """(paths,): a number per depth for each path's target; made of Python numbers on the device, without a wait."""
        return sum(value * at_depth for value, at_depth in zip(values, self.targets, strict=True))

    def _memory_of_paths(self, arch_code_c: np.ndarray) -> np.ndarray:
        """(blocks, paths): memory of each path with its decoded operation, in the unit of ``dearest_memory``."""
        costs = np.take_along_axis(self.ram_cost, arch_code_c[..., None], -1)[..., 0]
        return (1 + costs) * np.array(self.depth_sizes)[[target for _, target in self.paths]]

    def ram_ratio_of(self, arch_code_a: np.ndarray, arch_code_c: np.ndarray) -> float:
        """Memory of a decoded architecture as a share of every path active with its dearest operation."""
        return float((self._memory_of_paths(arch_code_c) * arch_code_a).sum() / self.dearest_memory)

    def feasible_ram_ratio(self) -> float:
        """The smallest ``max_ram_ratio`` that `decode` can keep, whatever the operations are."""
        dearest = self._memory_of_paths(self.ram_cost.argmax(-1)) @ self.child_list.T
        return decoding.least_memory(dearest, self.starts, self.ends) / self.dearest_memory

    @torch.no_grad()
    def decode(self, max_ram_ratio: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The most probable sequence of children in which each starts from the nodes where the one before ends.

        Args:
            max_ram_ratio: of the sequences whose `ram_ratio_of` is at most this, the most probable one. Operations stay
                the most probable ones.

        Returns:
            node_a, arch_code_a, arch_code_c, arch_code_a_max as in `dints.architecture`.

        Raises:
            UserError: no connected architecture is within ``max_ram_ratio``.
        """
        probs = self.get_prob_a(child=True)[0].cpu().numpy()
        arch_code_c = self.log_alpha_c.argmax(-1).cpu().numpy()
        lengths = (-np.log(probs + 1e-5) + 0.001).astype(np.float64)  # MONAI's edge lengths
        if max_ram_ratio is None:
            children = decoding.shortest_sequence(lengths, self.starts, self.ends)
        else:
            children = self._decode_within(max_ram_ratio, lengths, arch_code_c)
        arch_code_a = self.child_list[children]
        node_a = np.zeros((self.num_blocks + 1, self.num_depths), dtype=np.int64)
        for block, path in np.argwhere(arch_code_a):
            source, target = self.paths[path]
            node_a[block, source] = node_a[block + 1, target] = 1
        return node_a, arch_code_a, arch_code_c, self.child_list[probs.argmax(-1)]

    def _decode_within(self, max_ram_ratio: float, lengths: np.ndarray, arch_code_c: np.ndarray) -> np.ndarray:
        memory = self._memory_of_paths(arch_code_c) @ self.child_list.T
        least = decoding.least_memory(memory, self.starts, self.ends)
        budget = max_ram_ratio * self.dearest_memory * (1 + 1e-9)  # a ratio that `ram_ratio_of` gave must be enough
        if least > budget:
            raise UserError(
                f"max_ram_ratio {max_ram_ratio:g} is below that of the smallest connected architecture: give at least "
                f"{math.ceil(least / self.dearest_memory * 1e4) / 1e4:g}"
            )
        return decoding.shortest_sequence_within(budget, lengths, memory, self.starts, self.ends)

    def architecture(self, max_ram_ratio: float | None = None, **info) -> Architecture:
        """The decoded architecture with what is to be known about it later, its ``ram_ratio`` included."""
        node_a, arch_code_a, arch_code_c, arch_code_a_max = self.decode(max_ram_ratio)
        info["ram_ratio"] = self.ram_ratio_of(arch_code_a, arch_code_c)
        return Architecture(node_a, arch_code_a, arch_code_c, arch_code_a_max, info=info)

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        """Mix all paths and operations by their probabilities.

        Args:
            x: one feature map per depth, as the stems of `monai.networks.nets.DiNTS` make them.
        """
        # A path's probability scales the sum of its operations, so it may scale each of their weights instead.
        weights = self.get_prob_a()[1].unsqueeze(-1) * F.softmax(self.log_alpha_c, -1)
        for block in range(self.num_blocks):
            outputs = []
            for into in self.paths_into:
                cells = [self.cell_tree[str((block, path))] for path in into]
                images = [x[self.paths[path][0]] for path in into]
                outputs.append(self._mixed(cells, images, weights[block, into.start : into.stop]))
            x = outputs
        return x

    def _mixed(self, cells: list[Cell], images: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """The sum of ``cell(image, weight)`` over all cells that lead to one node."""
        if not self.standard:
            terms = [cell(image, weight) for cell, image, weight in zip(cells, images, weights, strict=True)]
        elif images[0].device.type == "cpu":  # a call costs more than what the deeper levels compute in it
            terms = [_mix(cells, images, weights)]
        else:  # grouped 3D convolutions are known to be slow in cuDNN; we had no GPU to measure them on
            parts = [slice(index, index + 1) for index in range(len(cells))]
            terms = [_mix(cells[part], images[part], weights[part]) for part in parts]
        return sum(terms[1:], terms[0])


def _is_standard(cell: Cell) -> bool:
    """Whether its operations begin with the same activation and end with an InstanceNorm, as by default they do."""
    return type(cell) is Cell and all(
        isinstance(operation.norm, (nn.InstanceNorm2d, nn.InstanceNorm3d))
        and operation.norm.affine
        and not operation.norm.track_running_stats
        and not list(operation.acti.parameters())
        for operation in list(cell.op.ops)[1:]
    )


def _mix(cells: list[Cell], images: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """What the sum of ``cell(image, weight)`` computes, the cells side by side as groups of one convolution.

    The activation, with which every operation begins, is computed once; the weights scale the affine parameters of the
    InstanceNorm with which every operation ends, in one call for all of them.

    Args:
        images: each cell's input; the outputs have the same shape.
        weights: (cells, operations).
    """
    images = [cell.preprocess(image) for cell, image in zip(cells, images, strict=True)]
    image = torch.cat(images, 1) if len(images) > 1 else images[0]
    # The first operation is to skip; of each other one, the cells' blocks.
    operations = list(zip(*(list(cell.op.ops)[1:] for cell in cells), strict=True))
    activated = operations[0][0].acti(image)
    features = []
    for blocks in operations:
        feature = activated
        for convolutions in zip(*(list(block)[1:-1] for block in blocks), strict=True):
            feature = convolve_side_by_side(convolutions, feature)
        features.append(feature)
    norms = [block.norm for blocks in operations for block in blocks]
    of_norms = weights[:, 1:].T.reshape(-1, 1)
    normalised = instance_norm(
        torch.cat(features, 1),
        (of_norms * torch.stack([norm.weight for norm in norms])).flatten(),
        (of_norms * torch.stack([norm.bias for norm in norms])).flatten(),
        norms[0].eps,
    )
    mixed = normalised.unflatten(1, (len(norms), -1)).sum(1, dtype=image.dtype)  # else autocast would make it fp32
    skipped = image.unflatten(1, (len(cells), -1)) * weights[:, 0].view(-1, 1, *[1] * (image.ndim - 2))
    return mixed + skipped.sum(1, dtype=image.dtype)


def _patterns(children: np.ndarray, path_depths: np.ndarray, num_depths: int) -> np.ndarray:
    """For each child, the index of the set of nodes at that end of its active paths, in the order of node_act_list."""
    touched = np.stack([children[:, path_depths == depth].any(-1) for depth in range(num_depths)], -1)
    return touched @ (2 ** np.arange(num_depths)[::-1]) - 1
