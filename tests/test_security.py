"""Nothing in the project runs what a file says: its source, the packages that it asks for, and hostile files."""

from __future__ import annotations

import ast
import codecs
import functools
import operator
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import chain, random_architecture

import decode_plot
import infer_dints
import train_dints
from dints.architecture import save_architecture
from dints.errors import UserError, exit_on_user_error
from dints.files import load_safely
from dints.network import FoundNetwork, save_model
from dints.phantom import write_phantom
from dints.tasks import TASKS

CHECKOUT = Path(__file__).resolve().parents[1]

# The source.

SOURCES = sorted(path for path in CHECKOUT.rglob("*.py") if not {".venv", "shared"} & {*path.parts})
PROGRAM = [path for path in SOURCES if "tests" not in path.parts]

# Whatever they are given, these run or unpickle it.
NEVER = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "marshal.load"),
    *("marshal.loads", "shelve.open", "subprocess.getoutput", "subprocess.getstatusoutput", "runpy.run_path"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler", "pickle._load", "pickle._loads"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load"),
    *("yaml.unsafe_load_all", "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.serialization.load"),
    *("torch.serialization.add_safe_globals", "shutil.unpack_archive", "urllib.request.urlretrieve"),
}
FOREIGN = {"dill", "joblib", "cloudpickle", "_pickle", "cPickle", "pickle5", "jsonpickle"}
OF_ANY_OBJECT = {"extract", "extractall", "read_pickle", "allow_pickle"}
REQUESTS = {"get", "post", "put", "patch", "delete", "head", "options", "request"}

# What tests do to prove that a trap works, or to unpickle what they pickled themselves.
ALLOWED = {
    ("tests/test_architecture.py", "eval"): "the payload of a trap",
    ("tests/test_architecture.py", "os.system"): "the payload of a trap",
    ("tests/test_architecture.py", "pickle.loads"): "shows that the trap works",
    ("tests/test_architecture.py", "torch.load"): "shows that the trap works",
    ("tests/test_augmentation.py", "pickle.loads"): "what it pickled itself, as a worker would",
    ("tests/test_cache.py", "pickle.loads"): "what it pickled itself, as a worker would",
    ("tests/test_security.py", "pickle.loads"): "shows that the trap works",
    ("tests/test_security.py", "torch.load"): "shows that the trap works",
    ("tests/test_security.py", "numpy.load"): "what a file may ask for",
}


def hazards(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of whatever may run, unpickle, unpack or wait without a limit."""
    tree = ast.parse(source)
    names = {"np": "numpy"}  # what a name in the file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in FOREIGN)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            if node.module.split(".")[0] in FOREIGN or any(alias.name == "*" for alias in node.names):
                yield node.lineno, f"from {node.module}"

    def name_of(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return names.get(node.id, node.id).removeprefix("builtins.")
        if isinstance(node, ast.Attribute):
            return f"{name_of(node.value)}.{node.attr}".removeprefix("builtins.")
        if isinstance(node, ast.Call):
            return name_of(node.func)
        return ""

    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = name_of(node)
            if _is_hazard(name, calls.get(id(node)), node):
                yield node.lineno, name
        elif isinstance(node, ast.Call) and not _is_false(node, "shell"):
            yield node.lineno, "shell"


def _is_hazard(name: str, call: ast.Call | None, node: ast.AST) -> bool:
    """Whether a name, called or handed on, is one."""
    owner, _, last = name.rpartition(".")
    if name in NEVER or (isinstance(node, ast.Attribute) and node.attr in OF_ANY_OBJECT):
        return True
    if name == "torch.load":
        return call is None or not _is_constant(call, "weights_only", True)
    if name in ("numpy.load", "numpy.lib.format.read_array", "numpy.lib.npyio.NpzFile"):
        return call is None or len(call.args) > 2 or not _is_false(call, "allow_pickle")
    if name == "urllib.request.urlopen" or (last in REQUESTS and (owner == "requests" or "session" in owner.lower())):
        return (
            call is None
            or all(keyword.arg != "timeout" for keyword in call.keywords)
            or _is_constant(call, "timeout", None)
        )
    return False


def _is_constant(call: ast.Call, keyword: str, value: object) -> bool:
    values = [given.value for given in call.keywords if given.arg == keyword]
    return len(values) == 1 and isinstance(values[0], ast.Constant) and values[0].value is value


def _is_false(call: ast.Call, keyword: str) -> bool:
    """Whether a flag of a call is left out or plainly ``False``."""
    return all(given.arg != keyword for given in call.keywords) or _is_constant(call, keyword, False)


def test_no_source_runs_or_unpickles_what_it_reads():
    found = {}
    for path in SOURCES:
        file = str(path.relative_to(CHECKOUT))
        for line, name in hazards(path.read_text(encoding="utf-8")):
            found.setdefault((file, name), []).append(line)
    assert {key: lines for key, lines in found.items() if key not in ALLOWED} == {}
    assert ALLOWED.keys() <= found.keys()  # an exception that nothing needs any more goes
    assert all(file.startswith("tests/") for file, _ in ALLOWED)
    assert {"search_dints.py", "dints/runtime.py", "tests/test_security.py"} <= {
        str(path.relative_to(CHECKOUT)) for path in SOURCES
    }


@pytest.mark.parametrize(
    "snippet",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.load(path, **options)",
        "from torch import load as read\nread(path)",
        "load = torch.load",
        "map(torch.load, paths)",
        "torch.serialization.add_safe_globals([eval_it])",
        "pickle.load(file)",
        "pickle.loads(data)",
        "pickle.Unpickler(file).load()",
        "class Careful(pickle.Unpickler): pass",
        "import pickle as p\np.loads(data)",
        "from pickle import loads\nloads(data)",
        "from pickle import *",
        "import joblib",
        "from dill import loads",
        "marshal.loads(data)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "np.load(path, None, True)",
        "import numpy\nnumpy.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(text)",
        "yaml.full_load(text)",
        "from yaml import load\nload(text)",
        "eval(text)",
        "exec(text)",
        "builtins.eval(text)",
        "from builtins import exec as run\nrun(text)",
        "__import__(name)",
        "return_value = (eval, (text,))",
        "subprocess.run(command, shell=True)",
        "subprocess.Popen(command, shell=flag)",
        "subprocess.getoutput(command)",
        "os.system(command)",
        "from os import system\nsystem(command)",
        "os.popen(command)",
        "tempfile.mktemp()",
        "tar.extractall(folder)",
        "tar.extract(member, folder)",
        "tarfile.open(path).extractall(folder, filter='data')",
        "zipfile.ZipFile(path).extractall()",
        "shutil.unpack_archive(path)",
        "requests.get(url)",
        "requests.get(url, timeout=None)",
        "requests.request('GET', url, headers={})",
        "session.get(url)",
        "self.session.post(url)",
        "requests.Session().get",
        "urllib.request.urlopen(url)",
        "urllib.request.urlretrieve(url)",
    ],
)
def test_each_hazard_is_found(snippet):
    assert list(hazards(snippet))


@pytest.mark.parametrize(
    "snippet",
    [
        "torch.load(path, map_location='cpu', weights_only=True)",
        "from torch import load\nload(path, weights_only=True)",
        "pickle.dumps(content)",
        "except_ = pickle.UnpicklingError",
        "np.load(path, mmap_mode='r')",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "network.eval()",
        "re.compile(text)",
        "torch.compile(network)",
        "subprocess.run(command, shell=False)",
        "tempfile.mkdtemp()",
        "tmp_path_factory.mktemp('data')",
        "tar.extractfile(member)",
        "session.get(url, timeout=5)",
        "requests.get(url, timeout=(5, 10))",
        "options.get(key)",
    ],
)
def test_what_is_harmless_is_not(snippet):
    assert list(hazards(snippet)) == []


def asserts(source: str) -> list[int]:
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def test_the_program_checks_nothing_by_assert():
    """``python -O`` leaves them out."""
    assert asserts("def f(x):\n    if x:\n        assert x > 0, 'no'") == [3]
    assert {str(path): lines for path in PROGRAM if (lines := asserts(path.read_text(encoding="utf-8")))} == {}
    assert len(PROGRAM) > 20


# The packages.

# At or above the first versions without an advisory that we know of: torch 2.6 for CVE-2025-32434 (weights_only ran
# code) and 2.10 for CVE-2026-24747 (it wrote out of bounds); MONAI 1.5.1 for CVE-2025-58755 to -58757 (unpickling, zip
# members out of the folder) and 1.5.2 for CVE-2026-21851; requests 2.32.4 for CVE-2024-47081 (credentials to another
# host) and 2.33 for CVE-2026-25645; tqdm 4.66.3 for CVE-2024-34062; PyYAML 5.4 for CVE-2020-14343; NumPy 1.22 for
# CVE-2021-41496; SciPy 1.10 for CVE-2023-25399.
FLOORS = {
    "torch": "2.10",
    "monai": "1.6.1",
    "requests": "2.33",
    "tqdm": "4.66.3",
    "PyYAML": "5.4",
    "numpy": "1.22",
    "scipy": "1.10",
}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", text)[0].split("."))


@pytest.mark.parametrize("package", FLOORS)
def test_packages_are_past_known_advisories(package):
    """What requirements.txt pins, and what these tests run with."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (CHECKOUT / "requirements.txt").read_text(), re.MULTILINE))
    for found in (pins[package], version(package)):
        assert numbers(found) >= numbers(FLOORS[package]), f"{package} {found}"


def test_every_requirement_is_pinned():
    lines = [line.partition("#")[0].strip() for line in (CHECKOUT / "requirements.txt").read_text().splitlines()]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines if line)


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
    """Of a file that has all the keys which any of the scripts asks for."""
    content = {**chain(0, 1, 0, num_depths=3).to_dict(), "state_dict": {}, "architecture": {}, "channel_mul": 1}
    content |= {"task": {}, "configuration": {}, "trap": Trap(folder)}
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=zipped)


def pickled(content: object) -> Callable[[Path], None]:
    """A file as `torch.save` wrote it before it wrote zip files, with any content."""

    def write(path: Path) -> None:
        torch.save(0, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(pickle.dumps(0, 2), pickle.dumps(content, 2), 1))

    return write


def truncated(path: Path) -> None:
    save_architecture(path, random_architecture(0, 12, 4))
    path.write_bytes(path.read_bytes()[:-100])


def too_large(path: Path) -> None:
    """Asks for 10 TB."""
    content = Called(np._core.multiarray._reconstruct, np.ndarray, (10**13,), b"b")
    torch.save({"node_a": content}, path)


DAMAGED = "is damaged or not a PyTorch file"
FILES = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (Path.mkdir, "is a folder"),
    "empty": (Path.touch, DAMAGED),
    "text": (lambda path: path.write_text("<html>404</html>\n" * 50), DAMAGED),
    "truncated": (truncated, DAMAGED),
    "tensor": (lambda path: torch.save(torch.ones(3), path), "weights|Tensor|model file"),
    "another dictionary": (lambda path: torch.save({"epoch": 5}, path), "weights|node_a|model file"),
    "without end": (too_large, DAMAGED),
    "malicious": (malicious(Path("it ran"), True), "asks for .*mkdir"),
    "malicious, legacy": (malicious(Path("it ran"), False), "asks for .*mkdir"),
    "malicious, plain pickle": (lambda path: path.write_bytes(pickle.dumps(Trap(Path("it ran")))), DAMAGED),
}
TRAPS = [name for name in FILES if name.startswith("malicious")]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("data") / "Task00_Phantom", num_training=6, num_test=1)


@pytest.fixture(scope="module")
def arch_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("arch") / "search_code_1.pth"
    save_architecture(path, chain(0, 1, 0, num_depths=3))
    return path


# Scripts and their arguments that read a file: {file}; {arch} and {data} are sound ones.
TRAIN = "--root {data} --output_root out --num_folds 3 --patch_size 16 16 16 --channel_mul 0.125 --device cpu"
READERS = {
    "architecture that is drawn": (decode_plot, "--checkpoint {file} --directory out"),
    "architecture that is counted": (decode_plot, "--checkpoint {file} --directory out --cost --device cpu"),
    "architecture that is trained": (train_dints, f"--arch_ckpt {{file}} {TRAIN}"),
    "weights to start from": (train_dints, f"--arch_ckpt {{arch}} --checkpoint {{file}} {TRAIN}"),
    "model": (infer_dints, "--checkpoint {file} --input {data}/imagesTs --output_root out --device cpu"),
}
ARCHITECTURE_READERS = [name for name in READERS if name.startswith("architecture")]


@pytest.fixture
def refused(phantom, arch_file, tmp_path, monkeypatch, capsys):
    """A function that runs a script in this process, in an empty folder, and returns the one line that it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dints.cache.Cache.hold", lambda *_: pytest.fail("it went on"))

    def run(reader: str, *flags: str) -> str:
        script, arguments = READERS[reader]
        arguments = arguments.format(file="file.pth", arch=arch_file, data=phantom)
        monkeypatch.setattr(sys, "argv", [script.__file__, *arguments.split(), *flags])
        with pytest.raises(SystemExit) as ended:
            exit_on_user_error(script.main, script.parse_args())
        assert ended.value.code == 1
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""
        assert "file.pth" in said.err and len(said.err) < 500
        written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert written <= {"file.pth", ".lock"}
        assert not Path("it ran").exists()
        return said.err

    return run


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("reader", READERS)
def test_a_bad_file_ends_a_script_with_one_line(refused, reader, name):
    make, fault = FILES[name]
    make(Path("file.pth"))
    assert re.search(fault, refused(reader))


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


def entry(key: str, index: tuple[int, int], value: float) -> dict:
    array = GOOD[key].double()
    array[index] = value
    return {**GOOD, key: array}


ARCHITECTURES = {
    "missing key": ({key: value for key, value in GOOD.items() if key != "arch_code_c"}, "has no 'arch_code_c'"),
    "code 9": (entry("arch_code_c", (0, 0), 9), "holds 9"),
    "code -1": (entry("arch_code_c", (0, 0), -1), "holds -1"),
    "code 1.7": (entry("arch_code_c", (0, 0), 1.7), "holds 1.7"),
    "path 0.5": (entry("arch_code_a", (0, 0), 0.5), "holds 0.5"),
    "empty row of paths": (entry("arch_code_a", (1, 3), 0), "block 1 has no active path"),
    "empty row of nodes": (entry("node_a", (1, 1), 0), "row 1 of 'node_a' activates depths []"),
    "unconnected": (entry("arch_code_a", (1, 1), 1), "block 1 ends at depths [0, 1], but block 2 starts from [1]"),
    "node that no path uses": (entry("node_a", (0, 2), 1), "row 0 of 'node_a' activates depths [0, 2]"),
    "shapes": ({**GOOD, "node_a": GOOD["node_a"][1:]}, "'node_a' has shape (3, 3)"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_script_says_the_same_of_an_architecture(refused, name):
    content, fault = ARCHITECTURES[name]
    torch.save(content, "file.pth")
    (message,) = {refused(reader) for reader in ARCHITECTURE_READERS}
    assert fault in message

    model = {"state_dict": {"x": torch.ones(1)}, "architecture": content, "channel_mul": 1.0, "task": {}}
    torch.save(model, "file.pth")
    in_model = refused("model")
    assert in_model == message.replace("file.pth: ", "the architecture in file.pth: ")


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("--num_blocks 2", "holds 3 blocks, but --num_blocks is 2"),
        ("--num_blocks 3 --num_depths 4", "holds 3 depths, but --num_depths is 4"),
    ],
)
def test_an_architecture_of_another_size_is_not_trained(refused, flags, fault):
    torch.save(GOOD, "file.pth")
    assert fault in refused("architecture that is trained", *flags.split())


@pytest.mark.parametrize(
    ("depths", "settings", "fault"),
    [
        ((0, 1, 1, 0), (1, 3, 0.125), "6 tensors that the network has"),
        ((0, 1, 2), (1, 3, 0.125), "tensors that the network (has|lacks)"),
        ((0, 1, 0), (2, 3, 0.125), "of another shape"),
        ((0, 1, 0), (1, 2, 0.125), "of another shape"),
        ((0, 1, 0), (1, 3, 0.25), "of another shape"),
    ],
    ids=["blocks", "paths", "channels", "classes", "width"],
)
@pytest.mark.parametrize("reader", ["weights to start from", "model"])
def test_weights_of_another_network_are_refused(refused, reader, depths, settings, fault):
    channels, classes, channel_mul = settings
    other = FoundNetwork(chain(*depths, num_depths=3), channels, classes, channel_mul)
    save_model("file.pth", other, chain(0, 1, 0, num_depths=3), 0.125, TASKS["Task00_Phantom"])
    assert re.search(fault, refused(reader))


def test_scripts_run_nothing_from_a_malicious_file(phantom, arch_file, tmp_path):
    """As processes of their own; a run's own checkpoint as well."""
    runs = {**READERS, "checkpoint of the run": (train_dints, f"--arch_ckpt {{arch}} {TRAIN}")}
    del runs["architecture that is counted"]
    for number, (script, arguments) in enumerate(runs.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        malicious(folder / "it ran", True)(folder / "file.pth")
        (folder / "out").mkdir()
        if "{file}" not in arguments:
            shutil.move(folder / "file.pth", folder / "out" / "latest.pth")
        arguments = arguments.format(file="file.pth", arch=arch_file, data=phantom)
        command = [sys.executable, script.__file__, *arguments.split()]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
        assert "pth asks for posix.mkdir while loading" in errors[0] and "do not trust it" in errors[0]
        assert not (folder / "it ran").exists()


def test_an_environment_variable_does_not_open_the_door(tmp_path, monkeypatch):
    """PyTorch has one that makes unpickling unrestricted wherever a call leaves it open."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    malicious(tmp_path / "it ran", True)(tmp_path / "file.pth")
    with pytest.raises(UserError, match="asks for posix.mkdir"):
        load_safely(tmp_path / "file.pth")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "call",
    [
        Called(getattr, "text", "format"),
        Called(np.load, "x.npy"),
        Called(np.fromfile, "/etc/passwd"),
        Called(np.memmap, "/etc/passwd"),
        Called(torch.load, "x.pth"),
        Called(open, "/etc/passwd"),
        Called(codecs.decode, b"text", "rot13"),
        Called(functools.partial, os.mkdir, "it ran"),
        Called(operator.methodcaller, "mkdir", "it ran"),
        Called(subprocess.Popen, ["touch", "it ran"]),
    ],
    ids=lambda call: f"{call.call[0].__name__} {call.call[1][-1]}",
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_only_what_arrays_need_is_called(tmp_path, monkeypatch, call, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": call}, "file.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="file.pth (asks for|is damaged)"):
        load_safely("file.pth")
    assert os.listdir() == ["file.pth"]
