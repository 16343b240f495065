"""What `torch.compile` makes of a network, without a compiler."""

from __future__ import annotations

import torch
from torch import nn


def assert_one_graph(network: nn.Module, image: torch.Tensor) -> None:
    """Have Dynamo trace the network, which `fullgraph` forbids breaks all the same, and use the
    result.
    """
    graphs = []
    compiled = torch.compile(
        network,
        fullgraph=True,
        dynamic=False,
        backend=lambda graph, _: graphs.append(graph) or graph,
    )
    torch.testing.assert_close(compiled(image), network(image), rtol=1e-4, atol=1e-5)
    compiled(image).sum().backward()
    assert len(graphs) == 1
    assert all(parameter.grad is not None for parameter in network.parameters())
