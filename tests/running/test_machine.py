"""Device, precision and seeds."""

from __future__ import annotations

import pytest
import torch

from dints.errors import UserError
from dints.running import precision
from dints.running.machine import choose_device
from dints.running.precision import choose_precision
from dints.running.processes import Processes
from dints.running.seeds import seed_from

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="--device cuda, but PyTorch sees no GPU"):
        choose_device("cuda")


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="--precision fp16 needs a GPU"):
        choose_precision("fp16", ALONE)


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_precision_auto_on_a_cpu_is_the_faster_one(faster, monkeypatch):
    seconds = {"fp32": 2.0, "bf16": 2.0} | {faster: 1.0}
    monkeypatch.setattr(precision, "_seconds_of_convolution", lambda candidate: seconds[candidate.name])
    assert choose_precision("auto", ALONE).name == faster


def test_measuring_the_precision_draws_no_random_number():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    choose_precision("auto", ALONE)
    assert torch.equal(torch.rand(1), expected)


def test_seeds_depend_on_every_part_and_on_nothing_else():
    """Nor on the process, whose own hashes differ from run to run: this one's are what an earlier process computed."""
    parts = ((0, "weights", 1, 2), (0, "weights", 2, 1), (1, "weights", 1, 2), (0, "architecture", 1, 2))
    seeds = [seed_from(*of_one) for of_one in parts]
    assert seeds == [3053702576, 2804970809, 556237554, 1346377034]
