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
from commands import CHECKOUT, ON_CPU, words

from dints.data.tasks import Task
from dints.network.discrete import DiscreteNetwork
from dints.network.model_file import save_model

TASK = Task(
    "Toy", "CT", 1, ("background", "a"), spacing=None, intensity=(0.0, 1.0), patch_size=(16, 16, 16)
)
IMAGES = 8


@pytest.fixture
def given(tmp_path) -> Path:
    """Write a model file and images into a folder."""
    architecture = chain(0, 1, 0, num_depths=2)
    torch.manual_seed(0)
    save_model(
        tmp_path / "m.pth", DiscreteNetwork(architecture, 1, 2, 0.125), architecture, 0.125, TASK
    )
    (tmp_path / "in").mkdir()
    for number in range(IMAGES):
        image = np.random.default_rng(number).random((40, 40, 40)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"in/{number:02}.nii.gz")
    return tmp_path


def start(given: Path, out: str, *flags: str) -> subprocess.Popen:
    places = [
        "--checkpoint",
        given / "m.pth",
        "--input",
        given / "in",
        "--output_root",
        given / out,
        ON_CPU,
    ]
    command = [sys.executable, *words("infer_dints.py", *places, *flags)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        command, cwd=CHECKOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet
    )


def kill_at(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Kill a batch as soon as a folder has so many NIfTI files."""
    while len(list(folder.glob("*.nii.gz"))) < count and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def written(out: Path) -> dict[str, bytes]:
    """Return the NIfTI files in a folder and its folders."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.nii.gz")}


@pytest.mark.slow
@pytest.mark.fault("kill -9 at any moment")
def test_a_batch_that_is_killed_resumes(given):
    """tests/scripts/test_infer.py kills one in its own process, and starts it with other flags."""
    assert start(given, "straight").wait(120) == 0
    kill_at(start(given, "killed"), given / "killed", IMAGES // 2)
    before = len(written(given / "killed"))
    assert start(given, "killed").wait(120) == 0
    assert before < IMAGES and written(given / "killed") == written(given / "straight")
    assert len(written(given / "straight")) == IMAGES
    assert not list((given / "killed").rglob("*.partial"))
