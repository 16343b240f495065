"""Makes the parts that benchmarks measure: searches and trainings of random patches, without a
loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from monai.networks.nets.dints import DiNTS
from torch import nn

import search_dints
from dints.data.tasks import Task
from dints.network.strides import isotropic
from dints.running.precision import Precision
from dints.running.processes import Processes
from dints.running.run import Run
from dints.settings import MachineSettings, RetrainingSettings, RunSettings, TrainingMachineSettings
from dints.training.steps import WeightsTrainer

NOWHERE = Path("nowhere")  # such runs write nothing


@dataclass
class Search:
    """A supernet with the trainers of its weights and its architecture."""

    network: DiNTS
    weights: WeightsTrainer
    arch: search_dints.ArchTrainer

    @property
    def parts(self) -> dict[str, object]:
        return {"network": self.network, **self.weights.parts, **self.arch.parts}


def a_run(
    precision: Precision, processes: Processes, machine: MachineSettings | None = None
) -> Run:
    """Make a run that has its precision, and no state."""
    machine = machine or MachineSettings(precision=precision.name)
    run = Run(NOWHERE, processes, RunSettings(output_root=NOWHERE), machine)
    run.precision = precision
    return run


def a_search(
    flags: Sequence[str], task: Task, precision: Precision, processes: Processes
) -> Search:
    """Make a search by the flags of search_dints.py, of which --patch_size is the task's too."""
    settings = search_dints.parse_args(["--root", ".", "--output_root", ".", *map(str, flags)])
    task = replace(task, patch_size=settings.data.patch_size or task.patch_size)
    run = a_run(precision, processes, settings.machine)
    strides = isotropic(settings.space.num_depths, settings.space.use_downsample == "yes")
    supernet = search_dints.build_supernet(settings, task, strides, run)
    return Search(supernet, *search_dints.trainers(supernet, settings, task, run))


def a_training(
    network: nn.Module,
    precision: Precision,
    processes: Processes,
    image_shape: Sequence[int] = (1, 1, 32, 32, 32),
    *,
    compile: str = "off",
    cuda_graphs: bool = False,
    **settings: object,
) -> WeightsTrainer:
    """Make the training of a network on its device.

    Args:
        image_shape: (batch, channels, *patch_size), for ``cuda_graphs``.
        settings: of `RetrainingSettings`; by default those of the published recipe.
    """
    published = {"learning_rate_schedule": "halvings", "average_decay": 0.0}
    weights = RetrainingSettings(**{**published, **settings})
    machine = TrainingMachineSettings(compile=compile, cuda_graphs=cuda_graphs)
    run = a_run(precision, processes, machine)
    return WeightsTrainer(network, network.parameters(), weights, run, image_shape)


def half_way(search: Search, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Take a step of the architecture, half of the training after the warm-up being done."""
    return search.arch.step(batch, 0.5)
