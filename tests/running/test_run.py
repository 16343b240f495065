"""A run: its loop, stopping when asked to, saving from time to time, and its start."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from small_run import begun
from states import place_of

from dints.errors import Stopped
from dints.running import progress
from dints.running.processes import STOP_SIGNALS, Processes, started
from dints.running.run import Run


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of before come back after each test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Batches:
    """Stands for a loader, of an epoch that has these batches."""

    seconds_waited = 0.0

    def __init__(self, batches: Iterable):
        self.batches = batches

    def epoch(self, epoch: int, first_step: int) -> Iterator:
        return itertools.islice(self.batches, first_step, None)


def restored(folder: Path, save_minutes: float = 1000.0) -> Run:
    folder.mkdir(exist_ok=True)
    run = begun(folder, save_minutes=save_minutes)
    run.restore()
    return run


def ask_to_stop(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.fault("SIGTERM, SIGINT, preemption")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_after_the_step_that_is_running(tmp_path, number):
    run, done = restored(tmp_path), []
    with pytest.raises(Stopped) as stopped:
        for batch in run.steps(Batches(range(5))):
            if batch == 2:
                ask_to_stop(number)
            done.append(batch)
    assert done == [0, 1, 2] and stopped.value.signal == number
    assert stopped.value.saved == f"after iteration 3, with its state in {tmp_path / 'latest.pth'}"
    assert place_of(tmp_path) == (0, 3, 3)


def test_the_time_of_an_epoch_has_the_wait_for_its_last_steps(tmp_path, monkeypatch):
    """A GPU is given steps ahead, and does the last ones after the loop."""
    clock, gpu = [0.0], torch.device("cuda", 0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: clock.__setitem__(0, 8.0))
    run = restored(tmp_path)
    run.processes = Processes(0, 1, gpu)
    for _ in run.steps(Batches(range(4))):
        pass
    assert run.progress.seconds_per_iteration == 2.0


@pytest.mark.fault("SIGTERM, SIGINT, preemption")
@pytest.mark.parametrize("asked_at", ["x", "z"])
def test_a_validation_that_was_stopped_is_done_again(tmp_path, asked_at):
    run, seen = restored(tmp_path), []
    assert list(run.steps(Batches("abc"))) == ["a", "b", "c"]
    with pytest.raises(Stopped):
        for case in run.volumes("xyz"):
            seen.append(case)
            if case == asked_at:
                ask_to_stop()
    assert seen[-1] == asked_at and place_of(tmp_path) == (0, 3, 3)
    run = restored(tmp_path)
    assert not list(run.steps(Batches("abc")))
    assert list(run.volumes("xyz")) == ["x", "y", "z"]


def test_a_second_interrupt_does_not_wait_unless_it_is_the_same_one(tmp_path):
    run, heeded = restored(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        for seconds_later in (0, 0, 2):  # the second is the first one, which a launcher passed on
            run.stop_signal.received_at -= seconds_later
            ask_to_stop(signal.SIGINT)
            heeded.append(run.stop_signal.received)
    assert heeded == [signal.SIGINT] * 2


def test_a_worker_that_was_stopped_too_does_no_harm(tmp_path):
    def batches(asked: bool) -> Iterator[int]:
        yield 0
        if asked:
            ask_to_stop()
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    for name, asked, error in (("0", True, Stopped), ("1", False, RuntimeError)):
        run = restored(tmp_path / name)
        with pytest.raises(error):  # without a signal it is an error
            list(run.steps(Batches(batches(asked))))
    assert place_of(tmp_path / "0") == (0, 1, 1)


def test_a_save_in_the_middle_of_an_epoch_when_it_is_time(tmp_path):
    for name, save_minutes, saved in (("0", 0.0, [0, 1, 2]), ("1", 1000.0, [0, 0, 0])):
        run = restored(tmp_path / name, save_minutes)
        for batch in run.steps(Batches(range(3))):
            assert place_of(tmp_path / name) == (0, saved[batch], saved[batch])


def test_epochs_that_are_left_and_batches_of_two_loaders(tmp_path):
    run, seen = restored(tmp_path), []
    for epoch in run.epochs(2):
        for pair in run.steps(Batches("ab"), Batches("xy") if epoch else None):
            seen.append(pair)
    assert seen == [("a", None), ("b", None), ("a", "x"), ("b", "y")]
    assert (run.progress.epoch, run.progress.step, run.progress.iteration) == (2, 0, 4)
    run.checkpoint.save()
    run = restored(tmp_path)
    assert list(run.epochs(3)) == [2]
    until = [batch for _ in run.epochs(5) for batch in run.steps(Batches("abc"), until=8)]
    assert until == ["a", "b", "c", "a"]


def test_handlers_come_back_after_a_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with started("cpu"):
        restored(tmp_path)
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
