"""The decoded network with the supernet's weights computes what the supernet does that has decided."""

from __future__ import annotations

import pytest
import torch

from dints.network.inherited import inherited
from dints.network.space import CERTAIN, SearchSpace, supernet


@pytest.mark.parametrize("use_downsample", [True, False])
def test_it_is_the_supernet_whose_probabilities_are_one_and_zero(use_downsample):
    """But for outputs deeper than the architecture's: the supernet's stems make something even of their zeros."""
    torch.manual_seed(0)
    space = SearchSpace(0.125, 3, 3, use_downsample=use_downsample)
    network = supernet(space, 2, 3).double()
    for parameter in network.parameters():
        parameter.data.normal_(1 if parameter.ndim == 1 else 0, 0.3)
    space.log_alpha_a.data[-1, -1] = 9.0  # the last block's path to the deepest node
    architecture = space.architecture()
    found = inherited(network, architecture, 2, 3).double()
    found.load_state_dict(inherited(network, architecture, 2, 3).state_dict())
    space.log_alpha_a.data = CERTAIN * torch.from_numpy(2.0 * architecture.arch_code_a - 1)
    space.log_alpha_c.data = (
        CERTAIN * torch.nn.functional.one_hot(torch.from_numpy(architecture.arch_code_c), 5).double()
    )
    image = torch.randn(1, 2, 32, 32, 16, dtype=torch.float64)
    assert torch.allclose(found(image), network(image), atol=1e-6)


def test_it_takes_copies_and_draws_nothing():
    network = supernet(SearchSpace(0.125, 1, 2), 1, 2)
    before, state = torch.get_rng_state(), {key: value.clone() for key, value in network.state_dict().items()}
    found = inherited(network, network.dints_space.architecture(), 1, 2)
    assert torch.equal(torch.get_rng_state(), before)
    for parameter in found.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
