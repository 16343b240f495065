"""What a launcher (torchrun or ``launch/agent.py``) tells each process; nothing else reads these variables."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path


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


def error_file() -> str | None:
    """Return the file in which a process tells the launcher why it failed; None where no launcher asks for it."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE")


def launches() -> list[str]:
    """Name what may start this process again by itself: a launch of torchrun's or ``launch/agent.py``, a SLURM job.

    ``TORCHELASTIC_RUN_ID`` is no name: for several nodes it is a constant, and ``TORCHELASTIC_RESTART_COUNT`` differs
    between nodes. Error files lie in a folder that each agent makes for itself, with a random name: PyTorch 2.11 to
    2.13 call them <folder>/attempt_<restart>/<local rank>/error.json.
    """
    names = []
    if error_file() is not None:
        names.append(f"torchrun {Path(error_file()).parents[2].name}")
    if "SLURM_JOB_ID" in os.environ:
        names.append(_job())
    return names


def restarted(names: Collection[str], noted: Collection[str]) -> list[str]:
    """Return those of the `launches` of a run's processes that an earlier start of it has noted, and that began both.

    A SLURM job counts only once it was queued again: in an interactive one, a person may give a command twice.
    """
    requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    return [name for name in names if name in noted and (requeued or name != _job())]


def _job() -> str:
    return f"SLURM job {os.environ.get('SLURM_JOB_ID')}"
