"""Kills runs at random times, many times over, and looks at what is left: not part of the tests, for it takes minutes.

    OMP_NUM_THREADS=1 python tests/soak.py --kills 50 --seed 0 --output soak.log

Part A kills a process that does nothing but save a state of some 20 MB: the newest good state must be whole and at most
one save old. Part B kills a small search, all its processes, and starts it again until it ends: it must end as an
undisturbed one. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402  the checkout comes first on the path
from test_distributed import assert_equal  # noqa: E402
from test_resume import progress_of, rows, scalars, without_times  # noqa: E402

from dints import runtime  # noqa: E402
from dints.checkpoint import Checkpoint  # noqa: E402
from dints.errors import UserError  # noqa: E402
from dints.phantom import write_phantom  # noqa: E402

ALONE = runtime.Processes(0, 1, torch.device("cpu"))
ARGS = argparse.Namespace(resume="auto", save_minutes=0.0, warning_signal="USR1", allow_other_num_processes=False)
SEARCH = "--patch_size 16 16 16 --num_folds 3 --overlap_ratio 0 --device cpu --precision fp32 --channel_mul 0.125"
SEARCH += " --num_blocks 2 --num_depths 3 --num_epochs 24 --num_epochs_warmup 8 --num_epochs_per_validation 6"
SEARCH += " --learning_rate_arch 0.1 --num_workers 1 --save_minutes 0.002"


class State:
    """Some 20 MB of tensors that tell which save they are of."""

    def __init__(self):
        self.tensors = {f"part {number}": torch.zeros(2**17) for number in range(40)}

    def fill(self, iteration: int) -> None:
        for number, tensor in enumerate(self.tensors.values()):
            tensor.fill_(iteration + number / 64)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.tensors = state


def main(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder, open(args.output or os.devnull, "w") as log:

        def tell(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        start, rng = time.monotonic(), random.Random(args.seed)
        saves = kill_saves(Path(folder) / "saves", args.kills, rng, tell)
        searches = kill_searches(Path(folder), args.search_kills, rng, tell)
        tell(f"{saves} of {args.kills} killed saves left a wrong state; {time.monotonic() - start:.0f} s in all")
        tell("the killed search ended as the undisturbed one" if not searches else f"the search: {searches}")
        return 1 if saves or searches else 0


def kill_saves(folder: Path, kills: int, rng: random.Random, tell) -> int:
    """Part A; returns the number of wrong states."""
    wrong, in_save, known = 0, 0, -1
    for number in range(1, kills + 1):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            save_for_ever(folder, writing)
        os.close(writing)
        time.sleep(rng.uniform(0, 1.5))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reading) as told:
            lines = told.read().split("\n")[:-1]
        partial = len(list(folder.glob(".*.partial")))
        in_save += partial
        known = int(lines[-1]) if lines else known
        fault, found = judge(folder, known)
        known = known if found is None else found
        wrong += fault is not None
        tell(f"save kill {number}: {len(lines)} saves, {partial} half written, found {found}: {fault or 'good'}")
    tell(f"{in_save} of {kills} kills came in the middle of a save")
    return wrong


def save_for_ever(folder: Path, writing: int) -> None:
    state = State()
    with runtime.run_folder(folder, ALONE):
        checkpoint = Checkpoint(folder, ARGS, {"processes": 1}, ALONE)
        checkpoint.restore({"state": state}, runtime.Precision("fp32", ALONE.device))
        os.write(writing, b"%d\n" % checkpoint.progress.iteration)
        while True:
            checkpoint.progress.step_done()
            state.fill(checkpoint.progress.iteration)
            checkpoint.save()
            os.write(writing, b"%d\n" % checkpoint.progress.iteration)


def judge(folder: Path, known: int) -> tuple[str | None, int | None]:
    """What is wrong with the state that a new start finds, and its iteration; ``known``: of the last save."""
    state = State()
    try:
        with runtime.run_folder(folder, ALONE):
            if list(folder.glob(".*.partial")):
                return "a partial file stays", None
            checkpoint = Checkpoint(folder, ARGS, {"processes": 1}, ALONE)
            if checkpoint.source is None:
                return ("nothing is found" if known >= 0 else None), None
            found = checkpoint.restore({"state": state}, runtime.Precision("fp32", ALONE.device)).iteration
    except UserError as error:
        return str(error), None
    expected = State()
    expected.fill(found)
    if not all(torch.equal(expected.tensors[name], tensor) for name, tensor in state.tensors.items()):
        return "it is not whole", found
    if not known <= found <= known + 1:
        return f"{known} was saved", found
    return None, found


def kill_searches(folder: Path, kills: int, rng: random.Random, tell) -> str | None:
    """Part B; returns what differs."""
    root = write_phantom(folder / "Task00_Phantom", 9, 1, shape=(24, 24, 24))
    script = str(Path(__file__).resolve().parents[1] / "search_dints.py")
    straight, killed = folder / "straight", folder / "killed"
    command = [sys.executable, script, "--root", str(root), *SEARCH.split(), "--output_root"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment}
    start = time.monotonic()
    subprocess.run([*command, str(straight)], **streams, check=True)
    seconds = time.monotonic() - start
    tell(f"the undisturbed search took {seconds:.1f} s")
    done = 0
    while True:
        process = subprocess.Popen([*command, str(killed)], **streams, start_new_session=True)
        try:
            _, said = process.communicate(timeout=rng.uniform(0, 0.8 * seconds) if done < kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            done += 1
            tell(f"search kill {done}: {where(killed)}")
            continue
        if process.returncode:
            return said.splitlines()[-1]
        tell(f"the search ended after {done} kills")
        fault = difference(straight, killed)
        if fault or done == kills:
            return fault
        shutil.rmtree(killed)  # it ended too soon: once more from the beginning


def where(folder: Path) -> str:
    """How far a killed run had come."""
    if not (folder / "latest.pth").exists() and not (folder / "previous.pth").exists():
        return "before the first save"
    progress = progress_of(folder, "latest.pth" if (folder / "latest.pth").exists() else "previous.pth")
    return f"saved at iteration {progress['iteration']}, step {progress['step']} of epoch {progress['epoch'] + 1}"


def difference(straight: Path, killed: Path) -> str | None:
    """The first thing in which two runs end otherwise."""
    try:
        names = sorted(path.name for path in straight.glob("*.pth") if path.name != "previous.pth")
        for name in names:
            assert_equal(*(without_times(torch.load(p / name, weights_only=True)) for p in (straight, killed)), name)
        for name in ("loss_history.csv", "accuracy_history.csv"):
            assert without_times(rows(straight / name)) == without_times(rows(killed / name)), name
        assert scalars(straight) == scalars(killed), "TensorBoard"
    except (AssertionError, FileNotFoundError) as error:
        return f"differs: {error}"
    return None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of saves")
    parser.add_argument("--search_kills", type=int, default=10, help="of the search")
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    parser.add_argument("--output", type=Path, help="write what is told into this file too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_args()))
