"""What a model file tells of itself: its architecture with its cost, its training and the course of
it.
"""

from __future__ import annotations

import logging
import re
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
# Where they stand in a model's folder, what pictures of its training show.
CURVES = {
    "training_loss": "Training loss over iterations, and over minutes",
    "validation_metric": "Dice of the validation cases over iterations, and over minutes",
    "search": "The search: losses, memory, entropies, and changes of the decoded network over "
    "iterations",
}


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
    described, drawn, folders = [], [], []
    for model, path in zip(models, paths, strict=True):
        settings = (
            model.task.num_channels,
            model.task.num_classes,
            model.task.patch_size,
            model.info["channel_mul"],
        )
        costs = cost(model.architecture, *settings)
        identity = (*model.architecture.codes(), model.architecture.operations, settings)
        drawing = note = ""
        if identity in drawn:
            note = f"Its architecture is that of {paths[drawn.index(identity)]}."
        else:
            drawing, note = _drawing(model, costs.lines())
        drawn.append(identity)
        curves, absence = ({}, "") if path.parent in folders else _curves(path.parent)
        folders.append(path.parent)
        cases = {
            name: model.info[key]
            for key, name in (
                ("training_cases", "trained on"),
                ("validation_cases", "validated on"),
            )
            if model.info.get(key)
        }
        notes = tuple(text for text in (note, absence) if text)
        described.append(
            About(str(path), tuple(_facts(model, costs)), cases, drawing, curves, notes)
        )
    return described


def _facts(model: Model, costs: Cost) -> list[tuple[str, str]]:
    info = model.info
    facts = [
        ("task", model.task.name),
        (
            "modality",
            f"{model.task.modality}, {model.task.num_channels} "
            f"channel{'s' * (model.task.num_channels > 1)}",
        ),
        ("preprocessing", describe(model.task)),
        ("parameters", f"{costs.parameters:,}"),
        (
            "multiply-adds",
            f"{costs.gmac:.4g} GMAC a patch of "
            f"{' x '.join(map(str, model.task.patch_size))} voxels",
        ),
        (
            "memory",
            f"{costs.activation_mib:.4g} MiB of activations in a training step with one patch",
        ),
    ]
    facts += [
        (name, value_of(info[key]))
        for key, name in OF_TRAINING.items()
        if info.get(key) is not None
    ]
    if "flips" in info:
        axes = ", ".join("XYZ"[axis] for axis in info["flips"]["axes"])
        facts.append(("flips in training", f"along {axes}" if axes else "none"))
    facts.append(("digest of the file", model.digest))
    return facts


def value_of(value: object) -> str:
    """Write a value of an unknown kind for people."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(value_of, value)) or "none"
    return (
        "none"
        if value is None
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)[:LONGEST]
    )


def _drawing(model: Model, caption: Sequence[str]) -> tuple[str, str]:
    """Return a model's drawing for the inside of a page, or why there is none."""
    try:
        text = architecture_svg(model.architecture, caption)
    except UserError as error:
        log.warning("the report has no drawing: %s", error)
        return "", f"No picture of the architecture: {error}."
    text = text[text.index("<svg") :]
    for what, instead in (
        (r'\A<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">'),
        # names of nodes and paths, which a browser would show
        (r"<!--.*?-->|<title>.*?</title>", ""),
        (r'<(g|a) id="[^"]*"', r"<\1"),
        (r"\s*\n\s*", "\n"),
    ):
        text = re.sub(what, instead, text, flags=re.DOTALL)
    return text, ""


def _curves(folder: Path) -> tuple[dict[str, str], str]:
    """Draw the course of the training that a model's folder holds, or tell why there is nothing to
    draw.
    """
    try:
        drawn = plots.course(folder)
    # tables of another program, or unreadable
    except (LookupError, TypeError, ValueError, OSError) as error:
        log.warning(
            "the report has no training curves: the tables in %s cannot be read (%r)", folder, error
        )
        return {}, f"No training curves: the tables in {folder} are none of train_dints.py's."
    if not drawn:
        return {}, f"No training curves: {folder} holds no tables of a training."
    return {CURVES[name]: text for name, text in drawn.items()}, ""
