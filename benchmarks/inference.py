"""Measure the seconds and the memory that segmenting a volume takes.

    OMP_NUM_THREADS=1 python benchmarks/inference.py --channel_mul 0.5
    OMP_NUM_THREADS=1 python benchmarks/inference.py --image hippocampus_001.nii.gz
    python benchmarks/inference.py --memory --classes 16 --shape 512 512 300 --at_once

Seconds are the median of the repeats, with and without flips. The network is a U shape with skip
connections of 9 blocks and 3 depths at full resolution, with random weights, in patches of 32x32x32
voxels for an image that is given, which is not resampled, else of 96x96x96 for a random CT.

With --memory the network is one convolution, so that the volume's share is measured. The peak is of
this whole process, Python and its libraries included; the digest tells whether two ways agree.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dints.data.cases import read_image_file  # noqa: E402  the checkout comes first on the path
from dints.data.listing import ReadOptions  # noqa: E402
from dints.data.nifti import read_header  # noqa: E402
from dints.data.tasks import Task  # noqa: E402
from dints.inference import slabs  # noqa: E402
from dints.inference.predictor import Predictor  # noqa: E402
from dints.network.baselines import u_shaped  # noqa: E402
from dints.network.discrete import DiscreteNetwork  # noqa: E402
from dints.network.model_file import Model  # noqa: E402
from dints.network.strides import isotropic

CT = Task("CT", "CT", 1, ("background", "a", "b"), None, (-100.0, 300.0), (96, 96, 96))


class Timed(nn.Module):
    """A network that notes the seconds of its forward passes."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.seconds = network, 0.0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        scores = self.network(image)
        self.seconds += time.perf_counter() - start
        return scores


def random_ct(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(-200, 400, (1, *shape), np.int16)


def measure_time(args: argparse.Namespace) -> None:
    image, affine, task = random_ct(args.shape), np.eye(4), CT
    if args.image is not None:
        header = read_header(str(args.image))
        image, affine = read_image_file(header, ReadOptions())[0], header.affine
        task = Task("MRI", "MRI", 1, CT.class_names, None, None, (32, 32, 32))
    architecture = u_shaped(9, 3, skip_connections=True, strides=isotropic(3, False))
    torch.manual_seed(0)
    network = Timed(DiscreteNetwork(architecture, 1, 3, args.channel_mul))
    model = Model(network, architecture, task, {"overlap_ratio": 0.5, "flips": {"axes": [0, 1, 2]}})
    for mirrored in (False, True):
        predictor = Predictor(model, "cpu", args.precision, mirrored=mirrored)
        whole, beside = [], []
        for _ in range(args.repeats + 1):
            network.seconds, start = 0.0, time.perf_counter()
            predictor(image, affine)
            whole.append(time.perf_counter() - start)
            beside.append(1 - network.seconds / whole[-1])
        seconds, share = (statistics.median(values[1:] or values) for values in (whole, beside))
        size = " x ".join(map(str, image.shape[1:])) + (", with --tta" if mirrored else "")
        print(f"{size}: {seconds:.2f} s, {share:.1%} of them beside the network")


def measure_memory(args: argparse.Namespace) -> None:
    classes = ("background", *(f"class {number}" for number in range(1, args.classes)))
    task = replace(CT, class_names=classes, spacing=(1.0, 1.0, 1.0))
    torch.manual_seed(0)
    model = Model(nn.Conv3d(1, args.classes, 1), None, task, {"overlap_ratio": 0.25})
    predictor, affine = Predictor(model, "cpu", "fp32"), np.diag([*args.spacing, 1.0])
    if args.at_once:
        slabs.fits = lambda *_: False
    before, start = peak(), time.perf_counter()
    decision = predictor.segment(lambda: random_ct(args.shape), affine, "a volume")
    seconds = time.perf_counter() - start
    digest = hashlib.sha256(decision.labels.tobytes()).hexdigest()[:8]
    print(f"{before:.2f} GiB before, {peak():.2f} at the peak; {seconds:.0f} s; labels {digest}")


def peak() -> float:
    """Return the largest memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = {"type": int, "nargs": 3, "default": (256, 256, 128)}
    parser.add_argument("--shape", **shape, help="of the random CT, in voxels (256 256 128)")
    parser.add_argument("--image", type=Path, help="a volume to be timed instead")
    parser.add_argument("--channel_mul", type=float, default=0.5, help="the network's width (0.5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="(bf16)")
    parser.add_argument("--repeats", type=int, default=3, help="after one to warm up (3)")
    parser.add_argument("--memory", action="store_true", help="measure the memory, not the time")
    parser.add_argument("--classes", type=int, default=16, help="for --memory (16)")
    parser.add_argument(
        "--spacing", type=float, nargs=3, default=(1.0, 1.0, 1.0), help="in mm (1 1 1)"
    )
    parser.add_argument("--at_once", action="store_true", help="keep the scores of a whole volume")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    (measure_memory if arguments.memory else measure_time)(arguments)
