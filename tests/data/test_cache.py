"""Prepared cases in memory and on disk: the same ones, kept once, and never half."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_run import begun
from toys import ALONE, CLASSES, TASK, cache_of, make_case, save, voxels_of

from dints.data import cache as cache_module
from dints.data.cache import Cache, open_cache
from dints.data.cases import Prepared, prepare
from dints.data.dataset import Fold
from dints.data.listing import Case, ReadOptions
from dints.data.tasks import Task
from dints.errors import UserError
from dints.running import machine
from dints.running.processes import Processes


@pytest.fixture
def cases(tmp_path) -> list[Case]:
    return [make_case(tmp_path / "a", (20, 20, 20)), make_case(tmp_path / "b", (5, 30, 17))]


@pytest.fixture
def counted(monkeypatch) -> list:
    """Note the cases that are prepared from their files."""
    prepared = []

    def prepare_and_count(case: Case, task: Task) -> Prepared:
        prepared.append(case)
        return prepare(case, task)

    monkeypatch.setattr(cache_module, "prepare", prepare_and_count)
    return prepared


def on_disk(tmp_path: Path, task: Task = TASK) -> Cache:
    return cache_of("disk", tmp_path / "cache", task)


def assert_same(first: Prepared, second: Prepared) -> None:
    pairs = zip(cache_module._arrays(first), cache_module._arrays(second), strict=True)
    for one, other in pairs:
        assert one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("?" * 32))


@pytest.mark.parametrize(("mode", "times"), [("ram", 1), ("disk", 1), ("none", 3)])
def test_every_cache_holds_the_prepared_cases(cases, tmp_path, counted, mode, times):
    held = cache_of(mode, tmp_path / "cache").hold(cases, "test")
    assert len(held) == 2
    for number, case in enumerate(cases):
        for _ in range(3):
            assert_same(held[number], prepare(case, TASK))
    assert len(counted) == 2 * times
    assert (tmp_path / "cache").exists() == (mode == "disk")


def test_the_next_run_maps_the_files_of_the_last(cases, tmp_path, counted, monkeypatch):
    """Neither is a case prepared again nor a file's digest taken."""
    first = on_disk(tmp_path).hold(cases, "test")
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.files, "digest", lambda *_: pytest.fail("read again"))
        second = on_disk(tmp_path).hold(cases[::-1], "other")
    assert len(counted) == 2
    assert_same(first[0], second[1])
    assert isinstance(second[0].image, np.memmap) and not second[0].image.flags.writeable
    for note in (tmp_path / "cache" / "digests").iterdir():
        note.write_text("damaged")
    assert len(on_disk(tmp_path).hold(cases, "test")) == 2


def test_an_entry_is_of_the_content_the_task_the_options_and_the_code(
    cases, tmp_path, counted, monkeypatch
):
    on_disk(tmp_path).hold(cases[:1], "test")
    moved, code = tmp_path / "moved", tmp_path / "code"
    shutil.copytree(Path(cases[0].label).parent, moved, copy_function=shutil.copyfile)
    case = Case("other name", (str(moved / "image.nii.gz"),), str(moved / "label.nii.gz"))
    shutil.copytree(Path(cache_module.__file__).parent, code)
    monkeypatch.setattr(cache_module, "__file__", str(code / "cache.py"))
    on_disk(tmp_path, replace(TASK, patch_size=(32, 32, 32))).hold([case], "test")
    assert len(counted) == 1
    changed = {"spacing": (2.0,) * 3, "intensity": (0.0, 1.0), "class_names": CLASSES[:3] * 2}
    for name, value in changed.items():
        on_disk(tmp_path, replace(TASK, **{name: value})).hold([case], "test")
    on_disk(tmp_path).hold([replace(case, options=ReadOptions(replace_nonfinite=0.0))], "test")
    on_disk(tmp_path).hold([make_case(tmp_path / "a", (20, 20, 21))], "test")
    with (code / "grid.py").open("a") as file:
        file.write("\n")
    on_disk(tmp_path).hold([case], "test")
    assert len(counted) == len(entries(tmp_path)) == 7


def test_files_that_change_after_their_headers_were_read_spoil_no_later_run(cases, tmp_path):
    case = cases[0]
    assert case.headers and case.label_header  # read
    for file in case.files:
        save(Path(file), voxels_of(file), np.diag([-1.0, 1, 1, 1]))
    on_disk(tmp_path).hold([case], "test")  # new voxels by the old header
    again = replace(case)
    assert_same(on_disk(tmp_path).hold([again], "test")[0], prepare(again, TASK))


def test_a_damaged_entry_is_made_again(cases, tmp_path, counted, caplog):
    on_disk(tmp_path).hold(cases[:1], "test")
    (entry,) = entries(tmp_path)
    for damage in (
        lambda: os.truncate(entry / "image.npy", 1000),
        lambda: os.truncate(entry / "label.npy", 0),
        lambda: (entry / "bits.npy").unlink(),
    ):
        damage()
        counted.clear()
        held = on_disk(tmp_path).hold(cases[:1], "test")
        assert len(counted) == 1 and "is damaged" in caplog.text
        assert_same(held[0], prepare(cases[0], TASK))


def hold_and_count(tmp_path: Path, cases: list, barrier, results) -> None:
    prepared = []

    def slowly(case: Case, task: Task) -> Prepared:
        prepared.append(case.name)
        time.sleep(0.1)  # so that the others ask for it meanwhile
        return prepare(case, task)

    cache_module.prepare = slowly
    barrier.wait(60)
    held = on_disk(tmp_path).hold(cases, "test")
    results.put((len(prepared), float(held[0].image.sum(dtype=np.float64))))


def test_processes_at_once_prepare_a_case_once(cases, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    given = tmp_path, cases, barrier, results
    processes = [context.Process(target=hold_and_count, args=given) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sum(count for count, _ in found) == 2 and len({total for _, total in found}) == 1


def test_a_process_killed_while_it_writes_leaves_nothing_to_be_trusted(cases, tmp_path, counted):
    """The lock goes with it, and the next one writes the entry."""
    folder = tmp_path / "cache"

    def killed_while_writing() -> None:
        save = np.save

        def save_and_die(file, array):
            save(file, array)
            os.kill(os.getpid(), signal.SIGKILL)

        np.save = save_and_die
        on_disk(tmp_path).hold(cases[:1], "test")

    process = multiprocessing.get_context("fork").Process(target=killed_while_writing)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(folder.glob("*.partial")) and not entries(tmp_path)
    assert_same(on_disk(tmp_path).hold(cases[:1], "test")[0], prepare(cases[0], TASK))
    assert len(counted) == 1 and not list(folder.glob("*.partial"))


def test_workers_that_are_not_forked_get_the_cases_but_not_in_writing(cases, tmp_path):
    for mode in ("ram", "disk"):
        held = cache_of(mode, tmp_path / "cache").hold(cases, "test")
        content = multiprocessing.reduction.ForkingPickler.dumps(held)
        assert len(content) < 10000  # not the voxels
        if mode == "ram":
            assert all(tensor.is_shared() for case in held.kept for tensor in case)
    assert_same(pickle.loads(content)[1], held[1])


def test_an_unusable_folder_and_a_vanished_file_are_named(cases, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        says = f"--cache_dir {folder} cannot be used: No space left on device; "
        with pytest.raises(UserError, match=says):
            on_disk(tmp_path).hold(cases, "test")
    assert not entries(tmp_path)
    Path(cases[0].label).unlink()  # is not taken for a full disk
    says = f"{cases[0].label} cannot be read: No such file or directory"
    with pytest.raises(UserError, match=says):
        on_disk(tmp_path).hold(cases, "test")
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(UserError, match=f"{folder}.* cannot be "):
        on_disk(tmp_path).hold(cases[1:], "test")


# Choosing

NEEDED = (20**3 + 5 * 30 * 17) * (2 + 1 + 3 / 8)


def chosen(
    tmp_path: Path,
    cases: list[Case],
    mode: str = "auto",
    processes: Processes = ALONE,
    on_every_rank: bool = False,
) -> Cache:
    """Open the cache of a new run."""
    run = begun(tmp_path / "run", processes=processes, cache=mode)
    return open_cache(Fold(TASK, cases, [], None), run, on_every_rank)


@pytest.mark.parametrize(
    ("memory", "disk", "expected"), [(2.1, 0, "ram"), (1.9, 1.1, "disk"), (1.9, 0.9, "none")]
)
def test_auto_takes_a_cache_that_there_is_room_for_and_says_so(
    cases, tmp_path, monkeypatch, caplog, memory, disk, expected
):
    memory, disk = memory * NEEDED, disk * NEEDED
    monkeypatch.setattr(machine, "available_memory", lambda: memory)
    monkeypatch.setattr(cache_module, "_free_bytes", lambda folder: disk)
    with caplog.at_level("INFO"):
        assert chosen(tmp_path, cases).mode == expected
    needed, memory, disk = (f"{value / 2**30:.3g} GiB" for value in (int(NEEDED), memory, disk))
    says = (
        f"2 cases take {needed}; free are {memory} of memory and {disk} in {tmp_path}/dints_cache"
    )
    assert f"cache {expected}: {says}" in caplog.text
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"data.json", "task.json"}


def test_nodes_share_the_cases_in_memory(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 1.1 * NEEDED)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(Processes, "on_main", lambda self, function, *args: function(*args))
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value] * self.world_size)
    two_nodes = replace(ALONE, world_size=4)
    assert chosen(tmp_path, cases, processes=two_nodes).mode == "ram"
    assert chosen(tmp_path, cases, processes=replace(ALONE, world_size=2)).mode == "disk"
    assert chosen(tmp_path, cases, processes=two_nodes, on_every_rank=True).mode == "disk"


def test_a_cache_that_does_not_fit_is_refused_before_it_is_filled(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 0.9 * NEEDED)
    says = "--cache ram: 2 cases take .* are free: use --cache disk"
    with pytest.raises(UserError, match=says):
        chosen(tmp_path, cases, "ram")


def test_large_cases_are_prepared_one_after_another(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cores_per_process", lambda: 8)
    assert chosen(tmp_path, cases).num_threads == 8
    for memory, expected in ((3 * 20**3 * cache_module.WORKING_BYTES, 3), (1, 1)):
        monkeypatch.setattr(cache_module, "WORKING_MEMORY", memory)
        assert chosen(tmp_path, cases).num_threads == expected


def test_available_memory_is_what_the_system_and_the_container_leave(monkeypatch):
    files = {"/sys/fs/cgroup/memory.max": "500000", "/sys/fs/cgroup/memory.current": "300000"}
    files |= {"/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 70000\n"}

    def read(path, *_, **__):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    free = SimpleNamespace(available=1024000)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: free)
    assert machine.available_memory() == 270000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert machine.available_memory() == 1024000
