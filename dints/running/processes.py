"""The processes of a run: their ranks, what they tell each other, and how they begin and end."""

from __future__ import annotations

import gc
import inspect
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dints import launcher, system
from dints.running.failures import explain
from dints.running.machine import choose_device, keep_freed_memory

FIRST_TO_GIVE_UP = 0.9  # of the time that a collective waits
SECONDS_BETWEEN_LOOKS = 0.5  # at whether other ranks are there
STOP_SIGNALS = system.signals("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")  # may stop a run


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; without a launcher, the only one."""

    rank: int
    world_size: int
    device: torch.device
    # where each may write, and all may read
    board: dist.Store = field(default_factory=dist.HashStore, compare=False)
    # Of all ranks, for numbers on the CPU; None: the group of all exchanges them.
    cpu_group: dist.ProcessGroup | None = field(default=None, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Machines that the ranks are spread over, evenly."""
        return max(1, self.world_size // launcher.local_world_size())

    def share(self, count: int) -> range:
        """Return this rank's share of ``count`` things: every ``world_size``-th number, from its
        rank on.
        """
        return range(self.rank, count, self.world_size)

    def alone(self) -> Processes:
        """Return this process as if it were the only one."""
        return Processes(0, 1, self.device)

    def gather(self, value: object) -> list:
        """Return every rank's value, a plain one, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def largest(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each of a few numbers over the ranks; no GPU is waited for."""
        if self.world_size == 1:
            return list(values)
        agreed = torch.tensor(values)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.cpu_group)
        return agreed.tolist()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; every rank must call it with the same shape."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def wait_for_all(self, what: str) -> None:
        """Wait until every rank has come here, however long that takes: a collective would give up
        on a slow one.

        Args:
            what: a name that no other place has.
        """
        self.board.add(what, 1)
        while self.board.add(what, 0) < self.world_size:
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def wait_for_device(self) -> None:
        """Wait until a GPU has done all that it was given; a CPU has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each parameter's gradient by its mean over the ranks, all in one message."""
        flat = (
            self.sum(torch.cat([parameter.grad.flatten() for parameter in parameters]))
            / self.world_size
        )
        for parameter, mean in zip(
            parameters, flat.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.grad.copy_(mean.view_as(parameter))

    def distributed(self, network: nn.Module) -> nn.Module:
        """Return the network under DDP, which averages the gradients of what is trainable now;
        alone, itself.
        """
        if self.world_size == 1:
            return network
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Not batched_grad_copy, which would copy gradients in one call a bucket: with PyTorch 2.13
        # and gloo, two of four trainings of two processes came to weights that are not finite.
        how = {"device_ids": device_ids, "gradient_as_bucket_view": True}
        # Buffers are the same constants on all ranks. Before 2.13 its flag also skips their
        # exchange at the start.
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        return DistributedDataParallel(
            network, **how, **{"forward_sync_buffers" if new else "broadcast_buffers": False}
        )

    def on_main(self, function: Callable, *args, **keywords):
        """Call ``function`` on rank 0 and return its result on every rank; where it raises, every
        rank leaves.
        """
        if self.world_size == 1:
            return function(*args, **keywords)
        outcome = [None, True]
        try:
            if self.is_main:
                outcome = [function(*args, **keywords), False]
        finally:
            dist.broadcast_object_list(
                outcome, src=0, device=self.device if self.device.type == "cuda" else None
            )
        result, failed = outcome
        if failed:
            sys.exit(1)  # rank 0 says why
        return result


@contextmanager
def started(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[Processes]:
    """Join the processes that the launcher started.

    Args:
        device: as for `choose_device`.
        timeout_minutes: how long a collective waits for a rank that does not answer.
    """
    launcher.stop_with_launcher()
    keep_freed_memory()
    start_logging()
    processes = Processes(launcher.rank(), launcher.world_size(), choose_device(device))
    store = None
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        if processes.world_size > 1:
            store = _join(processes, timeout_minutes)
            processes = replace(
                processes,
                board=dist.PrefixStore("board", store),
                cpu_group=_cpu_group(timeout_minutes),
            )
        yield processes
    except (MemoryError, RuntimeError) as error:
        system.forget_children()
        explained = explain(error, processes.rank, processes.world_size, store, timeout_minutes)
        if explained is None:
            raise
        raise explained from error
    else:
        if store is not None:
            # DDP refers to itself: what it holds of the group would outlive Python, which aborts at
            # times
            gc.collect()
            dist.destroy_process_group()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _join(processes: Processes, timeout_minutes: float) -> dist.Store:
    """Make the group of all processes; return the store at which they met."""
    backend, timeout = (
        "nccl" if processes.device.type == "cuda" else "gloo",
        timedelta(minutes=timeout_minutes),
    )
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


def _cpu_group(timeout_minutes: float) -> dist.ProcessGroup | None:
    """Make a group of all ranks for numbers on the CPU, where the group of all is one of GPUs.

    It is the first to give up on a rank: its error can be explained, and NCCL's watchdog ends the
        process.
    """
    if dist.get_backend() == "gloo":
        return None
    return dist.new_group(
        backend="gloo", timeout=timedelta(minutes=FIRST_TO_GIVE_UP * timeout_minutes)
    )


def start_logging() -> None:
    """Log to stderr; ranks above 0 tell only what is wrong."""
    rank = launcher.rank()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s"
        if launcher.world_size() == 1
        else f"%(asctime)s [rank {rank}] %(message)s",
        datefmt="%H:%M:%S",
    )
