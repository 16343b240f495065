"""Runs the CUDA path where there is no GPU, forward and backward, and lists where the host would
wait for one.

    python -m venv /tmp/cuda
    PIP_CONFIG_FILE=/dev/null /tmp/cuda/bin/pip install -r requirements.txt
    /tmp/cuda/bin/python benchmarks/fake_gpu.py -m pytest -p no:cacheprovider -o log_cli=true
    benchmarks/fake_cuda.py

It needs the CUDA build of PyTorch for Linux (4.7 GB) and a C compiler. What it sees: devices that
are mixed up, types that do not fit, operations without a CUDA path, waits. What it cannot see:
numbers, kernels, several processes.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import random_architecture
from fake_gpu import GPU, Gpu, a_gpu, is_there
from parts import a_run, a_search, a_training, half_way
from torch import nn

from dints.data import augmentation, loaders
from dints.data.tasks import TASKS
from dints.inference import slabs
from dints.network.discrete import DiscreteNetwork
from dints.running import checkpoint
from dints.running import epoch_loss as losses
from dints.running.precision import Precision, choose_precision
from dints.running.processes import Processes
from dints.running.stop_signal import StopSignal
from dints.training import validation
from dints.training.windows import SlidingWindow

pytestmark = pytest.mark.skipif(not is_there(), reason="its docstring has the command")
log = logging.getLogger(__name__)

ALONE = Processes(0, 1, GPU)
PATCH = (32, 32, 32)
TASK = replace(TASKS["Task07_Pancreas"], patch_size=PATCH)
SETTINGS = "--channel_mul 0.125 --num_blocks 3 --num_depths 3 --patch_size 32 32 32"
each_precision = pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])


def a_batch(num_images: int = 2) -> dict[str, torch.Tensor]:
    """Make a batch as a loader hands it over, on the CPU."""
    shape = (num_images, TASK.num_channels, *PATCH)
    return {
        "image": torch.rand(shape),
        "label": torch.zeros(shape, dtype=torch.uint8),
        "cases": ["a", "b"],
    }


def a_network() -> DiscreteNetwork:
    return DiscreteNetwork(random_architecture(0, 4, 3), TASK.num_channels, TASK.num_classes, 0.125)


def waits(gpu: Gpu, part: str) -> list[str]:
    """Return what was waited for and where, and say so."""
    found = [
        f"{wait.what} at {wait.lines[-1] if wait.lines else 'no line of ours'}"
        for wait in gpu.waits
    ]
    said = ", ".join(f"{count} x {wait}" for wait, count in Counter(found).items())
    log.warning("%s: %d launches, waits: %s", part, gpu.launches, said or "none")
    return found


@each_precision
@pytest.mark.parametrize("more", ["", "--checkpoint_activations"])
def test_neither_step_of_the_search_waits(name: str, more: str):
    with a_gpu() as gpu:
        supernet = a_search([*SETTINGS.split(), *more.split()], TASK, Precision(name, GPU), ALONE)
        gpu.forget()
        assert supernet.weights.step(a_batch()).device == GPU
        assert waits(gpu, f"weights step, {name} {more}") == []
        weights = supernet.weights.weights
        assert all(weight.device == GPU and weight.grad.device == GPU for weight in weights)
        gpu.forget()
        assert half_way(supernet, a_batch()).device == GPU
        assert waits(gpu, f"architecture step, {name} {more}") == []


@each_precision
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_the_step_of_a_retraining_does_not_wait(name: str, checkpoint_activations: bool):
    with a_gpu() as gpu:
        network = a_network().to(GPU)
        network.checkpoint_activations = checkpoint_activations
        how = {"learning_rate": 0.1, "max_gradient_norm": 1.0, "average_decay": 0.99}
        training = a_training(network, Precision(name, GPU), ALONE, **how)
        for _ in range(2):
            gpu.forget()
            assert training.step(a_batch()).device == GPU
            assert waits(gpu, f"retraining step, {name}") == []
        assert all(weight.device == GPU for weight in training.average.module.parameters())


@each_precision
def test_features_keep_their_type_where_they_grow(name: str):
    """PyTorch's autocast would make them fp32."""
    with a_gpu():
        types, network = [], a_network().to(GPU)
        for module in network.modules():
            if isinstance(module, nn.Upsample) and module.scale_factor == 2:
                module.register_forward_hook(
                    lambda _, given, result: types.append((given[0].dtype, result.dtype))
                )
        with Precision(name, GPU).autocast():
            network(torch.rand(1, TASK.num_channels, *PATCH).to(GPU))
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert len(types) > 3 and {result for _, result in types} <= {expected, torch.float32}
    assert all(given == result for given, result in types)


def test_losses_are_looked_at_once_in_many_steps():
    with a_gpu(answer=0.0) as gpu:
        epoch = losses.EpochLoss("loss", ALONE)
        gpu.forget()
        for step in range(losses.CHECK_EVERY - 1):
            epoch.add(torch.zeros((), device=GPU), step, ["a"])
        assert waits(gpu, "19 steps' losses") == []
        epoch.add(torch.zeros((), device=GPU), losses.CHECK_EVERY - 1, ["a"])
        assert len(waits(gpu, "the 20th's")) == 1


@pytest.mark.parametrize("chain", augmentation.CHAINS)
def test_augmentation_does_not_wait(chain: str):
    """As the main process does it, of so many samples that every step is drawn."""
    chosen = augmentation.chain(chain)
    drawn = [augmentation.draw(seed, chosen) for seed in range(60)]
    assert {name for changes in drawn for name in changes} == {step.name for step in chosen}
    count = len(drawn)
    images, labels = (
        [torch.rand(1, *PATCH).half()] * count,
        [torch.zeros(1, *PATCH, dtype=torch.uint8)] * count,
    )
    with a_gpu() as gpu:
        batch = loaders.augmented((images, labels, drawn, ["a"] * count), GPU, chosen)
        assert batch["image"].device == batch["label"].device == GPU
        assert batch["image"].shape == batch["label"].shape == (count, 1, *PATCH)
        assert waits(gpu, f"augmentation, {chain}") == []


class Cases(list):
    """What a validation goes through."""

    num_cases = 1


def a_case(*shape: int) -> Cases:
    image, label = torch.rand(1, 1, *shape), torch.zeros(1, 1, *shape, dtype=torch.uint8)
    return Cases([{"image": image, "label": label, "number": 0}])


@each_precision
@pytest.mark.parametrize("large", [False, True], ids=["whole", "in slabs"])
def test_validation_waits_for_the_case_and_for_what_is_found(name: str, large: bool, monkeypatch):
    """A case goes to the GPU, its size being known; in slabs, windows go there and their scores
    come back.
    """
    monkeypatch.setattr(validation, "MANY_SCORES", 0 if large else 2**29)
    cases, window = a_case(40, 48, 64), SlidingWindow(PATCH, 0.25, 4)
    with a_gpu() as gpu:
        network = a_network().to(GPU)
        gpu.forget()
        run = a_run(Precision(name, GPU), ALONE)
        run.stop_signal = StopSignal()
        scores = validation.Validation(cases, TASK.num_classes, window, run)(network)
        assert scores.dice.shape == (1, TASK.num_classes - 1)
        found = waits(gpu, f"validation {'in slabs' if large else 'whole'}, {name}")
        assert {wait.split(" at ")[0] for wait in found} <= {
            "a copy to the host",
            "a copy to the GPU",
            "a number",
        }
        windows = 2 * 2 * 3
        assert len(found) <= (4 * windows if large else 12)


def test_what_was_predicted_on_the_host_is_counted_on_the_gpu():
    labels = np.zeros((40, 48, 64), np.uint8)
    with a_gpu():
        overlaps = validation.Overlaps(1, TASK.num_classes, ALONE)
        overlaps.add(0, labels, labels)
        assert overlaps.counts.device == GPU


@pytest.mark.parametrize(
    ("free", "to_the_host"), [(2**40, 64 // 8), (0, 3)], ids=["on the GPU", "on the CPU"]
)
def test_segmenting_slab_by_slab(free: int, to_the_host: int):
    """Class scores come to the host as decided planes, eight at a time; or, where the GPU has no
    room, as windows.
    """
    image, window = np.random.rand(1, 40, 48, 64).astype(np.float32), SlidingWindow(PATCH, 0.25, 4)
    with a_gpu(free=free) as gpu:
        network = a_network().to(GPU)
        gpu.forget()
        parts = list(slabs.probabilities(image, network, window, Precision("bf16", GPU), axis=2))
        assert sum(part.shape[3] for _, part in parts) == 64
        found = waits(gpu, "segmenting in slabs, of 12 windows")
        assert sum("a copy to the host" in wait for wait in found) == to_the_host


@each_precision
def test_a_state_is_restored_on_the_gpu(name: str, tmp_path):
    """One that was saved on a CPU, as a checkpoint that was saved on another machine."""

    def of(device: torch.device) -> checkpoint.Checkpoint:
        network, processes = a_network().to(device), Processes(0, 1, device)
        precision = Precision("fp32" if device.type == "cpu" and name == "fp16" else name, device)
        training = a_training(network, precision, processes)
        parts = {
            "network": network,
            "optimizer": training.optimizer,
            "loss": losses.EpochLoss("loss", processes),
        }
        return checkpoint.Checkpoint(tmp_path, {"processes": 1}, parts, precision, processes)

    of(torch.device("cpu")).save()
    found = checkpoint.find_state(tmp_path, {"processes": 1})
    with a_gpu():
        parts = of(GPU).parts
        of(GPU).restore(found)
        assert all(weight.device == GPU for weight in parts["network"].parameters())
        for state in parts["optimizer"].state.values():
            assert state["momentum_buffer"].device == GPU


def test_the_precision_is_the_newest_and_says_what_fp32_is():
    with a_gpu():
        assert choose_precision("auto", ALONE).name == "bf16"
        assert choose_precision("fp32", ALONE).describe(ALONE) == (
            "1 x cuda in fp32, convolutions in TF32"
        )
