"""A batch of volumes to segment: what is done, and what failed."""

from dints import modules_when_used

__getattr__ = modules_when_used(__name__)
