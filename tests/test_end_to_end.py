"""quickstart.sh, from data to scores, with a small budget: on the phantom and on real MRI."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from dints.architecture import load_architecture
from dints.network import load_model

CHECKOUT = Path(__file__).resolve().parents[1]


def quickstart(tmp_path: Path, search_iterations: int, train_iterations: int, **environment: str) -> tuple[str, Path]:
    """Run it in the environment that runs this test; returns what it printed and its results folder."""
    results = tmp_path / "results"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ACTIVE": "1",
        "OUTPUT_ROOT": str(results),
        "SEARCH_ITERATIONS": str(search_iterations),
        "TRAIN_ITERATIONS": str(train_iterations),
        **environment,
    }
    command = ["bash", str(CHECKOUT / "quickstart.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, results


def check_results(said: str, results: Path) -> dict[str, float]:
    """Everything that is promised is there and fits together; returns the Dice of each class that was printed."""
    (code,) = re.findall(r"^architecture +(\S+)$", said, re.MULTILINE)
    _, architecture, task, _ = load_model(results / "train" / "best_metric_model.pth")
    assert architecture.same_network(load_architecture(code))
    for folder in ("search", "train"):
        assert {"training_loss.png", "validation_metric.png"} <= {path.name for path in (results / folder).iterdir()}
    assert (results / "architecture.gv").exists()
    with (results / "segmentations" / "scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    assert all((results / "segmentations" / row["case"]).exists() for row in scores)
    (line,) = re.findall(r"^Dice \S+ \((.*)\)$", said, re.MULTILINE)
    dice = {name: float(re.search(rf"{name} (\S+?)(?:,|$| )", line).group(1)) for name in task.class_names[1:]}
    for name, value in dice.items():
        present = [float(row[name]) for row in scores if row[name]]
        assert abs(sum(present) / len(present) - value) < 1e-3
    return dice


def test_phantom(tmp_path):
    data = tmp_path / "Task00_Phantom"
    said, results = quickstart(tmp_path, 20, 40, DATA_ROOT=str(data))
    dice = check_results(said, results)
    assert dice["liver"] > 0.2  # after two minutes' training; guessing one class everywhere gives less than 0.1


def test_real_mri(tmp_path, task04):
    """24 of the 208 cases, which is enough to learn something within a minute."""
    root = tmp_path / "Task04_Hippocampus"
    description = json.loads((task04 / "dataset.json").read_text())
    description["training"] = description["training"][:24]
    for path in (path for entry in description["training"] for path in entry.values()):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(task04 / path, root / path)
    (root / "dataset.json").write_text(json.dumps(description))
    said, results = quickstart(tmp_path, 20, 90, TASK="Task04_Hippocampus", DATA_ROOT=str(root))
    dice = check_results(said, results)
    assert min(dice.values()) > 0.4
