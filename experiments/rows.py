"""What the experiments are: searches and trainings, each a row with the commands that run it and
the line it leaves.

All are of Task04_Hippocampus, on a CPU, a process of one thread on a core of its own. What a row's
commands find is
measured on its fold: folds 0 and 1 take part in choices of recipes, 2 and 3 in none. Searches see
    none of the cases
of the fold that their winners are scored on.
"""

from __future__ import annotations

import csv
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from opponents import OPPONENTS
from torch import nn

from dints.data.tasks import TASKS, Task
from dints.evolution.proposals import Limits, proposed
from dints.network.architecture import (
    Architecture,
    architecture_from_dict,
    load_architecture,
    save_architecture,
)
from dints.network.cost import counts, fitting_channel_mul, step_mib
from dints.network.discrete import DiscreteNetwork
from dints.network.operations import PUBLISHED
from dints.torch_files import load_safely

HERE = Path(__file__).resolve().parent
ARCHITECTURES = HERE / "architectures"
NUM_FOLDS, BATCH_SIZE = 4, 2


@dataclass(frozen=True)
class Network:
    """What trainings of equal time are of.

    Attributes:
        channel_mul: of an arch file in experiments/architectures, or of one of opponents.py.
        seconds: of a step of `BATCH_SIZE` patches on one idle core of an AMD EPYC (Zen 4): how many
            steps a row has.
        speedup_of_two: of two processes on two cores over one on one, the other idle.
    """

    channel_mul: float
    seconds: float
    speedup_of_two: float = 1.3


U = "u_shaped_skip_9x3"
NETWORKS = {
    U: Network(0.5, 0.174),
    "u_shaped_5x3": Network(0.5, 0.224),
    "dynunet": Network(1.0, 0.418, 1.85),
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
    "published-augmentation": "--recipe recommended --augmentation published",
}
# short ones have it by the recommended recipe
SHORT = [name for name in RECIPES if name != "published-augmentation"]
TIMES_AS_LONG = {"half-resolution": 0.59}
# One validation, at the end: each training has the whole of its time.
TRAINING = "--learning_rate 0.05 --num_epochs 100 --num_epochs_per_validation 100"
TRAINING += " --overlap_ratio 0 --num_workers 0 --cache ram"

EQUAL_ITERATIONS = 2000  # of trainings at equal memory
NUM_RANDOM = 8  # random architectures that they are compared with
SPACE = "--num_blocks 5 --num_depths 3 --keep_finest"
GRADIENT = (
    "--channel_mul 0.25 --num_images_per_batch 2 --num_epochs 16 --num_epochs_warmup 6 "
    "--learning_rate_arch 0.02"
)
GRADIENT += " --num_epochs_per_validation 16 --ram_budget fixed --factor_ram_cost 0.5"
COMMON = "--overlap_ratio 0.25 --num_workers 0 --cache ram"
COMPETITION = "--num_iterations 800"
# Candidates of each kind of search. The control has as many more as the gradient search before the
# other takes time.
SEARCHES = {"search": 16, "control": 24}
# MiB, and the kinds of searches: the first showed enough
BUDGETS = {30.0: ("search", "control"), 60.0: ("control",)}
SEARCH_SEEDS, TRAINING_SEEDS = (0, 1, 2), (0, 1)


@dataclass(frozen=True)
class Training:
    """A training and its scores, for a time or at a memory.

    Attributes:
        network: a key of `NETWORKS`; or at a memory a name of `architecture_of`, or of an opponent.
        recipe: a key of `RECIPES`.
        minutes: that it would take on idle cores; side by side with others it takes longer.
        memory_mib: that the network's width fills, where ``minutes`` is None.
        processes: that share it and its batches.
    """

    network: str
    recipe: str
    minutes: float | None
    fold: int
    seed: int
    processes: int = 1
    memory_mib: float | None = None

    @property
    def name(self) -> str:
        shared = f"-{self.processes}processes" if self.processes > 1 else ""
        length = f"{self.minutes:g}min" if self.minutes else f"{self.memory_mib:g}mib"
        return f"{self.network}/{self.recipe}-{length}-fold{self.fold}-seed{self.seed}{shared}"

    @property
    def iterations(self) -> int:
        """The steps of so many minutes, to two digits."""
        if self.minutes is None:
            return EQUAL_ITERATIONS
        network = NETWORKS[self.network]
        seconds = network.seconds * TIMES_AS_LONG.get(self.recipe, 1)
        seconds /= network.speedup_of_two if self.processes == 2 else 1
        return int(float(f"{60 * self.minutes / seconds:.2g}"))

    @property
    def channel_mul(self) -> float:
        if self.minutes is not None:
            return NETWORKS[self.network].channel_mul
        return filling(self.network, self.memory_mib)

    def commands(self, root: Path, folder: Path) -> list[list[object]]:
        """Return what trains it, on as many cores as it has processes, and then what scores it, on
        one.
        """
        # An opponent's stages read some architecture and do not build it.
        opponent = [HERE / "opponents.py", self.network] if self.network in OPPONENTS else []
        architecture = folder.with_suffix(".pth")
        save_architecture(architecture, architecture_of(U if opponent else self.network))
        data = ["--root", root, "--fold", self.fold, "--num_folds", NUM_FOLDS]
        train = [
            "--arch_ckpt",
            architecture,
            "--channel_mul",
            self.channel_mul,
            "--seed",
            self.seed,
        ]
        train += [
            "--num_images_per_batch",
            BATCH_SIZE // self.processes,
            "--num_iterations",
            self.iterations,
        ]
        train += [*TRAINING.split(), *RECIPES[self.recipe].split(), "--output_root", folder]
        infer = [
            "--checkpoint",
            folder / "best_metric_model.pth",
            "--output_root",
            folder / "segmentations",
        ]
        launched = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            self.processes,
        ]
        launched = launched if self.processes > 1 else []
        return [
            [*launched, *opponent, "train_dints.py", *data, *train],
            [*opponent, "infer_dints.py", *data, *infer],
        ]

    def result(self, folder: Path) -> dict:
        """Gather what is to be known about a row that is done."""
        last = _table(folder / "loss_history.csv")[-1]
        cases = {
            line.pop("case"): {name: float(dice) for name, dice in line.items() if dice}
            for line in _table(folder / "segmentations" / "scores.csv")
        }
        names = {name: None for case in cases.values() for name in case}
        classes = {
            name: statistics.mean(case[name] for case in cases.values() if name in case)
            for name in names
        }
        return {
            **asdict(self),
            "iterations": self.iterations,
            "channel_mul": self.channel_mul,
            "dice": statistics.mean(classes.values()),
            "classes": classes,
            "cases": cases,
            "iterations_done": int(last["iteration"]),
            "seconds": float(last["seconds"]),
            **counted(self.network, load_safely(folder / "best_metric_model.pth")),
        }


@dataclass(frozen=True)
class Search:
    """A search whose winner is trained by other rows.

    Attributes:
        kind: a key of `SEARCHES`.
        memory_mib: that every candidate fills.
    """

    kind: str
    memory_mib: float
    fold: int
    seed: int
    processes: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.memory_mib:g}mib_fold{self.fold}_seed{self.seed}"

    @property
    def finds(self) -> set[str]:
        """Names of the architectures that it leaves in `ARCHITECTURES`."""
        return {self.name} | ({self._gradient} if self.kind == "search" else set())

    @property
    def _gradient(self) -> str:
        return f"gradient_fold{self.fold}_seed{self.seed}"

    def commands(self, root: Path, folder: Path) -> Iterator[list[object]]:
        """Yield the commands of the search; the second takes what the first has found."""
        data = ["--root", root, "--fold", self.fold, "--num_folds", NUM_FOLDS, "--seed", self.seed]
        data += f"--recipe recommended {SPACE} {COMMON}".split()
        given = []
        if self.kind == "search":
            yield ["search_dints.py", *data, *GRADIENT.split(), "--output_root", folder]
            given = ["--arch_ckpt", *folder.glob("search_code_[0-9]*.pth")]
        competition = [
            *COMPETITION.split(),
            "--candidates",
            SEARCHES[self.kind],
            "--memory_mib",
            self.memory_mib,
        ]
        yield ["evolve_dints.py", *data, *competition, *given, "--output_root", folder]

    def result(self, folder: Path) -> dict:
        """Keep what was found as arch files, which are committed, and return the course of the
        competition.
        """
        shutil.copy(folder / "search_code_winner.pth", ARCHITECTURES / f"{self.name}.pth")
        gradient, losses = 0.0, folder / "loss_history.csv"
        if losses.exists():
            gradient, (found,) = (
                float(_table(losses)[-1]["seconds"]),
                folder.glob("search_code_[0-9]*.pth"),
            )
            shutil.copy(found, ARCHITECTURES / f"{self._gradient}.pth")
        candidates = _table(folder / "candidates.csv")
        seconds = gradient + sum(float(row["seconds"]) for row in candidates)
        return {
            **asdict(self),
            "seconds": seconds,
            "gradient_seconds": gradient,
            "candidates": candidates,
        }


Row = Training | Search


def table() -> dict[str, Row]:
    """Return all rows by name; the first ones to be run come first."""
    rows = [*equal_time(), *equal_memory()]
    return {row.name: row for row in rows}


def equal_time() -> list[Row]:
    """List what recipes and given networks are compared by."""
    opponents = [network for network in NETWORKS if network != U]
    rows = []
    for fold, seed in ((0, 0), (1, 0), (0, 1)):
        rows += [Training(U, recipe, 6, fold, seed) for recipe in SHORT]
        rows += [Training(network, "recommended", 6, fold, seed) for network in opponents]
    for fold in (2, 3):
        rows += [Training(U, recipe, 6, fold, 0) for recipe in ("published", "recommended")]
        rows += [Training(network, "recommended", 6, fold, 0) for network in opponents]
    rows += [
        Training(U, recipe, 24, fold, 0)
        for fold in (0, 1)
        for recipe in ("recommended", "published-augmentation")
    ]
    # at which length `auto` should change
    rows += [Training(U, "nnunet", 12, fold, 0) for fold in (0, 1)]
    rows += [Training(U, "recommended", 12, 1, 0)]
    for minutes in (3, 12, 24, 48):  # how Dice grows with time: each length has its own schedule
        rows += [
            Training(network, "recommended", minutes, 0, 0)
            for network in (U, "dynunet", "segresnet")
        ]
    rows += [Training(network, "recommended", 60, 0, 0) for network in (U, "dynunet")]
    return rows + [
        Training(network, "recommended", 10, 0, 0, processes=2) for network in (U, "dynunet")
    ]


def equal_memory(fold: int = 2) -> list[Row]:
    """List what searches are compared by: what they found, and what costs no search, trained alike
    at equal memory.
    """
    rows = []
    for memory, kinds in BUDGETS.items():
        searches = [Search(kind, memory, fold, seed) for seed in SEARCH_SEEDS for kind in kinds]
        names = [search.name for search in searches] + ["u_shaped_5x3", U, *OPPONENTS]
        names += [f"random_{number}" for number in range(NUM_RANDOM)]
        names += [f"gradient_fold{fold}_seed{seed}" for seed in SEARCH_SEEDS]
        rows += searches
        for seed in TRAINING_SEEDS:
            rows += [
                Training(name, "recommended", None, fold, seed, memory_mib=memory) for name in names
            ]
    return rows


def is_ready(row: Row) -> bool:
    """Tell whether what a row trains has been found."""
    known = isinstance(row, Search) or row.network in OPPONENTS or row.network.startswith("random_")
    return known or (ARCHITECTURES / f"{row.network}.pth").exists()


def architecture_of(name: str) -> Architecture:
    """Return the architecture of a file in experiments/architectures, or the random one with a
    number.
    """
    if name.startswith("random_"):
        return random_architectures()[int(name.removeprefix("random_"))]
    return load_architecture(ARCHITECTURES / f"{name}.pth")


@cache
def random_architectures() -> list[Architecture]:
    """Draw as the searches do, with a seed that none of them has."""
    task, seed = TASKS["Task04_Hippocampus"], 1000
    shape = BATCH_SIZE, task.num_channels, *task.patch_size
    limits = Limits(max(BUDGETS), 5, 3, PUBLISHED, False, True, shape, task.num_classes)
    return [
        candidate.architecture for candidate in proposed(NUM_RANDOM, ["random"], limits, (), seed)
    ]


@cache
def filling(network: str, memory_mib: float) -> float:
    """Return the width at which a network's training step fills the memory, in steps of 1/32."""
    task = TASKS["Task04_Hippocampus"]
    size = task.num_channels, task.num_classes
    if network not in OPPONENTS:
        return fitting_channel_mul(
            architecture_of(network), memory_mib, *size, task.patch_size, BATCH_SIZE
        )
    steps, shape = 2, (BATCH_SIZE, task.num_channels, *task.patch_size)
    while _step_mib(partial(OPPONENTS[network], *size, (steps + 1) / 32), shape) <= memory_mib:
        steps += 1
    return steps / 32


def _step_mib(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> float:
    counted = counts(make, shape)
    return step_mib(counted["parameters"], counted["activation_mib"])


def counted(network: str, model: dict) -> dict[str, float]:
    """Count parameters, and the multiply-adds and activations of a training step's forward pass, of
    a model file.
    """
    task = Task.from_dict(model["task"])
    settings = task.num_channels, task.num_classes, model["channel_mul"]
    if network in OPPONENTS:
        make = partial(OPPONENTS[network], *settings)
    else:
        make = partial(
            DiscreteNetwork, architecture_from_dict(model["architecture"], network), *settings
        )
    return counts(make, (BATCH_SIZE, task.num_channels, *task.patch_size))


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
