"""From two folders of masks to scores: surfaces, lesions, a case's scores, summaries; without PyTorch."""

from dints import modules_when_used

__getattr__ = modules_when_used(__name__)
