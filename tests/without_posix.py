"""Runs scripts, one after another, where there is nothing of POSIX, as on Windows.

    python without_posix.py SCRIPT [ARGUMENT ...] [then SCRIPT [ARGUMENT ...]] ...

What Windows lacks of Python's own modules and functions is taken away before the script is
imported; PyTorch, which is another one there, is imported before, as are filelock and psutil. What
only Windows can show, its paths and how it starts workers, is not tried.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess  # noqa: F401  it takes a machine with an msvcrt for Windows
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock  # noqa: F401
import psutil  # noqa: F401
import torch  # noqa: F401

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
OF_OS = (
    "fork",
    "forkpty",
    "sysconf",
    "sched_getaffinity",
    "statvfs",
    "register_at_fork",
    "killpg",
    "setsid",
)
OF_OS += (
    "getpgid",
    "O_DIRECTORY",
    "O_NOFOLLOW",
    "getuid",
    "geteuid",
    "getgid",
    "sync",
    "mkfifo",
    "chown",
)
OF_OS += ("set_blocking",)
SIGNALS = (
    "SIGHUP",
    "SIGUSR1",
    "SIGUSR2",
    "SIGCHLD",
    "SIGQUIT",
    "SIGALRM",
    "SIGKILL",
    "SIGSTOP",
    "SIGCONT",
)


def hide() -> None:
    """Take away what Windows lacks."""
    status = os.statvfs
    # it has that
    shutil.disk_usage = lambda path: SimpleNamespace(
        free=status(path).f_frsize * status(path).f_bavail
    )
    for name in MODULES:
        sys.modules[name] = None
    for owner, names in ((os, OF_OS), (signal, SIGNALS)):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    os.environ["USERNAME"] = "user"  # which Windows sets
    opened = os.open

    def open_file(path: object, *rest: object, **more: object) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)  # as Windows says of a folder
        return opened(path, *rest, **more)

    os.open = open_file


def run(script: str, *arguments: str) -> None:
    """Run a script, and leave where it fails."""
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    commands = [[]]
    for word in sys.argv[1:]:
        commands.append([]) if word == "then" else commands[-1].append(word)
    hide()
    for command in commands:
        run(*command)
