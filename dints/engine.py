"""What both stages do with a network: loss, learning rate, optimizer step, sliding-window validation."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from torch import nn
from tqdm import tqdm

from dints.errors import UserError
from dints.runtime import Precision, Processes
from dints.tasks import Task

LOSS_VALUES = ("sum of the finite losses", "their number", "steps in a row, until now, that are not finite")
CHECK_EVERY = 20  # steps, after which those in a row are looked at; on a GPU a look waits for it
MAX_IN_A_ROW = 5
SLAB = 16  # planes of a volume whose predictions are counted at once


def segmentation_loss() -> nn.Module:
    """Soft Dice over the foreground classes of the whole batch, plus cross-entropy over all classes, both of softmax.

    Takes class scores (batch, classes, *spatial) and labels (batch, 1, *spatial).
    """
    return DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        squared_pred=True,
        batch=True,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )


def compiled(network: nn.Module, choice: str, device: torch.device) -> nn.Module:
    """``network`` through `torch.compile` if ``choice`` is ``on``: one graph, on CUDA replayed as a CUDA graph.

    Attributes and state dicts of ``network`` itself stay as they are; keep it for saving and validating.
    """
    if choice != "on":
        return network
    return torch.compile(
        network, fullgraph=True, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None
    )


def stepped(base: float, progress: float, milestones: Sequence[float]) -> float:
    """Halve ``base`` at every milestone that ``progress`` (0 to 1) has passed."""
    return base * 0.5 ** sum(progress > milestone for milestone in milestones)


def learning_rate(args: argparse.Namespace, progress: float, processes: Processes) -> float:
    """Of the weights, at ``progress`` (0 to 1) of the milestones' span."""
    scale = processes.world_size if args.learning_rate_scaling == "processes" else 1
    return scale * stepped(args.learning_rate, progress, args.learning_rate_milestones)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def sgd(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """The published optimizer of the weights, which updates all of them in one operation."""
    optimizer = torch.optim.SGD(parameters, learning_rate, momentum=0.9, weight_decay=4e-5, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Else a first step that is skipped leaves the momentum as memory that nobody has written.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def step_if_finite(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, gradient: torch.Tensor) -> None:
    """Step an optimizer, unless it is a fused one and ``gradient``, which a bad loss reaches first, is not finite.

    In fp16 the scaler looks at all gradients instead. Gradients are averaged over the ranks, so that all skip the step.
    """
    if optimizer.defaults["fused"] and not scaler.is_enabled():
        # As a scaler tells a fused optimizer, so that no host waits for the answer.
        optimizer.found_inf = (~gradient.isfinite().all()).float()
    scaler.step(optimizer)


def weights_step(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    max_gradient_norm: float | None = None,
) -> torch.Tensor:
    """One step of the network's weights on a batch; returns the loss, which stays on the device.

    Args:
        max_gradient_norm: where all gradients together have a larger norm than this, they are scaled down to it.
    """
    image, label = to_device(batch, precision.device)
    optimizer.zero_grad()
    with precision.autocast():
        scores = model(image)
    loss = criterion(scores.float(), label)
    scaler.scale(loss).backward()
    if max_gradient_norm is not None:
        scaler.unscale_(optimizer)
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        nn.utils.clip_grad_norm_(parameters, max_gradient_norm)
    step_if_finite(optimizer, scaler, optimizer.param_groups[0]["params"][-1].grad)
    scaler.update()
    return loss.detach()


class EpochLoss:
    """The losses of an epoch's steps. They stay on the device, so that no step waits for another.

    A step whose loss is not finite changes no weight (see `step_if_finite`), and does not count. Many in a row are a
    training that diverged.

    Args:
        name: for messages.
    """

    def __init__(self, name: str, processes: Processes):
        self.name, self.processes = name, processes
        self.values = torch.zeros(len(LOSS_VALUES), device=processes.device)
        self.steps = 0
        self.recent: deque[tuple[int, Sequence[str]]] = deque(maxlen=2 * CHECK_EVERY)

    def start(self) -> None:
        """Forget the last epoch, but for the steps in a row that were not finite at its end."""
        self.values[:2] = 0

    def add(self, loss: torch.Tensor, iteration: int, cases: Sequence[str]) -> None:
        """Count a step.

        Args:
            iteration: its number in the run, from 1.
            cases: what it was computed from.

        Raises:
            UserError: too many in a row were not finite; on every rank.
        """
        finite = loss.isfinite()
        total, count, in_a_row = self.values.unbind()
        total += torch.where(finite, loss, 0.0)
        count += finite
        in_a_row.copy_(torch.where(finite, 0.0, in_a_row + 1))
        self.recent.append((iteration, cases))
        self.steps += 1
        if self.steps % CHECK_EVERY == 0:
            self._check()

    def mean(self) -> float:
        """Over the steps and all ranks.

        Raises:
            UserError: no step's loss was finite, or too many at the end were not.
        """
        self._check()
        total, count = self.processes.sum(self.values[:2].clone()).tolist()
        if count == 0:
            raise self._diverged()
        return total / count

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every rank's values; every rank must call it."""
        ranks = torch.zeros(self.processes.world_size, len(LOSS_VALUES), device=self.values.device)
        ranks[self.processes.rank] = self.values
        return {"ranks": self.processes.sum(ranks).cpu()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if len(state["ranks"]) == self.processes.world_size:  # else the epoch begins anew
            self.values.copy_(state["ranks"][self.processes.rank])

    def _check(self) -> None:
        longest = self.values[2:].clone()
        if self.processes.world_size > 1:
            longest = self.processes.agree(longest.cpu())
        if longest.item() >= MAX_IN_A_ROW:
            raise self._diverged()

    def _diverged(self) -> UserError:
        """The error, with the iteration at which it began and the cases of the ranks that it began on."""
        own = int(self.values[2].item())
        began = list(self.recent)[-min(own, len(self.recent))] if own else None
        found = [(steps, *place) for steps, place in self.processes.gather((own, began)) if place is not None]
        first = min(iteration for _, iteration, _ in found)
        names = [name for _, iteration, cases in found if iteration == first for name in cases]
        return UserError(
            f"the {self.name} is not finite at iteration {first} (cases {', '.join(names)}), and in "
            f"{max(steps for steps, *_ in found)} steps in a row: the training diverged; lower --learning_rate, set "
            "--max_gradient_norm, or try --precision fp32. latest.pth is from before"
        )


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (float32) and label (uint8) of a batch, as plain tensors on ``device``."""
    return tuple(batch[key].to(device, non_blocking=True) for key in ("image", "label"))


@dataclass(frozen=True)
class SlidingWindow:
    """Class scores of a whole image from overlapping patches, weighted by a Gaussian around each patch's centre.

    Images smaller than a patch are padded by reflection, as in training; where an image is too small for that (less
    than a third of the patch), by its border voxels.
    """

    patch_size: tuple[int, int, int]
    overlap: float
    batch_size: int

    def __call__(self, image: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """(1, classes, *spatial) of an image (1, channels, *spatial)."""
        reflectable = all(
            (patch - size + 1) // 2 < size for patch, size in zip(self.patch_size, image.shape[2:], strict=True)
        )
        return sliding_window_inference(
            image,
            self.patch_size,
            self.batch_size,
            network,
            overlap=self.overlap,
            mode="gaussian",
            padding_mode="reflect" if reflectable else "replicate",
        )


@dataclass(frozen=True)
class Scores:
    """Dice of a set of cases.

    Attributes:
        dice: (cases, foreground classes); NaN where the case does not have the class.
        false_positives: per class, how many cases do not have it but were given some of it.
    """

    dice: torch.Tensor
    false_positives: list[int]

    @property
    def per_class(self) -> list[float | None]:
        """Mean over the cases that have the class; None where no case has it."""
        means = self.dice.nanmean(0).tolist()
        return [None if mean != mean else mean for mean in means]

    @property
    def mean(self) -> float | None:
        """Mean over the classes that occur; None where none does."""
        present = [mean for mean in self.per_class if mean is not None]
        return sum(present) / len(present) if present else None

    def describe(self, class_names: Sequence[str]) -> str:
        """One line for people: the mean, each class, and what is unusual about it."""
        parts = []
        for name, mean, wrong in zip(class_names[1:], self.per_class, self.false_positives, strict=True):
            elsewhere = f" (false positive cases: {wrong})" if wrong else ""
            parts.append(f"{name} {'absent' if mean is None else f'{mean:.4f}'}{elsewhere}")
        total = "not defined" if self.mean is None else f"{self.mean:.4f}"
        return f"Dice {total} ({', '.join(parts)})"


def count_overlap(predicted: torch.Tensor, reference: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Voxels in common, predicted and in the reference, for each foreground class: (classes - 1, 3), float64.

    Counts of a volume's parts add up.
    """
    size = num_classes * num_classes
    pairs = reference.flatten().long() * num_classes + predicted.flatten().long()
    confusion = torch.bincount(pairs, minlength=size).reshape(num_classes, num_classes).double()
    return torch.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)], -1)[1:]


def scores_from_counts(counts: torch.Tensor) -> Scores:
    """Dice from `count_overlap` of many cases: (cases, classes - 1, 3)."""
    common, predicted, reference = counts.unbind(-1)
    dice = torch.where(reference > 0, 2 * common / (predicted + reference).clamp(min=1), torch.nan)
    false_positives = ((reference == 0) & (predicted > 0)).sum(0).tolist()
    return Scores(dice, false_positives)


def describe(steps: int, processes: Processes, precision: Precision) -> str:
    """How a stage runs, for people."""
    return f"{steps} iterations an epoch on {processes.world_size} x {processes.device.type} in {precision.name}"


def is_validation_epoch(epoch: int, args: argparse.Namespace) -> bool:
    """Whether epoch number ``epoch`` (from 0) ends with a validation; the last one always does."""
    return (epoch + 1) % args.num_epochs_per_validation == 0 or epoch + 1 == args.num_epochs


@torch.no_grad()
def validate(
    network: nn.Module,
    loader: Iterable[dict[str, torch.Tensor]],
    num_cases: int,
    task: Task,
    window: SlidingWindow,
    precision: Precision,
    processes: Processes,
) -> Scores | None:
    """Scores over all ranks' cases, the same on every rank; None if there are no cases.

    Args:
        network: not wrapped for distribution: ranks have different numbers of windows.
        loader: this rank's share of the cases, whole, one a batch, each with its ``number`` among the ``num_cases``.
    """
    if num_cases == 0:
        return None
    was_training = network.training
    network.eval()
    counts = torch.zeros(num_cases, task.num_classes - 1, 3, dtype=torch.float64, device=processes.device)
    silent = None if processes.is_main else True  # None: a bar only where there is a terminal
    for case in tqdm(loader, desc="validation", unit="case", leave=False, disable=silent):
        image, label = to_device(case, processes.device)
        with precision.autocast():
            scores = window(image, network)
        # In parts: a large volume's predictions would be 8 bytes a voxel, and its pairs of classes as much again.
        for part, reference in zip(scores.split(SLAB, 2), label.split(SLAB, 2), strict=True):
            counts[case["number"]] += count_overlap(part.argmax(1), reference, task.num_classes)
    network.train(was_training)
    return scores_from_counts(processes.sum(counts).cpu())
