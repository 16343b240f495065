"""Settles in one go what only a machine with a GPU can: whether all is right there, and how fast.

    python tests/gpu.py --output results.json                       at most 9 minutes on one GPU
    python tests/gpu.py --output results.json --parts agrees steps  some of it
    python tests/gpu.py --output results.json --rehearse            all of it small, on the CPU, to try this script

Needed are torch, monai, nibabel and what else requirements.txt names for running; no internet. Correctness comes first
(gpu_checks.py), then speed (gpu_speed.py), then what takes minutes: compiled networks, quickstart.sh, a search and a
retraining of Task04, where it is there. Each part is a process of its own, so that one that fails, or hangs, takes no
other with it. The file has what was found so far, part by part: `ok` false where something was wrong, with the end of
what it said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests"), str(CHECKOUT / "tests" / "benchmarks")]

import gpu_checks  # noqa: E402  (the repository is no package: its root must be on the path first)
import gpu_speed  # noqa: E402
from gpu_checks import Setting  # noqa: E402

from dints import files  # noqa: E402

# Names, and functions of a `Setting` that return what they found, in their order.
PARTS = {**gpu_checks.PARTS, **gpu_speed.PARTS, **gpu_checks.LAST, **gpu_speed.LAST}
RESULT = "result: "
LEAST_SECONDS = 10  # that a part is begun for


def main(args: argparse.Namespace) -> int:
    if args.part:
        found = PARTS[args.part](setting_of(args, Path(args.folder)))
        print(RESULT + json.dumps(found))
        return 0
    deadline, results = time.monotonic() + 60 * args.minutes, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts:
            left = deadline - time.monotonic()
            results[name] = run(name, args, folder, left) if left > LEAST_SECONDS else {"ok": False, "why": "no time"}
            files.write_atomically(args.output, json.dumps(results, indent=1).encode())
            print(f"{name}: {describe(results[name])}", flush=True)
    return 0 if all(result["ok"] for result in results.values()) else 1


def run(name: str, args: argparse.Namespace, folder: str, left: float) -> dict:
    """Run a part in a process of its own, or in this one in a rehearsal; return what it found."""
    start = time.monotonic()
    if args.rehearse:
        found = {"ok": True, **PARTS[name](setting_of(args, Path(folder), left))}
    else:
        command = [sys.executable, __file__, "--part", name, "--folder", folder, "--seconds", str(left)]
        command += ["--output", str(args.output), "--root", str(args.root), "--device", args.device]
        found = result_of(command, left)
    return {"seconds": round(time.monotonic() - start, 1), **found}


def result_of(command: list[str], limit: float) -> dict:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=CHECKOUT)
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace")
        return {"ok": False, "why": f"no end after {limit:.0f} s", "said": said[-2000:]}
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not lines:
        return {"ok": False, "why": f"exit code {done.returncode}", "said": (done.stdout + done.stderr)[-4000:]}
    return {"ok": True, **json.loads(lines[-1].removeprefix(RESULT))}


def setting_of(args: argparse.Namespace, folder: Path, left: float | None = None) -> Setting:
    seconds = args.seconds if left is None else left
    return Setting(args.device, args.rehearse, folder, args.root, time.monotonic() + seconds)


def describe(result: dict) -> str:
    """Tell people how a part ended, in a line."""
    rest = {key: value for key, value in result.items() if key not in ("ok", "seconds", "said")}
    said = json.dumps(rest)
    said = said if len(said) < 300 else f"{said[:300]} ..."
    return f"{'ok' if result['ok'] else 'WRONG'} after {result.get('seconds', 0)} s: {said}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("DINTS_TASK04", CHECKOUT.parent / "shared" / "data" / "Task04_Hippocampus")
    parser.add_argument("--output", type=Path, required=True, help="what was found, as JSON")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all, in this order)")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=[], help="leave these out")
    parser.add_argument("--minutes", type=float, default=9, help="after which no part goes on (default: 9)")
    parser.add_argument("--root", type=Path, default=data, help="Task04_Hippocampus, where it is there")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU, all in one process")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = "cpu" if args.rehearse else args.device
    args.parts = [name for name in args.parts if name not in args.without]
    return args


if __name__ == "__main__":
    sys.exit(main(parse_args()))
