"""The run folder (``--output_root``): made, probed, and locked against a second run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dints import files
from dints.errors import UserError
from dints.running.processes import Processes


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


def _left_by_a_kill(folder: Path) -> list[Path]:
    """List what a run that was killed has left half written: the lock is ours, but not that of a run's folder below."""
    found = [path for path in folder.rglob(".*.partial") if re.search(r"\.\d+\.partial\Z", path.name)]
    below = {path: path.parents[: path.parents.index(folder)] for path in found}
    return [path for path, parents in below.items() if not any((parent / ".lock").exists() for parent in parents)]
