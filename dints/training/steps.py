"""A network's weights in training: optimizer, scaler, schedule, moving average, and the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dints.running.precision import Precision
from dints.running.run import Run
from dints.settings import TrainingMachineSettings, WeightsSettings
from dints.training import cuda_graphs
from dints.training.losses import LOSSES


class WeightsTrainer:
    """Trains the weights of a network by SGD, over all processes.

    Args:
        network: on its device; its state is what is saved and validated.
        weights: those of its parameters that are trained; no gradient is computed for the others.
        run: that has begun.
        input_shape: (batch, channels, *patch_size) of a step.

    Attributes:
        averaged: the network with a moving average of the weights, if there is one, else itself.
        criterion: the loss, of class scores and labels.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: Iterable[nn.Parameter],
        settings: WeightsSettings,
        run: Run,
        input_shape: Sequence[int],
    ):
        self.settings, self.precision, self.run = settings, run.precision, run
        self.weights = list(weights)
        trained = {id(weight) for weight in self.weights}
        self.others = [p for p in network.parameters() if id(p) not in trained]
        self.base_rate = settings.learning_rate * settings.factor(run.processes.world_size)
        with frozen(self.others):  # DDP averages the gradients of what is trainable now
            self.network = run.processes.distributed(
                computing(network, input_shape, run.precision, run.machine)
            )
        self.optimizer = sgd(self.weights, settings.learning_rate)
        self.scaler = run.precision.scaler()
        self.criterion = LOSSES[settings.loss]
        decay = settings.average_decay
        self.average = MovingAverage(network, decay) if decay else None
        self.averaged = self.average.module if self.average else network

    @property
    def parts(self) -> dict[str, object]:
        """All that has state beside the network, for a checkpoint."""
        parts = {"optimizer": self.optimizer, "scaler": self.scaler}
        return parts | ({"average": self.average} if self.average else {})

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def schedule(self, progress: float) -> None:
        """Set the learning rate when a share ``progress`` (0 to 1) of the training is done."""
        rate = scheduled(self.base_rate, progress, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Take one step on a batch; return the loss, which stays on the device."""
        image, label = to_device(batch, self.precision.device)
        self.optimizer.zero_grad()
        with frozen(self.others):
            with self.precision.autocast():
                scores = self.network(image)
            loss = self.criterion(scores.float(), label)
            self.scaler.scale(loss).backward()
        if self.settings.max_gradient_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.weights, self.settings.max_gradient_norm)
        step_if_finite(self.optimizer, self.scaler, self.weights[-1].grad)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return loss.detach()


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let no gradient be computed for ``parameters``."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def to_device(
    batch: dict[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image (float32) and label (uint8) of a batch, as plain tensors on ``device``."""
    return tuple(batch[key].to(device, non_blocking=True) for key in ("image", "label"))


def sgd(weights: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Make the published optimizer of the weights, which updates all of them in one operation."""
    settings = {"momentum": 0.9, "weight_decay": 4e-5, "fused": True}
    optimizer = torch.optim.SGD(weights, learning_rate, **settings)
    # PyTorch leaves the momentum as memory that nobody wrote if its first step is skipped.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adam(arch: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Make the published optimizer of the architecture's parameters."""
    return torch.optim.Adam(arch, learning_rate, betas=(0.5, 0.999), fused=True)


def step_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, gradient: torch.Tensor
) -> None:
    """Step a fused optimizer, unless ``gradient``, which a bad loss reaches first, is not finite.

    In fp16 the scaler looks at all gradients instead. Gradients are averaged over the ranks, so
    that all skip the step.
    """
    if optimizer.defaults["fused"] and not scaler.is_enabled():
        # `torch.amp.GradScaler` sets it for the fused optimizers, and they read it: the one way to
        # decide on the device, so that no host waits. Left set, it holds until the next step.
        optimizer.found_inf = (~gradient.isfinite().all()).float()
    scaler.step(optimizer)


def computing(
    network: nn.Module,
    input_shape: Sequence[int],
    precision: Precision,
    machine: TrainingMachineSettings,
) -> nn.Module:
    """Return a module that computes as ``network`` does in training, compiled or recorded if asked.

    Args:
        input_shape: (batch, channels, *patch_size).
    """
    if machine.cuda_graphs:
        return cuda_graphs.recorded(network, input_shape, precision)
    return compiled(network, machine.compile, precision.device)


def compiled(network: nn.Module, choice: str, device: torch.device) -> nn.Module:
    """Put ``network`` through `torch.compile` if ``choice`` is ``on``, as one graph.

    On CUDA it is replayed as a CUDA graph. Attributes and state dicts of ``network`` itself stay as
    they are; keep it for saving and validating.
    """
    if choice != "on":
        return network
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(network, fullgraph=True, dynamic=False, mode=mode)


class MovingAverage(AveragedModel):
    """A copy of a network for an exponential moving average of its weights.

    PyTorch's own update asks the GPU at each step how many there were, and waits for the answer.

    Args:
        decay: a step's weights count so many times as much after each further step; at first less,
            for otherwise the start would linger in short trainings.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network)  # which counts the steps on the CPU
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take a step's weights in; the first ones are taken as they are."""
        steps = int(self.n_averaged)
        share = 1 - min(self.decay, (1 + steps) / (10 + steps)) if steps else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), share)
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.n_averaged += 1


def scheduled(base: float, progress: float, settings: WeightsSettings) -> float:
    """Return the learning rate when a share ``progress`` (0 to 1) of the training is done.

    ``halvings`` halve ``base`` at each milestone, as published; ``polynomial`` falls to 0 as
    nnU-Net's.
    """
    if settings.learning_rate_schedule == "halvings":
        return base * 0.5 ** sum(progress > share for share in settings.learning_rate_milestones)
    return base * (1 - progress) ** 0.9
