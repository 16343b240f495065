"""A run's report, one page that can be sent on: cases looked at, their pictures, plots, the model, the page."""

from dints import modules_when_used

__getattr__ = modules_when_used(__name__)
