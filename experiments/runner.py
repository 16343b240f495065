"""Run the trainings behind the README's tables; a line of JSON a training is appended to experiments/results.jsonl.

    python experiments/runner.py --list                        what there is, and what is done
    python experiments/runner.py                               run all that is not done, two at a time
    python experiments/runner.py --rows 'recipe/*' --root data_msd/Task04_Hippocampus
    python experiments/runner.py --rows 'curve/u-*' --jobs 1 --threads 2

All are of Task04_Hippocampus, on a CPU. Each training is a process of --threads threads on cores of its own. It goes on
where it was stopped, so that the runner may be stopped at any time, and started again. --again runs rows that are done
once more, and adds their lines.
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
NUM_FOLDS, BATCH_SIZE = 4, 4


@dataclass(frozen=True)
class Row:
    """A training and its scores.

    Attributes:
        group: what it is compared with.
        label: what it differs in.
        network: an arch file in experiments/architectures, without its ending, or a name in `opponents.OPPONENTS`.
        flags: of train_dints.py.
        iterations: of the training.
    """

    group: str
    label: str
    network: str
    flags: str
    iterations: int
    fold: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.group}/{self.label}-{self.iterations}-fold{self.fold}-seed{self.seed}"


# What trainings are of: an arch file, or one of opponents.py; with its --channel_mul.
NETWORKS = {"u_shaped_5x3": 0.5, "dynunet": 1.0, "segresnet": 1.0}
# One validation, at the end: each training has the whole of its time.
TRAINING = f"--num_images_per_batch {BATCH_SIZE} --learning_rate 0.05 --num_epochs 100 --num_epochs_per_validation 100"
TRAINING += " --overlap_ratio 0 --num_workers 0 --cache ram"
RECOMMENDED = "--recipe recommended"
# Each adds to the one before; the last is the recommended recipe, and what it would be at half the resolution.
STEPS = {
    "published": "",
    "flips": "--flip_axes auto",
    "polynomial": "--flip_axes auto --learning_rate_schedule polynomial",
    "recommended": RECOMMENDED,
    "half-resolution": f"{RECOMMENDED} --use_downsample yes",
}


def table() -> dict[str, Row]:
    """Return all rows by name; the first ones to be run come first."""
    u, rows = "u_shaped_5x3", []
    for seed in (0, 1):
        for fold in (0, 1):
            rows += [Row("recipe", label, u, flags, 900, fold, seed) for label, flags in STEPS.items()]
            # As many as take the time of the 900: 0.47 s each on one idle core of an AMD EPYC (Zen 4), 0.83 and 0.37 s.
            rows.append(Row("recipe", "half-resolution", u, STEPS["half-resolution"], 1800, fold, seed))
            rows.append(Row("equal-time", "dynunet", "dynunet", RECOMMENDED, 510, fold, seed))
            rows.append(Row("equal-time", "segresnet", "segresnet", RECOMMENDED, 1150, fold, seed))
    # How Dice grows with time: each length has its own schedule.
    for fold in (0, 1):
        for iterations in (450, 1800, 3600, 7200):
            rows.append(Row("curve", "u", u, RECOMMENDED, iterations, fold, 0))
            rows.append(Row("curve", "dynunet", "dynunet", RECOMMENDED, round(iterations * 0.57), fold, 0))
    return {row.name: row for row in rows}


def main(args: argparse.Namespace) -> None:
    done = {result["name"] for result in read_results()}
    rows = {name: row for name, row in table().items() if fnmatch.fnmatch(name, args.rows)}
    if args.list:
        for name in rows:
            print("done" if name in done else "    ", name)
        return
    waiting = [row for name, row in rows.items() if args.again or name not in done]
    cores = [list(range(job * args.threads, (job + 1) * args.threads)) for job in range(args.jobs)]
    lock = threading.Lock()

    def work(own_cores: list[int]) -> None:
        while True:
            with lock:
                if not waiting:
                    return
                row = waiting.pop(0)
            try:
                result = run(row, args.root, args.work, own_cores, args.jobs)
            except subprocess.CalledProcessError as error:
                with lock:
                    waiting.clear()
                sys.exit(f"{row.name} failed (exit code {error.returncode}): see {args.work / row.name}.log")
            with lock, RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{row.name}: Dice {result['dice']:.4f} after {result['seconds'] / 60:.1f} minutes", flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for job in [pool.submit(work, own_cores) for own_cores in cores]:
            job.result()


def run(row: Row, root: Path, work: Path, cores: list[int], jobs: int) -> dict:
    """Train and score a row on these cores; return its line of results."""
    folder = work / row.name
    architecture, opponent = ARCHITECTURES / f"{row.network}.pth", []
    if not architecture.exists():  # an opponent's stages read some architecture and do not build it
        architecture, opponent = ARCHITECTURES / "u_shaped_5x3.pth", [HERE / "opponents.py", row.network]
    data = ["--root", root, "--fold", row.fold, "--num_folds", NUM_FOLDS]
    train = ["--arch_ckpt", architecture, "--channel_mul", NETWORKS[row.network], "--output_root", folder]
    train += ["--num_iterations", row.iterations, "--seed", row.seed, *TRAINING.split(), *row.flags.split()]
    infer = ["--checkpoint", folder / "best_metric_model.pth", "--output_root", folder / "segmentations"]
    start([*opponent, "train_dints.py", *data, *train], cores, folder)
    start([*opponent, "infer_dints.py", *data, *infer], cores, folder)
    return summary(row, folder, len(cores), jobs)


def start(command: list[object], cores: list[int], folder: Path) -> None:
    """Run a Python script on the cores, with a thread a core; what it says is added to ``folder``.log."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
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


def summary(row: Row, folder: Path, threads: int, jobs: int) -> dict:
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
        "dice": statistics.mean(classes.values()),
        "classes": classes,
        "cases": cases,
        "iterations_done": int(last["iteration"]),
        "seconds": float(last["seconds"]),
        **counted(row, load_safely(folder / "best_metric_model.pth")),
        "hardware": device_name(torch.device("cpu"), threads),
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
    parser.add_argument("--rows", default="*", help="pattern of the names of rows (default: all)")
    parser.add_argument("--root", type=Path, default=data, help="Task04_Hippocampus (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "experiments", help="where runs are kept")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="and cores, of each (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="run also what is done")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
