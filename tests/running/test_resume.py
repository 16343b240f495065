"""Whatever stops a run, the same command resumes it, to the same end bit for bit.

Commands are started, and stopped at chosen places, by interrupted.py. Of the sixteen combinations
of stage, processes, workers and kind of stop, five are tried in which each value meets each value
of the others.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from states import assert_equal, assert_same_end, place_of, progress_of, rows, scalars
from theatre import ENVIRONMENT, EPOCH, Theatre

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).resolve().parents[2]
WITHIN = 25  # seconds that a stop may take
SIGNALLED, LOST_RANK = (
    pytest.mark.fault("SIGTERM, SIGINT, preemption"),
    pytest.mark.fault("one rank dies or raises"),
)


def strike(place: str, iteration: int = 0, name: str = "KILL", to: int | str = "all") -> dict:
    return {"place": place, "iteration": iteration, "signal": name, "to": to}


def assert_stopped(said: str, folder: Path, iteration: int) -> None:
    """Check that one line says so, and that the state is that of the iteration that it names."""
    lines = [line for line in said.splitlines() if line.startswith("stopped")]
    assert len(lines) == 1 and lines[0].startswith(
        f"stopped after iteration {iteration}, with its state in {folder}"
    )
    assert "_dints.py --root" in lines[0] and "Traceback" not in said, said
    assert progress_of(folder)["iteration"] == iteration


def stop(
    theatre: Theatre, stage: str, folder: Path, processes: int, *more: object, at: dict
) -> None:
    """Run the command until a signal stops it after the iteration of ``at``, on all ranks."""
    done = theatre.run(stage, folder, processes, *more, fault=at)
    number = getattr(signal, f"SIG{at['signal']}")
    assert done["codes"] == [128 + number] * processes, "\n".join(done["said"])
    assert done["seconds"] < WITHIN
    assert_stopped("".join(done["said"]), folder, at["iteration"])


def kill(
    theatre: Theatre, stage: str, folder: Path, processes: int, *more: object, at: dict
) -> None:
    done = theatre.run(stage, folder, processes, *more, fault=at)
    assert done["codes"] == [-signal.SIGKILL] * processes, "\n".join(done["said"])


def finish(
    theatre: Theatre, stage: str, folder: Path, processes: int, *more: object, **how: str
) -> str:
    """Run the command to the end of the run that nothing stopped; return the words of rank 0."""
    said = theatre.finish(stage, folder, processes, *more, **how)
    assert_same_end(theatre.straight(stage, processes), folder)
    return said


# Combinations


@SIGNALLED
@pytest.mark.parametrize(("stage", "processes", "workers"), [("search", 1, 0), ("train", 2, 2)])
def test_a_run_that_is_stopped_resumes(theatre, tmp_path, stage, processes, workers):
    """By each of three signals: within an epoch, in a validation, and in the last epoch.

    The state from within a validation is one from which the validation is done again.
    """
    steps, last = EPOCH[processes], processes - 1
    command = theatre, stage, tmp_path, processes, "--num_workers", workers
    middle, end = steps + steps // 2, 4 * steps - 1
    stop(*command, at=strike("step", middle, "TERM", to=last))
    assert place_of(tmp_path) == (1, steps // 2, middle)
    stop(*command, at=strike("validation", 2 * steps, "INT", to=last))
    assert place_of(tmp_path) == (1, steps, 2 * steps)
    assert not (tmp_path / "accuracy_history.csv").exists()
    stop(*command, at=strike("step", end, "USR1", to="all"))
    assert place_of(tmp_path) == (3, steps - 1, end)
    finish(*command)


@pytest.mark.fault("SIGKILL in the middle of an epoch")
@pytest.mark.parametrize(
    ("stage", "processes", "workers"), [("search", 2, 2), ("train", 1, 2), ("train", 2, 0)]
)
def test_a_run_that_is_killed_resumes(theatre, tmp_path, stage, processes, workers):
    """After a save within an epoch, an epoch after one, and between results and their save."""
    steps = EPOCH[processes]
    command = theatre, stage, tmp_path, processes, "--num_workers", workers
    middle = steps + steps // 2
    kill(*command, "--save_minutes", 0, at=strike("step", middle + 1))
    assert place_of(tmp_path) == (1, steps // 2, middle)
    kill(*command, at=strike("step", 4 * steps))
    assert place_of(tmp_path) == (2, 0, 2 * steps) and len(rows(tmp_path / "loss_history.csv")) == 3
    kill(*command, "--save_minutes", 0, at=strike("recorded", 4 * steps))
    assert place_of(tmp_path) == (3, steps, 4 * steps)
    finish(*command)


# Other places and damages


@SIGNALLED
def test_a_run_that_is_stopped_while_it_reads_the_cases_dies_at_once_and_starts_again(
    theatre, tmp_path
):
    done = theatre.run("search", tmp_path, 1, fault=strike("caching", name="TERM"))
    assert done["codes"] == [-signal.SIGTERM] and done["seconds"] < WITHIN
    finish(theatre, "search", tmp_path, 1)


@pytest.mark.fault("SIGKILL while saving")
def test_a_run_that_is_killed_in_a_write_or_between_its_two_renames_resumes(theatre, tmp_path):
    def killed(where: str, iteration: int) -> None:
        kill(theatre, "train", tmp_path, 1, "--save_minutes", 0, at=strike(where, iteration))

    killed("half written", 0)  # the first save of all
    assert not (tmp_path / "latest.pth").exists() and list(tmp_path.glob(".latest.pth.*.partial"))
    killed("half written", 7)
    assert progress_of(tmp_path)["iteration"] == 6
    assert len(list(tmp_path.glob(".latest.pth.*.partial"))) == 1
    killed("half renamed", 12)
    assert progress_of(tmp_path, "previous.pth")["iteration"] == 11
    assert not (tmp_path / "latest.pth").exists()
    finish(theatre, "train", tmp_path, 1)


@SIGNALLED
def test_a_run_with_averaged_weights_resumes(theatre, tmp_path):
    recommended = "--recipe", "recommended"
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    theatre.finish("train", straight, 1, *recommended)
    stop(theatre, "train", stopped, 1, *recommended, at=strike("step", EPOCH[1] + 2, "TERM"))
    theatre.finish("train", stopped, 1, *recommended)
    assert_same_end(straight, stopped)
    parts = torch.load(stopped / "latest.pth", weights_only=True)["parts"]
    best = torch.load(stopped / "best_metric_model.pth", weights_only=True)
    assert best["iteration"] == 4 * EPOCH[1]
    for name, value in best["state_dict"].items():
        assert torch.equal(value, parts["average"][f"module.{name}"])
    assert not torch.equal(value, parts["network"][name])


@pytest.mark.fault("world size changes between stop and resume")
def test_another_number_of_processes_is_refused_or_said_to_change_the_result(theatre, tmp_path):
    first, more = EPOCH[2], EPOCH[1]
    stop(theatre, "search", tmp_path, 2, at=strike("step", first + 1, "TERM", to=0))
    done = theatre.run("search", tmp_path, 1)
    assert done["codes"] == [1]
    *_, error = done["said"][0].splitlines()
    assert "processes was 2 and is 1" in error and "--allow_other_num_processes" in error
    assert "Traceback" not in done["said"][0]
    said = theatre.finish("search", tmp_path, 1, "--allow_other_num_processes")
    assert "the run had 2 processes and has 1: it continues, but not to the result" in said
    expected = [first + more * epoch for epoch in range(4)]  # the epoch that was begun begins again
    assert [int(row["iteration"]) for row in rows(tmp_path / "loss_history.csv")] == expected
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == expected


def one_error(said: str) -> str:
    """Return the line that is the error, of a rank that says nothing else that is unusual."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


@LOST_RANK
def test_where_a_rank_dies_the_others_say_so_in_one_line_and_the_run_resumes(theatre, tmp_path):
    at = strike("step", EPOCH[2] + 2, to=1)
    done = theatre.run("train", tmp_path, 2, "--num_workers", 1, "--save_minutes", 0, fault=at)
    assert done["codes"] == [1, -signal.SIGKILL] and done["seconds"] < WITHIN
    assert "[rank 0] the connection to another process broke" in one_error(done["said"][0])
    finish(theatre, "train", tmp_path, 2)


@pytest.mark.fault("GPU or host memory exhausted")
def test_where_a_worker_is_killed_one_line_says_so_and_the_run_resumes(theatre, tmp_path):
    more = ("--num_workers", 1, "--save_minutes", 0)
    at = strike("step", EPOCH[1] + 2, to="worker")
    done = theatre.run("train", tmp_path, 1, *more, fault=at)
    assert done["codes"] == [1]
    assert "a process that prepares batches died" in one_error(done["said"][0])
    finish(theatre, "train", tmp_path, 1)


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
    at = strike("step", EPOCH[2] + 2, "STOP", to=1)
    more = "--num_workers", 1, "--timeout_minutes", 0.1
    done = theatre.run("search", tmp_path, 2, *more, fault=at)
    assert done["codes"] == [1, -signal.SIGKILL] and 6 < done["seconds"] < WITHIN
    assert "[rank 0] rank 1 did not answer for --timeout_minutes 0.1" in one_error(done["said"][0])


@pytest.mark.fault("non-finite loss on one rank")
def test_a_loss_of_one_rank_that_is_not_finite_changes_no_weights_and_many_stop_all(
    theatre, tmp_path
):
    at = strike("step", 4, "NAN", to=1) | {"until": 5}
    assert theatre.run("train", tmp_path / "two", 2, fault=at)["codes"] == [0, 0]
    paths = (tmp_path / "two" / f"rank{rank}.pth" for rank in (0, 1))
    states = [torch.load(path, weights_only=True) for path in paths]
    assert assert_equal(*states) > 5
    assert progress_of(tmp_path / "two")["iteration"] == 4 * EPOCH[2]
    done = theatre.run("train", tmp_path / "many", 2, fault=at | {"until": 99})
    assert done["codes"] == [1, 1]
    errors = {one_error(said).split("] ", 1)[1] for said in done["said"]}
    (error,) = errors  # on both; the cases are those of one rank's batch
    cases = r"\(cases phantom_\d+, phantom_\d+\), and in"
    assert re.match(f"the loss is not finite at iteration 4 {cases}", error), error
    weights = torch.load(tmp_path / "many" / "latest.pth", weights_only=True)["parts"]["network"]
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


# Fresh starts


def test_a_model_file_of_another_run_is_not_taken_for_this_ones(theatre, tmp_path):
    other = theatre.straight("train", 1) / "best_metric_model.pth"
    kill(theatre, "train", tmp_path, 1, "--save_minutes", 0, at=strike("step", EPOCH[1] + 2))
    shutil.copy(other, tmp_path)
    done = theatre.run("train", tmp_path, 1)
    assert done["codes"] == [1]
    refusal = f"error: {tmp_path}/best_metric_model.pth is not of this run: move it away"
    assert one_error(done["said"][0]).startswith(refusal)


@pytest.mark.fault("torchrun --max-restarts")
def test_processes_that_are_started_again_continue_their_launchs_fresh_start(theatre, tmp_path):
    theatre.finish("train", tmp_path, 2, "--seed", 5)
    never, launch, middle = ("--resume", "never"), f"{tmp_path}/logs/run_a/attempt_", EPOCH[2] + 2
    run = "train", tmp_path, 2, *never, "--save_minutes", 0
    done = theatre.run(*run, fault=strike("step", middle), launch=f"{launch}0")
    assert done["codes"] == [-signal.SIGKILL] * 2
    done = theatre.run(*run, fault=strike("step", middle + 1, "TERM"), launch=f"{launch}1")
    said = "".join(done["said"])
    assert done["codes"] == [128 + signal.SIGTERM] * 2
    assert f"continuing after epoch 1, iteration {middle - 1}" in said
    (line,) = [line for line in said.splitlines() if line.startswith("stopped")]
    assert "the same command without --resume never continues it: train_dints.py" in line
    assert "never" not in line[-200:]
    finish(theatre, "train", tmp_path, 2, *never, launch=f"{launch}2")
    assert (tmp_path / "before_1/latest.pth").exists() and not (tmp_path / "before_2").exists()


# Commands as they are given


def command(theatre: Theatre, stage: str, folder: Path, processes: int, *more: object) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = str(CHECKOUT / f"{stage}_dints.py")
    launcher = launcher if processes > 1 else []
    return [sys.executable, *launcher, script, *theatre.flags(stage, folder, *more)]


def signalled(
    arguments: list[str], folder: Path, send: Callable[[subprocess.Popen], None]
) -> tuple[int, str]:
    """Return exit code and stderr of a command to which ``send`` sends a signal after an epoch."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(arguments, **streams, env=ENVIRONMENT, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "loss_history.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
        send(process)
        _, said = process.communicate(timeout=WITHIN)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def complete(arguments: list[str], straight: Path, folder: Path) -> None:
    """Give the command again; it must end as the run that nothing stopped."""
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_end(straight, folder, ignored="rank")


@SIGNALLED
def test_ctrl_c_stops_a_command_and_its_workers_and_its_last_line_continues_it(theatre, tmp_path):
    arguments = command(theatre, "search", tmp_path, 1, "--num_workers", 2)
    send = lambda process: os.killpg(process.pid, signal.SIGINT)  # noqa: E731
    code, said = signalled(arguments, tmp_path, send)
    assert code == 130, said
    assert_stopped(said, tmp_path, progress_of(tmp_path)["iteration"])
    line = said.rsplit("the same command continues it: ", 1)[1]
    complete([sys.executable, *shlex.split(line)], theatre.straight("search", 1), tmp_path)


@SIGNALLED
def test_torchrun_passes_a_signal_on_to_ranks_that_stop_after_the_same_step(theatre, tmp_path):
    arguments = command(theatre, "train", tmp_path, 2, "--num_workers", 1)
    code, said = signalled(arguments, tmp_path, lambda process: process.send_signal(signal.SIGTERM))
    assert code != 0
    lines = [line for line in said.splitlines() if line.startswith("stopped after iteration")]
    assert len(lines) == 1, said
    assert f"stopped after iteration {progress_of(tmp_path)['iteration']}, " in lines[0]
    complete(arguments, theatre.straight("train", 2), tmp_path)
