"""The tables of results in README and docs say what experiments/results.jsonl says."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
import figures
import runner
import tables

CHECKOUT = Path(__file__).resolve().parents[2]
README, RECIPES = CHECKOUT / "README.md", CHECKOUT / "docs" / "recipes.md"
# each with what the one before has
PARTS = ("published", "flips", "polynomial", "recommended", "nnunet")


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    return {line["name"]: line for line in runner.read_results()}


def numbers(row: str) -> tuple[str, ...]:
    """Return the cells of a Markdown table's row that are no words."""
    cells = [cell.replace("*", "").strip() for cell in row.strip().strip("|").split(" | ")]
    return tuple(cell for cell in cells if not cell[:1].isalpha() and cell)


def said(path: Path) -> set[tuple[str, ...]]:
    return {
        numbers(line)
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    }


def written(values: Iterable[float]) -> tuple[str, ...]:
    return tuple(f"{value:.4f}" for value in values)


def test_the_table_at_equal_memory_is_the_one_that_is_printed(results):
    of_readme = README.read_text(encoding="utf-8").replace("**", "")
    for row in tables.memory_table(list(results.values())):
        assert row in of_readme


def test_means_over_folds(results):
    for row in tables.folds_table(list(results.values()))[2:]:
        of_minutes, *others = numbers(row)
        assert of_minutes == "6" and tuple(others) in said(README)


def test_recipes(results):
    def dice(recipe: str, fold: int, seed: int = 0, minutes: int = 6) -> float:
        return results[f"{runner.U}/{recipe}-{minutes}min-fold{fold}-seed{seed}"]["dice"]

    expected, before = [], None
    for recipe in ("published", "recommended"):
        folds = [dice(recipe, fold) for fold in range(runner.NUM_FOLDS)]
        expected.append(written([*folds, mean(folds)]))
    for recipe in ("recommended", "published-augmentation"):
        expected.append(written(dice(recipe, fold, minutes=24) for fold in (0, 1)))
    for recipe in PARTS:
        three = [dice(recipe, fold, seed) for fold, seed in ((0, 0), (0, 1), (1, 0))]
        gain = [] if before is None else [f"{mean(three) - before:+.4f}"]
        expected.append((*written([*three, mean(three)]), *gain))
        before = mean(three)
    expected.append(written(dice("half-resolution", fold) for fold in (0, 1)))
    assert [row for row in expected if row not in said(RECIPES)] == []


def test_minutes(results):
    for points in figures.time_to_dice(list(results.values())).values():
        assert written(dice for _, dice in points) in said(RECIPES)
