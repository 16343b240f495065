"""Errors that the person at the keyboard can mend, and how a script reports them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: the message names the file or flag, the value that it has, and the remedy.

    Attributes:
        where: goes before the messages of this process: its rank, where there are several.
    """

    where = ""


class Stopped(Exception):
    """The run was asked to stop by a signal.

    Attributes:
        signal: its number.
        saved: where the run stood, for people; empty on ranks that do not tell them.
    """

    def __init__(self, signal: int):
        super().__init__(signal)
        self.signal, self.saved = signal, ""


def exit_on_user_error(main: Callable[..., None], *args) -> None:
    """Run ``main(*args)``; what a person can mend or asked for ends the process with one line on stderr.

    The exit code is 1 for a `UserError`, and 128 and the signal's number for a run that was asked to stop.
    """
    try:
        main(*args)
    except UserError as error:
        _leave(f"error: {UserError.where}{error}", 1)
    except Stopped as stopped:
        if UserError.where in ("", "[rank 0] "):  # all stopped at the same step: one tells
            _tell(f"stopped {stopped.saved}: the same command continues it: {shlex.join(sys.argv)}")
        _end(128 + stopped.signal)
    except KeyboardInterrupt:
        _leave("interrupted: the same command starts again from the last save", 130)


def _leave(message: str, code: int) -> None:
    _tell(message)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # dints/agent.py does not start again what left a message
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)
    _end(code)


def _end(code: int) -> None:
    if UserError.where:  # the error holds the group of processes, whose threads abort Python's orderly end at times
        sys.stdout.flush()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises for a worker that is killed
        for worker in multiprocessing.active_children():  # they ignore the signals that stop a run
            worker.kill()
        os._exit(code)
    sys.exit(code)


def _tell(message: str) -> None:
    """One line on stderr, without what a file's name might do to a terminal."""
    line = " ".join(message.split())
    print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr, flush=True)
