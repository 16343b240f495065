"""What operating systems do differently: the one place that knows where Windows is not as Linux and macOS."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

SECONDS_BETWEEN_TRIES = 0.1  # to lock a file, where the system cannot wait for that itself


def signals(*names: str) -> tuple[signal.Signals, ...]:
    """Return those of the named signals that there are here: on Windows there is no SIGHUP, SIGUSR1 or SIGUSR2."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


def forget_children() -> None:
    """Drop PyTorch's handler of the signal that a child has ended: it raises for a worker that is killed."""
    for number in signals("SIGCHLD"):
        signal.signal(number, signal.SIG_DFL)


def after_fork(function: Callable[[], None]) -> None:
    """Call ``function`` in each process that is forked off this one; on Windows none is."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def lock(file: int, wait: bool) -> None:
    """Lock an open file for this process alone, until the descriptor is closed or the process ends.

    Raises:
        BlockingIOError: another process has it, and ``wait`` is not set.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    while True:
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            return
        except OSError as error:
            if not wait:
                raise BlockingIOError(error.errno, "another process has locked it") from error
        time.sleep(SECONDS_BETWEEN_TRIES)


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk; Windows cannot open a folder, and writes a rename down by itself."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Return the bytes of memory that are free where there is no /proc to tell: half of all, or what Windows says."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.free


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("length", "load")),
        *((name, ctypes.c_uint64) for name in ("all", "free", "all_pages", "free_pages", "all_virtual")),
        *((name, ctypes.c_uint64) for name in ("free_virtual", "free_extended")),
    ]
