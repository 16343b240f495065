"""Short trainings in real competitions: where memory does not suffice, and widths for a GPU."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import chain
from commands import evolve
from states import assert_equal, rows, without_measured

import evolve_dints
from dints.errors import UserError
from dints.evolution import proposals
from dints.network import arch_file
from dints.network.architecture import load_architecture, save_architecture
from dints.training.steps import WeightsTrainer

MEMORY = pytest.mark.fault("GPU or host memory exhausted")
FLAGS = "--spacing 6 6 6 --memory_mib 2 --num_iterations 4"
LACKING = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.fixture(autouse=True)
def cheap(monkeypatch) -> None:
    """Draw nothing, measure no network's time, and give all candidates one width."""
    monkeypatch.setattr(proposals, "fitting_channel_mul", lambda *_: 5 / 32)
    cost = arch_file.cost
    monkeypatch.setattr(arch_file, "cost", lambda *settings, device=None: cost(*settings))
    monkeypatch.setattr(arch_file, "draw_architecture", lambda *_, **__: None)
    monkeypatch.setattr(evolve_dints, "draw_candidates", lambda _: None)


@pytest.fixture
def before_steps(monkeypatch) -> Callable:
    """Return a function that has candidates' steps call another one first, with their trainer."""
    step = WeightsTrainer.step

    def install(function: Callable[[WeightsTrainer], None]) -> None:
        monkeypatch.setattr(
            WeightsTrainer, "step", lambda weights, batch: (function(weights), step(weights, batch))
        )

    return install


def table(folder: Path) -> list[dict[str, str]]:
    return without_measured(rows(folder / "candidates.csv"))


@MEMORY
def test_a_candidate_that_lacks_memory_is_trained_once_more_with_less(
    phantom, tmp_path, before_steps, monkeypatch, caplog
):
    """To the same result, after all of the first attempt is freed; cuDNN times nothing
    meanwhile.
    """
    plain = evolve(phantom, tmp_path / "plain", FLAGS, "--candidates 2")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    failed = []

    def lack(weights) -> None:
        assert not torch.backends.cudnn.benchmark
        network = weights.network
        if not network.checkpoint_activations:
            failed.append([weakref.ref(one) for one in (network, weights.average, weights)])
            raise RuntimeError(LACKING)
        assert [reference() for reference in failed[-1]] == [None] * 3

    before_steps(lack)
    lacking = evolve(phantom, tmp_path / "lacking", FLAGS, "--candidates 2")
    assert torch.backends.cudnn.benchmark and len(failed) == 2
    assert_equal(table(plain), table(lacking))
    winners = [load_architecture(one / "search_code_winner.pth") for one in (plain, lacking)]
    assert_equal(*(without_measured(winner.to_dict()) for winner in winners))
    again = "it is trained once more, with --checkpoint_activations"
    assert f"by_hand_1 lacks memory ({LACKING}): {again}" in caplog.messages


@MEMORY
def test_one_that_lacks_memory_again_counts_as_0_and_is_not_tried_when_resumed(
    phantom, tmp_path, before_steps, caplog
):
    tried = []

    def lack(weights) -> None:
        tried.append(weights.network.blocks)
        if tried[-1] == tried[0]:  # the first candidate
            raise MemoryError

    before_steps(lack)
    evolve(phantom, tmp_path, FLAGS, "--candidates 4")
    assert tried.count(tried[0]) == 2
    first = table(tmp_path)
    failures = {row["candidate"]: (row["failure"], float(row["dice"])) for row in first}
    assert len(failures) == 4 and failures.pop("by_hand_1") == ("memory", 0)
    assert not any(failure for failure, _ in failures.values())
    assert "by_hand_1 lacks memory (MemoryError): it counts as Dice 0" in caplog.messages
    winner = load_architecture(tmp_path / "search_code_winner.pth")
    assert winner.info["candidate"] != "by_hand_1"
    before = tried.copy()
    evolve(phantom, tmp_path, FLAGS, "--candidates 4")
    assert tried == before and table(tmp_path) == first


@MEMORY
def test_where_none_has_memory_there_is_no_winner_and_other_errors_pass(
    phantom, tmp_path, before_steps
):
    def raising(error: Exception) -> Callable:
        def lack(_weights) -> None:
            raise error

        return lack

    before_steps(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")))
    none = r"none of 1 candidates could be trained \(candidates.csv: memory\): give a smaller"
    with pytest.raises(UserError, match=f"{none} --memory_mib"):
        evolve(phantom, tmp_path / "none", FLAGS, "--candidates 2")
    assert not (tmp_path / "none/search_code_winner.pth").exists()
    before_steps(raising(RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        evolve(phantom, tmp_path / "other", FLAGS, "--candidates 2")


def test_given_architectures_compete_and_others_in_their_place_are_refused(phantom, tmp_path):
    given = [tmp_path / f"search_code_{number}.pth" for number in (1, 2)]
    for path, depths in zip(given, [(0, 1, 0), (0, 0, 0)], strict=True):
        save_architecture(path, chain(*depths, num_depths=2))
    more = "--candidates 4 --arch_ckpt", *given
    evolve(phantom, tmp_path / "run", FLAGS, *more)
    kinds = [row["kind"] for row in table(tmp_path / "run")]
    assert sorted(kinds) == ["given", "given", "mutant", "mutant"]
    moved = [path.rename(path.with_stem(f"moved_{path.stem}")) for path in given]
    evolve(phantom, tmp_path / "run", FLAGS, "--candidates 4 --arch_ckpt", *moved)  # is resumed
    save_architecture(given[0], chain(0, 1, 1, num_depths=2))
    save_architecture(given[1], chain(0, 0, 0, num_depths=2))
    with pytest.raises(UserError, match="belongs to a run with other settings .given changed"):
        evolve(phantom, tmp_path / "run", FLAGS, *more)


def test_on_a_gpu_channels_are_multiples_of_eight_and_stay_so_where_it_is_resumed(
    phantom, tmp_path, monkeypatch, before_steps
):
    assert proposals.CHANNEL_STEP == {"cpu": 1, "cuda": 8}
    monkeypatch.setitem(proposals.CHANNEL_STEP, "cpu", 8)
    monkeypatch.setattr(proposals, "fitting_channel_mul", lambda *_: 13 / 32)
    evolve(phantom, tmp_path, FLAGS, "--candidates 2")
    assert [row["channel_mul"] for row in table(tmp_path)] == ["0.25"] * 2
    assert json.loads((tmp_path / "candidates/settings.json").read_text())["channel_step"] == 8
    monkeypatch.setitem(proposals.CHANNEL_STEP, "cpu", 1)
    before_steps(lambda _: pytest.fail("trained again"))
    evolve(phantom, tmp_path, FLAGS, "--candidates 2")
    assert [row["channel_mul"] for row in table(tmp_path)] == ["0.25"] * 2
