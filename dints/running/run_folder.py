"""The run folder (``--output_root``): made, probed, locked against a second run, and cleared for a
fresh start.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dints import files, launcher
from dints.errors import UserError
from dints.running.processes import Processes

log = logging.getLogger(__name__)

NOTE = "fresh_start.json"
LATEST, PREVIOUS = "latest.pth", "previous.pth"
# What runs write into their folder. The states come first: whatever interrupts a fresh start, none
# is left to continue.
WRITTEN = (
    *(
        LATEST,
        PREVIOUS,
        NOTE,
        "best_metric_model.pth",
        "search_code_*",
        "*_history.csv",
        "Events",
        "progress.yaml",
    ),
    *(
        "training_loss.png",
        "validation_metric.png",
        "search.png",
        "candidates",
        "candidates.csv",
        "candidates.png",
    ),
    *("data.json", "task.json", "done.json"),
)


@contextmanager
def opened(path: str | Path, processes: Processes) -> Iterator[Path]:
    """Make, probe and lock the run folder; a second run in it is refused until this one ends."""

    def open_folder() -> None:
        try:
            locks.enter_context(files.locked(Path(path) / ".lock", wait=False))
            for partial in _left_by_a_kill(Path(path)):
                partial.unlink()
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing into {path}: wait for it, or give another --output_root"
            ) from error
        except OSError as error:
            why = files.reason(Path(path) / ".lock", error)
            raise UserError(f"--output_root {path} cannot be written: {why}") from error

    with ExitStack() as locks:
        processes.on_main(open_folder)
        yield Path(path)


def start_afresh(folder: Path, processes: Processes, inputs: Sequence[Path | None] = ()) -> None:
    """Move what an earlier run left in the folder into ``before_1`` there, or the next number; once
    a launch.

    Processes that a launcher starts again, and a SLURM job that is queued again, find in the
    folder's note that they
    have started afresh before: they continue.

    Args:
        inputs: files that the run reads; one that would be moved is an error.

    Raises:
        UserError: on rank 0; nothing is moved, or what is left can be moved by the same command.
    """
    # Each node has a launch of its own, and rank 0 may be on another one after a restart.
    launches = sorted(
        {name for of_rank in processes.gather(launcher.launches()) for name in of_rank}
    )
    processes.on_main(
        _start_afresh, folder, launches, [path for path in inputs if path is not None]
    )


def _start_afresh(folder: Path, launches: list[str], inputs: list[Path]) -> None:
    restarted = launcher.restarted(launches, _noted(folder))
    if restarted:
        log.info(
            "--resume never: %s started afresh here before, and now continues", ", ".join(restarted)
        )
        return
    found = [path for pattern in WRITTEN for path in sorted(folder.glob(pattern))]
    for path in inputs:
        if any(moved.resolve() in (path.resolve(), *path.resolve().parents) for moved in found):
            raise UserError(
                f"{path} is in the folder that --resume never clears: give another --output_root"
            )
    try:
        if found:
            before = next(
                path for n in itertools.count(1) if not (path := folder / f"before_{n}").exists()
            )
            before.mkdir()
            for path in found:
                path.rename(before / path.name)
            log.info("--resume never: what an earlier run left in %s is now in %s", folder, before)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be cleared for --resume never: {error.strerror}"
        ) from error
    files.write_atomically(folder / NOTE, json.dumps({"started_by": launches}))


def _noted(folder: Path) -> list[str]:
    """Return the launches that the last fresh start is of; none where there was none, or its note
    is damaged.
    """
    try:
        names = json.loads((folder / NOTE).read_text(encoding="utf-8"))["started_by"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _left_by_a_kill(folder: Path) -> list[Path]:
    """List what a run that was killed has left half written: the lock is ours, but not that of a
    run's folder below.
    """
    found = [
        path for path in folder.rglob(".*.partial") if re.search(r"\.\d+\.partial\Z", path.name)
    ]
    below = {path: path.parents[: path.parents.index(folder)] for path in found}
    return [
        path
        for path, parents in below.items()
        if not any((parent / ".lock").exists() for parent in parents)
    ]
