"""Architectures that compete: proposed in several ways, judged by short trainings, halved rung by rung."""

from dints import modules_when_used

__getattr__ = modules_when_used(__name__)
