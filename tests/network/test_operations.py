"""The table of operations: MONAI's five, and what one more entry needs, which is nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import everything
from monai.networks.nets.dints import Cell

from dints.data.tasks import TASKS
from dints.errors import UserError
from dints.network import mixing
from dints.network.architecture import load_architecture, save_architecture
from dints.network.cells import cell_of
from dints.network.cost import cost
from dints.network.drawing import draw_architecture
from dints.network.found import FoundNetwork
from dints.network.model_file import load_model, save_model
from dints.network.operations import OPERATIONS, PUBLISHED, ActivatedConvolutions, Operation
from dints.network.space import SearchSpace, supernet

SMALL = 0.125  # times 32, 64, ... channels
DILATED = Operation(
    "dilated",
    "#D9D2F0",
    "3x3x3 convolution, dilation 2",
    3,
    lambda channels: ActivatedConvolutions(channels, [(3, 3, 3)], dilation=2),
)
DEPTHWISE = Operation(
    "5x5x5 dw",
    "#F0E2D2",
    "5x5x5 depthwise convolution",
    3,
    lambda channels: ActivatedConvolutions(channels, [(5, 5, 5)], groups=channels),
)
SEVEN = (*PUBLISHED, "dilated", "depthwise")


@pytest.fixture
def seven(monkeypatch) -> tuple[str, ...]:
    """Add two operations, an entry each, and return all names."""
    monkeypatch.setitem(OPERATIONS, "dilated", DILATED)
    monkeypatch.setitem(OPERATIONS, "depthwise", DEPTHWISE)
    return SEVEN


def space_of(names: tuple[str, ...]) -> SearchSpace:
    """Make a small space whose paths and operations have distinct probabilities."""
    torch.manual_seed(0)
    space = SearchSpace(SMALL, num_blocks=2, num_depths=3, operations=names)
    with torch.no_grad():
        space.log_alpha_a.normal_()
        space.log_alpha_c.normal_()
    return space


@pytest.mark.parametrize(("name", "theirs"), zip(PUBLISHED, Cell.OPS3D, strict=True))
def test_the_published_operations_are_monais(name, theirs):
    torch.manual_seed(0)
    expected = Cell.OPS3D[theirs](4)
    torch.manual_seed(0)
    found = cell_of(PUBLISHED).OPS3D[name](4)
    assert name == theirs
    assert list(found.state_dict()) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    image = torch.randn(2, 4, 6, 5, 7)
    assert torch.equal(found(image), expected(image))
    assert found.ram_cost == expected.ram_cost == OPERATIONS[name].maps


def test_a_space_with_more_operations_mixes_as_its_cells_do(seven, monkeypatch):
    """The published ones stay side by side; only what cannot be is computed by itself."""
    space = space_of(seven)
    images = [torch.randn(1, channels, *[16 // 2**d] * 3) for d, channels in enumerate(space.filter_nums[1:4])]
    calls, convolved = [], mixing._convolved

    def counted(operations, *rest):
        calls.append(len(operations))
        return convolved(operations, *rest)

    monkeypatch.setattr(mixing, "_convolved", counted)
    outputs = space(images)
    assert calls and set(calls) == {4}  # the four convolving ones of the five

    weights = space.get_prob_a()[1].unsqueeze(-1) * space.log_alpha_c.softmax(-1)
    expected = images
    for block in range(space.num_blocks):
        sums = [0.0] * space.num_depths
        for path, (source, target) in enumerate(space.paths):
            sums[target] = sums[target] + space.cell_tree[str((block, path))](expected[source], weights[block, path])
        expected = sums
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    sum(output.square().mean() for output in outputs).backward()
    assert (space.log_alpha_c.grad.abs() > 0).all()  # each operation learns


def test_memory_counts_an_operation_by_its_feature_maps(seven):
    space = space_of(seven)
    assert space.ram_cost.shape[-1] == 7
    np.testing.assert_array_equal(space.ram_cost[..., 5:], space.ram_cost[..., 1:2].repeat(2, -1))  # 3 maps, as 3x3x3
    found = space.architecture(0.5 * (1 + space.feasible_ram_ratio()))
    assert found.operations == seven and found.info["ram_ratio"] <= 0.5 * (1 + space.feasible_ram_ratio())


def test_more_operations_go_all_the_way(seven, tmp_path):
    """One entry each: decoded, written, read, costed, drawn, built, trained, saved as a model, segmented with."""
    with torch.no_grad():
        space = space_of(seven)
        space.log_alpha_c[..., 5] = 4.0
        space.log_alpha_c[0, :, 6] = 5.0
    network = supernet(space, 1, 3)
    assert torch.isfinite(network(torch.randn(1, 1, 32, 32, 32))).all()
    found = space.architecture()
    assert {5, 6} == set(np.unique(found.arch_code_c))

    save_architecture(tmp_path / "code.pth", found)
    assert list(torch.load(tmp_path / "code.pth", weights_only=True)["operations"]) == list(seven)
    loaded = load_architecture(tmp_path / "code.pth")
    assert loaded.operations == seven and loaded.codes() == found.codes()
    assert cost(loaded, 1, 3, (32, 32, 32), SMALL).gmac > 0
    source = draw_architecture(loaded, "code", tmp_path).source
    assert DILATED.meaning in source and DEPTHWISE.meaning in source and ">dilated<" in source

    retrained = FoundNetwork(loaded, 1, 3, SMALL)
    kinds = [layer for layer in retrained.modules() if isinstance(layer, torch.nn.Conv3d)]
    assert any(layer.dilation == (2, 2, 2) for layer in kinds) and any(layer.groups > 1 for layer in kinds)
    image = torch.randn(1, 1, 32, 32, 32)
    scores = retrained(image)
    scores.square().mean().backward()
    save_model(tmp_path / "model.pth", retrained, loaded, SMALL, TASKS["Task00_Phantom"])
    model = load_model(tmp_path / "model.pth")
    assert model.architecture.operations == seven and torch.equal(model.network(image), scores)


def test_a_subset_in_another_order_is_a_space_too(tmp_path):
    names = ("conv_3x3x1", "skip_connect")
    space = space_of(names)
    found = space.architecture()
    assert space.log_alpha_c.shape[-1] == 2 and found.operations == names and found.arch_code_c.max() <= 1
    save_architecture(tmp_path / "code.pth", found)
    network = FoundNetwork(load_architecture(tmp_path / "code.pth"), 1, 2, SMALL)
    images = [torch.randn(1, channels, *[8 // 2**d] * 3) for d, channels in enumerate(space.filter_nums[1:4])]
    assert all(torch.isfinite(output).all() for output in space(images))
    kernels = {layer.kernel_size for layer in network.dints_space.modules() if isinstance(layer, torch.nn.Conv3d)}
    assert kernels <= {(3, 3, 1), (1, 1, 3), (1, 1, 1)}  # the last: the changes of resolution


def written(path, **changes) -> None:
    content = everything(2, 2).to_dict() | changes
    torch.save({key: value for key, value in content.items() if value is not None}, path)


def test_a_file_without_names_means_the_five(tmp_path):
    written(tmp_path / "code.pth", operations=None)
    assert load_architecture(tmp_path / "code.pth").operations == PUBLISHED


@pytest.mark.fault("missing key, codes, rows, paths, nodes")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["skip_connect", "conv_9x9x9", *PUBLISHED[2:]], "code.pth names the operation 'conv_9x9x9'.*conv_1x3x3"),
        ([*PUBLISHED[:4], "skip_connect"], "name each operation once"),
        ([], "name each operation once"),
        (list(PUBLISHED[:4]), "'arch_code_c' holds 4; values are 0 to 3"),
        ("skip_connect", "'operations' is not a list of names"),
        ([*PUBLISHED[:4], 3], "'operations' is not a list of names"),
    ],
    ids=["unknown", "twice", "none", "too few for the codes", "one string", "a number"],
)
def test_names_that_cannot_be_are_refused(names, message, tmp_path):
    written(tmp_path / "code.pth", operations=names)
    with pytest.raises(UserError, match=message):
        load_architecture(tmp_path / "code.pth")
