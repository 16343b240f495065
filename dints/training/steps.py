"""One step of a network's weights, and what it takes: optimizer, scaler, schedule, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dints.running.precision import Precision
from dints.running.processes import Processes
from dints.training import cuda_graphs as graphs
from dints.training.losses import segmentation_loss


@dataclass
class WeightsTraining:
    """A network and what trains its weights.

    Attributes:
        network: as it computes, compiled and distributed; its state is that of the network that it was made of.
        max_gradient_norm: where all gradients together have a larger norm than this, they are scaled down to it.
        average: the network with a moving average of the weights, which every step brings up to date.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    precision: Precision
    max_gradient_norm: float | None = None
    average: MovingAverage | None = None

    @property
    def parts(self) -> dict[str, object]:
        """All that has state beside the network, for a checkpoint."""
        parts = {"optimizer": self.optimizer, "scaler": self.scaler}
        return parts if self.average is None else {**parts, "average": self.average}

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate


def weights_training(
    network: nn.Module,
    weights: Iterable[nn.Parameter],
    precision: Precision,
    processes: Processes,
    *,
    learning_rate: float,
    max_gradient_norm: float | None = None,
    average: MovingAverage | None = None,
) -> WeightsTraining:
    """Make the published training of ``weights``, parameters of ``network``, distributed over the processes."""
    return WeightsTraining(
        processes.distributed(network),
        sgd(weights, learning_rate),
        precision.scaler(),
        segmentation_loss,
        precision,
        max_gradient_norm,
        average,
    )


def weights_step(training: WeightsTraining, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Take one step of the weights on a batch; return the loss, which stays on the device."""
    image, label = to_device(batch, training.precision.device)
    optimizer, scaler = training.optimizer, training.scaler
    optimizer.zero_grad()
    with training.precision.autocast():
        scores = training.network(image)
    loss = training.criterion(scores.float(), label)
    scaler.scale(loss).backward()
    if training.max_gradient_norm is not None:
        scaler.unscale_(optimizer)
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        nn.utils.clip_grad_norm_(parameters, training.max_gradient_norm)
    step_if_finite(optimizer, scaler, optimizer.param_groups[0]["params"][-1].grad)
    scaler.update()
    if training.average is not None:
        training.average.update_parameters(training.network)
    return loss.detach()


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image (float32) and label (uint8) of a batch, as plain tensors on ``device``."""
    return tuple(batch[key].to(device, non_blocking=True) for key in ("image", "label"))


def sgd(weights: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Make the published optimizer of the weights, which updates all of them in one operation."""
    optimizer = torch.optim.SGD(weights, learning_rate, momentum=0.9, weight_decay=4e-5, fused=True)
    _start_momentum(optimizer)
    return optimizer


def adam(arch: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Make the published optimizer of the architecture's parameters."""
    return torch.optim.Adam(arch, learning_rate, betas=(0.5, 0.999), fused=True)


def step_if_finite(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, gradient: torch.Tensor) -> None:
    """Step an optimizer, unless it is a fused one and ``gradient``, which a bad loss reaches first, is not finite.

    In fp16 the scaler looks at all gradients instead. Gradients are averaged over the ranks, so that all skip the step.
    """
    if optimizer.defaults["fused"] and not scaler.is_enabled():
        _tell_nonfinite(optimizer, (~gradient.isfinite().all()).float())
    scaler.step(optimizer)


def _tell_nonfinite(optimizer: torch.optim.Optimizer, flag: torch.Tensor) -> None:
    """Have a fused optimizer skip its step where ``flag`` is 1, so that no host waits for the answer.

    ``found_inf`` is what `torch.amp.GradScaler` sets for the fused optimizers, and they read: the one way to decide on
    the device. Left set, it holds for the next step, which sets it again.
    """
    optimizer.found_inf = flag


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Let SGD's momentum start as zeros: PyTorch leaves it as memory that nobody wrote if its first step is skipped."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def computing(
    network: nn.Module, image_shape: Sequence[int], precision: Precision, *, compile: str, cuda_graphs: bool
) -> nn.Module:
    """Return what computes as ``network`` does in training, in the manner that was asked for.

    Args:
        image_shape: (batch, channels, *patch_size).
        compile: as for `compiled`.
        cuda_graphs: replay it, for the parameters that are trainable now; see `dints.training.cuda_graphs.recorded`.
    """
    if cuda_graphs:
        return graphs.recorded(network, image_shape, precision)
    return compiled(network, compile, precision.device)


def compiled(network: nn.Module, choice: str, device: torch.device) -> nn.Module:
    """Put ``network`` through `torch.compile` if ``choice`` is ``on``: one graph, on CUDA replayed as a CUDA graph.

    Attributes and state dicts of ``network`` itself stay as they are; keep it for saving and validating.
    """
    if choice != "on":
        return network
    return torch.compile(
        network, fullgraph=True, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None
    )


class MovingAverage(AveragedModel):
    """A copy of a network for an exponential moving average of its weights.

    PyTorch's own update asks the GPU at each step how many there were, and waits for the answer.

    Args:
        decay: a step's weights count so many times as much after each further step; at first less, for otherwise the
            start would linger in short trainings.
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


def averaged(network: nn.Module, decay: float) -> MovingAverage | None:
    """Make the moving average of a network's weights; None where ``decay`` is 0."""
    return MovingAverage(network, decay) if decay else None


def scheduled(schedule: str, base: float, progress: float, milestones: Sequence[float]) -> float:
    """Return the learning rate when a share ``progress`` (0 to 1) of the training is done.

    Args:
        schedule: ``halvings`` at the milestones, as published, or ``polynomial``, to 0 as nnU-Net's.
    """
    return halved(base, progress, milestones) if schedule == "halvings" else base * (1 - progress) ** 0.9


def halved(base: float, progress: float, milestones: Sequence[float]) -> float:
    """Halve ``base`` at every milestone that ``progress`` (0 to 1) has passed."""
    return base * 0.5 ** sum(progress > milestone for milestone in milestones)


def is_validation_epoch(epoch: int, num_epochs: int, num_epochs_per_validation: int) -> bool:
    """Tell whether epoch number ``epoch`` (from 0) ends with a validation; the last one always does."""
    return (epoch + 1) % num_epochs_per_validation == 0 or epoch + 1 == num_epochs
