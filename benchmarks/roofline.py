"""Computes what bounds a step on a GPU, without one: its kernels, the bytes that they move, and
their FLOP.

    python benchmarks/fake_gpu.py benchmarks/roofline.py    needs the CUDA build, see fake_cuda.py

Published size: 12 blocks and 4 resolutions, patches of 96x96x96, bf16. Of each call of an operation
the longest counts of what a launch takes, of its bytes at the GPU's bandwidth and of its FLOP at
its peak: no measurement, and a bound from below, for kernels reach neither, and an operation may be
several kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests"), str(CHECKOUT / "benchmarks")]

import steps as benchmark  # noqa: E402  (the repository is no package: its root must be on the path first)
import torch  # noqa: E402
from fake_gpu import GPU, Gpu, OnGpu, a_gpu, is_there  # noqa: E402

from dints.running.precision import Precision  # noqa: E402
from dints.running.processes import Processes  # noqa: E402

# NVIDIA's data sheet of the H100 SXM: memory, and bf16 without sparsity. A launch: what hosts take
# for small kernels.
BYTES_PER_SECOND, FLOP_PER_SECOND, SECONDS_OF_A_LAUNCH = 3.35e12, 989e12, 5e-6
ROWS = ("weights step", "architecture step", "retraining step, batch 1", "retraining step, batch 2")


def main(args: argparse.Namespace) -> None:
    if not is_there():
        sys.exit("error: run it by benchmarks/fake_gpu.py")
    print("| | | kernels | at 5 us | GB | at 3.35 TB/s | TFLOP | at 989 TFLOP/s | bound |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in args.rows:
        for side, call in zip(("published", "ours"), calls(row, args), strict=True):
            print(f"| {row} | {side} | {' | '.join(describe(call))} |", flush=True)
            if args.operations:
                print(dearest(call), file=sys.stderr)


def calls(row: str, args: argparse.Namespace) -> list[list[OnGpu]]:
    """Return what the published step and ours have the GPU do, after a first one that may set
    things up.
    """
    with a_gpu() as gpu:
        options = argparse.Namespace(size=args.size, compile="off", checkpoint_activations=False)
        rows = benchmark.build_rows(options, Processes(0, 1, GPU), Precision("bf16", GPU))
        return [of_second_call(step, gpu) for step in rows[row]()]


def of_second_call(step: Callable[[], object], gpu: Gpu) -> list[OnGpu]:
    step()
    gpu.forget()
    step()
    return list(gpu.calls)


def describe(calls: list[OnGpu]) -> list[str]:
    kernels, moved, flop = (
        sum(getattr(call, name) for call in calls) for name in ("kernels", "bytes", "flop")
    )
    seconds = kernels * SECONDS_OF_A_LAUNCH, moved / BYTES_PER_SECOND, flop / FLOP_PER_SECOND
    launch, move, compute = (f"{1e3 * value:.1f} ms" for value in seconds)
    bound = f"{1e3 * sum(map(bound_of, calls)):.1f} ms"
    return [
        f"{kernels:,}",
        launch,
        f"{moved / 1e9:.1f}",
        move,
        f"{flop / 1e12:.2f}",
        compute,
        bound,
    ]


def bound_of(call: OnGpu) -> float:
    """Return the seconds that a call takes at the least."""
    times = (
        call.kernels * SECONDS_OF_A_LAUNCH,
        call.bytes / BYTES_PER_SECOND,
        call.flop / FLOP_PER_SECOND,
    )
    return max(times)


def dearest(calls: list[OnGpu], count: int = 15) -> str:
    """List the operations that are bounded by most time: calls, GB and ms."""
    seconds, numbers, moved = Counter(), Counter(), Counter()
    for call in calls:
        seconds[call.name] += bound_of(call)
        numbers[call.name] += 1
        moved[call.name] += call.bytes
    lines = [
        f"  {name:32s} {numbers[name]:6,d} {moved[name] / 1e9:8.2f} GB {1e3 * took:8.2f} ms"
        for name, took in seconds.most_common(count)
    ]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=benchmark.SIZES, default="published", help="patch 32 or 96"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="(default: all)")
    parser.add_argument(
        "--operations", action="store_true", help="also list each step's dearest operations"
    )
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse_args())
