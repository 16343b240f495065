"""A process and its launcher, torchrun: nothing else reads the variables that it sets."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of Linux' prctl.h


def rank() -> int:
    """Return this process's number among those of the run, 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return how many processes the run has, on all of its nodes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Return this process's number among those of its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Return how many processes of the run this node has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def stop_with_launcher() -> None:
    """Have SIGTERM stop this process, which saves, where its launcher dies without a word, as of
    SIGKILL.

    Only Linux can do that.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launches() -> list[str]:
    """Name the launch and the SLURM job of this process, either of which may start it again by
    itself.

    ``TORCHELASTIC_RUN_ID`` is no name: for several nodes it is a constant, and
        ``TORCHELASTIC_RESTART_COUNT``
    differs between nodes. Error files lie in a folder that each launch makes for itself, with a
    random name: PyTorch 2.11 to 2.13 call them <folder>/attempt_<restart>/<local rank>/error.json.
    """
    names = []
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        names.append(f"torchrun {Path(os.environ['TORCHELASTIC_ERROR_FILE']).parents[2].name}")
    if "SLURM_JOB_ID" in os.environ:
        names.append(_job())
    return names


def restarted(names: Collection[str], noted: Collection[str]) -> list[str]:
    """Return those of the `launches` of a run's processes that an earlier start of it has noted,
    and that began both.

    A SLURM job counts only once it was queued again: in an interactive one, a person may give a
        command twice.
    """
    requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    return [name for name in names if name in noted and (requeued or name != _job())]


def _job() -> str:
    return f"SLURM job {os.environ.get('SLURM_JOB_ID')}"
