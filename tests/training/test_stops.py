"""Stopping when asked to, after the step or the volume that is running, and saving from time to time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from states import progress_of

from dints.errors import Stopped
from dints.running.precision import Precision
from dints.running.processes import STOP_SIGNALS, Processes, started
from dints.training import progress
from dints.training.checkpoint import Checkpoint, find_state
from dints.training.stops import Requests, Stops

CPU = torch.device("cpu")
SETTINGS = {"processes": 1}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of before come back after each test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def begun(folder: Path, save_minutes: float = 1000.0, warning_signal: str = "USR1") -> Stops:
    processes = Processes(0, 1, CPU)
    checkpoint = Checkpoint(folder, SETTINGS, {}, Precision("fp32", CPU), processes)
    checkpoint.restore(find_state(folder, SETTINGS))
    return Stops(checkpoint, processes, Requests(warning_signal), save_minutes)


def ask_to_stop(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def place(folder: Path) -> tuple[int, int, int]:
    """Return completed epochs, steps of the one after, and iteration of the state that was saved last."""
    progress = progress_of(folder)
    return progress["epoch"], progress["step"], progress["iteration"]


@pytest.mark.fault("SIGTERM, SIGINT, preemption")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_stops_after_the_step_that_is_running(tmp_path, number):
    stops, done = begun(tmp_path, warning_signal="USR2"), []
    with pytest.raises(Stopped) as stopped:
        for batch in stops.steps(range(5)):
            if batch == 2:
                ask_to_stop(number)
            done.append(batch)
            stops.checkpoint.progress.step_done()
    assert done == [0, 1, 2] and stopped.value.signal == number
    assert stopped.value.saved == f"after iteration 3, with its state in {tmp_path / 'latest.pth'}"
    assert place(tmp_path) == (0, 3, 3)


def test_the_time_of_an_epoch_has_the_wait_for_its_last_steps(tmp_path, monkeypatch):
    """A GPU is given steps ahead, and does the last ones after the loop."""
    clock, gpu = [0.0], torch.device("cuda", 0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.__setitem__(0, 8.0) if device == gpu else None)
    stops = begun(tmp_path)
    stops.processes = Processes(0, 1, gpu)
    for _ in stops.steps(range(4)):
        stops.checkpoint.progress.step_done()
    assert stops.checkpoint.progress.seconds_per_iteration == 2.0


def test_steps_are_counted_by_whoever_does_them(tmp_path):
    stops = begun(tmp_path)
    assert list(stops.steps("abc")) == ["a", "b", "c"]
    assert (stops.checkpoint.progress.step, stops.checkpoint.progress.iteration) == (0, 0)


@pytest.mark.fault("SIGTERM, SIGINT, preemption")
@pytest.mark.parametrize("asked_at", ["x", "y", "z"])
def test_a_validation_that_was_stopped_is_done_again(tmp_path, asked_at):
    stops, seen = begun(tmp_path), []
    for _ in stops.steps("abc"):
        stops.checkpoint.progress.step_done()
    with pytest.raises(Stopped):
        for case in stops.volumes("xyz"):
            seen.append(case)
            if case == asked_at:
                ask_to_stop()
    assert seen[-1] == asked_at and place(tmp_path) == (0, 3, 3)
    stops = begun(tmp_path)
    assert not list(stops.steps("abc"[stops.checkpoint.progress.step :]))
    assert list(stops.volumes("xyz")) == ["x", "y", "z"]


def test_a_second_interrupt_does_not_wait_unless_it_is_the_same_one(tmp_path):
    stops, heeded = begun(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        for seconds_later in (0, 0, 2):  # the second is the first one, which a launcher passed on
            stops.requests.received_at -= seconds_later
            ask_to_stop(signal.SIGINT)
            heeded.append(stops.requests.received)
    assert heeded == [signal.SIGINT] * 2


def test_a_worker_that_was_stopped_too_does_no_harm(tmp_path):
    def batches(asked: bool) -> Iterator[int]:
        yield 0
        if asked:
            ask_to_stop()
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    for asked, error in ((True, Stopped), (False, RuntimeError)):  # without a signal it is an error
        stops = begun(tmp_path)
        with pytest.raises(error):
            for _ in stops.steps(batches(asked)):
                stops.checkpoint.progress.step_done()
    assert place(tmp_path) == (0, 1, 1)


def test_a_save_in_the_middle_of_an_epoch_when_it_is_time(tmp_path):
    stops = begun(tmp_path, save_minutes=0.0)
    for batch in stops.steps(range(3)):
        assert place(tmp_path) == (0, batch, batch)
        stops.checkpoint.progress.step_done()
    assert place(tmp_path) == (0, 3, 3)
    stops.save_minutes = 1000.0
    for _ in stops.steps(range(3)):
        stops.checkpoint.progress.step_done()
    assert place(tmp_path) == (0, 3, 3)


def test_handlers_come_back_after_a_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with started("cpu"):
        begun(tmp_path)
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
