"""Pictures of a run's course, made of its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from dints.running import curves
from dints.running.tables import ACCURACY, CANDIDATES, LOSSES, write_rows

pytestmark = pytest.mark.pictures

Pictures = dict[str, list[Axes]]
SEARCH = {
    "iteration": [10, 20, 30],
    "seconds": [60, 120, 240],
    "loss": [3, 2, 1],
    "architecture_loss": ["", "", 0.5],
    "ram_ratio": [0.5] * 3,
    "ram_target": [0.8] * 3,
    "entropy_a": [0.2, 0.1, 0.05],
    "entropy_c": [0.4] * 3,
    "topology": [0] * 3,
    "changed_paths": [0, 3, 1],
    "changed_operations": [0, 0, 2],
}


@pytest.fixture
def pictures(monkeypatch) -> Pictures:
    """The axes of the pictures that were drawn, by file name; the first of a test is written
    too.
    """
    drawn, save = {}, curves._save

    def note(figure, path) -> None:
        if not drawn:
            save(figure, path)
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        drawn[path.name] = figure.axes

    monkeypatch.setattr(curves, "_save", note)
    return drawn


def draw(
    folder: Path, losses: Mapping[str, Sequence], accuracy: Mapping[str, Sequence] | None = None
) -> None:
    for name, columns in ((LOSSES, losses), (ACCURACY, accuracy)):
        if columns is not None:
            rows = [columns, *zip(*columns.values(), strict=True)]
            (folder / name).write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    curves.draw_all(folder)


def lines(axes: Axes) -> dict[str, list[list[float]]]:
    """Return the points of the curves that the legend names."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): line.get_xydata().tolist() for line in named}


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_pictures_show_losses_and_dice_over_iterations_and_minutes(tmp_path, pictures):
    time = {"iteration": [10, 20, 30], "seconds": [60, 120, 240]}
    dice = {"dice": [0.1, 0.2, 0.3], "dice_a_b": ["", 0.2, 0.3], "dice_c": [0.1] * 3}
    draw(tmp_path, {**time, "loss": [3, 2, 1]}, {**time, **dice})
    losses, accuracy = pictures["training_loss.png"], pictures["validation_metric.png"]
    for left, right in (losses, accuracy):
        assert (left.get_xlabel(), right.get_xlabel()) == ("iterations", "minutes")
    assert lines(losses[0]) == {"training cases": [[10, 3], [20, 2], [30, 1]]}
    assert lines(losses[1]) == {"training cases": [[1, 3], [2, 2], [4, 1]]}
    assert list(lines(accuracy[0])) == legend(accuracy[0]) == ["mean", "a b", "c"]
    assert lines(accuracy[1])["a b"] == [[2, 0.2], [4, 0.3]]


def test_a_search_is_shown_from_where_the_architecture_learns(tmp_path, pictures):
    """Entropies are shown as shares of their start, and how often the decoded network changed is
    added up.
    """
    draw(tmp_path, SEARCH)
    assert lines(pictures["training_loss.png"][0])["architecture's cases"] == [[30, 0.5]]
    losses, memory, entropies, changes = map(lines, pictures["search.png"])
    assert losses == {"weights": [[10, 3], [20, 2], [30, 1]], "architecture": [[30, 0.5]]}
    assert list(memory) == ["expected network", "RAM factor"]
    assert entropies["paths"] == [[10, 1], [20, 0.5], [30, 0.25]] and entropies["topology"][2] == [
        30,
        0,
    ]
    assert changes == {
        "paths": [[10, 0], [20, 3], [30, 4]],
        "operations": [[10, 0], [20, 0], [30, 2]],
    }


def test_pictures_leave_out_what_has_no_values(tmp_path, pictures):
    draw(tmp_path, {key: values[:1] for key, values in SEARCH.items()})  # it warms up
    for name, expected in (("training_loss.png", ["weights' cases"]), ("search.png", ["weights"])):
        assert legend(pictures[name][0]) == expected
    time = {"iteration": [10], "seconds": [60]}
    draw(tmp_path, {**time, "loss": [3]}, {**time, "dice": [0.5], "dice_spleen": [0.5]})
    # Of one class, the mean says nothing
    assert legend(pictures["validation_metric.png"][0]) == ["spleen"]
    draw(tmp_path, {**time, "loss": [3]}, {**time, "dice": [0.5], "dice_a": [""], "dice_b": [0.5]})
    assert legend(pictures["validation_metric.png"][0]) == ["mean", "b"]


def test_a_long_run_is_drawn_with_its_running_mean(tmp_path, pictures):
    count = 5000
    noisy = 1 + np.random.default_rng(0).normal(0, 0.2, count)
    draw(tmp_path, {"iteration": range(count), "seconds": range(count), "loss": noisy})
    (left, _) = pictures["training_loss.png"]
    ((name, smooth),) = lines(left).items()
    assert name == "training cases, mean of 100 epochs" and len(left.lines) == 2
    x, y = np.array(smooth).T
    assert y.std() < 0.03 and abs(x[0] - 49.5) < 1e-6 and y[7] == pytest.approx(noisy[7:107].mean())


def competed(folder: Path, *dices: tuple[str, int, float]) -> None:
    """Write the table of candidates, each given by its kind, its rung and its Dice, and draw it."""
    rows = [
        {
            "candidate": f"{kind}_{number}",
            "kind": kind,
            "iterations": str(iterations),
            "dice": str(dice),
        }
        for number, (kind, iterations, dice) in enumerate(dices)
    ]
    write_rows(folder / CANDIDATES, rows)
    curves.draw_candidates(folder)


def test_candidates_below_the_axis_are_marked_with_their_dice_and_no_point_has_another(
    tmp_path, pictures
):
    near = [
        ("by_hand", 200, 0.86),
        ("by_hand", 400, 0.87),
        *(("mutant", 200, 0.85 + 0.001 * n) for n in range(8)),
    ]
    far = [
        ("random", 200, 0.5793),
        ("random", 200, 0.0),
        *(("given", 200, 0.1 * n) for n in range(1, 5)),
    ]
    competed(tmp_path, *near, *far)
    (axes,) = pictures["candidates.png"]
    bottom, top = axes.get_ylim()
    points = sorted(
        dice for line in axes.lines if line.get_marker() == "o" for dice in line.get_ydata()
    )
    assert points == sorted(dice for _, _, dice in [*near, *far])
    assert 0.6 < bottom < 0.85 and top > 0.87
    marks = [line for line in axes.lines if line.get_marker() == "v"]
    assert [line.get_ydata() for line in marks] == [[bottom]] * 2
    assert {text.get_text() for text in axes.texts} == {"0.0000, 0.5793", "4: 0.1000 to 0.4000"}
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert colours["0.0000, 0.5793"] == curves.KINDS["random"]
    assert legend(axes) == ["given", "by hand", "random", "mutant"]
