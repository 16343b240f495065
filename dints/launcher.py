"""What a launcher (torchrun or ``launch/agent.py``) tells each process; nothing else reads these variables."""

from __future__ import annotations

import os


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
