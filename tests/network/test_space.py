"""dints/space.py: MONAI's `TopologySearch` is the oracle, in float64 where its float32 is not good enough for one."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from architectures import random_architecture
from monai.networks.nets import dints
from monai.networks.nets.dints import DiNTS, TopologySearch

from dints.architecture import Architecture
from dints.space import SearchSpace

INPUT = (2, 1, 64, 96, 32)


@pytest.fixture(scope="module", autouse=True)
def quick_oracle():
    """MONAI finds arrays in dictionaries by their text, for which `decode` takes 20 s at 4 depths; bytes do as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dints, "str", lambda x: x.tobytes() if isinstance(x, np.ndarray) else str(x), raising=False)
        yield


@cache
def _twins(num_blocks: int, num_depths: int, **options) -> tuple[TopologySearch, SearchSpace]:
    size = {"num_blocks": num_blocks, "num_depths": num_depths, "channel_mul": 1 / 16, **options}
    return TopologySearch(**size), SearchSpace(**size)


def twins(seed: int, spread: float, *size: int, **options) -> tuple[TopologySearch, SearchSpace]:
    """MONAI's space and ours with the same weights and the same random alphas."""
    theirs, ours = (space.float() for space in _twins(*size, **options))
    generator = torch.Generator().manual_seed(seed)
    for alpha in (theirs.log_alpha_a, theirs.log_alpha_c):
        alpha.data.normal_(0, spread, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def searched_values(space: TopologySearch) -> dict[str, torch.Tensor]:
    children, path_probs = space.get_prob_a(child=True)
    return {
        "children": children,
        "paths": path_probs,
        "paths alone": space.get_prob_a()[1],
        "topology": space.get_topology_entropy(children),
        "ram": space.get_ram_cost_usage(INPUT),
        "ram full": space.get_ram_cost_usage(INPUT, full=True),
    }


def gradients(space: TopologySearch, value: torch.Tensor) -> list[torch.Tensor]:
    """Of a fixed random mix of the value's entries, by log_alpha_a and log_alpha_c."""
    mix = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    alphas = [space.log_alpha_a, space.log_alpha_c]
    return torch.autograd.grad((value * mix).sum(), alphas, retain_graph=True, materialize_grads=True)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Relative to each entry, or to the largest one, since sums of thousands of terms may cancel."""
    atol = tolerance * theirs.detach().abs().max().item()
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=tolerance, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "tolerance_of_gradients"),
    # The gradients are differences of thousands of terms: in float32, rounding leaves no more digits.
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("size", [(2, 2), (12, 2), (1, 3), (7, 3), (3, 4), (12, 4)])
def test_probabilities_and_regularisers(size, spread, dtype, tolerance, tolerance_of_gradients):
    theirs, ours = twins(size[0], spread, *size)
    expected, values = searched_values(theirs.double()), searched_values(ours.to(dtype))
    assert expected["ram full"] > expected["ram"] > 0
    for name, value in values.items():
        if name == "topology" and size[0] == 1:
            assert value == expected[name] == 0  # no two blocks to agree
            continue
        # Entry by entry: a child's probability may be 1e-12.
        torch.testing.assert_close(
            value.double(), expected[name], rtol=tolerance, atol=1e-30, msg=lambda message, name=name: name + message
        )
        for gradient, expected_gradient in zip(gradients(ours, value), gradients(theirs, expected[name]), strict=True):
            assert_close(gradient, expected_gradient, tolerance_of_gradients)


@pytest.mark.parametrize("options", [{"use_downsample": False}, {"spatial_dims": 2}], ids=str)
def test_ram_follows_the_options_of_the_space(options):
    theirs, ours = twins(0, 1.0, 2, 3, **options)
    for full in (False, True):
        expected = theirs.get_ram_cost_usage(INPUT, full=full)
        torch.testing.assert_close(ours.get_ram_cost_usage(INPUT, full=full), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("size", "spread", "seeds"),
    [
        ((1, 2), 1.0, 5),
        *((size, spread, 8) for size in ((2, 2), (12, 2)) for spread in (0.01, 1.0, 5.0)),
        *((size, spread, 2) for size in ((2, 3), (12, 3)) for spread in (0.01, 1.0, 5.0)),
        *(((2, 4), spread, 2) for spread in (0.01, 1.0, 5.0)),  # at 12 blocks MONAI's matrix has 2 GB
    ],
    ids=str,
)
def test_decode(size, spread, seeds):
    for seed in range(seeds):
        theirs, ours = twins(seed, spread, *size)
        for expected, found in zip(theirs.decode(), ours.decode(), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [(1, 2), (12, 4), (3, 5)], ids=str)
def test_decode_finds_the_architecture_that_the_alphas_spell(size):
    for seed in range(5):
        wanted = random_architecture(seed, *size)
        _, space = _twins(*size) if size[1] < 5 else (None, _space_of_5_depths())
        with torch.no_grad():
            space.log_alpha_a.copy_(torch.from_numpy(12 * wanted.arch_code_a - 6))
            space.log_alpha_c.zero_().scatter_(-1, torch.from_numpy(wanted.arch_code_c).unsqueeze(-1), 1.0)
        found = space.architecture(task="Task09_Spleen")
        for key in ("node_a", "arch_code_a", "arch_code_c"):
            np.testing.assert_array_equal(getattr(found, key), getattr(wanted, key))
        np.testing.assert_array_equal(found.arch_code_a_max, wanted.arch_code_a)
        assert found.info.keys() == {"task", "ram_ratio"} and found.info["task"] == "Task09_Spleen"


@cache
def _space_of_5_depths() -> SearchSpace:
    return SearchSpace(num_blocks=3, num_depths=5, channel_mul=1 / 16)  # MONAI's would need minutes and gigabytes


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("space", [lambda: _twins(12, 4)[1], _space_of_5_depths], ids=["12x4", "3x5"])
def test_whatever_is_decoded_is_a_network(space, spread):
    space = space()
    for seed in range(5):
        torch.manual_seed(seed)
        with torch.no_grad():
            alphas = space.log_alpha_a.normal_(-0.3 * spread, spread).numpy()
        architecture = space.architecture()  # checks itself when it is made
        assert isinstance(architecture, Architecture)
        # Paths are independent, so a block's best child is every path above 0, or the highest if none is.
        best = np.where((alphas > 0).any(-1, keepdims=True), alphas > 0, alphas == alphas.max(-1, keepdims=True))
        if spread < 40:  # at 40 more than one child is as good as certain
            np.testing.assert_array_equal(architecture.arch_code_a_max, best)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-4), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("size", [(3, 2), (2, 3), (2, 4)], ids=str)
def test_forward_and_backward(size, dtype, tolerance):
    networks = []
    for space in twins(0, 1.0, *size):
        torch.manual_seed(0)
        networks.append(DiNTS(space, in_channels=2, num_classes=3).to(dtype))
    torch.manual_seed(1)
    image = torch.randn(1, 2, 32, 32, 32, dtype=dtype)
    mix = torch.randn(1, 3, 32, 32, 32, dtype=dtype)
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
    accuracy = 1e-5 if abs(row[0]) < 1000 else 1e-4  # sums of ten numbers near 1000 have no more digits in float32
    torch.testing.assert_close(values["children"].sum(-1), torch.ones(3), rtol=0, atol=accuracy)

    # p / (1 - prod(1 - p)) without cancellation; at -1000 all ten p underflow, each path is as likely as the others.
    alpha = np.array(row)
    p, log_off = 1 / (1 + np.exp(-np.clip(alpha, -700, 700))), -np.logaddexp(0, alpha)
    expected = p / -np.expm1(log_off.sum()) if p.sum() > 1e-300 else np.full(10, 0.1)
    np.testing.assert_allclose(values["paths"][1].detach().numpy(), expected, rtol=1e-4, atol=1e-30)
    for name, value in values.items():
        assert value.isfinite().all(), name
        assert all(gradient.isfinite().all() for gradient in gradients(space, value)), name


def test_state_dict_moves_both_ways():
    size = {"num_blocks": 2, "num_depths": 3, "channel_mul": 1 / 16}
    theirs, ours = (DiNTS(space(**size), 1, 2) for space in (TopologySearch, SearchSpace))
    for source, destination in ((theirs, ours), (ours, theirs)):
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter)
        destination.load_state_dict(source.state_dict(), strict=True)
        for name, value in source.state_dict().items():
            assert torch.equal(destination.state_dict()[name], value), name


def test_it_prints_nothing(capsys):
    SearchSpace(num_blocks=1, num_depths=2, channel_mul=1 / 16).decode()
    assert capsys.readouterr() == ("", "")


def test_everything_follows_to_another_device():
    network = DiNTS(SearchSpace(num_blocks=2, num_depths=3, channel_mul=1 / 16), 1, 2).to("meta")
    assert network(torch.zeros(1, 1, 32, 32, 32, device="meta")).shape == (1, 2, 32, 32, 32)
    for name, value in searched_values(network.dints_space).items():
        assert value.device.type == "meta", name
