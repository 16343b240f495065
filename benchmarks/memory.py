"""Measure the memory that segmenting a large CT takes beside the network, slab by slab and at once.

    python benchmarks/memory.py --classes 16 --shape 512 512 300
    python benchmarks/memory.py --classes 3 --shape 512 512 900 --spacing 0.8 0.8 1 --at_once

The network is one convolution, so that what is measured is the volume's share. The peak is of this whole process,
Python and its libraries included; the digest tells whether two ways give the same labels.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dints.data.tasks import Task  # noqa: E402  the checkout comes first on the path
from dints.inference import predictor  # noqa: E402
from dints.network.model_file import Model  # noqa: E402

PATCH = (96, 96, 96)


class OneConvolution(nn.Module):
    """Gives each class a multiple of the image."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.convolution = nn.Conv3d(1, num_classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.convolution(image)


def peak() -> float:
    """Return the largest memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(args: argparse.Namespace) -> None:
    names = tuple(f"class {value}" for value in range(args.classes))
    task = Task("Large", "CT", 1, names, spacing=(1.0, 1.0, 1.0), intensity=(-100.0, 300.0), patch_size=PATCH)
    torch.manual_seed(0)
    model = Model(OneConvolution(args.classes), None, task, {"overlap_ratio": 0.25})
    segmenter = predictor.Predictor(model, "cpu", "fp32")
    if args.at_once:
        predictor.slabs.fits = lambda *_: False
    rng, before, start = np.random.default_rng(0), peak(), time.perf_counter()
    affine = np.diag([*args.spacing, 1.0])
    decision = segmenter.segment(lambda: rng.integers(-200, 400, (1, *args.shape), np.int16), affine, "a volume")
    seconds, digest = time.perf_counter() - start, hashlib.sha256(decision.labels.tobytes()).hexdigest()[:8]
    print(f"{before:.2f} GiB before, {peak():.2f} at the peak; {seconds:.0f} s; labels {digest}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=16, help="background included (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300), help="voxels (default: 512 512 300)")
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.0, 1.0, 1.0), help="mm (default: 1 1 1)")
    parser.add_argument("--at_once", action="store_true", help="keep all classes of the volume, as before")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
