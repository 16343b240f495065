"""Time the search's steps on a CPU with composed convolutions against those without, in turn, in one process.

    python benchmarks/composition.py --channel_mul 0.25 --use_downsample no

Up to so many channels as `MAX_CHANNELS_ON_CPU` says, or --max_channels. "speedup" is the median of the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

import torch  # noqa: E402  (the repository is no package: its root must be on the path first)

import search_dints  # noqa: E402
from dints.data.tasks import TASKS  # noqa: E402
from dints.network import composition  # noqa: E402
from dints.running.machine import keep_freed_memory  # noqa: E402
from dints.running.precision import Precision  # noqa: E402
from dints.running.processes import Processes  # noqa: E402


def main(args: argparse.Namespace) -> None:
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    print("| precision | step | without | with | speedup (smallest to largest) |\n| --- | --- | ---: | ---: | ---: |")
    for name in ("fp32", "bf16"):
        for what, step in steps(name, args).items():
            without, composed = zip(*(pair(step, args.max_channels) for _ in range(args.repeats + 1)), strict=True)
            gains = sorted(a / b for a, b in zip(without[1:], composed[1:], strict=True))  # the first pair warms up
            seconds = (f"{1e3 * statistics.median(values[1:]):.0f} ms" for values in (without, composed))
            speedup = f"{statistics.median(gains):.2f} ({gains[0]:.2f} to {gains[-1]:.2f})"
            print(f"| {name} | {what} | {' | '.join(seconds)} | {speedup} |", flush=True)


def steps(precision: str, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return both steps of a search of random images."""
    flags = f"--root . --output_root . --num_blocks 5 --num_depths 3 --channel_mul {args.channel_mul}"
    options = search_dints.parse_args([*flags.split(), "--num_images_per_batch", str(args.batch)])
    patch, cpu = (args.patch,) * 3, torch.device("cpu")
    task = replace(TASKS["Task04_Hippocampus"], patch_size=patch)
    supernet = search_dints.Supernet(
        options, task, Precision(precision, cpu), Processes(0, 1, cpu), args.use_downsample == "yes"
    )
    shape = (args.batch, 1, *patch)
    batch = {"image": torch.rand(shape), "label": torch.randint(0, task.num_classes, shape, dtype=torch.uint8)}
    return {
        "weights": lambda: search_dints.weights_step(supernet, batch),
        "architecture": lambda: search_dints.architecture_step(supernet, batch, 0.5),
    }


def pair(step: Callable[[], object], max_channels: int) -> tuple[float, float]:
    """Return the seconds of a step without composed convolutions, and of one with them."""
    seconds = []
    for composition.MAX_CHANNELS_ON_CPU in (0, max_channels):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return tuple(seconds)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--channel_mul", type=float, default=0.25, help="times 32, 64, ... channels (default: %(default)s)")
    add("--use_downsample", choices=("yes", "no"), default="no", help="halve the image first (default: no)")
    add("--patch", type=int, default=32, help="edge of a patch (default: %(default)s)")
    add("--batch", type=int, default=2, help="patches a step (default: %(default)s)")
    add("--max_channels", type=int, default=composition.MAX_CHANNELS_ON_CPU, help="(default: %(default)s)")
    add("--threads", type=int, default=1, help="(default: %(default)s)")
    add("--repeats", type=int, default=7, help="pairs, after one that is not counted (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
