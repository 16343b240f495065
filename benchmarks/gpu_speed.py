"""How fast it is on a GPU: the parts of gpu.py that measure, and in the end a search and a
retraining of real cases.
"""

from __future__ import annotations

import csv
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import steps as benchmark
import torch
from architectures import random_architecture
from gpu_checks import SPACE, STAGE, Setting, a_batch, history, phantom, ran, search_of
from parts import a_training, half_way

from dints.network.architecture import save_architecture
from dints.network.cost import counts
from dints.network.discrete import DiscreteNetwork
from dints.running.precision import Precision

ROWS = ("retraining step, batch 2", "weights step", "architecture step", "validation, 4 windows")
LONGEST = 20  # kernels that a profile lists
KEYS = ("candidate", "channel_mul", "iterations", "seconds", "dice")


def published_against_ours(setting: Setting) -> None:
    """Time the published recipe against ours, as benchmarks/steps.py does: seconds, kernels,
    waits.
    """
    size, repeats = ("small", 1) if setting.small else ("published", 5)
    flags = (
        f"--device {setting.device} --precision bf16 --size {size} --repeats {repeats} "
        "--seconds_per_row 6 --no_memory"
    )
    args = benchmark.parse_args(flags.split())
    rows = benchmark.build_rows(
        args, setting.processes, Precision("bf16", setting.processes.device)
    )
    for name in ROWS[-1:] if setting.small else ROWS:
        setting.found[name] = benchmark.measure(name, rows[name], args, setting.processes.device)


def variants(setting: Setting) -> None:
    """Time a retraining step of ours, done in several ways."""
    for name, prepare in VARIANTS.items():
        if name == GRAPHS and setting.device != "cuda":
            continue
        try:
            setting.found[name] = timed(prepare(setting), setting)
        except (RuntimeError, AssertionError) as error:  # one that does not work is a result too
            setting.found[name] = f"{type(error).__name__}: {str(error)[:300]}"


def compiled(setting: Setting) -> None:
    """Time it compiled; in a rehearsal, which has no compiler, as it is."""
    setting.found["compiled"] = timed(
        plain(setting, compile="off" if setting.small else "on"), setting
    )


def plain(
    setting: Setting,
    layout: torch.memory_format = torch.contiguous_format,
    checkpoint_activations: bool = False,
    **machine: object,
) -> Callable:
    """Return a retraining step of batch 2 at the published size."""
    size = benchmark.SIZES["small" if setting.small else "published"]
    precision, processes = Precision("bf16", setting.processes.device), setting.processes
    torch.manual_seed(0)
    sizes = 1, benchmark.TASK.num_classes, 0.0625 if setting.small else size["train_channel_mul"]
    network = DiscreteNetwork(benchmark.typical_architecture(), *sizes)
    network = network.to(precision.device).to(memory_format=layout)
    network.checkpoint_activations = checkpoint_activations
    image = torch.rand(2, 1, *[size["patch_size"]] * 3)
    image = image.to(precision.device).to(memory_format=layout)
    batch = {"image": image, "label": (image > 0.5).to(torch.uint8)}
    more = {"average_decay": 0.99, **machine}
    return partial(a_training(network, precision, processes, image.shape, **more).step, batch)


GRAPHS = "cuda graphs"
VARIANTS: dict[str, Callable[[Setting], Callable]] = {
    "plain": plain,
    "channels last": lambda setting: plain(setting, torch.channels_last_3d),
    "activations computed twice": lambda setting: plain(setting, checkpoint_activations=True),
    GRAPHS: lambda setting: plain(setting, cuda_graphs=True),
}


def timed(step: Callable[[], object], setting: Setting) -> dict:
    """Return the first step's seconds, and of later ones the median, waited for one by one and ten
    by ten.

    And the memory at the peak of one, on a GPU.
    """
    on_gpu, device = setting.device == "cuda", setting.processes.device
    found = {"first_s": round(benchmark.seconds_of_calls(step, 1, device), 2)}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for name, count, repeats in (("ms", 1, 15), ("ms_of_ten", 10, 3)):
        count, repeats = (1, 1) if setting.small else (count, repeats)
        seconds = [benchmark.seconds_of_calls(step, count, device) / count for _ in range(repeats)]
        found[name] = round(1e3 * statistics.median(seconds), 2)
    if on_gpu:
        found["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return found


def profile(setting: Setting) -> None:
    """List the kernels that take longest, of a retraining step and of both steps of a search."""
    setting.found["retraining step"] = kernels_of(plain(setting), setting)
    size = benchmark.SIZES["small" if setting.small else "published"]["patch_size"]
    flags = SPACE if setting.small else f"--channel_mul 0.5 --patch_size {size} {size} {size}"
    supernet = search_of(flags, setting.processes, "bf16")
    batch = a_batch(setting.processes.device, 1, supernet.arch.input_shape[2:])
    setting.found["weights step"] = kernels_of(lambda: supernet.weights.step(batch), setting)
    step = partial(half_way, supernet, batch)
    setting.found["architecture step"] = kernels_of(step, setting)


def kernels_of(step: Callable[[], object], setting: Setting) -> dict:
    """Profile a step after the first two; return its milliseconds, and the longest kernels as lines
    of text.
    """
    on_gpu, device = setting.device == "cuda", setting.processes.device
    for _ in range(0 if setting.small else 2):
        step()
    benchmark.synchronise(device)
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as profiled:
        step()
        benchmark.synchronise(device)
    taken = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in profiled.key_averages()
        if not on_gpu or event.device_type.name == "CUDA"
    }
    longest = sorted(taken.items(), key=lambda item: -item[1][0])[:LONGEST]
    return {
        "kernels": sum(event.count for _, event in taken.values()),
        "ms": round(sum(microseconds for microseconds, _ in taken.values()) / 1e3, 2),
        "longest": [
            f"{microseconds / 1e3:9.3f} ms {event.count:5} x {name[:110]}"
            for name, (microseconds, event) in longest
        ],
    }


def activations(setting: Setting) -> None:
    """Hold the activations that are counted against what a pass takes at its peak, beside weights
    and gradients.
    """
    device, width = setting.processes.device, 0.125 if setting.small else 1.0
    shape = (2, 1, *[32 if setting.small else 96] * 3)
    image = torch.rand(shape).to(device)
    for name, architecture in (
        ("typical", benchmark.typical_architecture()),
        ("random", random_architecture(1, 12, 4)),
    ):
        make = partial(DiscreteNetwork, architecture, 1, benchmark.TASK.num_classes, width)
        found = {key: round(value, 1) for key, value in counts(make, shape).items()}
        network = make().to(device)
        for precision in (Precision(name, device) for name in ("fp32", "bf16")):
            peak = peak_mib(network, image, precision)
            found[f"peak_mib, {precision.name}"] = peak and round(peak, 1)
        setting.found[name] = found


def peak_mib(network: torch.nn.Module, image: torch.Tensor, precision: Precision) -> float | None:
    """Measure a third pass, forward and backward, above what is held between two; None on a CPU."""
    for _ in range(3 if image.is_cuda else 1):
        if image.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        network.zero_grad(set_to_none=False)
        with precision.autocast():
            scores = network(image)
        scores.float().square().mean().backward()
        del scores
    return (torch.cuda.max_memory_allocated() - before) / 2**20 if image.is_cuda else None


def candidates(setting: Setting) -> None:
    """Let candidates compete at the published 12 x 4, and note how long each took, the first step
    included.
    """
    small = setting.small or not (setting.root / "dataset.json").is_file()
    root = phantom(setting) if small else setting.root
    size = "--patch_size 32 32 32"
    if setting.small:
        size = "--patch_size 16 16 16 --num_blocks 2 --num_depths 3"
    folder, start = setting.folder / "candidates", time.monotonic()
    command = [sys.executable, "evolve_dints.py", "--root", root, "--num_folds", 4, *size.split()]
    command += ["--candidates", 4, "--num_iterations"]
    command += [8 if setting.small else 160, "--device", setting.device, "--precision", "bf16"]
    command += ["--overlap_ratio", 0.25, *["--memory_mib", 0.5] * setting.small]
    ran([*command, "--output_root", folder], setting)
    rows = list(csv.DictReader((folder / "candidates.csv").open(newline="")))
    setting.found["seconds"] = round(time.monotonic() - start, 1)
    setting.found["candidates"] = [{key: row[key] for key in KEYS} for row in rows]


def loader(setting: Setting) -> None:
    """Retrain at the published size from real files: seconds an iteration, and the share of it that
    waits for data.
    """
    setting.found["rates"] = rates(setting, 1)


def scaling(setting: Setting) -> None:
    """Do the same on 2, 4, ... GPUs, at a batch each; `loader` has said what one does."""
    count = torch.cuda.device_count() if setting.device == "cuda" else 1
    setting.found["gpus"] = count
    for number in (number for number in (2, 4, 8) if number <= count):
        setting.found[f"on {number}"] = rates(setting, number)


def rates(setting: Setting, processes: int) -> dict:
    """Retrain for a few epochs; return the first epoch's seconds an iteration, the later ones', and
    how these wait.
    """
    root = phantom(setting) if setting.small else phantom(setting, side=112)
    arch, folder = setting.folder / "typical.pth", setting.folder / f"on_{processes}"
    save_architecture(arch, benchmark.typical_architecture())
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    data = ["--arch_ckpt", arch, "--root", root, *["--num_folds", "4", "--resume", "never"]]
    size = "--patch_size 96 96 96 --channel_mul 1 --num_epochs 20"
    if setting.small:
        size = "--patch_size 32 32 32 --channel_mul 0.0625 --num_epochs 2"
    size += " --num_epochs_per_validation 1000 --overlap_ratio 0 --num_images_per_batch 2"
    command = [sys.executable, *launched, "train_dints.py", *data, *size.split()]
    command += ["--precision", "bf16", "--device", setting.device]
    ran([*command, "--output_root", folder], setting)
    first, *others = history(folder)
    seconds, waits = (
        [float(row[key]) for row in others] for key in ("seconds_per_iteration", "data_wait")
    )
    return {
        "s_per_iteration": statistics.median(seconds),
        "share_of_waiting": statistics.median(waits),
        "s_per_iteration_at_first": float(first["seconds_per_iteration"]),
    }


def task04(setting: Setting) -> None:
    """Search Task04 at the published 12 x 4, and retrain what is found; in a rehearsal a phantom,
    small.
    """
    if setting.small:
        data = ["--root", phantom(setting), *STAGE.split()]
        search, train = ["--num_blocks", 2, "--num_depths", 3], []
    elif not (setting.root / "dataset.json").is_file():
        setting.found["left out"] = f"{setting.root} is not there"
        return
    else:
        data = ["--root", setting.root]
        data += ["--num_folds", "4", "--num_images_per_batch", "4", "--overlap_ratio", "0.25"]
        search, train = [], ["--use_downsample", "no"]
    every = ["--num_epochs", 12, "--num_epochs_per_validation", 12, "--device", setting.device]
    search += ["--num_epochs_warmup", 4, "--learning_rate_arch", 0.02]
    setting.found["search"] = stage("search", setting, 100, *data, *every, *search)
    arch = max((setting.folder / "task04_search").glob("search_code_*.pth"))
    setting.found["train"] = stage(
        "train", setting, 400, *data, *every, *train, "--arch_ckpt", arch
    )


def stage(name: str, setting: Setting, iterations: int, *flags: object) -> dict:
    """Run a stage; return its iterations, its seconds in all, and its last Dice."""
    start, folder = time.monotonic(), setting.folder / f"task04_{name}"
    command = [sys.executable, f"{name}_dints.py", "--output_root", folder, *flags]
    command += ["--recipe", "recommended"]
    said = ran([*command, "--num_iterations", 1 if setting.small else iterations], setting)
    return {
        "iterations": int(history(folder)[-1]["iteration"]),
        "seconds": round(time.monotonic() - start, 1),
        "dice": float(re.findall(r"Dice ([\d.]+)", said)[-1]),
    }


PARTS: dict[str, Callable[[Setting], None]] = {
    "steps": published_against_ours,
    "variants": variants,
    "profile": profile,
    "activations": activations,
    "candidates": candidates,
    "loader": loader,
    "scaling": scaling,
    "compiled": compiled,
    "task04": task04,
}
