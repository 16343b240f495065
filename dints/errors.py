"""Errors that the person at the keyboard can correct, and how a script ends."""

from __future__ import annotations

import io
import multiprocessing
import os
import reprlib
import shlex
import sys
from collections.abc import Callable, Sequence

from dints import launcher, system

MAX_SHOWN = 80  # characters of a value in a message


class UserError(Exception):
    """Bad input: the message names the file or flag, the value that it has, and the remedy."""


class Stopped(Exception):
    """A signal asked the run to stop.

    Attributes:
        signal: its number.
        saved: where the run stood, for people.
    """

    def __init__(self, signal: int, saved: str = ""):
        super().__init__(signal)
        self.signal, self.saved = signal, saved


class PartlyDone(Exception):
    """Some of a batch could not be done, all else was; the message names them."""


class ProcessLost(Exception):
    """A process that this one needs died or does not answer; starting all of them again may
    help.
    """


def shown(value: object) -> str:
    """Return a value as a message shows it: from a file it may be nested without end, or a million
    characters long.
    """
    try:
        text = _SHORT.repr(value)
    # of an odd tensor, a number
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        text = f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return cut(text)


def cut(text: str, most: int = MAX_SHOWN) -> str:
    """Return so much of a text as a message has room for."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, MAX_SHOWN, MAX_SHOWN


def exit_on_user_error(main: Callable[..., None], *args) -> None:
    """Run ``main(*args)``; what a person can correct or asked for ends the process with one line on
    stderr.

    The exit code is 1 for a `UserError`, 3 for a batch that is done but in part, 128 and the
    signal's number for a run that was asked to stop, and 141 without a word where nobody reads on
    what is printed. What nobody expected keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a name that the terminal cannot show ends no script
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(*args)
        if sys.stdout is not None:
            sys.stdout.flush()  # while what fails can still be said
    except UserError as error:
        _leave(f"error: {_speaker()}{error}", 1)
    except PartlyDone as partly:  # all ranks know what is not done: one tells
        _leave(f"error: {partly}", 3, tells=launcher.rank() == 0)
    except Stopped as stopped:
        if launcher.rank() == 0:  # all stopped at the same step: one tells
            tell(
                f"stopped {stopped.saved}: {_again('continues it')}: "
                f"{shlex.join(_continuing(sys.argv))}"
            )
        _end(128 + stopped.signal)
    except KeyboardInterrupt:
        _leave(f"interrupted: {_again('resumes from the last save')}", 130)
    except ProcessLost as error:
        tell(f"error: {_speaker()}{error}")
        _end(1)
    except ModuleNotFoundError as error:
        if (error.name or "dints").partition(".")[0] == "dints":
            raise
        _leave(
            f"error: {sys.executable} has no module {error.name}: run install.sh, and use "
            ".venv/bin/python",
            1,
        )
    except SystemExit as left:  # a rank that leaves since rank 0 does, which says why
        _end(left.code)
    except Exception:  # noqa: BLE001  reported as Python does, and then ended as all else
        unwritten = _unwritten_output() if isinstance(sys.exc_info()[1], OSError) else None
        if isinstance(unwritten, BrokenPipeError):  # as of "| head", which has read enough
            _end(128 + 13)  # SIGPIPE's number, which other programs die of
        if unwritten is not None:
            _leave(
                f"error: the output cannot be written: {unwritten.strerror}: print it elsewhere", 1
            )
        sys.excepthook(*sys.exc_info())
        _end(1)


def _continuing(command: Sequence[str]) -> list[str]:
    """Return a command that continues a run: without ``--resume never``, which would start afresh
    once more.
    """
    words = [word for word in command if word != "--resume=never"]
    for place in range(len(words) - 2, -1, -1):
        if words[place : place + 2] == ["--resume", "never"]:
            del words[place : place + 2]
    return words


def _again(what: str) -> str:
    without = " without --resume never" * (_continuing(sys.argv) != list(sys.argv))
    return f"the same command{without} {what}"


def _unwritten_output() -> OSError | None:
    """Return why nothing can be printed, and drop what was to be, so that Python's end does not
    fail of it again.
    """
    try:
        print(flush=True)  # to flush is not enough: without a buffer nothing waits to be written
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _speaker() -> str:
    """Return what goes before a message, so that one sees which of several processes speaks."""
    return f"[rank {launcher.rank()}] " if launcher.world_size() > 1 else ""


def _leave(message: str, code: int, tells: bool = True) -> None:
    if tells:
        tell(message)
    _end(code)


def _end(code: int) -> None:
    # Workers ignore the signals that stop a run, and Python's end would wait for those that an
    # error still holds.
    system.forget_children()
    for worker in multiprocessing.active_children():
        worker.kill()
    # the error holds the group of processes, whose threads may abort an orderly end
    if launcher.world_size() > 1:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def tell(message: str) -> None:
    """Write one line to stderr, without what a file's name might do to a terminal."""
    line = " ".join(message.split())
    print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr, flush=True)
