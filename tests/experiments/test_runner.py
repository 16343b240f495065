"""The experiments' runner trains and scores rows, ours and opponents', and goes on where it was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
import opponents
import runner
import tables

from dints.data.phantom import write_phantom
from dints.network.architecture import load_architecture
from dints.network.unsearched import u_shaped

ROW = runner.Row("test", "u", "u_shaped_5x3", "--channel_mul 0.125 --patch_size 8 8 8 --spacing 6 6 6", 2, 0, 0)
OPPONENT = runner.Row("test", "dynunet", "dynunet", ROW.flags, 2, 1, 3)


def run(monkeypatch, folder: Path, *flags: str) -> list[dict]:
    monkeypatch.setattr(runner, "RESULTS", folder / "results.jsonl")
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
    (first,) = run(monkeypatch, tmp_path, "--rows", "test/u-*")
    assert first["name"] == "test/u-2-fold0-seed0" and first["iterations_done"] == 2 and first["seconds"] > 0
    assert len(first["cases"]) == 2 and first["classes"].keys() == {"liver", "lesion"}
    assert 0 <= first["dice"] <= 1 and first["hardware"].startswith("1 thread of ")
    both, dynunet = run(monkeypatch, tmp_path), parameters_of("dynunet", 0.125)
    assert [line["name"] for line in both] == [ROW.name, OPPONENT.name] and both[0] == first
    assert both[1]["parameters"] == dynunet != both[0]["parameters"]
    assert both[1]["gmac"] > both[0]["gmac"] > 0 and both[0]["activation_mib"] > 0
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[1]) == both[1]
    capsys.readouterr()
    assert len(run(monkeypatch, tmp_path, "--list")) == 2
    assert capsys.readouterr().out == f"done {ROW.name}\ndone {OPPONENT.name}\n"


def test_a_row_that_fails_is_told_and_leaves_no_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, tmp_path, "--rows", "test/u-*")
    assert "test/u-2-fold0-seed0 failed" in str(caught.value) and "test/u-2-fold0-seed0.log" in str(caught.value)
    assert not (tmp_path / "results.jsonl").exists()


def test_every_row_has_a_name_of_its_own_and_a_network():
    rows = runner.table()
    assert all(row.name == name for name, row in rows.items())
    for row in rows.values():
        file = runner.ARCHITECTURES / f"{row.network}.pth"
        assert row.network in runner.NETWORKS and (row.network in opponents.OPPONENTS) != file.exists()


def test_the_u_of_the_experiments_is_ours_at_full_resolution():
    committed, made = load_architecture(runner.ARCHITECTURES / "u_shaped_5x3.pth"), u_shaped(5, 3)
    assert committed.codes()[:2] == made.codes() and not committed.use_downsample


@pytest.mark.parametrize(("name", "parameters"), [("dynunet", 1_355_971), ("segresnet", 1_152_003)])
def test_opponents_are_monais_networks_of_three_resolutions(name, parameters):
    assert parameters_of(name, 1.0) == parameters


def test_a_table_has_a_row_a_setting_and_a_column_a_fold():
    def result(fold: int, dice: float, seconds: float | None = 90.0) -> dict:
        return {"fold": fold, "dice": dice, "seconds": seconds, "parameters": 421_475, "gmac": 10.14}

    settings = {
        ("flips", 900): [result(0, 0.8), result(0, 0.9, 150.0), result(1, 0.7)],
        ("u", 1800): [result(1, 0.5, None)],
    }
    assert tables.table("recipe", settings)[2:] == [
        "| flips | 0.42 M | 10.1 | 900 | 1.8 | 0.8500 (0.8000 to 0.9000) | 0.7000 |",
        "| u | 0.42 M | 10.1 | 1,800 | - | - | 0.5000 |",
    ]
