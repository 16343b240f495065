"""dints/network.py: MONAI's `DiNTS` over a `TopologyInstance` is the oracle."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from architectures import chain, connected, random_architecture
from monai.networks.nets.dints import DiNTS
from torch.utils.flop_counter import FlopCounterMode

from dints.architecture import Architecture, architecture_from_dict, load_architecture
from dints.errors import UserError
from dints.network import FoundNetwork, check_patch_size, count_parameters, load_model, load_weights, save_model
from dints.tasks import TASKS

TASK = TASKS["Task05_Prostate"]  # 2 channels, 3 classes
SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels

# As large as the published network (96x96x96 voxels, 1 channel, 2 classes): 152.36 M parameters, every stem used, and
# 334.4 GMAC. It is NOT the published architecture, which we do not have: a random connected one, with operations
# exchanged until both numbers fitted. A row per block, a character per path: its operation, or none.
STAND_IN = """
    .21.1141.1
    201.0.4..1
    14.11.001.
    344.041011
    13.4.2.031
    04042..21.
    312313321.
    0.41313011
    2423.2.41.
    1002.3241.
    1433...031
    4..0101.11
"""


def stand_in() -> Architecture:
    codes = np.array([list(row) for row in STAND_IN.split()])
    return connected((codes != ".").astype(int), np.where(codes == ".", "0", codes).astype(int))


def everything(num_blocks: int, num_depths: int) -> Architecture:
    shape = (num_blocks, 3 * num_depths - 2)
    return connected(np.ones(shape, dtype=int), np.arange(np.prod(shape)).reshape(shape) % 5)


def monai_network(architecture: Architecture, channels: int = 2, classes: int = 3, channel_mul: float = SMALL) -> DiNTS:
    return published.network(architecture, channels, classes, channel_mul)


def without_unused_stems(state: dict, architecture: Architecture) -> dict:
    """What is left of MONAI's keys when the stems at inactive inputs and below the deepest output go."""
    inputs, outputs = (np.flatnonzero(architecture.node_a[row]) for row in (0, -1))
    unused = [f"stem_down.{d}." for d in range(architecture.num_depths) if d not in inputs]
    unused += [f"stem_up.{d}." for d in range(architecture.num_depths) if d > max(outputs)]
    return {key: value for key, value in state.items() if not key.startswith(tuple(unused))}


ARCHITECTURES = {
    "all paths, 2 depths": everything(3, 2),
    "all paths, 4 depths": everything(2, 4),
    "finest nodes only": chain(0, 0, 0, num_depths=3),
    "deepest nodes only": chain(3, 3, num_depths=4, operation=2),
    "down and up": chain(0, 1, 2, 1, 0, num_depths=3, operation=4),
    "up": chain(2, 1, 0, num_depths=4, operation=0),
    "all inputs, finest output": connected(np.array([[1, 1, 0, 0]]), np.full((1, 4), 3)),
    **{f"random {seed}": random_architecture(seed, 3, 3) for seed in range(3)},
    "random, 4 depths": random_architecture(7, 4, 4),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_it_is_monais_network(architecture, dtype, tolerance):
    torch.manual_seed(0)
    theirs, ours = monai_network(architecture), FoundNetwork(architecture, 2, 3, SMALL)
    load_weights(ours, theirs.state_dict(), "MONAI's")
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    assert list(ours.state_dict()) == list(without_unused_stems(theirs.state_dict(), architecture))

    size = 2 ** (architecture.num_depths + 1)
    image = torch.randn(2, 2, size, size, size, dtype=dtype, requires_grad=True)
    mix = torch.randn(2, 3, size, size, size, dtype=dtype)
    results = []
    for network in (theirs, ours):
        scores = network(image)
        (image_gradient,) = torch.autograd.grad((scores * mix).mean(), image, retain_graph=True)
        (scores * mix).mean().backward()
        results.append((scores, image_gradient, {name: p.grad for name, p in network.named_parameters()}))
    (scores, image_gradient, gradients), (found_scores, found_image_gradient, found_gradients) = results

    def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
        atol = tolerance * expected.detach().abs().max().item()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol)

    assert_close(found_scores, scores)
    assert_close(found_image_gradient, image_gradient)
    for name, gradient in found_gradients.items():
        assert gradient is not None and gradient.abs().max() > 0, f"{name} does not train"
        assert_close(gradient, gradients[name])
    for name in gradients.keys() - found_gradients.keys():  # what we leave out never trains in MONAI's network
        assert gradients[name] is None or not gradients[name].any(), name


def test_the_architectures_above_cover_what_can_be():
    used = {int(op) for a in ARCHITECTURES.values() for op in a.arch_code_c[a.arch_code_a == 1]}
    assert used == set(range(5))
    stems = {(bool(a.node_a[0].all()), bool(a.node_a[-1, -1])) for a in ARCHITECTURES.values()}
    assert stems == {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.parametrize("name", ["random, 4 depths", "down and up"])
def test_it_compiles_as_one_graph(name):
    """Forward and backward; Dynamo alone, without a compiler, as `fullgraph` forbids breaks all the same."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    network = FoundNetwork(architecture, 2, 3, SMALL)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend=count)
    image = torch.randn(1, 2, 32, 32, 32)
    torch.testing.assert_close(compiled(image), network(image), rtol=1e-4, atol=1e-5)
    compiled(image).sum().backward()
    assert len(graphs) == 1
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_it_exports():
    network = FoundNetwork(ARCHITECTURES["random, 4 depths"], 2, 3, SMALL).eval()
    image = torch.randn(1, 2, 32, 32, 32)
    exported = torch.export.export(network, (image,))
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)  # runs on any machine
    torch.testing.assert_close(exported.module()(image), network(image), rtol=1e-4, atol=1e-5)


def test_it_prints_nothing(capsys):
    FoundNetwork(everything(1, 2), 1, 2, SMALL)
    assert capsys.readouterr() == ("", "")


def on_meta(architecture: Architecture, *settings) -> FoundNetwork:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return FoundNetwork(architecture, *settings)


def test_published_size_from_a_numpy_file(tmp_path):
    for seed in range(3):
        architecture = random_architecture(seed, 12, 4)
        torch.save(
            {
                "node_a": architecture.node_a,
                "code_a": architecture.arch_code_a.astype(float),
                "code_c": architecture.arch_code_c,
            },
            tmp_path / "published.pth",
        )
        network = on_meta(load_architecture(tmp_path / "published.pth", 12, 4), 1, 2, 1.0)
        with torch.device("meta"):
            expected = without_unused_stems(monai_network(architecture, 1, 2, 1.0).state_dict(), architecture)
        assert count_parameters(network) == sum(value.numel() for value in expected.values())


def test_parameters_of_a_stand_in_for_the_published_architecture():
    """152.36 M parameters and 334.4 GMAC, as published; of a stand-in of the same size, see ``STAND_IN``.

    As it uses every stem, MONAI's network of it has the same number of parameters.
    """
    network = on_meta(stand_in(), 1, 2)
    assert f"{count_parameters(network) / 1e6:.2f}" == "152.36"
    with torch.device("meta"):
        assert count_parameters(monai_network(stand_in(), 1, 2, 1.0)) == count_parameters(network)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, 96, 96, 96, device="meta"))
    assert f"{counter.get_total_flops() / 2 / 1e9:.1f}" == "334.4"  # multiply-adds of the convolutions


def test_parameters_of_the_published_architecture():
    """Of the real file, where there is one: it is in no package registry."""
    file = os.environ.get("DINTS_CVPR_ARCH")
    if not file:
        pytest.skip("DINTS_CVPR_ARCH does not name the published architecture file (12 blocks, 4 depths)")
    architecture = load_architecture(file, num_blocks=12, num_depths=4)
    with torch.device("meta"):  # MONAI's network, with every stem
        assert f"{count_parameters(monai_network(architecture, 1, 2, 1.0)) / 1e6:.2f}" == "152.36"
    assert count_parameters(on_meta(architecture, 1, 2)) <= 152_365_000


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True], ids=["state dict", "model file"])
def test_load_weights(prefix, wrapped):
    architecture = ARCHITECTURES["up"]
    state = {prefix + key: value for key, value in monai_network(architecture).state_dict().items()}
    network = FoundNetwork(architecture, 2, 3, SMALL)
    load_weights(network, {"state_dict": state, "task": {}} if wrapped else state, "weights.pth")
    assert all(torch.equal(value, state[prefix + key]) for key, value in network.state_dict().items())


def state_of(architecture: Architecture, *settings) -> dict:
    return monai_network(architecture, *settings).state_dict()


UP = ARCHITECTURES["up"]


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda fit: state_of(chain(2, 2, 1, num_depths=4)), "lacks 6 tensors that the network has, for example dints"),
        (lambda fit: state_of(everything(2, 4)), "has [0-9]+ tensors that the network lacks, for example dints_space"),
        (lambda fit: state_of(UP, 2, 4), r"has 2 tensors of another shape, .*stem_finals.1.weight \(4, 2, .* not \(3"),
        (lambda fit: state_of(UP, 3), r"has 1 tensors of another shape, .*stem_down.2.* \(8, 3, .* not \(8, 2"),
        (lambda fit: state_of(UP, 2, 3, 1 / 8), "has [0-9]+ tensors of another shape"),
        (
            lambda fit: {k: fit[k] for k in fit if k != "stem_finals.1.bias"},
            "lacks 1 tensors .*stem_finals.1.bias",
        ),
        *(
            (lambda fit, key=key: {**fit, key: torch.ones(2)}, f"has 1 tensors that the network lacks, .*example {key}")
            for key in ("head.bias", "stem_down.2.mod.9.bias", "stem_down.4.mod.1.weight")
        ),
        *(
            (lambda fit, content=content: content, "does not hold network weights")
            for content in (None, [1], {}, torch.ones(2), {"state_dict": 5}, {"state_dict": {}}, {"state_dict": [1]})
        ),
        *(
            (lambda fit, value=value: {**fit, "stem_finals.1.bias": value}, fault)
            for value, fault in (
                (torch.zeros(3, dtype=torch.int64), "does not hold network weights"),
                (torch.zeros(3, dtype=torch.complex64), "does not hold network weights"),
                (torch.zeros(3, device="meta"), "does not hold network weights"),
                (torch.zeros(3).to_sparse(), "does not hold network weights"),
                (torch.zeros(3).to(torch.float8_e4m3fn), "does not hold network weights"),
                (
                    torch.tensor([0, math.nan, 0]),
                    "are NaN or infinite in 1 tensors, for example stem_finals.1.bias: give",
                ),
                (torch.tensor([0, 0, -math.inf]), "are NaN or infinite in 1 tensors"),
            )
        ),
        (lambda fit: {**fit, "epoch": 5}, "does not hold network weights"),
        (lambda fit: {**fit, 5: torch.ones(2)}, "does not hold network weights"),
        (lambda fit: {"parts": {"network": fit}}, "does not hold network weights"),
    ],
)
def test_weights_that_do_not_fit(make, fault):
    content = make(state_of(UP))
    network = FoundNetwork(ARCHITECTURES["up"], 2, 3, SMALL)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=f"weights.pth .*{fault}"):
        load_weights(network, content, "weights.pth")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_model_file(tmp_path):
    # As loaded from a published file, whose best_dsc is a NumPy scalar.
    content = {**ARCHITECTURES["random 1"].to_dict(), "best_dsc": np.float64(0.5), "task": "Task07_Pancreas"}
    architecture = architecture_from_dict(content, "published.pth")
    network = FoundNetwork(architecture, 2, 3, SMALL)
    save_model(tmp_path / "model.pth", network, architecture, SMALL, TASK, dice=0.75)

    loaded, loaded_architecture, task, content = load_model(tmp_path / "model.pth")
    assert task == TASK and content["dice"] == 0.75 and loaded_architecture.info == architecture.info
    assert loaded_architecture.same_network(architecture)
    image = torch.randn(1, 2, 16, 16, 16)
    assert torch.equal(loaded(image), network(image))
    plain = torch.load(tmp_path / "model.pth", weights_only=True)
    assert not any(key.startswith("module.") for key in plain["state_dict"])


def model_content(tmp_path: Path) -> dict:
    architecture = ARCHITECTURES["up"]
    save_model(tmp_path / "m.pth", FoundNetwork(architecture, 2, 3, SMALL), architecture, SMALL, TASK)
    return torch.load(tmp_path / "m.pth", weights_only=True)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        *((lambda c, key=key: c.pop(key), "is not a model file") for key in ("state_dict", "architecture", "task")),
        (lambda c: c["architecture"].pop("arch_code_c"), "has no 'arch_code_c'"),
        (lambda c: c.update(architecture=None), "holds a NoneType where a dictionary"),
        (lambda c: c["architecture"]["arch_code_a"].zero_(), "block 0 has no active path"),
        (lambda c: c["state_dict"].pop("stem_finals.1.bias"), "lacks 1 tensors"),
        (lambda c: c.update(state_dict=3), "does not hold network weights"),
        (lambda c: c["task"].pop("class_names"), "is damaged: its task and channel_mul 0.0625 .*class_names"),
        (lambda c: c["task"].update(colour="red"), "is damaged: .*colour"),
        *(
            (lambda c, key=key, value=value: c["task"].update({key: value}), rf"is damaged: .*\({key} .*; give another")
            for key, value in (
                *(("name", value) for value in (None, 5)),
                *(("modality", value) for value in ("US", None)),
                *(("num_channels", value) for value in ("two", -1, 0, 1.5, True)),
                *(("class_names", value) for value in (None, [], ["background"], ["a", 5], "abc", ["a"] * 256)),
                *(("spacing", value) for value in (1, [1.0, 1.0], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], "111")),
                *(("spacing", value) for value in ([1.0, math.nan, 1.0], [1.0, math.inf, 1.0], [1.0, "1", 1.0])),
                *(("intensity", value) for value in (0, [1.0], [1.0, 1.0], [2.0, 1.0], [0.0, math.inf], [None, 1.0])),
                *(("patch_size", value) for value in (None, 96, [32, 32], [32.0, 32.0, 32.0], ["a", "b", "c"])),
                ("channel_files", "no"),
            )
        ),
        (
            lambda c: c["task"].update(patch_size=[30, 32, 32]),
            "is damaged: .*patch_size 30 32 32 does not fit 4 depths",
        ),
        (lambda c: c["task"].update(patch_size=[-32, 0, 32]), "is damaged: .*patch_size -32 0 32 does not fit 4"),
        (lambda c: c.update(task=[]), "is damaged: .*list"),
        (lambda c: c.update(task=None), "is damaged: .*NoneType"),
        *(
            (lambda c, value=value: c.update(channel_mul=value), rf"is damaged: its .*{re.escape(repr(value))}")
            for value in ("x", None, [1], 0.0, -1.0, math.nan, math.inf, 1e300)
        ),
        # Before memory for such a network is asked for
        *(
            (lambda c, value=value: c.update(channel_mul=value), "has [0-9]+ tensors of another shape")
            for value in (1.0, 100.0)
        ),
    ],
)
def test_damaged_model_content(tmp_path, change, fault):
    content = model_content(tmp_path)
    change(content)
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(UserError, match=f"{tmp_path}/model.pth.*{fault}") as caught:
        load_model(tmp_path / "model.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_model_file(tmp_path, keep):
    torch.save(model_content(tmp_path), tmp_path / "model.pth")
    whole = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="model.pth is damaged or not a PyTorch file"):
        load_model(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("num_depths", "patch_size"),
    [
        (3, (16, 16, 16)),
        (3, (8, 8, 16)),
        (3, (48, 8, 24)),
        (4, (32, 32, 32)),
        (4, (16, 32, 16)),
        (4, (96, 96, 96)),
        (4, (80, 48, 16)),
    ],
)
def test_patch_sizes_that_fit(num_depths, patch_size):
    check_patch_size(patch_size, num_depths)
    scores = on_meta(everything(2, num_depths), 1, 2, SMALL)(torch.zeros(1, 1, *patch_size, device="meta"))
    assert scores.shape == (1, 2, *patch_size)


@pytest.mark.parametrize(
    ("num_depths", "patch_size", "suggestion"),
    [
        (3, (8, 8, 8), (16, 16, 16)),
        (3, (30, 32, 32), (32, 32, 32)),
        (3, (4, 4, 20), (8, 8, 16)),
        (3, (32, 32, 0), (32, 32, 8)),
        (4, (16, 16, 16), (32, 32, 32)),
        (4, (24, 32, 32), (32, 32, 32)),
        (4, (96, 96, 90), (96, 96, 96)),
        (4, (9, 1, 20), (32, 32, 32)),
        (4, (-32, 32, 32), (16, 32, 32)),
        (5, (96, 96, 48), (96, 96, 64)),
    ],
)
def test_patch_sizes_that_do_not_fit(num_depths, patch_size, suggestion):
    with pytest.raises(UserError) as caught:
        check_patch_size(patch_size, num_depths, "--window")
    size, suggested = (" ".join(map(str, values)) for values in (patch_size, suggestion))
    assert str(caught.value).startswith(f"--window {size} does not fit {num_depths} depths")
    assert str(caught.value).endswith(f"for example {suggested}")
    check_patch_size(suggestion, num_depths)
    with pytest.raises((RuntimeError, ValueError)):  # the check refuses nothing that the network could do
        on_meta(everything(2, num_depths), 1, 2, SMALL)(torch.zeros(1, 1, *patch_size, device="meta"))
