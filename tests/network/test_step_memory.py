"""Patches and networks that a machine cannot hold are refused before a case is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import chain
from commands import SPACE, evolve, search, train
from small_run import begun

from dints.data.tasks import Task
from dints.errors import UserError
from dints.network import space
from dints.network.architecture import save_architecture
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


@pytest.fixture
def memory(monkeypatch):
    """Return a function that sets what is free of the machine's memory, in bytes."""
    monkeypatch.setattr(machine, "free_swap", lambda: 0)
    return lambda count: monkeypatch.setattr(machine, "available_memory", lambda: count)


def check(workers: int = 3, num_loaders: int = 1, memory_mib: float | None = None, **settings):
    """Check as a script does whose settings have these values."""
    of_script = SimpleNamespace(
        patches=PatchSettings(num_images_per_batch=2),
        run=RunSettings(output_root=Path("nowhere"), num_workers=workers),
        machine=TrainingMachineSettings(**{"device": "cpu", "precision": "fp32", **settings}),
    )
    more = {"num_loaders": num_loaders, "memory_mib": memory_mib}
    check_memory(TASK, ARCHITECTURE, 0.5, of_script, **more)


def assert_needs(memory, needed: int, message: str, **settings) -> None:
    """Check that so many bytes are enough, and that one less is refused."""
    memory(needed)
    check(**settings)
    memory(needed - 1)
    with pytest.raises(UserError, match=message.replace("BYTES", f"at least {needed:,} bytes")):
        check(**settings)


@MEMORY
@pytest.mark.parametrize(("workers", "loaders", "ahead"), [(3, 1, 6), (3, 2, 12), (0, 1, 1)])
def test_patches_ahead_are_counted_for_all_processes_of_a_node(
    memory, monkeypatch, workers, loaders, ahead
):
    """All that a loader's workers have ready while the network validates; without them a batch."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    # a GPU holds the activations, and its patches wait in float16
    needed = 4 * ahead * 2 * VOXELS * (2 * 2 + 1)
    message = r"--patch_size 32 32 16 and --num_images_per_batch 2: .* BYTES .*: lower "
    settings = {"workers": workers, "num_loaders": loaders, "device": "cuda"}
    assert_needs(memory, needed, message, **settings)
    monkeypatch.setattr(machine, "free_swap", lambda: 1)
    check(**settings)


@MEMORY
@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.9), ("auto", 0.45)])
def test_a_steps_activations_count_on_a_cpu(memory, precision, share):
    """Of blocks that are computed again the average one's: no step keeps less."""
    shape = (2, 2, 32, 32, 16)
    with torch.device("meta"):
        network = DiscreteNetwork(ARCHITECTURE, 2, 3, 0.5)
    whole = activation_bytes(network, shape)
    network.checkpoint_activations = True
    stems = activation_bytes(network, shape)
    for recomputes, kept, remedy in (
        (False, whole, "give --checkpoint_activations, or use a GPU"),
        (True, stems + (whole - stems) / 2, "num_workers, or use a GPU"),
    ):
        settings = {"precision": precision, "checkpoint_activations": recomputes}
        message = f"a training step on the CPU takes BYTES .*{remedy}"
        assert_needs(memory, 12 * PATCH + int(share * kept), message, **settings)


@MEMORY
def test_what_candidates_fill_counts_on_a_cpu(memory, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    needed = 2 * (2 * PATCH + int(0.9 * 100 * 2**20))
    message = "--memory_mib 100: .* BYTES .*smaller one, or use a GPU"
    assert_needs(memory, needed, message, workers=0, memory_mib=100.0)


def test_a_real_training_step_holds_what_is_counted_of_each_parameter():
    """Of activations tests/network/test_cost.py says it."""
    network = DiscreteNetwork(ARCHITECTURE, 2, 3, 0.25)
    settings = RetrainingSettings(
        learning_rate=0.01, learning_rate_schedule="polynomial", average_decay=0.99
    )
    shape = (2, 2, 16, 16, 16)
    weights = WeightsTrainer(network, network.parameters(), settings, begun(), shape)
    label = torch.zeros(2, 1, *shape[2:], dtype=torch.uint8)
    weights.step({"image": torch.rand(shape), "label": label})
    parameters = [*network.parameters()]
    held = [*parameters, *(each.grad for each in parameters), *weights.averaged.parameters()]
    held += [weights.optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
    counted = cost(ARCHITECTURE, 2, 3, shape[2:], 0.25)
    of_weights = counted.step_mib - counted.activation_mib
    assert sum(tensor.nbytes for tensor in held) / 2**20 == pytest.approx(of_weights, rel=1e-12)


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
    huge, message = "--patch_size 4096 4096 4096", "4096 and --num_images_per_batch .* at least .*,"
    for check_only in ("", "--check"):
        with pytest.raises(UserError, match=f"{message}767,360 bytes"):
            train(phantom, tmp_path / "train", tmp_path / "arch.pth", huge, check_only)
    with pytest.raises(UserError, match=f"{message}767,360 bytes"):
        search(phantom, tmp_path / "search", huge)
    with pytest.raises(UserError, match="candidates fill --memory_mib 1e.07: a training step on"):
        evolve(phantom, tmp_path / "evolve", SPACE, "--memory_mib 1e7")
