"""Tests run the scripts with these as a user does: in this process, or as processes of their
own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import evolve_dints
import infer_dints
import search_dints
import train_dints

CHECKOUT = Path(__file__).resolve().parents[1]
ON_CPU = "--device cpu --precision fp32"
# So small that a stage takes seconds; three folds, so that of eight cases some validate.
TINY = (
    "--patch_size 16 16 16 --num_workers 0 --num_folds 3 --overlap_ratio 0 --channel_mul 0.125 "
    f"{ON_CPU}"
)
SPACE = "--num_blocks 2 --num_depths 3"


def words(*flags: object) -> list[str]:
    """Split text as it stands on a command line into words; paths and numbers are words already."""
    return [
        word for flag in flags for word in (flag.split() if isinstance(flag, str) else [str(flag)])
    ]


def search(root: Path, output_root: Path, *flags: object) -> Path:
    """Search in this process; return the run's folder."""
    arguments = words("--root", root, "--output_root", output_root, TINY, SPACE, *flags)
    search_dints.main(search_dints.parse_args(arguments))
    return output_root


def evolve(root: Path, output_root: Path, *flags: object) -> Path:
    """Let architectures compete in this process; return the run's folder."""
    arguments = words("--root", root, "--output_root", output_root, TINY, SPACE, *flags)
    evolve_dints.main(evolve_dints.parse_args(arguments))
    return output_root


def train(root: Path, output_root: Path, arch_ckpt: Path, *flags: object) -> Path:
    """Retrain in this process; return the run's folder."""
    arguments = words(
        "--root", root, "--output_root", output_root, "--arch_ckpt", arch_ckpt, TINY, *flags
    )
    train_dints.main(train_dints.parse_args(arguments))
    return output_root


def infer(output_root: Path, *flags: object) -> Path:
    """Segment in this process; return the folder of the segmentations."""
    arguments = words("--checkpoint model.pth --output_root", output_root, ON_CPU, *flags)
    infer_dints.main(infer_dints.parse_args(arguments))
    return output_root


def run(
    *command: object, folder: Path = CHECKOUT, timeout: float = 120
) -> subprocess.CompletedProcess:
    """Run a script, or Python with other words, as a process of its own to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words(*command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def only_error(done: subprocess.CompletedProcess) -> str:
    """Return the one line of error with which a process ended, without a traceback."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


def copy_checkout(folder: Path) -> Path:
    """Copy the files that git tracks, as they are now, into a new ``folder``."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout
    for name in listed.split("\0"):
        if (CHECKOUT / name).is_file():  # not one that is being deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, folder / name)
    return folder
