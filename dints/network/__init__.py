"""From a search space to a network: operations, architectures, decoding, cost, drawings."""

from dints import modules_when_used

__getattr__ = modules_when_used(__name__)
