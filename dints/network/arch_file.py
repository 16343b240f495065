"""An arch file as searches write it: with its cost, and its drawing beside it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from dints import __version__
from dints.data.tasks import Task
from dints.errors import UserError
from dints.network.architecture import Architecture, save_architecture
from dints.network.cost import cost
from dints.network.drawing import draw_architecture

log = logging.getLogger(__name__)


def write_architecture(
    path: Path, architecture: Architecture, task: Task, device: torch.device
) -> None:
    """Write an architecture and its cost in train_dints.py, log that, and draw it beside."""
    size = task.num_channels, task.num_classes, task.patch_size, architecture.channel_mul
    try:
        of_network = cost(architecture, *size, device=device)
    except UserError as error:  # beside a large supernet there may be no memory to measure it
        log.warning("the network's time is not measured: %s", error)
        of_network = cost(architecture, *size)
    facts = {"task": task.name, "version": __version__, "cost": of_network.to_dict()}
    architecture.info.update(facts)
    save_architecture(path, architecture)
    ratio = architecture.info["ram_ratio"]
    caption = [
        f"{ratio:.3f} of the memory of every path with its dearest operation",
        *of_network.lines(),
    ]
    for line in caption:
        log.info("decoded: %s", line)
    try:
        draw_architecture(architecture, path.stem, path.parent, caption=caption)
    except UserError as error:  # without Graphviz's dot the .gv source is there
        log.warning("%s", error)
