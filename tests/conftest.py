"""Several test files use these fixtures and markers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dints.data.phantom import write_phantom

TASK04 = Path(__file__).resolve().parents[2] / "shared" / "data" / "Task04_Hippocampus"
MARKERS = (
    "fault(name): provokes this fault of those that the scripts survive; -m fault runs all of them",
    "pictures: runs draw what users' runs draw",
    "slow: takes more than two seconds; tests/run.sh --quick leaves it out",
)


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    """Make a small dataset of eight training and two test cases; nobody writes into it."""
    return write_phantom(
        tmp_path_factory.mktemp("phantom") / "Task00_Phantom", num_training=8, num_test=2
    )


@pytest.fixture(scope="session")
def task04() -> Path:
    """Find the folder of real Task04_Hippocampus cases; without one, the test is skipped."""
    folder = Path(os.environ.get("DINTS_TASK04", TASK04))
    if not (folder / "dataset.json").is_file():
        pytest.skip(
            "no real cases: DINTS_TASK04 is to name a Task04_Hippocampus folder, and "
            f"{folder} is none"
        )
    return folder


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch) -> None:
    """Leave out a run's pictures, which take longer than its steps, but in tests of them."""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr("dints.running.curves.draw_all", lambda _: None)
        if "dints.network.arch_file" in sys.modules:
            monkeypatch.setattr("dints.network.arch_file.draw_architecture", lambda *_, **__: None)


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Have networks double volumes as they do on a GPU, and leave the rest to PyTorch's own calls,
    all on the CPU.
    """
    monkeypatch.setattr("dints.network.fast.layers._is_on_gpu", lambda image: image.ndim == 5)
    monkeypatch.setattr("dints.network.fast.layers._can_take", lambda image: False)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that hold slow tests first, so that no process waits in the end; and refuse a mark
    without a name.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        for mark in item.iter_markers("fault"):
            if not (len(mark.args) == 1 and isinstance(mark.args[0], str) and mark.args[0].strip()):
                raise pytest.UsageError(
                    f"{item.nodeid}: give the fault's name, as in pytest.mark.fault('disk full')"
                )
