"""A batch that is killed goes on with what is not done, and ends as if nothing had happened."""

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
from dints.network.found import FoundNetwork
from dints.network.model_file import save_model

TASK = Task("Toy", "CT", 1, ("background", "a"), spacing=None, intensity=(0.0, 1.0), patch_size=(16, 16, 16))
IMAGES, KILLS = 12, (1, 5, 9)  # the process is killed as soon as so many masks are there


@pytest.mark.slow
@pytest.mark.fault("kill -9 at any moment")
def test_a_batch_that_is_killed_goes_on(tmp_path):
    architecture = chain(0, 1, 0, num_depths=2)
    torch.manual_seed(0)
    save_model(tmp_path / "m.pth", FoundNetwork(architecture, 1, 2, 0.125), architecture, 0.125, TASK)
    for number in range(IMAGES):
        image = np.random.default_rng(number).random((40, 40, 40)).astype(np.float32)
        (tmp_path / "in").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"in/{number:02}.nii.gz")

    def start(out: Path) -> subprocess.Popen:
        flags = ["--checkpoint", tmp_path / "m.pth", "--input", tmp_path / "in", "--output_root", out, ON_CPU]
        command = [sys.executable, *words("infer_dints.py", *flags)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=CHECKOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)

    def masks(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}

    assert start(tmp_path / "straight").wait(120) == 0
    for count in KILLS:
        process = start(tmp_path / "killed")
        while len(list((tmp_path / "killed").glob("*.nii.gz"))) < count and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = len(masks(tmp_path / "killed"))
    assert start(tmp_path / "killed").wait(120) == 0
    assert before < IMAGES and masks(tmp_path / "killed") == masks(tmp_path / "straight")
    assert len(masks(tmp_path / "straight")) == IMAGES and not list((tmp_path / "killed").rglob("*.partial"))
