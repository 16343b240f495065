"""Small runs of the stages that train, with and without a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from architectures import chain

from dints.data.phantom import write_phantom
from dints.network.architecture import save_architecture

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Of 13 cases 3 validate and 10 train, in the search 5 and 5: uneven among two ranks, or batches.
COMMON = "--patch_size 16 16 16 --spacing 5 5 5 --num_folds 4 --overlap_ratio 0"
COMMON += " --device cpu --precision fp32"
LENGTH = "--channel_mul 0.125 --num_epochs 4 --num_epochs_per_validation 2"
SPACE = "--num_blocks 1 --num_depths 2"
OF_STAGES = {
    "search": f"{LENGTH} {SPACE} --num_epochs_warmup 1 --learning_rate_arch 0.1",
    "train": f"{LENGTH} --arch_ckpt {{arch}} --average_decay 0.9",
    # Five trainings of 6 iterations, and two of 12.
    "evolve": f"{SPACE} --recipe published --candidates 5 --memory_mib 1 --num_iterations 24",
}
EPOCH = {1: 5, 2: 3}  # steps of an epoch on one and two processes, of search and training


def strike(place: str, iteration: int, name: str = "KILL", to: int | str = "all") -> dict:
    """Describe a fault for interrupted.py."""
    return {"place": place, "iteration": iteration, "signal": name, "to": to}


class Theatre:
    """Holds data, an architecture, runs that nothing stopped, and the process interrupted.py."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = write_phantom(folder / "Task00_Phantom", 13, 1, shape=(24, 24, 24))
        save_architecture(self.root / "arch.pth", chain(0, 1, 0, num_depths=2))
        command = [sys.executable, str(Path(__file__).with_name("interrupted.py"))]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(command, **streams, env=ENVIRONMENT)

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()

    def straight(self, stage: str, processes: int) -> Path:
        """Return the folder of the run that nothing stopped."""
        folder = self.folder / f"{stage}{processes}"
        if not folder.exists():
            self.finish(stage, folder, processes)
        return folder

    def flags(self, stage: str, folder: Path, *more: object) -> list[str]:
        own = OF_STAGES[stage].format(arch=self.root / "arch.pth")
        flags = ["--root", self.root, "--output_root", folder, *COMMON.split(), *own.split()]
        return [str(flag) for flag in (*flags, *more)]

    def run(self, stage: str, folder: Path, processes: int, *more: object, fault=None) -> dict:
        """Run a command of a training stage; return the answer of interrupted.py."""
        workers = () if "--num_workers" in more else ("--num_workers", 0)
        flags = self.flags(stage, folder, *workers, *more)
        return self.command(stage, processes, *flags, fault=fault)

    def command(self, stage: str, processes: int, *flags: object, fault=None) -> dict:
        request = {"stage": f"{stage}_dints", "flags": [*map(str, flags)]}
        request |= {"world_size": processes, "fault": fault}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        done = json.loads(self.server.stdout.readline())
        assert not done["survivors"], "a worker outlives its run"
        return done

    def finish(self, stage: str, folder: Path, processes: int, *more: object) -> str:
        """Run the command to its end; return what rank 0 said."""
        done = self.run(stage, folder, processes, *more)
        assert done["codes"] == [0] * processes, "\n".join(done["said"])
        return done["said"][0]
