"""Windows is not as Linux and macOS in these: the one place that knows the difference."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def signals(*names: str) -> tuple[signal.Signals, ...]:
    """Return those of the named signals that exist here: Windows has no SIGHUP, SIGUSR1 or
    SIGUSR2.
    """
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


def forget_children() -> None:
    """Drop PyTorch's handler of the signal that a child has ended: it raises for a worker that is
    killed.
    """
    for number in signals("SIGCHLD"):
        signal.signal(number, signal.SIG_DFL)


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk; Windows cannot open a folder, and writes a rename by
    itself.
    """
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
