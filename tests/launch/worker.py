"""Stand in for a stage: count in FOLDER/saved, in step with the other ranks, or resume there.

A signal stops it as it stops a stage: on all ranks after the same step, with code 128 + signal.
With --deaf it ignores signals. With --alone it neither meets other ranks nor imports torch, which
is most of a short run's time. --fail CODE: rank 0 exits with it after ten steps, at every start.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dints import launcher


def meet_others() -> tuple[Callable[[int], int], Callable[[], None]]:
    """Return how the ranks agree on the largest of their numbers, and how one leaves."""
    import torch
    import torch.distributed as dist

    def agree(number: int) -> int:
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    dist.init_process_group("gloo")
    return agree, dist.destroy_process_group


def main(args: argparse.Namespace) -> int:
    launcher.stop_with_launcher()
    received = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        handler = signal.SIG_IGN if args.deaf else lambda number, _: received.append(number)
        signal.signal(number, handler)
    rank, saved = launcher.rank(), args.folder / "saved"
    start = int(saved.read_text()) if saved.exists() else 0
    agree, leave = (int, lambda: None) if args.alone else meet_others()
    (args.folder / f"rank{rank}").write_text(str(os.getpid()))
    with (args.folder / "starts").open("a") as file:
        file.write(f"{start} {launcher.launches()[0]}\n")
    for step in range(start, args.steps):
        if stop := agree(received[0] if received else 0):
            leave()
            return 128 + stop
        if rank == 0 and args.fail and step >= 10:
            return args.fail
        time.sleep(0.02)
        if rank == 0:
            (args.folder / "partial").write_text(str(step + 1))
            (args.folder / "partial").replace(saved)
    leave()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9999)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--deaf", action="store_true")
    parser.add_argument("--fail", type=int)
    sys.exit(main(parser.parse_args()))
