"""Run the trainings behind the README's tables; each adds a line of JSON to results.jsonl.

    python experiments/runner.py --list                               what has been run
    python experiments/runner.py --rows '*-6min-fold0*' --root data_msd/Task04_Hippocampus

A row is a training and its scores; its settings stand in its line, and `Training.commands` makes
its command lines of them. Rows that are to be run for the first time are listed in NEW. All are of
Task04_Hippocampus, on a CPU, each process of one thread on a core of its own. Folds 0 and 1 take
part in choices of recipes, 2 and 3 in none. A row resumes where it was stopped, so the runner may
be stopped at any time. The lines of searches have their commands, to be run by hand; what they
found is in experiments/architectures.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import fnmatch
import json
import os
import queue
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from opponents import OPPONENTS

from dints import __version__
from dints.data.tasks import Task
from dints.network.architecture import architecture_from_dict
from dints.network.cost import counts, device_name
from dints.network.discrete import DiscreteNetwork
from dints.torch_files import load_safely

HERE = Path(__file__).resolve().parent
RESULTS, ARCHITECTURES = HERE / "results.jsonl", HERE / "architectures"
NUM_FOLDS, BATCH_SIZE = 4, 2
U = "u_shaped_skip_9x3"
RECIPES = {
    "published": "",
    "flips": "--flip_axes auto",
    "polynomial": "--flip_axes auto --learning_rate_schedule polynomial",
    "recommended": "--recipe recommended",
    "half-resolution": "--recipe recommended --use_downsample yes",
    "nnunet": "--recipe recommended --augmentation nnunet",
    "published-augmentation": "--recipe recommended --augmentation published",
}
# One validation, at the end: each training has the whole of its time.
TRAINING = (
    "--learning_rate 0.05 --num_epochs 100 --num_epochs_per_validation 100 --overlap_ratio 0 "
    "--num_workers 0 --cache ram"
)


@dataclass(frozen=True)
class Training:
    """A training and its scores.

    Attributes:
        network: an arch file in experiments/architectures, or one of opponents.py.
        recipe: a key of `RECIPES`.
        minutes: that so many iterations would take on idle cores, of rows at equal time.
        memory_mib: that the network's width fills, of rows at equal memory.
        processes: that share it and its batches.
    """

    network: str
    recipe: str
    fold: int
    seed: int
    iterations: int
    channel_mul: float
    minutes: float | None = None
    memory_mib: float | None = None
    processes: int = 1

    @property
    def name(self) -> str:
        shared = f"-{self.processes}processes" if self.processes > 1 else ""
        length = f"{self.minutes:g}min" if self.minutes else f"{self.memory_mib:g}mib"
        return f"{self.network}/{self.recipe}-{length}-fold{self.fold}-seed{self.seed}{shared}"

    def commands(self, root: Path, folder: Path) -> list[list[object]]:
        """Return the command that trains it, and the one that scores it."""
        # An opponent's stages read some architecture and do not build it.
        opponent = [HERE / "opponents.py", self.network] if self.network in OPPONENTS else []
        architecture = ARCHITECTURES / f"{U if opponent else self.network}.pth"
        data = ["--root", root, "--fold", self.fold, "--num_folds", NUM_FOLDS]
        train = ["--arch_ckpt", architecture, "--channel_mul", self.channel_mul]
        train += ["--seed", self.seed, "--num_iterations", self.iterations]
        train += ["--num_images_per_batch", BATCH_SIZE // self.processes]
        train += [*TRAINING.split(), *RECIPES[self.recipe].split(), "--output_root", folder]
        model, masks = folder / "best_metric_model.pth", folder / "segmentations"
        infer = ["--checkpoint", model, "--output_root", masks]
        launched = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launched = [*launched, self.processes] if self.processes > 1 else []
        return [
            [*launched, *opponent, "train_dints.py", *data, *train],
            [*opponent, "infer_dints.py", *data, *infer],
        ]

    def result(self, folder: Path) -> dict:
        """Gather what is to be known about a row that is done."""
        last = read_table(folder / "loss_history.csv")[-1]
        cases = {
            line.pop("case"): {name: float(dice) for name, dice in line.items() if dice}
            for line in read_table(folder / "segmentations" / "scores.csv")
        }
        names = {name: None for case in cases.values() for name in case}
        classes = {
            name: statistics.mean(case[name] for case in cases.values() if name in case)
            for name in names
        }
        return {
            **asdict(self),
            "dice": statistics.mean(classes.values()),
            "classes": classes,
            "cases": cases,
            "iterations_done": int(last["iteration"]),
            "seconds": float(last["seconds"]),
            **self.cost(load_safely(folder / "best_metric_model.pth")),
        }

    def cost(self, model: dict) -> dict[str, float]:
        """Count parameters, and a forward pass' multiply-adds and activations, of a model file."""
        task = Task.from_dict(model["task"])
        make = OPPONENTS.get(self.network) or partial(
            DiscreteNetwork, architecture_from_dict(model["architecture"], self.network)
        )
        build = partial(make, task.num_channels, task.num_classes, model["channel_mul"])
        return counts(build, (BATCH_SIZE, task.num_channels, *task.patch_size))


NEW: list[Training] = []


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_results() -> list[dict]:
    """Return the results so far: of a row that was run again, its last."""
    lines = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return list({line["name"]: line for line in lines}.values())


def table() -> dict[str, Training]:
    """Return the trainings that have been run, and those that are to be, by name."""
    names = {field.name for field in fields(Training)}
    lines = (line for line in read_results() if "network" in line)
    done = [Training(**{k: v for k, v in line.items() if k in names}) for line in lines]
    return {row.name: row for row in [*done, *NEW]}


def main(settings: argparse.Namespace) -> None:
    done = {line["name"] for line in read_results()}
    rows = [row for row in table().values() if fnmatch.fnmatch(row.name, settings.rows)]
    if settings.list:
        print(*(f"{'done' if row.name in done else '    '} {row.name}" for row in rows), sep="\n")
        return
    waiting = [row for row in rows if settings.again or row.name not in done]
    # Those of several processes come last, one after another.
    for processes in sorted({row.processes for row in waiting}):
        alike = [row for row in waiting if row.processes == processes]
        carry_out(alike, settings, settings.jobs if processes == 1 else 1)


def carry_out(rows: list[Training], settings: argparse.Namespace, jobs: int) -> None:
    """Run rows of equally many processes, so many at a time; the first failure ends it."""
    cores, width = queue.SimpleQueue(), rows[0].processes
    for job in range(jobs):
        cores.put(range(job * width, (job + 1) * width))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(run, row, settings, cores, jobs) for row in rows]
        for ended in concurrent.futures.as_completed(running):
            if ended.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            line = ended.result()
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            minutes = line["seconds"] / 60
            print(f"{line['name']}: Dice {line['dice']:.4f} after {minutes:.1f} minutes")


def run(row: Training, settings: argparse.Namespace, cores: queue.SimpleQueue, jobs: int) -> dict:
    """Carry out a row's commands on free cores; return its line of results."""
    folder, own = settings.work / row.name, cores.get()
    folder.parent.mkdir(parents=True, exist_ok=True)
    train, infer = row.commands(settings.root, folder)
    try:
        start(train, own, folder)
        start(infer, own[:1], folder)
    finally:
        cores.put(own)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, text=True)
    return {
        "name": row.name,
        **row.result(folder),
        "hardware": device_name(torch.device("cpu"), threads=1),
        "side_by_side": jobs,
        "commit": commit.strip(),
        "version": __version__,
        "torch": torch.__version__,
    }


def start(command: list[object], cores: range, folder: Path) -> None:
    """Run a Python script on the cores, a thread a process; its words are added to a log."""
    pinned = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    path = folder.with_name(f"{folder.name}.log")
    with path.open("a", encoding="utf-8") as log:
        done = subprocess.run(pinned, cwd=HERE.parent, env=environment, stdout=log, stderr=log)
    if done.returncode:
        raise RuntimeError(f"a command failed (exit code {done.returncode}): see {path}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, runs = parser.add_argument, HERE.parent / "runs" / "experiments"
    shared = HERE.parents[1] / "shared" / "data" / "Task04_Hippocampus"
    add("--list", action="store_true", help="only list the rows")
    add("--rows", default="*", help="pattern of names (default: all)")
    add("--again", action="store_true", help="run also what is done, and add its lines")
    add("--root", type=Path, default=shared, help="Task04_Hippocampus (default: %(default)s)")
    add("--work", type=Path, default=runs, help="folder of the runs (default: %(default)s)")
    add("--jobs", type=int, default=2, help="trainings side by side (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
