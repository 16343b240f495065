"""Rungs, who reaches the next one, and results that are kept and shared out."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from architectures import chain
from small_run import CPU

from dints.errors import Stopped, UserError
from dints.evolution import trainings
from dints.evolution.halving import Ledger, Rung, best, open_folder, rungs
from dints.evolution.proposals import Candidate
from dints.evolution.trainings import Result, divided
from dints.running.processes import Processes
from dints.running.tables import read_rows

BF16, FP32 = {"precision": "bf16", "channel_step": 8}, {"precision": "fp32", "channel_step": 1}
CHAIN = chain(0, 0, num_depths=2)
CANDIDATES = [Candidate(f"random_{number}", "random", CHAIN, 0.5) for number in range(6)]


class Signal:
    """Stands for the signal by which this process was, or was not, asked to stop."""

    received: int | None = None


class Trainings:
    """Stands for trainings whose Dice is the last digit of the candidate's name; it counts them."""

    def __init__(self, raises_at: int = 1000):
        self.done, self.raises_at = [], raises_at

    def __call__(self, candidate: Candidate, iterations: int, folder: Path) -> Result:
        if len(self.done) == self.raises_at:
            raise KeyboardInterrupt
        assert folder.is_dir()
        self.done.append(candidate.name)
        return Result(int(candidate.name[-1]) / 10, iterations, 1.5)


def ledger(
    folder: Path, train: Trainings, signal: Signal | None = None, board: dist.Store | None = None
) -> Ledger:
    processes = Processes(0, 1, CPU, board or dist.HashStore())
    return Ledger(folder, processes, signal or Signal(), train, rows=[])


@pytest.mark.parametrize(
    ("count", "expected"),
    [(20, [Rung(20, 250), Rung(5, 500), Rung(3, 1000)]), (8, [Rung(8, 250), Rung(2, 500)])],
)
def test_rungs(count, expected):
    assert rungs(count, 1000) == expected


def test_the_best_are_those_of_the_highest_dice_and_of_equals_the_first():
    dices = (0.1, 0.5, 0.3, 0.5, 0.0, 0.2)
    results = {one.name: Result(dice, 1, 1.0) for one, dice in zip(CANDIDATES, dices, strict=True)}
    assert [one.name[-1] for one in best(CANDIDATES, results, 3)] == ["1", "3", "2"]


def test_of_candidates_that_all_failed_none_is_the_best():
    failures = [trainings.MEMORY, trainings.DIVERGED]
    pairs = zip(CANDIDATES, failures, strict=False)
    results = {one.name: Result(0.0, 1, 1.0, why) for one, why in pairs}
    none = r"none of 2 candidates could be trained \(candidates.csv: diverged, memory\)"
    with pytest.raises(UserError, match=none):
        best(CANDIDATES[:2], results, 1)
    results[CANDIDATES[1].name] = Result(0.0, 1, 1.0)  # which was trained
    assert best(CANDIDATES[:2], results, 1) == CANDIDATES[:1]


def test_every_training_case_trains_or_judges():
    train, judge = divided(range(10))
    assert (train, judge) == ([1, 2, 3, 5, 6, 7, 9], [0, 4, 8])
    assert divided("ab") == (["b"], ["a"])
    with pytest.raises(UserError, match="1 training case cannot be divided"):
        divided("a")


class TestLedger:
    def test_keeps_results_and_a_table(self, tmp_path):
        of_run = ledger(tmp_path, Trainings())
        results = of_run.results(CANDIDATES, 100)
        assert results["random_3"] == Result(0.3, 100, 1.5)
        of_run.results(CANDIDATES[:2], 200)
        rows = read_rows(tmp_path / "candidates.csv")
        assert [row["candidate"][-1] for row in rows] == list("54321010")
        assert (rows[0]["dice"], rows[0]["paths"]) == ("0.5", "1")
        assert rows[-1]["iterations"] == "200"

    def test_does_nothing_twice(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            ledger(tmp_path, Trainings(raises_at=4)).results(CANDIDATES, 100)
        again = Trainings()
        results = ledger(tmp_path, again).results(CANDIDATES, 100)
        assert again.done == ["random_4", "random_5"]
        assert results == ledger(tmp_path / "other", Trainings()).results(CANDIDATES, 100)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ('{"dice": 0.', "Expecting|delimiter"),
            ("[1]", "it holds a list instead of names with values"),
            ("[" * 100_000, "recursion"),
            ("{}", "it has .'failure'. instead of dice, iterations, seconds, failure"),
            ({"more": 1}, "it has .* instead of dice, iterations"),
            ({"dice": 7.0}, "dice is 7.0"),
            ({"dice": float("nan")}, "dice is nan"),
            ({"dice": "0.5" * 100}, "dice is '0.50.5.{0,60}$"),
            ({"seconds": float("inf")}, "seconds is inf"),
            ({"iterations": 99}, "iterations is 99 instead of 100"),
            ({"failure": []}, r"failure is \[\]"),
            ({"network": None}, "it has no network"),
        ],
        ids=repr,
    )
    def test_a_result_that_is_none_is_named_as_damaged(self, tmp_path, change, says):
        ledger(tmp_path, Trainings()).results(CANDIDATES, 100)
        path = tmp_path / "candidates/random_2/100.json"
        whole = json.loads(path.read_text())
        path.write_text(change if isinstance(change, str) else json.dumps({**whole, **change}))
        with pytest.raises(UserError) as raised:
            ledger(tmp_path, Trainings()).results(CANDIDATES, 100)
        pattern = r"random_2/100.json is damaged \((.*)\): remove it, and its training is"
        assert re.search(says, re.search(pattern, str(raised.value))[1]), raised.value
        path.unlink()
        again = Trainings()
        ledger(tmp_path, again).results(CANDIDATES, 100)
        assert again.done == ["random_2"]

    def test_a_failure_is_kept_with_its_reason(self, tmp_path):
        def fail(candidate: Candidate, iterations: int, _folder: Path) -> Result:
            why = trainings.MEMORY if candidate.name == "random_0" else ""
            return Result(0.0, iterations, 1.0, why)

        ledger(tmp_path, fail).results(CANDIDATES, 100)
        results = ledger(tmp_path, Trainings(raises_at=0)).results(CANDIDATES, 100)
        assert {name for name, result in results.items() if result.failure} == {"random_0"}
        table = read_rows(tmp_path / "candidates.csv")
        reasons = {row["candidate"]: row["failure"] for row in table}
        assert reasons.pop("random_0") == "memory" and not any(reasons.values())

    def test_a_result_of_another_architecture_of_that_name_is_refused(self, tmp_path):
        """As when another version, which proposes others, resumes a run."""
        ledger(tmp_path, Trainings()).results(CANDIDATES, 100)
        others = [*CANDIDATES[:2], replace(CANDIDATES[2], channel_mul=0.25), *CANDIDATES[3:]]
        refusal = "random_2/100.json is of another architecture .*--resume never"
        with pytest.raises(UserError, match=refusal):
            ledger(tmp_path, Trainings()).results(others, 100)

    def test_ranks_share_the_trainings(self, tmp_path):
        """Threads stand for ranks; neither waits for the other's training."""
        board, of_ranks, results = dist.HashStore(), [Trainings(), Trainings()], {}

        def rank(number: int) -> None:
            of_rank = ledger(tmp_path / str(number), of_ranks[number], board=board)
            results[number] = of_rank.results(CANDIDATES, 100)

        threads = [threading.Thread(target=rank, args=[number]) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert results[0] == results[1] and len(results[0]) == 6
        assert sorted(of_ranks[0].done + of_ranks[1].done) == [one.name for one in CANDIDATES]

    def test_a_rank_that_waits_hears_of_a_request_to_stop(self, tmp_path):
        asked = Signal()
        asked.received = 15
        with pytest.raises(Stopped) as stopped:
            ledger(tmp_path, Trainings(), signal=asked).results(CANDIDATES, 100)
        assert stopped.value.signal == 15 and str(tmp_path) in stopped.value.saved
        with pytest.raises(Stopped):
            ledger(tmp_path, Trainings(), signal=asked)._wait_for(["of another rank"])


class TestFolder:
    def test_has_its_own_precision_when_it_is_resumed(self, tmp_path):
        folder = tmp_path / "c"
        with pytest.raises(UserError, match="--resume must, but there is no .*settings.json"):
            open_folder(folder, {"seed": 0}, BF16, "must")
        assert open_folder(folder, {"seed": 0}, BF16, "auto") is None
        assert open_folder(folder, {"seed": 0}, FP32, "must") == BF16

    def test_refuses_other_settings_and_names_them(self, tmp_path):
        open_folder(tmp_path, {"seed": 0, "memory_mib": 5}, BF16, "auto")
        expected = r"settings.json belongs to a run with other .*memory_mib was 5 and is 6\)"
        with pytest.raises(UserError, match=expected):
            open_folder(tmp_path, {"seed": 0, "memory_mib": 6}, BF16, "auto")

    @pytest.mark.parametrize(
        "configuration", ["[]", "{}", '{"configuration": {}, "precision": 16}']
    )
    def test_settings_that_are_none_are_named_as_damaged(self, tmp_path, configuration):
        (tmp_path / "settings.json").write_text(configuration)
        with pytest.raises(UserError, match=r"settings.json is damaged \(it h.*\): remove it"):
            open_folder(tmp_path, {"seed": 0}, FP32, "auto")
