"""Runs a stage under torchrun, and has every rank write its own state beside latest.pth: rank<r>.pth.

torchrun --nproc_per_node=2 tests/ranks.py search_dints --root ... --output_root ...
"""

import importlib
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402  the checkout comes first on the path

from dints import checkpoint  # noqa: E402


def main(stage_name: str, arguments: list[str]) -> None:
    stage = importlib.import_module(stage_name)
    save = checkpoint.Checkpoint.save

    def save_on_every_rank(self):
        states = {name: part.state_dict() for name, part in self.parts.items()}
        seconds = {name: 0.0 for name in ("seconds", "seconds_per_iteration", "seconds_in_epoch")}
        torch.save(
            {"parts": states, "progress": {**asdict(self.progress), **seconds}},
            self.latest.with_name(f"rank{self.processes.rank}.pth"),
        )
        save(self)

    checkpoint.Checkpoint.save = save_on_every_rank
    stage.main(stage.parse_args(arguments))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
