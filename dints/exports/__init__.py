"""A trained network in forms that need none of our code, each checked on a real case against the network."""

from dints import modules_when_used

__getattr__ = modules_when_used(__name__)
