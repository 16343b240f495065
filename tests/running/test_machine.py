"""Device, precision, seeds, and processes that wait for each other."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
from small_run import ALONE, CPU

from dints.errors import UserError
from dints.running import machine, precision
from dints.running.machine import choose_device
from dints.running.precision import choose_precision
from dints.running.processes import Processes
from dints.running.seeds import seed_from


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_needs_a_gpu_is_refused_without_one():
    with pytest.raises(UserError, match="--device cuda, but PyTorch sees no GPU"):
        choose_device("cuda")
    with pytest.raises(UserError, match="--precision fp16 needs a GPU"):
        choose_precision("fp16", ALONE)


@pytest.mark.parametrize(
    ("cuda", "why"),
    [(None, "is a build without CUDA: run install.sh"), ("13.0", "a driver that is too old")],
)
def test_a_gpu_that_pytorch_does_not_see_is_not_done_without_silently(
    cuda, why, tmp_path, monkeypatch
):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=f"has an NVIDIA GPU, and PyTorch .* {why}.*--device cpu"):
        choose_device("auto")
    assert choose_device("cpu") == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto") == CPU
    (tmp_path / "nvidia0").rename(tmp_path / "nvidiactl")  # of a driver without a GPU
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert choose_device("auto") == CPU


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_precision_auto_on_a_cpu_is_the_faster_one(faster, monkeypatch):
    seconds = {"fp32": 2.0, "bf16": 2.0} | {faster: 1.0}
    monkeypatch.setattr(precision, "_seconds_of_convolution", lambda one: seconds[one.name])
    assert choose_precision("auto", ALONE).name == faster


def test_measuring_the_precision_draws_no_random_number():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    choose_precision("auto", ALONE)
    assert torch.equal(torch.rand(1), expected)


def test_seeds_depend_on_every_part_and_not_on_the_process():
    """Whose own hashes differ from run to run: these are what an earlier process computed."""
    parts = (0, "weights", 1, 2), (0, "weights", 2, 1), (1, "weights", 1, 2)
    assert [seed_from(*one) for one in parts] == [3053702576, 2804970809, 556237554]


def test_each_waits_until_all_have_come():
    """Threads stand for processes."""
    ALONE.wait_for_all("here")
    board, order = dist.HashStore(), []
    ranks = [Processes(rank, 3, CPU, board) for rank in range(3)]

    def come(processes: Processes) -> None:
        processes.wait_for_all("here")
        order.append(processes.rank)

    early = [threading.Thread(target=come, args=(processes,)) for processes in ranks[:2]]
    for thread in early:
        thread.start()
    early[0].join(0.7)
    assert order == []  # the third is not there
    come(ranks[2])
    for thread in early:
        thread.join(10)
    assert sorted(order) == [0, 1, 2]
