"""Whatever stops a run, the same command resumes it, to the same end bit for bit.

Commands are started, and stopped at chosen places, by interrupted.py.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import CHECKOUT
from states import assert_equal, assert_same_end, place_of, progress_of, rows, scalars
from theatre import ENVIRONMENT, EPOCH, Theatre, strike

pytestmark = pytest.mark.slow
WITHIN = 25  # seconds that a stop may take
SIGNALLED = pytest.mark.fault("SIGTERM, SIGINT, preemption")
LOST_RANK = pytest.mark.fault("one rank dies or raises")


def assert_stopped(said: str, folder: Path, iteration: int) -> None:
    """Check that one line says so, and that the state is that of the iteration that it names."""
    (line,) = [line for line in said.splitlines() if line.startswith("stopped")]
    assert line.startswith(f"stopped after iteration {iteration}, with its state in {folder}")
    assert "_dints.py --root" in line and "Traceback" not in said, said
    assert progress_of(folder)["iteration"] == iteration


def stop(theatre: Theatre, stage: str, folder: Path, processes: int, *more, at: dict) -> None:
    """Run the command until a signal stops it after the iteration of ``at``, on all ranks."""
    done = theatre.run(stage, folder, processes, *more, fault=at)
    number = getattr(signal, f"SIG{at['signal']}")
    assert done["codes"] == [128 + number] * processes, "\n".join(done["said"])
    assert done["seconds"] < WITHIN
    assert_stopped("".join(done["said"]), folder, at["iteration"])


def kill(theatre: Theatre, stage: str, folder: Path, processes: int, *more, at: dict) -> None:
    done = theatre.run(stage, folder, processes, *more, "--save_minutes", 0, fault=at)
    assert done["codes"] == [-signal.SIGKILL] * processes, "\n".join(done["said"])


def finish(theatre: Theatre, stage: str, folder: Path, processes: int, *more) -> None:
    """Run the command to the end of the run that nothing stopped."""
    theatre.finish(stage, folder, processes, *more)
    assert_same_end(theatre.straight(stage, processes), folder)


@SIGNALLED
@pytest.mark.parametrize(("stage", "processes", "workers"), [("search", 1, 0), ("train", 2, 2)])
def test_a_run_that_is_stopped_resumes(theatre, tmp_path, stage, processes, workers):
    """Within an epoch, and in a validation, which is then done again."""
    steps, last = EPOCH[processes], processes - 1
    command = theatre, stage, tmp_path, processes, "--num_workers", workers
    middle = steps + steps // 2
    stop(*command, at=strike("step", middle, "TERM", to=last))
    assert place_of(tmp_path) == (1, steps // 2, middle)
    stop(*command, at=strike("validation", 2 * steps, "INT", to=last))
    assert place_of(tmp_path) == (1, steps, 2 * steps)
    assert not (tmp_path / "accuracy_history.csv").exists()
    finish(*command)


@pytest.mark.fault("SIGKILL in the middle of an epoch")
@pytest.mark.fault("SIGKILL while saving")
@pytest.mark.parametrize(("stage", "processes", "workers"), [("search", 2, 2), ("train", 1, 2)])
def test_a_run_that_is_killed_resumes(theatre, tmp_path, stage, processes, workers):
    """In its first save of all, within an epoch, and between results and their save."""
    steps = EPOCH[processes]
    command = theatre, stage, tmp_path, processes, "--num_workers", workers
    middle = steps + steps // 2
    if stage == "train":
        kill(*command, at=strike("save", 0))
        assert {path.suffix for path in tmp_path.glob("*latest.pth*")} == {".partial"}
        kill(*command, at=strike("save", middle + 1))
    else:
        kill(*command, at=strike("step", middle + 1))
    assert place_of(tmp_path) == (1, steps // 2, middle)
    kill(*command, at=strike("recorded", 4 * steps))
    assert place_of(tmp_path) == (3, steps, 4 * steps)
    finish(*command)


@pytest.mark.fault("world size changes between stop and resume")
def test_another_number_of_processes_is_refused_or_said_to_change_the_result(theatre, tmp_path):
    first, more = EPOCH[2], EPOCH[1]
    stop(theatre, "search", tmp_path, 2, at=strike("step", first + 1, "TERM", to=0))
    done = theatre.run("search", tmp_path, 1)
    assert done["codes"] == [1]
    error = one_error(done["said"][0])
    assert "processes was 2 and is 1" in error and "--allow_other_num_processes" in error
    said = theatre.finish("search", tmp_path, 1, "--allow_other_num_processes")
    assert "the run had 2 processes and has 1: it continues, but not to the result" in said
    expected = [first + more * epoch for epoch in range(4)]  # the epoch that was begun begins again
    assert [int(row["iteration"]) for row in rows(tmp_path / "loss_history.csv")] == expected
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == expected
    parts = torch.load(tmp_path / "latest.pth", weights_only=True)["parts"]
    rates = [parts[f"optimizer{name}"]["param_groups"][0]["lr"] for name in ("", "_a", "_c")]
    assert rates == [0.025 * 0.5, 0.1, 0.1]  # those of one process


def one_error(said: str) -> str:
    """Return the line that is the error, of a rank that says nothing else that is unusual."""
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said, said
    return line


@LOST_RANK
def test_where_a_rank_dies_the_others_say_so_in_one_line(theatre, tmp_path):
    at = strike("step", EPOCH[2] + 2, to=1)
    done = theatre.run("train", tmp_path, 2, "--num_workers", 1, fault=at)
    assert done["codes"] == [1, -signal.SIGKILL] and done["seconds"] < WITHIN
    assert "[rank 0] the connection to another process broke" in one_error(done["said"][0])


@pytest.mark.fault("GPU or host memory exhausted")
def test_where_a_worker_is_killed_one_line_says_so(theatre, tmp_path):
    at = strike("step", 2, to="worker")
    done = theatre.run("train", tmp_path, 1, "--num_workers", 1, fault=at)
    assert done["codes"] == [1]
    assert "a process that prepares batches died" in one_error(done["said"][0])


@LOST_RANK
def test_a_case_that_one_rank_cannot_read_ends_all(theatre, tmp_path):
    root = shutil.copytree(theatre.root, tmp_path / "data" / theatre.root.name)
    image = sorted((root / "imagesTr").glob("*.nii.gz"))[3]
    os.truncate(image, image.stat().st_size - 9)
    more = "--root", root, "--fold", "all", "--num_workers", 1
    done = theatre.run("train", tmp_path / "run", 2, *more)
    assert done["codes"] == [1, 1]
    errors = [one_error(said) for said in done["said"]]
    assert sum(image.name in error for error in errors) == 1, errors


@LOST_RANK
def test_where_a_rank_hangs_the_others_wait_for_timeout_minutes_and_name_it(theatre, tmp_path):
    at = strike("step", 2, "STOP", to=1)
    done = theatre.run("search", tmp_path, 2, "--timeout_minutes", 0.05, fault=at)
    assert done["codes"] == [1, -signal.SIGKILL] and 3 < done["seconds"] < WITHIN
    assert "[rank 0] rank 1 did not answer for --timeout_minutes 0.05" in one_error(done["said"][0])


@pytest.mark.fault("non-finite loss on one rank")
def test_a_loss_of_one_rank_that_is_not_finite_changes_no_weights_and_many_stop_all(
    theatre, tmp_path
):
    at = strike("step", 4, "NAN", to=1) | {"until": 5}
    assert theatre.run("train", tmp_path / "two", 2, fault=at)["codes"] == [0, 0]
    paths = (tmp_path / "two" / f"rank{rank}.pth" for rank in (0, 1))
    assert assert_equal(*(torch.load(path, weights_only=True) for path in paths)) > 5
    done = theatre.run("train", tmp_path / "many", 2, fault=at | {"until": 99})
    assert done["codes"] == [1, 1]
    (error,) = {one_error(said).split("] ", 1)[1] for said in done["said"]}  # the same on both
    cases = r"\(cases phantom_\d+, phantom_\d+\), and in"  # of one rank's batch
    assert re.match(f"the loss is not finite at iteration 4 {cases}", error), error
    weights = torch.load(tmp_path / "many" / "latest.pth", weights_only=True)["parts"]["network"]
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@SIGNALLED
def test_torchrun_passes_a_signal_on_and_the_same_command_resumes(theatre, tmp_path):
    """The whole of it in real processes, as a user gives the command."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [CHECKOUT / "train_dints.py", *theatre.flags("train", tmp_path, "--num_workers", 1)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **streams, env=ENVIRONMENT, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "loss_history.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=WITHIN)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    lines = [line for line in said.splitlines() if line.startswith("stopped after iteration")]
    assert len(lines) == 1, said
    assert f"stopped after iteration {progress_of(tmp_path)['iteration']}, " in lines[0]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_end(theatre.straight("train", 2), tmp_path, ignored="rank")
