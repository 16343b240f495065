"""The network as PyTorch's exported program, a graph that runs without our code."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from dints.data.tasks import Task
from dints.network.discrete import patch_step
from dints.network.model_file import Model

FACTS = "dints"  # what the facts below are called in a file


def facts(task: Task, overlap: float) -> dict[str, object]:
    """Return what whoever runs the network has to know of its images, as JSON has it.

    Args:
        overlap: of neighbouring windows, 0 to 1.
    """
    names = "name modality num_channels class_names spacing intensity patch_size"
    return {**{name: task.to_dict()[name] for name in names.split()}, "overlap": overlap}


def exported(model: Model) -> ExportedProgram:
    """Trace the network, on the CPU, for any number of patches of any multiple of its step from two
    on.

    Where the model's own patch is a single step long, its deepest level is one voxel, which PyTorch
    treats apart: that axis keeps its size.
    """
    patch_size, step = model.task.patch_size, patch_step(model.architecture)
    image = torch.zeros(2, model.task.num_channels, *patch_size)
    sizes = {
        axis: step * Dim(name, min=2)
        for axis, name, size in zip((2, 3, 4), "xyz", patch_size, strict=True)
        if size > step
    }
    with quietly():
        return torch.export.export(
            model.network.eval(), (image,), dynamic_shapes=({0: Dim("batch"), **sizes},)
        )


def as_bytes(program: ExportedProgram, facts: dict[str, object]) -> bytes:
    """Return what a file of the program holds, with the facts beside it."""
    content = io.BytesIO()
    with quietly():
        torch.export.save(program, content, extra_files={FACTS: json.dumps(facts)})
    return content.getvalue()


class LoadedProgram(nn.Module):
    """A program in a file as a network, in evaluation, which is all that a program can be."""

    def __init__(self, path: str | Path):
        super().__init__()
        with open(path, "rb") as file, quietly():
            # in a list, since it refuses to be a part of a network
            self.programs = [torch.export.load(file).module()]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return class scores (batch, classes, *spatial) of images (batch, channels, *spatial)."""
        return self.programs[0](image)


@contextmanager
def quietly() -> Iterator[None]:
    """Silence what exporters say of their own work: no torchvision, each pass over the graph."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
