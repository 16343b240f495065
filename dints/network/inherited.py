"""The decoded network with the supernet's weights: what the search would give without a retraining."""

from __future__ import annotations

import re

import torch
from monai.networks.nets.dints import DiNTS

from dints.network.architecture import Architecture
from dints.network.found import FoundNetwork

OPERATION = re.compile(r"(dints_space\.cell_tree\.\((\d+), (\d+)\)\.op\.ops\.)0(\..*)")  # block, path; its weights


def inherited(supernet: DiNTS, architecture: Architecture, in_channels: int, num_classes: int) -> FoundNetwork:
    """Build the network of ``architecture``, decoded from the supernet's space, with the supernet's weights.

    Each path takes those of its operation. Paths and operations counted by their probabilities before, and count fully
    now: the normalisations' weights have grown in a mixture, so that the network scores below what it can.
    """
    weights = supernet.state_dict()
    size = in_channels, num_classes, supernet.dints_space.channel_mul
    with torch.random.fork_rng(devices=[]):  # its own initial weights do not matter
        network = FoundNetwork(architecture, *size)
    network.to(next(supernet.parameters()).device)
    network.load_state_dict({key: weights[_key_of_supernet(key, architecture)] for key in network.state_dict()})
    return network


def _key_of_supernet(key: str, architecture: Architecture) -> str:
    place = OPERATION.fullmatch(key)
    if place is None:
        return key
    opening, block, path, rest = place.groups()
    return f"{opening}{architecture.arch_code_c[int(block), int(path)]}{rest}"
