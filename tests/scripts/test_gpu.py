"""gpu.py, which waits for a machine with a GPU, does on a CPU what it will do there."""

from __future__ import annotations

import json

import pytest
import torch
from commands import run


@pytest.mark.slow
def test_all_parts_pass_in_a_rehearsal(tmp_path):
    """But those of quickstart.sh, the launchers, the benchmarks and whole stages, which have tests of their own."""
    output = tmp_path / "results.json"
    done = run(
        "tests/gpu.py --rehearse --without quickstart launchers steps compiled task04 --output", output, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert all(result["ok"] for result in results.values()) and len(results) == 11
    assert results["resumes"]["largest_relative_difference_of_losses"] == 0
    assert set(results["losses_fall"]) >= {"fp32", "bf16"}
    assert results["variants"]["plain"]["ms"] > 0 and results["loader"]["s_per_iteration"] > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_part_that_fails_takes_no_other_with_it(tmp_path):
    """On a machine without a GPU all that needs one fails."""
    output = tmp_path / "results.json"
    done = run("tests/gpu.py --device cuda --parts skips_infinite machine --output", output)
    results = json.loads(output.read_text())
    assert done.returncode == 1 and not any(result["ok"] for result in results.values())
    assert "sees no GPU" in results["skips_infinite"]["said"]
