"""What is told of errors that PyTorch raises."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from dints.data.cases import Prepared
from dints.data.loaders import EpochSampler, TrainingLoader, TrainingSamples
from dints.errors import ProcessLost, UserError
from dints.running.failures import explain
from dints.running.machine import threads
from dints.running.processes import started

CHECKOUT = Path(__file__).resolve().parents[2]
MEMORY = pytest.mark.fault("GPU or host memory exhausted")


@MEMORY
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),  # which a CPU cannot provoke
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "Caught _ArrayMemoryError in DataLoader worker process 0.\nUnable to allocate 64.0 GiB for an array"
        ),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
    ids=["Python", "CPU", "GPU", "CUDA", "cuDNN", "cuBLAS", "NumPy", "NCCL", "cuDNN 9, host", "cuDNN 9, GPU"],
)
def test_exhausted_memory_names_the_flags_that_lower_it(error):
    message = "memory is exhausted .*--patch_size.*--num_sw_batch_size"
    with pytest.raises(UserError, match=message) as told, started("cpu"):
        raise error
    assert "nvidia-smi" not in str(told.value)


@MEMORY
@pytest.mark.parametrize(
    "text",
    [
        "GET was unable to find an engine to execute this computation",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    ],
)
def test_what_is_mostly_a_lack_of_memory_is_told_so_with_what_else_it_may_be(text):
    with pytest.raises(UserError, match="memory is exhausted .*--patch_size.*nvidia-smi.*driver"), started("cpu"):
        raise RuntimeError(text)


@MEMORY
@pytest.mark.parametrize(
    "text",
    [
        "Error: failed to extend /dev/shm/nccl-WU88OE to 9637892 bytes, error: No space left on device (28)",
        "Error while creating shared memory segment /dev/shm/nccl-NzwJ7O (size 9637888)",
    ],
)
def test_nccl_without_shared_memory_is_no_other_process_s_fault(text):
    error = torch.distributed.DistBackendError(
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with NCCL_DEBUG="
        f"INFO for details), NCCL version 2.28.9\nncclSystemError: System call failed. \nLast error:\n{text}"
    )
    told = explain(error, rank=0, world_size=2, store=None, timeout_minutes=1)
    assert isinstance(told, UserError) and "--shm-size" in str(told) and "NCCL_SHM_DISABLE=1" in str(told)


@MEMORY
def test_memory_that_is_really_exhausted_is_told():
    with pytest.raises(UserError, match="memory is exhausted .*allocate"), started("cpu"):
        torch.empty(2**60, dtype=torch.uint8)


@MEMORY
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("could not create a primitive"), "memory is exhausted"),  # oneDNN
        (RuntimeError("unable to open shared memory object </torch_1_2>: Too many open files (24)"), "ulimit -n"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left"), "--shm-size"),
    ],
)
def test_other_limits_of_the_system_are_told(error, told):
    with pytest.raises(UserError, match=told), started("cpu"):
        raise error


@MEMORY
def test_threads_that_the_system_refuses_are_told(monkeypatch):
    monkeypatch.setattr("threading.Thread.start", lambda _: (_ for _ in ()).throw(RuntimeError("can't start new")))
    with pytest.raises(UserError, match="3 threads cannot be started: .*ulimit -u"), threads(3):
        pass


@MEMORY
@pytest.mark.parametrize("is_for_gpu", [False, True])
def test_a_batch_that_shared_memory_does_not_hold_is_told_and_not_waited_for(monkeypatch, is_for_gpu):
    """PyTorch's own thread in the worker drops it, and both processes would wait for ever."""

    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    case = Prepared(np.zeros((1, 9, 9, 9), np.float16), np.zeros((9, 9, 9), np.uint8), None, None)
    monkeypatch.setattr(
        TrainingSamples, "__getitem__", lambda *_: (torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), {}, "")
    )
    samples = TrainingSamples([case], ["a"], [0], (4, 4, 4), 0, "weights")
    loader = TrainingLoader(samples, EpochSampler(1, 1, 0, ""), 1, 1, torch.device("meta" if is_for_gpu else "cpu"))
    with pytest.raises(UserError, match="a batch does not fit .*shared memory"), started("cpu"):
        next(loader.epoch(0))
    # Its worker ignores the signal by which Python would end it, before waiting for it: a script ends otherwise.
    for worker in multiprocessing.active_children():
        worker.kill()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a bug"), started("cpu"):
        raise RuntimeError("a bug")


@MEMORY
@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=repr)
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_told(error):
    class Samples(torch.utils.data.Dataset):
        def __getitem__(self, place):
            raise error  # as the main process does then, before the worker counts as dead

        augmented_patches = None

    loader = TrainingLoader(Samples(), EpochSampler(1, 1, 0, ""), 1, 0, torch.device("cpu"))
    with pytest.raises(ProcessLost, match="a process that prepares batches died .*start the same"), started("cpu"):
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
    assert "error: [rank 0] the 2 processes of the run do not meet" in done.stderr and "Traceback" not in done.stderr
