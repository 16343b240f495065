"""A run's history: tables for programs, TensorBoard for curves over time, pictures and lines for
people.
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import yaml
from torch.utils.tensorboard import SummaryWriter

from dints import files
from dints.errors import UserError
from dints.running import curves
from dints.running.progress import Progress
from dints.running.tables import ACCURACY, LOSSES, add_row, read_rows, write_rows

log = logging.getLogger(__name__)

# so that short epochs do not flood the terminal; the tables have every epoch
SECONDS_BETWEEN_LINES = 10.0


class Scores(Protocol):
    """A validation's scores; see `dints.training.validation.Scores`."""

    @property
    def mean(self) -> float | None: ...

    @property
    def per_class(self) -> list[float | None]: ...

    def describe(self, class_names: Sequence[str]) -> str: ...


class History:
    """Writes a table row per epoch and per validation, TensorBoard's ``Events/``, ``progress.yaml``
    and pictures.

    Args:
        folder: the run folder.
        class_names: of the task, background first.
        iteration: the last one that a stopped run need not do again; what it wrote after it is cut.
            0: afresh.
        enabled: False on ranks that do not write.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], iteration: int, enabled: bool):
        self.folder, self.class_names, self.enabled = folder, class_names, enabled
        self.logged_at = -math.inf
        if enabled:
            if iteration == 0 and (folder / "Events").exists():
                shutil.rmtree(folder / "Events")
            self.excepthook = threading.excepthook
            threading.excepthook = self._report_unless_raised
            with self._writing():
                self.writer = SummaryWriter(
                    str(folder / "Events"), purge_step=iteration + 1 if iteration else None
                )
            for table in (folder / LOSSES, folder / ACCURACY):
                write_rows(
                    table, [row for row in read_rows(table) if int(row["iteration"]) <= iteration]
                )

    def add_epoch(self, progress: Progress, values: Mapping[str, float | None]) -> None:
        """Note an epoch's values: a row of ``loss_history.csv``, scalars, a line for people.

        Args:
            values: ``data_wait`` among them is the share of the epoch in which batches were waited
                for.
        """
        if time.monotonic() - self.logged_at > SECONDS_BETWEEN_LINES:
            shown = [
                f"{key} {value:.4g}"
                for key, value in values.items()
                if value is not None and key != "data_wait"
            ]
            pace = f"{progress.seconds_per_iteration:.2f} s/it"
            if "data_wait" in values:
                pace += f", {values['data_wait']:.1%} of it waiting for data"
            log.info(
                "epoch %d iteration %d: %s (%s)",
                progress.current_epoch,
                progress.iteration,
                " ".join(shown),
                pace,
            )
            self.logged_at = time.monotonic()
        self._add(
            LOSSES,
            "train",
            progress,
            {**values, "seconds_per_iteration": progress.seconds_per_iteration},
        )
        self._flush()  # a run that is killed is continued after this epoch

    def add_validation(self, progress: Progress, scores: Scores | None) -> None:
        """Note a validation (None: no cases) likewise, draw the pictures and replace
        ``progress.yaml``.
        """
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
        self._flush()
        if self.enabled:
            self.write_progress(progress)
            self._draw()

    def close(self) -> None:
        if self.enabled:
            with self._writing():
                self.writer.close()
            threading.excepthook = self.excepthook

    def _flush(self) -> None:
        if self.enabled:
            with self._writing():
                self.writer.flush()

    def _report_unless_raised(self, raised: threading.ExceptHookArgs) -> None:
        """Print no traceback of what TensorBoard's thread could not write, for `_writing` reports
        it.
        """
        if not (
            isinstance(raised.exc_value, OSError)
            and type(raised.thread).__module__.startswith("tensorboard.")
        ):
            self.excepthook(raised)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Report in one line what TensorBoard could not write: its thread raises at a later
        call.
        """
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder / 'Events'} cannot be written: {error.strerror or error}; free some "
                "space, then the same command continues"
            ) from error

    def _add(
        self, name: str, group: str, progress: Progress, values: Mapping[str, float | None]
    ) -> None:
        if not self.enabled:
            return
        row = {
            "epoch": progress.current_epoch,
            "iteration": progress.iteration,
            "seconds": round(progress.seconds, 3),
            **values,
        }
        add_row(self.folder / name, row)
        for key, value in values.items():
            if value is not None:
                with self._writing():
                    self.writer.add_scalar(f"{group}/{key}", value, progress.iteration)

    def _draw(self) -> None:
        try:
            curves.draw_all(self.folder)
        except UserError as error:  # a picture is not worth a run: its numbers are in the tables
            log.warning("the pictures stay as they were: %s", error)

    def write_progress(self, progress: Progress) -> None:
        """Replace ``progress.yaml``."""
        if not self.enabled:
            return
        content = {
            "epoch": progress.current_epoch,
            "iteration": progress.iteration,
            "minutes": round(progress.seconds / 60, 2),
            "best_avg_dice_score": progress.best_dice,
            "best_avg_dice_score_epoch": progress.best_epoch,
            "best_avg_dice_score_iteration": progress.best_iteration,
            "best_path": progress.best_path,
        }
        files.write_atomically(
            self.folder / "progress.yaml", yaml.safe_dump(content, sort_keys=False)
        )
