"""Summaries: means in both conventions, intervals that hold what they promise, tables."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest

from dints.evaluation.scores import NAN, Row
from dints.evaluation.summary import interval, markdown, scores_table, summarise


def row(
    case: str, label: str, dice: float, nnunet: float | None = None, hausdorff: float = 2.0
) -> Row:
    absent = math.isnan(dice)
    nnunet = dice if nnunet is None else nnunet
    defined = (NAN,) * 4 if absent else (dice, hausdorff, 0.0, 1.0)
    false_positive = absent and not math.isnan(nnunet)
    return Row(
        case, label, dice, nnunet, *defined, 0.0 if absent else 1.5, 1.0, 1, 0, 0, false_positive
    )


ROWS = [
    row("a", "liver", 0.9),
    row("a", "lesion", NAN, 0.0),  # false positive
    row("b", "liver", 0.8),
    row("b", "lesion", 0.5),
    row("c", "liver", 0.0, hausdorff=math.inf),
    row("c", "lesion", NAN),
    row("d", "liver", 0.7),
    row("d", "lesion", 0.7),
]


def test_means_in_both_conventions():
    found = summarise(ROWS)
    assert list(found["classes"]) == ["liver", "lesion"]
    liver, lesion, everything = *found["classes"].values(), found["all"]
    for part, score, count, mean in (
        (liver, "dice", 4, 0.6),
        (lesion, "dice", 2, 0.6),
        (lesion, "dice_nnunet", 3, 0.4),
        (everything, "dice", 4, 0.6),
        (everything, "dice_nnunet", 4, (0.6 + 0.4) / 2),
    ):
        assert (part[score]["n"], part[score]["mean"]) == (count, pytest.approx(mean)), score
    # of 0.9, 0.65, 0 and 0.7
    assert everything["dice"]["median"] == pytest.approx((0.65 + 0.7) / 2)
    assert [part["false_positive_cases"] for part in (liver, lesion, everything)] == [0, 1, 1]


def test_an_infinite_distance_is_counted_by_itself():
    keys = "n", "infinite", "mean", "low", "high"
    liver = summarise(ROWS)["classes"]["liver"]["hausdorff95_mm"]
    assert [liver[key] for key in keys] == [3, 1, 2.0, 2.0, 2.0]
    rows = [row("a", "liver", 0.0, hausdorff=math.inf), row("a", "lesion", 0.5)]
    half_missed = summarise(rows)["all"]["hausdorff95_mm"]
    assert [half_missed[key] for key in keys] == [1, 1, 2.0, None, None]


@pytest.mark.parametrize("values", [[0.1, 0.1, 0.1], [0.9, 0.8, 0.7, 0.3], [0.7, 0.7000000001]])
@pytest.mark.filterwarnings("error")
def test_an_interval_is_within_the_values(values):
    low, high = interval(np.array(values)[:, None])
    assert min(values) - 1e-12 <= low <= np.mean(values) + 1e-12
    assert np.mean(values) - 1e-12 <= high <= max(values) + 1e-12


def test_an_interval_over_classes_is_that_of_cases():
    """Three classes that say the same are no more cases."""
    values = np.random.default_rng(0).beta(9, 1, (40, 1)).repeat(3, 1)
    assert interval(values) == pytest.approx(interval(values[:, :1]))


def test_tables():
    cells = list(csv.DictReader(io.StringIO(scores_table(ROWS))))
    names = [(line["case"], line["label"]) for line in cells]
    assert names == [(row.case, row.label) for row in ROWS]
    dice = [cells[n][key] for n, key in ((0, "dice"), (1, "dice"), (1, "dice_nnunet"))]
    assert dice == ["0.900000", "", "0.000000"]
    assert cells[4]["hausdorff95_mm"] == "inf"
    assert [line["false_positive"] for line in cells[:2]] == ["0", "1"]

    summary = summarise(ROWS)
    json.dumps(summary, allow_nan=False)
    lines = markdown(summary).splitlines()
    assert len(lines) == 2 + 3 * 6 and {line.count("|") for line in lines} == {8}
    assert lines[8].startswith("| lesion | dice | 2 | 0.6000 |")
    assert lines[8].endswith("| 0.6000 | 1 |")
    assert "| liver | hausdorff95_mm | 3 (and 1 infinite) | 2.0000 | 2.0000 to 2.0000 |" in lines[5]
    assert "| - | - to - | - |" in markdown(summarise([row("a", "x", NAN)]))
