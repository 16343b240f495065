"""The process and its machine: ranks, device, memory, precision, seeds and the run folder.

Nothing else in the project asks for the rank or reads a launcher's environment variables.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import logging
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dints.errors import ProcessLost, UserError

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)  # may stop a run
SECONDS_TO_MEET = 5  # in which ranks find out that one is missing, after each other
AGAIN = "died or hangs, and its own messages may say why; start the same command again"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; without a launcher, the only one."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: object) -> list:
        """Every rank's value, a plain one, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=_cpu_group())
        return values

    def agree(self, values: torch.Tensor) -> torch.Tensor:
        """Largest over the ranks of a few numbers on the CPU, in place; no GPU is waited for."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=_cpu_group())
        return values

    @property
    def num_nodes(self) -> int:
        """Machines that the ranks are spread over, evenly."""
        return max(1, self.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; every rank must call it with the same shape."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def min(self, values: torch.Tensor) -> torch.Tensor:
        """Smallest over the ranks, in place; every rank must call it with the same shape."""
        if self.world_size > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def on_main(self, function: Callable, *args):
        """Call ``function`` on rank 0 and return its result on every rank; where it raises, every rank leaves."""
        if self.world_size == 1:
            return function(*args)
        outcome = [None, True]
        try:
            if self.is_main:
                outcome = [function(*args), False]
        finally:
            dist.broadcast_object_list(outcome, src=0, device=self.device if self.device.type == "cuda" else None)
        result, failed = outcome
        if failed:
            sys.exit(1)  # rank 0 says why
        return result


@cache
def _cpu_group() -> dist.ProcessGroup | None:
    """Ranks that exchange numbers on the CPU; None where the group of all does so."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


@contextmanager
def started(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[Processes]:
    """Join the processes that the launcher started (torchrun's RANK, WORLD_SIZE, LOCAL_RANK).

    Args:
        device: ``auto`` (CUDA where there is a GPU), ``cuda`` or ``cpu``.
        timeout_minutes: how long a collective waits for a rank that does not answer.
    """
    _keep_freed_memory()
    rank, world_size = start_logging()
    UserError.where = f"[rank {rank}] " if world_size > 1 else ""
    processes = Processes(rank, world_size, _device(device, int(os.environ.get("LOCAL_RANK", 0))))
    store = None
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        if world_size > 1:
            store = _join(processes, timeout_minutes)
        yield processes
    except (MemoryError, RuntimeError) as error:
        explained = _explain(error, processes, store, timeout_minutes)
        if explained is None:
            raise
        raise explained from error
    else:
        if store is not None:
            gc.collect()  # DDP refers to itself: what it holds of the group would outlive Python, which aborts at times
            dist.destroy_process_group()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _join(processes: Processes, timeout_minutes: float) -> dist.Store:
    """Make the group of all processes; returns the store at which they met."""
    backend, timeout = "nccl" if processes.device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        backend,
        store=store,
        rank=processes.rank,
        world_size=processes.world_size,
        timeout=timeout,
        device_id=processes.device if backend == "nccl" else None,
    )
    return store


def _explain(
    error: Exception, processes: Processes, store: dist.Store | None, timeout_minutes: float
) -> UserError | ProcessLost | None:
    """What a person can do about an error of PyTorch's; None for any other."""
    what = str(error).splitlines()[0].strip() if str(error) else "of this machine"
    if _is_lack_of_memory(error):
        return UserError(
            f"memory is exhausted ({what}): lower --patch_size, --num_images_per_batch, --channel_mul, or in "
            "validation --num_sw_batch_size; for the machine's memory also --num_workers, or use --cache disk"
        )
    if "DataLoader worker (pid" in what:
        return ProcessLost(
            f"a process that prepares batches died ({what}): if for want of memory, lower --num_workers, use --cache "
            "disk, or give a container more shared memory (docker run --ipc=host); then start the same command again"
        )
    if processes.world_size > 1 and (isinstance(error, dist.DistError) or "/gloo/" in what):
        return _lost_rank(what, processes, store, timeout_minutes)
    return None


def _lost_rank(what: str, processes: Processes, store: dist.Store | None, timeout_minutes: float) -> ProcessLost:
    """What is known of the rank because of which a collective failed, as ``what`` says."""
    what = re.sub(r"\[\S*/gloo/\S*\] ", "", what.split(". This is")[0])
    if store is None:
        return ProcessLost(f"the {processes.world_size} processes of the run do not meet ({what}): one {AGAIN}")
    if not re.search("time[d ]*out", what, re.IGNORECASE):
        return ProcessLost(f"the connection to another process broke ({what}): it {AGAIN}")
    try:  # those that wait for it meet at the store; the store may be what does not answer
        store.set_timeout(timedelta(seconds=SECONDS_TO_MEET))
        store.set(f"waits/{processes.rank}", "")
        time.sleep(SECONDS_TO_MEET)
        absent = [rank for rank in range(processes.world_size) if not store.check([f"waits/{rank}"])]
    except dist.DistError:
        absent = [0]
    names = ", ".join(map(str, absent)) or "one of the others"
    return ProcessLost(f"rank {names} did not answer for --timeout_minutes {timeout_minutes:g}: it {AGAIN}")


def _is_lack_of_memory(error: Exception) -> bool:
    signs = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in signs)


def start_logging() -> tuple[int, int]:
    """Log to stderr, on ranks above 0 only what is wrong; returns rank and number of ranks."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if world_size == 1 else f"%(asctime)s [rank {rank}] %(message)s",
        datefmt="%H:%M:%S",
    )
    return rank, world_size


def _keep_freed_memory() -> None:
    """Let glibc keep blocks of up to 32 MiB that are freed.

    Each step frees and needs the same memory again; by default the system takes it back and clears 30,000 pages anew.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, size in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            ctypes.CDLL(None).mallopt(option, size)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no GPU: use --device cpu, or install a CUDA build of PyTorch")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} are visible; "
            "lower NUM_GPUS_PER_NODE (torchrun --nproc_per_node)"
        )
    torch.cuda.set_device(local_rank)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", local_rank)


def cores_per_process() -> int:
    """CPU cores that this process may use, when the processes of its node share them evenly."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def available_memory() -> int:
    """Bytes of this node's memory that can be taken now, within the limit of its container."""
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = 1024 * int(fields["MemAvailable"].split()[0])
    except FileNotFoundError:  # not Linux, where half of the memory is taken to be free
        return os.sysconf("SC_PHYS_PAGES") * page // 2
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = int(Path(limit).read_text()) - int(Path(used).read_text())
            cached = re.search(
                r"^(?:total_)?inactive_file (\d+)", Path(used).with_name("memory.stat").read_text(), re.M
            )
        except (OSError, ValueError):  # there is no such limit: ValueError is "max"
            continue
        available = min(available, free + (int(cached[1]) if cached else 0))
    return max(0, available)


@dataclass(frozen=True)
class Precision:
    """One path for every precision: in fp32 autocast does nothing, and outside fp16 the scaler does nothing."""

    name: str
    device: torch.device

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.name == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def choose_precision(name: str, processes: Processes) -> Precision:
    """The precision called ``name``; ``auto`` is the fastest that trains like fp32 on this device.

    On CUDA that is bf16 where the GPU computes it, else fp16. On a CPU it is measured: processors with bf16 matrix
    instructions are several times faster with it, the others many times slower.
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
        raise UserError("--precision bf16, but this GPU does not compute it: use fp16, fp32 or auto")
    return Precision(name, processes.device)


def _faster_on_cpu() -> str:
    """fp32 or bf16, whichever takes less time forward and backward through a convolution of the network's kind."""
    seconds = {name: _seconds_of_convolution(Precision(name, torch.device("cpu"))) for name in ("fp32", "bf16")}
    log.info("CPU convolution: fp32 %.1f ms, bf16 %.1f ms", 1e3 * seconds["fp32"], 1e3 * seconds["bf16"])
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


def seed_from(*parts: int | str) -> int:
    """A seed (32 bits) that depends on all of ``parts`` and on nothing else: not on rank count, worker or history."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def seed_everything(*parts: int | str) -> None:
    """Seed the global generators, so that what is not seeded sample by sample is reproducible too."""
    seed = seed_from(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed)


@contextmanager
def run_folder(path: str | Path, processes: Processes) -> Iterator[Path]:
    """Make, probe and lock ``--output_root``; a second run in the same folder is refused until this one ends."""

    def open_folder() -> None:
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            lock = os.open(Path(path) / ".lock", os.O_RDWR | os.O_CREAT)
            locks.callback(_unlock, lock)
            _locks.add(lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for partial in Path(path).glob(".*.partial"):  # of a run that was killed while it wrote: the lock is ours
                partial.unlink()
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing into {path}: wait for it, or give another --output_root"
            ) from error
        except OSError as error:
            raise UserError(f"--output_root {path} cannot be written: {error.strerror}") from error

    with ExitStack() as locks:
        processes.on_main(open_folder)
        yield Path(path)


_locks: set[int] = set()  # file descriptors of this process


def _unlock(lock: int) -> None:
    _locks.discard(lock)
    os.close(lock)


# A worker shares its parent's lock, and would hold it for some seconds after the parent was killed.
os.register_at_fork(after_in_child=lambda: [_unlock(lock) for lock in list(_locks)])


def distributed(network: torch.nn.Module, processes: Processes) -> torch.nn.Module:
    """The network under DDP, which averages the gradients of what is trainable now; alone, the network itself."""
    if processes.world_size == 1:
        return network
    device_ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(
        network, device_ids=device_ids, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
