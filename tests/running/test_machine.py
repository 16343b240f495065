"""Device, precision and seeds."""

from __future__ import annotations

import pytest
import torch
from small_run import ALONE

from dints.errors import UserError
from dints.running import machine, precision
from dints.running.machine import choose_device
from dints.running.precision import choose_precision
from dints.running.seeds import seed_from


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="--device cuda, but PyTorch sees no GPU"):
        choose_device("cuda")


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
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto").type == "cpu"
    (tmp_path / "nvidia0").rename(tmp_path / "nvidiactl")  # of a driver without a GPU
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert choose_device("auto").type == "cpu"


def test_a_gpu_that_is_too_old_for_the_build_is_refused(monkeypatch):
    chosen = []
    for name, answer in (
        ("is_available", True),
        ("device_count", 1),
        ("get_arch_list", ["sm_75", "sm_120", "compute_120"]),
        ("get_device_capability", (7, 0)),
        ("get_device_name", "Tesla V100"),
        ("set_device", None),
    ):
        monkeypatch.setattr(
            torch.cuda, name, lambda *given, answer=answer: chosen.append(given) or answer
        )
    with pytest.raises(
        UserError, match="Tesla V100 has compute capability 7.0, and PyTorch .* built for 7.5"
    ):
        choose_device("auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert choose_device("auto") == torch.device("cuda", 0)


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="--precision fp16 needs a GPU"):
        choose_precision("fp16", ALONE)


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_precision_auto_on_a_cpu_is_the_faster_one(faster, monkeypatch):
    seconds = {"fp32": 2.0, "bf16": 2.0} | {faster: 1.0}
    monkeypatch.setattr(
        precision, "_seconds_of_convolution", lambda candidate: seconds[candidate.name]
    )
    assert choose_precision("auto", ALONE).name == faster


def test_measuring_the_precision_draws_no_random_number():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    choose_precision("auto", ALONE)
    assert torch.equal(torch.rand(1), expected)


def test_seeds_depend_on_every_part_and_on_nothing_else():
    """Nor on the process, whose own hashes differ from run to run: this one's are what an earlier
    process computed.
    """
    parts = (
        (0, "weights", 1, 2),
        (0, "weights", 2, 1),
        (1, "weights", 1, 2),
        (0, "architecture", 1, 2),
    )
    seeds = [seed_from(*of_one) for of_one in parts]
    assert seeds == [3053702576, 2804970809, 556237554, 1346377034]
