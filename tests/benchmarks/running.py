"""What it costs to be able to go on: saving, agreeing between steps, and what two processes tell each other.

    python tests/benchmarks/running.py
    python tests/benchmarks/running.py --size small

Of the supernet at its published size (12 blocks, 4 depths, channel multiplier 0.5: 150 million weights): the time of a
save and its share of a run that saves every ten minutes; the time that `Checkpoint.steps` adds to a step; and with two
gloo processes on this machine, the bytes that each hands to the collectives in a weights step and in an architecture
step, and what one and two processes compute in a second, in a search and in a retraining. Of a retraining step of a
small network, the shortest that there is: all that guards it, against the bare step in turn.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]

import steps  # noqa: E402  (the repository is no package: its root must be on the path first)
from dints.checkpoint import Checkpoint, configuration  # noqa: E402

import search_dints  # noqa: E402
from dints import engine, runtime  # noqa: E402
from dints.network import FoundNetwork  # noqa: E402

CHANNEL_MUL = {"published": 0.5, "small": 0.125}
SAVE_MINUTES = 10
print = functools.partial(print, flush=True)  # minutes lie between the lines


def main(args: argparse.Namespace) -> None:
    options = stage_options(args)
    with runtime.started("cpu") as processes:
        if "RANK" in os.environ:  # started by `measure_scaling`
            return measure_steps(options, processes)
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
        measure_saving(options, processes)
        measure_guards(options, processes)
    measure_scaling()


def stage_options(args: argparse.Namespace) -> argparse.Namespace:
    flags = ["--root", ".", "--output_root", ".", "--channel_mul", str(CHANNEL_MUL[args.size])]
    return search_dints.parse_args([*flags, "--patch_size", *[str(args.patch)] * 3])


def build_supernet(options: argparse.Namespace, processes: runtime.Processes) -> search_dints.Supernet:
    return search_dints.Supernet(options, steps.TASK, runtime.Precision("fp32", processes.device), processes)


def measure_saving(options: argparse.Namespace, processes: runtime.Processes) -> None:
    """The median of some saves with the momentum that a training has."""
    supernet = build_supernet(options, processes)
    print(f"supernet of {sum(p.numel() for p in supernet.weights) / 1e6:.1f} million weights")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoint = Checkpoint(Path(folder), options, configuration(options, processes), processes)
        checkpoint.restore(supernet.parts, supernet.precision)
        seconds = [timed(checkpoint.save) for _ in range(5)]
        size = checkpoint.latest.stat().st_size
        load = timed(lambda: Checkpoint(Path(folder), options, configuration(options, processes), processes))
    save = statistics.median(seconds)
    share = save / (60 * SAVE_MINUTES + save)
    print(f"save: {save:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), {size / 2**20:,.0f} MiB", end="; ")
    print(f"{share:.2%} of a run that saves every {SAVE_MINUTES} minutes; found whole again in {load:.2f} s")


def measure_scaling() -> None:
    """This script again, as one and as two processes of one thread each."""
    for count in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={count}",
            *sys.argv,
        ]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        print(done.stdout.rstrip())


def measure_agreement(options: argparse.Namespace, processes: runtime.Processes) -> None:
    """What `Checkpoint.steps` adds to a step: the processes tell each other whether to stop and to save."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoint = Checkpoint(Path(folder), options, configuration(options, processes), processes)
        checkpoint.restore({}, runtime.Precision("fp32", processes.device))
        count = 1000
        added = timed(lambda: [None for _ in checkpoint.steps(iter(range(count)))]) / count
        processes.gather(None)  # none removes the folder while another saves into it
    if processes.is_main:
        print(f"{processes.world_size} processes of one thread; between two steps: {1e6 * added:.1f} us")


def measure_steps(options: argparse.Namespace, processes: runtime.Processes) -> None:
    """Time and bytes of each kind of step, from random data that differ between the ranks."""
    supernet = build_supernet(options, processes)
    measure_agreement(options, processes)
    torch.manual_seed(processes.rank)
    batch = random_batch(options)
    model, settings = retraining(processes)
    for name, step in (
        ("weights step", lambda: search_dints.weights_step(supernet, batch)),
        ("architecture step", lambda: search_dints.architecture_step(supernet, batch, 0.5)),
        ("retraining step", lambda: engine.weights_step(model, batch, *settings)),
    ):
        step()
        seconds = statistics.median(timed(step) for _ in range(5))
        line = f"  {name}: {1e3 * seconds:.0f} ms, {processes.world_size / seconds:.2f} patches a second"
        if processes.world_size > 1:
            line += f", {bytes_of(step):,} bytes to the collectives"
        if processes.is_main:
            print(line)


def measure_guards(options: argparse.Namespace, processes: runtime.Processes) -> None:
    """All there is around a step: the agreement before it, the check that its loss is finite, and the sum of losses."""
    batch = {**random_batch(options), "cases": ["a case"]}
    model, settings = retraining(processes)
    criterion, optimizer, _, precision = settings
    losses = engine.EpochLoss("loss", processes)
    count = 20  # steps, of which one looks at the losses of all

    def bare() -> None:
        optimizer.found_inf = None  # as it is without `engine.step_if_finite`
        for _ in range(count):
            optimizer.zero_grad()
            with precision.autocast():
                scores = model(batch["image"])
            criterion(scores.float(), batch["label"]).backward()
            optimizer.step()

    def guarded(checkpoint: Checkpoint) -> None:
        for one in checkpoint.steps([batch] * count):
            loss = engine.weights_step(model, one, *settings)
            losses.add(loss, checkpoint.progress.iteration, one["cases"])

    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoint = Checkpoint(Path(folder), options, configuration(options, processes), processes)
        checkpoint.restore({}, precision)
        bare(), guarded(checkpoint)
        pairs, deadline = [], time.monotonic() + 60
        while len(pairs) < 3 or time.monotonic() < deadline:
            pairs.append((timed(bare), timed(lambda: guarded(checkpoint))))
    ratios = sorted(after / before - 1 for before, after in pairs)
    low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
    print(f"guards of a retraining step: {middle:+.1%} ({low:+.1%} to {high:+.1%} in {len(ratios)} pairs)")


def random_batch(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    shape = (1, 1, *options.patch_size)
    label = torch.randint(0, steps.TASK.num_classes, shape, dtype=torch.uint8)
    return {"image": torch.rand(shape), "label": label}


def retraining(processes: runtime.Processes) -> tuple[torch.nn.Module, tuple]:
    """A found network, and what `engine.weights_step` needs beside it."""
    torch.manual_seed(0)
    network = FoundNetwork(steps.typical_architecture(), 1, steps.TASK.num_classes, 0.5)
    precision = runtime.Precision("fp32", processes.device)
    settings = engine.segmentation_loss(), engine.sgd(network.parameters(), 0.025), precision.scaler(), precision
    return runtime.distributed(network, processes), settings


def bytes_of(step) -> int:
    """What this process hands to collectives in a step: those called from Python and DDP's own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step()
    sizes = 0
    for event in profile.events():
        if event.name in ("gloo:all_reduce", "gloo:broadcast", "gloo:all_gather"):
            for shape in event.input_shapes:
                sizes += 4 * int(torch.Size(shape).numel()) if shape else 0
    return sizes


def timed(call) -> float:
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=CHANNEL_MUL, default="published")
    parser.add_argument("--patch", type=int, default=32, help="edge of the patch of every step")
    main(parser.parse_args())
