"""install.sh runs with a stand-in for pip, so that nothing is downloaded; and requirements.txt is
complete.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
INSTALL = PROJECT / "install.sh"
TORCH = re.search(r"^torch==(\S+)", (PROJECT / "requirements.txt").read_text(), re.MULTILINE).group(
    1
)
IMPORT = re.compile(r"^ *(?:from|import) (\w+)[\w.]*(?: import .*| as \w+)?$", re.MULTILINE)
SYSTEM_TOOLS = ("bash", "cat", "dirname", "ls", "sed", "uname")

linux = pytest.mark.skipif(sys.platform != "linux", reason="the choice of torch's build is Linux's")


PIP = """import os, sys
if sys.argv[1] == "install":
    with open(os.environ["LOG"], "a") as log:
        print("pip", *sys.argv[1:], file=log)
    if "-r" in sys.argv:
        open(os.environ["LOG"] + ".requirements", "w").write(open(sys.argv[-1]).read())
    sys.exit("NO_INDEX" in os.environ and os.environ["NO_INDEX"] in sys.argv)
"""
STUB = f"""import os
__version__ = "{TORCH}"
class cuda:
    is_available = staticmethod(lambda: "TORCH_SEES_GPU" in os.environ)
"""


class Machine:
    """A checkout with only install.sh, and a PATH that holds only what a test puts there."""

    def __init__(self, folder: Path):
        self.checkout, self.bin, self.log = folder / "a checkout", folder / "bin", folder / "log"
        self.checkout.mkdir()
        for name in ("install.sh", "requirements.txt"):
            shutil.copy(PROJECT / name, self.checkout)
        self.bin.mkdir()
        for name in SYSTEM_TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))

    def program(self, name: str, script: str = 'echo "${0##*/} $*" >>"$LOG"') -> None:
        path = self.bin / name
        path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        path.chmod(0o755)

    def venv(self, folder: str = "a checkout/.venv", torch: str = "") -> None:
        """Make an environment whose pip notes its arguments, and whose torch is a stand-in."""
        place = self.checkout.parent / folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
        packages = next((place / "lib").glob("python3*")) / "site-packages"
        (packages / "pip").mkdir()
        (packages / "pip" / "__main__.py").write_text(PIP)
        (packages / "torch.py").write_text(STUB)
        if torch:
            (packages / "torch-0.dist-info").mkdir()
            metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n"
            (packages / "torch-0.dist-info" / "METADATA").write_text(metadata)

    def install(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [shutil.which("bash"), self.checkout / "install.sh", *arguments],
            env={"PATH": str(self.bin), "LOG": str(self.log), **environment},
            cwd=self.checkout.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path) -> Machine:
    machine = Machine(tmp_path)
    machine.program("dot")
    return machine


def test_second_run_installs_nothing_until_the_requirements_change(machine):
    machine.venv(torch=TORCH)
    first = machine.install()
    assert first.returncode == 0, first.stderr
    before = machine.calls()
    assert len(before) == 1 and before[0].startswith("pip install -r ")
    installed = Path(f"{machine.log}.requirements").read_text()
    assert installed == (PROJECT / "requirements.txt").read_text()
    second = machine.install()
    assert second.returncode == 0 and "up to date" in second.stdout
    assert machine.calls() == before
    for result in (first, second):
        assert "source a\\ checkout/.venv/bin/activate" in result.stdout
        assert "bash a\\ checkout/quickstart.sh" in result.stdout
    with (machine.checkout / "requirements.txt").open("a") as requirements:
        requirements.write("# changed\n")
    assert machine.install().returncode == 0 and len(machine.calls()) > len(before)


DRIVER = """[[ "$*" != *driver_version* ]] || printf '%s\\n%s\\n' "$DRIVER" "$DRIVER\""""
OLD_DRIVER = {"DRIVER": "535.161.08"}


@linux
@pytest.mark.parametrize(
    ("there", "environment", "build", "code"),
    [
        ("1.13.0", {}, "cpu", 0),
        ("", {"NO_INDEX": "--index-url"}, "cpu", 0),  # the default index serves
        ("", OLD_DRIVER, "cu126", 0),
        ("", OLD_DRIVER | {"NO_INDEX": "--index-url"}, "cu126", 1),
        (f"{TORCH}+cu126", OLD_DRIVER | {"TORCH_SEES_GPU": "1"}, None, 0),
        ("", {"DRIVER": "580.65.06"}, None, 0),
    ],
)
def test_the_build_of_torch_is_that_for_the_gpu_and_its_driver(
    machine, there, environment, build, code
):
    machine.venv(torch=there)
    if "DRIVER" in environment:
        machine.program("nvidia-smi", DRIVER)
    result = machine.install(**environment)
    assert result.returncode == code, result.stderr
    exact = f"torch=={TORCH}" + ("+cu126" if build == "cu126" else "")
    *torch, last = [*machine.calls(), *([""] if code else [])]
    index = f"--index-url https://download.pytorch.org/whl/{build} {exact}"
    assert len(torch) == (build is not None) and all(call.endswith(index) for call in torch)
    assert code or " -r " in last
    unseen = "DRIVER" in environment and "TORCH_SEES_GPU" not in environment and not code
    assert ("this torch cannot use the NVIDIA GPU" in result.stderr) == unseen


@pytest.mark.parametrize("how", ["active", "TORCH"])
def test_an_older_torch_that_is_supported_is_used(machine, tmp_path, how):
    """In the active environment it stays; TORCH has it installed."""
    machine.venv(*(("mine", "2.11.0+cu130") if how == "active" else ()))
    environment = {"TORCH": "2.11.0"}
    if how == "active":
        environment = {"PATH": f"{tmp_path}/mine/bin:{machine.bin}", "ACTIVE": "1"}
    result = machine.install(**environment)
    assert result.returncode == 0, result.stderr
    installed = Path(f"{machine.log}.requirements").read_text()
    ours = (PROJECT / "requirements.txt").read_text()
    assert installed == ours.replace(f"torch=={TORCH}", "torch==2.11.0") != ours
    assert (machine.checkout / ".venv").exists() == (how == "TORCH")
    assert "up to date" in machine.install(**environment).stdout


@pytest.mark.parametrize("complete", [True, False])
def test_an_active_environment_without_a_network_serves_if_the_scripts_run(
    machine, tmp_path, complete
):
    """Nothing else is tried then, as to install dot."""
    (machine.bin / "dot").unlink()
    machine.program("conda")
    machine.venv("mine", TORCH)
    for name in re.search('^scripts="(.*)"$', INSTALL.read_text(), re.M)[1].split(", "):
        (machine.checkout / f"{name}.py").touch()
    (machine.checkout / "train_dints.py").write_text("" if complete else "import not_there")
    environment = {"PATH": f"{tmp_path}/mine/bin:{machine.bin}", "CONDA_PREFIX": "/somewhere"}
    result = machine.install("--active", NO_INDEX="-r", **environment)
    assert result.returncode == (0 if complete else 1), result.stderr
    assert ("the scripts run with what is there" in result.stderr) == complete
    assert not any(call.startswith("conda") for call in machine.calls())


@linux
@pytest.mark.parametrize(("user", "sudo"), [("0", ""), ("1000", "sudo ")])
def test_dot_that_cannot_be_installed_is_a_warning(machine, user, sudo):
    (machine.bin / "dot").unlink()
    machine.venv(torch=TORCH)
    machine.program("id", f"echo {user}")
    machine.program("sudo", "exit 1")  # asks for a password
    machine.program("apt-get", 'echo "apt-get $*" >>"$LOG"; [[ $1 == update ]]')
    result = machine.install()
    tried = [call for call in machine.calls() if call.startswith("apt-get")]
    assert tried == ([] if sudo else ["apt-get update", "apt-get install --yes graphviz"])
    assert result.returncode == 0
    assert f"not drawn until you run: {sudo}apt-get install --yes graphviz" in result.stderr


def old_python(machine):
    machine.program("python3", "echo 3.8")


def files_in_the_way(machine):
    (machine.checkout / ".venv").mkdir()
    (machine.checkout / ".venv" / "notes.txt").touch()


@pytest.mark.parametrize(
    ("prepare", "arguments", "environment", "message"),
    [
        (old_python, [], {}, "Python 3.11 or newer is needed, but python3 is 3.8; "),
        (old_python, [], {"PYTHON": "nowhere/python"}, "none of nowhere/python runs"),
        (files_in_the_way, [], {}, r"\.venv exists and holds no Python that runs: .*VENV=DIR"),
        (old_python, ["--actve"], {}, "unknown argument --actve: .*--help"),
        (Machine.venv, [], {"TORCH": "2.9.1"}, "TORCH is 2.9.1: 2.11 to 2.13 are supported"),
    ],
)
def test_a_mistake_is_one_line(machine, prepare, arguments, environment, message):
    prepare(machine)
    result = machine.install(*arguments, **environment)
    assert result.returncode == 1 and machine.calls() == []
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr)


def test_requirements_cover_every_import_and_are_pinned():
    text = (PROJECT / "requirements.txt").read_text()
    pins = dict(line.split("==") for line in text.splitlines() if line and line[0] != "#")
    required = {name.lower() for name in pins}
    distributions = packages_distributions()  # yaml -> PyYAML, and the like
    folders = ("dints", "experiments", "benchmarks", "tests")
    files = [*PROJECT.glob("*.py"), *chain(*((PROJECT / f).rglob("*.py") for f in folders))]
    known = {"dints", *(path.stem for path in files)} | sys.stdlib_module_names
    found = {}
    for path in files:
        for statement in IMPORT.finditer(path.read_text(encoding="utf-8")):
            found[statement[1]] = path.name
    assert {"torch", "monai", "nibabel", "numpy"} <= found.keys()
    for name in found.keys() - known:
        providers = {provider.lower() for provider in distributions.get(name, [name])}
        assert providers & required, f"{found[name]} imports {name}, which requirements.txt lacks"
