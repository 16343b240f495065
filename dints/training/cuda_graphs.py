"""CUDA graphs: a step's kernels are recorded once, and replayed together, so that the GPU does not
wait for launches.

At a batch of one or two patches, a step of these networks is thousands of small kernels, most of
which take less time than the host needs to launch one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from dints.errors import UserError
from dints.running import machine
from dints.running.precision import Precision
from dints.settings import SearchSettings, TrainSettings

WARM_UP = 3  # passes before one is recorded, in which cuDNN sets up what it needs


def check_cuda_graphs(settings: TrainSettings | SearchSettings) -> None:
    """Refuse ``--cuda_graphs`` where there is no GPU."""
    if settings.machine.cuda_graphs and machine.planned_device(settings) != "cuda":
        raise UserError("--cuda_graphs needs a GPU: leave it out")


def recorded(network: nn.Module, image_shape: Sequence[int], precision: Precision) -> nn.Module:
    """Return what computes as ``network`` does in training, forward and backward, by replaying two
    CUDA graphs.

    Parameters are the network's, and so is the state; gradients are those that the network's
    parameters ask for now, so that each set of trainable parameters needs a recording of its own.
    Record before a loader's threads are there, whose calls of CUDA would break into the recording.
    What a step keeps stays allocated between the steps.

    Args:
        image_shape: (batch, channels, *patch_size), of every image that it will be given.
    """
    replaying = _Replaying(network, precision)
    replaying.train()
    image = torch.zeros(tuple(image_shape), device=precision.device)
    return torch.cuda.make_graphed_callables(
        replaying, (image,), num_warmup_iters=WARM_UP, pool=_pool()
    )


@cache
def _pool() -> tuple[int, int]:
    """Return the memory of all of this process's recordings, whose replays take turns."""
    return torch.cuda.graph_pool_handle()


class _Replaying(nn.Module):
    """Has its ``forward`` replaced by PyTorch in place of the network's, which copies and
    validations keep using.
    """

    def __init__(self, network: nn.Module, precision: Precision):
        super().__init__()
        self.network, self.precision = network, precision

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        # Here and not around the recording, whose backward pass would be under autocast too.
        # Without a cache, for the casts have to be part of the recording: the weights change.
        with self.precision.autocast(cache=False):
            return self.network(image)
