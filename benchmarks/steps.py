"""Time the published recipe in MONAI's calls against ours: the two alternate in one process, on the
same input.

    python benchmarks/steps.py
    python benchmarks/steps.py --device cuda --size published --precision bf16 --compile on
    python benchmarks/steps.py --rows decode "bilevel iteration" --repeats 9

"speedup" is the median over the pairs of published/ours, with the smallest and the largest.
"operations" are tensor operations per call on a CPU, kernels on a GPU; "syncs" are the places where
a call waits for the GPU; "memory" is what a first call takes beyond what was held
before it: resident memory, each in a process of its own, or GPU memory.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from monai.inferers import sliding_window_inference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import published  # noqa: E402  (the repository is no package: its root must be on the path first)
from parts import Search, a_search, a_training  # noqa: E402

from dints.data.tasks import TASKS  # noqa: E402
from dints.network.architecture import Architecture  # noqa: E402
from dints.network.cost import device_name  # noqa: E402
from dints.network.discrete import DiscreteNetwork  # noqa: E402
from dints.network.space import SearchSpace  # noqa: E402
from dints.network.weights import fitting_state  # noqa: E402
from dints.running import processes as running  # noqa: E402
from dints.running.precision import Precision, choose_precision  # noqa: E402
from dints.training import steps as training  # noqa: E402
from dints.training.windows import SlidingWindow  # noqa: E402

# Blocks and depths are the published 12 and 4 in both. "small" is what a CPU can do many times.
SIZES = {
    "small": {"patch_size": 32, "search_channel_mul": 0.5, "train_channel_mul": 0.5},
    "published": {"patch_size": 96, "search_channel_mul": 0.5, "train_channel_mul": 1.0},
}
TASK = TASKS["Task07_Pancreas"]
RAMP = 0.5  # the architecture loss counts half, as halfway between warm-up and end

Call = Callable[[], object]


def main(args: argparse.Namespace) -> None:
    with running.started(args.device) as processes:
        precision = choose_precision(args.precision, processes)
        rows = build_rows(args, processes, precision)
        if args.memory_of:
            row, side = args.memory_of
            print(json.dumps(memory_of_first_call(rows[row]()[side == "ours"], processes.device)))
            return
        print(describe_machine(processes.device, precision, args))
        results = {
            name: measure(name, rows[name], args, processes.device) for name in args.rows or rows
        }
    print(table(results, processes.device))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--size", choices=SIZES, default="small", help="patch 32 or 96, see SIZES")
    precisions = ("auto", "fp32", "bf16", "fp16")
    add("--precision", choices=precisions, default="fp32", help="of both sides")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="of ours")
    add("--checkpoint_activations", action="store_true", help="of ours: see train_dints.py -h")
    add("--repeats", type=int, default=7, help="pairs per row, after one that is not counted")
    seconds_help = "but no more pairs after so long and three"
    add("--seconds_per_row", type=float, default=120, help=seconds_help)
    add("--rows", nargs="+", help="names of rows (default: all)")
    add("--no_memory", action="store_true", help="leave the memory columns out")
    add("--memory_of", nargs=2, metavar=("ROW", "SIDE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def build_rows(
    args: argparse.Namespace, processes: running.Processes, precision: Precision
) -> dict[str, Callable[[], tuple[Call, Call]]]:
    """Return for each row what builds its two calls; nothing is built before its turn."""
    pairs = Pairs(args, processes, precision)
    return {
        "decode": pairs.decode,
        "regularisers": pairs.regularisers,
        "supernet forward + backward": pairs.supernet,
        "weights step": partial(pairs.steps, weights=True),
        "architecture step": partial(pairs.steps, arch=True),
        "bilevel iteration": partial(pairs.steps, weights=True, arch=True),
        "retraining step, batch 1": partial(pairs.retraining, 1),
        "retraining step, batch 2": partial(pairs.retraining, 2),
        "validation, 4 windows": pairs.window,
    }


@dataclass(frozen=True)
class Pairs:
    """Builds pairs of calls that do the same, the published one first."""

    args: argparse.Namespace
    processes: running.Processes
    precision: Precision

    @property
    def size(self) -> dict:
        return SIZES[self.args.size]

    def batch(self, num_images: int = 1) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (num_images, 1, *[self.size["patch_size"]] * 3)
        image = torch.rand(shape, generator=generator)
        label = torch.randint(0, TASK.num_classes, shape, generator=generator, dtype=torch.uint8)
        return {"image": image.to(self.processes.device), "label": label.to(self.processes.device)}

    def searches(self) -> tuple[published.Search, Search]:
        """The published search and ours with the same weights and alphas."""
        torch.manual_seed(0)
        channel_mul, patch_size = self.size["search_channel_mul"], self.size["patch_size"]
        theirs = published.Search(12, 4, channel_mul, 1, TASK.num_classes, self.precision)
        flags = ["--channel_mul", channel_mul, "--patch_size", *[patch_size] * 3]
        flags += ["--checkpoint_activations"] * self.args.checkpoint_activations
        flags += ["--compile", self.args.compile]
        ours = a_search(flags, TASK, self.precision, self.processes)
        ours.network.load_state_dict(theirs.network.state_dict())
        return theirs, ours

    def networks(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        return twin_networks(self.size["train_channel_mul"], self.processes.device)

    def decode(self) -> tuple[Call, Call]:
        theirs, ours = self.searches()
        return theirs.space.decode, ours.arch.space.decode

    def regularisers(self) -> tuple[Call, Call]:
        theirs, ours = self.searches()
        shape = self.batch()["image"].shape
        return (
            lambda: theirs.architecture_loss(shape).backward(),
            lambda: ours.arch.loss().backward(),
        )

    def supernet(self) -> tuple[Call, Call]:
        image = self.batch()["image"]

        def forward_backward(network: torch.nn.Module) -> None:
            with self.precision.autocast():
                loss = network(image).float().square().mean()
            loss.backward()
            network.zero_grad()

        theirs, ours = self.searches()
        return partial(forward_backward, theirs.network), partial(forward_backward, ours.network)

    def steps(self, weights: bool = False, arch: bool = False) -> tuple[Call, Call]:
        theirs, ours = self.searches()
        samples = self.batch()

        def run_published() -> None:
            if weights:
                theirs.weights_step(*samples.values())
            if arch:
                theirs.architecture_step(*samples.values(), RAMP)

        def run_ours() -> None:
            if weights:
                ours.weights.step(samples)
            if arch:
                ours.arch.step(samples, RAMP)

        return run_published, run_ours

    def retraining(self, num_images: int) -> tuple[Call, Call]:
        samples, (theirs, ours) = self.batch(num_images), self.networks()
        ours.checkpoint_activations = self.args.checkpoint_activations
        ours = a_training(ours, self.precision, self.processes, compile=self.args.compile)
        theirs = a_training(theirs, self.precision, self.processes)
        theirs.optimizer = published.sgd(theirs.weights, 0.025)
        theirs.criterion = published.criterion()
        return partial(theirs.step, samples), partial(ours.step, samples)

    def window(self) -> tuple[Call, Call]:
        theirs, ours = self.networks()
        image, patch = self.batch()["image"].repeat(1, 1, 2, 1, 1), (self.size["patch_size"],) * 3
        ours = training.compiled(ours, self.args.compile, self.processes.device)
        sliding = SlidingWindow(patch, overlap=0.625, batch_size=6)
        whole = partial(sliding_window_inference, overlap=0.625, mode="gaussian")
        return (
            inferring(lambda: whole(image, patch, 6, theirs), self.precision),
            inferring(lambda: sliding(image, ours), self.precision),
        )


def twin_networks(
    channel_mul: float, device: torch.device
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """MONAI's network and ours of one architecture that stands for found ones, with the same
    weights.
    """
    torch.manual_seed(0)
    architecture = typical_architecture()
    theirs = published.network(architecture, 1, TASK.num_classes, channel_mul)
    ours = DiscreteNetwork(architecture, 1, TASK.num_classes, channel_mul)
    ours.load_state_dict(
        fitting_state(ours, theirs.state_dict(), "MONAI's network", ours.unused_stems)
    )
    return theirs.to(device), ours.to(device)


def typical_architecture() -> Architecture:
    """What a space with random alphas decodes to: connected, with all five operations, in all 12
    blocks.
    """
    generator = torch.Generator().manual_seed(0)
    space = SearchSpace(channel_mul=0.0625, num_blocks=12, num_depths=4)
    with torch.no_grad():
        space.log_alpha_a.normal_(generator=generator)
        space.log_alpha_c.normal_(generator=generator)
    return space.architecture()


def inferring(call: Call, precision: Precision) -> Call:
    def infer() -> None:
        with torch.no_grad(), precision.autocast():
            call()

    return infer


def measure(
    name: str,
    build: Callable[[], tuple[Call, Call]],
    args: argparse.Namespace,
    device: torch.device,
) -> dict:
    """All numbers of a row."""
    theirs, ours = build()
    result = {"seconds": [[], []]}
    deadline = time.monotonic() + args.seconds_per_row
    for repeat in range(args.repeats + 1):
        pair = [seconds_of(call, device) for call in (theirs, ours)]
        if repeat > 0:  # the first calls warm up
            for seconds, new in zip(result["seconds"], pair, strict=True):
                seconds.append(new)
        print(
            f"{name}: pair {repeat} of {args.repeats}",
            *map(duration, pair),
            file=sys.stderr,
            flush=True,
        )
        if repeat >= 3 and time.monotonic() > deadline:
            break
    result["speedup"] = [
        theirs_took / ours_took for theirs_took, ours_took in zip(*result["seconds"], strict=True)
    ]
    # a compiled graph cannot be counted there
    compiled = args.compile == "on" and device.type == "cpu"
    result["operations"] = [
        count_operations(theirs, device),
        None if compiled else count_operations(ours, device),
    ]
    if device.type == "cuda":
        result["syncs"] = [count_syncs(call) for call in (theirs, ours)]
    with FlopCounterMode(display=False) as counter:
        theirs()
    result["flop"] = counter.get_total_flops()
    if not args.no_memory:
        del theirs, ours
        result["memory_mib"] = [memory_in_own_process(name, side) for side in ("published", "ours")]
    return result


def seconds_of(call: Call, device: torch.device) -> float:
    """Of one call; of ten, at the mean, where one is too short to be timed well."""
    seconds = seconds_of_calls(call, 1, device)
    return seconds if seconds > 0.01 else seconds_of_calls(call, 10, device) / 10


def seconds_of_calls(call: Call, count: int, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_operations(call: Call, device: torch.device) -> int:
    """Tensor operations on a CPU, kernels and copies on a GPU."""
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum(
            event.count for event in profile.key_averages() if event.device_type.name == "CUDA"
        )
    with OperationCounter() as counter:
        call()
    return counter.count


class OperationCounter(TorchDispatchMode):
    """Counts tensor operations, forward and backward; views count too."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def count_syncs(call: Call) -> int:
    """How often a call waits for the GPU, by PyTorch's own count."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def memory_in_own_process(row: str, side: str) -> float:
    """MiB, of `memory_of_first_call` in a fresh process with this one's options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", row, side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_of_first_call(call: Call, device: torch.device) -> float:
    """MiB at the peak of a call above what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # the peak starts again; that of getrusage would be the parent's
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_kib("VmRSS")
    call()
    return max(0.0, (resident_kib("VmHWM") - before) / 1024)


def resident_kib(field: str) -> int:
    """VmRSS: resident memory now; VmHWM: at its peak."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def describe_machine(device: torch.device, precision: Precision, args: argparse.Namespace) -> str:
    """What the numbers hold for, and the ceilings that they can be compared with."""
    product, copy = ceilings(device, precision)
    size = " ".join(f"{key} {value:g}" for key, value in SIZES[args.size].items())
    return (
        f"{processor(device)}, {precision.name}, compile {args.compile}; 12 blocks, 4 depths, "
        f"{size}\nceilings measured now: matrix product {product:.3g} TFLOP/s, copy {copy:.3g} GB/s"
    )


def processor(device: torch.device) -> str:
    names = [device_name(torch.device("cpu"), torch.get_num_threads())]
    names += [torch.cuda.get_device_name()] if device.type == "cuda" else []
    return ", ".join([*names, f"torch {torch.__version__}"])


def ceilings(device: torch.device, precision: Precision) -> tuple[float, float]:
    """TFLOP/s of a large matrix product in this precision, and GB/s (read + written) of a large
    copy.
    """
    size, megabytes = (8192, 4096) if device.type == "cuda" else (2048, 512)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision.name]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    product = min(seconds_of(lambda: left @ right, device) for _ in range(6))
    copy = min(seconds_of(lambda: target.copy_(source), device) for _ in range(6))
    return 2 * size**3 / product / 1e12, 2 * source.nbytes / copy / 1e9


def table(results: dict[str, dict], device: torch.device) -> str:
    """Markdown, one line a row."""
    counted = "kernels" if device.type == "cuda" else "operations"
    heads = ["", "published", "ours", "speedup", counted, "TFLOP/s"]
    heads += ["syncs"] if device.type == "cuda" else []
    heads += ["memory, MiB"] if any("memory_mib" in result for result in results.values()) else []
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, result in results.items():
        medians = [statistics.median(seconds) for seconds in result["seconds"]]
        low, middle, high = (of(result["speedup"]) for of in (min, statistics.median, max))
        speed = f"{result['flop'] / medians[1] / 1e12:.3g}" if result["flop"] else ""
        cells = [name, *map(duration, medians), f"{middle:.3g} ({low:.3g} to {high:.3g})"]
        cells += [
            " / ".join("-" if count is None else f"{count:,}" for count in result["operations"]),
            speed,
        ]
        cells += ["{} / {}".format(*result["syncs"])] if "syncs" in result else []
        cells += (
            ["{:,.0f} / {:,.0f}".format(*result["memory_mib"])] if "memory_mib" in result else []
        )
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def duration(seconds: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(seconds * 1e3)))
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{digits}f} ms"


if __name__ == "__main__":
    main(parse_args())
