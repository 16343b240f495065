"""What more than one of the DiNTS scripts needs: one wing a subject, one module a room; the README has the map."""

import getpass
import importlib
import os
from collections.abc import Callable
from types import ModuleType

__version__ = "0.1.0"

try:
    getpass.getuser()
except (KeyError, ImportError, OSError):  # MONAI asks for the name as it is imported; a container's user often has none
    os.environ["USER"] = "user"


def modules_when_used(package: str) -> Callable[[str], ModuleType]:
    """Return a ``__getattr__`` (PEP 562) for ``package`` that imports its modules when they are first asked for.

    PyTorch's and MONAI's imports take seconds. The scripts name the wings at their top, as any import, and yet ``-h``
    and a mistyped flag are answered at once.
    """

    def import_module(name: str) -> ModuleType:
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{package}.{name}":
                raise
            raise AttributeError(f"{package} has no module {name}") from None

    return import_module
