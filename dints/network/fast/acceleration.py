"""The one call that makes a plain network fast."""

from __future__ import annotations

from monai.networks.nets.dints import TopologySearch
from torch import nn

from dints.network.fast.layers import accelerate_layer
from dints.network.fast.mixing import JointMixing, mixing_jointly


def accelerate(network: nn.Module) -> nn.Module:
    """Return ``network`` itself, its layers and its `SearchSpace` computing in faster ways.

    Only their classes change. Parameters and state dict stay, and so do the results but for
    rounding.
    """
    for module in network.modules():
        if not isinstance(module, TopologySearch):
            accelerate_layer(module)
        elif not isinstance(module, JointMixing):
            module.__class__ = mixing_jointly(type(module))
    return network
