"""What a run is continued from: kept twice, checked, never half; and what it refuses."""

from __future__ import annotations

import argparse
import os
import signal
import zipfile
from pathlib import Path

import pytest
import torch

from dints import checkpoint as module
from dints import options, runtime
from dints.checkpoint import Checkpoint, Progress, configuration
from dints.errors import Stopped, UserError, exit_on_user_error
from dints.runtime import Precision, Processes

ALONE = Processes(0, 1, torch.device("cpu"))
FP32 = Precision("fp32", ALONE.device)
CONFIGURATION = {"num_epochs": 3, "seed": 0, "processes": 1}


@pytest.fixture(autouse=True)
def handlers():
    """Those of before come back after each test."""
    before = {number: signal.getsignal(number) for number in runtime.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def opened(folder: Path, settings: dict = CONFIGURATION, **flags: object) -> Checkpoint:
    defaults = {"resume": "auto", "save_minutes": 1000.0, "warning_signal": "USR1", "allow_other_num_processes": False}
    return Checkpoint(folder, argparse.Namespace(**{**defaults, **flags}), settings, ALONE)


def layer(value: float = 0.0, size: int = 4) -> torch.nn.Linear:
    network = torch.nn.Linear(size, size)
    torch.nn.init.constant_(network.weight, value)
    return network


def saved(folder: Path, *values: float, size: int = 4) -> None:
    """A run that saved its state with each of these values, after one step each."""
    network = layer(size=size)
    checkpoint = opened(folder)
    progress = checkpoint.restore({"network": network}, FP32)
    for value in values:
        torch.nn.init.constant_(network.weight, value)
        progress.step_done()
        checkpoint.save()


def restored(folder: Path, size: int = 4, **flags: object) -> tuple[float, Progress]:
    network, checkpoint = layer(-1.0, size), opened(folder, **flags)
    progress = checkpoint.restore({"network": network}, FP32)
    (value,) = network.weight.unique().tolist()
    return value, progress


# Progress


def test_progress_counts_steps_and_epochs():
    progress = Progress()
    assert (progress.current_epoch, progress.recorded_iteration) == (0, 0)
    for step in (1, 2):
        progress.step_done()
        assert (progress.epoch, progress.current_epoch, progress.step, progress.iteration) == (0, 1, step, step)
        assert progress.recorded_iteration == 0
    progress.epoch_done()
    assert (progress.epoch, progress.current_epoch, progress.step, progress.recorded_iteration) == (1, 1, 0, 2)


def test_progress_times_steps_and_what_is_stopped(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    progress = Progress()
    with pytest.raises(Stopped), progress.timed():
        progress.step_done()
        progress.step_done()
        raise Stopped(15)
    assert (progress.seconds, progress.seconds_per_iteration, progress.seconds_in_epoch) == (3, 1.5, 3)
    with progress.timed():  # a validation
        pass
    assert (progress.seconds, progress.seconds_per_iteration) == (7, 1.5)


def test_progress_keeps_the_best_validation():
    progress = Progress(epoch=0, step=5, iteration=10)
    assert progress.note_validation(0.5, Path("a"))
    progress.epoch, progress.iteration = 1, 20
    assert not progress.note_validation(0.4, Path("b"))
    assert (progress.best_dice, progress.best_iteration, progress.best_path) == (0.5, 10, "a")
    progress.epoch, progress.iteration = 2, 30
    assert progress.note_validation(0.6, Path("c"))
    assert (progress.best_dice, progress.best_epoch, progress.best_path) == (0.6, 3, "c")


def test_without_validation_cases_the_newest_is_the_best():
    progress = Progress()
    for iteration in (10, 20):
        progress.iteration = iteration
        assert progress.note_validation(None, Path(f"{iteration}"))
    assert progress.best_path == "20" and progress.best_dice is None


# Saving and continuing


def test_a_run_saves_before_it_begins(tmp_path):
    assert restored(tmp_path) == (-1.0, Progress())
    state = torch.load(tmp_path / "latest.pth", weights_only=True)
    assert state["format"] == module.FORMAT and state["precision"] == "fp32" and state["configuration"] == CONFIGURATION


def test_what_was_saved_is_restored(tmp_path):
    saved(tmp_path, 1.0, 2.0)
    value, progress = restored(tmp_path, resume="must")
    assert (value, progress.step, progress.iteration) == (2.0, 2, 2)
    assert opened(tmp_path).precision == "fp32"


def test_the_two_newest_are_kept(tmp_path):
    saved(tmp_path, 1.0, 2.0, 3.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.pth", "previous.pth"]
    values = [torch.load(tmp_path / name, weights_only=True)["progress"]["iteration"] for name in os.listdir(tmp_path)]
    assert sorted(values) == [2, 3]


def flip_a_bit(path: Path) -> None:
    """In the middle of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 8
    path.write_bytes(content)


DAMAGES = {
    "bit": flip_a_bit,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_text("not a checkpoint"),
    "missing": lambda path: path.unlink(),  # killed between the two renames
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, damage, caplog):
    saved(tmp_path, 1.0, 2.0, size=200)
    DAMAGES[damage](tmp_path / "latest.pth")
    value, progress = restored(tmp_path, size=200)
    assert (value, progress.iteration) == (1.0, 1)
    assert ("previous.pth, the one before" in caplog.text) == (damage != "missing")
    # And the good one is not thrown away for the damaged one by the next save.
    network, checkpoint = layer(5.0, 200), opened(tmp_path)
    checkpoint.restore({"network": network}, FP32)
    checkpoint.save()
    for name in ("latest.pth", "previous.pth"):
        if (tmp_path / name).exists():
            module._load(tmp_path / name)


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "missing"])
def test_two_damaged_ones_are_refused(tmp_path, damage):
    saved(tmp_path, 1.0, 2.0, size=200)
    for name in ("latest.pth", "previous.pth"):
        DAMAGES[damage](tmp_path / name)
    with pytest.raises(UserError, match="previous.pth"):
        opened(tmp_path)


def test_every_flipped_bit_of_a_tensor_is_noticed(tmp_path):
    saved(tmp_path, 1.0, size=64)
    path = tmp_path / "latest.pth"
    whole = path.read_bytes()
    start = whole.index(torch.ones(64 * 64).numpy().tobytes())
    for place in range(start, start + 64 * 64 * 4, 511):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            module._load(path)


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    saved(tmp_path, 1.0)
    checkpoint = opened(tmp_path)
    checkpoint.restore({"network": layer()}, FP32)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: argparse.Namespace(free=10))
        with pytest.raises(UserError, match=r"latest.pth needs 0.0 MiB, and 0.0 are free on its disk: free some space"):
            checkpoint.save()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="latest.pth cannot be written: No space left on device"):
            checkpoint.save()
    assert restored(tmp_path)[0] == 1.0 and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    saved(tmp_path, 1.0)
    network, checkpoint = layer(), opened(tmp_path)
    checkpoint.restore({"network": network}, FP32)
    network.weight.data[0, 0] = value
    with pytest.raises(UserError, match="the training diverged: weights are not finite, and are not saved; lower"):
        checkpoint.save()
    assert restored(tmp_path)[0] == 1.0


# Refusals


def test_every_setting_that_differs_is_named(tmp_path):
    saved(tmp_path, 1.0)
    with pytest.raises(UserError, match="num_epochs was 3 and is 4, seed was 0 and is 1"):
        opened(tmp_path, {**CONFIGURATION, "num_epochs": 4, "seed": 1})


def test_another_number_of_processes_needs_a_flag(tmp_path, caplog):
    saved(tmp_path, 1.0)
    other = {**CONFIGURATION, "processes": 2}
    with pytest.raises(UserError, match="processes was 1 and is 2.*--allow_other_num_processes"):
        opened(tmp_path, other)
    opened(tmp_path, other, allow_other_num_processes=True)
    assert "had 1 processes and has 2: it continues, but not to the result that it would have had" in caplog.text
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        opened(tmp_path, {**other, "seed": 1}, allow_other_num_processes=True)


def test_never_starts_afresh_and_leaves_nothing_to_continue(tmp_path):
    saved(tmp_path, 1.0, 2.0)
    assert opened(tmp_path, {"other": 1}, resume="never").source is None
    assert not list(tmp_path.iterdir())


def test_must_needs_something_to_continue(tmp_path):
    with pytest.raises(UserError, match="--resume must, but there is no .*latest.pth"):
        opened(tmp_path, resume="must")


@pytest.mark.parametrize("name", ["Events", "loss_history.csv", "search_code_600.pth", "best_metric_model.pth"])
def test_results_without_a_state_are_not_overwritten(tmp_path, name):
    (tmp_path / name).mkdir() if name == "Events" else (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"holds results .{name}. but no latest.pth to continue from: .*--resume never"):
        opened(tmp_path)
    assert opened(tmp_path, resume="never").source is None


@pytest.mark.parametrize("content", [[1, 2], {"configuration": {}}, None])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    if content is None:
        (tmp_path / "latest.pth").write_bytes(b"no checkpoint")
    else:
        torch.save(content, tmp_path / "latest.pth")
    with pytest.raises(UserError, match="latest.pth"):
        opened(tmp_path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    saved(tmp_path, 1.0)
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(UserError, match="has the format 1, and this version writes 2: .*--resume never"):
        opened(tmp_path)


def test_the_configuration_knows_contents_but_not_places():
    def configured(root: str, seed: int, cases: list[str], **manner: object) -> dict:
        args = argparse.Namespace(root=Path(root), output_root=Path("out"), seed=seed, num_workers=3, **manner)
        return configuration(args, ALONE, cases=cases)

    first = configured("here", 0, ["a", "b"], timeout_minutes=3, warning_signal="USR1", cache="ram")
    assert first == configured("there", 0, ["a", "b"], timeout_minutes=5, warning_signal="USR2", cache="disk")
    assert first != configured("here", 1, ["a", "b"])
    assert first != configured("here", 0, ["a", "c"])


# Stopping


def running(folder: Path, **flags: object) -> Checkpoint:
    checkpoint = opened(folder, **flags)
    checkpoint.restore({"network": layer()}, FP32)
    return checkpoint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_stops_after_the_step_that_is_running(tmp_path, number):
    checkpoint = running(tmp_path, warning_signal="USR2")
    done = []
    with pytest.raises(Stopped) as stopped, checkpoint.saved_when_stopped():
        for batch in checkpoint.steps(iter(range(5))):
            if batch == 2:
                os.kill(os.getpid(), number)
            done.append(batch)
    assert done == [0, 1, 2] and stopped.value.signal == number
    assert f"after iteration 3, with its state in {tmp_path / 'latest.pth'}" == stopped.value.saved
    _, progress = restored(tmp_path)
    assert (progress.epoch, progress.step, progress.iteration) == (0, 3, 3)


def test_a_whole_epoch_is_counted(tmp_path):
    checkpoint = running(tmp_path)
    assert list(checkpoint.steps(iter("abc"))) == ["a", "b", "c"]
    assert (checkpoint.progress.step, checkpoint.progress.iteration) == (3, 3)


def test_a_validation_ends_early_and_the_epoch_is_not_done(tmp_path):
    checkpoint = running(tmp_path)
    list(checkpoint.steps(iter("abc")))
    seen = []
    with pytest.raises(Stopped), checkpoint.saved_when_stopped():
        for case in checkpoint.unless_stopped("xyz"):
            seen.append(case)
            os.kill(os.getpid(), signal.SIGTERM)
        checkpoint.stop_if_asked()
    assert seen == ["x"]
    _, progress = restored(tmp_path)
    assert (progress.epoch, progress.step, progress.iteration) == (0, 3, 3)


def test_a_second_interrupt_does_not_wait_unless_it_is_the_same_one(tmp_path):
    checkpoint = running(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        for _ in checkpoint.steps(iter(range(5))):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert checkpoint.received == signal.SIGINT
            checkpoint.received_at -= 2  # seconds later
            os.kill(os.getpid(), signal.SIGINT)


def test_a_worker_that_was_stopped_too_does_no_harm(tmp_path):
    def batches():
        yield 0
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    checkpoint = running(tmp_path)
    with pytest.raises(Stopped):
        list(checkpoint.steps(batches()))
    assert checkpoint.progress.iteration == 1

    def broken():
        raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")
        yield

    with pytest.raises(RuntimeError, match="exited unexpectedly"):  # without a signal it is an error
        list(running(tmp_path).steps(broken()))


def test_a_save_in_the_middle_of_an_epoch_when_it_is_time(tmp_path):
    checkpoint = running(tmp_path, save_minutes=0.0)
    for batch in checkpoint.steps(iter(range(3))):
        assert torch.load(tmp_path / "latest.pth", weights_only=True)["progress"]["iteration"] == batch
    checkpoint.save_minutes = 1000.0
    list(checkpoint.steps(iter(range(3))))
    assert restored(tmp_path)[1].iteration == 3


def test_the_script_says_how_to_continue_and_ends_with_the_signals_code(capsys):
    def stop():
        stopped = Stopped(signal.SIGTERM)
        stopped.saved = "after iteration 7, with its state in run/latest.pth"
        raise stopped

    def interrupt():
        raise KeyboardInterrupt

    for run, code, opening in (
        (stop, 143, "stopped after iteration 7, with its state"),
        (interrupt, 130, "interrupted"),
    ):
        with pytest.raises(SystemExit) as ended:
            exit_on_user_error(run)
        said = capsys.readouterr().err
        assert ended.value.code == code and said.startswith(opening) and said.count("\n") == 1


# The run folder and memory


def test_partial_files_of_a_killed_run_are_swept(tmp_path):
    (tmp_path / ".latest.pth.123.partial").write_bytes(b"half")
    with runtime.run_folder(tmp_path, ALONE):
        assert not (tmp_path / ".latest.pth.123.partial").exists()


def test_handlers_come_back_after_a_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with runtime.started("cpu"):
        running(tmp_path)
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
    ids=["Python", "CPU", "GPU"],
)
def test_exhausted_memory_names_the_flags_that_lower_it(error):
    with (
        pytest.raises(UserError, match="memory is exhausted .*--patch_size.*--num_sw_batch_size"),
        runtime.started("cpu"),
    ):
        raise error


def test_memory_that_is_really_exhausted_is_told():
    with pytest.raises(UserError, match="memory is exhausted .*allocate"), runtime.started("cpu"):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a bug"), runtime.started("cpu"):
        raise RuntimeError("a bug")


# Budgets


@pytest.mark.parametrize(
    ("steps", "iterations", "expected"),
    [
        (10, 500, (50, 25, 5)),
        (5, 500, (100, 50, 10)),
        (10, 10, (1, 0, 1)),
        (7, 100, (14, 7, 1)),
        (1000, 500, (1, 0, 1)),
    ],
)
def test_a_budget_in_iterations_scales_every_number_of_epochs(steps, iterations, expected):
    args = argparse.Namespace(
        num_iterations=iterations, num_epochs=1000, num_epochs_warmup=500, num_epochs_per_validation=100
    )
    scaled = options.scaled_to_iterations(args, steps)
    assert (scaled.num_epochs, scaled.num_epochs_warmup, scaled.num_epochs_per_validation) == expected
    assert args.num_epochs == 1000  # what the run is known by
    args.num_iterations = None
    assert options.scaled_to_iterations(args, steps) is args
