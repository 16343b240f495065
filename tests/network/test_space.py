"""MONAI's `TopologySearch` is the oracle of ours, in float64 where float32 is not good enough.

A space that keeps the finest path is MONAI's given that this path is active: made sure there, or
filtered for.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import random_architecture
from monai.networks.nets import dints
from monai.networks.nets.dints import DiNTS, TopologySearch
from published import quiet
from tracing import assert_one_graph

import search_dints
from dints.network.architecture import load_architecture, save_architecture
from dints.network.decoding import subsets
from dints.network.space import CERTAIN, SearchSpace, supernet_of

INPUT = (2, 1, 64, 96, 32)
SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels


@pytest.fixture(scope="module", autouse=True)
def quick_oracle():
    """Let MONAI find arrays by their bytes: by their text its `decode` takes 20 s at 4 depths."""

    def key(value: object) -> object:
        return value.tobytes() if isinstance(value, np.ndarray) else str(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dints, "str", key, raising=False)
        yield


def twins(
    seed: int,
    spread: float,
    num_blocks: int,
    num_depths: int,
    use_downsample: bool = True,
    **ours: object,
) -> tuple[TopologySearch, SearchSpace]:
    """Make MONAI's space and ours with the same weights and the same random alphas, in float64."""
    torch.manual_seed(seed)
    size = {"num_blocks": num_blocks, "num_depths": num_depths, "channel_mul": SMALL}
    size["use_downsample"] = use_downsample
    theirs, ours = quiet(TopologySearch, **size).double(), SearchSpace(**size, **ours).double()
    for alpha in (theirs.log_alpha_a, theirs.log_alpha_c):
        alpha.data.normal_(0, spread)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def searched_values(space: TopologySearch) -> dict[str, torch.Tensor]:
    children, path_probs = space.get_prob_a(child=True)
    if isinstance(space, SearchSpace):
        ratio = space.ram_ratio(INPUT)
    else:
        ratio = space.get_ram_cost_usage(INPUT) / space.get_ram_cost_usage(INPUT, full=True)
    topology = space.get_topology_entropy(children)
    alone = space.get_prob_a()[1]
    values = {"children": children, "paths": path_probs, "paths alone": alone}
    return {**values, "topology": topology, "ram ratio": ratio}


def gradients(space: TopologySearch, value: torch.Tensor) -> list[torch.Tensor]:
    """Return those of a fixed random mix of the value's entries, by log_alpha_a and log_alpha_c."""
    mix = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    settings = {"retain_graph": True, "materialize_grads": True}
    alphas = [space.log_alpha_a, space.log_alpha_c]
    return torch.autograd.grad((value * mix).sum(), alphas, **settings)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Compare relatively to each entry, or to the largest: sums of many terms may cancel."""
    atol = tolerance * theirs.detach().abs().max().item()
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=tolerance, atol=atol)


@pytest.mark.parametrize(
    ("size", "spread"), [((4, 4), 0.01), ((1, 3), 4.0), ((4, 3, False), 4.0)], ids=str
)
def test_probabilities_and_regularisers_are_monais(size, spread):
    theirs, ours = twins(0, spread, *size)
    expected = searched_values(theirs)
    assert 1 > expected["ram ratio"] > 0
    if size[0] == 1:  # no two blocks to agree
        assert expected.pop("topology") == searched_values(ours)["topology"] == 0
    expected_gradients = {name: gradients(theirs, value) for name, value in expected.items()}
    # Gradients are differences of thousands of terms: in float32 fewer digits are left.
    for dtype, tolerance, of_gradients in (
        (torch.float64, 1e-9, 1e-9),
        (torch.float32, 1e-5, 1e-4),
    ):
        values = searched_values(ours.to(dtype))
        for name, value in expected.items():
            # Entry by entry: a child's probability may be 1e-12.
            found = values[name].double()
            torch.testing.assert_close(found, value, rtol=tolerance, atol=1e-30, msg=name.__add__)
            for pair in zip(gradients(ours, values[name]), expected_gradients[name], strict=True):
                assert_close(*pair, of_gradients)


@pytest.mark.parametrize(
    ("size", "spread"),
    [((1, 2), 1.0), ((12, 3), 0.01), ((12, 3), 5.0), ((2, 4), 1.0)],
    ids=str,
)
def test_what_is_decoded_is_what_monai_decodes(size, spread):
    theirs, ours = (space.float() for space in twins(0, spread, *size))
    for expected, found in zip(theirs.decode(), ours.decode(), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [(1, 2), (12, 4), (3, 5)], ids=str)
def test_decode_finds_the_architecture_that_the_alphas_spell(size):
    space, wanted = SearchSpace(SMALL, *size), random_architecture(0, *size)
    with torch.no_grad():
        space.log_alpha_a.copy_(torch.from_numpy(12 * wanted.arch_code_a - 6))
        space.log_alpha_c.copy_(F.one_hot(torch.from_numpy(wanted.arch_code_c), 5))
    found = space.architecture(task="Task09_Spleen")
    assert found.codes() == wanted.codes() and (found.arch_code_a_max == wanted.arch_code_a).all()
    assert found.info.keys() == {"task", "ram_ratio"} and found.info["task"] == "Task09_Spleen"


@pytest.mark.parametrize(
    ("size", "keep_finest"), [((2, 4), False), ((2, 3, False), False), ((2, 3), True)], ids=str
)
def test_the_supernet_and_its_gradients_are_monais(size, keep_finest):
    theirs, ours = twins(0, 1.0, *size, keep_finest=keep_finest)
    if keep_finest:
        theirs.log_alpha_a.data[:, 0] = CERTAIN
    monais = DiNTS(theirs, 2, 3, use_downsample=theirs.use_downsample).double()
    own = supernet_of(ours, 2, 3).double()
    own.load_state_dict({**monais.state_dict(), "dints_space.log_alpha_a": ours.log_alpha_a})
    voxels = (2 ** (size[1] + 1),) * 3
    image, mix = torch.randn(1, 2, *voxels).double(), torch.randn(1, 3, *voxels).double()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 5e-4)):
        outputs = []
        for network in (monais.to(dtype), own.to(dtype)):
            network.zero_grad()
            outputs.append(network(image.to(dtype)))
            (outputs[-1] * mix.to(dtype)).mean().backward()
        assert_close(*outputs[::-1], tolerance)
        expected, found = (dict(network.named_parameters()) for network in (monais, own))
        assert found.keys() == expected.keys()
        for name, parameter in found.items():
            assert parameter.grad.abs().max() > 0, name
            assert_close(parameter.grad, expected[name].grad, tolerance)
    assert (ours.log_alpha_a.grad[:, 0] == 0).all() == keep_finest


@pytest.mark.parametrize(
    "row",
    [
        *([alpha] * 10 for alpha in (-1000.0, -20.0, 0.0, 1000.0)),
        [-40.0, -20.0, -17.0, 0.0, 17.0, 40.0, -18.0, -30.0, 3.0, -100.0],
    ],
    ids=lambda row: f"{row[0]:g}..{row[-1]:g}",
)
def test_extreme_alphas(row):
    space, alpha = SearchSpace(SMALL, 3, 4), np.array(row)
    with torch.no_grad():
        space.log_alpha_a[1:] = torch.tensor(row)
    values = searched_values(space)
    # sums of ten numbers near 1000 have no more digits in float32
    torch.testing.assert_close(values["children"].sum(-1), torch.ones(3), rtol=0, atol=1e-4)
    # p / (1 - prod(1 - p)) without cancellation; at -1000 all ten p underflow, and are as likely.
    p, log_off = 1 / (1 + np.exp(-np.clip(alpha, -700, 700))), -np.logaddexp(0, alpha)
    expected = p / -np.expm1(log_off.sum()) if p.sum() > 1e-300 else np.full(10, 0.1)
    np.testing.assert_allclose(values["paths"][1].detach().numpy(), expected, rtol=1e-4, atol=1e-30)
    for name, value in values.items():
        assert value.isfinite().all(), name
        assert all(gradient.isfinite().all() for gradient in gradients(space, value)), name


def test_everything_follows_to_another_device():
    network = supernet_of(SearchSpace(SMALL, 2, 3), 1, 2).to("meta")
    assert network(torch.zeros(1, 1, 32, 32, 32, device="meta")).shape == (1, 2, 32, 32, 32)
    for name, value in searched_values(network.dints_space).items():
        assert value.device.type == "meta", name


@pytest.mark.slow
def test_the_supernet_compiles_as_one_graph():
    assert_one_graph(supernet_of(SearchSpace(SMALL, 1, 2), 1, 2), torch.randn(1, 1, 16, 16, 16))


def test_operations_count_in_the_fixed_budget_alone():
    """All paths active with one operation each: the published share is the same for all."""
    space = SearchSpace(SMALL, 2, 3)
    shares = {"published": [], "fixed": []}
    space.log_alpha_a.data.fill_(30)
    for operation in range(5):
        space.log_alpha_c.data.fill_(-30)[..., operation] = 30
        for budget, values in shares.items():
            values.append(space.ram_ratio((1, 1, 32, 32, 32), budget).item())
    assert shares["published"] == pytest.approx([1] * 5)
    skip, conv3d, *p3d = shares["fixed"]
    assert skip < conv3d < p3d[0] and p3d == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("size", [(2, 2), (2, 4)], ids=str)
def test_probabilities_are_conditional_on_the_finest_path(size, tmp_path):
    theirs, ours = twins(0, 1.0, *size, keep_finest=True)
    every = np.array(subsets(3 * size[1] - 2))
    kept = every[:, 0] == 1
    wanted = theirs.get_prob_a(child=True)[0].detach().numpy()[:, kept]
    expected = wanted / wanted.sum(-1, keepdims=True)
    children, path_probs = (probs.detach().numpy() for probs in ours.get_prob_a(child=True))
    np.testing.assert_array_equal(ours.child_list, every[kept])
    np.testing.assert_allclose(children, expected, rtol=1e-12)
    np.testing.assert_allclose(path_probs, expected @ every[kept], rtol=1e-12)
    assert (path_probs[:, 0] == 1).all()
    save_architecture(tmp_path / "arch.pth", ours.architecture())
    assert load_architecture(tmp_path / "arch.pth").info["keep_finest"] is True


def test_regularisers_are_monais_where_the_finest_path_is_sure_and_do_not_move_it():
    theirs, ours = twins(1, 1.0, 3, 3, keep_finest=True)
    theirs.log_alpha_a.data[:, 0] = CERTAIN
    children, usage = theirs.get_prob_a(child=True)[0], theirs.get_ram_cost_usage(INPUT)
    kept = children[:, np.array(subsets(7))[:, 0] == 1]
    # MONAI also counts the 3 patterns without the finest node, whose probability is 0.
    left_out = 3 * 2 * np.log1p(1e-5)
    expected = {
        "entropy_a": -(kept * (kept + 1e-5).log()).mean(),
        "topology": theirs.get_topology_entropy(children) + left_out,
        "ram_ratio": usage / theirs.get_ram_cost_usage(INPUT, full=True),
    }
    found = search_dints.regularisers(ours, INPUT, "published")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=0, msg=name.__add__)
        (moved, _), (wanted, _) = gradients(ours, found[name]), gradients(theirs, value)
        torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-12, msg=name.__add__)
        assert (moved[:, 0] == 0).all() and (moved[:, 1:] != 0).any(), name
