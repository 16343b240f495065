"""The experiments' runner trains and scores; tables and pictures are of its lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
import figures
import opponents
import runner
import tables

from dints.data.phantom import write_phantom
from dints.network.architecture import load_architecture
from dints.network.baselines import u_shaped

# MONAI's own layers in bf16 need at least 3 planes at the coarsest of 3 resolutions:
# dints/network/fast/layers.py.
RECIPE = "--patch_size 12 12 12 --spacing 6 6 6"
ROW = runner.Training("dynunet", "small", 1, 3, iterations=2, channel_mul=0.125, minutes=6)


def run(monkeypatch, folder: Path, *flags: str) -> list[dict]:
    monkeypatch.setattr(runner, "RESULTS", folder / "results.jsonl")
    places = ["--root", str(folder / "Task00_Phantom"), "--work", str(folder / "work")]
    monkeypatch.setattr(sys, "argv", ["runner.py", *places, *flags])
    runner.main(runner.parse_args())
    return runner.read_results()


def test_each_line_is_a_training_whose_network_is_there_or_a_search_with_its_commands():
    lines, rows = runner.read_results(), runner.table()
    assert len(rows) > 100
    for line in lines:
        if "network" in line:
            assert rows[line["name"]].name == line["name"]
            train, _ = rows[line["name"]].commands(Path("root"), Path("folder"))
            assert Path(train[train.index("--arch_ckpt") + 1]).exists()
        else:
            assert "evolve_dints.py" in line["commands"][-1]


@pytest.mark.slow
def test_a_row_is_run_once_and_its_line_says_what_was_measured(monkeypatch, tmp_path, capsys):
    write_phantom(tmp_path / "Task00_Phantom", 8, 1, shape=(24, 24, 24))
    (tmp_path / "results.jsonl").touch()
    monkeypatch.setitem(runner.RECIPES, "small", RECIPE)
    monkeypatch.setattr(runner, "NEW", [ROW])
    (line,) = run(monkeypatch, tmp_path, "--jobs", "1")
    assert line["name"] == ROW.name and line["iterations_done"] == 3 and line["seconds"] > 0
    assert len(line["cases"]) == 2 and line["classes"].keys() == {"liver", "lesion"}
    assert 0 <= line["dice"] <= 1 and line["hardware"].startswith("1 thread of ")
    network = opponents.OPPONENTS["dynunet"](1, 3, 0.125)
    assert line["parameters"] == sum(weight.numel() for weight in network.parameters())
    assert min(line["gmac"], line["activation_mib"]) > 0
    assert run(monkeypatch, tmp_path) == [line]  # nothing was run twice
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    capsys.readouterr()
    run(monkeypatch, tmp_path, "--list")
    assert capsys.readouterr().out == f"done {ROW.name}\n"


def test_a_failure_ends_it_and_keeps_the_lines_before(monkeypatch, tmp_path):
    def carried_out(row, *_) -> dict:
        if row.seed == 1:
            raise RuntimeError("a command failed")
        return {"name": row.name, "seconds": 1.0, "dice": 0.5}

    (tmp_path / "results.jsonl").touch()
    monkeypatch.setattr(runner, "run", carried_out)
    monkeypatch.setattr(runner, "NEW", [replace(ROW, seed=seed) for seed in (0, 1, 2)])
    with pytest.raises(RuntimeError, match="a command failed"):
        run(monkeypatch, tmp_path, "--jobs", "1")
    names = [json.loads(text)["name"] for text in (tmp_path / "results.jsonl").open()]
    assert names[:1] == [replace(ROW, seed=0).name]


@pytest.mark.parametrize("size", [(5, 3), (9, 3)], ids=str)
def test_the_us_of_the_experiments_are_ours_at_full_resolution(size):
    made = u_shaped(*size, skip_connections=size == (9, 3))
    name = {(5, 3): "u_shaped_5x3.pth", (9, 3): "u_shaped_skip_9x3.pth"}[size]
    committed = load_architecture(runner.ARCHITECTURES / name)
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


def at_30_mib(network: str, dices: Sequence[float], seed: int = 0) -> dict:
    cases = {f"case_{number}": {"a": dice} for number, dice in enumerate(dices)}
    counts = {"parameters": 1.5e6, "seconds": 60.0 * len(dices), "memory_mib": 30.0}
    named = {"network": network, "seed": seed, "dice": sum(dices) / len(dices)}
    return {**named, "cases": cases, **counts}


def test_at_equal_memory_a_kind_has_a_row_and_what_candidates_gain_over_it():
    search = {"kind": "search", "memory_mib": 30.0, "seconds": 900.0, "gradient_seconds": 300.0}
    control = {**search, "kind": "control", "seconds": 600.0, "gradient_seconds": 0.0}
    lines = [search, control, {**control, "seconds": None}, at_30_mib("random_0", [0.6, 0.7])]
    lines += [at_30_mib("control_seed0", [0.8, 0.9]), at_30_mib("control_seed1", [0.6, 0.7])]
    lines += [at_30_mib("gradient_seed0", [0.5, 0.6]), {"minutes": 6, "network": "u"}]
    gains = "(+0.2000 to +0.2000)", "(+0.1000 to +0.1000)"
    assert tables.memory_table(lines)[2:] == [
        "| 30 | candidates | 2 | 1.50 to 1.50 M | 10 | 2.0 | 0.7500 (0.6500 to 0.8500) | - |",
        f"| 30 | gradient search alone | 1 | 1.50 M | 5 | 2.0 | 0.5500 | +0.2000 {gains[0]} |",
        f"| 30 | random, finest path kept | 1 | 1.50 M | - | 2.0 | 0.6500 | +0.1000 {gains[1]} |",
    ]


def test_a_networks_seeds_count_as_one_network_and_gains_are_of_those_that_all_have():
    lines = [at_30_mib("control_0", [0.9]), at_30_mib("control_0", [0.7], 1)]
    lines += [at_30_mib("control_1", [0.6]), at_30_mib("control_1", [0.6], 1)]
    lines += [at_30_mib("random_0", [0.5])]
    lines += [at_30_mib("random_1", [0.4]), at_30_mib("random_1", [0.3], 1)]
    first, second = tables.memory_table(lines)[2:]
    assert "| 0.7000 (0.6000 to 0.8000) |" in first
    assert "| 0.4250 (0.3500 to 0.5000) | +0.3000 (+0.3000 to +0.3000) |" in second
    assert tables.seeds_differ(lines).startswith("two seeds of 3 networks differ by 0.1000 on")
    expected = {"control": [0.8, 0.6], "random": [0.5, 0.35]}
    assert figures.dice_at_equal_memory(lines) == {30.0: expected}


@pytest.mark.parametrize("picture", ["time", "memory", "rungs --search search_30mib_fold2_seed0"])
def test_pictures_are_drawn_from_the_lines(picture, monkeypatch, tmp_path):
    words = [*picture.split(), "--output", str(tmp_path / "picture.png")]
    monkeypatch.setattr(sys, "argv", ["figures.py", *words])
    arguments = figures.parse_args()
    arguments.draw(arguments)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
