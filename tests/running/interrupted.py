"""Runs commands of the two stages with a fault at a chosen place; test_resume.py talks to it by lines of JSON.

Ranks are forked off this process, which has imported everything: each is a process as torchrun starts it, with its own
exit code and stderr, all in a process group of their own, but ready at once. As ranks.py does, each writes its state
beside latest.pth. Pictures are not drawn, and costs of networks not measured.

A line: {"stage": "search_dints", "flags": [...], "world_size": 2, "fault": {...}}. A fault: the place (see `faults`),
the iteration, the signal, and to whom: "all", a rank, or "worker", which is rank 0's first. Instead of a signal, NAN
makes a rank's batches unusable from that iteration up to "until". The answer: each rank's exit code and what it said,
the seconds from the signal to the end, and whether a worker outlived the run.
"""

import functools
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
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import ranks  # noqa: E402  the checkout comes first on the path
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  which the first optimizer imports, for half of a run's time

from dints import cache, checkpoint, errors, history  # noqa: E402

STAGES = {name: importlib.import_module(name) for name in ("search_dints", "train_dints")}
LIMIT = 120  # seconds that a command may take


def serve() -> None:
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
            install(fault, rank, struck)
            sys.argv = [f"{stage}.py", *flags]
            errors.exit_on_user_error(ranks.main, stage, flags)
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
    history.draw_curves = lambda *_: None
    search = STAGES["search_dints"]
    search.draw_search = search.draw_architecture = lambda *_, **__: None
    search.cost_of = lambda *_: SimpleNamespace(to_dict=dict, lines=list)


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
    """Whether a process of the group outlives its ranks; workers of a killed rank look for it every 5 s."""
    deadline = time.monotonic() + patience
    try:
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.02)
        os.killpg(group, signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False


def install(fault: dict | None, rank: int, struck: int) -> None:
    if fault is None:
        return

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

    faults(fault["place"], fault["iteration"], strike)


def spoil_batches(first: int, last: int) -> None:
    original = checkpoint.Checkpoint.steps

    def steps(self, batches):
        for batch in original(self, batches):
            if first <= self.progress.iteration + 1 <= last:
                batch["image"].fill_(torch.nan)
            yield batch

    checkpoint.Checkpoint.steps = steps


def faults(place: str, iteration: int, strike) -> None:
    """Have ``strike`` called when the run comes to ``place``.

    step: before step number ``iteration`` is computed. validation: before the first case of the one after it.
    recorded: when what that one found is written, and not yet the state. caching: before the first case is read.
    half written, half renamed: in the save of that iteration's state.
    """
    saver = checkpoint.Checkpoint

    def wrapped(owner, name):
        def decorate(function):
            setattr(owner, name, functools.partialmethod(function, getattr(owner, name)))

        return decorate

    if place == "step":

        @wrapped(saver, "steps")
        def steps(self, original, batches):
            for batch in original(self, batches):
                if self.progress.iteration + 1 == iteration:
                    strike()
                yield batch

    elif place == "validation":

        @wrapped(saver, "unless_stopped")
        def unless_stopped(self, original, cases):
            if self.progress.iteration == iteration:
                strike()
            yield from original(self, cases)

    elif place == "recorded":

        @wrapped(history.History, "add_validation")
        def add_validation(self, original, progress, scores):
            original(self, progress, scores)
            if progress.iteration == iteration:
                strike()

    elif place == "caching":

        @wrapped(cache.Cache, "hold")
        def hold(self, original, *args):
            strike()
            return original(self, *args)

    elif place in ("half written", "half renamed"):
        save, replace, saving = torch.save, os.replace, [None]

        def save_half(content, file):
            if not isinstance(file, io.BufferedWriter) or "configuration" not in content:
                return save(content, file)
            saving[0] = content["progress"]["iteration"]
            if place == "half written" and saving[0] == iteration:
                whole = io.BytesIO()
                save(content, whole)
                file.write(whole.getvalue()[: whole.tell() // 2])
                file.flush()
                strike()
            return save(content, file)

        def replace_half(source, target):
            if place == "half renamed" and saving[0] == iteration and Path(target).name == "latest.pth":
                strike()
            replace(source, target)

        torch.save, os.replace = save_half, replace_half
    else:
        raise ValueError(place)


if __name__ == "__main__":
    serve()
