"""What the parsed options mean."""

from __future__ import annotations

import argparse

import pytest

from dints import options


@pytest.mark.parametrize(
    ("steps", "iterations", "expected"),
    [
        (10, 500, (50, 25, 5)),
        (5, 500, (100, 50, 10)),
        (10, 10, (1, 0, 1)),
        (7, 100, (14, 7, 1)),
        (1000, 500, (1, 0, 1)),
    ],
)
def test_a_budget_in_iterations_scales_every_number_of_epochs(steps, iterations, expected):
    args = argparse.Namespace(
        num_iterations=iterations, num_epochs=1000, num_epochs_warmup=500, num_epochs_per_validation=100
    )
    scaled = options.scaled_to_iterations(args, steps)
    assert (scaled.num_epochs, scaled.num_epochs_warmup, scaled.num_epochs_per_validation) == expected
    assert args.num_epochs == 1000  # what the run is known by
    args.num_iterations = None
    assert options.scaled_to_iterations(args, steps) is args
