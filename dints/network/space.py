"""The search space: MONAI's `TopologySearch`, with the same parameters and results, computed
stably.

A block has ``P = 3 * depths - 2`` paths between the nodes of two neighbouring rows. A *child* is
one way to switch them on or off (all off excluded, so ``2**P - 1`` of them); a *pattern* is a set
of active nodes (``2**depths - 1`` of them). Where the path along depth 0 is kept in every block, a
child is one way to switch the others, and node 0 is in every
pattern: ``2**(P - 1)`` children, ``2**(depths - 1)`` patterns.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets.dints import DiNTS, TopologySearch

from dints.errors import UserError
from dints.network import decoding
from dints.network.architecture import Architecture, depth_sizes, nodes_of, paths
from dints.network.cells import cell_of
from dints.network.fast.acceleration import accelerate
from dints.network.fast.recomputation import kept_or_recomputed
from dints.network.operations import PUBLISHED, check_names

# an alpha at which a path's probability is 1 to the last bit, and its complement 0
CERTAIN = 1000.0


class SearchSpace(TopologySearch):
    """MONAI's search space; state dicts move both ways.

    Differences: probabilities are right for any alpha (MONAI's are NaN from -20 down); the
        regularisers are matrix
    products (MONAI: 31,000 operations at 12 blocks and 4 depths); `decode` is a shortest path over
    patterns (MONAI: over a dense matrix of all children, 2 GB); nothing is printed, and the space
    works on any device it is moved to.

    Args:
        channel_mul: times 32, 64, ... channels from the full resolution down.
        operations: names in `OPERATIONS`, one of which each path will hold.
        use_downsample: as in `Architecture`.
        keep_finest: only children with the path along depth 0 active; all probabilities are
            conditional on that, and no gradient reaches its alphas. The parameters are the same.

    Attributes:
        checkpoint_activations: keep only what goes from block to block for the backward pass.
    """

    checkpoint_activations = False

    def __init__(
        self,
        channel_mul: float = 1.0,
        num_blocks: int = 6,
        num_depths: int = 3,
        operations: Sequence[str] = PUBLISHED,
        use_downsample: bool = True,
        keep_finest: bool = False,
    ):
        self.operations, self.keep_finest = check_names(operations), keep_finest
        with contextlib.redirect_stdout(io.StringIO()):  # MONAI prints its advice about patch sizes
            super().__init__(
                channel_mul,
                cell_of(self.operations),
                num_blocks=num_blocks,
                num_depths=num_depths,
                use_downsample=use_downsample,
            )
        self.paths = paths(self.num_depths)
        leaves, reaches = (np.array(ends) for ends in zip(*self.paths, strict=True))
        starts, ends = (
            decoding.patterns(self.child_list, depths, self.num_depths)
            for depths in (leaves, reaches)
        )
        # patterns without node 0 come first
        self.starts, self.ends = starts - starts.min(), ends - starts.min()
        num_patterns = self.starts.max() + 1
        for name, constant in (
            # on, off
            (
                "child_switches",
                torch.from_numpy(np.hstack([self.child_list, 1 - self.child_list])).float(),
            ),
            ("child_starts", F.one_hot(torch.from_numpy(self.starts), num_patterns).float()),
            ("child_ends", F.one_hot(torch.from_numpy(self.ends), num_patterns).float()),
            ("operation_costs", torch.from_numpy(self.ram_cost).float()),
            # (depths, paths)
            ("targets", F.one_hot(torch.from_numpy(reaches), self.num_depths).T.float()),
        ):
            self.register_buffer(name, constant, persistent=False)
        # A depth's feature map relative to others', and with these every path active with its
        # dearest operation.
        self.depth_sizes = depth_sizes(self.filter_nums[: self.num_depths])
        self.dearest_memory = (
            (1 + self.ram_cost.max(-1)) * np.array(self.depth_sizes)[reaches]
        ).sum()

    def gen_mtx(self, depth: int) -> tuple[dict, list[tuple], list[tuple]]:
        """Return node patterns and children in MONAI's order; its transfer matrices stay empty."""
        return {}, *(decoding.subsets(count, self.keep_finest) for count in (depth, 3 * depth - 2))

    def get_prob_a(self, child: bool = False) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the path probabilities, given that each block has an active path: with
        ``keep_finest``, its first one.

        Returns:
            the children's probabilities (blocks, children) if ``child``, else None, and the paths'
            (blocks, paths).
        """
        alphas = (
            F.pad(self.log_alpha_a[:, 1:], (1, 0), value=CERTAIN)
            if self.keep_finest
            else self.log_alpha_a
        )
        log_on, log_off = F.logsigmoid(alphas), F.logsigmoid(-alphas)
        # Some path is active: either the first is, or it is not and the second is, ... This sum
        # keeps the digits that 1 - prod(1 - p) loses when all p are small.
        all_before_off = F.pad(log_off.cumsum(-1)[:, :-1], (1, 0))
        log_norm = torch.logsumexp(log_on + all_before_off, -1, keepdim=True)
        path_probs = torch.exp(log_on - log_norm)
        if not child:
            return None, path_probs
        log_child = torch.cat([log_on, log_off], -1) @ self.child_switches.T
        return torch.exp(log_child - log_norm), path_probs

    def get_topology_entropy(self, probs: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy between the patterns in which a block ends and in which the next
        one starts.

        Args:
            probs: the children's probabilities (blocks, children).
        """
        ends, starts = probs[:-1] @ self.child_ends, probs[1:] @ self.child_starts
        return -(ends * torch.log(starts + 1e-5) + (1 - ends) * torch.log(1 - starts + 1e-5)).sum()

    def ram_ratio(
        self,
        in_size: tuple[int, ...],
        budget: str = "published",
        path_probs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the expected memory as a share of a budget, with its gradient.

        Args:
            in_size: shape of the network's input, (batch, channels, *spatial).
            budget: ``published``: every path active with the present operations, which therefore
                cancel (all networks with all paths read the same); ``fixed``: every path active
                with its dearest operation, a constant, so that operations count.
            path_probs: those of `get_prob_a`, where they are at hand.
        """
        path_probs = self.get_prob_a()[1] if path_probs is None else path_probs
        sizes = self._sizes(in_size) if budget == "published" else self._of_depths(self.depth_sizes)
        memory = self._expected_costs() * sizes
        return (path_probs * memory).sum() / (
            memory.sum() if budget == "published" else self.dearest_memory
        )

    def _sizes(self, in_size: tuple[int, ...]) -> torch.Tensor:
        """Return (paths,): numbers in the feature map that each path leads to."""
        spatial = np.array(in_size[-self._spatial_dims :])
        voxels = [(spatial // 2**depth).prod() for depth in range(self.num_depths)]
        # MONAI halves the size once for the stem's downsampling, not once per axis; so do we, to
        # get its values.
        sizes = (
            in_size[0]
            * np.array(voxels)
            * self.filter_nums[: self.num_depths]
            / 2 ** int(self.use_downsample)
        )
        return self._of_depths(sizes.tolist())

    def _expected_costs(self) -> torch.Tensor:
        """Return (blocks, paths): feature maps that a path and its operations are to keep."""
        return 1 + (self.operation_costs * F.softmax(self.log_alpha_c, -1)).sum(-1)

    def _of_depths(self, values: Sequence[float]) -> torch.Tensor:
        """Return (paths,): the value of each path's target, on the device without a wait."""
        return sum(value * at_depth for value, at_depth in zip(values, self.targets, strict=True))

    def _memory_of_paths(self, arch_code_c: np.ndarray) -> np.ndarray:
        """Return (blocks, paths): memory of each path with its operation, as ``dearest_memory``."""
        costs = np.take_along_axis(self.ram_cost, arch_code_c[..., None], -1)[..., 0]
        return (1 + costs) * np.array(self.depth_sizes)[[target for _, target in self.paths]]

    def ram_ratio_of(self, arch_code_a: np.ndarray, arch_code_c: np.ndarray) -> float:
        """Return an architecture's memory as a share of every path with its dearest operation."""
        return float((self._memory_of_paths(arch_code_c) * arch_code_a).sum() / self.dearest_memory)

    def feasible_ram_ratio(self) -> float:
        """Return the smallest ``max_ram_ratio`` that `decode` can keep for any operations."""
        dearest = self._memory_of_paths(self.ram_cost.argmax(-1)) @ self.child_list.T
        return decoding.least_memory(dearest, self.starts, self.ends) / self.dearest_memory

    @torch.no_grad()
    def decode(
        self, max_ram_ratio: float | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Find the most probable sequence of children in which each starts from the nodes where the
        one before ends.

        Args:
            max_ram_ratio: of the sequences whose `ram_ratio_of` is at most this, the most probable
                one. Operations stay the most probable ones.

        Returns:
            node_a, arch_code_a, arch_code_c, arch_code_a_max as in `dints.network.architecture`.

        Raises:
            UserError: no connected architecture is within ``max_ram_ratio``.
        """
        probs = self.get_prob_a(child=True)[0].cpu().numpy()
        arch_code_c = self.log_alpha_c.argmax(-1).cpu().numpy()
        lengths = (-np.log(probs + 1e-5) + 0.001).astype(np.float64)  # MONAI's edge lengths
        if max_ram_ratio is None:
            children = decoding.shortest_sequence(lengths, self.starts, self.ends)
        else:
            children = self._shortest_within(max_ram_ratio, lengths, arch_code_c)
        arch_code_a = self.child_list[children]
        return nodes_of(arch_code_a), arch_code_a, arch_code_c, self.child_list[probs.argmax(-1)]

    def _shortest_within(
        self, max_ram_ratio: float, lengths: np.ndarray, arch_code_c: np.ndarray
    ) -> np.ndarray:
        memory = self._memory_of_paths(arch_code_c) @ self.child_list.T
        least = decoding.least_memory(memory, self.starts, self.ends)
        # a ratio that `ram_ratio_of` gave must be enough
        budget = max_ram_ratio * self.dearest_memory * (1 + 1e-9)
        if least > budget:
            raise UserError(
                f"max_ram_ratio {max_ram_ratio:g} is below that of the smallest connected "
                "architecture: give at least "
                f"{math.ceil(least / self.dearest_memory * 1e4) / 1e4:g}"
            )
        return decoding.shortest_sequence_within(budget, lengths, memory, self.starts, self.ends)

    def architecture(self, max_ram_ratio: float | None = None, **info) -> Architecture:
        """Return the decoded architecture with ``info`` and its ``ram_ratio``."""
        codes = _, arch_code_a, arch_code_c, _ = self.decode(max_ram_ratio)
        info["ram_ratio"] = self.ram_ratio_of(arch_code_a, arch_code_c)
        if self.keep_finest:
            info["keep_finest"] = True
        return Architecture(*codes, self.operations, self.use_downsample, info)

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        """Mix all paths and operations by their probabilities.

        Args:
            x: one feature map per depth, as the stems of `monai.networks.nets.DiNTS` make them.
        """
        path_probs, operation_probs = self.get_prob_a()[1], F.softmax(self.log_alpha_c, -1)
        for block in range(self.num_blocks):
            probs = path_probs[block], operation_probs[block]
            x = kept_or_recomputed(self.checkpoint_activations, self._mixed, block, x, *probs)
        return x

    def _mixed(
        self,
        block: int,
        x: list[torch.Tensor],
        path_probs: torch.Tensor,
        operation_probs: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Return a block's feature maps: each is the sum of the paths that lead to its depth."""
        outputs = [0.0] * self.num_depths
        for path, (source, target) in enumerate(self.paths):
            mixture = self.cell_tree[str((block, path))](x[source], operation_probs[path])
            outputs[target] = outputs[target] + path_probs[path] * mixture
        return outputs


def supernet_of(space: SearchSpace, in_channels: int, num_classes: int) -> DiNTS:
    """Build MONAI's `DiNTS` around the space: stems before and after it."""
    # MONAI's own is a tensor, which does not compile
    every_node = [[1] * space.num_depths] * (space.num_blocks + 1)
    network = DiNTS(
        space, in_channels, num_classes, use_downsample=space.use_downsample, node_a=every_node
    )
    return accelerate(network)


def check_ram_ratio(space: SearchSpace, max_ram_ratio: float | None) -> None:
    """Raise `UserError` where no architecture might keep the budget, before the search begins."""
    least = space.feasible_ram_ratio()
    if max_ram_ratio is not None and max_ram_ratio < least:
        keeps = " with --keep_finest" * space.keep_finest
        raise UserError(
            f"--max_ram_ratio {max_ram_ratio:g} is too small for {space.num_blocks} blocks and "
            f"{space.num_depths} depths{keeps}: give at least {math.ceil(least * 1e4) / 1e4:g}"
        )
