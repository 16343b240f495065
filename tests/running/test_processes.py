"""What processes tell each other, tried with threads in their place."""

from __future__ import annotations

import threading

import torch
import torch.distributed as dist

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
