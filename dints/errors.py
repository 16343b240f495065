"""Errors that the person at the keyboard can mend, and how a script reports them."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: the message names the file or flag, the value that it has, and the remedy."""


def exit_on_user_error(main: Callable[..., None], *args) -> None:
    """Run ``main(*args)``; a `UserError` ends the process with one line on stderr and exit code 1."""
    try:
        main(*args)
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)
