"""How fast it is on a GPU: the parts of gpu.py that measure, and in the end a search and a retraining of real cases."""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import steps as benchmark
import torch
from gpu_checks import CHECKOUT, STAGE, Setting, history, phantom, ran, training_of

from dints.network.architecture import save_architecture
from dints.network.found import FoundNetwork
from dints.running.precision import Precision
from dints.training import steps

ROWS = (
    "decode",
    "regularisers",
    "weights step",
    "architecture step",
    "retraining step, batch 2",
    "validation, 4 windows",
)


def published_against_ours(setting: Setting) -> dict:
    """Time the published recipe against ours, as benchmarks/steps.py does: seconds, kernels, waits, memory."""
    output = setting.folder / "steps.json"
    command = [sys.executable, CHECKOUT / "tests" / "benchmarks" / "steps.py", "--device", setting.device]
    command += ["--precision", "bf16", "--no_memory", "--output", output]
    if setting.small:
        ran([*command, "--rows", "validation, 4 windows", "--repeats", 1], setting)
    else:
        ran([*command, "--size", "published", "--seconds_per_row", 12, "--rows", *ROWS], setting)
    return json.loads(output.read_text())


def variants(setting: Setting) -> dict:
    """Time a retraining step of ours, done in several ways."""
    found: dict[str, object] = {}
    for name, prepare in VARIANTS.items():
        if name == GRAPHS and setting.device != "cuda":
            continue
        try:
            found[name] = timed(prepare(setting), setting)
        except (RuntimeError, AssertionError) as error:  # one that does not work is a result too
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def compiled(setting: Setting) -> dict:
    """Time it compiled; in a rehearsal, which has no compiler, as it is."""
    return timed(plain(setting, how="off" if setting.small else "on"), setting)


def plain(
    setting: Setting,
    layout: torch.memory_format = torch.contiguous_format,
    how: str = "off",
    checkpoint_activations: bool = False,
    cuda_graphs: bool = False,
) -> Callable:
    """Return a retraining step of batch 2 at the published size."""
    size = benchmark.SIZES["small" if setting.small else "published"]
    precision, processes = Precision("bf16", setting.processes.device), setting.processes
    torch.manual_seed(0)
    width = 0.0625 if setting.small else size["train_channel_mul"]
    network = FoundNetwork(benchmark.typical_architecture(), 1, benchmark.TASK.num_classes, width)
    network = network.to(precision.device).to(memory_format=layout)
    network.checkpoint_activations = checkpoint_activations
    image = torch.rand(2, 1, *[size["patch_size"]] * 3).to(precision.device).to(memory_format=layout)
    batch = {"image": image, "label": (image > 0.5).to(torch.uint8)}
    training = training_of(network, precision, processes)
    training.network = steps.computing(network, image.shape, precision, compile=how, cuda_graphs=cuda_graphs)
    return partial(steps.weights_step, training, batch)


GRAPHS = "cuda graphs"
VARIANTS: dict[str, Callable[[Setting], Callable]] = {
    "plain": plain,
    "channels last": lambda setting: plain(setting, torch.channels_last_3d),
    "activations computed twice": lambda setting: plain(setting, checkpoint_activations=True),
    GRAPHS: lambda setting: plain(setting, cuda_graphs=True),
}


def timed(step: Callable[[], object], setting: Setting) -> dict:
    """Return the median of a few steps after the first, and the memory at the peak of one."""
    on_gpu, device, start = setting.device == "cuda", setting.processes.device, time.monotonic()
    step()
    benchmark.synchronise(device)
    found = {"first_s": round(time.monotonic() - start, 2)}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = [benchmark.seconds_of_calls(step, 1, device) for _ in range(2 if setting.small else 15)]
    found["ms"] = round(1e3 * statistics.median(seconds), 2)
    if on_gpu:
        found["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return found


def loader(setting: Setting) -> dict:
    """Retrain at the published size from real files: seconds an iteration, and the share of it that waits for data."""
    return rates(setting, launched(setting, 1))


def scaling(setting: Setting) -> dict:
    """Do the same on 1, 2, 4, ... GPUs, at a batch each; where there is one, `loader` has said all."""
    count = torch.cuda.device_count() if setting.device == "cuda" else 1
    if count == 1:
        return {"gpus": [1]}
    numbers = [number for number in (1, 2, 4, 8) if number <= count]
    return {"gpus": numbers, "rates": [rates(setting, launched(setting, number)) for number in numbers]}


def launched(setting: Setting, processes: int) -> str:
    """Retrain for a few epochs; return what it said."""
    root, arch = phantom(setting), setting.folder / "typical.pth"
    save_architecture(arch, benchmark.typical_architecture())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command = [*command, "train_dints.py", "--arch_ckpt", arch, "--root", root, "--num_folds", 4, "--resume", "never"]
    size = "--patch_size 32 32 32 --channel_mul 0.0625" if setting.small else "--patch_size 96 96 96 --channel_mul 1"
    command += [*size.split(), "--num_epochs_per_validation", 1000, "--overlap_ratio", 0, "--device", setting.device]
    command += ["--num_epochs", 2 if setting.small else 12, "--num_images_per_batch", 2, "--precision", "bf16"]
    return ran([*command, "--output_root", setting.folder / f"on_{processes}"], setting)


def rates(setting: Setting, said: str) -> dict:
    """Return the last epochs' seconds an iteration, and shares of waiting, of a training's log."""
    lines = re.findall(r"\(([\d.]+) s/it, ([\d.]+)% of it waiting", said)
    assert lines, said[-1500:]
    seconds, waited = (list(map(float, values)) for values in zip(*lines, strict=True))
    half = len(lines) // 2
    return {"s_per_iteration": statistics.median(seconds[half:]), "percent_waiting": statistics.median(waited[half:])}


def task04(setting: Setting) -> dict:
    """Search Task04 at the published 12 x 4, and retrain what is found; in a rehearsal a phantom, small."""
    if setting.small or not (setting.root / "dataset.json").is_file():
        data = ["--root", phantom(setting), *STAGE.split()]
        search, train = ["--num_blocks", 2, "--num_depths", 3], []
    else:
        data = ["--root", setting.root, "--num_folds", 4, "--num_images_per_batch", 4, "--overlap_ratio", 0.25]
        search, train = [], ["--use_downsample", "no"]
    every = ["--num_epochs", 12, "--num_epochs_per_validation", 12, "--device", setting.device]
    search += ["--num_epochs_warmup", 4, "--learning_rate_arch", 0.02]
    found = {"search": stage("search", setting, 200, *data, *every, *search)}
    arch = max((setting.folder / "task04_search").glob("search_code_*.pth"))
    return {**found, "train": stage("train", setting, 1000, *data, *every, *train, "--arch_ckpt", arch)}


def stage(name: str, setting: Setting, iterations: int, *flags: object) -> dict:
    """Run a stage; return its iterations, its seconds in all, and its last Dice."""
    start, folder = time.monotonic(), setting.folder / f"task04_{name}"
    command = [sys.executable, f"{name}_dints.py", "--output_root", folder, "--recipe", "recommended", *flags]
    said = ran([*command, "--num_iterations", 1 if setting.small else iterations], setting)
    return {
        "iterations": int(history(folder)[-1]["iteration"]),
        "seconds": round(time.monotonic() - start, 1),
        "dice": float(re.findall(r"Dice ([\d.]+)", said)[-1]),
    }


PARTS: dict[str, Callable[[Setting], dict]] = {
    "steps": published_against_ours,
    "variants": variants,
    "loader": loader,
    "scaling": scaling,
    "compiled": compiled,
}
LAST: dict[str, Callable[[Setting], dict]] = {"task04": task04}
