"""Run the trainings behind the README's tables; a line of JSON a training is appended to experiments/results.jsonl.

    python experiments/runner.py --list                        what there is, and what is done
    python experiments/runner.py                               run all that is not done, two at a time
    python experiments/runner.py --rows '*fold0*' --root data_msd/Task04_Hippocampus
    python experiments/runner.py --rows dynunet/recommended-6min-fold0-seed0 --again

All are of Task04_Hippocampus, on a CPU. A training is a process of one thread on a core of its own; those of several
processes, which have as many cores, come last, one after another. A training goes on where it was stopped, so that the
runner may be stopped at any time, and started again. --again runs rows that are done once more, and adds their lines.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from opponents import OPPONENTS

from dints import __version__
from dints.data.tasks import Task
from dints.network.architecture import architecture_from_dict
from dints.network.cost import counts, device_name
from dints.network.found import FoundNetwork
from dints.torch_files import load_safely

HERE = Path(__file__).resolve().parent
RESULTS, ARCHITECTURES = HERE / "results.jsonl", HERE / "architectures"
NUM_FOLDS, BATCH_SIZE = 4, 2


@dataclass(frozen=True)
class Network:
    """What trainings are of.

    Attributes:
        channel_mul: of an arch file in experiments/architectures, or of one of opponents.py.
        seconds: of a step of `BATCH_SIZE` patches on one idle core of an AMD EPYC (Zen 4): how many steps a row has.
    """

    channel_mul: float
    seconds: float


U = "u_shaped_skip_9x3"
NETWORKS = {
    U: Network(0.5, 0.174),
    "u_shaped_5x3": Network(0.5, 0.224),
    "dynunet": Network(1.0, 0.418),
    "segresnet": Network(1.0, 0.190),
}
# Recipes, and of those that take another time a step how many times as much.
RECIPES = {
    "published": "",
    "flips": "--flip_axes auto",
    "polynomial": "--flip_axes auto --learning_rate_schedule polynomial",
    "recommended": "--recipe recommended",
    "half-resolution": "--recipe recommended --use_downsample yes",
    "nnunet": "--recipe recommended --augmentation nnunet",
}
TIMES_AS_LONG = {"half-resolution": 0.59}
SPEEDUP_OF_TWO = 1.3  # of two processes on two cores over one on one, the other idle
# One validation, at the end: each training has the whole of its time.
TRAINING = "--learning_rate 0.05 --learning_rate_scaling none --num_epochs 100 --num_epochs_per_validation 100"
TRAINING += " --overlap_ratio 0 --num_workers 0 --cache ram"


@dataclass(frozen=True)
class Row:
    """A training and its scores.

    Attributes:
        network: a key of `NETWORKS`.
        recipe: a key of `RECIPES`.
        minutes: that it would take on idle cores; side by side with others it takes longer.
        processes: that share it and its batches.
    """

    network: str
    recipe: str
    minutes: float
    fold: int
    seed: int
    processes: int = 1

    @property
    def name(self) -> str:
        shared = f"-{self.processes}processes" if self.processes > 1 else ""
        return f"{self.network}/{self.recipe}-{self.minutes:g}min-fold{self.fold}-seed{self.seed}{shared}"

    @property
    def iterations(self) -> int:
        """The steps of so many minutes, to two digits."""
        seconds = NETWORKS[self.network].seconds * TIMES_AS_LONG.get(self.recipe, 1)
        seconds /= SPEEDUP_OF_TWO if self.processes == 2 else 1
        return int(float(f"{60 * self.minutes / seconds:.2g}"))


def table() -> dict[str, Row]:
    """Return all rows by name; the first ones to be run come first.

    Folds 0 and 1 take part in choices; 2 and 3 in none, and only what was chosen is reported on them.
    """
    opponents = [network for network in NETWORKS if network != U]
    rows = []
    for fold, seed in ((0, 0), (1, 0), (0, 1)):
        rows += [Row(U, recipe, 6, fold, seed) for recipe in RECIPES]
        rows += [Row(network, "recommended", 6, fold, seed) for network in opponents]
    for fold in (2, 3):
        rows += [Row(U, recipe, 6, fold, 0) for recipe in ("published", "recommended")]
        rows += [Row(network, "recommended", 6, fold, 0) for network in opponents]
    rows += [Row(U, recipe, 24, 1, 0) for recipe in ("recommended", "nnunet")]
    rows.append(Row(U, "nnunet", 24, 0, 0))
    for minutes in (3, 12, 24, 48):  # how Dice grows with time: each length has its own schedule
        rows += [Row(network, "recommended", minutes, 0, 0) for network in (U, "dynunet", "segresnet")]
    for fold in (0, 2, 3):
        rows += [Row(U, "recommended", minutes, fold, 0, processes=2) for minutes in (10, 60)]
    return {row.name: row for row in rows}


def main(args: argparse.Namespace) -> None:
    done = {result["name"] for result in read_results()}
    rows = {name: row for pattern in args.rows for name, row in table().items() if fnmatch.fnmatch(name, pattern)}
    if args.list:
        for name in rows:
            print("done" if name in done else "    ", name)
        return
    waiting = [row for name, row in rows.items() if args.again or name not in done]
    alone = [row for row in waiting if row.processes == 1]
    carry_out(alone, [[core] for core in range(args.jobs)], args)
    for row in waiting:
        if row.processes > 1:
            carry_out([row], [list(range(row.processes))], args)


def carry_out(waiting: list[Row], cores_of_jobs: list[list[int]], args: argparse.Namespace) -> None:
    """Run the rows, as many at a time as there are lists of cores; add the line of each that is done."""
    lock = threading.Lock()

    def work(cores: list[int]) -> None:
        while True:
            with lock:
                if not waiting:
                    return
                row = waiting.pop(0)
            try:
                result = run(row, args.root, args.work, cores, len(cores_of_jobs))
            except subprocess.CalledProcessError as error:
                with lock:
                    waiting.clear()
                sys.exit(f"{row.name} failed (exit code {error.returncode}): see {args.work / row.name}.log")
            with lock, RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{row.name}: Dice {result['dice']:.4f} after {result['seconds'] / 60:.1f} minutes", flush=True)

    with concurrent.futures.ThreadPoolExecutor(len(cores_of_jobs)) as pool:
        for job in [pool.submit(work, cores) for cores in cores_of_jobs]:
            job.result()


def run(row: Row, root: Path, work: Path, cores: list[int], jobs: int) -> dict:
    """Train and score a row on these cores; return its line of results."""
    folder = work / row.name
    architecture, opponent = ARCHITECTURES / f"{row.network}.pth", []
    if not architecture.exists():  # an opponent's stages read some architecture and do not build it
        architecture, opponent = ARCHITECTURES / f"{U}.pth", [HERE / "opponents.py", row.network]
    data = ["--root", root, "--fold", row.fold, "--num_folds", NUM_FOLDS]
    train = ["--arch_ckpt", architecture, "--channel_mul", NETWORKS[row.network].channel_mul, "--seed", row.seed]
    train += ["--num_images_per_batch", BATCH_SIZE // row.processes, "--num_iterations", row.iterations]
    train += [*TRAINING.split(), *RECIPES[row.recipe].split(), "--output_root", folder]
    infer = ["--checkpoint", folder / "best_metric_model.pth", "--output_root", folder / "segmentations"]
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", row.processes]
    launched = launched if row.processes > 1 else []
    start([*launched, *opponent, "train_dints.py", *data, *train], cores, folder)
    start([*opponent, "infer_dints.py", *data, *infer], cores[:1], folder)
    return summary(row, folder, jobs)


def start(command: list[object], cores: list[int], folder: Path) -> None:
    """Run a Python script on the cores, a thread a process; what it says is added to ``folder``.log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.log").open("a", encoding="utf-8") as log:
        subprocess.run(
            ["taskset", "-c", ",".join(map(str, cores)), sys.executable, *map(str, command)],
            cwd=HERE.parent,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )


def summary(row: Row, folder: Path, jobs: int) -> dict:
    """Gather what is to be known about a row that is done."""
    with (folder / "loss_history.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    with (folder / "segmentations" / "scores.csv").open(newline="") as file:
        cases = {
            line.pop("case"): {name: float(dice) for name, dice in line.items() if dice}
            for line in csv.DictReader(file)
        }
    names = {name: None for case in cases.values() for name in case}
    classes = {name: statistics.mean(case[name] for case in cases.values() if name in case) for name in names}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    )
    return {
        "name": row.name,
        **asdict(row),
        "iterations": row.iterations,
        "dice": statistics.mean(classes.values()),
        "classes": classes,
        "cases": cases,
        "iterations_done": int(last["iteration"]),
        "seconds": float(last["seconds"]),
        **counted(row, load_safely(folder / "best_metric_model.pth")),
        "hardware": device_name(torch.device("cpu"), threads=1),
        "side_by_side": jobs,
        "commit": commit.stdout.strip(),
        "version": __version__,
        "torch": torch.__version__,
    }


def counted(row: Row, model: dict) -> dict[str, float]:
    """Count parameters, and the multiply-adds and activations of a training step's forward pass."""
    task = Task.from_dict(model["task"])
    settings = task.num_channels, task.num_classes, model["channel_mul"]
    if row.network in OPPONENTS:
        make = partial(OPPONENTS[row.network], *settings)
    else:
        make = partial(FoundNetwork, architecture_from_dict(model["architecture"], row.network), *settings)
    return counts(make, (BATCH_SIZE, task.num_channels, *task.patch_size))


def read_results() -> list[dict]:
    """Return the results so far: of a row that was run again, its last."""
    if not RESULTS.exists():
        return []
    lines = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return list({line["name"]: line for line in lines}.values())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("DINTS_TASK04", HERE.parents[1] / "shared" / "data" / "Task04_Hippocampus")
    parser.add_argument("--list", action="store_true", help="only tell the rows")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of names, run in this order (default: all)")
    parser.add_argument("--root", type=Path, default=data, help="Task04_Hippocampus (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "experiments", help="where runs are kept")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="run also what is done")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
