"""Sliding-window segmentation of whole volumes, and their Dice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dints.data.cache import Cache
from dints.data.cases import Case
from dints.data.loaders import ValidationLoader, validation_loader
from dints.running.processes import Processes
from dints.running.run import Run
from dints.settings import WindowSettings
from dints.training.steps import to_device
from dints.training.windows import SlidingWindow, slab_axis

SLAB = 16  # planes of a volume whose predictions are counted at once
# Numbers, 2 GiB: a volume's class scores, when they are no longer all kept at once
MANY_SCORES = 2**29


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
        """Tell people in one line the mean, each class, and what is unusual about it."""
        parts = []
        for name, mean, wrong in zip(
            class_names[1:], self.per_class, self.false_positives, strict=True
        ):
            elsewhere = f" (false positive cases: {wrong})" if wrong else ""
            parts.append(f"{name} {'absent' if mean is None else f'{mean:.4f}'}{elsewhere}")
        total = "not defined" if self.mean is None else f"{self.mean:.4f}"
        return f"Dice {total} ({', '.join(parts)})"


def count_overlap(
    predicted: torch.Tensor, reference: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """Count voxels in common, predicted and in the reference for each foreground class: (classes -
    1, 3), float64.

    Counts of a volume's parts add up.
    """
    size = num_classes * num_classes
    pairs = reference.flatten().long() * num_classes + predicted.flatten().long()
    if pairs.is_cuda:  # `bincount` asks the GPU for the largest one, and waits
        confusion = pairs.new_zeros(size).scatter_add_(0, pairs, torch.ones_like(pairs))
    else:
        confusion = torch.bincount(pairs, minlength=size)
    confusion = confusion.reshape(num_classes, num_classes).double()
    return torch.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)], -1)[1:]


def scores_from_counts(counts: torch.Tensor) -> Scores:
    """Compute Dice from `count_overlap` of many cases: (cases, classes - 1, 3)."""
    common, predicted, reference = counts.unbind(-1)
    dice = torch.where(reference > 0, 2 * common / (predicted + reference).clamp(min=1), torch.nan)
    false_positives = ((reference == 0) & (predicted > 0)).sum(0).tolist()
    return Scores(dice, false_positives)


class Overlaps:
    """Gathers `count_overlap` of the cases of all ranks."""

    def __init__(self, num_cases: int, num_classes: int, processes: Processes):
        self.num_classes, self.processes = num_classes, processes
        self.counts = torch.zeros(
            num_cases, num_classes - 1, 3, dtype=torch.float64, device=processes.device
        )

    def add(
        self,
        number: int,
        predicted: torch.Tensor | np.ndarray,
        reference: torch.Tensor | np.ndarray,
    ) -> None:
        """Count a case, or a part of it, by its number among all cases."""
        predicted, reference = torch.as_tensor(predicted), torch.as_tensor(reference)
        self.counts[number] += count_overlap(predicted, reference, self.num_classes).to(
            self.counts.device, non_blocking=True
        )

    def scores(self) -> Scores:
        """Return the scores over all ranks' cases; every rank must call it."""
        return scores_from_counts(self.processes.sum(self.counts).cpu())


@dataclass(frozen=True)
class Validation:
    """Scores a network on the validation cases.

    Attributes:
        cases: this rank's share of them.
        num_classes: background included.
        run: by whose stops and precision it goes.
    """

    cases: ValidationLoader
    num_classes: int
    window: SlidingWindow
    run: Run

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> Scores | None:
        """Return the scores over all ranks' cases, the same on every rank; None if there are none.

        Args:
            network: not wrapped for distribution: ranks have different numbers of windows.
        """
        if self.cases.num_cases == 0:
            return None
        processes = self.run.processes
        was_training = network.training
        network.eval()
        overlaps = Overlaps(self.cases.num_cases, self.num_classes, processes)
        silent = None if processes.is_main else True  # None: a bar only where there is a terminal
        bar = {"total": len(self.cases), "unit": "case", "leave": False, "disable": silent}
        for case in tqdm(self.run.volumes(self.cases), "validation", **bar):
            for predicted, reference in self._predictions(case, network):
                overlaps.add(case["number"], predicted, reference)
        network.train(was_training)
        return overlaps.scores()

    def _predictions(
        self, case: dict[str, torch.Tensor], network: nn.Module
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what the network predicts of a case, part by part, with the reference."""
        shape, precision = case["image"].shape[2:], self.run.precision
        if self.num_classes * math.prod(shape) > MANY_SCORES and self.window.fits(shape):
            axis = slab_axis(shape)
            slabs = self.window.slabs(case["image"][0], network, precision, axis)
            for first, scores in slabs:
                reference = case["label"][0, 0].narrow(axis, first, scores.shape[1 + axis])
                yield scores.argmax(0), reference.to(scores.device, non_blocking=True)
            return
        image, label = to_device(case, self.run.device)
        with precision.autocast():
            scores = self.window(image, network)
        # In parts: a large volume's predictions would be 8 bytes a voxel, and its pairs of classes
        # as much again.
        for part, reference in zip(scores.split(SLAB, 2), label.split(SLAB, 2), strict=True):
            yield part.argmax(1), reference


def open_validation(
    cases: Sequence[Case], cache: Cache, settings: WindowSettings, run: Run
) -> Validation:
    """Prepare this rank's share of the validation cases, and what scores a network on them."""
    task = cache.task
    overlap, batch_size = settings.overlap_ratio, settings.num_sw_batch_size
    window = SlidingWindow(task.patch_size, overlap, batch_size)
    return Validation(validation_loader(cases, cache, run), task.num_classes, window, run)
