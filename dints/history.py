"""A run's history: tables for programs, TensorBoard for curves over time, pictures for people."""

from __future__ import annotations

import csv
import io
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from matplotlib.figure import Figure  # not pyplot, which would choose a window system and keep every figure
from torch.utils.tensorboard import SummaryWriter

from dints import runtime
from dints.engine import Scores
from dints.runtime import Progress

log = logging.getLogger(__name__)

LOSSES, ACCURACY = "loss_history.csv", "accuracy_history.csv"


class History:
    """A table row per epoch and per validation, TensorBoard's ``Events/``, ``progress.yaml`` and two pictures.

    Args:
        folder: the run folder.
        class_names: of the task, background first.
        iteration: where the run continues; what a stopped run wrote after it is cut. 0: afresh.
        enabled: False on ranks that do not write.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], iteration: int, enabled: bool):
        self.folder, self.class_names, self.enabled = folder, class_names, enabled
        if enabled:
            if iteration == 0:
                shutil.rmtree(folder / "Events", ignore_errors=True)
            self.writer = SummaryWriter(str(folder / "Events"), purge_step=iteration + 1 if iteration else None)
            for name in (LOSSES, ACCURACY):
                write_rows(
                    folder / name, [row for row in read_rows(folder / name) if int(row["iteration"]) <= iteration]
                )

    def add_epoch(self, progress: Progress, values: Mapping[str, float | None]) -> None:
        """Note an epoch's values: a row of ``loss_history.csv``, scalars, a line for people."""
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        log.info(
            "epoch %d iteration %d: %s (%.2f s/it)",
            progress.epoch,
            progress.iteration,
            shown,
            progress.seconds_per_iteration,
        )
        self._add(LOSSES, "train", progress, {**values, "seconds_per_iteration": progress.seconds_per_iteration})

    def add_validation(self, progress: Progress, scores: Scores | None) -> None:
        """Note a validation (None: no cases) likewise, draw the pictures anew and replace ``progress.yaml``."""
        if scores is None:
            log.info("no validation cases: the newest network counts as the best")
        else:
            log.info("epoch %d iteration %d: %s", progress.epoch, progress.iteration, scores.describe(self.class_names))
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
            "epoch": progress.epoch,
            "iteration": progress.iteration,
            "seconds": round(progress.seconds, 3),
            **values,
        }
        with open(self.folder / name, "a", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(row))
            if file.tell() == 0:
                table.writeheader()
            table.writerow({key: "" if value is None else value for key, value in row.items()})
        for key, value in values.items():
            if value is not None:
                self.writer.add_scalar(f"{group}/{key}", value, progress.iteration)

    def _write_progress(self, progress: Progress) -> None:
        content = {
            "epoch": progress.epoch,
            "iteration": progress.iteration,
            "minutes": round(progress.seconds / 60, 2),
            "best_avg_dice_score": progress.best_dice,
            "best_avg_dice_score_epoch": progress.best_epoch,
            "best_avg_dice_score_iteration": progress.best_iteration,
            "best_path": progress.best_path,
        }
        with runtime.replacing(self.folder / "progress.yaml") as file:
            file.write(yaml.safe_dump(content, sort_keys=False).encode())


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
    table = csv.DictWriter(text, fieldnames=list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    with runtime.replacing(path) as file:
        file.write(text.getvalue().encode())


def draw_curves(folder: Path) -> None:
    """``training_loss.png`` and ``validation_metric.png`` from the tables, over iterations and over time."""
    for name, columns, label, picture in (
        (LOSSES, ("loss", "architecture_loss"), "loss (Dice + cross-entropy)", "training_loss.png"),
        (ACCURACY, None, "Dice", "validation_metric.png"),
    ):
        rows = read_rows(folder / name)
        if rows:
            shown = [column for column in columns or rows[0] if column in rows[0] and (columns or "dice" in column)]
            figure = curves(rows, shown, label)
            with runtime.replacing(folder / picture) as file:
                figure.savefig(file, format="png", dpi=120)


def curves(rows: Sequence[Mapping[str, str]], columns: Sequence[str], label: str) -> Figure:
    """A matplotlib figure of ``columns`` over iterations (left) and over minutes of training (right)."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column_x, scale, name_x in ((left, "iteration", 1, "iterations"), (right, "seconds", 60, "minutes")):
        for column in columns:
            points = [(float(row[column_x]) / scale, float(row[column])) for row in rows if row[column]]
            name = column.removeprefix("dice_").replace("_", " ")
            marker = "o" if len(points) < 40 else ""
            axes.plot(*zip(*points, strict=True), label="mean" if name == "dice" else name, marker=marker, markersize=3)
        axes.set_xlabel(name_x)
        axes.grid(alpha=0.3)
    left.set_ylabel(label)
    if len(columns) > 1:
        left.legend(frameon=False)
    return figure
