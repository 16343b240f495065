"""Prepared cases in memory and on disk: the same ones, kept once, and never half."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import TASK, make_case

import search_dints
from dints import cache as cache_module
from dints import runtime
from dints.cache import Cache, CasesInMemory, open_cache
from dints.cases import Leniency, Prepared, prepare
from dints.errors import UserError
from dints.runtime import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


def cache_in(folder: Path, mode: str = "disk", **changes: object) -> Cache:
    return Cache(
        **{**{"mode": mode, "folder": folder, "task": TASK, "leniency": Leniency(), "num_threads": 2}, **changes}
    )


@pytest.fixture
def cases(tmp_path):
    return [make_case(tmp_path / name, shape) for name, shape in (("a", (20, 20, 20)), ("b", (5, 30, 17)))]


@pytest.fixture
def counted(monkeypatch) -> list:
    """The cases that are prepared from their files."""
    prepared = []

    def prepare_and_count(case, *args):
        prepared.append(case)
        return prepare(case, *args)

    monkeypatch.setattr(cache_module, "prepare", prepare_and_count)
    return prepared


def assert_same(first: Prepared, second: Prepared) -> None:
    for one, other in zip(cache_module._arrays(first), cache_module._arrays(second), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.suffix and path.name != "digests")


@pytest.mark.parametrize("mode", ["ram", "disk", "none"])
def test_every_cache_holds_what_preparing_gives(cases, tmp_path, mode):
    held = cache_in(tmp_path / "cache", mode).hold(cases, "test")
    assert len(held) == 2
    for number, case in enumerate(cases):
        assert_same(held[number], prepare(case, TASK, Leniency()))
    assert (tmp_path / "cache").exists() == (mode == "disk")


def test_a_case_takes_less_than_five_bytes_a_voxel(cases):
    for case in cases:
        arrays = cache_module._arrays(prepare(case, TASK, Leniency()))
        assert sum(array.nbytes for array in arrays) < 4 * arrays[1].size + 500
        assert arrays[0].dtype == np.float16 and arrays[1].dtype == np.uint8


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_cases_are_prepared_once(cases, tmp_path, counted, mode):
    held = cache_in(tmp_path / "cache", mode).hold(cases, "test")
    for _ in range(3):
        held[0], held[1]
    assert len(counted) == 2


def test_the_next_run_uses_the_files_of_the_last(cases, tmp_path, counted):
    first = cache_in(tmp_path / "cache").hold(cases, "test")
    second = cache_in(tmp_path / "cache").hold(cases[::-1], "other")
    assert len(counted) == 2
    assert_same(first[0], second[1])


def test_only_what_is_cut_out_is_read_from_files(cases, tmp_path):
    held = cache_in(tmp_path / "cache").hold(cases, "test")
    assert isinstance(held[0].image.base, np.memmap) or isinstance(held[0].image, np.memmap)
    assert not held[0].image.flags.writeable


@pytest.mark.parametrize(
    "change",
    ["image", "label", "spacing", "intensity", "classes", "leniency", "code"],
)
def test_what_changes_a_case_makes_a_new_entry(cases, tmp_path, counted, monkeypatch, change):
    folder = tmp_path / "cache"
    cache_in(folder).hold(cases[:1], "test")
    changed = cache_in(folder)
    if change in ("image", "label"):
        make_case(tmp_path / "other", (20, 20, 21))
        for name in ("image", "label"):  # both, so that they fit
            shutil.copy(tmp_path / f"other/{name}.nii.gz", tmp_path / f"a/{name}.nii.gz")
    elif change == "leniency":
        changed = replace(changed, leniency=Leniency(replace_nonfinite=0.0))
    elif change == "code":
        monkeypatch.setattr(cache_module, "_code_digest", lambda: "of another version")
    else:
        task = {
            "spacing": replace(TASK, spacing=(2.0, 2.0, 2.0)),
            "intensity": replace(TASK, intensity=(0.0, 1.0)),
            "classes": replace(TASK, class_names=(*TASK.class_names, "more")),
        }[change]
        changed = replace(changed, task=task)
    changed.hold(cases[:1], "test")
    assert len(counted) == 2 and len(entries(folder)) == 2


def test_what_does_not_change_a_case_makes_none(cases, tmp_path, counted):
    """Patch size, and where the files are and when they were written."""
    folder = tmp_path / "cache"
    cache_in(folder).hold(cases, "test")
    moved = [
        replace(case, images=(str(tmp_path / "moved" / Path(case.images[0]).parent.name / "image.nii.gz"),))
        for case in cases
    ]
    for old, new in zip(cases, moved, strict=True):
        Path(new.images[0]).parent.mkdir(parents=True)
        shutil.copyfile(old.images[0], new.images[0])
        os.utime(old.label)
    cache_in(folder, task=replace(TASK, patch_size=(32, 32, 32))).hold(moved, "test")
    assert len(counted) == 2


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


def test_what_a_killed_process_left_is_swept(cases, tmp_path):
    folder = tmp_path / "cache"
    (entry,) = cache_in(folder).hold(cases[:1], "test").entries
    shutil.rmtree(entry)
    entry.with_suffix(".partial").mkdir()
    (entry.with_suffix(".partial") / "image.npy").write_bytes(b"half")
    assert_same(cache_in(folder).hold(cases[:1], "test")[0], prepare(cases[0], TASK, Leniency()))
    assert not list(folder.glob("*.partial"))


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
    assert len(counted) == 1


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_workers_that_are_not_forked_get_the_cases(cases, tmp_path, mode):
    held = cache_in(tmp_path / "cache", mode).hold(cases, "test")
    content = multiprocessing.reduction.ForkingPickler.dumps(held)
    assert len(content) < 5000  # not the voxels
    if mode == "disk":
        assert_same(pickle.loads(content)[1], held[1])


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


def opened(tmp_path: Path, cases: list, *flags: object, processes: Processes = ALONE) -> Cache:
    args = search_dints.parse_args([*map(str, ["--root", tmp_path, "--output_root", tmp_path / "runs/search", *flags])])
    return open_cache(cases, TASK, args, processes)


NEEDED = (20**3 + 5 * 30 * 17) * (2 + 1 + 3 / 8)


@pytest.mark.parametrize(
    ("memory", "disk", "expected"),
    [(2.1 * NEEDED, 0, "ram"), (1.9 * NEEDED, 1.1 * NEEDED, "disk"), (1.9 * NEEDED, 0.9 * NEEDED, "none")],
)
def test_auto_takes_what_there_is_room_for_and_says_so(cases, tmp_path, monkeypatch, caplog, memory, disk, expected):
    monkeypatch.setattr(runtime, "available_memory", lambda: memory)
    monkeypatch.setattr(cache_module, "_free_bytes", lambda folder: disk)
    with caplog.at_level("INFO"):
        assert opened(tmp_path, cases).mode == expected
    said = [f"{value / 2**30:.3g} GiB" for value in (int(NEEDED), memory, disk)]
    assert f"cache {expected}: 2 cases take {said[0]}; free are {said[1]} of memory and {said[2]} in" in caplog.text


def test_nodes_share_what_is_kept_in_memory(cases, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(runtime, "available_memory", lambda: 1.1 * NEEDED)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    two_nodes = Processes(0, 4, torch.device("cpu"))
    monkeypatch.setattr(Processes, "on_main", lambda self, function, *args: function(*args))
    with caplog.at_level("INFO"):
        assert opened(tmp_path, cases, processes=two_nodes).mode == "ram"
    assert "on each node" in caplog.text
    assert opened(tmp_path, cases, processes=Processes(0, 2, torch.device("cpu"))).mode == "disk"


def test_a_cache_that_does_not_fit_is_refused_before_it_is_filled(cases, tmp_path, monkeypatch, counted):
    monkeypatch.setattr(runtime, "available_memory", lambda: 0.9 * NEEDED)
    with pytest.raises(UserError, match="--cache ram: 2 cases take .* are free: use --cache disk"):
        opened(tmp_path, cases, "--cache", "ram")
    assert not counted


def test_the_cache_lies_beside_the_run_folder_or_where_it_is_told(cases, tmp_path):
    assert opened(tmp_path, cases).folder == tmp_path / "runs" / "dints_cache"
    assert opened(tmp_path, cases, "--cache_dir", tmp_path / "mine").folder == tmp_path / "mine"


def test_large_cases_are_prepared_one_after_another(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "cores_per_process", lambda: 8)
    assert opened(tmp_path, cases).num_threads == 8
    monkeypatch.setattr(cache_module, "WORKING_MEMORY", 3 * 20**3 * cache_module.WORKING_BYTES)
    assert opened(tmp_path, cases).num_threads == 3
    monkeypatch.setattr(cache_module, "WORKING_MEMORY", 1)
    assert opened(tmp_path, cases).num_threads == 1


def test_cases_in_memory_are_tensors_that_processes_share():
    prepared = Prepared(
        np.zeros((1, 2, 2, 2), np.float16), np.zeros((2, 2, 2), np.uint8), cache_module.CropMasks(*[np.zeros(1)] * 3)
    )
    held = CasesInMemory([prepared])
    multiprocessing.reduction.ForkingPickler.dumps(held)
    assert all(tensor.is_shared() for tensor in held.tensors[0])


def test_available_memory_is_what_the_system_and_the_container_leave(monkeypatch):
    (free,) = re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
    assert 0 < runtime.available_memory() <= 1.1 * 1024 * int(free)
    files = {"/proc/meminfo": "MemAvailable:  1000 kB\n", "/sys/fs/cgroup/memory.max": "500000"}
    files |= {"/sys/fs/cgroup/memory.current": "300000", "/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 70000\n"}

    def read(path, *_, **__):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert runtime.available_memory() == 270000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert runtime.available_memory() == 1024000


def test_notes_are_plain(cases, tmp_path):
    cache_in(tmp_path / "cache").hold(cases[:1], "test")
    for note in (tmp_path / "cache" / "digests").iterdir():
        size, changed, digest = json.loads(note.read_text())
        assert isinstance(size, int) and isinstance(changed, int) and re.fullmatch("[0-9a-f]{128}", digest)


def test_a_file_that_vanished_is_not_taken_for_a_full_disk(cases, tmp_path):
    Path(cases[0].label).unlink()
    with pytest.raises(UserError, match=f"{cases[0].label} cannot be read: No such file or directory"):
        cache_in(tmp_path / "cache").hold(cases, "test")
