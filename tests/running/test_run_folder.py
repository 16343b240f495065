"""The run folder: made, locked against a second run, and cleared for a fresh start, once."""

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
ANOTHER = pytest.raises(UserError, match="another run is writing into")


@TWO_RUNS
def test_a_second_run_is_refused_before_it_clears_the_folder(tmp_path):
    (tmp_path / "latest.pth").write_text("of the other")
    with opened(tmp_path, ALONE), ANOTHER:
        search(tmp_path / "no data", tmp_path, "--resume never")
    assert (tmp_path / "latest.pth").read_text() == "of the other"


@TWO_RUNS
def test_a_kill_frees_the_folder_though_a_worker_lives_on(tmp_path):
    """As the workers of a killed process do, for some seconds, while it is started again."""
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
        with ANOTHER, opened(tmp_path / "run", ALONE):
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with opened(tmp_path / "run", ALONE):
            os.kill(worker, 0)  # it is there
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.fault("output folder read-only")
@pytest.mark.parametrize("place", ["below a file", "denied"])
def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    root = {"below a file": tmp_path / "file/run", "denied": Path("/sys/kernel")}[place]
    if place == "denied" and not root.is_dir():
        pytest.skip("needs a folder that is closed even to root, such as Linux' /sys")
    refused = pytest.raises(UserError, match=f"--output_root {root} cannot be written")
    with refused, opened(root, ALONE):
        pass


@pytest.mark.fault("SIGKILL while saving")
def test_partial_files_of_a_killed_run_are_swept_and_not_those_of_a_run_in_a_folder_below(tmp_path):
    places = ".", "candidates/mutant_1", "fold_0"
    paths = [tmp_path / place / ".latest.pth.123.partial" for place in places]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    (tmp_path / "fold_0/.lock").touch()
    with opened(tmp_path, ALONE):
        assert [path.exists() for path in paths] == [False, False, True]


# A fresh start


@pytest.fixture
def launch(monkeypatch):
    """Return a function that sets what torchrun and SLURM tell a process of its launch and job."""

    def set_variables(torchrun: str = "", job: str = "", requeued: int = 0) -> None:
        variables = {"TORCHELASTIC_ERROR_FILE": torchrun and f"/log/{torchrun}/attempt_1/0/e.json"}
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


def test_a_fresh_start_moves_what_runs_write_and_nothing_else(tmp_path, launch):
    written = ["best_metric_model.pth", "latest.pth", "loss_history.csv", "search_code_6.pth"]
    kept = [".lock", "notes.txt", "dataset.json"]
    for name in (*written, *kept):
        (tmp_path / name).write_text(name)
    (tmp_path / "Events").mkdir()
    start_afresh(tmp_path, ALONE)
    moved = {path.name for path in (tmp_path / "before_1").iterdir()}
    assert moved == {*written, "Events"}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "before_1", NOTE}
    assert not begin(tmp_path) and not begin(tmp_path)  # given by a person, twice
    assert (tmp_path / "before_3/latest.pth").exists()


@pytest.mark.fault("torchrun --max-restarts")
def test_a_launch_starts_afresh_once_also_where_rank_0_is_on_another_node(tmp_path, launch):
    def nodes(other: str) -> SimpleNamespace:
        gather = lambda own: [own, [f"torchrun {other}"]]  # noqa: E731
        return SimpleNamespace(gather=gather, on_main=lambda call, *args: call(*args))

    launch("node_0")
    assert not begin(tmp_path, nodes("node_1"))
    launch("node_1")
    assert begin(tmp_path, nodes("node_0_again"))
    launch("node_0_again")
    assert not begin(tmp_path, nodes("node_1_again"))
    (tmp_path / NOTE).write_text("{")  # damaged, it is none
    assert not begin(tmp_path, nodes("node_1_again"))


@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_a_job_that_is_queued_again_continues(tmp_path, launch):
    launch("run_a", job="42")
    assert not begin(tmp_path)
    launch("run_b", job="42", requeued=1)
    assert begin(tmp_path)
    launch("run_c", job="42")  # given once more by a person, in an interactive job
    assert not begin(tmp_path)


def test_a_fresh_start_that_would_move_an_input_is_refused(tmp_path, launch):
    model = tmp_path / "best_metric_model.pth"
    model.write_text("a network")
    refused = "best_metric_model.pth is in the folder that --resume never clears: give another"
    with pytest.raises(UserError, match=refused):
        start_afresh(tmp_path, ALONE, [None, tmp_path / "x" / ".." / model.name])
    assert model.exists() and not (tmp_path / NOTE).exists()
