"""Candidates compete in real runs: however often these stop, and however many ranks, one wins."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from states import assert_equal, rows, without_measured
from theatre import Theatre

from dints.network.architecture import load_architecture

pytestmark = pytest.mark.slow
WINNER = "search_code_winner.pth"


@pytest.fixture(scope="module")
def straight(theatre) -> Path:
    """Return the folder of a competition that nothing stops."""
    return theatre.straight("evolve", 1)


def assert_same_winner(straight: Path, other: Path) -> None:
    tables = [without_measured(rows(folder / "candidates.csv")) for folder in (straight, other)]
    assert_equal(*tables)
    winners = [load_architecture(folder / WINNER).to_dict() for folder in (straight, other)]
    assert assert_equal(*map(without_measured, winners)) >= 3
    assert not list(other.rglob("*.partial")) and not list(other.rglob("latest.pth"))


def strike(place: str, iteration: int, name: str = "KILL") -> dict:
    return {"place": place, "iteration": iteration, "signal": name, "to": "all"}


def test_it_leaves_a_winner_its_table_and_a_picture(straight):
    table = rows(straight / "candidates.csv")
    assert [int(row["iterations"]) for row in table] == [11] * 8 + [22] * 2
    assert {row["kind"] for row in table} == {"by_hand", "random", "mutant"}
    best_of_last = table[8]
    assert float(best_of_last["dice"]) >= float(table[9]["dice"])
    winner = load_architecture(straight / WINNER)
    assert winner.info["candidate"] == best_of_last["candidate"] and winner.info["memory_mib"] == 1
    assert winner.channel_mul == float(best_of_last["channel_mul"])
    assert (straight / "candidates.png").stat().st_size > 5000


@pytest.mark.fault("kill -9 at any moment")
@pytest.mark.parametrize("at", [("step", 22), ("validation", 11)])
def test_a_run_that_is_killed_resumes_to_the_same_winner(theatre, straight, tmp_path, at):
    done = theatre.run("evolve", tmp_path, 1, "--save_minutes", 0, fault=strike(*at))
    assert done["codes"] == [-signal.SIGKILL], done["said"]
    theatre.finish("evolve", tmp_path, 1)
    assert_same_winner(straight, tmp_path)


@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_a_run_that_is_asked_to_stop_says_where_and_resumes(theatre, straight, tmp_path):
    """A fresh start, by a launch that starts it again: it is not one the second time."""
    (tmp_path / "candidates").mkdir()
    (tmp_path / "candidates/settings.json").write_text("of another run")
    never, launch = ("--resume", "never"), f"{tmp_path}/logs/run_a/attempt_"
    at = strike("step", 22, "TERM")
    done = theatre.run("evolve", tmp_path, 1, *never, fault=at, launch=f"{launch}0")
    assert done["codes"] == [128 + signal.SIGTERM], done["said"]
    (line,) = [line for line in done["said"][0].splitlines() if line.startswith("stopped")]
    state = f"stopped after iteration 22, with its state in {tmp_path}/candidates/"
    assert line.startswith(state), line
    said = theatre.finish("evolve", tmp_path, 1, *never, launch=f"{launch}1")
    assert said.count("continuing after epoch") == 1
    shutil.rmtree(tmp_path / "before_1")
    assert_same_winner(straight, tmp_path)


def test_two_ranks_find_what_one_does(theatre, straight, tmp_path):
    theatre.finish("evolve", tmp_path, 2)
    assert_same_winner(straight, tmp_path)


@pytest.mark.fault("GPU or host memory exhausted")
def test_ranks_whose_memory_does_not_suffice_train_with_less(theatre: Theatre, tmp_path):
    """Each for itself: all first attempts fail at the same step, and nobody waits for another."""
    few = ["--candidates", 4, "--num_iterations", 12]
    theatre.finish("evolve", tmp_path / "plain", 1, *few)
    fault = strike("step that keeps all", 2, "MEMORY")
    done = theatre.run("evolve", tmp_path / "lacking", 2, *few, fault=fault)
    assert done["codes"] == [0, 0], done["said"]
    again = "is trained once more, with --checkpoint_activations"
    assert sum(said.count(again) for said in done["said"]) == 4
    assert_same_winner(tmp_path / "plain", tmp_path / "lacking")


def test_other_settings_are_refused(theatre, straight):
    done = theatre.run("evolve", straight, 1, "--memory_mib", 2)
    assert done["codes"] == [1] and "memory_mib was 1.0 and is 2.0" in done["said"][0], done["said"]
