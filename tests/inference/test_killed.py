"""A batch that is killed resumes, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from architectures import chain
from commands import CHECKOUT, ON_CPU, infer, words

from dints.data.tasks import Task
from dints.network.discrete import DiscreteNetwork
from dints.network.model_file import save_model

TASK = Task("Toy", "CT", 1, ("background", "a"), None, (0.0, 1.0), (16, 16, 16))
IMAGES = 8


@pytest.fixture
def given(tmp_path) -> list[object]:
    """Write a model file and images; return the flags that name them."""
    architecture = chain(0, 1, 0, num_depths=2)
    torch.manual_seed(0)
    network = DiscreteNetwork(architecture, 1, 2, 0.125)
    save_model(tmp_path / "m.pth", network, architecture, 0.125, TASK)
    (tmp_path / "in").mkdir()
    for number in range(IMAGES):
        image = np.random.default_rng(number).random((40, 40, 40)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"in/{number:02}.nii.gz")
    return ["--checkpoint", tmp_path / "m.pth", "--input", tmp_path / "in"]


def start(out: Path, *flags: object) -> subprocess.Popen:
    command = words("infer_dints.py", *flags, "--output_root", out, ON_CPU)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], cwd=CHECKOUT, env=environment, **quiet)


def written(out: Path) -> dict[str, bytes]:
    """Return the NIfTI files in a folder and its folders."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.nii.gz")}


@pytest.mark.slow
@pytest.mark.fault("kill -9 at any moment")
def test_a_batch_that_is_killed_resumes(given, tmp_path):
    """tests/scripts/test_infer.py kills one in its own process, and starts it with other flags."""
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    process = start(killed, *given)
    while len(written(killed)) < IMAGES // 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in killed.glob("*.nii.gz")}
    infer(killed, *given)
    infer(straight, *given)
    assert len(before) < IMAGES == len(written(straight)) and written(killed) == written(straight)
    kept = [path.stat().st_mtime_ns == modified for path, modified in before.items()]
    assert sum(kept) >= len(before) - 1  # the last one may have been killed before its note
    assert not list(killed.rglob("*.partial"))
