"""What both training stages do: a step of the weights, validation, and going on whatever stops them."""

from dints import modules_when_used

__getattr__ = modules_when_used(__name__)
