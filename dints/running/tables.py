"""A run's tables: CSV files with a row for each epoch, and for each validation."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from dints import files
from dints.errors import UserError

LOSSES, ACCURACY, CANDIDATES = "loss_history.csv", "accuracy_history.csv", "candidates.csv"
Rows = Sequence[Mapping[str, str]]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a table, [] if there is none yet; a last line cut short by a kill is left
    out.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def write_rows(path: Path, rows: Rows) -> None:
    """Replace a table; no rows, no file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    files.write_atomically(path, text.getvalue())


def add_row(path: Path, row: Mapping[str, object]) -> None:
    """Append a row, and a header before the first one; None becomes an empty cell.

    Raises:
        UserError: the disk is full, or closed to writing.
    """
    try:
        with open(path, "a", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if file.tell() == 0:
                table.writeheader()
            table.writerow(row)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
