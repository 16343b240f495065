"""The machine: its device, its cores and its memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Protocol

import psutil
import torch

from dints import launcher, system
from dints.errors import UserError
from dints.settings import MachineSettings, RunSettings

DEVICES = Path("/dev")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@contextmanager
def threads(number: int) -> Iterator[ThreadPool]:
    """Give a pool of threads, all of which have ended afterwards, whatever happened.

    A plain `ThreadPool` leaves an error without waiting for them; where the program ends at once,
    one that is within PyTorch then aborts it ("terminate called without an active exception").

    Raises:
        UserError: the system does not let this process have so many.
    """
    try:
        pool = ThreadPool(number)
    # the second is Python's, which cannot take back those it started
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"{number} threads cannot be started: raise the limits of this shell or container on "
            "memory and processes (ulimit -v, ulimit -u)"
        ) from error
    try:
        yield pool
    finally:
        pool.terminate()
        pool.join()


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of this process.

    Args:
        name: ``auto`` (CUDA where there is a GPU), ``cuda`` or ``cpu``; each process of a node has
            a GPU of its own.

    Raises:
        UserError: there is no such device, or a GPU that this PyTorch cannot use.
    """
    if device_type(name) == "cpu":
        if name == "auto":
            _refuse_gpu_that_is_not_seen()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but PyTorch sees no GPU: use --device cpu, or install a "
            "CUDA build of PyTorch"
        )
    number = launcher.local_rank()
    if number >= torch.cuda.device_count():
        raise UserError(
            f"process {number} of this node has no GPU: {torch.cuda.device_count()} are visible "
            "(of MIG slices: 1); lower NUM_GPUS_PER_NODE (torchrun --nproc_per_node)"
        )
    _refuse_old_gpu(number)
    torch.cuda.set_device(number)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", number)


def _refuse_gpu_that_is_not_seen() -> None:
    """Raise rather than let a CPU do, for days, what a GPU was bought for."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not any(DEVICES.glob("nvidia[0-9]*")):
        return
    if torch.version.cuda is None:
        why = "is a build without CUDA: run install.sh"
    else:
        why = (
            f"with CUDA {torch.version.cuda} cannot use it, as with a driver that is too old: "
            "see nvidia-smi"
        )
    raise UserError(
        f"this machine has an NVIDIA GPU, and PyTorch {torch.__version__} {why}; or give --device "
        "cpu to do without it"
    )


def _refuse_old_gpu(number: int) -> None:
    built_for = [
        int(name[3:]) for name in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", name)
    ]
    major, minor = torch.cuda.get_device_capability(number)
    if built_for and 10 * major + minor < min(built_for):
        raise UserError(
            f"{torch.cuda.get_device_name(number)} has compute capability {major}.{minor}, and "
            f"PyTorch {torch.__version__} is built for {min(built_for) / 10} and newer: install an "
            "older build of PyTorch, or give --device cpu"
        )


def device_type(name: str) -> str:
    """Return ``cpu`` or ``cuda``: what ``name``, as for `choose_device`, means on this machine."""
    return "cpu" if name == "cpu" or (name == "auto" and not torch.cuda.is_available()) else "cuda"


def planned_device(settings: Planned) -> str:
    """Return ``cpu`` or ``cuda``: on what a script with these settings is to train.

    A dataset that is only checked here may be trained on elsewhere: the device is a CPU if it is
    said to be one.
    """
    name = settings.machine.device
    return device_type("cuda" if settings.run.check and name == "auto" else name)


class Planned(Protocol):
    """The settings of a script, as far as its device depends on them."""

    run: RunSettings
    machine: MachineSettings


def cores_per_process() -> int:
    """Return how many CPU cores this process may use, when the processes of its node share them
    evenly.
    """
    return max(1, system.num_cores() // launcher.local_world_size())


def available_memory() -> int:
    """Return the bytes of this node's memory that can be taken now, within the limit of its
    container.
    """
    available = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            free = int(Path(limit).read_text()) - int(Path(used).read_text())
            cached = re.search(
                r"^(?:total_)?inactive_file (\d+)",
                Path(used).with_name("memory.stat").read_text(),
                re.M,
            )
        except (OSError, ValueError):  # there is no such limit: ValueError is "max"
            continue
        available = min(available, free + (int(cached[1]) if cached else 0))
    return max(0, available)


def check_memory(needed: int, what: str, remedy: str, device: torch.device | None = None) -> None:
    """Raise `UserError` where ``needed`` bytes are more than can be had: all of a GPU's, else what
    is free, with swap.

    Args:
        what: needs them, as the message's beginning.
        device: whose memory is meant; None: this machine's.
    """
    if device is not None and device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = available_memory() + free_swap()
    if needed > there:
        raise UserError(
            f"{what} at least {needed:,} bytes ({gib(needed)}) of memory, and {gib(there)} are to "
            f"be had: {remedy}"
        )


def gib(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / 2**30:.3g} GiB" if count < 1000 * 2**30 else f"{count / 2**30:,.0f} GiB"


def free_swap() -> int:
    """Return the bytes of this node's swap that are free."""
    return psutil.swap_memory().free


def keep_freed_memory() -> None:
    """Let glibc keep blocks of up to 32 MiB that are freed.

    Each step frees and needs the same memory again; by default the system takes it back and clears
    30,000 pages again.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, size in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            ctypes.CDLL(None).mallopt(option, size)


def free_memory() -> None:
    """Give back what nothing refers to any more: networks in circles of references, and what
    PyTorch keeps of a GPU.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.compiler.reset()  # recordings of compiled networks hold memory too
        torch.cuda.empty_cache()
