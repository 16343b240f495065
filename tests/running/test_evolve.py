"""Candidates compete in real runs: however often these stop, and however many ranks, one wins."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from states import assert_equal, rows, without_measured
from theatre import strike

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


def test_it_leaves_a_winner_its_table_and_a_picture(straight):
    table = rows(straight / "candidates.csv")
    assert [int(row["iterations"]) for row in table] == [6] * 5 + [12] * 2
    assert {row["kind"] for row in table} == {"by_hand", "random", "mutant"}
    best_of_last = table[5]
    assert float(best_of_last["dice"]) >= float(table[6]["dice"])
    winner = load_architecture(straight / WINNER)
    assert winner.info["candidate"] == best_of_last["candidate"] and winner.info["memory_mib"] == 1
    assert winner.channel_mul == float(best_of_last["channel_mul"])
    assert (straight / "candidates.png").stat().st_size > 5000


@pytest.mark.fault("kill -9 at any moment")
@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_a_run_that_is_killed_and_asked_to_stop_resumes_to_the_same_winner(
    theatre, straight, tmp_path
):
    killed = theatre.run("evolve", tmp_path, 1, "--save_minutes", 0, fault=strike("step", 4))
    assert killed["codes"] == [-signal.SIGKILL], killed["said"]
    done = theatre.run("evolve", tmp_path, 1, fault=strike("step", 8, "TERM"))
    assert done["codes"] == [128 + signal.SIGTERM], done["said"]
    (line,) = [line for line in done["said"][0].splitlines() if line.startswith("stopped")]
    state = f"stopped after iteration 8, with its state in {tmp_path}/candidates/"
    assert line.startswith(state), line
    theatre.finish("evolve", tmp_path, 1)
    assert_same_winner(straight, tmp_path)


def test_two_ranks_find_what_one_does(theatre, straight, tmp_path):
    theatre.finish("evolve", tmp_path, 2)
    assert_same_winner(straight, tmp_path)
