"""MONAI's `TopologySearch` is the oracle of ours, in float64 where its float32 is not good enough
for one.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from architectures import random_architecture
from monai.networks.nets import dints
from monai.networks.nets.dints import DiNTS, TopologySearch
from published import quiet
from tracing import assert_one_graph

from dints.network.space import SearchSpace, supernet_of

INPUT = (2, 1, 64, 96, 32)
SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels


@pytest.fixture(scope="module", autouse=True)
def quick_oracle():
    """Let MONAI find arrays by their bytes, not their text, with which its `decode` takes 20 s at 4
    depths.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dints,
            "str",
            lambda x: x.tobytes() if isinstance(x, np.ndarray) else str(x),
            raising=False,
        )
        yield


@cache
def _twins(
    num_blocks: int, num_depths: int, use_downsample: bool = True
) -> tuple[TopologySearch, SearchSpace]:
    size = {
        "num_blocks": num_blocks,
        "num_depths": num_depths,
        "channel_mul": SMALL,
        "use_downsample": use_downsample,
    }
    torch.manual_seed(0)  # or the weights would depend on the tests before
    return quiet(TopologySearch, **size), SearchSpace(**size)


def twins(seed: int, spread: float, *size: int) -> tuple[TopologySearch, SearchSpace]:
    """Make MONAI's space and ours with the same weights and the same random alphas."""
    theirs, ours = (space.float() for space in _twins(*size))
    generator = torch.Generator().manual_seed(seed)
    for alpha in (theirs.log_alpha_a, theirs.log_alpha_c):
        alpha.data.normal_(0, spread, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def monais_ratio(space: TopologySearch) -> torch.Tensor:
    return space.get_ram_cost_usage(INPUT) / space.get_ram_cost_usage(INPUT, full=True)


def searched_values(space: TopologySearch) -> dict[str, torch.Tensor]:
    children, path_probs = space.get_prob_a(child=True)
    return {
        "children": children,
        "paths": path_probs,
        "paths alone": space.get_prob_a()[1],
        "topology": space.get_topology_entropy(children),
        "ram ratio": ratio(INPUT)
        if (ratio := getattr(space, "ram_ratio", None))
        else monais_ratio(space),
    }


def gradients(space: TopologySearch, value: torch.Tensor) -> list[torch.Tensor]:
    """Return those of a fixed random mix of the value's entries, by log_alpha_a and log_alpha_c."""
    mix = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    alphas = [space.log_alpha_a, space.log_alpha_c]
    return torch.autograd.grad(
        (value * mix).sum(), alphas, retain_graph=True, materialize_grads=True
    )


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Compare relatively to each entry, or to the largest one, since sums of thousands of terms may
    cancel.
    """
    atol = tolerance * theirs.detach().abs().max().item()
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("spread", [0.01, 4.0])
@pytest.mark.parametrize("size", [(2, 2), (1, 3), (12, 4), (7, 3, False)], ids=str)
def test_probabilities_and_regularisers_are_monais(size, spread):
    theirs, ours = twins(size[0], spread, *size)
    expected = searched_values(theirs.double())
    assert 1 > expected["ram ratio"] > 0
    if size[0] == 1:  # no two blocks to agree
        assert expected.pop("topology") == searched_values(ours)["topology"] == 0
    expected_gradients = {name: gradients(theirs, value) for name, value in expected.items()}
    # The gradients are differences of thousands of terms: in float32, rounding leaves no more
    # digits.
    for dtype, tolerance, tolerance_of_gradients in (
        (torch.float64, 1e-9, 1e-9),
        (torch.float32, 1e-5, 1e-4),
    ):
        values = searched_values(ours.to(dtype))
        for name, value in expected.items():
            # Entry by entry: a child's probability may be 1e-12.
            torch.testing.assert_close(
                values[name].double(), value, rtol=tolerance, atol=1e-30, msg=name.__add__
            )
            for pair in zip(gradients(ours, values[name]), expected_gradients[name], strict=True):
                assert_close(*pair, tolerance_of_gradients)


@pytest.mark.parametrize(
    ("size", "spread", "seeds"),
    [
        ((1, 2), 1.0, 5),
        *((size, spread, 2) for size in ((12, 2), (12, 3)) for spread in (0.01, 1.0, 5.0)),
        # at 12 blocks MONAI's matrix has 2 GB
        *(((2, 4), spread, 1) for spread in (0.01, 1.0, 5.0)),
    ],
    ids=str,
)
def test_what_is_decoded_is_what_monai_decodes(size, spread, seeds):
    for seed in range(seeds):
        theirs, ours = twins(seed, spread, *size)
        for expected, found in zip(theirs.decode(), ours.decode(), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [(1, 2), (12, 4), (3, 5)], ids=str)
def test_decode_finds_the_architecture_that_the_alphas_spell(size):
    space = SearchSpace(SMALL, *size)
    for seed in range(5):
        wanted = random_architecture(seed, *size)
        with torch.no_grad():
            space.log_alpha_a.copy_(torch.from_numpy(12 * wanted.arch_code_a - 6))
            space.log_alpha_c.zero_().scatter_(
                -1, torch.from_numpy(wanted.arch_code_c).unsqueeze(-1), 1.0
            )
        found = space.architecture(task="Task09_Spleen")
        for key in ("node_a", "arch_code_a", "arch_code_c"):
            np.testing.assert_array_equal(getattr(found, key), getattr(wanted, key))
        np.testing.assert_array_equal(found.arch_code_a_max, wanted.arch_code_a)
        assert found.info.keys() == {"task", "ram_ratio"} and found.info["task"] == "Task09_Spleen"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-4), (torch.float64, 1e-9)], ids=str
)
@pytest.mark.parametrize("size", [(3, 2), (2, 3), (2, 4), (2, 3, False)], ids=str)
def test_the_supernet_and_its_gradients_are_monais(size, dtype, tolerance):
    theirs, ours = twins(0, 1.0, *size)
    torch.manual_seed(0)
    monais = DiNTS(theirs, 2, 3, use_downsample=theirs.use_downsample)
    networks = [network.to(dtype) for network in (monais, supernet_of(ours, 2, 3))]
    networks[1].load_state_dict(networks[0].state_dict())
    torch.manual_seed(1)
    voxels = (max(16, 2 ** (size[1] + 1)),) * 3
    image, mix = torch.randn(1, 2, *voxels, dtype=dtype), torch.randn(1, 3, *voxels, dtype=dtype)
    expected, scores = (network(image) for network in networks)
    assert_close(scores, expected, tolerance)
    for output in (expected, scores):
        (output * mix).mean().backward()
    theirs, ours = (dict(network.named_parameters()) for network in networks)
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.grad.abs().max() > 0, name
        assert_close(parameter.grad, theirs[name].grad, tolerance)
        parameter.grad = theirs[name].grad = None


@pytest.mark.parametrize(
    "row",
    [
        *([alpha] * 10 for alpha in (-1000.0, -40.0, -20.0, -17.0, 0.0, 17.0, 40.0, 1000.0)),
        [-40.0] * 9 + [40.0],
        [40.0] + [-40.0] * 9,
        [-20.0, -17.0] * 5,
        [-40.0, -20.0, -17.0, 0.0, 17.0, 40.0, -18.0, -30.0, 3.0, -100.0],
    ],
    ids=lambda row: f"{row[0]:g}..{row[-1]:g}",
)
def test_extreme_alphas(row):
    _, space = twins(0, 1.0, 3, 4)
    with torch.no_grad():
        space.log_alpha_a[1:] = torch.tensor(row)
    values = searched_values(space)
    # sums of ten numbers near 1000 have no more digits in float32
    accuracy = 1e-5 if abs(row[0]) < 1000 else 1e-4
    torch.testing.assert_close(values["children"].sum(-1), torch.ones(3), rtol=0, atol=accuracy)

    # p / (1 - prod(1 - p)) without cancellation; at -1000 all ten p underflow, each path is as
    # likely as the others.
    alpha = np.array(row)
    p, log_off = 1 / (1 + np.exp(-np.clip(alpha, -700, 700))), -np.logaddexp(0, alpha)
    expected = p / -np.expm1(log_off.sum()) if p.sum() > 1e-300 else np.full(10, 0.1)
    np.testing.assert_allclose(values["paths"][1].detach().numpy(), expected, rtol=1e-4, atol=1e-30)
    for name, value in values.items():
        assert value.isfinite().all(), name
        assert all(gradient.isfinite().all() for gradient in gradients(space, value)), name


def test_state_dict_moves_both_ways_and_nothing_is_printed(capsys):
    size = {"num_blocks": 2, "num_depths": 3, "channel_mul": SMALL}
    theirs, ours = (
        DiNTS(quiet(TopologySearch, **size), 1, 2),
        supernet_of(SearchSpace(**size), 1, 2),
    )
    for source, destination in ((theirs, ours), (ours, theirs)):
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter)
        destination.load_state_dict(source.state_dict(), strict=True)
        for name, value in source.state_dict().items():
            assert torch.equal(destination.state_dict()[name], value), name
    assert capsys.readouterr() == ("", "")


def test_everything_follows_to_another_device():
    network = supernet_of(SearchSpace(num_blocks=2, num_depths=3, channel_mul=SMALL), 1, 2).to(
        "meta"
    )
    assert network(torch.zeros(1, 1, 32, 32, 32, device="meta")).shape == (1, 2, 32, 32, 32)
    for name, value in searched_values(network.dints_space).items():
        assert value.device.type == "meta", name


@pytest.mark.slow
def test_the_supernet_compiles_as_one_graph():
    assert_one_graph(supernet_of(SearchSpace(SMALL, 1, 2), 1, 2), torch.randn(1, 1, 16, 16, 16))


@pytest.mark.parametrize("budget", ["published", "fixed"])
def test_gradients_of_the_share_of_memory(budget):
    space = SearchSpace(SMALL, 2, 2).double()
    torch.manual_seed(0)
    alphas = [
        torch.randn_like(alpha).requires_grad_() for alpha in (space.log_alpha_a, space.log_alpha_c)
    ]

    def ratio(log_alpha_a: torch.Tensor, log_alpha_c: torch.Tensor) -> torch.Tensor:
        space._parameters.update(log_alpha_a=log_alpha_a, log_alpha_c=log_alpha_c)
        return space.ram_ratio((1, 1, 32, 32, 32), budget)

    assert torch.autograd.gradcheck(ratio, alphas)
    assert all(
        gradient.abs().max() > 1e-3 for gradient in torch.autograd.grad(ratio(*alphas), alphas)
    )


def test_operations_count_in_the_fixed_budget_alone():
    """All paths active with one operation each: the published share is the same for all, the fixed
    one is not.
    """
    space = SearchSpace(SMALL, 2, 3)
    shares = {"published": [], "fixed": []}
    with torch.no_grad():
        space.log_alpha_a.fill_(30)
        for operation in range(5):
            space.log_alpha_c.fill_(-30)[..., operation] = 30
            for budget, values in shares.items():
                values.append(space.ram_ratio((1, 1, 32, 32, 32), budget).item())
    assert shares["published"] == pytest.approx([1] * 5)
    skip, conv3d, *p3d = shares["fixed"]
    assert skip < conv3d < p3d[0] and p3d == pytest.approx([1, 1, 1])
