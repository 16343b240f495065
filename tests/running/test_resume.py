"""Whatever stops a run, the same command continues it, to the same end as if nothing had happened, bit for bit.

A play starts commands and stops them at chosen places (see interrupted.py); two plays go on at a time. Of the sixteen
combinations of stage, processes, workers and kind of stop, five are played in which each value meets each value of the
others; DINTS_RESUME_ALL=1 plays all.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from states import assert_equal, assert_same_end, progress_of, rows, scalars
from theatre import ENVIRONMENT, EPOCH, Theatre

CHECKOUT = Path(__file__).resolve().parents[2]
WITHIN = 25  # seconds that a stop may take
Play = Callable[[Theatre, Path], None]
PLAYS: dict[str, tuple[Play, str | None]] = {}  # by what they show: with the name of a fault


def play(what: str, fault: str | None = None) -> Callable[[Play], Play]:
    def register(function: Play) -> Play:
        PLAYS[what] = function, fault
        return function

    return register


@pytest.fixture(scope="module")
def plays(request, theatre, tmp_path_factory):
    """The plays that were asked for, all begun."""
    wanted = [item.callspec.params["what"] for item in request.session.items if item.path == request.path]
    return {what: theatre.pool.submit(PLAYS[what][0], theatre, tmp_path_factory.mktemp("play")) for what in wanted}


def strike(place: str, iteration: int | None = None, name: str = "KILL", to: int | str = "all") -> dict:
    return {"place": place, "iteration": iteration, "signal": name, "to": to}


def assert_stopped(said: str, folder: Path, iteration: int) -> None:
    """Check that one line says so, and that the state is that of the iteration that it names."""
    lines = [line for line in said.splitlines() if line.startswith("stopped")]
    assert len(lines) == 1 and lines[0].startswith(f"stopped after iteration {iteration}, with its state in {folder}")
    assert "_dints.py --root" in lines[0] and "Traceback" not in said, said
    assert progress_of(folder)["iteration"] == iteration


def stop(theatre: Theatre, stage: str, folder: Path, processes: int, *more: object, at: dict) -> None:
    """Run the command until a signal stops it after the iteration of ``at``, on all ranks."""
    done = theatre.run(stage, folder, processes, *more, fault=at)
    number = getattr(signal, f"SIG{at['signal']}")
    assert done["codes"] == [128 + number] * processes, "\n".join(done["said"])
    assert done["seconds"] < WITHIN
    assert_stopped("".join(done["said"]), folder, at["iteration"])


def kill(theatre: Theatre, stage: str, folder: Path, processes: int, *more: object, at: dict) -> None:
    done = theatre.run(stage, folder, processes, *more, fault=at)
    assert done["codes"] == [-signal.SIGKILL] * processes, "\n".join(done["said"])


def finish(theatre: Theatre, stage: str, folder: Path, processes: int, *more: object) -> str:
    """Run the command to its end, which must be that of the run that nothing stopped; return what rank 0 said."""
    said = theatre.finish(stage, folder, processes, *more)
    assert_same_end(theatre.straight[stage, processes].result(), folder)
    return said


def place_of(folder: Path) -> tuple[int, int, int]:
    """Return completed epochs, steps of the one after, and iteration of the last state."""
    progress = progress_of(folder)
    return progress["epoch"], progress["step"], progress["iteration"]


# Combinations


def stopped_run(theatre: Theatre, folder: Path, stage: str, processes: int, workers: int) -> None:
    """Stop by each of the three signals: in the middle of an epoch, in a validation, and in the last epoch.

    The state from within a validation is one from which the validation is done again.
    """
    steps, last = EPOCH[processes], processes - 1
    command = theatre, stage, folder, processes, "--num_workers", workers
    middle, end = steps + steps // 2, 4 * steps - 1
    stop(*command, at=strike("step", middle, "TERM", to=last))
    assert place_of(folder) == (1, steps // 2, middle)
    stop(*command, at=strike("validation", 2 * steps, "INT", to=last))
    assert place_of(folder) == (1, steps, 2 * steps) and not (folder / "accuracy_history.csv").exists()
    stop(*command, at=strike("step", end, "USR1", to="all"))
    assert place_of(folder) == (3, steps - 1, end)
    finish(*command)


def killed_run(theatre: Theatre, folder: Path, stage: str, processes: int, workers: int) -> None:
    """Kill after a save within an epoch, one epoch after the last save, and between results and their save."""
    steps = EPOCH[processes]
    command = theatre, stage, folder, processes, "--num_workers", workers
    middle = steps + steps // 2
    kill(*command, "--save_minutes", 0, at=strike("step", middle + 1))
    assert place_of(folder) == (1, steps // 2, middle)
    kill(*command, at=strike("step", 4 * steps))
    assert place_of(folder) == (2, 0, 2 * steps) and len(rows(folder / "loss_history.csv")) == 3
    kill(*command, "--save_minutes", 0, at=strike("recorded", 4 * steps))
    assert place_of(folder) == (3, steps, 4 * steps)
    finish(*command)


VALUES = (("search", "train"), (1, 2), (0, 2), ("stopped", "killed"))
COVERING = ((0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0))
for indices in itertools.product((0, 1), repeat=4) if os.environ.get("DINTS_RESUME_ALL") else COVERING:
    stage, processes, workers, manner = (values[index] for values, index in zip(VALUES, indices, strict=True))
    fault = "SIGTERM, SIGINT, preemption" if manner == "stopped" else "SIGKILL in the middle of an epoch"

    @play(f"{manner}: {stage}, {processes} processes, {workers} workers", fault)
    def combination(theatre, folder, manner=manner, rest=(stage, processes, workers)):
        {"stopped": stopped_run, "killed": killed_run}[manner](theatre, folder, *rest)


# Other places and damages


@play("stopped while it reads the cases, it dies at once, and starts again", "SIGTERM, SIGINT, preemption")
def stopped_in_caching(theatre: Theatre, folder: Path) -> None:
    done = theatre.run("search", folder, 1, fault=strike("caching", name="TERM"))
    assert done["codes"] == [-signal.SIGTERM] and done["seconds"] < WITHIN
    finish(theatre, "search", folder, 1)


@play("killed in the middle of a write, and between its two renames, it goes on", "SIGKILL while saving")
def killed_while_saving(theatre: Theatre, folder: Path) -> None:
    def killed(where: str, iteration: int) -> None:
        kill(theatre, "train", folder, 1, "--save_minutes", 0, at=strike(where, iteration))

    killed("half written", 0)  # the first save of all
    assert not (folder / "latest.pth").exists() and list(folder.glob(".latest.pth.*.partial"))
    killed("half written", 7)
    assert progress_of(folder)["iteration"] == 6 and len(list(folder.glob(".latest.pth.*.partial"))) == 1
    killed("half renamed", 12)
    assert progress_of(folder, "previous.pth")["iteration"] == 11 and not (folder / "latest.pth").exists()
    finish(theatre, "train", folder, 1)


def flip_a_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "one bit of a tensor is flipped": (flip_a_bit, 2),
    "it is cut short": (lambda path: os.truncate(path, path.stat().st_size // 2), 1),
}
for what, (damage, processes) in DAMAGES.items():

    @play(f"the state before is taken where of the last one {what}", "SIGKILL while saving")
    def damaged(theatre, folder, damage=damage, processes=processes):
        middle = EPOCH[processes] + 2
        stop(theatre, "train", folder, processes, "--save_minutes", 0, at=strike("step", middle, "TERM"))
        damage(folder / "latest.pth")
        assert progress_of(folder, "previous.pth")["iteration"] == middle - 1
        said = finish(theatre, "train", folder, processes)
        assert re.search(rf"{folder}/latest.pth is damaged.*; continuing from {folder}/previous.pth", said), said
        assert f"continuing after epoch 1, iteration {middle - 1}" in said


@play(
    "another number of processes is refused, or allowed and said to change the result",
    "world size changes between stop and resume",
)
def other_number_of_processes(theatre: Theatre, folder: Path) -> None:
    first, more = EPOCH[2], EPOCH[1]
    stop(theatre, "search", folder, 2, at=strike("step", first + 1, "TERM", to=0))
    done = theatre.run("search", folder, 1)
    assert done["codes"] == [1]
    *_, error = done["said"][0].splitlines()
    assert "processes was 2 and is 1" in error and "--allow_other_num_processes" in error
    assert "Traceback" not in done["said"][0]
    said = theatre.finish("search", folder, 1, "--allow_other_num_processes")
    assert "the run had 2 processes and has 1: it continues, but not to the result that it would have had" in said
    expected = [first + more * epoch for epoch in range(4)]  # the epoch that was begun is begun anew
    assert [int(row["iteration"]) for row in rows(folder / "loss_history.csv")] == expected
    assert [step for step, _ in scalars(folder)["train/loss"]] == expected


def one_error(said: str) -> str:
    """Return the line that is the error, of a rank that says nothing else that is unusual."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


@play("where a rank dies, the others say in one line that it is gone, and the run goes on", "one rank dies or raises")
def rank_dies(theatre: Theatre, folder: Path) -> None:
    at = strike("step", EPOCH[2] + 2, to=1)
    done = theatre.run("train", folder, 2, "--num_workers", 1, "--save_minutes", 0, fault=at)
    assert done["codes"] == [1, -signal.SIGKILL] and done["seconds"] < WITHIN
    assert "[rank 0] the connection to another process broke" in one_error(done["said"][0])
    finish(theatre, "train", folder, 2)


@play(
    "where a process that prepares batches is killed, one line says so, and the run goes on",
    "GPU or host memory exhausted",
)
def worker_dies(theatre: Theatre, folder: Path) -> None:
    more = ("--num_workers", 1, "--save_minutes", 0)
    at = strike("step", EPOCH[1] + 2, to="worker")
    done = theatre.run("train", folder, 1, *more, fault=at)
    assert done["codes"] == [1]
    assert "a process that prepares batches died" in one_error(done["said"][0])
    finish(theatre, "train", folder, 1)


@play("a case that one rank cannot read ends all", "one rank dies or raises")
def rank_raises(theatre: Theatre, folder: Path) -> None:
    root = shutil.copytree(theatre.root, folder / "data" / theatre.root.name)
    image = sorted((root / "imagesTr").glob("*.nii.gz"))[3]
    os.truncate(image, image.stat().st_size - 9)
    done = theatre.run("train", folder / "run", 2, "--root", root, "--fold", "all", "--num_workers", 1)
    assert done["codes"] == [1, 1]
    errors = [one_error(said) for said in done["said"]]
    assert sum(image.name in error for error in errors) == 1, errors


@play("where a rank hangs, the others wait for --timeout_minutes and name it", "one rank dies or raises")
def rank_hangs(theatre: Theatre, folder: Path) -> None:
    at = strike("step", EPOCH[2] + 2, "STOP", to=1)
    done = theatre.run("search", folder, 2, "--num_workers", 1, "--timeout_minutes", 0.1, fault=at)
    assert done["codes"] == [1, -signal.SIGKILL] and 6 < done["seconds"] < WITHIN
    assert "[rank 0] rank 1 did not answer for --timeout_minutes 0.1" in one_error(done["said"][0])


@play(
    "a loss of one rank that is not finite changes no rank's weights, and many in a row stop all",
    "non-finite loss on one rank",
)
def not_finite_on_one_rank(theatre: Theatre, folder: Path) -> None:
    at = strike("step", 4, "NAN", to=1) | {"until": 5}
    assert theatre.run("train", folder / "two", 2, fault=at)["codes"] == [0, 0]
    states = [torch.load(folder / "two" / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert assert_equal(*states) > 5
    assert progress_of(folder / "two")["iteration"] == 4 * EPOCH[2]
    done = theatre.run("train", folder / "many", 2, fault=at | {"until": 99})
    assert done["codes"] == [1, 1]
    errors = {one_error(said).split("] ", 1)[1] for said in done["said"]}
    (error,) = errors  # on both; the cases are those of one rank's batch
    assert re.match(r"the loss is not finite at iteration 4 \(cases phantom_\d+, phantom_\d+\), and in", error), error
    weights = torch.load(folder / "many" / "latest.pth", weights_only=True)["parts"]["network"]
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@play("a number of iterations holds for any number of processes, up to an epoch")
def number_of_iterations(theatre: Theatre, folder: Path) -> None:
    ends = []
    for processes in (1, 2):
        theatre.finish("train", folder / str(processes), processes, "--num_iterations", 11)
        ends.append(progress_of(folder / str(processes))["iteration"])
    assert ends == [10, 12]  # 5 and 3 an epoch


# Commands as they are given


def command(theatre: Theatre, stage: str, folder: Path, processes: int, *more: object) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = str(CHECKOUT / f"{stage}_dints.py")
    return [sys.executable, *(launcher if processes > 1 else ()), script, *theatre.flags(stage, folder, *more)]


def signalled(arguments: list[str], folder: Path, send: Callable[[subprocess.Popen], None]) -> tuple[int, str]:
    """Return exit code and stderr of a command to which ``send`` sends a signal once the run has an epoch behind it."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    process = subprocess.Popen(arguments, **streams, start_new_session=True)
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


@play("Ctrl-C stops a command and its workers, and the line that it leaves continues it", "SIGTERM, SIGINT, preemption")
def plain_command(theatre: Theatre, folder: Path) -> None:
    arguments = command(theatre, "search", folder, 1, "--num_workers", 2)
    code, said = signalled(arguments, folder, lambda process: os.killpg(process.pid, signal.SIGINT))
    assert code == 130, said
    assert_stopped(said, folder, progress_of(folder)["iteration"])
    line = said.rsplit("the same command continues it: ", 1)[1]
    complete([sys.executable, *shlex.split(line)], theatre.straight["search", 1].result(), folder)


@play(
    "torchrun passes a signal on to ranks that stop after the same step, and starts them again",
    "SIGTERM, SIGINT, preemption",
)
def torchrun_command(theatre: Theatre, folder: Path) -> None:
    arguments = command(theatre, "train", folder, 2, "--num_workers", 1)
    code, said = signalled(arguments, folder, lambda process: process.send_signal(signal.SIGTERM))
    assert code != 0
    lines = [line for line in said.splitlines() if line.startswith("stopped after iteration")]
    assert len(lines) == 1 and f"stopped after iteration {progress_of(folder)['iteration']}, " in lines[0], said
    complete(arguments, theatre.straight["train", 2].result(), folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=[pytest.mark.fault(name)] if name else []) for what, (_, name) in PLAYS.items()],
)
def test_a_run_goes_on(what, plays):
    plays[what].result()
