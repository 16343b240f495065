"""Runs a stage under torchrun, and has every rank write its own state beside latest.pth: rank<r>.pth.

torchrun --nproc_per_node=2 tests/ranks.py search_dints --root ... --output_root ...
"""

import importlib
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402  the checkout comes first on the path

from dints import runtime  # noqa: E402


def main(stage_name: str, arguments: list[str]) -> None:
    stage = importlib.import_module(stage_name)
    save = runtime.Checkpoint.save

    def save_on_every_rank(self, parts, progress, precision):
        states = {name: part.state_dict() for name, part in parts.items()}
        seconds = {"seconds": 0.0, "seconds_per_iteration": 0.0}
        torch.save(
            {"parts": states, "progress": {**asdict(progress), **seconds}},
            self.path.with_name(f"rank{self.processes.rank}.pth"),
        )
        save(self, parts, progress, precision)

    runtime.Checkpoint.save = save_on_every_rank
    stage.main(stage.parse_args(arguments))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
