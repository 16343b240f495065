"""Runs commands with a fault at a chosen place; `Theatre` in conftest.py talks to it by lines of JSON.

Ranks are forked off this process, which has imported everything: each is a process as torchrun starts it, with its own
exit code and stderr, all in a process group of their own, but ready at once. Each writes its own state, rank<r>.pth,
beside latest.pth. Pictures are not drawn, and costs of networks not measured.

A line: {"stage": "search_dints", "flags": [...], "world_size": 2, "fault": {...}}. A fault: the place (see `FAULTS`),
the iteration, the signal, and to whom: "all", a rank, or "worker", which is rank 0's first. Instead of a signal, NAN
makes a rank's batches unusable from that iteration up to "until". The answer: each rank's exit code and what it said,
the seconds from the signal to the end, and whether a worker outlived the run.
"""

import functools
import gc
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402  the checkout comes first on the path
import torch._dynamo  # noqa: E402  which the first optimizer imports, for half of a run's time

from dints import data, errors, network, running, training  # noqa: E402

STAGES = {name: importlib.import_module(name) for name in ("search_dints", "train_dints", "infer_dints")}
for wing in (data, network, running, training):
    for module in pkgutil.iter_modules(wing.__path__):
        importlib.import_module(f"{wing.__name__}.{module.name}")
LIMIT = 120  # seconds that a command may take


def serve() -> None:
    gc.freeze()  # or each rank would copy all that is imported, when it first looks for garbage
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


def run(stage: str, flags: list[str], world_size: int, fault: dict | None) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reading, struck = os.pipe()
    start, pids, said = time.monotonic(), [], [tempfile.TemporaryFile() for _ in range(world_size)]  # noqa: SIM115
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            become_rank(rank, world_size, port, pids, said[rank].fileno())
            if fault is not None:
                install(fault, rank, struck)
            sys.argv = [f"{stage}.py", *flags]
            errors.exit_on_user_error(STAGES[stage].main, STAGES[stage].parse_args(flags))
            sys.exit(0)  # through all of the interpreter's end, as a script
        pids.append(pid)
        os.setpgid(pid, pids[0])
    ends = {}
    for rank in sorted(range(world_size), key=lambda rank: fault is not None and fault["to"] == rank):
        if fault is not None and fault["signal"] == "STOP" and fault["to"] == rank:
            os.kill(pids[rank], signal.SIGKILL)  # the others have ended: it has done what it was to
        ends[rank] = wait(pids[rank], pids[0], start + LIMIT)
    codes = [ends[rank] for rank in range(world_size)]
    os.close(struck)
    with os.fdopen(reading) as times:
        seconds = time.monotonic() - float(times.read() or start)
    return {"codes": codes, "said": [read(file) for file in said], "seconds": seconds, "survivors": survivors(pids[0])}


def become_rank(rank: int, world_size: int, port: int, pids: list[int], said: int) -> None:
    os.setpgid(0, pids[0] if pids else 0)
    if world_size > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115  the requests that were read ahead are the server's
    training.curves.draw_all = network.drawing.draw_architecture = lambda *_, **__: None
    network.cost.cost = lambda *_, **__: SimpleNamespace(to_dict=dict, lines=list)
    replace(training.checkpoint.Checkpoint, "save", save_on_every_rank)


def replace(owner: type | ModuleType, name: str, function: Callable) -> None:
    """Put ``function(self, original, ...)``, or ``function(original, ...)`` in a module, in place of a function."""
    partial = functools.partialmethod if isinstance(owner, type) else functools.partial
    setattr(owner, name, partial(function, getattr(owner, name)))


def save_on_every_rank(checkpoint: training.checkpoint.Checkpoint, original: Callable) -> None:
    states = {name: part.state_dict() for name, part in checkpoint.parts.items()}
    progress = {**asdict(checkpoint.progress), "seconds": 0.0, "seconds_per_iteration": 0.0, "seconds_in_epoch": 0.0}
    path = checkpoint.latest.with_name(f"rank{checkpoint.processes.rank}.pth")
    torch.save({"parts": states, "progress": progress}, path)
    original(checkpoint)


def read(file: io.BufferedRandom) -> str:
    with file:
        file.seek(0)
        return file.read().decode()


def wait(pid: int, group: int, deadline: float) -> int:
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
        time.sleep(0.01)


def survivors(group: int, patience: float = 6.0) -> bool:
    """Tell whether a process of the group outlives its ranks; workers of a killed rank look for it every 5 s."""
    deadline = time.monotonic() + patience
    try:
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.02)
        os.killpg(group, signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False


def install(fault: dict, rank: int, struck: int) -> None:
    if fault["signal"] == "NAN":
        if fault["to"] == rank:
            spoil_batches(fault["iteration"], fault["until"])
        return

    def strike() -> None:
        number = getattr(signal, f"SIG{fault['signal']}")
        if fault["to"] == rank or (fault["to"] == "all" and rank == 0):
            os.write(struck, str(time.monotonic()).encode())
        if fault["to"] == "all" and rank == 0:
            os.killpg(0, number)  # workers too
        elif fault["to"] == rank:
            os.kill(os.getpid(), number)
        elif fault["to"] == "worker" and rank == 0:
            os.kill(multiprocessing.active_children()[0].pid, number)

    FAULTS[fault["place"]](fault["iteration"], strike)


def spoil_batches(first: int, last: int) -> None:
    def steps(stops, original, batches):
        for batch in original(stops, batches):
            if first <= stops.checkpoint.progress.iteration + 1 <= last:
                batch["image"].fill_(torch.nan)
            yield batch

    replace(training.stops.Stops, "steps", steps)


def in_step(iteration: int, strike: Callable[[], None]) -> None:
    """Strike before step number ``iteration`` is computed."""

    def steps(stops, original, batches):
        for batch in original(stops, batches):
            if stops.checkpoint.progress.iteration + 1 == iteration:
                strike()
            yield batch

    replace(training.stops.Stops, "steps", steps)


def in_validation(iteration: int, strike: Callable[[], None]) -> None:
    """Strike before the first volume is segmented of the validation after that iteration."""

    def volumes(stops, original, cases):
        for number, case in enumerate(original(stops, cases)):
            if number == 0 and stops.checkpoint.progress.iteration == iteration:
                strike()
            yield case

    replace(training.stops.Stops, "volumes", volumes)


def when_recorded(iteration: int, strike: Callable[[], None]) -> None:
    """Strike when what the validation after that iteration found is written, and not yet the state."""

    def add_validation(history, original, progress, scores):
        original(history, progress, scores)
        if progress.iteration == iteration:
            strike()

    replace(training.history.History, "add_validation", add_validation)


def in_caching(_: int, strike: Callable[[], None]) -> None:
    """Strike before the first case is read."""

    def hold(cache, original, *args):
        strike()
        return original(cache, *args)

    replace(data.cache.Cache, "hold", hold)


def when_half_written(iteration: int, strike: Callable[[], None]) -> None:
    """Strike when half of that iteration's state is in its file."""

    def save(original, content, file):
        if isinstance(file, io.BufferedWriter) and content.get("progress", {}).get("iteration") == iteration:
            original(content, whole := io.BytesIO())
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            strike()
        original(content, file)

    replace(torch, "save", save)


def when_half_renamed(iteration: int, strike: Callable[[], None]) -> None:
    """Strike when that iteration's state is about to get its name, and the state before has lost it."""
    saved = []

    def save(original, content, file):
        saved.append(content.get("progress", {}).get("iteration"))
        original(content, file)

    def rename(original, source, target):
        if saved and saved[-1] == iteration and Path(target).name == "latest.pth":
            strike()
        original(source, target)

    replace(torch, "save", save)
    replace(os, "replace", rename)


FAULTS = {
    "step": in_step,
    "validation": in_validation,
    "recorded": when_recorded,
    "caching": in_caching,
    "half written": when_half_written,
    "half renamed": when_half_renamed,
}

if __name__ == "__main__":
    serve()
