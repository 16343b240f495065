"""Tables, TensorBoard events, progress.yaml and pictures of a run, and what a resumed or fresh run does with them."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import matplotlib.axes
import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dints.checkpoint import Progress
from dints.engine import Scores
from dints.history import ACCURACY, LOSSES, History, curves, draw_curves, read_rows

CLASSES = ("background", "left atrium", "lesion")
PNG = b"\x89PNG\r\n\x1a\n"


def scores(*dice: float) -> Scores:
    return Scores(torch.tensor([dice]), [0] * len(dice))


def run(folder: Path, epochs: range, values=lambda epoch: {"loss": 1 / (epoch + 1), "architecture_loss": None}) -> None:
    """Epochs of 10 iterations and 30 seconds with a validation each, from where ``epochs`` begins."""
    history = History(folder, CLASSES, iteration=10 * epochs.start, enabled=True)
    for epoch in epochs:
        progress = Progress(epoch, 10, 10 * (epoch + 1), 30.0 * (epoch + 1), 2.5, 25.0, 0.5, 1, 10, "best.pth")
        history.add_epoch(progress, values(epoch))
        history.add_validation(progress, scores(0.5 + epoch / 100, 0.25))
    history.close()


def table(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show."""
    events = EventAccumulator(str(folder / "Events")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tables_have_a_row_an_epoch_and_a_row_a_validation(tmp_path):
    run(tmp_path, range(2))
    assert table(tmp_path / LOSSES) == [
        ["epoch", "iteration", "seconds", "loss", "architecture_loss", "seconds_per_iteration"],
        ["1", "10", "30.0", "1.0", "", "2.5"],
        ["2", "20", "60.0", "0.5", "", "2.5"],
    ]
    header, *rows = table(tmp_path / ACCURACY)
    assert header == ["epoch", "iteration", "seconds", "dice", "dice_left_atrium", "dice_lesion"]
    assert [[float(value) for value in row] for row in rows] == [
        pytest.approx([1, 10, 30, 0.375, 0.5, 0.25]),
        pytest.approx([2, 20, 60, 0.38, 0.51, 0.25]),
    ]
    assert (tmp_path / LOSSES).read_bytes().count(b"\r") == 0


def test_tensorboard_has_the_same_values(tmp_path):
    run(tmp_path, range(2))
    found = scalars(tmp_path)
    assert found["train/loss"] == [(10, 1.0), (20, 0.5)] and found["train/seconds_per_iteration"] == [
        (10, 2.5),
        (20, 2.5),
    ]
    assert found["validation/dice_left_atrium"] == [(10, 0.5), (20, pytest.approx(0.51))]
    assert "train/architecture_loss" not in found


def test_an_absent_class_leaves_an_empty_cell(tmp_path):
    history = History(tmp_path, CLASSES, 0, True)
    history.add_validation(Progress(0, 10, 10), scores(float("nan"), 0.5))
    history.add_validation(Progress(1, 10, 20), scores(float("nan"), float("nan")))
    history.close()
    assert [row[3:] for row in table(tmp_path / ACCURACY)[1:]] == [["0.5", "", "0.5"], ["", "", ""]]
    assert scalars(tmp_path) == {"validation/dice": [(10, 0.5)], "validation/dice_lesion": [(10, 0.5)]}


def test_progress_file_tells_the_best_validation(tmp_path):
    history = History(tmp_path, CLASSES, 0, True)
    progress = Progress(6, 10, 70, 90.5)
    progress.note_validation(0.75, Path("run/best.pth"))
    progress.epoch, progress.iteration = 7, 80
    progress.note_validation(0.5, Path("run/worse.pth"))
    history.add_validation(progress, scores(0.5, 0.5))
    history.close()
    assert yaml.safe_load((tmp_path / "progress.yaml").read_text()) == {
        "epoch": 8,
        "iteration": 80,
        "minutes": 1.51,
        "best_avg_dice_score": 0.75,
        "best_avg_dice_score_epoch": 7,
        "best_avg_dice_score_iteration": 70,
        "best_path": "run/best.pth",
    }


def test_without_validation_cases_progress_is_still_written(tmp_path):
    history = History(tmp_path, CLASSES, 0, True)
    history.add_epoch(Progress(0, 10, 10, 30.0, 3.0), {"loss": 0.5})
    history.add_validation(Progress(0, 10, 10, 30.0, 3.0), None)
    history.close()
    assert yaml.safe_load((tmp_path / "progress.yaml").read_text())["best_avg_dice_score"] is None
    assert not (tmp_path / ACCURACY).exists() and (tmp_path / "training_loss.png").exists()
    assert not (tmp_path / "validation_metric.png").exists()


def test_resume_cuts_what_came_after_the_checkpoint(tmp_path):
    run(tmp_path, range(5))
    straight = {name: (tmp_path / name).read_text() for name in (LOSSES, ACCURACY)}
    run(tmp_path, range(3, 4))  # the checkpoint was of iteration 30
    assert [row["iteration"] for row in read_rows(tmp_path / LOSSES)] == ["10", "20", "30", "40"]
    assert [row["iteration"] for row in read_rows(tmp_path / ACCURACY)] == ["10", "20", "30", "40"]
    run(tmp_path, range(4, 5))
    assert {name: (tmp_path / name).read_text() for name in straight} == straight
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [10, 20, 30, 40, 50]


def test_resume_drops_a_line_that_a_kill_cut_short(tmp_path):
    run(tmp_path, range(3))
    whole = (tmp_path / LOSSES).read_text()
    for cut in (1, 3, 12):
        (tmp_path / LOSSES).write_text(whole[:-cut])
        assert [row["iteration"] for row in read_rows(tmp_path / LOSSES)] == ["10", "20"]
    run(tmp_path, range(2, 3))
    assert (tmp_path / LOSSES).read_text() == whole


def test_resume_before_the_first_whole_line(tmp_path):
    (tmp_path / LOSSES).write_text("epoch,iterat")
    run(tmp_path, range(1, 2))
    assert [row["iteration"] for row in read_rows(tmp_path / LOSSES)] == ["20"]


def test_a_fresh_start_replaces_tables_and_events(tmp_path):
    run(tmp_path, range(4))
    run(tmp_path, range(1))
    assert len(table(tmp_path / LOSSES)) == len(table(tmp_path / ACCURACY)) == 2
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [10]


def test_other_ranks_write_nothing(tmp_path):
    history = History(tmp_path, CLASSES, 0, enabled=False)
    history.add_epoch(Progress(0, 10, 10), {"loss": 0.5})
    history.add_validation(Progress(0, 10, 10), scores(0.5, 0.5))
    history.close()
    assert list(tmp_path.iterdir()) == []


def test_people_read_losses_and_dice_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, range(1))
    assert "epoch 1 iteration 10: loss 1 (2.50 s/it)" in caplog.text
    assert "epoch 1 iteration 10: Dice 0.3750 (left atrium 0.5000, lesion 0.2500)" in caplog.text


# Pictures


def write_table(path: Path, columns: dict[str, list]) -> None:
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")


def drawn(axes: matplotlib.axes.Axes) -> dict[str, np.ndarray]:
    """Points of the curves that the legend names."""
    return {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}


def legend(axes: matplotlib.axes.Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.fixture
def figures(tmp_path, monkeypatch) -> dict[str, list[matplotlib.axes.Axes]]:
    """The axes of the pictures, by label, as `draw_curves` makes them."""
    made = {}

    def keep(rows, names, label, corner):
        figure = curves(rows, names, label, corner)
        made[label] = figure.axes
        return figure

    monkeypatch.setattr("dints.history.curves", keep)
    return made


def test_pictures_are_png_files(tmp_path):
    run(tmp_path, range(3))
    for name in ("training_loss.png", "validation_metric.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_pictures_show_losses_and_dice_over_iterations_and_minutes(tmp_path, figures):
    time = {"iteration": [10, 20, 30], "seconds": [60, 120, 240]}
    write_table(tmp_path / LOSSES, {**time, "loss": [3, 2, 1], "architecture_loss": ["", "", 0.5]})
    write_table(tmp_path / ACCURACY, {**time, "dice": [0.1, 0.2, 0.3], "dice_a_b": ["", 0.2, 0.3], "dice_c": [0.1] * 3})
    draw_curves(tmp_path)
    losses, accuracy = figures["training loss (Dice + CE)"], figures["Dice of the validation cases"]
    for left, right in (losses, accuracy):
        assert (left.get_xlabel(), right.get_xlabel()) == ("iterations", "minutes")
    assert drawn(losses[0])["weights' cases"].tolist() == [[10, 3], [20, 2], [30, 1]]
    assert drawn(losses[1])["weights' cases"].tolist() == [[1, 3], [2, 2], [4, 1]]
    assert drawn(losses[0])["architecture's cases"].tolist() == [[30, 0.5]]
    assert list(drawn(accuracy[0])) == legend(accuracy[0]) == ["mean", "a b", "c"]
    assert drawn(accuracy[1])["a b"].tolist() == [[2, 0.2], [4, 0.3]]


def test_pictures_leave_out_what_has_no_values(tmp_path, figures):
    time = {"iteration": [10], "seconds": [60]}
    write_table(tmp_path / LOSSES, {**time, "loss": [3], "architecture_loss": [""]})
    write_table(tmp_path / ACCURACY, {**time, "dice": [0.5], "dice_spleen": [0.5]})
    draw_curves(tmp_path)
    assert legend(figures["training loss (Dice + CE)"][0]) == ["weights' cases"]
    assert legend(figures["Dice of the validation cases"][0]) == ["spleen"]  # of one class, the mean says nothing


def test_a_long_run_is_drawn_with_its_running_mean(tmp_path, figures):
    count = 5000
    noisy = 1 + np.random.default_rng(0).normal(0, 0.2, count)
    write_table(tmp_path / LOSSES, {"iteration": range(count), "seconds": range(count), "loss": noisy})
    draw_curves(tmp_path)
    (left, _) = figures["training loss (Dice + CE)"]
    ((name, smooth),) = drawn(left).items()
    assert name == "training cases, mean of 100 epochs" and len(left.lines) == 2
    assert smooth[:, 1].std() < 0.03 and abs(smooth[0, 0] - 49.5) < 1e-6
    assert smooth[7, 1] == pytest.approx(noisy[7:107].mean())
