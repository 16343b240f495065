"""Steps whose passes are recorded and replayed are the plain ones, to the last bit.

There is no GPU here: a recording is a list of tensor operations, and a replay does them again on
the same tensors, as CUDA does with kernels. All else is ours and PyTorch's own.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from architectures import random_architecture
from commands import search, train, words
from small_run import ALONE, CPU, begun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import search_dints
from dints.data.tasks import Task
from dints.errors import UserError
from dints.network.architecture import save_architecture
from dints.network.discrete import DiscreteNetwork
from dints.network.space import SearchSpace
from dints.network.strides import isotropic
from dints.running.precision import Precision
from dints.running.processes import Processes
from dints.settings import RetrainingSettings, TrainingMachineSettings
from dints.training import cuda_graphs
from dints.training.steps import WeightsTrainer

TASK = Task("Toy", "CT", 1, ("background", "a", "b"), patch_size=(16, 16, 16))
SPACE = (
    "--root . --output_root . --channel_mul 0.125 --num_blocks 2 --num_depths 3 --patch_size "
    "16 16 16"
)
SPACE += " --num_images_per_batch 2"
STEPS = 3


class Graph:
    """What `torch.cuda.CUDAGraph` is on a GPU."""

    def __init__(self):
        self.calls = []

    def replay(self) -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for function, args, kwargs, results in self.calls:
                for old, new in zip(
                    tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True
                ):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, results))
        return results


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Record and replay on the CPU; return the graphs that are made."""
    made = []

    @contextmanager
    def recording(graph: Graph, pool: object = None):
        made.append(graph)
        with Recording(graph):
            yield

    cuda_graphs._pool.cache_clear()
    for name, stand_in in (
        ("CUDAGraph", Graph),
        ("graph", recording),
        ("graph_pool_handle", lambda: (0, 1)),
        ("Stream", lambda: None),
        ("stream", lambda _: nullcontext()),
        ("synchronize", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    # Whose tensors of its own cannot be written into
    with torch.backends.mkldnn.flags(enabled=False):
        yield made
    cuda_graphs._pool.cache_clear()


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(STEPS, 2, 1, *TASK.patch_size, generator=generator)
    return [{"image": image, "label": (3 * image).to(torch.uint8).clamp(max=2)} for image in images]


def assert_equal(states: list[dict[str, torch.Tensor]]) -> None:
    plain, replayed = states
    assert plain.keys() == replayed.keys()
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


@pytest.fixture(params=["alone", "distributed"])
def processes(request, tmp_path):
    """Return the one process, whose network is under DDP or is not."""
    if request.param == "alone":
        yield ALONE
        return
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield Distributed(0, 1, CPU)
    torch.distributed.destroy_process_group()


class Distributed(Processes):
    def distributed(self, network):
        return torch.nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)


@pytest.mark.parametrize(("name", "checkpoint_activations"), [("fp32", False), ("bf16", True)])
def test_a_retraining_is_the_same(name, checkpoint_activations, processes, graphs, monkeypatch):
    """So are the average of its weights and, afterwards, both networks as a validation uses
    them.
    """
    image, states = batches()[0]["image"], []
    settings = RetrainingSettings(
        learning_rate=0.1,
        max_gradient_norm=1.0,
        learning_rate_schedule="halvings",
        average_decay=0.9,
    )
    for replayed in (False, True):
        torch.manual_seed(0)
        network = DiscreteNetwork(random_architecture(0, 4, 3), 1, 3, 0.125)
        network.checkpoint_activations = checkpoint_activations
        machine = TrainingMachineSettings(precision=name, compile="off", cuda_graphs=replayed)
        run = begun(processes=processes, machine=machine)
        weights = WeightsTrainer(network, network.parameters(), settings, run, image.shape)
        with monkeypatch.context() as patch:
            if replayed:
                fail = lambda *_: pytest.fail("computed, and not replayed")  # noqa: E731
                patch.setattr(DiscreteNetwork, "forward", fail)
            losses = torch.stack([weights.step(batch) for batch in batches()])
        with torch.no_grad():
            scores = {"scores": network.eval()(image), "mean": weights.averaged.eval()(image)}
        states.append({**network.state_dict(), **scores, "losses": losses})
    assert len(graphs) == 2 and len(set(losses.tolist())) == STEPS
    assert not torch.equal(scores["scores"], scores["mean"])
    assert_equal(states)


@pytest.mark.parametrize(("name", "more"), [("fp32", ""), ("bf16", "--checkpoint_activations")])
def test_both_steps_of_a_search_are_the_same(name, more, graphs, monkeypatch):
    """Each trains parameters that the other leaves alone, so that each has graphs of its own."""
    states = []
    for flags in ("", "--cuda_graphs"):
        given = words(SPACE, more, flags, "--precision", name)
        settings = search_dints.parse_args(given)
        run = begun(machine=settings.machine)
        supernet = search_dints.build_supernet(
            settings, TASK, isotropic(settings.space.num_depths), run
        )
        weights, arch = search_dints.trainers(supernet, settings, TASK, run)
        losses = []
        with monkeypatch.context() as patch:
            if flags:
                fail = lambda *_: pytest.fail("computed, and not replayed")  # noqa: E731
                patch.setattr(SearchSpace, "forward", fail)
            for batch in batches():
                losses += [weights.step(batch), arch.step(batch, 0.5)]
        with torch.no_grad():
            scores = supernet.eval()(batches()[0]["image"])
        states.append({**supernet.state_dict(), "losses": torch.stack(losses), "scores": scores})
    assert len(graphs) == 4 and all(graph.calls for graph in graphs)
    assert_equal(states)


def test_an_image_of_another_size_is_an_error():
    computing = cuda_graphs.recorded(
        DiscreteNetwork(random_architecture(0, 4, 3), 1, 3, 0.125),
        (1, 1, 16, 16, 16),
        Precision("fp32", CPU),
    )
    assert computing(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)
    with pytest.raises(RuntimeError, match="size"):
        computing(torch.zeros(1, 1, 32, 32, 32))


@pytest.mark.parametrize("stage", ["search", "train"])
def test_without_a_gpu_they_are_refused_before_a_case_is_read(
    stage, phantom, tmp_path, monkeypatch
):
    monkeypatch.setattr("dints.data.cache.Cache.hold", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match="--cuda_graphs needs a GPU: leave it out"):
        if stage == "search":
            search(phantom, tmp_path / "run", "--cuda_graphs")
        else:
            save_architecture(tmp_path / "arch.pth", random_architecture(0, 2, 3))
            train(phantom, tmp_path / "run", tmp_path / "arch.pth", "--cuda_graphs")


def test_one_of_compiling_and_recording_is_given(capsys):
    with pytest.raises(SystemExit):
        search_dints.parse_args(words(SPACE, "--cuda_graphs --compile on"))
    assert "--cuda_graphs and --compile on: give one of them" in capsys.readouterr().err
