"""Modules that the DiNTS scripts share: a package a subject; the README has the map."""

import getpass
import os

__version__ = "0.1.0"

try:
    getpass.getuser()
except (KeyError, ImportError, OSError):  # MONAI asks for the name as it is imported; a container's user often has none
    os.environ["USER"] = "user"
