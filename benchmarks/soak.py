"""Kills runs at random times, many times over, and looks at what is left: not part of the tests,
for it takes minutes.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --kills 50 --seed 0 --output soak.log

Part A kills a process that does nothing but save a state of some 20 MB: the newest good state must
be whole and at most one save old. Part B kills a small search, all its processes, and starts it
again until it ends. Part C kills one of two ranks under search_dints.sh, which starts both again;
part D does so on two nodes that are network namespaces (for root, where there is `ip`). Each must
end as an undisturbed one. The exit code is 1 if anything
differs.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

import torch  # noqa: E402  the checkout comes first on the path
from states import assert_same_end, progress_of  # noqa: E402

from dints.data.phantom import write_phantom  # noqa: E402
from dints.errors import UserError  # noqa: E402
from dints.running import run_folder  # noqa: E402
from dints.running.checkpoint import Checkpoint, find_state  # noqa: E402
from dints.running.precision import Precision  # noqa: E402
from dints.running.processes import Processes  # noqa: E402

LAUNCHER = ("bash", str(CHECKOUT / "search_dints.sh"))
FP32, ALONE = Precision("fp32", torch.device("cpu")), Processes(0, 1, torch.device("cpu"))
SETTINGS = {"processes": 1}
SEARCH = (
    "--patch_size 16 16 16 --spacing 5 5 5 --num_folds 3 --overlap_ratio 0 --device cpu "
    "--precision fp32"
)
SEARCH += (
    " --channel_mul 0.125 --num_blocks 2 --num_depths 3 --learning_rate_arch 0.1 --num_workers 1"
)
SEARCH += (
    " --num_epochs 24 --num_epochs_warmup 8 --num_epochs_per_validation 6 --save_minutes 0.002"
)


def main(args: argparse.Namespace) -> int:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # of steps that a run has done again
    with tempfile.TemporaryDirectory() as folder, open(args.output or os.devnull, "w") as log:

        def tell(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        start, rng = time.monotonic(), random.Random(args.seed)
        wrong = kill_saves(Path(folder) / "saves", args.kills, rng, tell)
        tell(f"{wrong} of {args.kills} killed saves left a wrong state")
        root = write_phantom(Path(folder) / "Task00_Phantom", 9, 1, shape=(24, 24, 24))
        search = Search(Path(folder), root, rng, tell)
        wrong += search.kill_all(args.search_kills) + search.kill_one_of_two(args.rank_kills)
        if args.node_kills and (os.geteuid() or not shutil.which("ip")):
            tell("no namespaces: they need root and `ip`")
        elif args.node_kills:
            with namespaces() as nodes:
                wrong += search.kill_one_of_two(args.node_kills, nodes)
        tell(f"{wrong} wrong ends; {time.monotonic() - start:.0f} s in all")
        return 1 if wrong else 0


def kill_saves(folder: Path, kills: int, rng: random.Random, tell: Callable[[str], None]) -> int:
    """Kill saves (part A); return the number of wrong states."""
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
        with os.fdopen(reading) as output:
            lines = output.read().split("\n")[:-1]
        partial = len(list(folder.glob(".*.partial")))
        in_save += partial
        known = int(lines[-1]) if lines else known
        fault, found = judge(folder, known)
        known = known if found is None else found
        wrong += fault is not None
        tell(
            f"save kill {number}: {len(lines)} saves, {partial} half written, found {found}: "
            f"{fault or 'good'}"
        )
    tell(f"{in_save} of {kills} kills came in the middle of a save")
    return wrong


def state_of(folder: Path) -> tuple[torch.nn.Module, Checkpoint]:
    """Make some 20 MB of weights, which are all to have the value of the iteration, and their
    checkpoint.
    """
    weights = torch.nn.ModuleList(torch.nn.Linear(512, 256) for _ in range(40))
    return weights, Checkpoint(folder, SETTINGS, {"state": weights}, FP32, ALONE)


def save_for_ever(folder: Path, writing: int) -> None:
    with run_folder.opened(folder, ALONE), torch.no_grad():
        weights, checkpoint = state_of(folder)
        for weight in weights.parameters():
            weight.zero_()
        progress = checkpoint.restore(find_state(folder, SETTINGS))
        os.write(writing, b"%d\n" % progress.iteration)
        while True:
            progress.step_done()
            for weight in weights.parameters():
                weight.fill_(progress.iteration)
            checkpoint.save()
            os.write(writing, b"%d\n" % progress.iteration)


def judge(folder: Path, known: int) -> tuple[str | None, int | None]:
    """Return what is wrong with the state that a new start finds, and its iteration; ``known``: of
    the last save.
    """
    try:
        with run_folder.opened(folder, ALONE):
            if list(folder.glob(".*.partial")):
                return "a partial file stays", None
            state = find_state(folder, SETTINGS)
            if state is None:
                return ("nothing is found" if known >= 0 else None), None
            weights, checkpoint = state_of(folder)
            found = checkpoint.restore(state).iteration
    except UserError as error:
        return str(error), None
    if not all(bool((weight == found).all()) for weight in weights.parameters()):
        return "it is not whole", found
    return (None if known <= found <= known + 1 else f"{known} was saved"), found


@dataclass
class Search:
    """Kills a search of some seconds."""

    folder: Path
    root: Path
    rng: random.Random
    tell: Callable[[str], None]

    def started(self, output: Path, *launcher: str, **more: object) -> subprocess.Popen:
        """Start search_dints.py, or search_dints.sh if the ``launcher`` ends with its name."""
        script = [sys.executable, CHECKOUT / "search_dints.py"]
        script += ["--root", self.root, "--output_root", output]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        environment["TASK"] = "Task00_Phantom"
        environment |= {"DATA_ROOT": str(self.root), "OUTPUT_ROOT": str(output), "FOLD": "0"}
        environment |= {name: str(value) for name, value in more.items()}
        with output.with_name(f"{output.name}.said").open("a") as said:
            streams = {"stdout": said, "stderr": said, "start_new_session": True}
            return subprocess.Popen(
                [*(launcher or script), *SEARCH.split()], env=environment, **streams
            )

    def undisturbed(self, name: str, *launcher: str, **more: object) -> tuple[Path, float]:
        """Run it to its end; return its folder and the seconds that it took."""
        output, start = self.folder / name, time.monotonic()
        assert self.started(output, *launcher, **more).wait() == 0, self.said(output)
        seconds = time.monotonic() - start
        self.tell(f"the undisturbed search took {seconds:.1f} s ({name})")
        return output, seconds

    @cached_property
    def two_ranks(self) -> tuple[Path, float]:
        return self.undisturbed("two ranks", *LAUNCHER, NUM_GPUS_PER_NODE=2)

    def said(self, output: Path) -> str:
        return output.with_name(f"{output.name}.said").read_text()

    def kill_all(self, kills: int) -> int:
        """Kill all processes of a search (part B); return the number of wrong ends."""
        if kills == 0:
            return 0
        straight, seconds = self.undisturbed("straight")
        killed, done, wrong = self.folder / "killed", 0, 0
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

    def kill_one_of_two(self, kills: int, nodes: Sequence[tuple[str, str, str]] = ()) -> int:
        """Kill one of two ranks (part C), or of two nodes (part D); return the number of wrong
        ends.
        """
        wrong = 0
        for number in range(1, kills + 1):
            straight, seconds = self.two_ranks
            what = f"{'node' if nodes else 'rank'} kill {number}"
            output, agents = self.folder / what, []
            for rank, (name, interface, address) in enumerate(nodes):
                more = {"NUM_NODES": 2, "NODE_RANK": rank, "NUM_GPUS_PER_NODE": 1}
                more |= {"MASTER_ADDR": nodes[0][2], "NODE_ADDR": address}
                more["GLOO_SOCKET_IFNAME"] = interface
                agents.append(self.started(output, "ip", "netns", "exec", name, *LAUNCHER, **more))
            agents = agents or [self.started(output, *LAUNCHER, NUM_GPUS_PER_NODE=2)]
            place = self.kill_one(agents, seconds, output)
            wrong += self.judge(
                f"{what}: {place}", straight, output, [agent.wait() for agent in agents]
            )
        return wrong

    def kill_one(self, agents: list[subprocess.Popen], seconds: float, output: Path) -> str:
        """Kill one process of a run at a random moment, mostly after its first save; return where
        that was.
        """
        early = self.rng.random() < 0.2
        while (
            not early
            and not (output / "latest.pth").exists()
            and all(agent.poll() is None for agent in agents)
        ):
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
        """Tell how a run ended; return 1 if it did not end as it should, else 0."""
        try:
            assert not any(codes), f"exit codes {codes}: {self.said(output)[-2000:]}"
            assert_same_end(straight, output)
        except (AssertionError, FileNotFoundError) as error:
            self.tell(f"{what}: {error}")
            return 1
        self.tell(f"{what}: it ended as the undisturbed one")
        return 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def namespaces() -> Iterator[list[tuple[str, str, str]]]:
    """Make two nodes with a network between them, and none with anything else; give name, interface
    and address.
    """
    nodes = [(f"dints{rank}", f"veth{rank}", f"10.77.0.{rank + 1}") for rank in (0, 1)]

    def ip(line: str) -> None:
        subprocess.run(["ip", *line.split()], check=True)

    try:
        for name, _, _ in nodes:
            ip(f"netns add {name}")
        ip(f"link add {nodes[0][1]} type veth peer name {nodes[1][1]}")
        for name, interface, address in nodes:
            ip(f"link set {interface} netns {name}")
            ip(f"-n {name} addr add {address}/24 dev {interface}")
            ip(f"-n {name} link set {interface} up")
            ip(f"-n {name} link set lo up")
        yield nodes
    finally:
        for name, _, _ in nodes:
            subprocess.run(["ip", "netns", "del", name], check=False)


def where(folder: Path) -> str:
    """Tell how far a killed run had come."""
    for name in ("latest.pth", "previous.pth"):
        if (folder / name).exists():
            progress = progress_of(folder, name)
            return (
                f"saved at iteration {progress['iteration']}, step {progress['step']} of epoch "
                f"{progress['epoch'] + 1}"
            )
    return "before the first save"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kills", type=int, default=50, help="of saves")
    add("--search_kills", type=int, default=10, help="of the search, all its processes")
    add("--rank_kills", type=int, default=20, help="of one of two ranks")
    add("--node_kills", type=int, default=3, help="of one of two nodes' processes")
    add("--seed", type=int, default=0, help="of the times")
    add("--output", type=Path, help="write the output into this file too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_args()))
