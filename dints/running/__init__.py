"""How a script runs on its machine: processes, device, precision, seeds and the run folder."""

from dints import modules_when_used

__getattr__ = modules_when_used(__name__)
