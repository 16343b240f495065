"""Time the cost of being able to resume: saving, agreeing between steps, and what two processes
tell each other.

    python benchmarks/running.py
    python benchmarks/running.py --size small

Of the supernet at its published size (12 blocks, 4 depths, channel multiplier 0.5: 150 million
weights): the time of a save and its share of a run that saves every ten minutes; the time that
`Run.steps` adds to a step; and with two gloo processes on this machine, the bytes that each hands
to the collectives in a weights step and in an architecture step, and what one and two processes
compute in a second, in a search and in a retraining. Of a retraining step of a small
network, the shortest that there is: all that guards it, against the bare step in turn.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402  the checkout comes first on the path
import torch.distributed as dist  # noqa: E402
from parts import Search, a_search, a_training, half_way  # noqa: E402
from steps import typical_architecture  # noqa: E402

from dints.data.tasks import TASKS  # noqa: E402
from dints.network.discrete import DiscreteNetwork  # noqa: E402
from dints.running.checkpoint import Checkpoint, find_state  # noqa: E402
from dints.running.epoch_loss import EpochLoss  # noqa: E402
from dints.running.precision import Precision  # noqa: E402
from dints.running.processes import Processes, started  # noqa: E402
from dints.running.run import Run  # noqa: E402
from dints.settings import MachineSettings, RunSettings  # noqa: E402
from dints.training.steps import WeightsTrainer  # noqa: E402

TASK, FP32 = TASKS["Task07_Pancreas"], Precision("fp32", torch.device("cpu"))
CHANNEL_MUL = {"published": 0.5, "small": 0.125}
SAVE_MINUTES = 10
print = functools.partial(print, flush=True)  # minutes lie between the lines


def main(args: argparse.Namespace) -> None:
    patch = [args.patch] * 3
    flags = ["--channel_mul", CHANNEL_MUL[args.size], "--patch_size", *patch]
    with started("cpu") as processes:
        if "RANK" in os.environ:  # started by `measure_scaling`
            return measure_steps(flags, patch, processes)
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
        measure_saving(flags, processes)
        measure_guards(patch, processes, args.seconds)
    measure_scaling()


@contextmanager
def new_run(parts: dict[str, object], processes: Processes) -> Iterator[Run]:
    """Begin a run in a folder of its own, the first state saved."""
    with tempfile.TemporaryDirectory(dir=".") as made:
        folder = Path(made)
        run = Run(
            folder, processes, RunSettings(output_root=folder), MachineSettings(precision="fp32")
        )
        run.begin({})
        run.restore(**parts)
        yield run
        processes.gather(None)  # none removes the folder while another saves into it


def measure_saving(flags: list[object], processes: Processes) -> None:
    """Tell the median of some saves with the momentum that a training has."""
    supernet = a_search(flags, TASK, FP32, processes)
    print(
        f"supernet of {sum(weight.numel() for weight in supernet.weights.weights) / 1e6:.1f} "
        "million weights"
    )
    with new_run(supernet.parts, processes) as run:
        checkpoint: Checkpoint = run.checkpoint
        seconds = [timed(checkpoint.save) for _ in range(5)]
        size = checkpoint.latest.stat().st_size
        load = timed(lambda: find_state(checkpoint.latest.parent, checkpoint.configuration))
    save = statistics.median(seconds)
    share = save / (60 * SAVE_MINUTES + save)
    print(
        f"save: {save:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), {size / 2**20:,.0f} MiB",
        end="; ",
    )
    print(
        f"{share:.2%} of a run that saves every {SAVE_MINUTES} minutes; found whole again in "
        f"{load:.2f} s"
    )


def measure_scaling() -> None:
    """Run this script again, as one and as two processes of one thread each."""
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launcher, *sys.argv], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        print(done.stdout.rstrip())


def measure_steps(flags: list[object], patch: list[int], processes: Processes) -> None:
    """Tell time and bytes of each kind of step, from random data that differ between the ranks."""
    supernet: Search = a_search(flags, TASK, FP32, processes)
    with new_run({}, processes) as run:
        count = 1000
        added = timed(lambda: [None for _ in run.steps(Repeated(None, count))]) / count
    lines = [
        f"{processes.world_size} processes of one thread; between two steps: {1e6 * added:.1f} us"
    ]
    torch.manual_seed(processes.rank)
    batch, retraining = random_batch(patch), retraining_of(processes)
    for name, step in (
        ("weights step", lambda: supernet.weights.step(batch)),
        ("architecture step", lambda: half_way(supernet, batch)),
        ("retraining step", lambda: retraining.step(batch)),
    ):
        step()
        seconds = statistics.median(timed(step) for _ in range(5))
        line = (
            f"  {name}: {1e3 * seconds:.0f} ms, {processes.world_size / seconds:.2f} patches a "
            "second"
        )
        lines.append(
            line
            + (f", {bytes_of(step):,} bytes to the collectives" if processes.world_size > 1 else "")
        )
    if processes.is_main:
        print("\n".join(lines))


def measure_guards(patch: list[int], processes: Processes, at_least: float) -> None:
    """Time all there is around a step: the agreement before, the check that its loss is finite, the
    sum of losses.
    """
    batch, training = {**random_batch(patch), "cases": ["a case"]}, retraining_of(processes)
    optimizer = training.optimizer
    count = 20  # steps, of which one looks at the losses of all

    def bare() -> None:
        optimizer.found_inf = None  # as it is without `step_if_finite`
        for _ in range(count):
            optimizer.zero_grad()
            with training.precision.autocast():
                scores = training.network(batch["image"])
            training.criterion(scores.float(), batch["label"]).backward()
            optimizer.step()

    def guarded(run: Run) -> None:
        for one in run.steps(Repeated(batch, count)):
            run.record("loss", training.step(one), one)

    with new_run({}, processes) as run:
        run.losses = {"loss": EpochLoss("loss", processes)}
        bare(), guarded(run)
        pairs, deadline = [], time.monotonic() + at_least
        while len(pairs) < 3 or time.monotonic() < deadline:
            pairs.append((timed(bare), timed(lambda: guarded(run))))
    ratios = sorted(after / before - 1 for before, after in pairs)
    low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
    print(
        f"guards of a retraining step: {middle:+.1%} ({low:+.1%} to {high:+.1%} in {len(ratios)} "
        "pairs)"
    )


class Repeated:
    """Stands for a loader that gives one batch so many times, whatever the epoch."""

    seconds_waited = 0.0

    def __init__(self, batch: object, count: int):
        self.batch, self.count = batch, count

    def epoch(self, *_place: int) -> Iterator[object]:
        return itertools.repeat(self.batch, self.count)


def random_batch(patch: list[int]) -> dict[str, torch.Tensor]:
    shape = (1, 1, *patch)
    label = torch.randint(0, TASK.num_classes, shape, dtype=torch.uint8)
    return {"image": torch.rand(shape), "label": label}


def retraining_of(processes: Processes) -> WeightsTrainer:
    """Make the training of what a space with random alphas decodes to: all five operations, in all
    12 blocks.
    """
    torch.manual_seed(0)
    network = DiscreteNetwork(typical_architecture(), TASK.num_channels, TASK.num_classes, 0.5)
    return a_training(network, FP32, processes)


def bytes_of(step: Callable[[], object]) -> int:
    """Count what this process hands to collectives in a step: those called from Python and DDP's
    own.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        step()
    collectives = ("gloo:all_reduce", "gloo:broadcast", "gloo:all_gather")
    shapes = [
        shape
        for event in profile.events()
        if event.name in collectives
        for shape in event.input_shapes
    ]
    return sum(4 * int(torch.Size(shape).numel()) for shape in shapes if shape)


def timed(call: Callable[[], object]) -> float:
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=CHANNEL_MUL, default="published")
    parser.add_argument("--patch", type=int, default=32, help="edge of the patch of every step")
    parser.add_argument("--seconds", type=float, default=60, help="that the guards are timed for")
    main(parser.parse_args())
