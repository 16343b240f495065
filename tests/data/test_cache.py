"""Prepared cases in memory and on disk: the same ones, kept once, and never half."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from toys import ALONE, TASK, make_case, open_pair, save

from dints.data import cache as cache_module
from dints.data.cache import Cache, open_cache
from dints.data.cases import Case, Prepared, prepare
from dints.data.leniency import Leniency
from dints.data.tasks import Task
from dints.errors import UserError
from dints.running import machine
from dints.running.processes import Processes


def cache_in(folder: Path, mode: str = "disk", task: Task = TASK, leniency: Leniency = Leniency()) -> Cache:
    return Cache(mode, folder, task, leniency, num_threads=2)


@pytest.fixture
def cases(tmp_path):
    return [make_case(tmp_path / name, shape) for name, shape in (("a", (20, 20, 20)), ("b", (5, 30, 17)))]


@pytest.fixture
def counted(monkeypatch) -> list:
    """Note the cases that are prepared from their files."""
    prepared = []

    def prepare_and_count(case, *args):
        prepared.append(case)
        return prepare(case, *args)

    monkeypatch.setattr(cache_module, "prepare", prepare_and_count)
    return prepared


def assert_same(first: Prepared, second: Prepared) -> None:
    for one, other in zip(cache_module._arrays(first), cache_module._arrays(second), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.suffix and path.name != "digests")


@pytest.mark.parametrize(("mode", "times"), [("ram", 1), ("disk", 1), ("none", 3)])
def test_every_cache_holds_what_preparing_gives(cases, tmp_path, counted, mode, times):
    held = cache_in(tmp_path / "cache", mode).hold(cases, "test")
    assert len(held) == 2
    for number, case in enumerate(cases):
        for _ in range(3):
            assert_same(held[number], prepare(case, TASK, Leniency()))
    assert len(counted) == 2 * times
    assert (tmp_path / "cache").exists() == (mode == "disk")


def test_a_case_takes_less_than_five_bytes_a_voxel(cases):
    for case in cases:
        arrays = cache_module._arrays(prepare(case, TASK, Leniency()))
        assert sum(array.nbytes for array in arrays) < 4 * arrays[1].size + 500
        assert arrays[0].dtype == np.float16 and arrays[1].dtype == np.uint8


def test_the_next_run_uses_the_files_of_the_last(cases, tmp_path, counted):
    first = cache_in(tmp_path / "cache").hold(cases, "test")
    second = cache_in(tmp_path / "cache").hold(cases[::-1], "other")
    assert len(counted) == 2
    assert_same(first[0], second[1])


def test_only_what_is_cut_out_is_read_from_files(cases, tmp_path):
    held = cache_in(tmp_path / "cache").hold(cases, "test")
    assert isinstance(held[0].image.base, np.memmap) or isinstance(held[0].image, np.memmap)
    assert not held[0].image.flags.writeable


CHANGES = {
    "spacing": {"task": replace(TASK, spacing=(2.0, 2.0, 2.0))},
    "intensity": {"task": replace(TASK, intensity=(0.0, 1.0))},
    "classes": {"task": replace(TASK, class_names=(*TASK.class_names, "more"))},
    "leniency": {"leniency": Leniency(replace_nonfinite=0.0)},
    "files": {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_case_makes_a_new_entry(cases, tmp_path, counted, change):
    folder = tmp_path / "cache"
    cache_in(folder).hold(cases[:1], "test")
    case = make_case(tmp_path / "a", (20, 20, 21)) if change == "files" else cases[0]
    cache_in(folder, **CHANGES[change]).hold([case], "test")
    assert len(counted) == 2 and len(entries(folder)) == 2


def test_what_does_not_change_a_case_makes_none(cases, tmp_path, counted):
    """The patch size does not, nor where the files are and when they were written."""
    folder = tmp_path / "cache"
    cache_in(folder).hold(cases, "test")
    moved = []
    for case in cases:
        image = tmp_path / "moved" / Path(case.images[0].path).parent.name / "image.nii.gz"
        image.parent.mkdir(parents=True)
        shutil.copyfile(case.images[0].path, image)
        os.utime(case.label.path)
        moved.append(open_pair(str(image), case.label.path))
    cache_in(folder, task=replace(TASK, patch_size=(32, 32, 32))).hold(moved, "test")
    assert len(counted) == 2


def test_a_change_of_any_module_of_the_data_makes_new_entries(cases, tmp_path, counted, monkeypatch):
    """What is cached is made by this wing, wherever in it that stands."""
    wing, folder = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(Path(cache_module.__file__).parent, wing, ignore=shutil.ignore_patterns("__pycache__"))
    modules = sorted(wing.rglob("*.py"))
    assert {"cases.py", "crops.py", "grid.py", "nifti.py", "tasks.py"} < {module.name for module in modules}
    cache_in(folder).hold(cases[:1], "test")
    monkeypatch.setattr(cache_module, "__file__", str(wing / "cache.py"))
    cache_in(folder).hold(cases[:1], "test")
    assert len(counted) == 1  # the same code elsewhere
    for number, module in enumerate(modules, 2):
        source = module.read_text()
        module.write_text(source + "\n")
        cache_in(folder).hold(cases[:1], "test")
        assert len(counted) == number, module
        module.write_text(source)
        cache_in(folder).hold(cases[:1], "test")
        assert len(counted) == number, module  # what was made before the change is found again


def test_files_that_change_after_their_headers_were_read_spoil_no_later_run(cases, tmp_path):
    folder = tmp_path / "cache"
    for file in cases[0].files:
        save(Path(file), np.asarray(nib.load(file).dataobj), np.diag([-1.0, 1, 1, 1]))
    cache_in(folder).hold(cases[:1], "test")  # new voxels by the old header
    opened_again = open_pair(*cases[0].files)
    held = cache_in(folder).hold([opened_again], "test")
    assert_same(held[0], prepare(opened_again, TASK, Leniency()))


def test_a_file_is_digested_once(cases, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    cache_in(folder).hold(cases, "test")
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        cache_in(folder).hold(cases, "test")
    for note in (folder / "digests").iterdir():
        note.write_text("damaged")
    assert len(cache_in(folder).hold(cases, "test")) == 2


def test_a_damaged_entry_is_made_again(cases, tmp_path, counted, caplog):
    folder = tmp_path / "cache"
    expected = [prepare(case, TASK, Leniency()) for case in cases]
    for damage in (
        lambda entry: os.truncate(entry / "image.npy", 1000),
        lambda entry: (entry / "bits.npy").unlink(),
        lambda entry: (entry / "label.npy").write_bytes(b""),
    ):
        cache_in(folder).hold(cases, "test")
        counted.clear()
        for entry in entries(folder):
            damage(entry)
        held = cache_in(folder).hold(cases, "test")
        assert len(counted) == 2 and "is damaged" in caplog.text
        for one, other in zip(held, expected, strict=True):
            assert_same(one, other)


def hold_and_count(folder: Path, cases: list, barrier, results) -> None:
    prepared = []

    def slowly(case, *args):
        prepared.append(case.name)
        time.sleep(0.3)  # so that the others ask for it meanwhile
        return prepare(case, *args)

    cache_module.prepare = slowly
    barrier.wait(60)
    held = cache_in(folder).hold(cases, "test")
    results.put((len(prepared), float(held[0].image.sum(dtype=np.float64))))


def test_processes_at_once_prepare_a_case_once(cases, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=hold_and_count, args=(tmp_path / "cache", cases, barrier, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sum(count for count, _ in found) == 2
    assert len({total for _, total in found}) == 1


def test_a_process_killed_while_it_writes_leaves_nothing_to_be_trusted(cases, tmp_path, counted):
    """The lock goes with it, and the next one writes the entry anew."""
    folder = tmp_path / "cache"

    def killed_while_writing() -> None:
        save = np.save

        def save_and_die(file, array):
            save(file, array)
            os.kill(os.getpid(), signal.SIGKILL)

        np.save = save_and_die
        cache_in(folder).hold(cases[:1], "test")

    process = multiprocessing.get_context("fork").Process(target=killed_while_writing)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and list(folder.glob("*.partial")) and not entries(folder)
    assert_same(cache_in(folder).hold(cases[:1], "test")[0], prepare(cases[0], TASK, Leniency()))
    assert len(counted) == 1 and not list(folder.glob("*.partial"))


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_workers_that_are_not_forked_get_the_cases(cases, tmp_path, mode):
    held = cache_in(tmp_path / "cache", mode).hold(cases, "test")
    content = multiprocessing.reduction.ForkingPickler.dumps(held)
    assert len(content) < 5000  # not the voxels
    if mode == "disk":
        assert_same(pickle.loads(content)[1], held[1])
    else:
        assert all(tensor.is_shared() for case in held.tensors for tensor in case)


def test_the_disk_being_full_is_told(cases, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=f"--cache_dir {tmp_path / 'cache'} cannot be used: No space left on device; "):
        cache_in(tmp_path / "cache").hold(cases, "test")
    assert not entries(tmp_path / "cache")


def test_a_folder_that_cannot_be_written_is_told(cases, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=f"{tmp_path / 'cache'}.* cannot be "):
        cache_in(tmp_path / "cache").hold(cases, "test")


# Choosing


def opened(tmp_path: Path, cases: list[Case], mode: str = "auto", processes: Processes = ALONE, **more) -> Cache:
    return open_cache(cases, TASK, tmp_path / "cache", processes, mode=mode, **more)


NEEDED = (20**3 + 5 * 30 * 17) * (2 + 1 + 3 / 8)


@pytest.mark.parametrize(
    ("memory", "disk", "expected"),
    [(2.1 * NEEDED, 0, "ram"), (1.9 * NEEDED, 1.1 * NEEDED, "disk"), (1.9 * NEEDED, 0.9 * NEEDED, "none")],
)
def test_auto_takes_what_there_is_room_for_and_says_so(cases, tmp_path, monkeypatch, caplog, memory, disk, expected):
    monkeypatch.setattr(machine, "available_memory", lambda: memory)
    monkeypatch.setattr(cache_module, "_free_bytes", lambda folder: disk)
    with caplog.at_level("INFO"):
        assert opened(tmp_path, cases).mode == expected
    said = [f"{value / 2**30:.3g} GiB" for value in (int(NEEDED), memory, disk)]
    assert f"cache {expected}: 2 cases take {said[0]}; free are {said[1]} of memory and {said[2]} in" in caplog.text


def test_nodes_share_what_is_kept_in_memory(cases, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(machine, "available_memory", lambda: 1.1 * NEEDED)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    two_nodes = replace(ALONE, world_size=4)
    monkeypatch.setattr(Processes, "on_main", lambda self, function, *args: function(*args))
    with caplog.at_level("INFO"):
        assert opened(tmp_path, cases, processes=two_nodes).mode == "ram"
    assert "on each node" in caplog.text
    assert opened(tmp_path, cases, processes=replace(ALONE, world_size=2)).mode == "disk"
    assert opened(tmp_path, cases, processes=two_nodes, on_every_rank=True).mode == "disk"


def test_a_cache_that_does_not_fit_is_refused_before_it_is_filled(cases, tmp_path, monkeypatch, counted):
    monkeypatch.setattr(machine, "available_memory", lambda: 0.9 * NEEDED)
    with pytest.raises(UserError, match="--cache ram: 2 cases take .* are free: use --cache disk"):
        opened(tmp_path, cases, "ram")
    assert not counted


def test_large_cases_are_prepared_one_after_another(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cores_per_process", lambda: 8)
    assert opened(tmp_path, cases).num_threads == 8
    monkeypatch.setattr(cache_module, "WORKING_MEMORY", 3 * 20**3 * cache_module.WORKING_BYTES)
    assert opened(tmp_path, cases).num_threads == 3
    monkeypatch.setattr(cache_module, "WORKING_MEMORY", 1)
    assert opened(tmp_path, cases).num_threads == 1


def test_available_memory_is_what_the_system_and_the_container_leave(monkeypatch):
    (free,) = re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
    assert 0 < machine.available_memory() <= 1.1 * 1024 * int(free)
    files = {"/sys/fs/cgroup/memory.max": "500000", "/sys/fs/cgroup/memory.current": "300000"}
    files |= {"/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 70000\n"}

    def read(path, *_, **__):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=1024000))
    assert machine.available_memory() == 270000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert machine.available_memory() == 1024000


def test_a_file_that_vanished_is_not_taken_for_a_full_disk(cases, tmp_path):
    Path(cases[0].label.path).unlink()
    with pytest.raises(UserError, match=f"{cases[0].label.path} cannot be read: No such file or directory"):
        cache_in(tmp_path / "cache").hold(cases, "test")
