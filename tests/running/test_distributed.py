"""Two gloo ranks: identical states, every case counted once, and the same scores as one process."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch
from commands import CHECKOUT, ON_CPU, words
from states import assert_equal, rows
from theatre import ENVIRONMENT

pytestmark = pytest.mark.slow


@pytest.mark.fault("unequal training steps per rank")
@pytest.mark.parametrize("stage", ["search", "train"])
def test_ranks_hold_identical_states_and_published_learning_rates(stage, theatre):
    folder = theatre.straight(stage, 2)
    first, second = (torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    assert assert_equal(first, second) > 50
    assert [int(row["iteration"]) for row in rows(folder / "loss_history.csv")] == [3, 6, 9, 12]
    parts = first["parts"]
    # Twice the rate of one process, halved at the milestones that are past in the last epoch.
    expected = 2 * 0.025 * 0.5 ** (1 if stage == "search" else 3)
    assert parts["optimizer"]["param_groups"][0]["lr"] == expected
    for name in ("optimizer_a", "optimizer_c") if stage == "search" else ():
        assert parts[name]["param_groups"][0]["lr"] == 2 * 0.1
        (alpha,) = parts[name]["state"].values()
        # Three epochs after the warm-up, of ceil(5 cases / 2 ranks) steps.
        assert alpha["step"] == 3 * 3 and alpha["exp_avg"].abs().max() > 0


def test_one_process_and_two_agree_on_inference(theatre, tmp_path):
    tables, model = [], theatre.straight("train", 2) / "best_metric_model.pth"
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        flags = words("--checkpoint", model, "--root", theatre.root, "--num_folds 4", ON_CPU)
        done = theatre.command("infer", processes, *flags, "--output_root", folder)
        assert done["codes"] == [0] * processes, done["said"]
        tables.append(rows(folder / "scores.csv"))
    assert len(tables[0]) == 3  # fold 0 of 4 of thirteen cases
    for one, two in zip(*tables, strict=True):
        assert one.pop("case") == two.pop("case") and one.keys() == two.keys()
        dice = [[float(value or "nan") for value in row.values()] for row in (one, two)]
        assert dice[0] == pytest.approx(dice[1], abs=1e-4, nan_ok=True)


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
    assert "on 2 x cpu" in said and len(rows(tmp_path / "run" / "accuracy_history.csv")) == 1
