"""Settles in one go what only a machine with a GPU can: whether all is right there, and how fast.

    bash benchmarks/gpu.sh        all, in at most 9 minutes on one GPU; see there
    python benchmarks/gpu.py --output results.json --parts agrees steps    some of it
    python benchmarks/gpu.py --output results.json --rehearse    all of it small, on the CPU

Needed are torch, monai, nibabel and what else requirements.txt names for running; no internet.
Correctness comes first (gpu_checks.py), then speed (gpu_speed.py), then what takes whole runs. Each
part is a process of its own, so that one that fails or hangs takes no other with it; they are
forked from one that has imported what takes seconds. A part has the seconds of `SECONDS`, and what
those before it have left; then it is killed. The file has what was found so far, also by the part
that is running: `ok` is false where something was wrong, with the end of what it said.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests"), str(CHECKOUT / "benchmarks")]

from dints import files  # noqa: E402  (the repository is no package: its root must be on the path first)

MODULES = ("gpu_checks", "gpu_speed")  # imported late: that takes seconds
# What each part has, in their order: together 9 minutes. Those of 0 have what is left in the end.
SECONDS = {
    "machine": 30,  # and the imports
    "agrees": 40,
    "losses_fall": 20,
    "skips_infinite": 15,
    "ddp": 15,
    "records": 35,
    "lacks_memory": 15,
    "variants": 45,
    "profile": 20,
    "activations": 15,
    "steps": 70,
    "resumes": 35,
    "quickstart": 80,
    "candidates": 35,
    "loader": 30,
    "compiles": 20,
    "compiled": 20,
    "scaling": 0,
    "task04": 0,
}
LEAST_SECONDS = 8  # that a part is begun for
SECONDS_TO_END = 5  # that a part has for it before it is killed
CONTEXT = multiprocessing.get_context("forkserver")
PYTHON_PATH = os.environ.get("PYTHONPATH", "").split(os.pathsep)


def main(args: argparse.Namespace) -> int:
    results, due = {}, time.monotonic()
    write(args.output, results)
    if not args.rehearse:
        start_server()
    with TemporaryDirectory() as folder:
        for name in args.parts:
            due += args.patience * SECONDS[name]
            left = due - time.monotonic()
            if left > LEAST_SECONDS or args.rehearse:
                run(name, args, Path(folder), left, results)
            else:
                results[name] = {"ok": SECONDS[name] == 0, "left out": "no time was left"}
            write(args.output, results)
            print(f"{name}: {describe(results[name])}", flush=True)
    return 0 if all(result["ok"] for result in results.values()) else 1


def start_server() -> None:
    """Let processes be forked from one that has imported all that a part needs, and has not touched
    a GPU.
    """
    CONTEXT.set_forkserver_preload([*MODULES])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([*sys.path[:3], *PYTHON_PATH])):
        forkserver.ensure_running()


def run(
    name: str, args: argparse.Namespace, folder: Path, left: float, results: dict[str, dict]
) -> None:
    """Run a part in a process of its own, or in this one in a rehearsal; put what it found into
    ``results``.
    """
    start, notes = time.monotonic(), folder / f"{name}.json"
    given = {"device": args.device, "small": args.rehearse, "folder": folder, "root": args.root}
    if args.rehearse:
        part_of(name)(setting(notes, seconds=3600, **given))
        ended = {"ok": True}
    else:
        process = CONTEXT.Process(target=perform, args=(name, notes, left), kwargs=given)
        process.start()
        while process.is_alive() and time.monotonic() < start + left:
            process.join(1)
            results[name] = {"ok": False, "why": "it is running", **read(notes)}
            write(args.output, results)
        ended = end(process, left, said_of(notes))
    results[name] = {"seconds": round(time.monotonic() - start, 1), **ended, **read(notes)}


def perform(name: str, notes: Path, seconds: float, **given) -> None:
    """Do a part, in a process of its own, whose own processes can be ended with it."""
    os.setsid()
    with said_of(notes).open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    # for what it starts: without what was for the imports
    os.environ["PYTHONPATH"] = os.pathsep.join(PYTHON_PATH)
    part_of(name)(setting(notes, seconds=seconds - 2 * SECONDS_TO_END, **given))


def end(process: multiprocessing.Process, left: float, said: Path) -> dict:
    """Return how a part ended; where it has not, end it, and all that it started."""
    ended = {"ok": process.exitcode == 0}
    if process.is_alive():
        ended["why"] = f"no end after {left:.0f} s"
        for number, patience in ((signal.SIGTERM, SECONDS_TO_END), (signal.SIGKILL, None)):
            # its processes are in its session, but for launch/torchrun.py's: that ends
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # them, given SIGTERM
            process.join(patience)
    elif process.exitcode:
        ended["why"] = f"exit code {process.exitcode}"
    if not ended["ok"] and said.exists():
        ended["said"] = said.read_text(errors="replace")[-4000:]
    return ended


def part_of(name: str) -> Callable:
    parts = {}
    for module in MODULES:
        parts |= importlib.import_module(module).PARTS
    return parts[name]


def setting(notes: Path, seconds: float, **given):
    """Make what a part is given, a `gpu_checks.Setting`."""
    checks = importlib.import_module("gpu_checks")
    return checks.Setting(
        found=checks.Findings(notes), deadline=time.monotonic() + seconds, **given
    )


def said_of(notes: Path) -> Path:
    return notes.with_suffix(".log")


def read(notes: Path) -> dict:
    return json.loads(notes.read_text()) if notes.exists() else {}


def write(output: Path, results: dict[str, dict]) -> None:
    files.write_atomically(output, json.dumps(results, indent=1).encode())


def describe(result: dict) -> str:
    """Tell people how a part ended, in a line."""
    rest = {key: value for key, value in result.items() if key not in ("ok", "seconds", "said")}
    said = json.dumps(rest)
    said = said if len(said) < 300 else f"{said[:300]} ..."
    return f"{'ok' if result['ok'] else 'WRONG'} after {result.get('seconds', 0)} s: {said}"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, shared = parser.add_argument, CHECKOUT.parent / "shared" / "data" / "Task04_Hippocampus"
    data, every = os.environ.get("DINTS_TASK04", shared), list(SECONDS)
    add("--output", type=Path, required=True, help="what was found, as JSON")
    add("--parts", nargs="+", choices=SECONDS, default=every, help="(default: all, in order)")
    add("--without", nargs="+", choices=SECONDS, default=[], help="leave these out")
    add("--root", type=Path, default=data, help="Task04_Hippocampus, where it is there")
    add("--patience", type=float, default=1, help="times the seconds that parts have (default: 1)")
    add("--rehearse", action="store_true", help="small, on the CPU, all in one process")
    args = parser.parse_args(arguments)
    args.device = "cpu" if args.rehearse else "cuda"
    args.parts = [name for name in args.parts if name not in args.without]
    return args


if __name__ == "__main__":
    sys.exit(main(parse_args()))
