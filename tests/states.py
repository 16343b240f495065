"""What runs leave behind, read, and compared but for what differs from run to run: times, and where
the folder lies.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# The cost has a latency; each run has an identity of its own.
MEASURED = {
    "run",
    "seconds",
    "seconds_per_iteration",
    "seconds_in_epoch",
    "data_wait",
    "minutes",
    "cost",
}


def progress_of(folder: Path, name: str = "latest.pth") -> dict:
    return torch.load(folder / name, weights_only=True)["progress"]


def place_of(folder: Path) -> tuple[int, int, int]:
    """Return completed epochs, steps of the one after, and iteration of the last state."""
    progress = progress_of(folder)
    return progress["epoch"], progress["step"], progress["iteration"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values of each curve, as TensorBoard's own reader finds them."""
    events = EventAccumulator(str(folder / "Events"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def without_measured(content: object) -> object:
    """Return a nested state without what is measured, and of absolute paths the file's name
    only.
    """
    if isinstance(content, dict):
        return {
            key: without_measured(value)
            for key, value in content.items()
            if str(key).split("/")[-1] not in MEASURED
        }
    if isinstance(content, (list, tuple)):
        return [without_measured(value) for value in content]
    return Path(content).name if isinstance(content, str) and content.startswith("/") else content


def assert_equal(first: object, second: object, where: str = "state") -> int:
    """Check that every tensor and value of two nested states is equal, to the bit; return the
    number of tensors.
    """
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
        return 1
    if isinstance(first, dict):
        assert list(first) == list(second), where
        return sum(assert_equal(first[key], second[key], f"{where}.{key}") for key in first)
    if isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        return sum(
            assert_equal(a, b, f"{where}[{i}]")
            for i, (a, b) in enumerate(zip(first, second, strict=True))
        )
    assert first == second, where
    return 0


def assert_same_end(straight: Path, other: Path, ignored: str = "") -> None:
    """Check that two runs left the same: states, networks, tables, curves, and no file that is half
    written.

    Args:
        ignored: opening of the names of files that only one of them has.
    """
    found = [
        {
            path.name: path
            for path in folder.glob("*.pth")
            if not ignored or not path.name.startswith(ignored)
        }
        for folder in (straight, other)
    ]
    assert found[0].keys() == found[1].keys()
    for name in found[0].keys() - {"previous.pth"}:  # which is of wherever the run was stopped
        states = [without_measured(torch.load(paths[name], weights_only=True)) for paths in found]
        assert assert_equal(*states, name) >= (0 if "search_code" in name else 5)
    for read in (
        lambda folder: rows(folder / "loss_history.csv"),
        lambda folder: rows(folder / "accuracy_history.csv"),
        lambda folder: yaml.safe_load((folder / "progress.yaml").read_text()),
        scalars,
    ):
        assert_equal(*(without_measured(read(folder)) for folder in (straight, other)), "history")
    assert not list(other.glob(".*.partial"))
