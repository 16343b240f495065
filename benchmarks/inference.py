"""Measure the seconds that a volume takes, with and without flips, and what of them is not the network.

    OMP_NUM_THREADS=1 python benchmarks/inference.py --channel_mul 0.5
    OMP_NUM_THREADS=1 python benchmarks/inference.py --image hippocampus_001.nii.gz

The network is a U shape with skip connections of 9 blocks and 3 depths at full resolution, with random weights, in the
patches of the task: 32x32x32 voxels for an image that is given, which is not resampled, else 96x96x96 for a CT of
256x256x128 voxels at 1 mm. Each number is the median of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dints.data.leniency import Leniency  # noqa: E402

from dints.data.cases import read_image  # noqa: E402  the checkout comes first on the path
from dints.data.nifti import read_header  # noqa: E402
from dints.data.tasks import Task  # noqa: E402
from dints.inference.predictor import Predictor  # noqa: E402
from dints.network.baselines import u_shaped  # noqa: E402
from dints.network.discrete import DiscreteNetwork  # noqa: E402
from dints.network.model_file import Model  # noqa: E402


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


def main(args: argparse.Namespace) -> None:
    if args.image is None:
        image = np.random.default_rng(0).integers(-200, 400, (1, 256, 256, 128), np.int16)
        affine, patch, window = np.eye(4), (96, 96, 96), (-100.0, 300.0)
    else:
        header = read_header(str(args.image))
        image, affine, patch, window = read_image([header], Leniency())[0], header.affine, (32, 32, 32), None
    modality = "MRI" if window is None else "CT"
    task = Task("Timed", modality, 1, ("background", "a", "b"), spacing=None, intensity=window, patch_size=patch)
    architecture = replace(u_shaped(9, 3, skip_connections=True), use_downsample=False)
    torch.manual_seed(0)
    network = Timed(DiscreteNetwork(architecture, 1, 3, args.channel_mul))
    for mirrored in (False, True):
        model = Model(network, architecture, task, {"overlap_ratio": 0.5, "flips": {"axes": [0, 1, 2]}})
        predictor = Predictor(model, "cpu", args.precision, mirrored=mirrored)
        whole, beside = [], []
        for _ in range(args.repeats + 1):
            network.seconds, start = 0.0, time.perf_counter()
            predictor(image, affine)
            whole.append(time.perf_counter() - start)
            beside.append(1 - network.seconds / whole[-1])
        seconds, share = (statistics.median(values[1:] or values) for values in (whole, beside))
        print(
            f"{' x '.join(map(str, image.shape[1:]))}{', with --tta' if mirrored else ''}: "
            f"{seconds:.2f} s, {share:.1%} of them beside the network"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="a volume (default: a CT of random voxels)")
    parser.add_argument("--channel_mul", type=float, default=0.5, help="width of the network (default: 0.5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="(default: bf16)")
    parser.add_argument("--repeats", type=int, default=3, help="after one to warm up (default: 3); 0: that one counts")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
