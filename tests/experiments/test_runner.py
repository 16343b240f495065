"""The experiments' runner trains and scores rows, ours and opponents', and goes on where it was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
import figures
import opponents
import runner
import tables

from dints.data.phantom import write_phantom
from dints.network.architecture import load_architecture
from dints.network.unsearched import u_shaped

RECIPE = "--channel_mul 0.125 --patch_size 8 8 8 --spacing 6 6 6 --num_iterations 2"
ROW = runner.Row(runner.U, "small", 6, 0, 0)
OPPONENT = runner.Row("dynunet", "small", 6, 1, 3, processes=2)


def run(monkeypatch, folder: Path, *flags: str) -> list[dict]:
    monkeypatch.setattr(runner, "RESULTS", folder / "results.jsonl")
    monkeypatch.setitem(runner.RECIPES, "small", RECIPE)
    monkeypatch.setattr(runner, "table", lambda: {row.name: row for row in (ROW, OPPONENT)})
    arguments = ["--root", str(folder / "Task00_Phantom"), "--work", str(folder / "work"), "--jobs", "1", *flags]
    monkeypatch.setattr(sys, "argv", ["runner.py", *arguments])
    runner.main(runner.parse_args())
    return runner.read_results()


def parameters_of(opponent: str, channel_mul: float) -> int:
    return sum(weight.numel() for weight in opponents.OPPONENTS[opponent](1, 3, channel_mul).parameters())


@pytest.mark.slow
def test_rows_are_run_once_and_their_lines_tell_what_was_measured(monkeypatch, tmp_path, capsys):
    write_phantom(tmp_path / "Task00_Phantom", 8, 1, shape=(24, 24, 24))
    (first,) = run(monkeypatch, tmp_path, "--rows", "u_shaped*")
    assert first["name"] == ROW.name == "u_shaped_skip_9x3/small-6min-fold0-seed0"
    assert first["iterations_done"] == 3 and first["seconds"] > 0  # an epoch
    assert len(first["cases"]) == 2 and first["classes"].keys() == {"liver", "lesion"}
    assert 0 <= first["dice"] <= 1 and first["hardware"].startswith("1 thread of ")
    both, dynunet = run(monkeypatch, tmp_path), parameters_of("dynunet", 0.125)
    assert [line["name"] for line in both] == [ROW.name, OPPONENT.name] and both[0] == first
    assert both[1]["parameters"] == dynunet != both[0]["parameters"]
    assert both[0]["gmac"] != both[1]["gmac"] and min(both[0]["gmac"], both[0]["activation_mib"]) > 0
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[1]) == both[1]
    capsys.readouterr()
    assert len(run(monkeypatch, tmp_path, "--list")) == 2
    assert capsys.readouterr().out == f"done {ROW.name}\ndone {OPPONENT.name}\n"


def test_a_row_that_fails_is_told_and_leaves_no_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, tmp_path, "--rows", "u_shaped*")
    assert f"{ROW.name} failed" in str(caught.value) and f"{ROW.name}.log" in str(caught.value)
    assert not (tmp_path / "results.jsonl").exists()


def test_every_row_has_a_name_of_its_own_and_a_network():
    rows = runner.table()
    assert all(row.name == name for name, row in rows.items())
    assert len(set(rows.values())) == len(rows) > 40
    for row in rows.values():
        file = runner.ARCHITECTURES / f"{row.network}.pth"
        assert row.recipe in runner.RECIPES and (row.network in opponents.OPPONENTS) != file.exists()


def test_rows_of_as_many_minutes_take_equally_long():
    seconds = {name: network.seconds for name, network in runner.NETWORKS.items()}
    for row in (runner.Row(name, "recommended", 10, 0, 0) for name in seconds):
        assert abs(row.iterations * seconds[row.network] / 600 - 1) < 0.05
    plain, half = (runner.Row(runner.U, recipe, 10, 0, 0) for recipe in ("recommended", "half-resolution"))
    assert half.iterations > plain.iterations
    assert runner.Row(runner.U, "recommended", 10, 0, 0, processes=2).iterations > plain.iterations


@pytest.mark.parametrize("size", [(5, 3), (9, 3)], ids=str)
def test_the_us_of_the_experiments_are_ours_at_full_resolution(size):
    made = u_shaped(*size, skip_connections=size == (9, 3))
    committed = load_architecture(runner.ARCHITECTURES / f"{made.info['unsearched']}_{size[0]}x{size[1]}.pth")
    assert committed.codes()[:2] == made.codes() and not committed.use_downsample


@pytest.mark.parametrize(("name", "parameters"), [("dynunet", 1_355_971), ("segresnet", 1_152_003)])
def test_opponents_are_monais_networks_of_three_resolutions(name, parameters):
    assert parameters_of(name, 1.0) == parameters


def test_a_table_has_a_row_a_setting_and_a_column_a_fold():
    def result(recipe: str, fold: int, dice: float, seconds: float | None = 90.0) -> dict:
        counts = {"parameters": 421_475, "gmac": 10.14, "iterations": 1800}
        return {"recipe": recipe, "fold": fold, "dice": dice, "seconds": seconds, **counts}

    flips = [result("flips", 0, 0.8), result("flips", 0, 0.9, 150.0), result("flips", 1, 0.7)]
    assert tables.table("recipe", [*flips, result("half", 1, 0.5, None)])[2:] == [
        "| flips | 0.42 M | 10.1 | 1,800 | 1.8 | 0.8500 (0.8000 to 0.9000) | 0.7000 |",
        "| half | 0.42 M | 10.1 | 1,800 | - | - | 0.5000 |",
    ]


def test_the_curves_are_means_over_folds_of_trainings_of_one_process():
    def result(network: str, minutes: float, dice: float, **others) -> dict:
        plain = {"recipe": "recommended", "processes": 1, "seconds": 100 * minutes}
        return {"network": network, "minutes": minutes, "dice": dice, **plain, **others}

    results = [result("u", 6, 0.8), result("u", 3, 0.7), result("u", 6, 0.9), result("dynunet", 3, 0.6)]
    results += [result("u", 6, 0, recipe="published"), result("u", 6, 0, processes=2), result("u", 6, 0, seconds=None)]
    curves = figures.time_to_dice(results)
    assert curves == {"u": [(5, 0.7), (10, pytest.approx(0.85))], "dynunet": [(5, 0.6)]}
