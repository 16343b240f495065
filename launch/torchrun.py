"""Run a stage as torchrun does, with its processes' exit code and no tracebacks; for launch.sh.

    python -P launch/torchrun.py --standalone --nproc_per_node=2 search_dints.py --root ...

Arguments are torchrun's. It forwards SIGTERM, SIGINT, SIGQUIT, SIGUSR1 and SIGUSR2 to all processes
of this node, SIGHUP as SIGTERM. Those that have not ended after TORCH_ELASTIC_SHUTDOWN_TIMEOUT
seconds are killed. The exit code is 128 + signal then, else that of the process that failed first.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

if not hasattr(signal, "SIGHUP"):  # Windows
    sys.exit("error: launch/torchrun.py needs Linux or macOS: run the script itself with python")
try:
    from torch.distributed import run as torchrun
except ModuleNotFoundError as missing:
    sys.exit(f"error: {sys.executable} has no module {missing.name}: run install.sh, or set PYTHON")
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

FORWARDED = "SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGUSR2"


def main(arguments: Sequence[str]) -> int:
    """Run torchrun to its end, and return the exit code."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        torchrun.main([f"--signals_to_handle={FORWARDED}", *arguments])
    except SignalException as stopped:
        return 128 + stopped.sigval
    except KeyboardInterrupt:  # before the nodes have met
        return 128 + signal.SIGINT
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # as a shell has it where a signal killed it
    except RendezvousError as error:
        reason = " ".join(str(error.__cause__ or error).splitlines()[:1])
        print(
            f"error: the nodes do not meet, or lost each other ({reason}): see the messages of the "
            "others; MASTER_ADDR must be the address of node 0, with a free MASTER_PORT",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
