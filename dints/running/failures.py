"""What a person can do about an error that PyTorch raises: memory, workers and other processes that
are lost.
"""

from __future__ import annotations

import re
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from dints.errors import ProcessLost, UserError

SECONDS_TO_MEET = 5  # in which ranks find out that one is missing, after each other
# They mean a lack of memory in most cases, and else a driver or library that does not fit.
UNCLEAR = (
    "unable to find an engine",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
)
AGAIN = "died or hangs, and its own messages may say why; start the same command again"


def explain(
    error: Exception, rank: int, world_size: int, store: dist.Store | None, timeout_minutes: float
) -> UserError | ProcessLost | None:
    """Return what a person can do about an error of PyTorch's; None for any other.

    Args:
        store: where the processes of the run met; None before they did.
        timeout_minutes: how long a collective waits for a rank.
    """
    what = str(error).splitlines()[0].strip() if str(error) else "of this machine"
    if "/shm/nccl-" in str(error):
        return UserError(
            "GPUs find too little shared memory (/dev/shm) to exchange data: give a container more "
            "(docker run --ipc=host, or --shm-size=1g), or set NCCL_SHM_DISABLE=1, which is slower"
        )
    if lacks_memory(error):
        return UserError(
            f"memory is exhausted ({what}): lower --patch_size, --num_images_per_batch, "
            "--channel_mul, of candidates --memory_mib, or in validation --num_sw_batch_size; give "
            "--checkpoint_activations; for the machine's memory also lower --num_workers, or use "
            "--cache disk"
            + (
                "; where nvidia-smi shows much free memory, the driver or cuDNN does not fit this "
                "PyTorch"
            )
            * any(sign in what for sign in UNCLEAR)
        )
    if "Too many open files" in str(error):
        return UserError(
            "too many files are open: raise the limit (ulimit -n 4096), or lower --num_workers"
        )
    if "</torch_" in str(error):  # as PyTorch's shared memory is called
        return UserError(
            "a batch does not fit into what is left of shared memory (/dev/shm): give a container "
            "more (docker run --ipc=host, or --shm-size), or lower --num_workers (0 needs none) or "
            "--patch_size"
        )
    if "DataLoader worker (pid" in what:
        return ProcessLost(
            f"a process that prepares batches died ({what}): if for want of memory, lower "
            "--num_workers, use --cache disk, or give a container more shared memory (docker run "
            "--ipc=host); then start the same command again"
        )
    if world_size > 1 and (isinstance(error, dist.DistError) or "/gloo/" in what):
        return _lost_rank(what, rank, world_size, store, timeout_minutes)
    return None


def _lost_rank(
    what: str, rank: int, world_size: int, store: dist.Store | None, timeout_minutes: float
) -> ProcessLost:
    """Tell what is known of the rank because of which a collective failed, as ``what`` says."""
    what = re.sub(r"\[\S*/gloo/\S*\] ", "", what.split(". This is")[0])
    if store is None:
        return ProcessLost(
            f"the {world_size} processes of the run do not meet ({what}): one {AGAIN}"
        )
    if not re.search("time[d ]*out", what, re.IGNORECASE):
        return ProcessLost(f"the connection to another process broke ({what}): it {AGAIN}")
    try:  # those that wait for it meet at the store; the store may be what does not answer
        store.set_timeout(timedelta(seconds=SECONDS_TO_MEET))
        store.set(f"waits/{rank}", "")
        time.sleep(SECONDS_TO_MEET)
        absent = [other for other in range(world_size) if not store.check([f"waits/{other}"])]
    except dist.DistError:
        absent = [0]
    names = ", ".join(map(str, absent)) or "one of the others"
    return ProcessLost(
        f"rank {names} did not answer for --timeout_minutes {timeout_minutes:g}: it {AGAIN}"
    )


def lacks_memory(error: Exception) -> bool:
    """Tell whether an error means that the memory of the machine or of a GPU is exhausted,
    whichever library says it.

    CUDA and NCCL say "out of memory", cuDNN and cuBLAS ..._STATUS_ALLOC_FAILED, cuDNN 9
    ..._HOST_ALLOCATION_FAILED and ..._DEVICE_ALLOCATION_FAILED, NumPy in a worker "Unable to
    allocate". `UNCLEAR` is what is left to say where cuDNN finds no room for the work space of any
    algorithm, and cuDNN or cuBLAS none to begin.
    """
    signs = (
        "DefaultCPUAllocator",
        "not enough memory",
        "Cannot allocate memory",
        "can't allocate memory",
    )
    signs += (
        "out of memory",
        "_STATUS_ALLOC_FAILED",
        "_ALLOCATION_FAILED",
        "Unable to allocate",
        *UNCLEAR,
    )
    if str(error).strip() == "could not create a primitive":  # oneDNN
        return True
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in str(error) for sign in signs
    )
