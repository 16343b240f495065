"""What is to be right on a GPU: the parts of gpu.py that check.

Each returns what it found, and fails by an `AssertionError`. On a CPU they are the same but for what has to be a GPU's.
"""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from architectures import random_architecture
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import search_dints
from dints.data.phantom import write_phantom
from dints.data.tasks import TASKS
from dints.network.architecture import save_architecture
from dints.network.found import FoundNetwork
from dints.running import machine
from dints.running.precision import Precision
from dints.running.processes import Processes
from dints.training import cuda_graphs, steps

CHECKOUT = Path(__file__).resolve().parents[1]
PATCH = (32, 32, 32)
TASK = replace(TASKS["Task07_Pancreas"], patch_size=PATCH)
SPACE = "--num_blocks 3 --num_depths 3 --channel_mul 0.125 --patch_size 32 32 32"
STAGE = "--patch_size 16 16 16 --num_folds 3 --overlap_ratio 0 --channel_mul 0.125 --num_workers 1"


@dataclass(frozen=True)
class Setting:
    """What a part is given.

    Attributes:
        small: whether it is a rehearsal.
        folder: of all parts of a run, for files.
        root: of Task04_Hippocampus; it may be absent.
        deadline: of the monotonic clock.
    """

    device: str
    small: bool
    folder: Path
    root: Path
    deadline: float

    @property
    def processes(self) -> Processes:
        return Processes(0, 1, machine.choose_device(self.device))

    @property
    def precisions(self) -> list[Precision]:
        """Those that the device computes."""
        names = ["fp32", "bf16"] + ["fp16"] * (self.device == "cuda")
        return [Precision(name, self.processes.device) for name in names]

    @property
    def seconds_left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())


def describe_machine(setting: Setting) -> dict:
    """Tell what all the rest was found on."""
    found = {"device": str(setting.processes.device), "torch": torch.__version__, "cores": os.cpu_count()}
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_in_products": torch.backends.cuda.matmul.allow_tf32,
        }
    return found


def agrees(setting: Setting) -> dict:
    """Compare both networks' scores and gradients with those of a CPU, in fp32."""
    with exact():
        found = {}
        for name, network in networks():
            on_cpu = scores_and_gradients(network, torch.device("cpu"))
            there = scores_and_gradients(network, setting.processes.device)
            found[name] = [largest_difference(*pair) for pair in zip(on_cpu, there, strict=True)]
            # A gradient is a sum over many voxels, in another order.
            assert found[name][0] < 1e-3 and found[name][1] < 1e-2, found
    return {"relative_differences_of_scores_and_gradients": found}


@contextmanager
def exact() -> Iterator[None]:
    """Compute fp32 as fp32 on a GPU, and not as TF32."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def networks(blocks_and_depths: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Make a supernet and a found network, on the CPU."""
    alone = Processes(0, 1, torch.device("cpu"))
    options = search_dints.parse_args(f"--root . --output_root . {SPACE} {blocks_and_depths}".split())
    yield "supernet", search_dints.Supernet(options, TASK, Precision("fp32", alone.device), alone).network
    yield "found network", a_network()


def a_network(channel_mul: float = 0.125) -> FoundNetwork:
    torch.manual_seed(0)
    return FoundNetwork(random_architecture(0, 4, 3), TASK.num_channels, TASK.num_classes, channel_mul)


def a_batch(device: torch.device, num_images: int = 2) -> dict[str, torch.Tensor]:
    """Make images, and labels that can be told from them."""
    coarse = torch.rand(num_images, TASK.num_channels, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    image = nn.functional.interpolate(coarse, PATCH, mode="trilinear")
    label = (image > 0.5).to(torch.uint8) + (image > 0.7)
    return {"image": image.to(device), "label": label.to(torch.uint8).to(device)}


def scores_and_gradients(network: nn.Module, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    network.to(device).zero_grad()
    scores = network(a_batch(device)["image"])
    scores.square().mean().backward()
    gradients = [weight.grad.cpu().clone() for weight in network.parameters() if weight.grad is not None]
    return [scores.detach().cpu()], gradients


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Return it relative to the largest of all numbers of the first."""
    scale = max(float(tensor.abs().max()) for tensor in first)
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) / scale


def losses_fall(setting: Setting) -> dict:
    """Train both networks on one batch in each precision."""
    found, count = {}, 5 if setting.small else 40
    for precision in setting.precisions:
        batch, processes = a_batch(precision.device), setting.processes
        training = training_of(a_network(), precision, processes, max_gradient_norm=1.0)
        options = search_dints.parse_args(f"--root . --output_root . {SPACE} --learning_rate_arch 0.02".split())
        supernet = search_dints.Supernet(options, TASK, precision, processes)
        retrained = [steps.weights_step(training, batch) for _ in range(count)]
        searched = [search_dints.weights_step(supernet, batch) for _ in range(count)]
        arch = [search_dints.architecture_step(supernet, batch, 0.5) for _ in range(count)]
        found[precision.name] = {
            name: [round(float(losses[0]), 4), round(float(losses[-1]), 4)]
            for name, losses in (("retraining", retrained), ("search", searched), ("architecture", arch))
        }
        for name in ("retraining", "search"):
            first, last = found[precision.name][name]
            assert last < (0.99 if setting.small else 0.8) * first, found
    return found


def training_of(network: nn.Module, precision: Precision, processes: Processes, **more) -> steps.WeightsTraining:
    network.to(precision.device)
    average = steps.averaged(network, 0.99)
    return steps.weights_training(
        network, network.parameters(), precision, processes, learning_rate=0.05, average=average, **more
    )


def skips_infinite(setting: Setting) -> dict:
    """Take a step whose gradient is infinite: it must change no weight, and the next one must."""
    for precision in setting.precisions:
        training, batch = training_of(a_network(), precision, setting.processes), a_batch(precision.device)
        steps.weights_step(training, batch)
        before = weights_of(training.network)
        steps.weights_step(training, {**batch, "image": batch["image"] * torch.inf})
        assert all(map(torch.equal, before, weights_of(training.network))), f"{precision.name}: weights changed"
        for _ in range(12):  # fp16's scaler may skip some of its own accord, until it has found a scale
            steps.weights_step(training, batch)
        after = weights_of(training.network)
        assert all(weight.isfinite().all() for weight in after), f"{precision.name}: not finite"
        assert not any(map(torch.equal, before, after)), f"{precision.name}: no step after it did anything"
    return {"precisions": [precision.name for precision in setting.precisions]}


def weights_of(network: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in network.parameters()]


def ddp(setting: Setting) -> dict:
    """Hold a step under DDP, with NCCL on a GPU, against one without; and the CPU's group beside it."""
    device, network = setting.processes.device, a_network().to(setting.processes.device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        scores_and_gradients(network, device)
        plain = [weight.grad.clone() for weight in network.parameters()]
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(network, ids, forward_sync_buffers=False, gradient_as_bucket_view=True)
        with exact():
            scores_and_gradients(wrapped, device)
        difference = largest_difference(
            [gradient.cpu() for gradient in plain], [weight.grad.cpu() for weight in network.parameters()]
        )
        assert difference < 1e-2, difference
        numbers = torch.ones(3)
        dist.all_reduce(numbers, group=dist.new_group(backend="gloo"))
        return {"backend": backend, "relative_difference": difference, "beside": numbers.tolist()}
    finally:
        dist.destroy_process_group()


def compiles(setting: Setting) -> dict:
    """Hold both compiled networks against the plain ones."""
    found, device = {}, setting.processes.device
    small = {"backend": "eager"} if setting.small else {}
    compiling = torch.compile
    with exact(), mock.patch.object(torch, "compile", lambda network, **how: compiling(network, **{**how, **small})):
        for name, network in networks("--num_blocks 2 --num_depths 2"):
            plain = scores_and_gradients(network, device)
            start = time.monotonic()
            compiled = steps.compiled(network, "on", device)
            fast = scores_and_gradients(compiled, device)
            found[name] = [largest_difference(*pair) for pair in zip(plain, fast, strict=True)]
            found[f"{name}, seconds to compile"] = round(time.monotonic() - start, 1)
            assert max(found[name]) < 1e-2, found
    return found


def records(setting: Setting) -> dict:
    """Hold both networks' passes, replayed as CUDA graphs, against the plain ones."""
    device = setting.processes.device
    if device.type != "cuda":
        return {"left out": "there is no GPU that could record"}
    found = {}
    with exact():
        for name, network in networks():
            plain = scores_and_gradients(network, device)
            replaying = cuda_graphs.recorded(network, a_batch(device)["image"].shape, Precision("fp32", device))
            replayed = scores_and_gradients(replaying, device)
            found[name] = [largest_difference(*pair) for pair in zip(plain, replayed, strict=True)]
            assert max(found[name]) < 1e-3, found
    return {"relative_differences_of_scores_and_gradients": found}


def resumes(setting: Setting) -> dict:
    """Kill a retraining in its middle and continue it: it must go on as one that was left alone."""
    root, arch, epochs = phantom(setting), setting.folder / "arch.pth", 12 if setting.small else 60
    save_architecture(arch, random_architecture(0, 2, 3))
    train = [sys.executable, "train_dints.py", "--arch_ckpt", arch, "--root", root, *STAGE.split()]
    train += ["--num_epochs", epochs, "--num_epochs_per_validation", epochs, "--save_minutes", 0.001]
    train += ["--device", setting.device]
    ran([*train, "--output_root", setting.folder / "straight"], setting)
    killed = setting.folder / "killed"
    process = subprocess.Popen(
        list(map(str, [*train, "--output_root", killed])),
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and len(history(killed)) < 3:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before"
    done = len(history(killed))
    ran([*train, "--output_root", killed], setting)
    losses = [[float(row["loss"]) for row in history(folder)] for folder in (setting.folder / "straight", killed)]
    assert len(losses[0]) == len(losses[1]) == epochs, losses
    # A GPU adds in no fixed order, so that two runs part with time.
    compared = done + 3 if setting.device == "cuda" else epochs
    worst = max(abs(a - b) / a for a, b in list(zip(*losses, strict=True))[:compared])
    assert worst < (0.05 if setting.device == "cuda" else 1e-6), losses
    return {"epochs": epochs, "killed_after": done, "largest_relative_difference_of_losses": worst}


def history(folder: Path) -> list[dict[str, str]]:
    path = folder / "loss_history.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def phantom(setting: Setting) -> Path:
    root, size = setting.folder / "Task00_Phantom", {"shape": (24, 24, 24)} if setting.small else {}
    return root if root.exists() else write_phantom(root, num_training=8, num_test=2, **size)


def ran(command: list[object], setting: Setting, **environment: str) -> str:
    """Run a command to its end, and return what it said."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=setting.seconds_left,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{command[:3]} ended with {done.returncode}: {said[-1500:]}"
    return said


def launchers(setting: Setting) -> dict:
    """Search and retrain by the launchers, on as many GPUs as there are, and segment there and on a CPU."""
    root, folder = phantom(setting), setting.folder / "launched"
    given = {"TASK": "Task00_Phantom", "DATA_ROOT": str(root), "FOLD": "0", "PYTHON": sys.executable}
    device = ["--device", setting.device]
    search = "--num_blocks 2 --num_depths 3 --num_epochs 2 --num_epochs_warmup 1 --num_epochs_per_validation 2"
    said = ran(
        ["bash", "search_dints.sh", *STAGE.split(), *search.split(), *device],
        setting,
        **given,
        OUTPUT_ROOT=str(folder / "search"),
    )
    (arch,) = (folder / "search").glob("search_code_*.pth")
    train = ["--num_epochs", "2", "--num_epochs_per_validation", "2"]
    said += ran(
        ["bash", "train_dints.sh", *STAGE.split(), *train, *device],
        setting,
        **given,
        OUTPUT_ROOT=str(folder / "train"),
        ARCH_CKPT=str(arch),
    )
    gpus = torch.cuda.device_count() if setting.device == "cuda" else 1
    assert said.count(f"{gpus} x {setting.device} in") == 2, said[-1500:]
    infer = [sys.executable, "infer_dints.py", "--checkpoint", folder / "train" / "best_metric_model.pth"]
    infer += ["--root", root, "--num_folds", 3, "--fold", 0, *device, "--output_root", folder / "segmentations"]
    ran(infer, setting)
    scores = list(csv.DictReader((folder / "segmentations" / "scores.csv").open(newline="")))
    return {"processes": gpus, "cases": len(scores)}


def quickstart(setting: Setting) -> dict:
    """Run quickstart.sh in this environment."""
    start = time.monotonic()
    few = {"SEARCH_ITERATIONS": "3", "CANDIDATE_ITERATIONS": "4", "TRAIN_ITERATIONS": "3"} if setting.small else {}
    said = ran(["bash", "quickstart.sh"], setting, ACTIVE="1", OUTPUT_ROOT=str(setting.folder / "quickstart"), **few)
    return {"minutes": round((time.monotonic() - start) / 60, 2), "dice": re.findall(r"Dice ([\d.]+)", said)[-1]}


PARTS: dict[str, Callable[[Setting], dict]] = {
    "machine": describe_machine,
    "agrees": agrees,
    "losses_fall": losses_fall,
    "skips_infinite": skips_infinite,
    "ddp": ddp,
    "records": records,
    "resumes": resumes,
    "launchers": launchers,
}
LAST: dict[str, Callable[[Setting], dict]] = {"compiles": compiles, "quickstart": quickstart}  # they take minutes
