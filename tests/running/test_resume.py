"""Whatever stops a run, the same command continues it, to the same end as if nothing had happened, bit for bit.

A play starts commands and stops them at chosen places (see interrupted.py); two plays go on at a time. Of the sixteen
combinations of stage, processes, workers and kind of stop, five are played in which each value meets each value of the
others; DINTS_RESUME_ALL=1 plays all.
"""

import csv
import itertools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from architectures import chain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_distributed import assert_equal

from dints.architecture import save_architecture
from dints.phantom import write_phantom

CHECKOUT = Path(__file__).resolve().parents[1]
COMMON = "--patch_size 16 16 16 --num_folds 6 --overlap_ratio 0 --device cpu --precision fp32 --channel_mul 0.125"
COMMON += " --num_epochs 4 --num_epochs_per_validation 2"
SEARCH = "--num_blocks 1 --num_depths 2 --num_epochs_warmup 1 --learning_rate_arch 0.1"
EPOCH, EPOCHS = {1: 5, 2: 3}, 4  # steps of an epoch on one and two processes: 5 + 5 cases of the search, 10 of training
MEASURED = {
    "seconds",
    "seconds_per_iteration",
    "seconds_in_epoch",
    "data_wait",
    "minutes",
    "cost",
}  # cost: latency too; the wrapper measures none
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WITHIN = 25  # seconds that a stop may take


@dataclass
class Theatre:
    """Where plays take place: data, an architecture, runs that nothing stopped, and processes that start others."""

    root: Path
    servers: queue.Queue = field(default_factory=queue.Queue)
    straight: dict[tuple[str, int], Future] = field(default_factory=dict)

    def flags(self, stage: str, folder: Path, *more: object) -> list[str]:
        flags = ["--root", self.root, "--output_root", folder, *COMMON.split()]
        flags += SEARCH.split() if stage == "search" else ["--arch_ckpt", self.root / "arch.pth"]
        return [str(flag) for flag in (*flags, *more)]

    def run(self, stage: str, folder: Path, processes: int, *more: object, fault: dict | None = None) -> dict:
        server = self.servers.get()
        try:
            flags = self.flags(stage, folder, *(("--num_workers", 0) if "--num_workers" not in more else ()), *more)
            request = {"stage": f"{stage}_dints", "flags": flags, "world_size": processes, "fault": fault}
            print(json.dumps(request), file=server.stdin, flush=True)
            done = json.loads(server.stdout.readline())
        finally:
            self.servers.put(server)
        assert not done["survivors"], "a worker outlives its run"
        return done

    def finish(self, stage: str, folder: Path, processes: int, *more: object) -> str:
        """Run the command to its end; returns what rank 0 said."""
        done = self.run(stage, folder, processes, *more)
        assert done["codes"] == [0] * processes, "\n".join(done["said"])
        return done["said"][0]


PLAYS: dict[str, Callable[[Theatre, Path], None]] = {}


def play(what: str) -> Callable:
    def register(function: Callable[[Theatre, Path], None]) -> Callable:
        PLAYS[what] = function
        return function

    return register


@pytest.fixture(scope="module")
def plays(request, tmp_path_factory):
    """The plays that were asked for, all begun."""
    theatre = Theatre(write_phantom(tmp_path_factory.mktemp("data") / "Task00_Phantom", 12, 1, shape=(24, 24, 24)))
    save_architecture(theatre.root / "arch.pth", chain(0, 1, 0, num_depths=2))
    command = [sys.executable, str(CHECKOUT / "tests" / "interrupted.py")]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    servers = [subprocess.Popen(command, **streams) for _ in range(2)]
    for server in servers:
        theatre.servers.put(server)
    with ThreadPoolExecutor(2) as pool:
        for stage, processes in itertools.product(("search", "train"), (1, 2)):
            folder = tmp_path_factory.mktemp(f"{stage}{processes}")
            theatre.straight[stage, processes] = pool.submit(straight_run, theatre, stage, folder, processes)
        wanted = [item.callspec.params["what"] for item in request.session.items if item.path == request.path]
        yield {what: pool.submit(PLAYS[what], theatre, tmp_path_factory.mktemp("play")) for what in wanted}
        pool.shutdown(cancel_futures=True)
    for server in servers:
        server.stdin.close()
        server.wait(10)


def straight_run(theatre: Theatre, stage: str, folder: Path, processes: int) -> Path:
    theatre.finish(stage, folder, processes)
    return folder


def fault(place: str, iteration: int | None = None, name: str = "KILL", to: int | str = "all") -> dict:
    return {"place": place, "iteration": iteration, "signal": name, "to": to}


def progress_of(folder: Path, name: str = "latest.pth") -> dict:
    return torch.load(folder / name, weights_only=True)["progress"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def without_times(content: object) -> object:
    """A nested state without what differs from run to run: times, and the folder of a path."""
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in MEASURED}
    if isinstance(content, (list, tuple)):
        return [without_times(value) for value in content]
    return Path(content).name if isinstance(content, str) and content.startswith("/") else content


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Of TensorBoard, but for times, as its own reader finds them."""
    events = EventAccumulator(str(folder / "Events"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.split("/")[-1] not in MEASURED]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(tags)}


def assert_same_end(theatre: Theatre, stage: str, folder: Path, processes: int, by_server: bool = True) -> None:
    """Everything that the run left is what the run that nothing stopped left, but for times."""
    straight = theatre.straight[stage, processes].result()
    names = ["latest.pth", *(f"rank{rank}.pth" for rank in range(processes) if by_server)]
    names += (
        ["best_metric_model.pth"] if stage == "train" else sorted(p.name for p in straight.glob("search_code*.pth"))
    )
    for name in names:
        states = [torch.load(path / name, weights_only=True) for path in (straight, folder)]
        assert assert_equal(*map(without_times, states), name) >= (0 if "search_code" in name else 5)
    assert sorted(p.name for p in folder.glob("*.pth") if by_server or "rank" not in p.name) == sorted(
        p.name for p in straight.glob("*.pth") if by_server or "rank" not in p.name
    )
    for name in ("loss_history.csv", "accuracy_history.csv"):
        assert without_times(rows(straight / name)) == without_times(rows(folder / name)), name
    tables = [yaml.safe_load((path / "progress.yaml").read_text()) for path in (straight, folder)]
    assert without_times(tables[0]) == without_times(tables[1])
    events = scalars(folder)
    assert len(events["train/loss"]) == EPOCHS and events == scalars(straight)
    assert not list(folder.glob(".*.partial"))


def assert_stopped(said: str, number: int, folder: Path, iteration: int) -> None:
    """One line says so, and the state is that of the iteration that it names."""
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
    assert_stopped("".join(done["said"]), number, folder, at["iteration"])


def kill(theatre: Theatre, stage: str, folder: Path, processes: int, *more: object, at: dict) -> None:
    done = theatre.run(stage, folder, processes, *more, fault=at)
    assert done["codes"] == [-signal.SIGKILL] * processes, "\n".join(done["said"])


# Combinations


def stopped_run(theatre: Theatre, folder: Path, stage: str, processes: int, workers: int) -> None:
    """By each of the three signals: in the middle of an epoch, in a validation, and in the middle of the last epoch."""
    steps, last = EPOCH[processes], processes - 1
    command = theatre, stage, folder, processes, "--num_workers", workers
    middle, end = steps + steps // 2, 4 * steps - 1
    stop(*command, at=fault("step", middle, "TERM", to=last))
    assert progress_of(folder)["epoch"] == 1 and 0 < progress_of(folder)["step"] == steps // 2 < steps
    stop(*command, at=fault("validation", 2 * steps, "INT", to=last))
    assert progress_of(folder)["epoch"] == 1 and progress_of(folder)["step"] == steps
    assert not (folder / "accuracy_history.csv").exists()
    stop(*command, at=fault("step", end, "USR1", to="all"))
    assert progress_of(folder)["epoch"] == 3 and 0 < progress_of(folder)["step"] < steps
    theatre.finish(stage, folder, processes, "--num_workers", workers)
    assert_same_end(theatre, stage, folder, processes)


def killed_run(theatre: Theatre, folder: Path, stage: str, processes: int, workers: int) -> None:
    """After a save in the middle of an epoch, one epoch after the last save, and between results and their save."""
    steps = EPOCH[processes]
    command = theatre, stage, folder, processes, "--num_workers", workers
    middle = steps + steps // 2
    kill(*command, "--save_minutes", 0, at=fault("step", middle + 1))
    assert progress_of(folder)["iteration"] == middle and progress_of(folder)["step"] == steps // 2
    kill(*command, at=fault("step", 4 * steps))
    assert progress_of(folder)["iteration"] == 2 * steps and len(rows(folder / "loss_history.csv")) == 3
    kill(*command, "--save_minutes", 0, at=fault("recorded", 4 * steps))
    assert progress_of(folder)["iteration"] == 4 * steps and progress_of(folder)["epoch"] == 3
    theatre.finish(stage, folder, processes, "--num_workers", workers)
    assert_same_end(theatre, stage, folder, processes)


VALUES = (("search", "train"), (1, 2), (0, 2), ("stopped", "killed"))
COVERING = ((0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0))
for place in itertools.product((0, 1), repeat=4) if os.environ.get("DINTS_RESUME_ALL") else COVERING:
    stage, processes, workers, manner = (values[index] for values, index in zip(VALUES, place, strict=True))

    @play(f"{manner}: {stage}, {processes} processes, {workers} workers")
    def combination(theatre, folder, manner=manner, rest=(stage, processes, workers)):
        {"stopped": stopped_run, "killed": killed_run}[manner](theatre, folder, *rest)


# Other places and damages


@play("stopped while it reads the cases, it dies at once, and starts again")
def stopped_in_caching(theatre: Theatre, folder: Path) -> None:
    done = theatre.run("search", folder, 1, fault=fault("caching", name="TERM"))
    assert done["codes"] == [-signal.SIGTERM] and done["seconds"] < WITHIN
    theatre.finish("search", folder, 1)
    assert_same_end(theatre, "search", folder, 1)


@play("killed in the middle of a write, and between its two renames, it goes on")
def killed_while_saving(theatre: Theatre, folder: Path) -> None:
    def killed(where: str, iteration: int) -> None:
        kill(theatre, "train", folder, 1, "--save_minutes", 0, at=fault(where, iteration))

    killed("half written", 0)  # the first save of all
    assert not (folder / "latest.pth").exists() and list(folder.glob(".latest.pth.*.partial"))
    killed("half written", 7)
    assert progress_of(folder)["iteration"] == 6 and len(list(folder.glob(".latest.pth.*.partial"))) == 1
    killed("half renamed", 9)
    assert progress_of(folder, "previous.pth")["iteration"] == 8 and not (folder / "latest.pth").exists()
    killed("half renamed", 12)
    assert progress_of(folder, "previous.pth")["iteration"] == 11
    theatre.finish("train", folder, 1)
    assert_same_end(theatre, "train", folder, 1)


def flip_a_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "one bit of a tensor is flipped": flip_a_bit,
    "it is cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "it is empty": lambda path: os.truncate(path, 0),
}
for what, damage in DAMAGES.items():

    @play(f"the state before is taken where of the last one {what}")
    def damaged(theatre, folder, damage=damage, processes=2 if damage is flip_a_bit else 1):
        middle = EPOCH[processes] + 2
        stop(theatre, "train", folder, processes, "--save_minutes", 0, at=fault("step", middle, "TERM"))
        damage(folder / "latest.pth")
        assert progress_of(folder, "previous.pth")["iteration"] == middle - 1
        said = theatre.finish("train", folder, processes)
        assert re.search(rf"{folder}/latest.pth is damaged.*; continuing from {folder}/previous.pth", said), said
        assert f"continuing after epoch 1, iteration {middle - 1}" in said
        assert_same_end(theatre, "train", folder, processes)


@play("another number of processes is refused, or allowed and said to change the result")
def other_number_of_processes(theatre: Theatre, folder: Path) -> None:
    stop(theatre, "search", folder, 2, at=fault("step", EPOCH[2] + 1, "TERM", to=0))
    done = theatre.run("search", folder, 1)
    assert done["codes"] == [1]
    *_, error = done["said"][0].splitlines()
    assert "processes was 2 and is 1" in error and "--allow_other_num_processes" in error
    assert "Traceback" not in done["said"][0]
    said = theatre.finish("search", folder, 1, "--allow_other_num_processes")
    assert "the run had 2 processes and has 1: it continues, but not to the result that it would have had" in said
    first, more = EPOCH[2], EPOCH[1]  # the epoch that was begun is begun anew
    expected = [str(first + more * epoch) for epoch in range(4)]
    assert [row["iteration"] for row in rows(folder / "loss_history.csv")] == expected
    assert [step for step, _ in scalars(folder)["train/loss"]] == [int(step) for step in expected]


def one_error(said: str) -> str:
    """The line that is the error, of a rank that says nothing else that is unusual."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


@play("where a rank dies, the others say in one line that it is gone, and the run goes on")
def rank_dies(theatre: Theatre, folder: Path) -> None:
    at = fault("step", EPOCH[2] + 2, to=1)
    done = theatre.run("train", folder, 2, "--num_workers", 1, "--save_minutes", 0, fault=at)
    assert done["codes"] == [1, -signal.SIGKILL] and done["seconds"] < WITHIN and not done["survivors"]
    assert "[rank 0] the connection to another process broke" in one_error(done["said"][0])
    theatre.finish("train", folder, 2)
    assert_same_end(theatre, "train", folder, 2)


@play("where a process that prepares batches is killed, one line says so, and the run goes on")
def worker_dies(theatre: Theatre, folder: Path) -> None:
    more = ("--num_workers", 1, "--save_minutes", 0)
    done = theatre.run("train", folder, 1, *more, fault=fault("step", EPOCH[1] + 2, to="worker"))
    assert done["codes"] == [1]
    assert "a process that prepares batches died" in one_error(done["said"][0])
    theatre.finish("train", folder, 1)
    assert_same_end(theatre, "train", folder, 1)


@play("a case that one rank cannot read ends all")
def rank_raises(theatre: Theatre, folder: Path) -> None:
    root = shutil.copytree(theatre.root, folder / "data" / theatre.root.name)
    image = sorted((root / "imagesTr").glob("*.nii.gz"))[3]
    os.truncate(image, image.stat().st_size - 9)
    done = theatre.run("train", folder / "run", 2, "--root", root, "--fold", "all", "--num_workers", 1)
    assert done["codes"] == [1, 1]
    errors = [one_error(said) for said in done["said"]]
    assert sum(image.name in error for error in errors) == 1, errors


@play("where a rank hangs, the others wait for --timeout_minutes and name it")
def rank_hangs(theatre: Theatre, folder: Path) -> None:
    at = fault("step", EPOCH[2] + 2, "STOP", to=1)
    done = theatre.run("search", folder, 2, "--num_workers", 1, "--timeout_minutes", 0.1, fault=at)
    assert done["codes"] == [1, -signal.SIGKILL] and 6 < done["seconds"] < WITHIN and not done["survivors"]
    assert "[rank 0] rank 1 did not answer for --timeout_minutes 0.1" in one_error(done["said"][0])


@play("a loss of one rank that is not finite changes no rank's weights, and many in a row stop all")
def not_finite_on_one_rank(theatre: Theatre, folder: Path) -> None:
    at = fault("step", 4, "NAN", to=1) | {"until": 5}
    assert theatre.run("train", folder / "two", 2, fault=at)["codes"] == [0, 0]
    states = [torch.load(folder / "two" / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert assert_equal(*states) > 5
    assert progress_of(folder / "two")["iteration"] == EPOCHS * EPOCH[2]
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


def begun(folder: Path, process: subprocess.Popen) -> None:
    """Wait until the run has an epoch behind it."""
    deadline = time.monotonic() + 60
    while not (folder / "loss_history.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def command(theatre: Theatre, stage: str, folder: Path, processes: int, *more: object) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = str(CHECKOUT / f"{stage}_dints.py")
    return [sys.executable, *(launcher if processes > 1 else ()), script, *theatre.flags(stage, folder, *more)]


def signalled(arguments: list[str], folder: Path, send: Callable[[subprocess.Popen], None]) -> tuple[int, str]:
    """Exit code and stderr of a command to which ``send`` sends a signal once the run has an epoch behind it."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    process = subprocess.Popen(arguments, **streams, start_new_session=True)
    try:
        begun(folder, process)
        send(process)
        _, said = process.communicate(timeout=WITHIN)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


@play("Ctrl-C stops a command and its workers, and the line that it leaves continues it")
def plain_command(theatre: Theatre, folder: Path) -> None:
    arguments = command(theatre, "search", folder, 1, "--num_workers", 2)
    code, said = signalled(arguments, folder, lambda process: os.killpg(process.pid, signal.SIGINT))
    assert code == 130, said
    assert_stopped(said, signal.SIGINT, folder, progress_of(folder)["iteration"])
    line = said.rsplit("the same command continues it: ", 1)[1]
    done = subprocess.run(
        [sys.executable, *shlex.split(line)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert_same_end(theatre, "search", folder, 1, by_server=False)


@play("torchrun passes a signal on to ranks that stop after the same step, and starts them again")
def torchrun_command(theatre: Theatre, folder: Path) -> None:
    arguments = command(theatre, "train", folder, 2, "--num_workers", 1)
    code, said = signalled(arguments, folder, lambda process: process.send_signal(signal.SIGTERM))
    assert code != 0
    lines = [line for line in said.splitlines() if line.startswith("stopped after iteration")]
    assert len(lines) == 1 and f"stopped after iteration {progress_of(folder)['iteration']}, " in lines[0], said
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_end(theatre, "train", folder, 2, by_server=False)


@pytest.mark.parametrize("what", PLAYS)
def test_a_run_goes_on(what, plays):
    plays[what].result()
