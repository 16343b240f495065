"""The published recipe in MONAI's own calls: oracle of tests, baseline of benchmarks."""

from __future__ import annotations

import contextlib
import io

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.networks.nets.dints import Cell, DiNTS, TopologyInstance, TopologySearch
from torch import nn

from dints.network.architecture import Architecture
from dints.running.precision import Precision


def quiet(build, *args, **kwargs):
    """Build a MONAI space without the advice that it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return build(*args, **kwargs)


def network(
    architecture: Architecture,
    in_channels: int,
    num_classes: int,
    channel_mul: float,
    cell: type[Cell] = Cell,
) -> DiNTS:
    """Build the discrete network as MONAI does, of other operations with another cell."""
    space = quiet(
        TopologyInstance,
        arch_code=[architecture.arch_code_a, architecture.arch_code_c],
        cell=cell,
        channel_mul=channel_mul,
        num_blocks=architecture.num_blocks,
        num_depths=architecture.num_depths,
        use_downsample=architecture.use_downsample,
    )
    node_a = torch.from_numpy(architecture.node_a)
    return DiNTS(
        space, in_channels, num_classes, use_downsample=architecture.use_downsample, node_a=node_a
    )


def criterion() -> nn.Module:
    """Make the published loss, but that it scores the foreground for any number of classes."""
    return DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        squared_pred=True,
        batch=True,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )


def sgd(parameters, learning_rate: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, learning_rate, momentum=0.9, weight_decay=4e-5)


class Search:
    """Takes alternating steps on MONAI's `TopologySearch` with the loss terms in MONAI's calls.

    As published but for two defects that docs/published.md lists: the alphas are not in SGD's
    parameters, and the loss is ours (foreground Dice + cross-entropy, one formula in every
    precision).

    Args:
        num_processes: of the run that it takes one process's steps of; optimizers are built with
            the rates times it.
    """

    def __init__(
        self,
        num_blocks: int,
        num_depths: int,
        channel_mul: float,
        in_channels: int,
        num_classes: int,
        precision: Precision,
        learning_rate: float = 0.025,
        learning_rate_arch: float = 1e-3,
        factor_ram_cost: float = 0.8,
        num_processes: int = 1,
    ):
        self.precision, self.factor_ram_cost = precision, factor_ram_cost
        self.space = quiet(
            TopologySearch,
            channel_mul=channel_mul,
            num_blocks=num_blocks,
            num_depths=num_depths,
            device=str(precision.device),
        )
        self.network = DiNTS(self.space, in_channels, num_classes).to(precision.device)
        self.arch = [self.space.log_alpha_a, self.space.log_alpha_c]
        self.weights = [
            p for p in self.network.parameters() if all(p is not alpha for alpha in self.arch)
        ]
        self.optimizer = sgd(self.weights, learning_rate * num_processes)
        of_arch = {"lr": learning_rate_arch * num_processes, "betas": (0.5, 0.999)}
        self.arch_optimizers = [torch.optim.Adam([alpha], **of_arch) for alpha in self.arch]
        self.optimizers = [self.optimizer, *self.arch_optimizers]
        self.scaler, self.arch_scaler = precision.scaler(), precision.scaler()
        self.criterion = criterion()

    def weights_step(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self._train(weights=True, arch=False)
        self.optimizer.zero_grad()
        loss = segmentation(self.network, image, label, self.criterion, self.precision)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def architecture_step(
        self, image: torch.Tensor, label: torch.Tensor, ramp: float
    ) -> torch.Tensor:
        self._train(weights=False, arch=True)
        for optimizer in self.arch_optimizers:
            optimizer.zero_grad()
        loss = segmentation(self.network, image, label, self.criterion, self.precision)
        total = loss + ramp * self.architecture_loss(image.shape)
        self.arch_scaler.scale(total).backward()
        for optimizer in self.arch_optimizers:
            self.arch_scaler.step(optimizer)
        self.arch_scaler.update()
        self._train(weights=True, arch=True)
        return loss.detach()

    def architecture_loss(self, input_shape: tuple[int, ...]) -> torch.Tensor:
        children, _ = self.space.get_prob_a(child=True)
        entropy_a = -(children * torch.log(children + 1e-5)).mean()
        operations = F.softmax(self.space.log_alpha_c, -1)
        entropy_c = -(operations * F.log_softmax(self.space.log_alpha_c, -1)).mean()
        topology = self.space.get_topology_entropy(children)
        usage = self.space.get_ram_cost_usage(input_shape) / self.space.get_ram_cost_usage(
            input_shape, full=True
        )
        return entropy_a + entropy_c + torch.abs(self.factor_ram_cost - usage) + 0.001 * topology

    def _train(self, weights: bool, arch: bool) -> None:
        for parameter in self.weights:
            parameter.requires_grad = weights
        for alpha in self.arch:
            alpha.requires_grad = arch


def segmentation(
    model: nn.Module,
    image: torch.Tensor,
    label: torch.Tensor,
    criterion: nn.Module,
    precision: Precision,
) -> torch.Tensor:
    with precision.autocast():
        scores = model(image)
    return criterion(scores.float(), label)
