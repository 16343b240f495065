"""The experiments' runner trains and scores rows, ours and opponents', and resumes where it was
stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
import figures
import opponents
import rows
import runner
import tables

from dints.data.phantom import write_phantom
from dints.network.architecture import load_architecture
from dints.network.baselines import u_shaped
from dints.network.cost import counts
from dints.network.discrete import DiscreteNetwork

# MONAI's own layers in bf16 need at least 3 planes at the coarsest of 3 resolutions:
# dints/network/fast/layers.py.
RECIPE = "--channel_mul 0.125 --patch_size 12 12 12 --spacing 6 6 6 --num_iterations 2"
ROW = rows.Training(rows.U, "small", 6, 0, 0)
OPPONENT = rows.Training("dynunet", "small", 6, 1, 3)


def run(monkeypatch, folder: Path, *flags: str, table: Sequence = (ROW, OPPONENT)) -> list[dict]:
    monkeypatch.setattr(runner, "RESULTS", folder / "results.jsonl")
    monkeypatch.setitem(rows.RECIPES, "small", RECIPE)
    monkeypatch.setattr(runner, "table", lambda: {row.name: row for row in table})
    arguments = [
        "--root",
        str(folder / "Task00_Phantom"),
        "--work",
        str(folder / "work"),
        "--jobs",
        "1",
        *flags,
    ]
    monkeypatch.setattr(sys, "argv", ["runner.py", *arguments])
    runner.main(runner.parse_args())
    return runner.read_results()


def parameters_of(opponent: str, channel_mul: float) -> int:
    return sum(
        weight.numel() for weight in opponents.OPPONENTS[opponent](1, 3, channel_mul).parameters()
    )


def test_every_row_has_a_name_of_its_own_and_a_network():
    every = rows.table()
    assert all(row.name == name for name, row in every.items())
    assert len(set(every.values())) == len(every) > 120
    searches = {row.name for row in every.values() if isinstance(row, rows.Search)}
    assert len(searches) == 9
    for row in (row for row in every.values() if row.name not in searches):
        assert row.recipe in rows.RECIPES
        assert rows.is_ready(row) or row.network in searches or row.network.startswith("gradient_")


def test_at_equal_memory_each_network_fills_it_but_for_one_channel():
    for network in ("u_shaped_skip_9x3", "dynunet"):
        width = rows.filling(network, 10.0)
        if network in opponents.OPPONENTS:
            makers = [
                partial(opponents.OPPONENTS[network], 1, 3, width + more) for more in (0, 1 / 32)
            ]
        else:
            found = rows.architecture_of(network)
            makers = [partial(DiscreteNetwork, found, 1, 3, width + more) for more in (0, 1 / 32)]
        of_widths = [counts(make, (2, 1, 32, 32, 32)) for make in makers]
        within, beyond = (
            one["activation_mib"] + 16 * one["parameters"] / 2**20 for one in of_widths
        )
        assert within <= 10 < beyond


def test_random_opponents_are_different_and_keep_the_finest_resolution():
    drawn = [rows.architecture_of(f"random_{number}") for number in range(2)]
    assert drawn[0].codes() != drawn[1].codes()
    assert all(one.arch_code_a[:, 0].all() and not one.use_downsample for one in drawn)


def test_what_a_search_finds_is_trained_after_it_and_other_rows_beside_it(monkeypatch, tmp_path):
    search = rows.Search("control", 30.0, 2, 0)
    of_found = rows.Training(search.name, "recommended", None, 2, 0, memory_mib=30.0)
    known = rows.Training(rows.U, "recommended", None, 2, 0, memory_mib=30.0)
    beside, ended = threading.Event(), []

    def carried_out(row, *_) -> dict:
        if row is known:
            beside.set()
        if row is search:
            assert beside.wait(60)
        ended.append(row)
        return {"name": row.name, "seconds": 1.0}

    monkeypatch.setattr(runner, "run", carried_out)
    lines = run(monkeypatch, tmp_path, "--jobs", "2", table=[search, of_found, known])
    assert len(lines) == 3 and ended.index(search) < ended.index(of_found)


@pytest.mark.slow
def test_rows_are_run_once_and_their_lines_tell_what_was_measured(monkeypatch, tmp_path, capsys):
    """A search, the training of what it finds, and a training of an opponent."""
    write_phantom(tmp_path / "Task00_Phantom", 8, 1, shape=(24, 24, 24))
    monkeypatch.setitem(rows.SEARCHES, "search", 2)
    monkeypatch.setattr(rows, "COMPETITION", "--num_iterations 8")
    monkeypatch.setattr(rows, "COMMON", f"{rows.COMMON} --patch_size 16 16 16 --spacing 6 6 6")
    monkeypatch.setattr(
        rows, "GRADIENT", "--channel_mul 0.125 --num_epochs 2 --num_epochs_warmup 1"
    )
    shutil.copy(rows.ARCHITECTURES / f"{rows.U}.pth", tmp_path)
    monkeypatch.setattr(rows, "ARCHITECTURES", tmp_path)
    monkeypatch.setitem(rows.RECIPES, "larger", RECIPE.replace("12 12 12", "16 16 16"))
    monkeypatch.setattr(rows, "EQUAL_ITERATIONS", 2)
    monkeypatch.setattr(rows, "filling", lambda *_: 0.125)
    search = rows.Search("search", 3.0, 1, 0)
    of_found = rows.Training(search.name, "larger", None, 1, 0, memory_mib=3.0)
    table = [of_found, search, OPPONENT]

    found, trained = run(monkeypatch, tmp_path, "--rows", "search*", table=table)
    assert [found["name"], trained["name"]] == [search.name, of_found.name]
    assert len(found["candidates"]) == 2 and found["seconds"] > found["gradient_seconds"] > 0
    assert (tmp_path / "gradient_fold1_seed0.pth").exists()
    assert trained["iterations_done"] == 3 and trained["seconds"] > 0  # an epoch
    assert len(trained["cases"]) == 2 and trained["classes"].keys() == {"liver", "lesion"}
    assert 0 <= trained["dice"] <= 1 and trained["hardware"].startswith("1 thread of ")

    *before, opponent = run(monkeypatch, tmp_path, table=table)
    assert before == [found, trained] and opponent["name"] == OPPONENT.name
    assert opponent["parameters"] == parameters_of("dynunet", 0.125) != trained["parameters"]
    assert (
        opponent["gmac"] != trained["gmac"]
        and min(opponent["gmac"], opponent["activation_mib"]) > 0
    )
    written = (tmp_path / "results.jsonl").read_text().splitlines()
    # nothing was run twice
    assert [json.loads(line) for line in written] == [found, trained, opponent]
    capsys.readouterr()
    assert len(run(monkeypatch, tmp_path, "--list", table=table)) == 3
    assert capsys.readouterr().out == "".join(f"done {row.name}\n" for row in table)


def test_rows_of_as_many_minutes_take_equally_long():
    seconds = {name: network.seconds for name, network in rows.NETWORKS.items()}
    for row in (rows.Training(name, "recommended", 10, 0, 0) for name in seconds):
        assert abs(row.iterations * seconds[row.network] / 600 - 1) < 0.05
    plain, half = (
        rows.Training(rows.U, recipe, 10, 0, 0) for recipe in ("recommended", "half-resolution")
    )
    assert half.iterations > plain.iterations
    assert rows.Training(rows.U, "recommended", 10, 0, 0, processes=2).iterations > plain.iterations


@pytest.mark.parametrize("size", [(5, 3), (9, 3)], ids=str)
def test_the_us_of_the_experiments_are_ours_at_full_resolution(size):
    made = u_shaped(*size, skip_connections=size == (9, 3))
    committed = load_architecture(
        rows.ARCHITECTURES / f"{made.info['baseline']}_{size[0]}x{size[1]}.pth"
    )
    assert committed.codes()[:2] == made.codes() and not committed.use_downsample


def test_a_table_has_a_row_a_setting_and_a_column_a_fold():
    def result(recipe: str, fold: int, dice: float, seconds: float | None = 90.0) -> dict:
        counts = {"parameters": 421_475, "gmac": 10.14, "iterations": 1800}
        return {"recipe": recipe, "fold": fold, "dice": dice, "seconds": seconds, **counts}

    flips = [result("flips", 0, 0.8), result("flips", 0, 0.9, 150.0), result("flips", 1, 0.7)]
    assert tables.table("recipe", [*flips, result("half", 1, 0.5, None)])[2:] == [
        "| flips | 0.42 M | 10.1 | 1,800 | 1.8 | 0.8500 (0.8000 to 0.9000) | 0.7000 |",
        "| half | 0.42 M | 10.1 | 1,800 | - | - | 0.5000 |",
    ]


def test_at_equal_memory_a_kind_has_a_row_and_what_candidates_gain_over_it():
    def result(network: str, dices: Sequence[float]) -> dict:
        cases = {f"case_{number}": {"a": dice, "b": dice} for number, dice in enumerate(dices)}
        mean = sum(dices) / len(dices)
        line = {
            "network": network,
            "seed": 0,
            "memory_mib": 30.0,
            "parameters": 1.5e6,
            "seconds": 60.0 * len(cases),
        }
        return {**line, "dice": mean, "cases": cases}

    search = {
        "name": "search_30mib",
        "kind": "search",
        "memory_mib": 30.0,
        "seconds": 900.0,
        "gradient_seconds": 300.0,
    }
    control = {**search, "kind": "control", "seconds": 600.0, "gradient_seconds": 0.0}
    lines = [search, control, {**control, "seconds": None}, result("random_0", [0.6, 0.7])]
    lines += [result("control_30mib_seed0", [0.8, 0.9]), result("control_30mib_seed1", [0.6, 0.7])]
    lines += [result("gradient_seed0", [0.5, 0.6]), {"minutes": 6, "network": "u"}]
    assert tables.memory_table(lines)[2:] == [
        "| 30 | candidates | 2 | 1.50 to 1.50 M | 10 | 2.0 | 0.7500 (0.6500 to 0.8500) | - |",
        "| 30 | gradient search alone | 1 | 1.50 M | 5 | 2.0 | 0.5500 | +0.2000 (+0.2000 to "
        "+0.2000) |",
        "| 30 | random, finest path kept | 1 | 1.50 M | - | 2.0 | 0.6500 | +0.1000 (+0.1000 to "
        "+0.1000) |",
    ]
    assert tables.seeds_differ(lines) == "no network has two seeds"


def test_a_networks_seeds_count_as_one_network():
    """What candidates gain is of the seeds that all have."""

    def result(network: str, dice: float, seed: int = 0) -> dict:
        line = {
            "memory_mib": 30.0,
            "parameters": 1.5e6,
            "seconds": None,
            "cases": {"case_1": {"a": dice}},
        }
        return {"network": network, "dice": dice, "seed": seed, **line}

    found = [
        result("control_0", 0.9),
        result("control_0", 0.7, 1),
        result("control_1", 0.6),
        result("control_1", 0.6, 1),
    ]
    lines = [*found, result("random_0", 0.5), result("random_1", 0.4), result("random_1", 0.3, 1)]
    assert tables.memory_table(lines)[2:] == [
        "| 30 | candidates | 2 | 1.50 to 1.50 M | - | - | 0.7000 (0.6000 to 0.8000) | - |",
        "| 30 | random, finest path kept | 2 | 1.50 to 1.50 M | - | - | 0.4250 (0.3500 to 0.5000) "
        "| +0.3000 (+0.3000 to +0.3000) |",
    ]
    differ = (
        "two seeds of 3 networks differ by 0.1000 on average, nine tenths of them by at most 0.1800"
    )
    assert tables.seeds_differ(lines) == differ
    assert figures.dice_at_equal_memory(lines) == {
        30.0: {"control": [0.8, 0.6], "random": [0.5, 0.35]}
    }


def test_pictures_of_searches_are_drawn_from_their_lines(monkeypatch, tmp_path):
    line = {"memory_mib": 30.0, "name": "a training"}
    candidates = [
        {"candidate": name, "kind": kind, "iterations": "200", "dice": dice}
        for name, kind, dice in (("random_1", "random", "0.8"), ("mutant_1", "mutant", "0.9"))
    ]
    networks = [("search_30mib_seed0", 0.9), ("random_0", 0.6), ("random_1", 0.8), ("dynunet", 0.7)]
    lines = [{**line, "name": "search_30mib", "kind": "search", "candidates": candidates}]
    lines += [{"name": "another", "minutes": 6, "network": "u"}]
    lines += [{**line, "network": name, "dice": dice} for name, dice in networks]
    lines += [{**line, "network": "dynunet", "dice": 0.5, "memory_mib": 20.0}]
    monkeypatch.setattr(figures, "read_results", lambda: lines)
    of_budgets = figures.dice_at_equal_memory(lines)
    assert list(of_budgets) == [20.0, 30.0] and of_budgets[20.0] == {"dynunet": [0.5]}
    assert of_budgets[30.0] == {"search": [0.9], "random": [0.6, 0.8], "dynunet": [0.7]}
    for picture, flags in (("memory", []), ("rungs", ["--search", "search_30mib"])):
        monkeypatch.setattr(
            sys, "argv", ["figures.py", picture, "--output", str(tmp_path / picture), *flags]
        )
        arguments = figures.parse_args()
        arguments.draw(arguments)
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
