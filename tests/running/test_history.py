"""Tables, TensorBoard events and progress.yaml of a run, and what a resumed or fresh run does with
them.
"""

from __future__ import annotations

import csv
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from states import scalars
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter

from dints.errors import UserError
from dints.running import curves
from dints.running.history import History
from dints.running.progress import Progress
from dints.running.tables import ACCURACY, LOSSES, read_rows
from dints.training.validation import Scores

pytestmark = pytest.mark.pictures

CLASSES = ("background", "left atrium", "lesion")


@pytest.fixture(autouse=True)
def drawn(monkeypatch) -> list[Path]:
    """The folders whose pictures would have been drawn, which takes long."""
    folders = []
    monkeypatch.setattr(curves, "draw_all", folders.append)
    return folders


@pytest.fixture(autouse=True)
def equally_long_names(monkeypatch) -> None:
    """Event files of one second are read in the order of their names, whose last number is not
    padded.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


def scores(*dice: float) -> Scores:
    return Scores(torch.tensor([dice]), [0] * len(dice))


def run(
    folder: Path,
    epochs: range,
    values: Callable[[int], dict] = lambda epoch: {"loss": 1 / (epoch + 1)},
) -> None:
    """Note epochs of 10 iterations and 30 seconds with a validation each, from where ``epochs``
    begins.
    """
    history = History(folder, CLASSES, iteration=10 * epochs.start, enabled=True)
    for epoch in epochs:
        progress = Progress(
            epoch, 10, 10 * (epoch + 1), 30.0 * (epoch + 1), 2.5, 25.0, 0.5, 1, 10, "best.pth"
        )
        history.add_epoch(progress, values(epoch))
        history.add_validation(progress, scores(0.5 + epoch / 100, 0.25))
    history.close()


def table(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def iterations(path: Path) -> list[int]:
    return [int(row["iteration"]) for row in read_rows(path)]


def test_tables_and_tensorboard_have_every_epoch_and_every_validation(tmp_path, drawn):
    run(tmp_path, range(2), lambda epoch: {"loss": 1 / (epoch + 1), "architecture_loss": None})
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
    found = scalars(tmp_path)
    assert found["train/loss"] == [(10, 1.0), (20, 0.5)]
    assert found["train/seconds_per_iteration"] == [(10, 2.5), (20, 2.5)]
    assert found["validation/dice_left_atrium"] == [(10, 0.5), (20, pytest.approx(0.51))]
    assert "train/architecture_loss" not in found
    assert drawn == [tmp_path] * 2


def test_an_absent_class_leaves_an_empty_cell(tmp_path):
    history = History(tmp_path, CLASSES, 0, True)
    history.add_validation(Progress(0, 10, 10), scores(float("nan"), 0.5))
    history.add_validation(Progress(1, 10, 20), scores(float("nan"), float("nan")))
    history.close()
    assert [row[3:] for row in table(tmp_path / ACCURACY)[1:]] == [["0.5", "", "0.5"], ["", "", ""]]
    assert scalars(tmp_path) == {
        "validation/dice": [(10, 0.5)],
        "validation/dice_lesion": [(10, 0.5)],
    }


def test_progress_file_names_the_best_validation(tmp_path):
    history, progress = History(tmp_path, CLASSES, 0, True), Progress(6, 10, 70, 90.5)
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


def test_a_validation_without_cases_and_a_picture_that_cannot_be_written_end_no_run(
    tmp_path, monkeypatch, caplog
):
    def full_disk(folder: Path) -> None:
        raise UserError(f"{folder} cannot be written: No space left on device")

    monkeypatch.setattr(curves, "draw_all", full_disk)
    history = History(tmp_path, CLASSES, 0, True)
    history.add_validation(Progress(0, 10, 10, 30.0, 3.0), None)
    history.close()
    assert "No space left on device" in caplog.text
    written = yaml.safe_load((tmp_path / "progress.yaml").read_text())
    assert written["best_avg_dice_score"] is None and not (tmp_path / ACCURACY).exists()


def test_resume_cuts_what_came_after_the_checkpoint(tmp_path):
    run(tmp_path, range(5))
    straight = {name: (tmp_path / name).read_text() for name in (LOSSES, ACCURACY)}
    run(tmp_path, range(3, 4))  # the checkpoint was of iteration 30
    assert iterations(tmp_path / LOSSES) == iterations(tmp_path / ACCURACY) == [10, 20, 30, 40]
    run(tmp_path, range(4, 5))
    assert {name: (tmp_path / name).read_text() for name in straight} == straight
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [10, 20, 30, 40, 50]


def test_resume_drops_a_line_that_a_kill_cut_short(tmp_path):
    run(tmp_path, range(3))
    whole = (tmp_path / LOSSES).read_text()
    for cut in (1, 3, 12):
        (tmp_path / LOSSES).write_text(whole[:-cut])
        assert iterations(tmp_path / LOSSES) == [10, 20]
    run(tmp_path, range(2, 3))
    assert (tmp_path / LOSSES).read_text() == whole
    (tmp_path / LOSSES).write_text(whole[:12])  # of the header
    run(tmp_path, range(1, 2))
    assert iterations(tmp_path / LOSSES) == [20]


def test_a_fresh_start_replaces_tables_and_events(tmp_path):
    run(tmp_path, range(4))
    run(tmp_path, range(1))
    assert iterations(tmp_path / LOSSES) == iterations(tmp_path / ACCURACY) == [10]
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [10]


@pytest.mark.fault("disk full while saving")
def test_a_disk_that_is_full_for_tensorboard_is_one_error_and_no_traceback(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    written = pytest.raises(
        UserError, match="Events cannot be written: No space left on device; free some space, then"
    )
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        with written:
            run(tmp_path / "at the start", range(1))
    history = History(tmp_path, CLASSES, 0, enabled=True)
    monkeypatch.setattr(RecordWriter, "write", full)
    with written:
        history.add_epoch(Progress(0, 10, 10), {"loss": 0.5})
    assert printed == []
    history._report_unless_raised(
        SimpleNamespace(exc_value=OSError(28), thread=threading.current_thread())
    )
    assert len(printed) == 1  # of any other thread


def test_other_ranks_write_nothing(tmp_path, drawn):
    history = History(tmp_path, CLASSES, 0, enabled=False)
    history.add_epoch(Progress(0, 10, 10), {"loss": 0.5})
    history.add_validation(Progress(0, 10, 10), scores(0.5, 0.5))
    history.close()
    assert not list(tmp_path.iterdir()) and not drawn


def test_people_read_losses_and_dice_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, range(1), lambda _: {"loss": 1.0, "data_wait": 0.25, "architecture_loss": None})
    assert "epoch 1 iteration 10: loss 1 (2.50 s/it, 25.0% of it waiting for data)" in caplog.text
    assert "epoch 1 iteration 10: Dice 0.3750 (left atrium 0.5000, lesion 0.2500)" in caplog.text
