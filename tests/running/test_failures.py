"""Errors that PyTorch raises, explained."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import DistBackendError

from dints.data.cases import Prepared
from dints.data.loaders import EpochSampler, TrainingLoader, TrainingSamples
from dints.errors import ProcessLost, UserError
from dints.running.failures import explain
from dints.running.machine import threads
from dints.running.processes import started

CHECKOUT = Path(__file__).resolve().parents[2]
MEMORY = pytest.mark.fault("GPU or host memory exhausted")


FLAGS, DRIVER = "memory is exhausted .*--patch_size.*--num_sw_batch_size", "nvidia-smi.*driver"
NCCL = "NCCL error in: NCCLUtils.cpp:94, unhandled system error\nLast error:\n"
# Messages of RuntimeErrors, and words of their explanation.
RAISED = {
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9": FLAGS,
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED": FLAGS,
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED": FLAGS,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": FLAGS,
    "Caught _ArrayMemoryError in DataLoader worker process 0.\nUnable to allocate 64 GiB": FLAGS,
    "could not create a primitive": "memory is exhausted",  # oneDNN
    # Mostly a lack of memory, but not always.
    "GET was unable to find an engine to execute this computation": DRIVER,
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`": DRIVER,
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED": DRIVER,
    # Other limits of the system.
    "unable to open shared memory object </torch_1_2>: Too many open files (24)": "ulimit -n",
    "unable to allocate shared memory(shm) for file </torch_1_2>: No space left": "--shm-size",
}
ERRORS = [
    *((RuntimeError(text), says) for text, says in RAISED.items()),
    (MemoryError(), FLAGS),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), FLAGS),
    (torch.AcceleratorError("CUDA error: out of memory"), FLAGS),
    (DistBackendError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"), FLAGS),
    (DistBackendError(f"{NCCL}Error: failed to extend /dev/shm/nccl-WU8 to 9 bytes"), "SHM_DISAB"),
    (
        DistBackendError(f"{NCCL}Error while creating segment /dev/shm/nccl-N (size 9)"),
        "--shm-size",
    ),
]


@MEMORY
@pytest.mark.parametrize(("error", "says"), ERRORS, ids=str)
def test_a_limit_of_the_machine_becomes_an_error_with_a_remedy(error, says):
    explained = explain(error, rank=0, world_size=2, store=None, timeout_minutes=1)
    assert isinstance(explained, UserError) and re.search(says, str(explained)), explained
    assert ("nvidia-smi" in str(explained)) == (says == DRIVER)


@MEMORY
def test_memory_that_is_really_exhausted_is_explained():
    with pytest.raises(UserError, match="memory is exhausted .*allocate"), started("cpu"):
        torch.empty(2**60, dtype=torch.uint8)


@MEMORY
def test_threads_that_the_system_refuses_are_told(monkeypatch):
    monkeypatch.setattr(
        "threading.Thread.start", lambda _: (_ for _ in ()).throw(RuntimeError("can't start new"))
    )
    with pytest.raises(UserError, match="3 threads cannot be started: .*ulimit -u"), threads(3):
        pass


@MEMORY
@pytest.mark.parametrize("is_for_gpu", [False, True])
def test_a_batch_that_shared_memory_does_not_hold_is_told_and_not_waited_for(
    monkeypatch, is_for_gpu
):
    """PyTorch's own thread in the worker drops it, and both processes would wait for ever."""

    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device "
            "(28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    case = Prepared(np.zeros((1, 9, 9, 9), np.float16), np.zeros((9, 9, 9), np.uint8), None, None)
    monkeypatch.setattr(
        TrainingSamples,
        "__getitem__",
        lambda *_: (torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), {}, ""),
    )
    samples = TrainingSamples([case], ["a"], [0], (4, 4, 4), 0, "weights")
    loader = TrainingLoader(
        samples, EpochSampler(1, 1, 0, ""), 1, 1, torch.device("meta" if is_for_gpu else "cpu")
    )
    with pytest.raises(UserError, match="a batch does not fit .*shared memory"), started("cpu"):
        next(loader.epoch(0))
    # Its worker ignores the signal by which Python would end it, before waiting for it: a script
    # ends otherwise.
    for worker in multiprocessing.active_children():
        worker.kill()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a bug"), started("cpu"):
        raise RuntimeError("a bug")


@MEMORY
@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=repr
)
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_told(error):
    class Samples(torch.utils.data.Dataset):
        def __getitem__(self, place):
            raise error  # as the main process does then, before the worker counts as dead

        augmented_patches = None

    loader = TrainingLoader(Samples(), EpochSampler(1, 1, 0, ""), 1, 0, torch.device("cpu"))
    with (
        pytest.raises(ProcessLost, match="a process that prepares batches died .*start the same"),
        started("cpu"),
    ):
        next(loader.epoch(0))


@pytest.mark.slow
@pytest.mark.fault("one rank dies or raises")
def test_processes_that_do_not_meet_are_told():
    program = """
        from dints import errors
        from dints.running.processes import started

        def main():
            with started("cpu", timeout_minutes=0.02):
                print("they met")

        errors.exit_on_user_error(main)
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    more = {"env": os.environ | environment, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, cwd=CHECKOUT, **more)
    assert done.returncode == 1 and not done.stdout
    assert (
        "error: [rank 0] the 2 processes of the run do not meet" in done.stderr
        and "Traceback" not in done.stderr
    )
