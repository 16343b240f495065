"""Time the published data recipe in MONAI's calls against ours: the two alternate in one process,
on the same files.

    python benchmarks/data.py
    python benchmarks/data.py --shapes 256x256x128 --repeats 9
    python benchmarks/data.py --loader --device cuda

Cases are CT volumes of the phantom, 0.8 x 0.8 x 2.5 mm, which get the given shapes when they are
resampled to 1 mm; labels are of 3 classes, patches 96 x 96 x 96. "ratio" is the median over the
pairs of published/ours, with the smallest and the largest. Cases are cached with all threads,
samples made with one, as by a loader's worker. The time of a sample is the mean of --samples of
them, as they are drawn. Memory is what caching a case takes beyond what was held before it, in a
process of its own.

--loader trains a network instead, on cases cached on disk, and tells the share of the time that it
waits for batches.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "data")]

import published_data  # noqa: E402  (the repository is no package: its root must be on the path first)
import steps  # noqa: E402
from small_run import begun  # noqa: E402

from dints.data.augmentation import augment  # noqa: E402
from dints.data.cache import Cache  # noqa: E402
from dints.data.cases import Prepared, prepare  # noqa: E402
from dints.data.listing import Case  # noqa: E402
from dints.data.loaders import TrainingSamples, training_loader  # noqa: E402
from dints.data.phantom import make_case  # noqa: E402
from dints.data.tasks import TASKS  # noqa: E402
from dints.network.discrete import DiscreteNetwork  # noqa: E402
from dints.running.machine import cores_per_process  # noqa: E402
from dints.running.processes import Processes, started  # noqa: E402
from dints.settings import PatchSettings, RetrainingSettings, TrainingMachineSettings  # noqa: E402
from dints.training.steps import WeightsTrainer  # noqa: E402

TASK = TASKS["Task07_Pancreas"]
# mm, nearly: such that the resampled shape is exactly the one asked for
FILE_SPACING = (0.8, 0.8, 2.5)
CPU = torch.device("cpu")
WEIGHTS = RetrainingSettings(learning_rate_schedule="halvings", average_decay=0.0)
SIDES = ("published", "ours")

Shape = tuple[int, int, int]


def main(args: argparse.Namespace) -> None:
    with (
        started(args.device) as processes,
        tempfile.TemporaryDirectory(prefix="dints_data_") as folder,
    ):
        if args.memory_of:
            print(json.dumps(memory_of_caching(args)))
            return
        print(steps.processor(processes.device))
        if args.loader:
            print(share_of_waiting(args, Path(folder), processes))
            return
        rows = {}
        for shape in args.shapes:
            rows.update(measure(shape, args, Path(folder)))
    print(table(rows))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes, add = ["128x128x128", "256x256x128", "320x320x321"], parser.add_argument
    add("--shapes", type=shape_of, nargs="+", default=[*map(shape_of, shapes)], metavar="XxYxZ")
    add("--repeats", type=int, default=7, help="pairs per row, after one that is not counted")
    add("--samples", type=int, default=20, help="in each pair of the rows of samples")
    masks_help = "of the published masks"
    add("--masks_type", choices=("float", "uint8"), default="float", help=masks_help)
    add("--no_memory", action="store_true", help="leave the rows of peak memory out")
    add("--memory_of", nargs=3, metavar=("SIDE", "IMAGE", "LABEL"), help=argparse.SUPPRESS)
    add = parser.add_argument_group("with --loader").add_argument
    add("--loader", action="store_true", help="train, and tell the share of waiting for batches")
    add("--iterations", type=int, default=12)
    add("--num_cases", type=int, default=4, help="of 256x256x128")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--patch_size", type=int, default=96)
    add("--channel_mul", type=float, default=1.0)
    add("--num_workers", type=int, help="default: as the scripts choose it")
    return parser.parse_args()


def shape_of(text: str) -> Shape:
    return tuple(map(int, text.split("x")))


def write_case(shape: Shape, number: int, folder: Path) -> Case:
    """Write a case's files, whose voxels on the task's grid are of ``shape``, and open them."""
    files = [
        round((size - 1) * new / old) + 1
        for size, new, old in zip(shape, TASK.spacing, FILE_SPACING, strict=True)
    ]
    spacing = [
        new * (size - 1) / (file - 1)
        for size, new, file in zip(shape, TASK.spacing, files, strict=True)
    ]
    volumes = make_case(seed=0, case=number, shape=files, spacing=spacing)
    paths = [
        str(folder / f"{kind}_{'x'.join(map(str, shape))}_{number}.nii.gz")
        for kind in ("image", "label")
    ]
    for volume, path in zip(volumes, paths, strict=True):
        nib.save(volume, path)
    return Case(Path(paths[0]).name, (paths[0],), paths[1])


def measure(shape: Shape, args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Measure all rows of one shape; for each its unit, and the values of published and ours, one a
    pair.
    """
    # the phantom's case 1 has axes in RAS
    case, name = write_case(shape, 1, folder), "x".join(map(str, shape))
    rows, theirs, ours = measure_caching(case, name, args)
    assert np.array_equal(theirs["label"][0], ours.label) and ours.label.shape == shape, (
        "the two sides differ"
    )
    assert np.abs(np.asarray(theirs["image"], np.float32) - ours.image).max() < 2e-3, (
        "the two sides differ"
    )
    sizes = sum(theirs[key].nbytes for key in (*published_data.KEYS, "label4crop")), num_bytes(ours)
    rows["cache, bytes a voxel"] = row("", *([size / math.prod(shape)] for size in sizes))
    rows["cache of a case"] = row("MiB", *([size / 2**20] for size in sizes))
    if not args.no_memory:
        rows["peak memory of caching"] = row(
            "MiB", *([memory_in_own_process(side, case)] for side in SIDES)
        )
    rows.update(measure_samples(theirs, ours, case, name, args, folder))
    return {f"{label}, {name}": values for label, values in rows.items()}


def row(unit: str, theirs: list[float], ours: list[float]) -> dict:
    return {"unit": unit, "published": theirs, "ours": ours}


def measure_caching(
    case: Case, name: str, args: argparse.Namespace
) -> tuple[dict[str, dict], dict, Prepared]:
    """Measure the time to cache a case; return too what is cached on either side."""
    transforms = published_data.caching(TASK, np.dtype(args.masks_type))
    rows = {"cache a case": row("s", [], [])}
    for repeat in range(args.repeats + 1):
        given = published_data.files(case)
        published, theirs = timed(lambda given=given: transforms(given))
        own, ours = timed(lambda: prepare(case, TASK))
        note(rows, {"cache a case": published}, {"cache a case": own}, name, repeat, args.repeats)
    return rows, theirs, ours


def timed(call: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def note(
    rows: dict[str, dict], theirs: dict, ours: dict, name: str, repeat: int, repeats: int
) -> None:
    """Add a pair to its rows, but not the first, which warms up."""
    for label, values in rows.items():
        pair = theirs[label], ours[label]
        if repeat > 0:
            for side, seconds in zip(SIDES, pair, strict=True):
                values[side].append(seconds)
        print(
            f"{label}, {name}: pair {repeat} of {repeats}",
            *map(steps.duration, pair),
            file=sys.stderr,
            flush=True,
        )


def num_bytes(prepared: Prepared) -> int:
    masks = prepared.masks
    return sum(
        array.nbytes
        for array in (prepared.image, prepared.label, masks.boxes, masks.starts, masks.bits)
    )


def measure_samples(
    theirs: dict, ours: Prepared, case: Case, name: str, args: argparse.Namespace, folder: Path
) -> dict[str, dict]:
    """Measure the rows of the time of a training sample: from memory, and ours from the cache on
    disk.
    """
    transforms = published_data.sampling(TASK).set_random_state(0)
    held = {"training sample": [ours]}
    held["training sample from disk"] = Cache("disk", folder / "cache", TASK, 1).hold([case], name)
    rows = {label: row("s", [], []) for label in held}
    samples = {
        label: TrainingSamples(cases, [name], [0], TASK.patch_size, 0, "bench")
        for label, cases in held.items()
    }
    turns, threads = count(), torch.get_num_threads()

    def ours_of(label: str, turn: int) -> None:
        *patch, _ = samples[label][0, turn, 0]
        augment(*patch, samples[label].steps)

    torch.set_num_threads(1)
    for repeat in range(args.repeats + 1):
        drawn = [next(turns) for _ in range(args.samples)]
        took = mean_seconds(lambda _: published_data.sample(theirs, transforms), drawn)
        parts = {
            label: mean_seconds(lambda turn, label=label: ours_of(label, turn), drawn)
            for label in rows
        }
        note(rows, dict.fromkeys(rows, took), parts, name, repeat, args.repeats)
    torch.set_num_threads(threads)
    return rows


def mean_seconds(call: Callable[[int], object], turns: Iterable[int]) -> float:
    return statistics.mean(timed(lambda turn=turn: call(turn))[0] for turn in turns)


def memory_in_own_process(side: str, case: Case) -> float:
    """Run `memory_of_caching` in a fresh process with this one's options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", side, *case.files]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_of_caching(args: argparse.Namespace) -> float:
    """Return the MiB at the peak of caching a case above what was held before, what is cached
    included.
    """
    side, image, label = args.memory_of
    case = Case("case", (image,), label)
    if side == "ours":
        return steps.memory_of_first_call(lambda: prepare(case, TASK), CPU)
    transforms = published_data.caching(TASK, np.dtype(args.masks_type))
    return steps.memory_of_first_call(lambda: transforms(published_data.files(case)), CPU)


def share_of_waiting(args: argparse.Namespace, folder: Path, processes: Processes) -> str:
    """Train a network on batches of our loader, and tell how long it waited for them."""
    task = replace(TASK, patch_size=(args.patch_size,) * 3)
    machine = TrainingMachineSettings(precision=args.precision)
    run = begun(folder, processes=processes, machine=machine, num_workers=args.num_workers)
    cases = [write_case((256, 256, 128), number, folder) for number in range(1, args.num_cases + 1)]
    cache = Cache("disk", folder / "cache", task, cores_per_process())
    patches = PatchSettings(num_images_per_batch=2, flip_axes=("all",))
    loader = training_loader(cases, cache, patches, run, steps=args.iterations, stream="bench")
    sizes = 1, task.num_classes, args.channel_mul
    network = DiscreteNetwork(steps.typical_architecture(), *sizes).to(processes.device)
    shape = (2, 1, *task.patch_size)
    training = WeightsTrainer(network, network.parameters(), WEIGHTS, run, shape)
    ends, waits, start = [], [], time.perf_counter()  # at each iteration's end, since the start
    for batch in loader.epoch(0):
        training.step(batch)
        steps.synchronise(processes.device)
        ends.append(time.perf_counter() - start)
        waits.append(loader.seconds_waited)
    steady, waited = ends[-1] - ends[0], waits[-1] - waits[0]
    return (
        f"{args.iterations} iterations of batches of 2, patch {args.patch_size}, channel_mul "
        f"{args.channel_mul:g}, {run.precision.name}, "
        f"{loader.loader.num_workers} workers, {len(cases)} cases of 256x256x128 on disk: "
        f"{steps.duration(steady / (len(ends) - 1))} an iteration after the first\nwaiting: "
        f"{waited / steady:.2%} without the first batch, {waits[-1] / ends[-1]:.2%} with it "
        f"({steps.duration(waits[0])})"
    )


def table(rows: dict[str, dict]) -> str:
    """Make a table in Markdown, one line a row."""
    lines = [["", *SIDES, "ratio"], ["---", *["---:"] * 3]]
    for label, values in rows.items():
        ratios = [
            theirs / ours for theirs, ours in zip(values["published"], values["ours"], strict=True)
        ]
        low, middle, high = (of(ratios) for of in (min, statistics.median, max))
        spread = f" ({low:.3g} to {high:.3g})" if len(ratios) > 1 else ""
        cells = [shown(statistics.median(values[side]), values["unit"]) for side in SIDES]
        lines.append([label, *cells, f"{middle:.3g}{spread}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shown(value: float, unit: str) -> str:
    if unit == "s":
        return steps.duration(value)
    return f"{value:,.0f} MiB" if unit else f"{value:.2f}"


if __name__ == "__main__":
    main(parse_args())
