"""Modules that the DiNTS scripts share: a package a subject; the README has the map."""

import getpass
import os

__version__ = "0.1.0"

try:
    getpass.getuser()
# MONAI asks for the name as it is imported; a container's user often has none
except (KeyError, ImportError, OSError):
    os.environ["USER"] = "user"
