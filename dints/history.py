"""A run's history: tables for programs, TensorBoard for curves over time, pictures for people."""

from __future__ import annotations

import csv
import io
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would choose a window system and keep every figure
from torch.utils.tensorboard import SummaryWriter

from dints import files
from dints.checkpoint import Progress
from dints.engine import Scores

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0  # so that short epochs do not flood the terminal; the tables have every epoch
LOSSES, ACCURACY = "loss_history.csv", "accuracy_history.csv"


class History:
    """A table row per epoch and per validation, TensorBoard's ``Events/``, ``progress.yaml`` and two pictures.

    Args:
        folder: the run folder.
        class_names: of the task, background first.
        iteration: the last one that a stopped run need not do again; what it wrote after it is cut. 0: afresh.
        enabled: False on ranks that do not write.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], iteration: int, enabled: bool):
        self.folder, self.class_names, self.enabled = folder, class_names, enabled
        self.logged_at = -math.inf
        if enabled:
            if iteration == 0 and (folder / "Events").exists():
                shutil.rmtree(folder / "Events")
            self.writer = SummaryWriter(str(folder / "Events"), purge_step=iteration + 1 if iteration else None)
            for table in (folder / LOSSES, folder / ACCURACY):
                write_rows(table, [row for row in read_rows(table) if int(row["iteration"]) <= iteration])

    def add_epoch(self, progress: Progress, values: Mapping[str, float | None]) -> None:
        """Note an epoch's values: a row of ``loss_history.csv``, scalars, a line for people.

        Args:
            values: ``data_wait`` among them is the share of the epoch in which batches were waited for.
        """
        if time.monotonic() - self.logged_at > SECONDS_BETWEEN_LINES:
            shown = [f"{key} {value:.4g}" for key, value in values.items() if value is not None and key != "data_wait"]
            pace = f"{progress.seconds_per_iteration:.2f} s/it"
            if "data_wait" in values:
                pace += f", {values['data_wait']:.1%} of it waiting for data"
            log.info(
                "epoch %d iteration %d: %s (%s)", progress.current_epoch, progress.iteration, " ".join(shown), pace
            )
            self.logged_at = time.monotonic()
        self._add(LOSSES, "train", progress, {**values, "seconds_per_iteration": progress.seconds_per_iteration})
        if self.enabled:
            self.writer.flush()  # a run that is killed is continued after this epoch

    def add_validation(self, progress: Progress, scores: Scores | None) -> None:
        """Note a validation (None: no cases) likewise, draw the pictures anew and replace ``progress.yaml``."""
        if scores is None:
            log.info("no validation cases: the newest network counts as the best")
        else:
            log.info(
                "epoch %d iteration %d: %s",
                progress.current_epoch,
                progress.iteration,
                scores.describe(self.class_names),
            )
            columns = [f"dice_{name.replace(' ', '_')}" for name in self.class_names[1:]]
            row = {"dice": scores.mean, **dict(zip(columns, scores.per_class, strict=True))}
            self._add(ACCURACY, "validation", progress, row)
        if self.enabled:
            self.writer.flush()
            self._write_progress(progress)
            draw_curves(self.folder)

    def close(self) -> None:
        if self.enabled:
            self.writer.close()

    def _add(self, name: str, group: str, progress: Progress, values: Mapping[str, float | None]) -> None:
        if not self.enabled:
            return
        row = {
            "epoch": progress.current_epoch,
            "iteration": progress.iteration,
            "seconds": round(progress.seconds, 3),
            **values,
        }
        with open(self.folder / name, "a", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if file.tell() == 0:
                table.writeheader()
            table.writerow(row)  # None is written as an empty cell
        for key, value in values.items():
            if value is not None:
                self.writer.add_scalar(f"{group}/{key}", value, progress.iteration)

    def _write_progress(self, progress: Progress) -> None:
        content = {
            "epoch": progress.current_epoch,
            "iteration": progress.iteration,
            "minutes": round(progress.seconds / 60, 2),
            "best_avg_dice_score": progress.best_dice,
            "best_avg_dice_score_epoch": progress.best_epoch,
            "best_avg_dice_score_iteration": progress.best_iteration,
            "best_path": progress.best_path,
        }
        files.write_atomically(self.folder / "progress.yaml", yaml.safe_dump(content, sort_keys=False))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a history table, [] if there is none yet; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Replace a history table; no rows, no file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    files.write_atomically(path, text.getvalue())


def draw_curves(folder: Path) -> None:
    """``training_loss.png`` and ``validation_metric.png`` from the tables, over iterations and over time."""
    losses, accuracy = read_rows(folder / LOSSES), read_rows(folder / ACCURACY)
    arch = "architecture_loss" in (losses[0] if losses else ())
    loss_names = {"loss": "weights' cases" if arch else "training cases", "architecture_loss": "architecture's cases"}
    dice_names = {
        c: c.removeprefix("dice_").replace("_", " ") for c in (accuracy[0] if accuracy else ()) if c.startswith("dice_")
    }
    if len(dice_names) > 1:
        dice_names = {"dice": "mean", **dice_names}
    for rows, names, label, legend, picture in (
        (losses, loss_names, "training loss (Dice + CE)", "upper right", "training_loss.png"),
        (accuracy, dice_names, "Dice of the validation cases", "lower right", "validation_metric.png"),
    ):
        present = {column: name for column, name in names.items() if any(row.get(column) for row in rows)}
        if present:
            figure = curves(rows, present, label, legend)
            with files.replacing(folder / picture) as file:
                figure.savefig(file, format="png", dpi=120)


def curves(rows: Sequence[Mapping[str, str]], names: Mapping[str, str], label: str, legend: str) -> Figure:
    """The columns in ``names`` over iterations (left) and over minutes of training (right); ``legend``: its corner."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column_x, scale, name_x in ((left, "iteration", 1, "iterations"), (right, "seconds", 60, "minutes")):
        for column, name in names.items():
            points = [(float(row[column_x]) / scale, float(row[column])) for row in rows if row[column]]
            plot(axes, *np.transpose(points), name, marker="o" if len(rows) <= 40 else "")
        axes.set_xlabel(name_x)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel(label)
    left.legend(frameon=False, loc=legend)
    return figure


def plot(axes: Axes, x: np.ndarray, y: np.ndarray, name: str, marker: str) -> None:
    """One curve; where there are many points, their running mean over the points themselves, drawn faintly."""
    style = {"color": "black", "linewidth": 2.2, "zorder": 3} if name == "mean" else {}
    if len(y) <= 200:
        axes.plot(x, y, label=name, marker=marker, markersize=3.5, **style)
        return
    width = len(y) // 50
    smooth = [np.convolve(values, np.ones(width) / width, "valid") for values in (x, y)]
    (line,) = axes.plot(*smooth, label=f"{name}, mean of {width} epochs", **style)
    axes.plot(x, y, color=line.get_color(), alpha=0.25, linewidth=0.7, zorder=1)
