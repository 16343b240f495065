"""The table of operations builds MONAI's, and one entry more is all that a new operation takes."""

from __future__ import annotations

import html
import re
import shutil

import numpy as np
import published
import pytest
import torch
import torch.nn.functional as F
from architectures import chain, connected, everything
from monai.networks.nets.dints import Cell, DiNTS, TopologySearch

from dints.data.tasks import TASKS
from dints.errors import UserError
from dints.network.architecture import load_architecture, save_architecture
from dints.network.cells import cell_of
from dints.network.cost import cost
from dints.network.discrete import DiscreteNetwork
from dints.network.drawing import draw_architecture, draw_search_space
from dints.network.model_file import load_model, save_model
from dints.network.operations import (
    OPERATIONS,
    PUBLISHED,
    ActivatedConvolutions,
    Operation,
    check_names,
)
from dints.network.space import SearchSpace, supernet_of

SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels
NEW = {
    "dilated_3x3x3": Operation(
        "3x3x3/2",
        "#DDDDDD",
        "3x3x3, dilated",
        3,
        lambda c: ActivatedConvolutions(c, [(3, 3, 3)], dilation=2),
    ),
    "depthwise_5x5x5": Operation(
        "DW <5>",
        "#EEEEEE",
        "5x5x5, depthwise",
        5,
        lambda c: ActivatedConvolutions(c, [(5, 5, 5)], groups=c),
    ),
}
SEVEN = (*PUBLISHED, *NEW)
# in another order than the table's
SUBSET = ("depthwise_5x5x5", "conv_1x3x3", "skip_connect", "dilated_3x3x3")
LISTS = {"seven": SEVEN, "subset": SUBSET}
EACH_LIST = pytest.mark.parametrize("names", LISTS.values(), ids=LISTS)


@pytest.fixture
def seven(monkeypatch):
    """Add two operations to the table, one entry each."""
    for name, operation in NEW.items():
        monkeypatch.setitem(OPERATIONS, name, operation)


def assert_same_state(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    states = found.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_operations_are_monais_to_the_last_bit(name):
    torch.manual_seed(0)
    theirs = Cell.OPS3D[name](6)
    torch.manual_seed(0)
    ours = OPERATIONS[name].build(6)
    assert_same_state(ours, theirs)
    assert OPERATIONS[name].maps == theirs.ram_cost
    image = torch.randn(2, 6, 8, 4, 6)
    assert torch.equal(ours(image), theirs(image))


def test_dilation_and_groups_are_the_convolutions():
    torch.manual_seed(0)
    image = torch.randn(1, 4, 6, 8, 6)
    for name, settings in (("dilated_3x3x3", {"dilation": 2}), ("depthwise_5x5x5", {"groups": 4})):
        operation = NEW[name].build(4)
        expected = F.instance_norm(
            F.conv3d(image.relu(), operation.conv.weight, padding=2, **settings)
        )
        torch.testing.assert_close(operation(image), expected)


def spaces(names: tuple[str, ...]) -> tuple[TopologySearch, SearchSpace]:
    """Make MONAI's space and ours of the same cells, with the same random alphas and weights."""
    torch.manual_seed(0)
    theirs = published.quiet(
        TopologySearch, channel_mul=SMALL, cell=cell_of(names), num_blocks=2, num_depths=3
    )
    for alpha in (theirs.log_alpha_a, theirs.log_alpha_c):
        torch.nn.init.normal_(alpha)
    ours = SearchSpace(SMALL, 2, 3, names)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@EACH_LIST
def test_a_supernet_mixes_any_operations_as_monai_does(seven, names):
    """MONAI's own way calls each cell with its weights; ours calls new operations only, and joins
    the published.
    """
    theirs, ours = (
        build(space, 1, 2) for build, space in zip((DiNTS, supernet_of), spaces(names), strict=True)
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    called = set()
    for cell in ours.dints_space.cell_tree.values():
        for name, operation in zip(names, cell.op.ops, strict=True):
            operation.register_forward_hook(lambda *_, name=name: called.add(name))

    image, mix = torch.randn(1, 1, 16, 16, 16), torch.randn(1, 2, 16, 16, 16)
    expected, scores = theirs(image), ours(image)
    assert called == set(NEW) & set(names)
    torch.testing.assert_close(scores, expected, rtol=5e-4, atol=1e-5)
    for output in (expected, scores):
        (output * mix).mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        atol = 5e-4 * expected[name].grad.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=5e-4, atol=atol, msg=name.__add__
        )


@EACH_LIST
def test_memory_and_what_is_decoded_are_monais(seven, names):
    theirs, ours = spaces(names)
    maps = [OPERATIONS[name].maps for name in names]
    # beside them, a path has the memory of its change
    assert (np.diff(ours.ram_cost) == np.diff(maps)).all()
    size = (1, 1, 32, 32, 32)
    expected = theirs.get_ram_cost_usage(size) / theirs.get_ram_cost_usage(size, full=True)
    torch.testing.assert_close(ours.ram_ratio(size), expected, rtol=1e-5, atol=0)
    for expected, found in zip(theirs.decode(), ours.decode(), strict=True):
        np.testing.assert_array_equal(found, expected)


@EACH_LIST
def test_a_decoded_architecture_is_written_with_the_names_and_read(seven, tmp_path, names):
    found = SearchSpace(SMALL, 3, 3, names).architecture(task="Task05_Prostate")
    save_architecture(tmp_path / "code.pth", found)
    assert torch.load(tmp_path / "code.pth", weights_only=True)["operations"] == list(names)
    loaded = load_architecture(tmp_path / "code.pth")
    assert (loaded.operations, loaded.codes(), loaded.info) == (names, found.codes(), found.info)


@EACH_LIST
def test_a_found_network_is_monais_and_its_model_file_holds_the_operations(seven, tmp_path, names):
    architecture = everything(2, 3, names)
    torch.manual_seed(0)
    theirs = published.network(architecture, 2, 3, SMALL, cell_of(names))
    ours, image = DiscreteNetwork(architecture, 2, 3, SMALL), torch.randn(1, 2, 16, 16, 16)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    scores = ours(image)
    torch.testing.assert_close(scores, theirs(image), rtol=1e-4, atol=1e-5)
    scores.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in ours.parameters())

    save_model(tmp_path / "model.pth", ours, architecture, SMALL, TASKS["Task05_Prostate"])
    model = load_model(tmp_path / "model.pth")
    assert model.architecture.operations == names and torch.equal(model.network(image), scores)


def test_the_cost_of_a_new_operation_is_counted(seven):
    """Of c channels, a 3x3x3 convolution has 27 c^2 weights, a depthwise 5x5x5 one 125 c, each used
    at every voxel.
    """
    plain = chain(0, 0, num_depths=2, operation=1)
    depthwise = connected(plain.arch_code_a, np.full((1, 4), 6), operations=SEVEN)
    before, after = (
        cost(architecture, 1, 2, (8, 8, 8), SMALL) for architecture in (plain, depthwise)
    )
    voxels, more = 4**3, 125 * 4 - 27 * 4**2
    assert after.parameters - before.parameters == more
    assert 1e9 * (after.gmac - before.gmac) == pytest.approx(voxels * more)


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz's program 'dot' is not installed")
def test_labels_and_legend_of_a_drawing_are_those_of_its_operations(seven, tmp_path):
    labels, architecture = (
        [html.escape(OPERATIONS[name].label) for name in SUBSET],
        everything(3, 2, SUBSET),
    )
    found = draw_architecture(architecture, "found", tmp_path).source
    space = draw_search_space(3, 2, "space", tmp_path, operations=SUBSET).source
    on_paths = [labels[code] for code in architecture.arch_code_c.flat]
    for source, expected in ((found, on_paths + labels), (space, labels)):
        assert re.findall("<TD>(.*?)</TD>", source) == expected
        assert {
            name for name, operation in OPERATIONS.items() if operation.meaning in source
        } == set(SUBSET)
    assert "with one of 4 operations" in space


def test_a_file_without_names_means_the_published_five(seven, tmp_path):
    content = everything(1, 3).to_dict()
    del content["operations"]
    torch.save(content, tmp_path / "code.pth")
    assert load_architecture(tmp_path / "code.pth").operations == PUBLISHED
    content["arch_code_c"] = content["arch_code_c"] + 1
    torch.save(content, tmp_path / "code.pth")
    with pytest.raises(UserError, match="'arch_code_c' holds 5; values are 0 to 4"):
        load_architecture(tmp_path / "code.pth")


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (
            [*PUBLISHED, "conv_7x7x7"],
            r"names the operation 'conv_7x7x7', .* not have "
            r"\(skip_connect, .*, conv_1x3x3\)",
        ),
        (
            ["conv_3x3x3", "skip_connect", "conv_3x3x3"],
            "names conv_3x3x3, skip_connect, conv_3x3x3: name each .* once",
        ),
        ([], "names no operation"),
        *((value, "'operations' is not a list of names") for value in ("conv_3x3x3", None, [1, 2])),
    ],
    ids=str,
)
def test_names_that_the_table_lacks_and_what_is_no_list_of_names_are_refused(
    tmp_path, names, fault
):
    torch.save(
        {**chain(0, 0, num_depths=2, operation=0).to_dict(), "operations": names},
        tmp_path / "code.pth",
    )
    with pytest.raises(UserError, match=f"{tmp_path}/code.pth.* {fault}") as caught:
        load_architecture(tmp_path / "code.pth")
    assert "\n" not in str(caught.value)


def test_names_on_the_command_line_are_checked_as_those_in_files():
    assert check_names(["conv_3x3x3", "skip_connect"]) == ("conv_3x3x3", "skip_connect")
    for names, fault in (
        (["conv"], "--operations names the operation 'conv', which"),
        ([], "--operations names no op"),
    ):
        with pytest.raises(UserError, match=fault):
            check_names(names)
        with pytest.raises(UserError, match=fault):
            SearchSpace(SMALL, 1, 2, names)
