"""How far a run has come, and its best validation."""

from __future__ import annotations

from pathlib import Path

import pytest

from dints.errors import Stopped
from dints.running import progress as module
from dints.running.progress import Progress, remark_on_dice


def test_progress_counts_steps_and_epochs():
    progress = Progress()
    for _ in range(2):
        progress.step_done()
    assert (progress.epoch, progress.current_epoch, progress.step, progress.iteration) == (
        0,
        1,
        2,
        2,
    )
    assert progress.recorded_iteration == 0
    progress.epoch_done()
    assert (progress.epoch, progress.current_epoch, progress.step) == (1, 1, 0)
    assert progress.recorded_iteration == 2


def test_progress_times_steps_and_what_is_stopped(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    progress = Progress()
    with pytest.raises(Stopped), progress.timed():
        progress.step_done()
        progress.step_done()
        raise Stopped(15)
    with progress.timed():  # a validation
        pass
    assert (progress.seconds, progress.seconds_per_iteration, progress.seconds_in_epoch) == (
        7,
        1.5,
        3,
    )


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([0.5, 0.4, 0.5], (0.5, 1, 10)),
        ([0.5, 0.4, 0.6], (0.6, 3, 30)),
        ([None, None], (None, 2, 20)),  # without validation cases, the newest is the best
    ],
)
def test_the_best_validation_is_kept(found, best):
    progress = Progress()
    for number, dice in enumerate(found, start=1):
        progress.epoch, progress.iteration = number, 10 * number
        is_best = progress.note_validation(dice, Path(str(number)))
        assert is_best == (progress.best_epoch == number)
    assert (progress.best_dice, progress.best_epoch, progress.best_iteration) == best
    assert progress.best_path == str(best[1])


@pytest.mark.parametrize(
    ("best", "num_cases", "says"),
    [
        (0.0004, 3, "Dice stayed 0 in all validations: 40 iterations may be too few"),
        (None, 3, "none of the 3 validation cases has any foreground"),
        (0.001, 3, ""),
        (None, 0, ""),  # --fold all
    ],
)
def test_a_training_that_found_nothing_is_remarked_on(best, num_cases, says, caplog):
    caplog.set_level("INFO")
    remark_on_dice(best, 40, num_cases)
    assert len(caplog.messages) == bool(says) and says in caplog.text
