"""Makes runs for tests: of one process, on the CPU, with nothing in their folder but their
state.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dints.running.processes import Processes
from dints.running.run import Run
from dints.settings import MachineSettings, RunSettings

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


def begun(
    folder: Path = Path("nowhere"),
    precision: str = "fp32",
    processes: Processes = ALONE,
    machine: MachineSettings | None = None,
    **settings: object,
) -> Run:
    """Begin a run of the configuration {}; until it is restored or saved, it writes nothing.

    Args:
        machine: in place of one of this precision.
        settings: of `RunSettings`.
    """
    machine = machine or MachineSettings(precision=precision)
    run = Run(folder, processes, RunSettings(output_root=folder, **settings), machine)
    run.begin({})
    return run
