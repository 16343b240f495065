"""Run the searches and trainings behind the README's tables; each adds a line of JSON to
experiments/results.jsonl.

    python experiments/runner.py --list     what there is, and what is done
    python experiments/runner.py            run all that is not done, two at a time
    python experiments/runner.py --rows '*fold0*' --root data_msd/Task04_Hippocampus
    python experiments/runner.py --rows dynunet/recommended-6min-fold0-seed0 --again

What there is: rows.py. Rows run in the order of the patterns; one that trains what a search finds
waits for it. Trainings of several processes, which have as many cores, come last, one
after another. A row resumes where it was stopped, so that the runner may be stopped at
any time, and started again. --again runs rows that are done once more, and adds their lines.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch
from rows import HERE, Row, Search, is_ready, table

from dints import __version__
from dints.network.cost import device_name

RESULTS = HERE / "results.jsonl"


def main(args: argparse.Namespace) -> None:
    done = {result["name"] for result in read_results()}
    rows = {
        name: row
        for pattern in args.rows
        for name, row in table().items()
        if fnmatch.fnmatch(name, pattern)
    }
    if args.list:
        for name in rows:
            print("done" if name in done else "    ", name)
        return
    waiting = [row for name, row in rows.items() if args.again or name not in done]
    to_be_found = set().union(*(row.finds for row in waiting if isinstance(row, Search)))
    absent = [row.name for row in waiting if not is_ready(row) and row.network not in to_be_found]
    if absent:
        sys.exit(
            f"{len(absent)} rows train what no search has found yet, for example {absent[0]}: run "
            "the searches first"
        )
    carry_out(
        [row for row in waiting if row.processes == 1], [[core] for core in range(args.jobs)], args
    )
    for row in waiting:
        if row.processes > 1:
            carry_out([row], [list(range(row.processes))], args)


def carry_out(waiting: list[Row], cores_of_jobs: list[list[int]], args: argparse.Namespace) -> None:
    """Run the rows, as many at a time as there are lists of cores; add the line of each that is
    done.

    A search runs while what is known is trained; what it finds is trained when it has ended.
    """
    running: list[Row] = []
    turn = threading.Condition()

    def next_row() -> Row | None:
        searched = set().union(
            *(row.finds for row in [*waiting, *running] if isinstance(row, Search))
        )
        return next(
            (row for row in waiting if isinstance(row, Search) or row.network not in searched), None
        )

    def work(cores: list[int]) -> None:
        while True:
            with turn:
                while (row := next_row()) is None and waiting:
                    turn.wait()
                if row is None:
                    return
                waiting.remove(row)
                running.append(row)
            try:
                result = run(row, args.root, args.work, cores, len(cores_of_jobs))
                with turn, RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
            except Exception as error:  # what the row would have found is not there for others
                with turn:
                    waiting.clear()
                if not isinstance(error, subprocess.CalledProcessError):
                    raise
                sys.exit(
                    f"{row.name} failed (exit code {error.returncode}): see "
                    f"{args.work / row.name}.log"
                )
            finally:
                with turn:
                    running.remove(row)
                    turn.notify_all()
            dice = f"Dice {result['dice']:.4f}" if "dice" in result else "found"
            print(f"{row.name}: {dice} after {result['seconds'] / 60:.1f} minutes", flush=True)

    with concurrent.futures.ThreadPoolExecutor(len(cores_of_jobs)) as pool:
        for job in [pool.submit(work, cores) for cores in cores_of_jobs]:
            job.result()


def run(row: Row, root: Path, work: Path, cores: list[int], jobs: int) -> dict:
    """Carry out a row's commands on these cores; return its line of results."""
    folder = work / row.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number, command in enumerate(row.commands(root, folder)):
        start(command, cores if number == 0 else cores[:1], folder)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "name": row.name,
        **row.result(folder),
        "hardware": device_name(torch.device("cpu"), threads=1),
        "side_by_side": jobs,
        "commit": commit.stdout.strip(),
        "version": __version__,
        "torch": torch.__version__,
    }


def start(command: list[object], cores: list[int], folder: Path) -> None:
    """Run a Python script on the cores, a thread a process; what it says is added to
    ``folder``.log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with folder.with_name(f"{folder.name}.log").open("a", encoding="utf-8") as log:
        subprocess.run(
            ["taskset", "-c", ",".join(map(str, cores)), sys.executable, *map(str, command)],
            cwd=HERE.parent,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )


def read_results() -> list[dict]:
    """Return the results so far: of a row that was run again, its last."""
    if not RESULTS.exists():
        return []
    lines = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return list({line["name"]: line for line in lines}.values())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = os.environ.get(
        "DINTS_TASK04", HERE.parents[1] / "shared" / "data" / "Task04_Hippocampus"
    )
    parser.add_argument("--list", action="store_true", help="only tell the rows")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["*"],
        help="patterns of names, run in this order (default: all)",
    )
    parser.add_argument(
        "--root", type=Path, default=data, help="Task04_Hippocampus (default: %(default)s)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE.parent / "runs" / "experiments",
        help="where runs are kept",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="trainings side by side (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="run also what is done")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
