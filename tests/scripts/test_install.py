"""install.sh runs with a stand-in for pip, so that nothing is downloaded; and requirements.txt is
complete.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
TORCH = re.search(r"^torch==(\S+)", (PROJECT / "requirements.txt").read_text(), re.MULTILINE).group(
    1
)
SYSTEM_TOOLS = ("bash", "cat", "dirname", "ls", "sed", "uname")

linux = pytest.mark.skipif(sys.platform != "linux", reason="the choice of torch's build is Linux's")


class Machine:
    """A checkout with only install.sh, and a PATH that holds only what a test puts there."""

    def __init__(self, folder: Path):
        self.checkout = folder / "a checkout"
        self.checkout.mkdir()
        for name in ("install.sh", "requirements.txt"):
            shutil.copy(PROJECT / name, self.checkout)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in SYSTEM_TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))
        self.log = folder / "log"
        # Nothing listens there: whoever asks the network is refused at once.
        self.environment = {
            "PATH": str(self.bin),
            "LOG": str(self.log),
            "https_proxy": "http://127.0.0.1:9",
        }

    def program(self, name: str, script: str = 'echo "${0##*/} $*" >>"$LOG"') -> None:
        path = self.bin / name
        path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        path.chmod(0o755)

    def venv(self, folder: Path | None = None) -> Path:
        """Make an environment whose pip notes its arguments, and whose torch is a stand-in."""
        folder = folder or self.checkout / ".venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        packages = next((folder / "lib").glob("python3*")) / "site-packages"
        (packages / "pip").mkdir()
        (packages / "pip" / "__main__.py").write_text(
            "import os, shutil, sys\nif sys.argv[1] == 'install':\n    open(os.environ['LOG'], "
            "'a').write('pip ' + ' '.join(sys.argv[1:]) + '\\n')\n    if '-r' in "
            "sys.argv:\n        shutil.copy(sys.argv[-1], os.environ['LOG'] + "
            "'.requirements')\n    sys.exit(int(os.environ.get('PIP_FAILS', 0)))\n"
        )
        (packages / "torch.py").write_text(
            f"import os\n__version__ = '{TORCH}'\nclass cuda:\n"
            "    is_available = staticmethod(lambda: 'TORCH_SEES_GPU' in os.environ)\n"
        )
        return packages

    def install(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [shutil.which("bash"), self.checkout / "install.sh", *arguments],
            env={**self.environment, **environment},
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


def with_torch(packages: Path, version: str) -> None:
    with_package(packages, "torch", version)


def with_package(packages: Path, name: str, version: str) -> None:
    information = packages / f"{name}-0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )


def reach_all_indexes(packages: Path) -> None:
    (packages / "sitecustomize.py").write_text(
        "import urllib.request\nurllib.request.urlopen = lambda url, timeout: None\n"
    )


def test_second_run_installs_nothing_until_the_requirements_change(machine):
    with_torch(machine.venv(), TORCH)
    first = machine.install()
    assert first.returncode == 0, first.stderr
    assert [call for call in machine.calls() if " -r " in call] == [
        f"pip install -r {machine.checkout}/requirements.txt"
    ]
    before = machine.calls()

    second = machine.install()
    assert second.returncode == 0 and "up to date" in second.stdout
    assert machine.calls() == before
    for result in (first, second):
        assert "source a\\ checkout/.venv/bin/activate" in result.stdout
        assert "bash a\\ checkout/quickstart.sh" in result.stdout

    with (machine.checkout / "requirements.txt").open("a") as requirements:
        requirements.write("# changed\n")
    assert machine.install().returncode == 0
    assert len(machine.calls()) > len(before)


@linux
def test_without_gpu_the_cpu_index_comes_first(machine):
    packages = machine.venv()
    with_torch(packages, "1.13.0")
    reach_all_indexes(packages)
    result = machine.install()
    assert result.returncode == 0, result.stderr
    first, second = machine.calls()
    assert f"--index-url https://download.pytorch.org/whl/cpu torch=={TORCH}" in first
    assert " -r " in second


@linux
def test_without_gpu_and_without_the_cpu_index_the_default_index_serves(machine):
    machine.venv()
    result = machine.install()
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("download.pytorch.org/whl/cpu cannot be reached") == 1
    assert [call.split()[2] for call in machine.calls()] == ["-r"]


@linux
def test_with_gpu_the_default_index_serves_and_a_cpu_torch_is_warned_about(machine):
    machine.venv()
    machine.program("nvidia-smi", "exit 0")
    result = machine.install()
    assert result.returncode == 0, result.stderr
    assert "No NVIDIA GPU" not in result.stdout
    assert "warning: this torch cannot use the NVIDIA GPU" in result.stderr
    assert [call.split()[2] for call in machine.calls()] == ["-r"]


DRIVER = """[[ "$*" != *driver_version* ]] || printf '%s\\n%s\\n' "$DRIVER" "$DRIVER\""""


@linux
@pytest.mark.parametrize(
    ("driver", "there", "sees_gpu", "installs"),
    [
        ("535.161.08", None, False, True),
        ("535.161.08", f"{TORCH}+cu126", True, False),
        ("580.65.06", None, False, False),
    ],
)
def test_with_a_driver_that_is_too_old_for_cuda_13_the_build_is_an_older_cuda_s(
    machine, driver, there, sees_gpu, installs
):
    packages = machine.venv()
    machine.program("nvidia-smi", DRIVER)
    reach_all_indexes(packages)
    if there:
        with_torch(packages, there)
    result = machine.install(DRIVER=driver, **({"TORCH_SEES_GPU": "1"} if sees_gpu else {}))
    assert result.returncode == 0, result.stderr
    assert ("driver is 535.161.08, and torch's default build needs 580" in result.stdout) == (
        "535" in driver
    )
    *torch, rest = machine.calls()
    wanted = (
        "pip install --no-deps --index-url https://download.pytorch.org/whl/cu126 "
        f"torch=={TORCH}+cu126"
    )
    assert torch == [wanted] * installs and " -r " in rest


@pytest.mark.parametrize("how", ["active", "TORCH"])
def test_an_older_torch_that_is_supported_is_used(machine, tmp_path, how):
    """In the active environment it stays; TORCH has it installed."""
    packages = machine.venv(tmp_path / "mine" if how == "active" else None)
    environment = {"TORCH": "2.11.0"}
    if how == "active":
        with_torch(packages, "2.11.0+cu130")
        environment = {"PATH": f"{tmp_path}/mine/bin:{machine.bin}", "ACTIVE": "1"}
    result = machine.install(**environment)
    assert result.returncode == 0, result.stderr
    ours = (PROJECT / "requirements.txt").read_text()
    installed = Path(f"{machine.log}.requirements").read_text()
    assert installed == ours.replace(f"torch=={TORCH}", "torch==2.11.0") and installed != ours
    assert "up to date" in machine.install(**environment).stdout
    assert how == "active" or "up to date" not in machine.install().stdout


@pytest.mark.parametrize("lacks", [None, "nibabel"])
def test_an_active_environment_without_a_network_will_do_if_it_can_run_everything(
    machine, tmp_path, lacks
):
    """In whatever versions, and without the tests' tools; nothing else is tried then, as to install
    dot.
    """
    (machine.bin / "dot").unlink()
    machine.program("conda")
    packages = machine.venv(tmp_path / "mine")
    for line in (PROJECT / "requirements.txt").read_text().split("# For tests")[0].splitlines():
        name = line.split("==")[0]
        if name and not name.startswith("#") and name != lacks:
            with_package(packages, name, "2.11.0")
    environment = {
        "PATH": f"{tmp_path}/mine/bin:{machine.bin}",
        "PIP_FAILS": "1",
        "CONDA_PREFIX": "/somewhere",
    }
    result = machine.install("--active", **environment)
    assert result.returncode == (1 if lacks else 0), result.stderr
    assert ("what is there is used" in result.stderr) == (lacks is None)
    assert not any(call.startswith("conda") for call in machine.calls())


@linux
@pytest.mark.parametrize(
    "user, calls, warning",
    [
        (
            "0",
            ["apt-get install --yes graphviz", "apt-get update", "apt-get install --yes graphviz"],
            "run: apt-get",
        ),
        ("1000", [], "run: sudo apt-get install --yes graphviz"),
    ],
)
def test_dot_that_cannot_be_installed_is_a_warning(machine, user, calls, warning):
    (machine.bin / "dot").unlink()
    with_torch(machine.venv(), TORCH)
    machine.program("id", f"echo {user}")
    machine.program("sudo", "exit 1")  # asks for a password
    machine.program("apt-get", 'echo "apt-get $*" >>"$LOG"; [[ $1 == update ]]')
    result = machine.install()
    assert result.returncode == 0
    assert [call for call in machine.calls() if call.startswith("apt-get")] == calls
    assert "warning: no graphviz program 'dot'" in result.stderr and warning in result.stderr


@pytest.mark.parametrize("how", [["--active"], []])
def test_active_environment_is_used_as_it_is(machine, tmp_path, how):
    with_torch(machine.venv(tmp_path / "mine"), TORCH)
    environment = {"PATH": f"{tmp_path}/mine/bin:{machine.bin}"} | ({} if how else {"ACTIVE": "1"})
    result = machine.install(*how, **environment)
    assert result.returncode == 0, result.stderr
    assert len(machine.calls()) == 1
    assert not (machine.checkout / ".venv").exists()
    assert "up to date" in machine.install(*how, **environment).stdout


def old_python(machine):
    machine.program("python3", "echo 3.8")


def files_in_the_way(machine):
    (machine.checkout / ".venv").mkdir()
    (machine.checkout / ".venv" / "notes.txt").touch()
    machine.program("python3", "echo 3.11")


@pytest.mark.parametrize(
    "prepare, arguments, environment, message",
    [
        (
            old_python,
            [],
            {},
            "Python 3.11 or newer is needed, but python3 is 3.8; "
            ".*PYTHON=python3.11 bash install.sh",
        ),
        (old_python, [], {"PYTHON": "nowhere/python"}, "none of nowhere/python runs"),
        (files_in_the_way, [], {}, r"\.venv exists and is not a Python environment: .*VENV=DIR"),
        (old_python, ["--actve"], {}, "unknown argument --actve: .*--help"),
        (Machine.venv, [], {"TORCH": "2.9.1"}, "TORCH is 2.9.1: 2.11 to 2.13 are supported"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(machine, prepare, arguments, environment, message):
    prepare(machine)
    result = machine.install(*arguments, **environment)
    assert result.returncode == 1
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr)
    assert machine.calls() == []


def third_party_imports() -> dict[str, str]:
    """Find the top-level modules that the project's Python files import, each with a file that
    does.
    """
    folders = ("dints", "experiments", "benchmarks", "tests")
    files = [
        *PROJECT.glob("*.py"),
        *(path for folder in folders for path in (PROJECT / folder).rglob("*.py")),
    ]
    own = {"dints", *(path.stem for path in files)}
    found = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = (
                    [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
                )
            found |= {name.split(".")[0]: path.name for name in names}
    return {name: path for name, path in found.items() if name not in own | sys.stdlib_module_names}


def test_requirements_cover_every_import_and_are_pinned():
    lines = [
        line.split("#")[0].strip()
        for line in (PROJECT / "requirements.txt").read_text().splitlines()
    ]
    pins = dict(line.split("==") for line in lines if line)  # an unpinned line cannot be split
    required = {name.lower() for name in pins}
    distributions = packages_distributions()  # yaml -> PyYAML, and the like
    imports = third_party_imports()
    assert {"torch", "monai", "nibabel", "numpy"} <= imports.keys()
    for name, path in imports.items():
        providers = {provider.lower() for provider in distributions.get(name, [name])}
        assert providers & required, f"{path} imports {name}, which requirements.txt lacks"
