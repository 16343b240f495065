"""Candidates compete in real runs: however often these are stopped, and however many ranks there are, one wins."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from states import assert_equal, rows, without_measured

from dints.network.architecture import load_architecture

pytestmark = pytest.mark.slow
# After 20 iterations of gradient search: eight trainings of 11 and two of 22.
COMPETING = ["--candidates", 8, "--memory_mib", 1, "--candidate_iterations", 44]
WINNER = "search_code_winner.pth"


@pytest.fixture(scope="module")
def straight(theatre, tmp_path_factory) -> Path:
    """Run a search and a competition that nothing stops."""
    folder = tmp_path_factory.mktemp("straight")
    theatre.finish("search", folder, 1, *COMPETING)
    return folder


def assert_same_winner(straight: Path, other: Path) -> None:
    tables = [without_measured(rows(folder / "candidates.csv")) for folder in (straight, other)]
    assert_equal(*tables)
    states = [without_measured(load_architecture(folder / WINNER).to_dict()) for folder in (straight, other)]
    assert assert_equal(*states) >= 3
    assert not list(other.rglob("*.partial")) and not list((other / "candidates").rglob("latest.pth"))


def strike(place: str, iteration: int, name: str = "KILL") -> dict:
    return {"place": place, "iteration": iteration, "signal": name, "to": "all"}


def test_it_leaves_a_winner_its_table_and_a_picture(theatre, straight):
    table = rows(straight / "candidates.csv")
    assert [int(row["iterations"]) for row in table] == [11] * 8 + [22] * 2
    assert {row["kind"] for row in table} == {"gradient", "by_hand", "random", "mutant"}
    best_of_last = table[8]
    assert float(best_of_last["dice"]) >= float(table[9]["dice"])
    winner = load_architecture(straight / WINNER)
    assert winner.info["candidate"] == best_of_last["candidate"] and winner.info["memory_mib"] == 1
    assert winner.channel_mul == float(best_of_last["channel_mul"])
    assert (straight / "candidates.png").stat().st_size > 5000


def test_the_gradient_search_before_it_is_the_one_without_candidates(theatre, straight):
    without = theatre.straight("search", 1)
    for table in ("loss_history.csv", "accuracy_history.csv"):
        assert_equal(*(without_measured(rows(folder / table)) for folder in (straight, without)))


@pytest.mark.fault("kill -9 at any moment")
@pytest.mark.parametrize("at", [("step", 22), ("validation", 11)])
def test_a_run_that_is_killed_goes_on_to_the_same_winner(theatre, straight, tmp_path, at):
    done = theatre.run("search", tmp_path, 1, *COMPETING, "--save_minutes", 0, fault=strike(*at))
    assert done["codes"] == [-signal.SIGKILL], done["said"]
    theatre.finish("search", tmp_path, 1, *COMPETING)
    assert_same_winner(straight, tmp_path)


@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_a_run_that_is_asked_to_stop_says_where_and_goes_on(theatre, straight, tmp_path):
    """A fresh start, by a launch that starts it again: it is not one the second time."""
    (tmp_path / "candidates").mkdir()
    (tmp_path / "candidates/settings.json").write_text("of another run")
    never, launch = ("--resume", "never"), f"{tmp_path}/logs/run_a/attempt_"
    at = strike("step", 22, "TERM")
    done = theatre.run("search", tmp_path, 1, *COMPETING, *never, fault=at, launch=f"{launch}0")
    assert done["codes"] == [128 + signal.SIGTERM], done["said"]
    (line,) = [line for line in done["said"][0].splitlines() if line.startswith("stopped")]
    assert line.startswith(f"stopped after iteration 22, with its state in {tmp_path}/candidates/"), line
    said = theatre.finish("search", tmp_path, 1, *COMPETING, *never, launch=f"{launch}1")
    assert said.count("continuing after epoch") == 2  # the gradient search, and the training that was stopped
    shutil.rmtree(tmp_path / "before_1")
    assert_same_winner(straight, tmp_path)


def test_two_ranks_find_what_one_does(theatre, tmp_path):
    """Without a gradient search, which depends on their number."""
    winners = []
    for processes in (1, 2):
        theatre.finish("search", tmp_path / str(processes), processes, *COMPETING, "--proposals", "by_hand", "random")
        winners.append(tmp_path / str(processes))
    assert_same_winner(*winners)
    assert not (winners[0] / "latest.pth").exists()


@pytest.mark.fault("GPU or host memory exhausted")
def test_ranks_whose_memory_does_not_suffice_train_with_less(theatre, tmp_path):
    """Each for itself: all first attempts fail, at the same step of each training, and nobody waits for another."""
    few = ["--candidates", 4, "--memory_mib", 1, "--candidate_iterations", 12, "--proposals", "by_hand", "random"]
    theatre.finish("search", tmp_path / "plain", 1, *few)
    fault = {"place": "step that keeps all", "iteration": 2, "signal": "MEMORY", "to": "all"}
    done = theatre.run("search", tmp_path / "lacking", 2, *few, fault=fault)
    assert done["codes"] == [0, 0], done["said"]
    assert sum(said.count("is trained once more, with --checkpoint_activations") for said in done["said"]) == 4
    assert_same_winner(tmp_path / "plain", tmp_path / "lacking")


def test_candidates_may_follow_a_search_that_is_done(theatre, straight, tmp_path):
    theatre.finish("search", tmp_path, 1)
    theatre.finish("search", tmp_path, 1, *COMPETING)
    assert_same_winner(straight, tmp_path)


def test_other_settings_are_refused(theatre, straight):
    done = theatre.run("search", straight, 1, *COMPETING, "--memory_mib", 2)
    assert done["codes"] == [1] and "memory_mib was 1.0 and is 2.0" in done["said"][0], done["said"]
