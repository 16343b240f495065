"""Precisions: fp32, bf16 and fp16 on one path, and which of them is the fastest here."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from dints.errors import UserError
from dints.running.processes import Processes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """One path for every precision: in fp32 autocast does nothing, and outside fp16 the scaler does
    nothing.
    """

    name: str
    device: torch.device

    def autocast(self, cache: bool = True) -> torch.autocast:
        """Return the context that networks compute in; with ``cache``, a weight that is used twice
        is cast once.
        """
        dtype = torch.float16 if self.name == "fp16" else torch.bfloat16
        return torch.autocast(
            self.device.type, dtype=dtype, enabled=self.name != "fp32", cache_enabled=cache
        )

    def describe(self, processes: Processes) -> str:
        """Tell people what computes, and in which precision."""
        tf32 = (
            self.name == "fp32" and self.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        )
        return (
            f"{processes.world_size} x {self.device.type} in "
            f"{self.name}{', convolutions in TF32' * tf32}"
        )

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def choose_precision(name: str, processes: Processes) -> Precision:
    """Return the precision called ``name``; ``auto`` is the fastest that trains like fp32 on this
    device.

    On CUDA that is bf16 where the GPU computes it, else fp16. On a CPU it is measured: processors
    with bf16 matrix instructions are several times faster with it, the others many times slower.
    """
    device_type = processes.device.type
    native_bf16 = device_type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto" and device_type == "cuda":
        name = "bf16" if native_bf16 else "fp16"
    elif name == "auto":
        name = processes.on_main(_faster_on_cpu)
    if name == "fp16" and device_type == "cpu":
        raise UserError("--precision fp16 needs a GPU: use bf16, fp32 or auto on a CPU")
    if name == "bf16" and not native_bf16:
        raise UserError(
            "--precision bf16, but this GPU does not compute it: use fp16, fp32 or auto"
        )
    return Precision(name, processes.device)


def _faster_on_cpu() -> str:
    """Return which of fp32 and bf16 takes less time forward and backward through a convolution like
    the network's.
    """
    seconds = {
        name: _seconds_of_convolution(Precision(name, torch.device("cpu")))
        for name in ("fp32", "bf16")
    }
    log.info(
        "CPU convolution: fp32 %.1f ms, bf16 %.1f ms", 1e3 * seconds["fp32"], 1e3 * seconds["bf16"]
    )
    return min(seconds, key=seconds.get)


def _seconds_of_convolution(precision: Precision, repeats: int = 3) -> float:
    with torch.random.fork_rng(devices=[]):
        convolution = torch.nn.Conv3d(16, 16, 3, padding=1)
        # Two samples: for a single small one PyTorch does not use oneDNN in fp32.
        image = torch.randn(2, 16, 16, 16, 16)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with precision.autocast():
            loss = convolution(image).sum()
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
