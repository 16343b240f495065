"""gpu.py, which waits for a machine with a GPU, does on a CPU what it will do there."""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import subprocess
import sys

import gpu
import gpu_checks
import gpu_speed
import pytest
import torch
from commands import CHECKOUT

# The rest are whole runs, which have tests of their own; `gpu.py --rehearse` does them too.
REHEARSED = "ddp lacks_memory variants"


def test_each_part_has_its_seconds_and_all_end_within_nine_minutes():
    assert {**gpu_checks.PARTS, **gpu_speed.PARTS}.keys() == gpu.SECONDS.keys()
    assert sum(gpu.SECONDS.values()) <= 9 * 60


@pytest.mark.slow
def test_parts_pass_in_a_rehearsal(tmp_path):
    output = tmp_path / "results.json"
    flags = f"--rehearse --parts {REHEARSED} --output {output}"
    assert gpu.main(gpu.parse_args(flags.split())) == 0
    results = json.loads(output.read_text())
    assert all(results[name]["ok"] for name in REHEARSED.split())
    assert results["variants"]["plain"]["ms_of_ten"] > 0
    assert "--patch_size" in results["lacks_memory"]["CPU"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_part_that_fails_takes_no_other_with_it(tmp_path):
    """On a machine without a GPU both parts fail, each for itself."""
    command = ["bash", CHECKOUT / "benchmarks" / "gpu.sh", "--parts", "machine", "ddp"]
    environment = {
        **os.environ,
        "OUT": str(tmp_path),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    command += ["--patience", "9"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    results = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 1 and not any(result["ok"] for result in results.values())
    assert "sees no GPU" in results["ddp"]["said"]


def test_a_part_that_hangs_is_ended_and_keeps_what_it_found(tmp_path, monkeypatch):
    """Its processes end with it; its findings are in the file before that."""
    reader, writer = os.pipe()

    def finds_and_hangs(setting: gpu_checks.Setting) -> None:
        setting.found["before"] = 1
        subprocess.run(["sleep", "600"], pass_fds=[writer])

    monkeypatch.setattr(gpu, "CONTEXT", multiprocessing.get_context("fork"))
    monkeypatch.setattr(gpu, "SECONDS_TO_END", 1)
    monkeypatch.setitem(gpu_checks.PARTS, "machine", finds_and_hangs)
    written, results = [], {}
    monkeypatch.setattr(gpu, "write", lambda _, results: written.append(json.dumps(results)))
    args = gpu.parse_args(["--output", str(tmp_path / "results.json")])
    gpu.run("machine", args, tmp_path, 3.0, results)
    os.close(writer)
    assert results["machine"]["before"] == 1 and results["machine"]["why"] == "no end after 3 s"
    assert not results["machine"]["ok"] and '"before": 1' in written[-1]
    # nobody holds the other end
    assert select.select([reader], [], [], 60)[0] and os.read(reader, 1) == b""
    os.close(reader)
