"""From a dataset's folder to batches: the task, its cases, and loaders of patches and of whole volumes."""

from dints import modules_when_used

__getattr__ = modules_when_used(__name__)
