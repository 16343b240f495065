"""The run folder (``--output_root``): made, probed, and locked against a second run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dints.errors import UserError
from dints.running.processes import Processes


@contextmanager
def opened(path: str | Path, processes: Processes) -> Iterator[Path]:
    """Make, probe and lock the run folder; a second run in it is refused until this one ends."""

    def open_folder() -> None:
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            lock = os.open(Path(path) / ".lock", os.O_RDWR | os.O_CREAT)
            locks.callback(_unlock, lock)
            _locks.add(lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for partial in Path(path).rglob(".*.partial"):  # of a run that was killed while it wrote: the lock is ours
                partial.unlink()
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing into {path}: wait for it, or give another --output_root"
            ) from error
        except OSError as error:
            raise UserError(f"--output_root {path} cannot be written: {error.strerror}") from error

    with ExitStack() as locks:
        processes.on_main(open_folder)
        yield Path(path)


_locks: set[int] = set()  # file descriptors of this process


def _unlock(lock: int) -> None:
    _locks.discard(lock)
    os.close(lock)


# A worker shares its parent's lock, and would hold it for some seconds after the parent was killed.
os.register_at_fork(after_in_child=lambda: [_unlock(lock) for lock in list(_locks)])
