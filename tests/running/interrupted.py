"""Runs commands with a fault at a chosen place; `Theatre` talks to it by lines of JSON.

Ranks are forked off this process, which has imported everything: each is a process as torchrun
starts it, with its own exit code and stderr, but ready at once. Each writes its own state,
rank<r>.pth, beside latest.pth. Pictures are not drawn, and costs of networks not measured.

A line: {"stage": "search_dints", "flags": [...], "world_size": 2, "fault": {...}}. A fault: the
place (see `FAULTS`), the iteration, the signal, and to whom: "all", a rank, or "worker", which is
rank 0's first. Instead of a signal, NAN makes a rank's batches unusable from that iteration up to
"until". The answer: each rank's exit code and what it said, the seconds from the signal to the end,
and whether a worker outlived the run.
"""

import functools
import gc
import importlib
import io
import json
import multiprocessing
import os
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

from dints import errors  # noqa: E402
from dints.network import arch_file  # noqa: E402
from dints.running import curves  # noqa: E402
from dints.running.checkpoint import Checkpoint  # noqa: E402
from dints.running.history import History  # noqa: E402
from dints.running.run import Run  # noqa: E402

for name in ("search_dints", "evolve_dints", "train_dints"):
    importlib.import_module(name)  # not infer_dints: a thread of ONNX Runtime's survives no fork
LIMIT = 120  # seconds that a command may take


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
            script = importlib.import_module(stage)
            errors.exit_on_user_error(script.main, script.parse_args(flags))
            sys.exit(0)  # through all of the interpreter's end, as a script
        pids.append(pid)
        os.setpgid(pid, pids[0])
    ends, hung = {}, fault["to"] if fault and fault["signal"] == "STOP" else None
    for rank in sorted(range(world_size), key=lambda rank: rank == hung):
        if rank == hung:
            os.kill(pids[rank], signal.SIGKILL)  # the others have ended: it has done what it was to
        ends[rank] = wait(pids[rank], pids[0], start + LIMIT)
    os.close(struck)
    with os.fdopen(reading) as times:
        seconds = time.monotonic() - float(times.read() or start)
    codes, texts = [ends[rank] for rank in range(world_size)], [read(file) for file in said]
    return {"codes": codes, "said": texts, "seconds": seconds, "survivors": survivors(pids[0])}


def become_rank(rank: int, world_size: int, port: int, pids: list[int], said: int) -> None:
    os.setpgid(0, pids[0] if pids else 0)
    if world_size > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        numbers |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in numbers.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115  the requests that were read ahead are the server's
    curves.draw_all = arch_file.draw_architecture = lambda *_, **__: None
    replace(arch_file, "cost", cost_unless_measured)
    replace(Checkpoint, "save", save_on_every_rank)


def replace(owner: type | ModuleType, name: str, function: Callable) -> None:
    """Put ``function(self, original, ...)``, without self in a module, in a function's place."""
    partial = functools.partialmethod if isinstance(owner, type) else functools.partial
    setattr(owner, name, partial(function, getattr(owner, name)))


def cost_unless_measured(original: Callable, *settings: object, device: object = None) -> object:
    return original(*settings) if device is None else SimpleNamespace(to_dict=dict, lines=list)


def save_on_every_rank(checkpoint: Checkpoint, original: Callable) -> None:
    parts = {name: part.state_dict() for name, part in checkpoint.parts.items()}
    progress = {name: v for name, v in asdict(checkpoint.progress).items() if "seconds" not in name}
    path = checkpoint.latest.with_name(f"rank{checkpoint.processes.rank}.pth")
    torch.save({"parts": parts, "progress": progress}, path)
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
    """Tell whether a process outlives its ranks; a killed rank's workers look for it every 5 s."""
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
    """Have the fault come about in this rank's process."""
    name, to, first = fault["signal"], fault["to"], fault["iteration"]

    def strike(batch: dict | None = None) -> None:
        if name == "NAN":
            batch["image"].fill_(torch.nan)
            return
        number = getattr(signal, f"SIG{name}")
        if to == rank or (to == "all" and rank == 0):
            os.write(struck, str(time.monotonic()).encode())
        if to == "all" and rank == 0:
            os.killpg(0, number)  # workers too
        elif to == rank:
            os.kill(os.getpid(), number)
        elif to == "worker" and rank == 0:
            os.kill(multiprocessing.active_children()[0].pid, number)

    if name != "NAN" or to == rank:
        FAULTS[fault["place"]](range(first, fault.get("until", first) + 1), strike)


def in_step(iterations: range, strike: Callable) -> None:
    """Strike before steps of these numbers are computed."""

    def steps(run, original, *loaders, until=None):
        for batch in original(run, *loaders, until=until):
            if run.progress.iteration + 1 in iterations:
                strike(batch)
            yield batch

    replace(Run, "steps", steps)


def in_validation(iterations: range, strike: Callable) -> None:
    """Strike before the first volume is segmented of the validation after these iterations."""

    def volumes(run, original, cases):
        for number, case in enumerate(original(run, cases)):
            if number == 0 and run.progress.iteration in iterations:
                strike()
            yield case

    replace(Run, "volumes", volumes)


def when_recorded(iterations: range, strike: Callable) -> None:
    """Strike when what such a validation found is written, and not yet the state."""

    def add_validation(history, original, progress, scores):
        original(history, progress, scores)
        if progress.iteration in iterations:
            strike()

    replace(History, "add_validation", add_validation)


def in_save(iterations: range, strike: Callable) -> None:
    """Strike when half of such an iteration's state is written."""

    def write_half(original, content, file):
        if isinstance(file, io.BufferedWriter):
            original(content, whole := io.BytesIO())
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            strike()
        original(content, file)

    def save(checkpoint, original):
        if checkpoint.progress.iteration in iterations:
            replace(torch, "save", write_half)
        original(checkpoint)

    replace(Checkpoint, "save", save)


FAULTS = {
    "step": in_step,
    "validation": in_validation,
    "recorded": when_recorded,
    "save": in_save,
}

if __name__ == "__main__":
    gc.freeze()  # or each rank would copy all that is imported, when it first looks for garbage
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
