"""Nothing in the project runs what a file says: the linter sees to the source, and hostile files
are tried.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import chain, random_architecture
from commands import CHECKOUT, TINY

import decode_plot
import infer_dints
import search_dints
import train_dints
from dints.data.tasks import TASKS
from dints.errors import UserError, exit_on_user_error
from dints.network.architecture import save_architecture
from dints.network.discrete import DiscreteNetwork
from dints.network.model_file import save_model
from dints.torch_files import load_safely

# The source and the packages.

HAZARDS = """
assert path.exists()
eval(text)
exec(text)
pickle.loads(content)
marshal.loads(content)
shelve.open(path)
dill.loads(content)
torch.load(path, weights_only=False)
numpy.load(path, allow_pickle=True)
yaml.load(text)
yaml.full_load(text)
yaml.unsafe_load(text)
os.system(command)
subprocess.run(command, shell=True)
tempfile.mktemp()
tarfile.open(path).extractall(folder)
requests.get(url)
requests.get(url, timeout=None)
requests.get(url, timeout=5, verify=False)
urllib.request.urlopen(url)
"""


def test_the_linter_finds_what_runs_unpickles_unpacks_or_waits():
    """The rules are pyproject.toml's, which tests/run.sh holds against all of the source."""
    modules = "dill, marshal, numpy, os, pickle, requests, shelve, subprocess, tarfile, tempfile"
    source = f"import {modules}, torch, urllib.request, yaml{HAZARDS}"
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise"]
    command += ["--stdin-filename", "dints/new.py", "-"]
    done = subprocess.run(command, cwd=CHECKOUT, input=source, capture_output=True, text=True)
    places = re.findall(r"^\S+?:(\d+):\d+: (?:S\d|TID251)", done.stdout, re.MULTILINE)
    lines = enumerate(source.splitlines(), 1)
    assert [line for number, line in lines if number > 1 and str(number) not in places] == []


# At or above the first versions without an advisory that we know of: torch 2.6 for CVE-2025-32434
# (weights_only ran code) and 2.10 for CVE-2026-24747 (it wrote out of bounds); MONAI 1.5.1 for
# CVE-2025-58755 to -58757 (unpickling, zip members out of the folder) and 1.5.2 for CVE-2026-21851;
# requests 2.32.4 for CVE-2024-47081 (credentials to another host) and 2.33 for CVE-2026-25645; tqdm
# 4.66.3 for CVE-2024-34062; PyYAML 5.4 for CVE-2020-14343; NumPy 1.22 for CVE-2021-41496; SciPy
# 1.10 for CVE-2023-25399.
FLOORS = {
    "torch": "2.10",
    "monai": "1.6.1",
    "requests": "2.33",
    "tqdm": "4.66.3",
    "PyYAML": "5.4",
    "numpy": "1.22",
    "scipy": "1.10",
}


def test_packages_are_past_known_advisories():
    text = (CHECKOUT / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))
    for package, floor in FLOORS.items():
        numbers = ([int(n) for n in one.split(".")] for one in (pins[package], floor))
        assert next(numbers) >= next(numbers), package


# Hostile and damaged files, by every way that a script reads one.


class Trap:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, folder: Path, function: Callable = os.mkdir):
        self.folder, self.function = folder, function

    def __reduce__(self):
        return self.function, (str(self.folder),)


class Called:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def malicious(folder: Path, zipped: bool) -> Callable[[Path], None]:
    """Write a file that has all the keys which any of the scripts asks for."""
    content = {
        **chain(0, 1, 0, num_depths=3).to_dict(),
        "state_dict": {},
        "architecture": {},
        "channel_mul": 1,
    }
    content |= {"task": {}, "configuration": {}, "trap": Trap(folder)}
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=zipped)


def truncated(path: Path) -> None:
    save_architecture(path, random_architecture(0, 12, 4))
    path.write_bytes(path.read_bytes()[:-100])


def too_large(path: Path) -> None:
    """Write a file that asks for 10 TB."""
    content = Called(np._core.multiarray._reconstruct, np.ndarray, (10**13,), b"b")
    torch.save({"node_a": content}, path)


DAMAGED = "is damaged or not a PyTorch file"
FILES = {
    "missing": (lambda path: None, "does not exist"),
    "truncated": (truncated, DAMAGED),
    "another dictionary": (lambda path: torch.save({"epoch": 5}, path), "node_a"),
    "without end": (too_large, DAMAGED),
    "malicious": (malicious(Path("it ran"), True), "asks for .*mkdir"),
    "malicious, legacy": (malicious(Path("it ran"), False), "asks for .*mkdir"),
    "malicious, plain pickle": (
        lambda path: path.write_bytes(pickle.dumps(Trap(Path("it ran")))),
        DAMAGED,
    ),
}
TRAPS = [name for name in FILES if name.startswith("malicious")]


@pytest.fixture(scope="module")
def arch_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("arch") / "search_code_1.pth"
    save_architecture(path, chain(0, 1, 0, num_depths=3))
    return path


# Scripts and their arguments that read file.pth; {arch} and {data} are sound ones.
RUN = f"--root {{data}} --output_root out {TINY}"
READERS = {
    "drawing": (decode_plot, "--checkpoint file.pth --directory out"),
    "architecture": (train_dints, f"--arch_ckpt file.pth {RUN}"),
    "supernet": (search_dints, f"--checkpoint file.pth {RUN} --num_blocks 2 --num_depths 3"),
    "weights": (train_dints, f"--arch_ckpt {{arch}} --checkpoint file.pth {RUN}"),
    "model": (infer_dints, "--checkpoint file.pth --input {data}/imagesTs --output_root out"),
    "run": (train_dints, f"--arch_ckpt {{arch}} {RUN}"),
}


@pytest.fixture
def refused(phantom, arch_file, tmp_path, monkeypatch, capsys):
    """Return a function that runs a script in an empty folder, to its one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dints.data.cache.Cache.hold", lambda *_: pytest.fail("data was read"))

    def run_script(reader: str, file: str = "file.pth") -> str:
        script, arguments = READERS[reader]
        words = arguments.format(arch=arch_file, data=phantom).split()
        monkeypatch.setattr(sys, "argv", [script.__file__, *words])
        with pytest.raises(SystemExit) as ended:
            exit_on_user_error(script.main, script.parse_args())
        said = capsys.readouterr()
        assert ended.value.code == 1 and said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
        assert file in said.err and len(said.err) < 500
        written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert written <= {Path(file).name, ".lock"} and not Path("it ran").exists()
        return said.err

    return run_script


@pytest.mark.fault("truncated, empty or foreign file")
@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_ends_a_script_with_one_line(refused, name):
    make, fault = FILES[name]
    make(Path("file.pth"))
    assert re.search(fault, refused("drawing"))


@pytest.mark.fault("malicious pickle")
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_what_a_file_says(refused, reader):
    file = Path("out/latest.pth" if reader == "run" else "file.pth")
    file.parent.mkdir(exist_ok=True)
    malicious(Path("it ran"), True)(file)
    assert "asks for posix.mkdir while loading" in refused(reader, str(file))


@pytest.mark.parametrize("name", TRAPS)
def test_the_traps_work(name, tmp_path, monkeypatch):
    """Loaded without care, the malicious files do run."""
    monkeypatch.chdir(tmp_path)
    FILES[name][0](Path("file.pth"))
    if name == "malicious, plain pickle":
        pickle.loads(Path("file.pth").read_bytes())
    else:
        torch.load("file.pth", weights_only=False)
    assert Path("it ran").exists()


GOOD = chain(0, 1, 1, 0, num_depths=3).to_dict()


def endless() -> list:
    value = ["x"] * 50
    for _ in range(50):
        value = [value] * 50
    return value


ARCHITECTURES = {
    "missing key": (
        {key: value for key, value in GOOD.items() if key != "arch_code_c"},
        "has no 'arch_code_c'",
    ),
    "endless lists": ({**GOOD, "best_path": endless()}, "'best_path' is [["),
    "a tensor to be shown": ({**GOOD, "task": torch.zeros(1).expand(10**9)}, "'task' is tensor("),
    "a long operation": ({**GOOD, "operations": ["x" * 10**6]}, "names the operation 'xxx"),
}


@pytest.mark.fault("missing key, codes, rows, paths, nodes")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scripts_say_the_same_of_an_architecture(refused, name):
    content, fault = ARCHITECTURES[name]
    torch.save(content, "file.pth")
    message = refused("drawing")
    assert fault in message and refused("architecture") == message
    model = {"state_dict": {"x": torch.ones(1)}, "channel_mul": 1.0, "task": {}}
    torch.save({**model, "architecture": content}, "file.pth")
    assert refused("model") == message.replace("file.pth", "the architecture in file.pth")


@pytest.mark.fault("weights of another architecture")
@pytest.mark.parametrize(
    ("reader", "depths", "channel_mul", "fault"),
    [
        ("weights", (0, 1, 1, 0), 0.125, "6 tensors that the network has"),
        ("weights", (0, 1, 2), 0.125, "tensors that the network (has|lacks)"),
        ("weights", (0, 1, 0), 0.25, "of another shape"),
        ("model", (0, 1, 2), 0.125, "tensors that the network (has|lacks)"),
    ],
)
def test_weights_of_another_network_are_refused(refused, reader, depths, channel_mul, fault):
    other = DiscreteNetwork(chain(*depths, num_depths=3), 1, 3, channel_mul)
    save_model("file.pth", other, chain(0, 1, 0, num_depths=3), 0.125, TASKS["Task00_Phantom"])
    assert re.search(fault, refused(reader))


def test_an_environment_variable_does_not_open_the_door(tmp_path, monkeypatch):
    """PyTorch has one that makes unpickling unrestricted wherever a call leaves it open."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    malicious(tmp_path / "it ran", True)(tmp_path / "file.pth")
    with pytest.raises(UserError, match="asks for posix.mkdir"):
        load_safely(tmp_path / "file.pth")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.fault("malicious pickle")
@pytest.mark.parametrize(
    "call",
    [
        Called(getattr, "text", "format"),
        Called(np.load, "x.npy"),
        Called(torch.load, "x.pth"),
        Called(open, "/etc/passwd"),
        Called(functools.partial, os.mkdir, "it ran"),
        Called(subprocess.Popen, ["touch", "it ran"]),
    ],
    ids=lambda call: f"{call.call[0].__name__} {call.call[1][-1]}",
)
def test_only_what_arrays_need_is_called(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": call}, "file.pth")
    with pytest.raises(UserError, match="file.pth (asks for|is damaged)"):
        load_safely("file.pth")
    assert os.listdir() == ["file.pth"]
