"""Pictures of a run's course, made of its tables, in one style."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

# not pyplot, which would choose a window system and keep every figure
from matplotlib.figure import Figure

from dints import files
from dints.running.tables import ACCURACY, CANDIDATES, LOSSES, Rows, read_rows

# up to so many rows each point is marked; beyond so many points a running mean is drawn
MARKED, SMOOTHED = 40, 200


def draw_all(folder: Path) -> None:
    """Draw ``training_loss.png``, ``validation_metric.png`` and, of a search, ``search.png``."""
    for name, figure in figures(folder).items():
        _save(figure, folder / f"{name}.png")


def figures(folder: Path) -> dict[str, Figure]:
    """Make the pictures of a run folder, by their names without ending; of a table that is not
    there none.
    """
    losses, accuracy, made = read_rows(folder / LOSSES), read_rows(folder / ACCURACY), {}
    is_search = bool(losses) and "architecture_loss" in losses[0]
    if losses:
        names = {"loss": "weights' cases", "architecture_loss": "architecture's cases"}
        names = names if is_search else {"loss": "training cases"}
        made["training_loss"] = _over_iterations_and_time(
            losses, names, "training loss (Dice + CE)"
        )
    if any(row["dice"] for row in accuracy):
        names = {
            key: key.removeprefix("dice_").replace("_", " ")
            for key in accuracy[0]
            if key.startswith("dice_")
        }
        names = {"dice": "mean", **names} if len(names) > 1 else names
        figure = _over_iterations_and_time(
            accuracy, names, "Dice of the validation cases", corner="lower right"
        )
        figure.axes[0].set_ylim(*_range_of_dice(accuracy, names))
        made["validation_metric"] = figure
    if is_search:
        made["search"] = _course_of_search(losses)
    return made


KINDS = {
    "given": "tab:blue",
    "by_hand": "tab:orange",
    "random": "tab:green",
    "mutant": "tab:purple",
}


def draw_candidates(folder: Path) -> None:
    """Draw ``candidates.png``: Dice of each candidate of a competition on each rung that it
    reached.

    The axis leaves out candidates far below the others, for else those that matter would lie on
    each other; each is a triangle at the lower edge with its Dice beside.
    """
    rows = read_rows(folder / CANDIDATES)
    rungs = sorted({int(row["iterations"]) for row in rows})
    dices = [float(row["dice"]) for row in rows]
    lowest = max(min(dices), max(dices) - 3 * (max(dices) - float(np.median(dices))) - 0.01)
    margin = 0.04 * (max(dices) - lowest) or 0.01
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind, colour in KINDS.items():
        of_kind = dict.fromkeys(row["candidate"] for row in rows if row["kind"] == kind)
        for number, name in enumerate(of_kind):
            points = {
                int(row["iterations"]): float(row["dice"])
                for row in rows
                if row["candidate"] == name
            }
            # Beside each other, so that those of equal Dice can be told apart.
            x = [_beside(rungs.index(iterations), kind) for iterations in points]
            label = kind.replace("_", " ") if number == 0 else None
            axes.plot(
                x,
                list(points.values()),
                marker="o",
                markersize=5,
                color=colour,
                label=label,
                alpha=0.75,
            )
    axes.set_ylim(lowest - margin, max(dices) + margin)
    for place, kind in itertools.product(rungs, KINDS):
        of_kind = (row for row in rows if (int(row["iterations"]), row["kind"]) == (place, kind))
        below = sorted(dice for row in of_kind if (dice := float(row["dice"])) < lowest)
        if below:
            _mark_below(axes, _beside(rungs.index(place), kind), below, KINDS[kind])
    winner = max(
        (row for row in rows if int(row["iterations"]) == rungs[-1]),
        key=lambda row: float(row["dice"]),
    )
    axes.set_title(
        f"the winner is {winner['candidate'].replace('_', ' ')}, Dice {float(winner['dice']):.4f}",
        loc="left",
    )
    axes.set_xlim(-0.5, len(rungs) - 0.5)
    axes.set_xticks(range(len(rungs)), [f"{iterations:,}" for iterations in rungs])
    axes.set_xlabel("iterations of a training")
    axes.set_ylabel("Dice of the cases that judge")
    axes.grid(alpha=0.3, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, folder / "candidates.png")


def _beside(rung: int, kind: str) -> float:
    return rung + 0.12 * (list(KINDS).index(kind) - 1.5)


def _mark_below(axes: Axes, x: float, dices: list[float], colour: str) -> None:
    """Mark at the lower edge that there are Dice below it; write up to three, or how many there are
    and their range.
    """
    bottom = axes.get_ylim()[0]
    axes.plot(
        [x],
        [bottom],
        marker="v",
        markersize=8,
        color=colour,
        clip_on=False,
        label="_below",
        zorder=3,
    )
    text = ", ".join(f"{dice:.4f}" for dice in dices)
    if len(dices) > 3:
        text = f"{len(dices)}: {dices[0]:.4f} to {dices[-1]:.4f}"
    style = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": 8, "color": colour}
    axes.annotate(text, (x, bottom), xytext=(0, 7), textcoords="offset points", **style)


def _over_iterations_and_time(
    rows: Rows, names: Mapping[str, str], label: str, corner: str = "upper right"
) -> Figure:
    """Draw the columns in ``names`` over iterations (left) and over minutes of training (right)."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, scale, name in (
        (left, "iteration", 1, "iterations"),
        (right, "seconds", 60, "minutes"),
    ):
        for key, curve in names.items():
            _plot(axes, *_points(rows, column, key, scale), curve, len(rows))
        _finish(axes, name)
    left.set_ylabel(label)
    left.legend(frameon=False, loc=corner)
    return figure


def _course_of_search(rows: Rows) -> Figure:
    """Draw the losses, memory and entropies, and whether the decoded architecture has settled."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    losses, memory, entropies, changes = figure.subplots(1, 4)
    for axes, label, names in (
        (losses, "loss (Dice + CE)", {"loss": "weights", "architecture_loss": "architecture"}),
        (
            memory,
            "share of the memory of all paths",
            {"ram_ratio": "expected network", "ram_target": "RAM factor"},
        ),
        (
            entropies,
            "entropy, share of its start",
            {"entropy_a": "paths", "entropy_c": "operations", "topology": "topology"},
        ),
        (
            changes,
            "changes of the decoded network, sum",
            {"changed_paths": "paths", "changed_operations": "operations"},
        ),
    ):
        for key, name in names.items():
            x, y = _points(rows, "iteration", key)
            if axes is entropies:
                y = y / (y[0] or 1.0)  # one block has no topology: 0
            _plot(axes, x, np.array(list(accumulate(y))) if axes is changes else y, name, len(rows))
        axes.set_ylabel(label)
        _finish(axes, "iterations")
        axes.legend(frameon=False)
    memory.set_ylim(0, 1)
    return figure


def _points(rows: Rows, column: str, key: str, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return two columns of the rows that have a value of ``key``, the first divided by
    ``scale``.
    """
    points = [(float(row[column]) / scale, float(row[key])) for row in rows if row.get(key)]
    return tuple(np.array(points).reshape(-1, 2).T)


def _plot(axes: Axes, x: np.ndarray, y: np.ndarray, name: str, num_rows: int) -> None:
    """Draw one curve; where there are many points, their running mean over the points themselves,
    drawn faintly.

    Where there is none yet, the legend does not name it.
    """
    if not len(y):
        return
    style = {"color": "black", "linewidth": 2.2, "zorder": 3} if name == "mean" else {}
    style |= {"color": "grey", "linestyle": "--"} if name == "RAM factor" else {}
    if len(y) <= SMOOTHED:
        axes.plot(x, y, label=name, marker="o" if num_rows <= MARKED else "", markersize=3, **style)
        return
    width = len(y) // 50
    smooth = [np.convolve(values, np.ones(width) / width, "valid") for values in (x, y)]
    (line,) = axes.plot(*smooth, label=f"{name}, mean of {width} epochs", **style)
    axes.plot(x, y, color=line.get_color(), alpha=0.25, linewidth=0.7, zorder=1)


def _range_of_dice(rows: Rows, names: Mapping[str, str]) -> tuple[float, float]:
    """Return limits in steps of 0.05 that show the later three quarters well; what is below at
    first is cut off.
    """
    later = rows[len(rows) // 4 :]
    values = [float(row[key]) for row in later for key in names if row.get(key)] or [0.0, 1.0]
    return max(0.0, math.floor(20 * min(values)) / 20 - 0.05), min(
        1.0, math.ceil(20 * max(values)) / 20 + 0.01
    )


def _finish(axes: Axes, name_x: str) -> None:
    axes.set_xlabel(name_x)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
