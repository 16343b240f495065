"""What is to be right on a GPU: the parts of gpu.py that check.

Each notes what it finds, and fails by an `AssertionError`. On a CPU they are the same but for what
has to be a GPU's.
"""

from __future__ import annotations

import csv
import gc
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import steps as benchmark
import torch
import torch.distributed as dist
from architectures import random_architecture
from parts import Search, a_search, a_training, half_way
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dints import files
from dints.data.phantom import write_phantom
from dints.data.tasks import TASKS
from dints.errors import UserError
from dints.network.architecture import save_architecture
from dints.network.discrete import DiscreteNetwork
from dints.running import machine
from dints.running.precision import Precision
from dints.running.processes import Processes, started
from dints.training import cuda_graphs
from dints.training.steps import WeightsTrainer, compiled

CHECKOUT = Path(__file__).resolve().parents[1]
PATCH = (32, 32, 32)
ON_CPU = Processes(0, 1, torch.device("cpu"))
TASK = replace(TASKS["Task07_Pancreas"], patch_size=PATCH)
SPACE = "--num_blocks 3 --num_depths 3 --channel_mul 0.125 --patch_size 32 32 32"
STAGE = "--patch_size 16 16 16 --num_folds 3 --overlap_ratio 0 --channel_mul 0.125 --num_workers 1"


class Findings(dict):
    """What a part has found; each finding is written at once, so that a part that is ended keeps
    what it had.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def __setitem__(self, name: str, value: object) -> None:
        super().__setitem__(name, value)
        files.write_atomically(self.path, json.dumps(self).encode())


@dataclass(frozen=True)
class Setting:
    """What a part is given.

    Attributes:
        found: where it notes what it finds.
        small: whether it is a rehearsal.
        folder: of all parts of a run, for files.
        root: of Task04_Hippocampus; it may be absent.
        deadline: of the monotonic clock.
    """

    found: Findings
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


def describe_machine(setting: Setting) -> None:
    """Note what all the rest was found on."""
    found = {name: version(name) for name in ("torch", "monai", "numpy")}
    found |= {"device": str(setting.processes.device), "cores": os.cpu_count()}
    found["python"] = platform.python_version()
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpus": [*map(torch.cuda.get_device_name, range(torch.cuda.device_count()))],
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_in_products": torch.backends.cuda.matmul.allow_tf32,
        }
    setting.found["machine"] = found


def agrees(setting: Setting) -> None:
    """Compare both networks' scores and gradients with those of a CPU, in fp32, and in bf16 with
    those in fp32.
    """
    device = setting.processes.device
    with exact():
        for name, network in networks():
            on_cpu = scores_and_gradients(network, torch.device("cpu"))
            there = scores_and_gradients(network, device)
            differences = [largest_difference(*pair) for pair in zip(on_cpu, there, strict=True)]
            setting.found[f"{name}, relative to a CPU's"] = differences
            # A gradient is a sum over many voxels, in another order.
            assert differences[0] < 1e-3 and differences[1] < 1e-2, differences
        for name, network in networks() if setting.small else published_networks():
            image = a_batch(device, 1, PATCH if setting.small else (96, 96, 96))["image"]
            fp32, bf16 = (
                scores_and_gradients(network, device, Precision(precision, device), image)
                for precision in ("fp32", "bf16")
            )
            round_weights(network)
            rounded = scores_and_gradients(network, device, image=image)
            differences = [
                {
                    "bf16": distance(exactly, in_bf16),
                    "weights rounded": distance(exactly, of_rounded),
                }
                for exactly, in_bf16, of_rounded in zip(fp32, bf16, rounded, strict=True)
            ]
            setting.found[f"{name}, relative to fp32"] = differences
            # A network at its start makes much of little: what its weights' rounding alone comes to
            # is the scale.
            assert all(found["bf16"] < 6 * found["weights rounded"] for found in differences), (
                differences
            )


@torch.no_grad()
def round_weights(network: nn.Module) -> None:
    """Round each weight to bf16."""
    for weight in network.parameters():
        weight.copy_(weight.bfloat16().float())


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
    """Make a supernet and a discrete network, on the CPU."""
    yield "supernet", search_of(f"{SPACE} {blocks_and_depths}", ON_CPU).network
    yield "discrete network", a_network()


def published_networks() -> Iterator[tuple[str, nn.Module]]:
    """Make both of the published size, on the CPU."""
    published = "--channel_mul 0.5 --patch_size 96 96 96"
    yield "published supernet", search_of(published, ON_CPU).network
    torch.manual_seed(0)
    yield (
        "published discrete network",
        DiscreteNetwork(benchmark.typical_architecture(), 1, TASK.num_classes),
    )


def search_of(flags: str, processes: Processes, precision: str = "fp32") -> Search:
    """Make a supernet with its trainers."""
    return a_search(flags.split(), TASK, Precision(precision, processes.device), processes)


def a_network(channel_mul: float = 0.125) -> DiscreteNetwork:
    torch.manual_seed(0)
    return DiscreteNetwork(
        random_architecture(0, 4, 3), TASK.num_channels, TASK.num_classes, channel_mul
    )


def a_batch(
    device: torch.device, num_images: int = 2, patch: tuple[int, ...] = PATCH
) -> dict[str, torch.Tensor]:
    """Make images, and labels that follow from them."""
    coarse = torch.rand(
        num_images, TASK.num_channels, 4, 4, 4, generator=torch.Generator().manual_seed(0)
    )
    image = nn.functional.interpolate(coarse, patch, mode="trilinear")
    label = (image > 0.5).to(torch.uint8) + (image > 0.7)
    return {"image": image.to(device), "label": label.to(torch.uint8).to(device)}


def scores_and_gradients(
    network: nn.Module,
    device: torch.device,
    precision: Precision | None = None,
    image: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pass an image through a network, forward and backward; where none is given, that of
    `a_batch`, in fp32.
    """
    network.to(device).zero_grad()
    image = a_batch(device)["image"] if image is None else image
    with (precision or Precision("fp32", device)).autocast():
        scores = network(image).float()
    scores.square().mean().backward()
    gradients = [
        weight.grad.cpu().clone() for weight in network.parameters() if weight.grad is not None
    ]
    return [scores.detach().cpu()], gradients


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Return it relative to the largest of all numbers of the first."""
    scale = max(float(tensor.abs().max()) for tensor in first)
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) / scale


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Return the norm of all differences together, relative to that of the first."""
    squares = sum(
        float((a - b).double().square().sum()) for a, b in zip(first, second, strict=True)
    )
    return (squares / sum(float(tensor.double().square().sum()) for tensor in first)) ** 0.5


def losses_fall(setting: Setting) -> None:
    """Train both networks on one batch in each precision."""
    count = 2 if setting.small else 40
    for precision in setting.precisions:
        batch, processes = a_batch(precision.device), setting.processes
        training = training_of(a_network(), precision, processes, max_gradient_norm=1.0)
        supernet = search_of(f"{SPACE} --learning_rate_arch 0.02", processes, precision.name)
        retrained = [training.step(batch) for _ in range(count)]
        searched = [supernet.weights.step(batch) for _ in range(count)]
        arch = [half_way(supernet, batch) for _ in range(count)]
        losses = {
            name: [round(float(losses[0]), 4), round(float(losses[-1]), 4)]
            for name, losses in (
                ("retraining", retrained),
                ("search", searched),
                ("architecture", arch),
            )
        }
        setting.found[precision.name] = losses
        for name in ("retraining", "search"):
            first, last = losses[name]
            assert last < (0.99 if setting.small else 0.8) * first, losses


def training_of(
    network: nn.Module, precision: Precision, processes: Processes, **more
) -> WeightsTrainer:
    settings = {"learning_rate": 0.05, "average_decay": 0.99, **more}
    return a_training(network.to(precision.device), precision, processes, **settings)


def skips_infinite(setting: Setting) -> None:
    """Take a step whose gradient is infinite: it must change no weight, and the next one must."""
    for precision in setting.precisions:
        training, batch = (
            training_of(a_network(), precision, setting.processes),
            a_batch(precision.device),
        )
        training.step(batch)
        before = weights_of(training.network)
        training.step({**batch, "image": batch["image"] * torch.inf})
        assert all(map(torch.equal, before, weights_of(training.network))), (
            f"{precision.name}: weights changed"
        )
        # Its scaler skips some itself, until it has found a scale
        for _ in range(12 if precision.name == "fp16" else 1):
            training.step(batch)
        after = weights_of(training.network)
        assert all(weight.isfinite().all() for weight in after), f"{precision.name}: not finite"
        assert not any(map(torch.equal, before, after)), (
            f"{precision.name}: no step after it did anything"
        )
        setting.found[precision.name] = "a step was skipped, and the next was taken"


def weights_of(network: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in network.parameters()]


def ddp(setting: Setting) -> None:
    """Hold a step under DDP, with NCCL on a GPU, against one without; and the CPU's group beside
    it.

    The group has one process, for NCCL takes no second one on a GPU; `scaling` has more, where
    there are more.
    """
    device, network = setting.processes.device, a_network().to(setting.processes.device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    on_device = {"device_id": device} if backend == "nccl" else {}
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **on_device)
    try:
        with exact():
            _, plain = scores_and_gradients(network, device)
            # as if one of two, which it wraps for
            wrapped = Processes(0, 2, device).distributed(network)
            _, averaged = scores_and_gradients(wrapped, device)
        difference = largest_difference(plain, averaged)
        setting.found["step"] = {"backend": backend, "relative_difference": difference}
        assert isinstance(wrapped, DistributedDataParallel) and difference < 1e-2, difference
        numbers = torch.ones(3)
        dist.all_reduce(numbers, group=dist.new_group(backend="gloo"))
        setting.found["beside"] = numbers.tolist()
    finally:
        dist.destroy_process_group()


def lacks_memory(setting: Setting) -> None:
    """Provoke a lack of memory, as PyTorch finds it and as libraries do: the message must name the
    remedies.
    """
    if setting.device == "cpu":
        setting.found["CPU"] = message_of(lambda: torch.empty(2**60, dtype=torch.uint8), setting)
        return
    device = setting.processes.device
    for mib in (16, 400):  # the libraries begin in the first
        free = torch.cuda.mem_get_info()[0]
        held = torch.empty(free - mib * 2**20, dtype=torch.uint8, device=device)
        setting.found[f"{mib} MiB free"] = message_of(lambda: a_large_step(setting), setting)
        del held
        gc.collect()
        torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    setting.found["a share of 0.01"] = message_of(lambda: a_large_step(setting), setting)


def a_large_step(setting: Setting) -> None:
    """Take a step that needs some GiB."""
    device = setting.processes.device
    network = DiscreteNetwork(benchmark.typical_architecture(), 1, TASK.num_classes)
    training = training_of(network, Precision("bf16", device), setting.processes)
    training.step(a_batch(device, 2, (96, 96, 96)))
    torch.cuda.synchronize()


def message_of(call: Callable[[], object], setting: Setting) -> str:
    """Return what a user reads where ``call`` lacks memory."""
    try:
        with started(setting.device):
            call()
    except UserError as error:
        assert str(error).startswith("memory is exhausted") and "--num_images_per_batch" in str(
            error
        ), error
        return str(error)
    raise AssertionError("it did not lack memory")


def compiles(setting: Setting) -> None:
    """Hold both compiled networks against the plain ones."""
    device = setting.processes.device
    small = {"backend": "eager"} if setting.small else {}
    compiling = torch.compile
    with (
        exact(),
        mock.patch.object(
            torch, "compile", lambda network, **how: compiling(network, **{**how, **small})
        ),
    ):
        for name, network in networks("--num_blocks 2 --num_depths 2"):
            plain = scores_and_gradients(network, device)
            start = time.monotonic()
            fast_network = compiled(network, "on", device)
            fast = scores_and_gradients(fast_network, device)
            differences = [largest_difference(*pair) for pair in zip(plain, fast, strict=True)]
            seconds = round(time.monotonic() - start, 1)
            setting.found[name] = {
                "relative_differences": differences,
                "seconds_to_compile": seconds,
            }
            assert max(differences) < 1e-2, differences


def records(setting: Setting) -> None:
    """Hold passes and steps that are replayed as CUDA graphs against plain ones; without a GPU
    plain against plain.
    """
    device = setting.processes.device
    for precision in (Precision(name, device) for name in ("fp32", "bf16")):
        with exact():
            for name, network in networks():
                plain = scores_and_gradients(network, device, precision)
                replaying = network
                if device.type == "cuda":
                    replaying = cuda_graphs.recorded(
                        network, a_batch(device)["image"].shape, precision
                    )
                replayed = scores_and_gradients(replaying, device, precision)
                differences = [distance(*pair) for pair in zip(plain, replayed, strict=True)]
                setting.found[f"{name}, {precision.name}"] = differences
                assert max(differences) < (1e-3 if precision.name == "fp32" else 5e-2), differences
            plain, replayed = (
                losses_of_search(setting, precision.name, graphs) for graphs in (False, True)
            )
            setting.found[f"losses of a search, {precision.name}"] = {
                "plain": plain,
                "replayed": replayed,
            }
            worst = max(abs(a - b) / a for a, b in zip(plain, replayed, strict=True))
            assert worst < (1e-2 if precision.name == "fp32" else 5e-2), worst


def losses_of_search(setting: Setting, precision: str, graphs: bool) -> list[float]:
    """Take both steps of a search by turns: their two recordings share memory, and each changes
    what is trained.
    """
    flags = " --cuda_graphs" if graphs and setting.device == "cuda" else ""
    supernet = search_of(f"{SPACE} --num_images_per_batch 2{flags}", setting.processes, precision)
    batch, losses = a_batch(setting.processes.device), []
    for _ in range(1 if setting.small else 10):
        losses.append(supernet.weights.step(batch))
        losses.append(half_way(supernet, batch))
    return torch.stack(losses).tolist()


def resumes(setting: Setting) -> None:
    """Kill a retraining in its middle and continue it: it must end as one that was left alone."""
    root, arch, epochs = phantom(setting), setting.folder / "arch.pth", 6 if setting.small else 60
    save_architecture(arch, random_architecture(0, 2, 3))
    train = [sys.executable, "train_dints.py", "--arch_ckpt", arch, "--root", root, *STAGE.split()]
    train += ["--num_epochs", epochs, "--num_epochs_per_validation", epochs]
    train += ["--save_minutes", 0.001, "--device", setting.device]
    straight, killed = setting.folder / "straight", setting.folder / "killed"
    process = begun([*train, "--output_root", killed], start_new_session=True)
    beside = begun([*train, "--output_root", straight])
    while process.poll() is None and len(history(killed)) < 3:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before"
    done = len(history(killed))
    ran([*train, "--output_root", killed], setting)
    assert beside.wait(setting.seconds_left) == 0, "the one that was left alone failed"
    losses = [[float(row["loss"]) for row in history(folder)] for folder in (straight, killed)]
    assert len(losses[0]) == len(losses[1]) == epochs, losses
    # A GPU adds in no fixed order, so that two runs part with time.
    compared = done + 3 if setting.device == "cuda" else epochs
    worst = max(abs(a - b) / a for a, b in list(zip(*losses, strict=True))[:compared])
    setting.found["run"] = {
        "epochs": epochs,
        "killed_after": done,
        "largest_relative_difference_of_losses": worst,
    }
    assert worst < (0.05 if setting.device == "cuda" else 1e-6), losses


def begun(command: list[object], **more: object) -> subprocess.Popen:
    command = list(map(str, command))
    return subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more
    )


def history(folder: Path) -> list[dict[str, str]]:
    path = folder / "loss_history.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def phantom(setting: Setting, side: int = 24) -> Path:
    root = setting.folder / f"of_{side}" / "Task00_Phantom"
    return root if root.exists() else write_phantom(root, 8, 2, shape=(side, side, side))


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


def quickstart(setting: Setting) -> None:
    """Run quickstart.sh in this environment, and with it the launchers; and segment its cases on a
    CPU too.
    """
    results, data = setting.folder / "quickstart", setting.folder / "data" / "Task00_Phantom"
    start = time.monotonic()
    few = {"SEARCH_ITERATIONS": "6", "CANDIDATE_ITERATIONS": "16", "TRAIN_ITERATIONS": "20"}
    # Without a network nothing can be fetched: pip is not to try.
    given = {"ACTIVE": "1", "PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
    given |= {"OUTPUT_ROOT": str(results), "DATA_ROOT": str(data)}
    said = ran(["bash", "quickstart.sh"], setting, **given, **few)
    gpus = torch.cuda.device_count() if setting.device == "cuda" else 1
    found = {
        "seconds": round(time.monotonic() - start, 1),
        "dice": re.findall(r"Dice ([\d.]+)", said)[-1],
    }
    setting.found["quickstart"] = {**found, "processes": gpus}
    assert said.count(f"{gpus} x {setting.device} in") >= 2, said[-1500:]
    segments(setting, results / "train" / "best_metric_model.pth")


def segments(setting: Setting, model: Path) -> None:
    """Segment a case on the device and on a CPU, in fp32: the probabilities must agree."""
    image = next((phantom(setting) / "imagesTs").glob("*.nii.gz"))
    infer = [sys.executable, "infer_dints.py", "--checkpoint", model, "--input", image]
    infer += ["--save_probabilities", "--precision", "fp32"]
    folders = {device: setting.folder / f"segmented_{device}" for device in (setting.device, "cpu")}
    for device, folder in folders.items():
        ran([*infer, "--device", device, "--output_root", folder], setting)
    there, on_cpu = (voxels_of(folder) for folder in (folders[setting.device], folders["cpu"]))
    worst = max(
        float(np.abs(there[name] - on_cpu[name]).max())
        for name in on_cpu
        if "probabilities" in name
    )
    (labels,) = (name for name in on_cpu if "probabilities" not in name)
    same = float((there[labels] == on_cpu[labels]).mean())
    setting.found["segmenting"] = {
        "largest_difference_of_probabilities": worst,
        "share_of_equal_voxels": same,
    }
    # TF32, and steps of 1/255
    assert there.keys() == on_cpu.keys() and worst < 0.1 and same > 0.98, (worst, same)


def voxels_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        str(path.relative_to(folder)): nib.load(path).get_fdata()
        for path in folder.rglob("*.nii.gz")
    }


PARTS: dict[str, Callable[[Setting], None]] = {
    "machine": describe_machine,
    "agrees": agrees,
    "losses_fall": losses_fall,
    "skips_infinite": skips_infinite,
    "ddp": ddp,
    "lacks_memory": lacks_memory,
    "records": records,
    "resumes": resumes,
    "compiles": compiles,
    "quickstart": quickstart,
}
