"""What processes tell each other, tried with threads in their place."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from dints.running import processes as module
from dints.running.processes import Processes


def test_each_waits_until_all_have_come():
    board, order = dist.HashStore(), []
    ranks = [Processes(rank, 3, torch.device("cpu"), board) for rank in range(3)]

    def come(processes: Processes) -> None:
        processes.wait_for_all("here")
        order.append(processes.rank)

    early = [threading.Thread(target=come, args=(processes,)) for processes in ranks[:2]]
    for thread in early:
        thread.start()
    for thread in early:
        thread.join(1.5)
    assert order == []  # the third is not there
    come(ranks[2])
    for thread in early:
        thread.join(10)
    assert sorted(order) == [0, 1, 2]


def test_alone_nobody_is_waited_for():
    Processes(0, 1, torch.device("cpu")).wait_for_all("here")


@pytest.mark.parametrize("name", ["forward_sync_buffers", "broadcast_buffers"])
def test_ddp_of_pytorch_before_and_from_2_13_leaves_buffers_alone(name, monkeypatch):
    """Constants are no matter to exchange in each step; the flag has had another name since
    2.13.
    """
    given = {}
    stand_ins = {
        "forward_sync_buffers": lambda network, *, forward_sync_buffers=None, **_: given.update(
            forward_sync_buffers=forward_sync_buffers
        ),
        "broadcast_buffers": lambda network, *, broadcast_buffers=True, **_: given.update(
            broadcast_buffers=broadcast_buffers
        ),
    }
    monkeypatch.setattr(module, "DistributedDataParallel", stand_ins[name])
    Processes(0, 2, torch.device("cpu")).distributed(torch.nn.Linear(1, 1))
    assert given == {name: False}
