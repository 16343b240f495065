"""Kills runs at random times, many times over, and looks at what is left: not part of the tests, for it takes minutes.

    OMP_NUM_THREADS=1 python tests/soak.py --kills 50 --seed 0 --output soak.log

Part A kills a process that does nothing but save a state of some 20 MB: the newest good state must be whole and at most
one save old. Part B kills a small search, all its processes, and starts it again until it ends. Part C kills one of two
ranks under search_dints.sh, which starts both again; part D does so on two nodes that are network namespaces (for root,
where there is `ip`). Each search must end as an undisturbed one. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

import torch  # noqa: E402  the checkout comes first on the path
from dints.checkpoint import Checkpoint  # noqa: E402
from dints.phantom import write_phantom  # noqa: E402
from test_distributed import assert_equal  # noqa: E402
from test_resume import progress_of, rows, scalars, without_times  # noqa: E402

from dints import runtime  # noqa: E402
from dints.errors import UserError  # noqa: E402

LAUNCHER = ("bash", str(CHECKOUT / "search_dints.sh"))
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
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # of steps that a run has done again
    with tempfile.TemporaryDirectory() as folder, open(args.output or os.devnull, "w") as log:

        def tell(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        start, rng = time.monotonic(), random.Random(args.seed)
        saves = kill_saves(Path(folder) / "saves", args.kills, rng, tell)
        tell(f"{saves} of {args.kills} killed saves left a wrong state")
        search = Search(
            Path(folder), write_phantom(Path(folder) / "Task00_Phantom", 9, 1, shape=(24, 24, 24)), rng, tell
        )
        wrong = saves + search.kill_all(args.search_kills) + search.kill_ranks(args.rank_kills)
        wrong += search.kill_nodes(args.node_kills)
        tell(f"{wrong} wrong ends; {time.monotonic() - start:.0f} s in all")
        return 1 if wrong else 0


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


@dataclass
class Search:
    """A search of some seconds, which is killed."""

    folder: Path
    root: Path
    rng: random.Random
    tell: Callable[[str], None]

    def started(self, output: Path, *launcher: str, **more: str) -> subprocess.Popen:
        """search_dints.py, or search_dints.sh if the ``launcher`` ends with its name."""
        script = [] if launcher else [sys.executable, str(CHECKOUT / "search_dints.py")]
        flags = [] if launcher else ["--root", self.root, "--output_root", output]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "TASK": "Task00_Phantom"}
        environment |= {"DATA_ROOT": str(self.root), "OUTPUT_ROOT": str(output), "FOLD": "0", **more}
        with output.with_name(f"{output.name}.said").open("a") as said:
            return subprocess.Popen(
                [*launcher, *script, *map(str, flags), *SEARCH.split()],
                env=environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def undisturbed(self, output: Path, *launcher: str, **more: str) -> float:
        """Run it to its end; returns the seconds that it took."""
        start = time.monotonic()
        assert self.started(output, *launcher, **more).wait() == 0, self.said(output)
        seconds = time.monotonic() - start
        self.tell(f"the undisturbed search took {seconds:.1f} s ({output.name})")
        return seconds

    def said(self, output: Path) -> str:
        return output.with_name(f"{output.name}.said").read_text()

    def kill_all(self, kills: int) -> int:
        """Part B; returns the number of wrong ends."""
        if kills == 0:
            return 0
        straight, killed = self.folder / "straight", self.folder / "killed"
        seconds = self.undisturbed(straight)
        done = wrong = 0
        while True:
            process = self.started(killed)
            try:
                code = process.wait(self.rng.uniform(0, 0.8 * seconds) if done < kills else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                done += 1
                self.tell(f"search kill {done}: {where(killed)}")
                continue
            wrong += self.judge(f"after {done} kills", straight, killed, [code])
            if done == kills:
                return wrong
            shutil.rmtree(killed)  # it ended too soon: once more from the beginning

    @cached_property
    def two_ranks(self) -> tuple[Path, float]:
        """An undisturbed search of two ranks, and its seconds."""
        output = self.folder / "two ranks"
        return output, self.undisturbed(output, *LAUNCHER, NUM_GPUS_PER_NODE="2")

    def kill_ranks(self, kills: int) -> int:
        """Part C; returns the number of wrong ends."""
        wrong = 0
        for number in range(1, kills + 1):
            straight, seconds = self.two_ranks
            output = self.folder / f"rank kill {number}"
            process = self.started(output, *LAUNCHER, NUM_GPUS_PER_NODE="2")
            place = self.kill_one([process], seconds, output)
            wrong += self.judge(f"rank kill {number}: {place}", straight, output, [process.wait()])
        return wrong

    def kill_nodes(self, kills: int) -> int:
        """Part D; returns the number of wrong ends."""
        if kills == 0:
            return 0
        if os.geteuid() or not shutil.which("ip"):
            self.tell("no namespaces: they need root and `ip`")
            return 0
        (straight, seconds), wrong = self.two_ranks, 0
        with namespaces() as nodes:
            for number in range(1, kills + 1):
                output = self.folder / f"node kill {number}"
                processes = []
                for rank, (name, interface, address) in enumerate(nodes):
                    more = {"NUM_NODES": "2", "NODE_RANK": str(rank), "NUM_GPUS_PER_NODE": "1"}
                    more |= {"NODE_ADDR": address, "MASTER_ADDR": nodes[0][2], "GLOO_SOCKET_IFNAME": interface}
                    processes.append(self.started(output, "ip", "netns", "exec", name, *LAUNCHER, **more))
                place = self.kill_one(processes, seconds, output)
                codes = [process.wait() for process in processes]
                wrong += self.judge(f"node kill {number}: {place}", straight, output, codes)
        return wrong

    def kill_one(self, agents: list[subprocess.Popen], seconds: float, output: Path) -> str:
        """Kill one process of a run at a random moment, mostly after its first save; returns where that was."""
        early = self.rng.random() < 0.2
        while not early and not (output / "latest.pth").exists() and all(agent.poll() is None for agent in agents):
            time.sleep(0.05)
        time.sleep(self.rng.uniform(0, 0.5 * seconds))
        while not (workers := [pid for agent in agents for pid in children(agent.pid)]):
            if any(agent.poll() is not None for agent in agents):
                return "it had ended"
            time.sleep(0.01)
        victim = self.rng.randrange(len(workers))
        place = where(output)
        os.kill(workers[victim], signal.SIGKILL)
        return f"process {victim + 1} of {len(workers)}, {place}"

    def judge(self, what: str, straight: Path, output: Path, codes: list[int]) -> int:
        fault = difference(straight, output) if not any(codes) else f"exit codes {codes}: {self.said(output)[-2000:]}"
        self.tell(f"{what}: {fault or 'it ended as the undisturbed one'}")
        return int(fault is not None)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def namespaces() -> Iterator[list[tuple[str, str, str]]]:
    """Two nodes with a network between them, and none with anything else: name, interface and address of each."""
    nodes = [(f"dints{rank}", f"veth{rank}", f"10.77.0.{rank + 1}") for rank in (0, 1)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    try:
        for name, _, _ in nodes:
            ip("netns", "add", name)
        ip("link", "add", nodes[0][1], "type", "veth", "peer", "name", nodes[1][1])
        for name, interface, address in nodes:
            ip("link", "set", interface, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for name, _, _ in nodes:
            subprocess.run(["ip", "netns", "del", name], check=False)


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
    parser.add_argument("--search_kills", type=int, default=10, help="of the search, all its processes")
    parser.add_argument("--rank_kills", type=int, default=20, help="of one of two ranks")
    parser.add_argument("--node_kills", type=int, default=3, help="of one of two nodes' processes")
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    parser.add_argument("--output", type=Path, help="write what is told into this file too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_args()))
