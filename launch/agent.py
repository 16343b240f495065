"""Run a stage as torchrun does, but pass signals on to it, and start again only what that may mend.

    python -P launch/agent.py --standalone --nproc_per_node=2 --max_restarts=3 search_dints.py --root ...

Arguments are torchrun's, and so is all else but this. Torchrun dies of a SIGUSR1 and leaves its workers running. After
SIGTERM it exits with 1 whatever they do, and waits for them longer than a preempted job has. It starts workers again
that left because they were stopped elsewhere, or because their input is bad. Here

- SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 go to the workers of this node, SIGHUP as SIGTERM; SIGQUIT ends all at once;
- what has not ended SECONDS_TO_SAVE (20, or that variable) after the first of them is killed;
- the exit code is the workers': 128 + signal for a run that was stopped, on every node, also where no signal came;
- a worker is not restarted that left with such a code, with 2 (bad arguments), or with a message for torchrun (an error
  file).

Torchrun has no hooks for this, so `Agent` overrides private methods; each says what it relies on in PyTorch 2.11 to
2.13.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time

if not hasattr(os, "killpg"):  # Windows
    sys.exit("error: launch/agent.py needs Linux or macOS: run the script itself with python, which is one process")

try:
    from torch.distributed import run as torchrun
except ModuleNotFoundError as missing:
    sys.exit(f"error: {sys.executable} has no module {missing.name}: run install.sh, or name another one with PYTHON")
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api as launcher

SECONDS_TO_SAVE, SECONDS_TO_END = float(os.environ.get("SECONDS_TO_SAVE", 20)), 2
PASSED_ON = {number: number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
PASSED_ON[signal.SIGHUP] = signal.SIGTERM


class Workers:
    """The workers of this node get the signals that the agent gets, from a thread.

    The main thread may be waiting for another node, deep in C++, where it handles none.
    """

    def __init__(self):
        self.processes: list[subprocess.Popen] = []  # empty until the nodes have met
        self.starting = threading.Lock()
        self.stop_code = 0  # 128 + the first signal

    def listen(self) -> None:
        """Begin to pass signals on."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._pass_all_on, args=(reader,), daemon=True).start()

    def _pass_all_on(self, reader: int) -> None:
        while True:
            (number,) = os.read(reader, 1)
            if number in PASSED_ON:
                self._pass_on(PASSED_ON[number])

    def _pass_on(self, number: int) -> None:
        first, self.stop_code = not self.stop_code, self.stop_code or 128 + number
        with self.starting:
            running = self._running()
        if first and not running:  # they have not begun, or all have ended
            os._exit(self.stop_code)
        if first:
            logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # all is as it should be
            limit = threading.Timer(SECONDS_TO_SAVE, self._kill)
            limit.daemon = True
            limit.start()
        for process in running:
            process.send_signal(number)

    def _kill(self) -> None:
        for process in self._running():
            print(f"process {process.pid} has not ended in {SECONDS_TO_SAVE:g} s: killed", file=sys.stderr, flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # torchrun starts each in a session of its own
        time.sleep(SECONDS_TO_END)
        os._exit(self.stop_code)  # whatever the main thread waits for

    def _running(self) -> list[subprocess.Popen]:
        return [process for process in self.processes if process.poll() is None]


workers = Workers()


class Agent(LocalElasticAgent):
    """Torchrun's agent does the work; this one steps in where workers are started or have failed."""

    def _start_workers(self, worker_group) -> dict[int, int]:
        # Called whenever the nodes have met; leaves a Popen for each new worker in _pcontext.
        with workers.starting:
            if workers.stop_code:
                sys.exit(workers.stop_code)
            pids = super()._start_workers(worker_group)
            workers.processes = [handler.proc for handler in self._pcontext.subprocess_handlers.values()]
        return pids

    def _restart_workers(self, worker_group) -> None:
        # Called after a failure while _remaining_restarts lasts, and where a node has come back; the nodes then meet.
        print("starting the processes of this node again", file=sys.stderr, flush=True)
        super()._restart_workers(worker_group)

    def _monitor_workers(self, worker_group) -> RunResult:
        # Called ten times a second. After a failure it returns FAILED, with all exit codes, once no worker is left;
        # torchrun then ends the run if _remaining_restarts is 0.
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and (workers.stop_code or any(map(is_final, result.failures.values()))):
            self._remaining_restarts = 0
            if worker_group.group_world_size > 1 and stop_code(result.failures):
                # Torchrun waits for the other nodes only where all is well. But node 0 holds the rendezvous: without it
                # the others would stop their workers before they have saved.
                self._exit_barrier_timeout = SECONDS_TO_SAVE
                self._exit_barrier()
        return result


def is_final(failure: ProcessFailure) -> bool:
    """Tell whether a worker that left like this would do the same again, or was asked to leave."""
    return failure.exitcode == 2 or failure.exitcode > 128 or os.path.exists(failure.error_file)


def stop_code(failures: dict[int, ProcessFailure]) -> int:
    """Return 128 + signal if the run was stopped, else 0."""
    codes = [failure.exitcode for failure in failures.values()]
    if any(0 < code < 128 for code in codes):  # one could not save
        return 0
    return max((code for code in codes if code > 128), default=workers.stop_code)


def failure_code(failures: dict[int, ProcessFailure]) -> int:
    """Say which ranks failed, and return the exit code of the first."""
    ends = (f"rank {rank} with {failure.exitcode}" for rank, failure in sorted(failures.items()))
    print(f"processes of this node ended: {', '.join(ends)}", file=sys.stderr, flush=True)
    code = min(failures.values(), key=lambda failure: failure.timestamp).exitcode
    return code if code > 0 else 128 - code  # as a shell has it, where a signal killed it


def describe(error: RendezvousError, args: argparse.Namespace) -> str:
    """Say which nodes miss each other, and the remedy."""
    if isinstance(error, RendezvousClosedError):
        return "another node has ended the run, and its messages say why"
    reason = " ".join(str(error.__cause__ or error).splitlines()[:1])
    if workers.processes:
        return f"node 0 ({args.rdzv_endpoint}) does not answer any more ({reason}): its messages say why"
    return (
        f"nodes do not meet at {args.rdzv_endpoint} ({reason}): MASTER_ADDR must be the address of node 0, with a free "
        f"MASTER_PORT, and {args.nnodes} nodes must start within minutes of each other"
    )


def main() -> int:
    """Run the stage as torchrun would, and return the exit code."""
    for name in os.environ.pop("AGENT_ONLY", "").split():  # from launch.sh
        del os.environ[name]
    launcher.LocalElasticAgent = Agent  # torchrun's launch_agent looks it up there
    args = torchrun.parse_args(None)
    args.signals_to_handle = "SIGQUIT"  # it would take over the others when workers start
    workers.listen()
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        return stop_code(error.failures) or failure_code(error.failures)
    except RendezvousError as error:
        print(f"error: {describe(error, args)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
