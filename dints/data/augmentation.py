"""The published random chain on a patch: rotate, zoom, smooth, scale, shift, noise, flip.

`STEPS`, at the end, is the chain. What is drawn is apart from what is done with it: a process may draw and any device
apply. Each step draws from a stream of its own, so that one more, or one less, does not change what the others draw.
Each gives what MONAI's transform of that name gives, in less time: one sampling grid for image and label, sums of
shifted copies in place of convolutions, no metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from monai.networks.layers import gaussian_1d
from monai.networks.utils import to_norm_affine
from monai.transforms.utils import create_rotate, create_translate
from torch.nn import functional as F

from dints.running.seeds import seed_from

Sample = tuple[torch.Tensor, torch.Tensor]  # image (channels, *spatial), float32, and label (1, *spatial), uint8


@dataclass(frozen=True)
class Step:
    """One step of the chain.

    Attributes:
        name: of its random stream.
        probability: with which it is done.
        draw: how it is done, as plain values.
        apply: does it with what was drawn; it may change the image in place.
    """

    name: str
    probability: float
    draw: Callable[[np.random.Generator], object]
    apply: Callable[[torch.Tensor, torch.Tensor, object], Sample]


def draw(seed: int, flip_axes: Sequence[int] = (0, 1, 2)) -> dict[str, object]:
    """Draw what is to be done to one sample: of each step that is done, by its name, how.

    Args:
        flip_axes: the axes along which it may be flipped; all else is drawn as if they were all.
    """
    drawn = {}
    for step in STEPS:
        rng = np.random.default_rng(seed_from(seed, step.name))
        if rng.random() < step.probability:
            drawn[step.name] = step.draw(rng)
    if "flip" in drawn:
        drawn["flip"] = tuple(axis for axis in drawn["flip"] if axis in flip_axes)
    return drawn


def augment(image: torch.Tensor, label: torch.Tensor, drawn: Mapping[str, object]) -> Sample:
    """Do what was drawn; call it outside autocast, which would round the coordinates of a rotation.

    The noise depends on the kind of device, all else on what was drawn only.

    Args:
        image: (channels, *spatial), float16 or float32, on any device; may be a view of memory that is read-only.
        label: (1, *spatial), uint8, on the same device.

    Returns:
        New, contiguous tensors of the same shapes, float32 and uint8.
    """
    image = image.to(torch.float32, copy=True)
    label = label.clone()
    for step in STEPS:
        if step.name in drawn:
            image, label = step.apply(image, label, drawn[step.name])
    return image.contiguous(), label.contiguous()


def _rotate(image: torch.Tensor, label: torch.Tensor, angles: Sequence[float]) -> Sample:
    """Turn about the centre; voxels from outside the patch repeat its border."""
    shape = image.shape[1:]
    centre = (np.array(shape) - 1) / 2
    pull = create_translate(3, centre) @ create_rotate(3, angles) @ create_translate(3, -centre)
    # Rounded where MONAI rounds, or a label voxel half-way between two others would now and then take the other one.
    theta = to_norm_affine(torch.from_numpy(pull).to(torch.float32)[None], shape, shape, align_corners=False)
    theta = theta[:, [2, 1, 0]][:, :, [2, 1, 0, 3]]  # grids name the last axis first
    grid = F.affine_grid(theta.to(image.device), [1, 1, *shape], align_corners=False)
    sample = partial(F.grid_sample, grid=grid, padding_mode="border", align_corners=False)
    return sample(image[None], mode="bilinear")[0], sample(label[None].float(), mode="nearest")[0].to(label.dtype)


def _zoom(image: torch.Tensor, label: torch.Tensor, factor: float) -> Sample:
    """Resize, then cut out the middle, or repeat the border around it."""
    shape = image.shape[1:]
    size = [int(extent * factor) for extent in shape]
    image = F.interpolate(image[None], size, mode="trilinear", align_corners=True)
    label_as_float = F.interpolate(label[None].float(), size, mode="nearest")
    return _fit(image, shape)[0], _fit(label_as_float, shape)[0].to(label.dtype)


def _fit(volume: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Crop or pad (batch, channels, *spatial) to the spatial ``shape``; an odd voxel is padded at the end."""
    padding = []
    for axis, extent in enumerate(shape, 2):
        size = volume.shape[axis]
        missing = max(extent - size, 0)
        padding = [missing // 2, missing - missing // 2, *padding]  # F.pad names the last axis first
        if size > extent:
            volume = volume.narrow(axis, size // 2 - extent // 2, extent)
    return F.pad(volume, padding, mode="replicate") if any(padding) else volume


def _smooth(image: torch.Tensor, label: torch.Tensor, sigmas: Sequence[float]) -> Sample:
    """Filter by a Gaussian, with zeros beyond the border; on a CPU 15 times faster than by convolutions."""
    for axis, sigma in enumerate(sigmas, 1):
        kernel = gaussian_1d(torch.tensor(sigma)).tolist()
        centre, *tail = kernel[len(kernel) // 2 :]  # it is symmetric
        size = image.shape[axis]
        smoothed = image * centre
        for step, weight in enumerate(tail[: size - 1], 1):
            kept = size - step
            smoothed.narrow(axis, step, kept).add_(image.narrow(axis, 0, kept), alpha=weight)
            smoothed.narrow(axis, 0, kept).add_(image.narrow(axis, step, kept), alpha=weight)
        image = smoothed
    return image, label


def _add_noise(image: torch.Tensor, label: torch.Tensor, deviation_and_seed: tuple[float, int]) -> Sample:
    deviation, seed = deviation_and_seed
    generator = torch.Generator(image.device).manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return image.add_(noise, alpha=deviation), label


def _flip(image: torch.Tensor, label: torch.Tensor, axes: Sequence[int]) -> Sample:
    axes = [1 + axis for axis in axes]
    return image.flip(axes), label.flip(axes)


# With the published probabilities and ranges.
STEPS = (
    # By up to 0.3 radians about each axis.
    Step("rotate", 0.2, lambda rng: tuple(rng.uniform(-0.3, 0.3, 3).tolist()), _rotate),
    # By one factor for all axes.
    Step("zoom", 0.16, lambda rng: rng.uniform(0.8, 1.2), _zoom),
    # By a standard deviation in voxels for each axis.
    Step("smooth", 0.15, lambda rng: tuple(rng.uniform(0.5, 1.15, 3).tolist()), _smooth),
    Step("scale", 0.5, lambda rng: rng.uniform(0.7, 1.3), lambda image, label, factor: (image.mul_(factor), label)),
    Step("shift", 0.5, lambda rng: rng.uniform(-0.1, 0.1), lambda image, label, offset: (image.add_(offset), label)),
    Step("noise", 0.15, lambda rng: (rng.uniform(0, 0.01), int(rng.integers(2**32))), _add_noise),
    # Each axis as often as not.
    Step("flip", 1.0, lambda rng: tuple(axis for axis in range(3) if rng.random() < 0.5), _flip),
)
