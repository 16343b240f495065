"""Short trainings in real runs: where memory does not suffice, what of a GPU's settings they change, what is freed."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import search
from states import assert_equal, rows, without_measured

import search_dints
from dints import network, training
from dints.evolution import proposals, trainings
from dints.errors import UserError
from dints.network.architecture import load_architecture

MEMORY = pytest.mark.fault("GPU or host memory exhausted")
COMPETING = "--spacing 6 6 6 --memory_mib 2 --candidate_iterations 4"
ALONE = f"{COMPETING} --proposals by_hand random"
LACKING = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.fixture(autouse=True)
def cheap(monkeypatch) -> None:
    """Draw nothing, measure no network's time, and give all candidates one width."""
    monkeypatch.setattr(proposals, "fitting_channel_mul", lambda *_: 5 / 32)
    cost = network.cost.cost
    monkeypatch.setattr(network.cost, "cost", lambda *settings, device=None: cost(*settings))
    monkeypatch.setattr(network.drawing, "draw_architecture", lambda *_, **__: None)
    for name in ("draw_all", "draw_candidates"):
        monkeypatch.setattr(training.curves, name, lambda _: None)


@pytest.fixture
def in_steps(monkeypatch) -> Callable:
    """Return a function that has candidates' steps call another one first, with what they train."""
    step = trainings.weights_step

    def install(function: Callable[[trainings.WeightsTraining], None]) -> None:
        monkeypatch.setattr(trainings, "weights_step", lambda weights, batch: (function(weights), step(weights, batch)))

    return install


def table(folder: Path) -> list[dict[str, str]]:
    return without_measured(rows(folder / "candidates.csv"))


@MEMORY
def test_a_candidate_that_lacks_memory_is_trained_once_more_with_less(phantom, tmp_path, in_steps, monkeypatch, caplog):
    """To the same result, after all that the first attempt held is free; cuDNN times no algorithms meanwhile."""
    plain = search(phantom, tmp_path / "plain", ALONE, "--candidates 2")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    failed = []

    def lack(weights) -> None:
        assert not torch.backends.cudnn.benchmark
        if not weights.network.checkpoint_activations:
            failed.append([weakref.ref(weights.network), weakref.ref(weights.average), weakref.ref(weights.optimizer)])
            raise RuntimeError(LACKING)
        assert [reference() for reference in failed[-1]] == [None] * 3

    in_steps(lack)
    lacking = search(phantom, tmp_path / "lacking", ALONE, "--candidates 2")
    assert torch.backends.cudnn.benchmark and len(failed) == 2
    assert_equal(table(plain), table(lacking))
    states = [load_architecture(folder / "search_code_winner.pth").to_dict() for folder in (plain, lacking)]
    assert_equal(*map(without_measured, states))
    told = f"by_hand_1 lacks memory ({LACKING}): it is trained once more, with --checkpoint_activations"
    assert told in caplog.messages


@MEMORY
def test_one_that_lacks_memory_again_counts_as_0_and_is_not_tried_at_a_continuation(
    phantom, tmp_path, in_steps, caplog
):
    tried = []

    def lack(weights) -> None:
        tried.append(weights.network.blocks)
        if tried[-1] == tried[0]:  # the first candidate
            raise MemoryError

    in_steps(lack)
    search(phantom, tmp_path, ALONE, "--candidates 4")
    assert tried.count(tried[0]) == 2
    of_run = table(tmp_path)
    failures = {row["candidate"]: (row["failure"], float(row["dice"])) for row in of_run}
    assert len(failures) == 4 and failures.pop("by_hand_1") == ("memory", 0)
    assert not any(failure for failure, _ in failures.values())
    result = json.loads((tmp_path / "candidates/by_hand_1/1.json").read_text())
    assert (result["dice"], result["iterations"], result["failure"]) == (0, 1, "memory")
    assert "by_hand_1 lacks memory (MemoryError): it counts as Dice 0" in caplog.messages
    assert load_architecture(tmp_path / "search_code_winner.pth").info["candidate"] != "by_hand_1"
    before = tried.copy()
    search(phantom, tmp_path, ALONE, "--candidates 4")
    assert tried == before and table(tmp_path) == of_run


@MEMORY
def test_where_none_has_memory_there_is_no_winner_and_other_errors_pass(phantom, tmp_path, in_steps):
    def raising(error: Exception) -> Callable:
        def lack(_weights) -> None:
            raise error

        return lack

    in_steps(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")))
    told = r"none of 1 candidates could be trained \(candidates.csv: memory\): give a smaller --memory_mib"
    with pytest.raises(UserError, match=told):
        search(phantom, tmp_path / "none", ALONE, "--candidates 2")
    assert not (tmp_path / "none/search_code_winner.pth").exists()
    in_steps(raising(RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        search(phantom, tmp_path / "other", ALONE, "--candidates 2")


def test_the_supernet_is_gone_when_candidates_train(phantom, tmp_path, monkeypatch, in_steps):
    references, seen = [], []

    class Noted(search_dints.Supernet):
        def __init__(self, *given):
            super().__init__(*given)
            held = [self.network, self.weights, self.weights.optimizer, *self.arch_optimizers]
            references.extend(weakref.ref(one) for one in [*held, *self.weights_parameters])

    monkeypatch.setattr(search_dints, "Supernet", Noted)
    in_steps(lambda _: seen.append([one for reference in references if (one := reference()) is not None]))
    short = "--num_epochs 1 --num_epochs_warmup 0"
    search(phantom, tmp_path, COMPETING, short, "--candidates 2 --proposals gradient random")
    assert len(references) > 100 and seen and not any(seen)
    assert table(tmp_path)


def test_on_a_gpu_channels_are_multiples_of_eight_and_stay_so_wherever_a_run_goes_on(
    phantom, tmp_path, monkeypatch, in_steps
):
    assert proposals.CHANNEL_STEP == {"cpu": 1, "cuda": 8}
    monkeypatch.setitem(proposals.CHANNEL_STEP, "cpu", 8)
    monkeypatch.setattr(proposals, "fitting_channel_mul", lambda *_: 13 / 32)
    search(phantom, tmp_path, ALONE, "--candidates 2")
    assert [row["channel_mul"] for row in table(tmp_path)] == ["0.25"] * 2
    assert json.loads((tmp_path / "candidates/settings.json").read_text())["channel_step"] == 8
    monkeypatch.setitem(proposals.CHANNEL_STEP, "cpu", 1)
    in_steps(lambda _: pytest.fail("trained again"))
    search(phantom, tmp_path, ALONE, "--candidates 2")
    assert [row["channel_mul"] for row in table(tmp_path)] == ["0.25"] * 2
    assert load_architecture(tmp_path / "search_code_winner.pth").channel_mul == 0.25
