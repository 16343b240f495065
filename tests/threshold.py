"""Threshold stands in for a network that learned its task, in place of the one in a model file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import chain
from torch import nn

from dints.data.tasks import Task
from dints.inference.batch import Batch
from dints.network.architecture import Architecture
from dints.network.model_file import Model


class Threshold(nn.Module):
    """Gives class 1 where the window's value is above ``level``, class 0 elsewhere, and never any
    other class.
    """

    def __init__(self, level: float = 0.5, num_classes: int = 2):
        super().__init__()
        self.level, self.num_classes = level, num_classes

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores = 20 * (image[:, :1] - self.level)
        others = torch.full_like(scores, -99).expand(-1, self.num_classes - 2, -1, -1, -1)
        return torch.cat([-scores, scores, others], 1)


def note_cases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that will have the names of the cases that are segmented."""
    names, real = [], Batch.decide
    monkeypatch.setattr(Batch, "decide", lambda *a: names.append(a[1].name) or real(*a))
    return names


def knows(monkeypatch: pytest.MonkeyPatch, task: Task) -> Callable[..., None]:
    """Return a function that has every model file hold a network of the test's choice, and perhaps
    further facts.
    """

    def use(
        network: nn.Module,
        task: Task = task,
        digest: str = "",
        architecture: Architecture | None = None,
        **info: object,
    ) -> None:
        model = Model(network, architecture or chain(0, 0, num_depths=2), task, info, digest)
        monkeypatch.setattr("infer_dints.load_model", lambda path: model)

    return use
