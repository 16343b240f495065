"""Successive halving over architectures: proposals, short trainings, rungs."""
