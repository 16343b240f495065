"""Patches and networks that a machine cannot hold are refused before a case is read; no others
are.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import chain, random_architecture
from commands import SPACE, evolve, search, train
from small_run import begun

from dints.data.tasks import Task
from dints.errors import UserError
from dints.network import space
from dints.network.architecture import Architecture, save_architecture
from dints.network.cost import activation_bytes, cost
from dints.network.discrete import DiscreteNetwork
from dints.network.step_memory import check_memory, within_supernet
from dints.running import machine
from dints.settings import PatchSettings, RetrainingSettings, RunSettings, TrainingMachineSettings
from dints.training.steps import WeightsTrainer

MEMORY = pytest.mark.fault("GPU or host memory exhausted")
TASK = Task("Toy", "MRI", 2, ("background", "a", "b"), patch_size=(32, 32, 16))
VOXELS = 32 * 32 * 16
PATCH = VOXELS * (2 * 4 + 1)  # two channels in float32, a label in uint8
ARCHITECTURE = chain(0, 1, 0, num_depths=3)
OF_PATCHES = {"batch_size": 2, "num_workers": 3, "device": "cpu"}


def check(
    task: Task,
    architecture: Architecture | None,
    channel_mul: float,
    *,
    batch_size: int,
    num_workers: int,
    num_loaders: int = 1,
    memory_mib: float | None = None,
    **machine_settings: object,
) -> None:
    """Check as a script does whose settings have these values."""
    settings = SimpleNamespace(
        patches=PatchSettings(num_images_per_batch=batch_size),
        run=RunSettings(output_root=Path("nowhere"), num_workers=num_workers),
        machine=TrainingMachineSettings(**machine_settings),
    )
    more = {"num_loaders": num_loaders, "memory_mib": memory_mib}
    check_memory(task, architecture, channel_mul, settings, **more)


@pytest.fixture
def memory(monkeypatch):
    """Return a function that sets what is free of the machine's memory, in bytes."""
    monkeypatch.setattr(machine, "free_swap", lambda: 0)
    return lambda count: monkeypatch.setattr(machine, "available_memory", lambda: count)


@MEMORY
@pytest.mark.parametrize(
    ("changes", "loaders", "needed"),
    [
        ({}, 1, 6 * 2 * PATCH),
        ({"batch_size": 5}, 2, 2 * 6 * 5 * PATCH),
        ({"num_workers": 0}, 1, 2 * PATCH),
    ],
)
def test_patches_ahead_are_counted(memory, changes, loaders, needed):
    """All that a loader's workers have ready while the network validates; without workers one
    batch.
    """
    settings = {**OF_PATCHES, **changes, "num_loaders": loaders}
    memory(needed)
    check(TASK, None, 1.0, **settings)
    memory(needed - 1)
    told = (
        rf"--patch_size 32 32 16 and --num_images_per_batch \d: .* at least {needed:,} bytes "
        r"\(.* GiB\).*: lower "
    )
    with pytest.raises(UserError, match=told):
        check(TASK, None, 1.0, **settings)


@MEMORY
def test_processes_of_a_node_share_its_memory_and_swap_counts(memory, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    memory(4 * 12 * PATCH - 1)
    with pytest.raises(UserError, match=f"{4 * 12 * PATCH:,} bytes"):
        check(TASK, None, 1.0, **OF_PATCHES)
    monkeypatch.setattr(machine, "free_swap", lambda: 1)
    check(TASK, None, 1.0, **OF_PATCHES)


@MEMORY
@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.9), ("auto", 0.45)])
def test_a_steps_activations_count_on_a_cpu(memory, precision, share):
    with torch.device("meta"):
        network = DiscreteNetwork(ARCHITECTURE, 2, 3, 0.5)
    needed = 12 * PATCH + int(share * activation_bytes(network, (2, 2, 32, 32, 16)))
    memory(needed)
    check(TASK, ARCHITECTURE, 0.5, **OF_PATCHES, precision=precision)
    memory(needed - 1)
    with pytest.raises(
        UserError, match=f"a training step on the CPU takes at least {needed:,} bytes"
    ):
        check(TASK, ARCHITECTURE, 0.5, **OF_PATCHES, precision=precision)


@MEMORY
def test_what_candidates_fill_counts_on_a_cpu(memory, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    settings = {**OF_PATCHES, "num_workers": 0, "precision": "fp32", "memory_mib": 100.0}
    needed = 2 * (2 * PATCH + int(0.9 * 100 * 2**20))
    memory(needed)
    check(TASK, None, 1.0, **settings)
    memory(needed - 1)
    with pytest.raises(
        UserError,
        match=f"--memory_mib 100: .* at least {needed:,} bytes .*smaller one, or use a GPU",
    ):
        check(TASK, None, 1.0, **settings)
    check(TASK, None, 1.0, **{**settings, "device": "cuda"})


@MEMORY
def test_of_blocks_that_are_computed_again_the_average_one_counts(memory):
    """No step keeps less: the largest block's activations, and the stems'."""
    shape = (2, 2, 32, 32, 16)
    with torch.device("meta"):
        network = DiscreteNetwork(ARCHITECTURE, 2, 3, 0.5)
    whole = activation_bytes(network, shape)
    network.checkpoint_activations = True
    stems = activation_bytes(network, shape)
    needed = 12 * PATCH + int(0.9 * (stems + (whole - stems) / 2))
    settings = {**OF_PATCHES, "precision": "fp32"}
    memory(needed)
    check(TASK, ARCHITECTURE, 0.5, **settings, checkpoint_activations=True)
    with pytest.raises(UserError, match="give --checkpoint_activations, or use a GPU"):
        check(TASK, ARCHITECTURE, 0.5, **settings)
    memory(needed - 1)
    with pytest.raises(UserError, match=f"at least {needed:,} bytes .*num_workers, or use a GPU"):
        check(TASK, ARCHITECTURE, 0.5, **settings, checkpoint_activations=True)


@pytest.mark.parametrize(
    "architecture", [ARCHITECTURE, random_architecture(4, 3, 3)], ids=["chain", "random"]
)
def test_a_real_training_step_keeps_what_is_counted(architecture):
    """Activations but for a twentieth, as CPU layers are, the loss beside; of each parameter 16
    bytes exactly.
    """
    shape, num_classes, kept = (2, 2, 32, 32, 16), 3, {}
    network = DiscreteNetwork(architecture, 2, num_classes, 0.25)
    settings = RetrainingSettings(
        learning_rate=0.01, learning_rate_schedule="polynomial", average_decay=0.99
    )
    weights = WeightsTrainer(network, network.parameters(), settings, begun(), shape)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    batch = {"image": torch.rand(shape), "label": torch.zeros(2, 1, *shape[2:], dtype=torch.uint8)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        weights.step(batch)
    parameters = [*network.parameters()]
    saved = sum(
        s.nbytes()
        for address, s in kept.items()
        if address not in {p.data_ptr() for p in parameters}
    )
    counted = cost(architecture, 2, num_classes, shape[2:], 0.25, batch_size=2)
    activations = counted.activation_mib * 2**20
    assert 0.95 * activations < saved < 1.05 * activations + 16 * num_classes * 2 * VOXELS
    held = [
        *parameters,
        *(parameter.grad for parameter in parameters),
        *weights.averaged.parameters(),
    ]
    held += [weights.optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
    assert sum(tensor.nbytes for tensor in held) == counted.step_mib * 2**20 - activations


def test_what_a_supernet_keeps_is_counted_low():
    sizes = 2, 3, ("skip_connect", "conv_3x3x3")
    whole = space.supernet_of(space.SearchSpace(0.25, *sizes), 1, 2).to("meta")
    with torch.device("meta"):
        part = DiscreteNetwork(within_supernet(*sizes, True), 1, 2, 0.25)
    shape = (1, 1, 16, 16, 16)
    assert 0.2 < activation_bytes(part, shape) / activation_bytes(whole, shape) < 1


@MEMORY
def test_the_scripts_refuse_a_patch_before_a_case_is_read(phantom, tmp_path, monkeypatch):
    """As --check does; and also where only candidates are trained."""
    monkeypatch.setattr("dints.data.cache.Cache.hold", lambda *_: pytest.fail("read"))
    save_architecture(tmp_path / "arch.pth", chain(0, 0, num_depths=3))
    huge = "--patch_size 4096 4096 4096"
    told = (
        "--patch_size 4096 4096 4096 and --num_images_per_batch 2: .* at least 687,194,767,360 "
        "bytes"
    )
    for check_only in ("", "--check"):
        with pytest.raises(UserError, match=told):
            train(phantom, tmp_path / "train", tmp_path / "arch.pth", huge, check_only)
    with pytest.raises(
        UserError, match="--num_images_per_batch 1: .* at least 687,194,767,360 bytes"
    ):
        search(phantom, tmp_path / "search", huge)
    with pytest.raises(
        UserError, match="--num_images_per_batch 3: .* at least 1,030,792,151,040 bytes"
    ):
        batch = "--num_images_per_batch 3 --memory_mib 4"
        evolve(phantom, tmp_path / "evolve", SPACE, huge, batch)
    for check_only in ("", "--check"):
        told = "candidates fill --memory_mib 1e.07: a training step on the CPU takes at least"
        with pytest.raises(UserError, match=told):
            evolve(phantom, tmp_path / "evolve", SPACE, "--memory_mib 1e7", check_only)
    assert np.prod((4096, 4096, 4096)) * 2 * 5 == 687194767360
