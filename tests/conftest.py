"""What several test files use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TASK04 = Path(__file__).resolve().parents[2] / "shared" / "data" / "Task04_Hippocampus"


@pytest.fixture(scope="session")
def task04() -> Path:
    """The folder of real Task04_Hippocampus cases; without one, the test is skipped."""
    folder = Path(os.environ.get("DINTS_TASK04", TASK04))
    if not (folder / "dataset.json").is_file():
        pytest.skip(f"no real cases: DINTS_TASK04 is to name a Task04_Hippocampus folder, and {folder} is none")
    return folder
