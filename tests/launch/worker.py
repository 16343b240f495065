"""Stands in for a stage under the launchers: all-reduces in a loop, counts in FOLDER/saved, and continues from there.

Told to by a signal it stops as a stage does, on all ranks after the same step, with exit code 128 + signal; with --deaf
it does not. --fail CODE: rank 0 leaves with it, once (again and again with --always) after ten steps.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def main(args: argparse.Namespace) -> int:
    received = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN if args.deaf else lambda number, _: received.append(number))
    dist.init_process_group("gloo")
    rank, saved, failed = dist.get_rank(), args.folder / "saved", args.folder / "failed"
    start = int(saved.read_text()) if saved.exists() else 0
    dist.barrier()
    (args.folder / f"rank{rank}").write_text(str(os.getpid()))
    with (args.folder / "starts").open("a") as starts:
        starts.write(f"{rank} {start} {' '.join(args.rest)}\n")
    for step in range(start, args.steps):
        stop = torch.tensor(received[0] if received else 0)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        if stop:
            dist.destroy_process_group()
            time.sleep(0.5 * rank)  # not all end at once
            return 128 + int(stop)
        if rank == 0 and args.fail and step >= 10 and (args.always or not failed.exists()):
            failed.touch()
            dist.destroy_process_group()  # its threads would abort Python's end at times, and the code with it
            return args.fail
        time.sleep(0.02)
        if rank == 0:
            (args.folder / "partial").write_text(str(step + 1))
            (args.folder / "partial").replace(saved)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--deaf", action="store_true")
    parser.add_argument("--fail", type=int)
    parser.add_argument("--always", action="store_true")
    parser.add_argument("rest", nargs="*")
    sys.exit(main(parser.parse_args()))
