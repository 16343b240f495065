"""What several test files use, and the marker of the tests that provoke a fault."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults import COLLECTED, TESTS

TASK04 = Path(__file__).resolve().parents[2] / "shared" / "data" / "Task04_Hippocampus"


@pytest.fixture(scope="session")
def task04() -> Path:
    """The folder of real Task04_Hippocampus cases; without one, the test is skipped."""
    folder = Path(os.environ.get("DINTS_TASK04", TASK04))
    if not (folder / "dataset.json").is_file():
        pytest.skip(f"no real cases: DINTS_TASK04 is to name a Task04_Hippocampus folder, and {folder} is none")
    return folder


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(name): provokes this fault")
    config.addinivalue_line("markers", "slow: takes more than about 2 s")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what tests/faults.py names, and keep which files were collected whole and what is in them."""
    parts = {argument.split("::")[0] for argument in config.args if "::" in argument}
    found = set()
    for item in items:
        function = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        names = {function, f"{item.path.name}::{item.name}"}
        found |= names
        if names & TESTS:
            item.add_marker("fault")
    whole_files = {item.path.name for item in items if not any(item.path.match(part) for part in parts)}
    config.stash[COLLECTED] = whole_files, found
