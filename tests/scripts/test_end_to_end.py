"""quickstart.sh, from data to scores, with a small budget; and a training on real MRI."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CHECKOUT, infer, train
from states import rows

from dints.network.architecture import load_architecture
from dints.network.model_file import load_model
from dints.running.run_folder import WRITTEN

pytestmark = pytest.mark.slow


def test_quickstart(tmp_path):
    results = tmp_path / "results"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ACTIVE": "1",
        "DATA_ROOT": str(tmp_path / "Task00_Phantom"),
        "OUTPUT_ROOT": str(results),
        "SEARCH_ITERATIONS": "1",
        "CANDIDATE_ITERATIONS": "4",
        "TRAIN_ITERATIONS": "6",
    }
    command = ["bash", str(CHECKOUT / "quickstart.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    check_files(done.stdout, results)
    # Guessing one class everywhere gives less than 0.1.
    assert printed_dice(done.stdout, results)["liver"] > 0.2


def check_files(said: str, results: Path) -> None:
    """Check that all files that are named in the end are there, and fit together."""
    ends = said.partition("== done")[2].splitlines()
    parts = [line.split(str(results)) for line in ends if str(results) in line]
    files = {str(results) + rest.strip() for _, *rests in parts for rest in rests}
    assert len(files) >= 9 and all(Path(file).exists() for file in files), files
    model = load_model(results / "train" / "best_metric_model.pth")
    winner = load_architecture(results / "evolve" / "search_code_winner.pth")
    assert model.architecture.codes() == winner.codes()
    assert model.info["channel_mul"] == winner.channel_mul
    assert {row["kind"] for row in rows(results / "evolve" / "candidates.csv")} >= {
        "given",
        "mutant",
    }
    stages = (results / stage for stage in ("search", "evolve", "train"))
    for path in (path for stage in stages for path in stage.iterdir()):
        # Else a fresh start would leave it.
        assert path.name == ".lock" or any(map(path.match, WRITTEN)), path


def printed_dice(said: str, results: Path) -> dict[str, float]:
    """Return each class's Dice, which must be the mean of those in scores.csv, of cases that are
    segmented.
    """
    scores = rows(results / "segmentations" / "scores.csv")
    assert scores and all((results / "segmentations" / row["case"]).exists() for row in scores)
    (line,) = re.findall(r"^Dice \S+ \((.*)\)$", said, re.MULTILINE)
    names = [name for name in scores[0] if name != "case"]
    dice = {name: float(re.search(rf"{name} (\S+?)(?:,|$| )", line).group(1)) for name in names}
    for name, value in dice.items():
        present = [float(row[name]) for row in scores if row[name]]
        assert abs(sum(present) / len(present) - value) < 1e-3
    return dice


def test_real_mri(tmp_path, task04):
    """24 of the 208 cases are enough to learn something."""
    root = tmp_path / "Task04_Hippocampus"
    description = json.loads((task04 / "dataset.json").read_text())
    description["training"] = description["training"][:24]
    for path in (path for entry in description["training"] for path in entry.values()):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(task04 / path, root / path)
    (root / "dataset.json").write_text(json.dumps(description))
    few = "--recipe recommended --patch_size 32 32 32 --num_folds 4 --channel_mul 0.25"
    long = "--num_images_per_batch 2 --learning_rate 0.05 --num_iterations 16"
    once = "--num_epochs 8 --num_epochs_per_validation 8"
    network = CHECKOUT / "experiments" / "architectures" / "u_shaped_skip_9x3.pth"
    folder = train(root, tmp_path / "train", network, few, long, once)
    model = ["--checkpoint", folder / "best_metric_model.pth"]
    data = ["--root", root, "--num_folds 4 --overlap_ratio 0"]
    scores = rows(infer(tmp_path / "masks", *model, *data) / "scores.csv")
    assert len(scores) == 6
    for name in ("Anterior", "Posterior"):
        assert sum(float(row[name]) for row in scores) / 6 > 0.3
