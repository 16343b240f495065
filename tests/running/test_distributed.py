"""Two gloo ranks: identical states, every case counted once, and the same scores as one process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import published
import pytest
import torch
from commands import CHECKOUT, ON_CPU, words
from small_run import CPU, begun
from states import assert_equal, rows
from theatre import ENVIRONMENT

from dints.data.cache import open_cache
from dints.data.dataset import open_fold
from dints.network.model_file import load_model
from dints.running.precision import Precision
from dints.settings import DataSettings, WindowSettings
from dints.training.validation import open_validation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(theatre) -> Path:
    return theatre.straight("train", 2)


@pytest.mark.fault("unequal training steps per rank")
@pytest.mark.parametrize("stage", ["search", "train"])
def test_ranks_hold_identical_states(stage, theatre):
    folder = theatre.straight(stage, 2)
    first, second = (torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    assert assert_equal(first, second) > 50
    assert [int(row["iteration"]) for row in rows(folder / "loss_history.csv")] == [3, 6, 9, 12]
    for optimizer in ("optimizer_a", "optimizer_c") if stage == "search" else ():
        (alpha,) = first["parts"][optimizer]["state"].values()
        # Three epochs after the warm-up, of ceil(5 cases / 2 ranks) steps.
        assert alpha["step"] == 3 * 3
        assert alpha["exp_avg"].abs().max() > 0


def test_learning_rates_are_multiplied_by_the_processes_as_published_optimizers_are(
    theatre, tmp_path
):
    """Also where another number of processes continues a run."""

    def rates(folder: Path) -> dict[str, float]:
        parts = torch.load(folder / "latest.pth", weights_only=True)["parts"]
        optimizers = {name: part for name, part in parts.items() if name.startswith("optimizer")}
        return {name: part["param_groups"][0]["lr"] for name, part in optimizers.items()}

    precision = Precision("fp32", CPU)
    oracle = published.Search(1, 2, 0.125, 1, 3, precision, learning_rate_arch=0.1, num_processes=2)
    weights, *arch = (optimizer.param_groups[0]["lr"] for optimizer in oracle.optimizers)
    assert (weights, *arch) == (0.05, 0.2, 0.2)
    last = {"search": 0.5, "train": 0.5**3}  # what milestones leave in the last of the four epochs
    expected = {"search": {"optimizer_a": arch[0], "optimizer_c": arch[1]}, "train": {}}
    for stage, of_arch in expected.items():
        assert rates(theatre.straight(stage, 2)) == {"optimizer": weights * last[stage], **of_arch}
    recommended = tmp_path / "recommended"
    theatre.finish("search", recommended, 2, "--recipe", "recommended", "--num_epochs", 2)
    assert rates(recommended) == {"optimizer": 0.025, "optimizer_a": 0.1, "optimizer_c": 0.1}
    two = tmp_path / "two"
    fault = {"place": "step", "iteration": 4, "signal": "TERM", "to": 0}
    stopped = theatre.run("search", two, 2, fault=fault)
    assert stopped["codes"] == [128 + signal.SIGTERM] * 2 and rates(two)["optimizer_a"] == 0.2
    theatre.finish("search", two, 1, "--allow_other_num_processes")
    assert rates(two) == {"optimizer": 0.025 * 0.5, "optimizer_a": 0.1, "optimizer_c": 0.1}


def test_one_process_and_two_agree_on_inference(theatre, trained, tmp_path):
    tables = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        model = trained / "best_metric_model.pth"
        flags = words("--checkpoint", model, "--root", theatre.root, "--num_folds 4", ON_CPU)
        done = theatre.command("infer", processes, *flags, "--output_root", folder)
        assert done["codes"] == [0] * processes, done["said"]
        tables.append(rows(folder / "scores.csv"))
    assert len(tables[0]) == 3  # fold 0 of 4 of thirteen cases
    for one, two in zip(*tables, strict=True):
        assert one.pop("case") == two.pop("case") and one.keys() == two.keys()
        dice = [[float(value or "nan") for value in row.values()] for row in (one, two)]
        assert dice[0] == pytest.approx(dice[1], abs=1e-4, nan_ok=True)


def test_validation_in_training_agrees_with_one_process(theatre, trained, tmp_path):
    """The Dice of two ranks in training is that of one process for the weights that were saved."""
    model, run = load_model(trained / "best_metric_model.pth"), begun(tmp_path)
    run.restore()
    own = {"patch_size": model.task.patch_size, "spacing": (5, 5, 5)}
    fold = open_fold(DataSettings(root=theatre.root, num_folds=4, **own))
    cache = open_cache(fold, run)
    validation = open_validation(fold.validation, cache, WindowSettings(overlap_ratio=0.0), run)
    assert validation(model.network).mean == pytest.approx(model.info["dice"], abs=1e-4)


@pytest.mark.fault("fewer cases than ranks; a rank without validation cases")
def test_fewer_validation_cases_than_ranks(theatre, tmp_path):
    theatre.finish("train", tmp_path, 2, "--num_folds", 12, "--num_epochs", 1)
    (row,) = rows(tmp_path / "accuracy_history.csv")
    assert 0 <= float(row["dice"]) <= 1


def test_two_nodes_through_the_launcher(theatre, tmp_path):
    """Two agents on the loopback, each with one process, meet and run one search."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**ENVIRONMENT, "PYTHON": sys.executable, "MASTER_PORT": str(port)}
    environment |= {"TASK": "Task00_Phantom", "DATA_ROOT": str(theatre.root), "FOLD": "0"}
    environment |= {"NUM_NODES": "2", "NUM_GPUS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment["OUTPUT_ROOT"] = str(tmp_path / "run")
    flags = theatre.flags("search", tmp_path / "run", "--num_workers", 0, "--num_epochs", 2)
    command = ["bash", str(CHECKOUT / "search_dints.sh"), *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environments = [{**environment, "NODE_RANK": rank} for rank in "01"]
    nodes = [subprocess.Popen(command, env=own, **streams) for own in environments]
    said = "".join(node.communicate(timeout=200)[0] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "on 2 x cpu" in said
    (row,) = rows(tmp_path / "run" / "accuracy_history.csv")
    assert 0 <= float(row["dice"]) <= 1
