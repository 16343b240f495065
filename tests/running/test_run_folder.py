"""The run folder, seeds and precision."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from dints import runtime
from dints.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
ALONE = runtime.Processes(rank=0, world_size=1, device=torch.device("cpu"))


def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(tmp_path):
    second = runtime.run_folder(tmp_path / "run", ALONE)
    with runtime.run_folder(tmp_path / "run", ALONE), pytest.raises(UserError, match="another run is writing into"):
        second.__enter__()
    with runtime.run_folder(tmp_path / "run", ALONE) as folder:
        assert folder.is_dir()


def test_a_kill_frees_the_folder_though_a_worker_lives_on(tmp_path):
    """As the workers of a killed process do, for some seconds, while the launcher starts it again."""
    reading, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        with runtime.run_folder(tmp_path / "run", ALONE):
            worker = os.fork()
            if worker:
                os.write(ready, b"%d" % worker)
            time.sleep(60)
    worker = int(os.read(reading, 9))
    try:
        with pytest.raises(UserError, match="another run"), runtime.run_folder(tmp_path / "run", ALONE):
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with runtime.run_folder(tmp_path / "run", ALONE):
            os.kill(worker, 0)  # it is there
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("place", ["a file", "below a file", "denied"])
def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    root = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "denied": Path("/sys/kernel")}[
        place
    ]
    if place == "denied" and not root.is_dir():
        pytest.skip("needs a folder that is closed even to root, such as Linux' /sys")
    with pytest.raises(UserError, match=f"--output_root {root} cannot be written"), runtime.run_folder(root, ALONE):
        pass


def test_seeds_depend_on_every_part_and_on_no_process():
    seeds = [runtime.seed_from(*parts) for parts in ((0, "weights", 1, 2), (0, "weights", 2, 1), (1, "weights", 1, 2))]
    assert len(set(seeds)) == 3
    program = "from dints import runtime; print(runtime.seed_from(0, 'weights', 1, 2))"
    other = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert int(other.stdout) == seeds[0]


@pytest.mark.parametrize(("wanted", "message"), [("fp16", "--precision fp16 needs a GPU")])
def test_precisions_that_the_device_lacks_are_refused(wanted, message):
    with pytest.raises(UserError, match=message):
        runtime.choose_precision(wanted, ALONE)


def test_precision_auto_on_a_cpu_is_the_faster_one(monkeypatch):
    for faster in ("fp32", "bf16"):
        monkeypatch.setattr(
            runtime, "_seconds_of_convolution", lambda p, faster=faster: 1.0 if p.name == faster else 2.0
        )
        assert runtime.choose_precision("auto", ALONE).name == faster


def test_measuring_the_precision_draws_no_random_number():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    runtime.choose_precision("auto", ALONE)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="--device cuda, but PyTorch sees no GPU"), runtime.started("cuda"):
        pass


def test_processes_that_do_not_meet_are_told():
    program = """
        from dints import errors, runtime

        def main():
            with runtime.started("cpu", timeout_minutes=0.02):
                print("they met")

        errors.exit_on_user_error(main)
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=CHECKOUT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and not done.stdout
    assert "error: [rank 0] the 2 processes of the run do not meet" in done.stderr and "Traceback" not in done.stderr
