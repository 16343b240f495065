"""The run folder: made, probed, locked against a second run, and cleared for a fresh start,
once.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import search
from small_run import ALONE

from dints.errors import UserError
from dints.running.run_folder import NOTE, opened, start_afresh

TWO_RUNS = pytest.mark.fault("two runs in one output folder")


@TWO_RUNS
def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(tmp_path):
    second = opened(tmp_path / "run", ALONE)
    with (
        opened(tmp_path / "run", ALONE),
        pytest.raises(UserError, match="another run is writing into"),
    ):
        second.__enter__()
    with opened(tmp_path / "run", ALONE) as folder:
        assert folder.is_dir()


@TWO_RUNS
def test_a_kill_frees_the_folder_though_a_worker_lives_on(tmp_path):
    """As the workers of a killed process do, for some seconds, while the launcher starts it
    again.
    """
    reading, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        with opened(tmp_path / "run", ALONE):
            worker = os.fork()
            if worker:
                os.write(ready, b"%d" % worker)
            time.sleep(60)
    worker = int(os.read(reading, 9))
    try:
        with pytest.raises(UserError, match="another run"), opened(tmp_path / "run", ALONE):
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with opened(tmp_path / "run", ALONE):
            os.kill(worker, 0)  # it is there
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.fault("output folder read-only")
@pytest.mark.parametrize("place", ["a file", "below a file", "denied"])
def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path, place):
    (file := tmp_path / "file").write_text("")
    root = {"a file": file, "below a file": file / "run", "denied": Path("/sys/kernel")}[place]
    if place == "denied" and not root.is_dir():
        pytest.skip("needs a folder that is closed even to root, such as Linux' /sys")
    with (
        pytest.raises(UserError, match=f"--output_root {root} cannot be written"),
        opened(root, ALONE),
    ):
        pass


@pytest.mark.fault("SIGKILL while saving")
def test_partial_files_of_a_killed_run_are_swept(tmp_path):
    (tmp_path / ".latest.pth.123.partial").write_bytes(b"half")
    (tmp_path / "candidates").mkdir()
    (tmp_path / "candidates/.latest.pth.123.partial").write_bytes(b"half")
    with opened(tmp_path, ALONE):
        assert not list(tmp_path.rglob("*.partial"))


def test_files_of_other_runs_and_programs_are_not_swept(tmp_path):
    """A run's folder may lie in another one's, and another program may call its files so."""
    kept = [
        tmp_path / "fold_0/.latest.pth.123.partial",
        tmp_path / ".download.partial",
        tmp_path / "x.1.partial",
    ]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    (tmp_path / "fold_0/.lock").touch()
    with opened(tmp_path, ALONE):
        assert all(path.exists() for path in kept)


@TWO_RUNS
def test_a_search_in_the_folder_of_another_one_is_refused_before_it_clears_it(tmp_path):
    (tmp_path / "latest.pth").write_text("of the other")
    with opened(tmp_path, ALONE), pytest.raises(UserError, match="another run is writing into"):
        search(tmp_path / "no data", tmp_path, "--resume never")
    assert (tmp_path / "latest.pth").read_text() == "of the other"


# A fresh start


@pytest.fixture
def launch(monkeypatch):
    """Return a function that sets what torchrun and SLURM tell a process of its launch, restart,
    job and queueing.
    """

    def set_variables(
        torchrun: str = "", restart: int = 0, job: str = "", requeued: int = 0
    ) -> None:
        variables = {
            "TORCHELASTIC_ERROR_FILE": torchrun
            and f"/log/{torchrun}/attempt_{restart}/0/error.json"
        }
        variables |= {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(requeued or "")}
        for name, value in variables.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)

    set_variables()
    return set_variables


def begin(folder: Path, processes: object = ALONE) -> bool:
    """Start afresh and save something; tell whether anything that had been saved is still there."""
    start_afresh(folder, processes)
    is_continued = (folder / "latest.pth").exists()
    (folder / "latest.pth").write_text("a state")
    return is_continued


def moved(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("before_*/*"))


def test_a_fresh_start_moves_what_runs_write_and_nothing_else(tmp_path, launch, caplog):
    caplog.set_level("INFO")
    written = [
        "best_metric_model.pth",
        "latest.pth",
        "loss_history.csv",
        "previous.pth",
        "search_code_6.pth",
        "search.png",
    ]
    kept = [".lock", "notes.txt", "dataset.json"]
    for name in (*written, *kept):
        (tmp_path / name).write_text(name)
    (tmp_path / "Events").mkdir()
    (tmp_path / "Events/events.1").write_text("events")
    start_afresh(tmp_path, ALONE)
    assert moved(tmp_path) == sorted(f"before_1/{name}" for name in (*written, "Events"))
    assert (tmp_path / "before_1/Events/events.1").read_text() == "events"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "before_1", NOTE])
    assert [record.message for record in caplog.records] == [
        f"--resume never: what an earlier run left in {tmp_path} is now in {tmp_path}/before_1"
    ]
    assert not begin(tmp_path) and not begin(tmp_path)  # given by a person, twice
    assert {f"before_2/{NOTE}", "before_3/latest.pth", f"before_3/{NOTE}"} <= {*moved(tmp_path)}


@pytest.mark.fault("torchrun --max-restarts")
def test_a_launch_starts_afresh_once(tmp_path, launch):
    launch("run_a")
    assert not begin(tmp_path)
    launch("run_a", restart=1)
    assert begin(tmp_path) and moved(tmp_path) == []
    launch("run_b")
    assert not begin(tmp_path)


@pytest.mark.fault("torchrun --max-restarts")
def test_a_run_of_several_nodes_continues_though_rank_0_is_on_another_one(tmp_path, launch):
    def nodes(other: str) -> SimpleNamespace:
        return SimpleNamespace(
            gather=lambda own: [own, [f"torchrun {other}"]], on_main=lambda call, *args: call(*args)
        )

    launch("node_0")
    assert not begin(tmp_path, nodes("node_1"))
    launch("node_1", restart=1)
    assert begin(tmp_path, nodes("node_0_again"))
    launch("node_0_again")
    assert not begin(tmp_path, nodes("node_1_again"))


@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_a_job_that_is_queued_again_continues(tmp_path, launch):
    launch("run_a", job="42")
    assert not begin(tmp_path)
    launch("run_b", job="42", requeued=1)
    assert begin(tmp_path)
    launch("run_c", job="42")  # given once more by a person, in an interactive job
    assert not begin(tmp_path)
    launch("run_d", job="43", requeued=1)
    assert not begin(tmp_path)


def test_a_fresh_start_that_would_move_an_input_is_refused(tmp_path, launch):
    model = tmp_path / "best_metric_model.pth"
    model.write_text("a network")
    with pytest.raises(
        UserError,
        match="best_metric_model.pth is in the folder that --resume never clears: give another",
    ):
        start_afresh(tmp_path, ALONE, [None, tmp_path / "x" / ".." / model.name])
    assert model.exists() and not (tmp_path / NOTE).exists()


@pytest.mark.parametrize("note", ["{", "[]", '{"started_by": [["torchrun run_a"]]}'])
def test_a_damaged_note_is_none(tmp_path, launch, note):
    launch("run_a")
    begin(tmp_path)
    (tmp_path / NOTE).write_text(note)
    assert not begin(tmp_path)
