"""The table of operations builds MONAI's, and one entry more is all that a new operation takes."""

from __future__ import annotations

import numpy as np
import published
import pytest
import torch
from architectures import chain, everything
from monai.networks.nets.dints import Cell, DiNTS, TopologySearch

from dints.data.tasks import TASKS
from dints.errors import UserError
from dints.network.architecture import load_architecture, save_architecture
from dints.network.cells import cell_of
from dints.network.discrete import DiscreteNetwork
from dints.network.model_file import load_model, save_model
from dints.network.operations import OPERATIONS, PUBLISHED, ActivatedConvolutions, Operation
from dints.network.space import SearchSpace, supernet_of

SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels
DILATED = Operation(
    *("3x3x3/2", "#DDDDDD", "3x3x3, dilated", 3),
    lambda channels: ActivatedConvolutions(channels, [(3, 3, 3)], dilation=2),
)
DEPTHWISE = Operation(
    *("DW <5>", "#EEEEEE", "5x5x5, depthwise", 5),
    lambda channels: ActivatedConvolutions(channels, [(5, 5, 5)], groups=channels),
)
NEW = {"dilated_3x3x3": DILATED, "depthwise_5x5x5": DEPTHWISE}
# some of the published, and in another order than the table's
NAMES = ("depthwise_5x5x5", "conv_1x3x3", "skip_connect", "dilated_3x3x3")


@pytest.fixture
def new(monkeypatch):
    """Add two operations to the table, one entry each."""
    for name, operation in NEW.items():
        monkeypatch.setitem(OPERATIONS, name, operation)


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_operations_are_monais_to_the_last_bit(name):
    torch.manual_seed(0)
    theirs = Cell.OPS3D[name](6)
    torch.manual_seed(0)
    ours = OPERATIONS[name].build(6)
    states = ours.state_dict(), theirs.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    assert OPERATIONS[name].maps == theirs.ram_cost
    image = torch.randn(2, 6, 8, 4, 6)
    assert torch.equal(ours(image), theirs(image))


def test_a_supernet_mixes_any_operations_as_monai_does(new, tmp_path):
    """MONAI calls each cell with its weights; we call new operations only, and join the others."""
    torch.manual_seed(0)
    size = {"channel_mul": SMALL, "num_blocks": 2, "num_depths": 3}
    space = published.quiet(TopologySearch, cell=cell_of(NAMES), **size)
    theirs, ours = DiNTS(space, 1, 2), supernet_of(SearchSpace(SMALL, 2, 3, NAMES), 1, 2)
    for alpha in (space.log_alpha_a, space.log_alpha_c):
        torch.nn.init.normal_(alpha)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    called = set()
    for cell in ours.dints_space.cell_tree.values():
        for name, operation in zip(NAMES, cell.op.ops, strict=True):
            operation.register_forward_hook(lambda *_, name=name: called.add(name))

    image, mix = torch.randn(1, 1, 16, 16, 16), torch.randn(1, 2, 16, 16, 16)
    expected, scores = theirs(image), ours(image)
    assert called == set(NEW)
    torch.testing.assert_close(scores, expected, rtol=5e-4, atol=1e-5)
    for output in (expected, scores):
        (output * mix).mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        tolerance = {"rtol": 5e-4, "atol": 5e-4 * expected[name].grad.abs().max().item()}
        torch.testing.assert_close(parameter.grad, expected[name].grad, **tolerance)

    size = (1, 1, 32, 32, 32)
    ratio = space.get_ram_cost_usage(size) / space.get_ram_cost_usage(size, full=True)
    torch.testing.assert_close(ours.dints_space.ram_ratio(size), ratio, rtol=1e-5, atol=0)
    for expected, found in zip(space.decode(), ours.dints_space.decode(), strict=True):
        np.testing.assert_array_equal(found, expected)
    found = ours.dints_space.architecture(task="Task05_Prostate")
    save_architecture(tmp_path / "code.pth", found)
    assert torch.load(tmp_path / "code.pth", weights_only=True)["operations"] == list(NAMES)
    loaded = load_architecture(tmp_path / "code.pth")
    assert (loaded.operations, loaded.codes(), loaded.info) == (NAMES, found.codes(), found.info)


def test_a_found_network_is_monais_and_its_model_file_holds_the_operations(new, tmp_path):
    torch.manual_seed(0)
    architecture = everything(2, 3, NAMES)
    theirs = published.network(architecture, 2, 3, SMALL, cell_of(NAMES))
    ours, image = DiscreteNetwork(architecture, 2, 3, SMALL), torch.randn(1, 2, 16, 16, 16)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    scores = ours(image)
    torch.testing.assert_close(scores, theirs(image), rtol=1e-4, atol=1e-5)
    scores.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in ours.parameters())

    save_model(tmp_path / "model.pth", ours, architecture, SMALL, TASKS["Task05_Prostate"])
    model = load_model(tmp_path / "model.pth")
    assert model.architecture.operations == NAMES and torch.equal(model.network(image), scores)


def test_a_file_without_names_means_the_published_five(new, tmp_path):
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
        ([*PUBLISHED, "conv_7x7x7"], "names the operation 'conv_7x7x7', .* not have"),
        (["conv_3x3x3", "conv_3x3x3"], "names conv_3x3x3, conv_3x3x3: name each .* once"),
        ([], "names no operation"),
        ([1, 2], "'operations' is not a list of names"),
    ],
    ids=str,
)
def test_names_that_the_table_lacks_and_what_is_no_list_of_names_are_refused(
    tmp_path, names, fault
):
    content = {**chain(0, 0, num_depths=2, operation=0).to_dict(), "operations": names}
    torch.save(content, tmp_path / "code.pth")
    with pytest.raises(UserError, match=f"{tmp_path}/code.pth.* {fault}") as caught:
        load_architecture(tmp_path / "code.pth")
    assert "\n" not in str(caught.value)
    if names != [1, 2]:
        with pytest.raises(UserError, match=f"--operations {fault}"):
            SearchSpace(SMALL, 1, 2, names)
