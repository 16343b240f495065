"""A model for people: its architecture with its cost, its training and the curves of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dints.data.dataset import describe
from dints.errors import UserError
from dints.network.cost import Cost, cost
from dints.network.drawing import architecture_svg
from dints.network.model_file import Model
from dints.report import plots

log = logging.getLogger(__name__)

LONGEST = 200  # characters of a value that an unknown file may hold
# Keys of a model file, in words; what is absent is left out.
OF_TRAINING = {
    "recipe": "recipe",
    "augmentation": "augmentation",
    "iteration": "iterations",
    "dice": "Dice in its validation",
    "fold": "fold, from 0",
    "num_folds": "folds",
    "version": "version that trained it",
}
CURVES = {
    "training_loss": "Training loss over iterations, and over minutes",
    "validation_metric": "Dice of the validation cases over iterations, and over minutes",
    "search": "The search: losses, memory, entropies, changes of the decoded network",
}
CASES = {"training_cases": "trained on", "validation_cases": "validated on"}


@dataclass(frozen=True)
class About:
    """A model, for people.

    Attributes:
        file: its path.
        facts: names and values.
        cases: names of its training and of its validation cases, by what they are called.
        drawing: SVG; empty where there is none.
        curves: SVG of pictures of its training, by what they show.
        notes: why there is no drawing, and why there are no curves.
    """

    file: str
    facts: tuple[tuple[str, str], ...]
    cases: dict[str, list[str]]
    drawing: str
    curves: dict[str, str]
    notes: tuple[str, ...]


def about(models: Sequence[Model], paths: Sequence[Path]) -> list[About]:
    """Gather the facts of each model; a drawing that two of them share is shown with the first."""
    described, drawn, folders = [], {}, set()
    for model, path in zip(models, paths, strict=True):
        task, architecture, width = model.task, model.architecture, model.info["channel_mul"]
        settings = task.num_channels, task.num_classes, task.patch_size, width
        costs = cost(architecture, *settings)
        identity = repr((architecture.codes(), architecture.operations, settings))
        first = drawn.setdefault(identity, path)
        drawing, note = "", f"Its architecture is that of {first}."
        if first is path:
            drawing, note = _drawing(model, costs.lines())
        curves, absence = ({}, "") if path.parent in folders else _curves(path.parent)
        folders.add(path.parent)
        cases = {name: model.info[key] for key, name in CASES.items() if model.info.get(key)}
        notes = tuple(text for text in (note, absence) if text)
        facts = tuple(_facts(model, costs))
        described.append(About(str(path), facts, cases, drawing, curves, notes))
    return described


def _facts(model: Model, costs: Cost) -> list[tuple[str, str]]:
    task, info = model.task, model.info
    patch, memory = " x ".join(map(str, task.patch_size)), f"{costs.activation_mib:.4g} MiB"
    facts = [
        ("task", task.name),
        (
            "modality",
            f"{task.modality}, {task.num_channels} channel{'s' * (task.num_channels > 1)}",
        ),
        ("preprocessing", describe(task)),
        ("parameters", f"{costs.parameters:,}"),
        ("multiply-adds", f"{costs.gmac:.4g} GMAC a patch of {patch} voxels"),
        ("memory", f"{memory} of activations in a training step with one patch"),
    ]
    known = [(key, name) for key, name in OF_TRAINING.items() if info.get(key) is not None]
    facts += [(name, value_of(info[key])) for key, name in known]
    if "flips" in info:
        axes = ", ".join("XYZ"[axis] for axis in info["flips"]["axes"])
        facts.append(("flips in training", f"along {axes}" if axes else "none"))
    facts.append(("digest of the file", model.digest))
    return facts


def value_of(value: object) -> str:
    """Write a value of an unknown kind for people."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(value_of, value)) or "none"
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:LONGEST]


def _drawing(model: Model, caption: Sequence[str]) -> tuple[str, str]:
    """Return a model's drawing for the inside of a page, or why there is none."""
    try:
        text = architecture_svg(model.architecture, caption)
    except UserError as error:
        log.warning("the report has no drawing: %s", error)
        return "", f"No picture of the architecture: {error}."
    # titles are names of nodes and paths, which a browser would show
    unwanted = (r"<!--.*?-->|<title>.*?</title>", ""), (r'<(g|a) id="[^"]*"', r"<\1")
    return plots.inline(text, *unwanted), ""


def _curves(folder: Path) -> tuple[dict[str, str], str]:
    """Draw the curves of the training in a model's folder, or tell why there are none."""
    try:
        drawn = plots.course(folder)
    except (LookupError, TypeError, ValueError, OSError) as error:  # of another program
        log.warning("no training curves: the tables in %s cannot be read (%r)", folder, error)
        return {}, f"No training curves: the tables in {folder} are none of train_dints.py's."
    if not drawn:
        return {}, f"No training curves: {folder} holds no tables of a training."
    return {CURVES[name]: text for name, text in drawn.items()}, ""
