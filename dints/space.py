"""The search space: MONAI's `TopologySearch`, with the same parameters and results, computed stably in few operations.

A block has ``P = 3 * depths - 2`` paths between the nodes of two neighbouring rows. A *child* is one way to switch them
on or off (all off excluded, so ``2**P - 1`` of them); a *pattern* is a set of active nodes (``2**depths - 1`` of them).
"""

from __future__ import annotations

import contextlib
import io
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets.dints import TopologySearch

from dints.architecture import Architecture, paths


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
        leaves, reaches = (np.array(ends) for ends in zip(*self.paths, strict=True))
        self.starts = _patterns(self.child_list, leaves, self.num_depths)
        self.ends = _patterns(self.child_list, reaches, self.num_depths)
        num_patterns = 2**self.num_depths - 1
        for name, constant in (
            ("child_paths", torch.from_numpy(self.child_list).float()),
            ("child_starts", F.one_hot(torch.from_numpy(self.starts), num_patterns).float()),
            ("child_ends", F.one_hot(torch.from_numpy(self.ends), num_patterns).float()),
            ("operation_costs", torch.from_numpy(self.ram_cost).float()),
            ("target_depths", torch.from_numpy(reaches)),
        ):
            self.register_buffer(name, constant, persistent=False)

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
        log_child = log_on @ self.child_paths.T + log_off @ (1 - self.child_paths).T
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
        spatial = np.array(in_size[-self._spatial_dims :])
        voxels = [(spatial // 2**depth).prod() for depth in range(self.num_depths)]
        # MONAI halves the size once for the stem's downsampling, not once per axis; so do we, to get its values.
        sizes = in_size[0] * np.array(voxels) * self.filter_nums[: self.num_depths] / 2 ** int(self.use_downsample)
        path_sizes = self.log_alpha_a.new_tensor(sizes)[self.target_depths]
        costs = 1 + (self.operation_costs * F.softmax(self.log_alpha_c, -1)).sum(-1)
        active = torch.ones_like(self.log_alpha_a) if full else self.get_prob_a()[1]
        return (active * costs * path_sizes).sum() * 32 / 8 / 1024**2

    @torch.no_grad()
    def decode(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The most probable sequence of children in which each starts from the nodes where the one before ends.

        Returns:
            node_a, arch_code_a, arch_code_c, arch_code_a_max as in `dints.architecture`.
        """
        probs = self.get_prob_a(child=True)[0].cpu().numpy()
        # MONAI's edge lengths. A pattern's shortest way so far is all that the next block needs to know.
        lengths = (-np.log(probs + 1e-5) + 0.001).astype(np.float64)
        shortest = np.zeros(2**self.num_depths - 1)
        last_children = []  # per block: on the shortest way to each pattern, the child that arrives there
        for block in lengths:
            total = shortest[self.starts] + block
            order = total.argsort(kind="stable")
            _, shortest_to_pattern = np.unique(self.ends[order], return_index=True)  # some child ends in each pattern
            last_children.append(order[shortest_to_pattern])
            shortest = total[last_children[-1]]
        children, pattern = [], shortest.argmin()
        for last_child in reversed(last_children):
            children.append(last_child[pattern])
            pattern = self.starts[children[-1]]
        arch_code_a = self.child_list[children[::-1]]
        node_a = np.zeros((self.num_blocks + 1, self.num_depths), dtype=np.int64)
        for block, path in np.argwhere(arch_code_a):
            source, target = self.paths[path]
            node_a[block, source] = node_a[block + 1, target] = 1
        arch_code_c = self.log_alpha_c.argmax(-1).cpu().numpy()
        return node_a, arch_code_a, arch_code_c, self.child_list[probs.argmax(-1)]

    def architecture(self, **info) -> Architecture:
        """The decoded architecture with what is to be known about it later."""
        return Architecture(*self.decode(), info=info)

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        """Mix all paths and operations by their probabilities.

        Args:
            x: one feature map per depth, as the stems of `monai.networks.nets.DiNTS` make them.
        """
        # A path's probability scales the sum of its operations, so it may scale each of their weights instead.
        weights = self.get_prob_a()[1].unsqueeze(-1) * F.softmax(self.log_alpha_c, -1)
        for block in range(self.num_blocks):
            outputs = [0.0] * self.num_depths
            for path, (source, target) in enumerate(self.paths):
                outputs[target] = outputs[target] + self.cell_tree[str((block, path))](x[source], weights[block, path])
            x = outputs
        return x


def _patterns(children: np.ndarray, path_depths: np.ndarray, num_depths: int) -> np.ndarray:
    """For each child, the index of the set of nodes at that end of its active paths, in the order of node_act_list."""
    touched = np.stack([children[:, path_depths == depth].any(-1) for depth in range(num_depths)], -1)
    return touched @ (2 ** np.arange(num_depths)[::-1]) - 1
