"""torchrun that can be stopped: it passes signals on to the stage, and restarts only what a restart may mend.

    python -P launch/agent.py --standalone --nproc_per_node=2 --max_restarts=3 search_dints.py --root ...

Arguments are torchrun's, and so is all else but this. Torchrun dies of a SIGUSR1 and leaves its workers running; after
SIGTERM it exits with 1 whatever they do, and waits for them longer than a preempted job has; and a worker that leaves
since it was stopped elsewhere, or since its input is bad, it starts again. Here

- SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 go to the workers of this node, SIGHUP as SIGTERM; SIGQUIT ends all at once;
- what has not ended SECONDS_TO_SAVE (20, or that variable) after the first of them is killed;
- the exit code is the workers': 128 + signal for a run that was stopped, on every node, also where no signal came;
- a worker is not restarted that left with such a code, with 2 (bad arguments), or with a message for torchrun (an error
  file).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time

# Read when PyTorch is imported: no C++ stack traces of nodes that do not answer, here; the stages keep theirs.
LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
was_given = LOG_LEVEL in os.environ
os.environ.setdefault(LOG_LEVEL, "ERROR")

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api as launcher

if not was_given:
    del os.environ[LOG_LEVEL]

SECONDS_TO_SAVE, SECONDS_TO_END = float(os.environ.get("SECONDS_TO_SAVE", 20)), 2
PASSED_ON = {number: number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
PASSED_ON[signal.SIGHUP] = signal.SIGTERM


class Agent(LocalElasticAgent):
    """The processes of this node.

    Signals are handled in a thread: the main thread may be waiting for another node, deep in C++.
    """

    received = 0  # the first signal
    has_begun = False  # the nodes have met, and this one has started its workers

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Agent.received, Agent.has_begun = 0, False
        self._starting = threading.Lock()
        self._signals, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno())
        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            (number,) = self._signals.recv(1)
            if number in PASSED_ON:
                self._pass_on(PASSED_ON[number])

    def _pass_on(self, number: int) -> None:
        first = not Agent.received
        if first:
            Agent.received = number
            logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # all is as it should be
            limit = threading.Timer(SECONDS_TO_SAVE, self._end)
            limit.daemon = True
            limit.start()
        with self._starting:
            workers = self._running()
        if first and not workers:  # they have not begun, or all have ended
            os._exit(128 + number)
        for pid in workers:
            os.kill(pid, number)

    def _end(self) -> None:
        """What is left is killed; whatever the main thread waits for."""
        for pid in self._running():
            print(f"process {pid} has not ended in {SECONDS_TO_SAVE:g} s: killed", file=sys.stderr, flush=True)
            os.killpg(pid, signal.SIGKILL)
        time.sleep(SECONDS_TO_END)
        os._exit(128 + Agent.received)

    def _running(self) -> list[int]:
        handlers = self._pcontext.subprocess_handlers.values() if self._pcontext else ()
        return [handler.proc.pid for handler in handlers if handler.proc.poll() is None]

    def _start_workers(self, worker_group) -> dict[int, int]:
        with self._starting:
            if Agent.received:
                sys.exit(128 + Agent.received)
            Agent.has_begun = True
            return super()._start_workers(worker_group)

    def _restart_workers(self, worker_group) -> None:
        print("starting the processes of this node again", file=sys.stderr, flush=True)
        super()._restart_workers(worker_group)

    def _monitor_workers(self, worker_group) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and (Agent.received or any(map(is_final, result.failures.values()))):
            self._remaining_restarts = 0
            if worker_group.group_world_size > 1 and stop_code(result.failures):
                # Node 0 holds the rendezvous: without it the others would stop their workers before they have saved.
                self._exit_barrier_timeout = SECONDS_TO_SAVE
                self._exit_barrier()
        return result


def is_final(failure: ProcessFailure) -> bool:
    """Whether a worker that left like this would do the same again, or was asked to leave."""
    return failure.exitcode == 2 or failure.exitcode > 128 or os.path.exists(failure.error_file)


def stop_code(failures: dict[int, ProcessFailure]) -> int:
    """128 + signal if the run was stopped, else 0."""
    codes = [failure.exitcode for failure in failures.values()]
    if any(0 < code < 128 for code in codes):  # one could not save
        return 0
    return max([code for code in codes if code > 128], default=128 + Agent.received if Agent.received else 0)


def describe(error: RendezvousError, args: argparse.Namespace) -> str:
    if isinstance(error, RendezvousClosedError):
        return "another node has ended the run, and its messages say why"
    reason = " ".join(str(error.__cause__ or error).splitlines()[:1])
    if Agent.has_begun:
        return f"node 0 ({args.rdzv_endpoint}) does not answer any more ({reason}): its messages say why"
    return (
        f"nodes do not meet at {args.rdzv_endpoint} ({reason}): MASTER_ADDR must be the address of node 0, with a free "
        f"MASTER_PORT, and {args.nnodes} nodes must start within minutes of each other"
    )


def main() -> int:
    """Returns the exit code."""
    launcher.LocalElasticAgent = Agent
    args = torchrun.parse_args(None)
    args.signals_to_handle = "SIGQUIT"
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        code = stop_code(error.failures)
        if not code:
            first = min(error.failures.values(), key=lambda failure: failure.timestamp)
            code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
            ends = (f"rank {rank} with {failure.exitcode}" for rank, failure in sorted(error.failures.items()))
            print(f"processes of this node ended: {', '.join(ends)}", file=sys.stderr, flush=True)
        return code
    except RendezvousError as error:
        print(f"error: {describe(error, args)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
