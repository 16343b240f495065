"""The published random chain on a patch: rotate, zoom, smooth, scale, shift, noise, flip.

What is drawn is apart from what is done with it: a process may draw and any device apply. Each step gives what MONAI's
transform of that name gives, in less time: one sampling grid for image and label, sums of shifted copies in place of
convolutions, no metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from monai.networks.layers import gaussian_1d
from monai.networks.utils import to_norm_affine
from monai.transforms.utils import create_rotate, create_translate
from torch.nn import functional as F

P_ROTATE, MAX_ANGLE = 0.2, 0.3  # radians, about each axis
P_ZOOM, ZOOM_RANGE = 0.16, (0.8, 1.2)  # one factor for all axes
P_SMOOTH, SIGMA_RANGE = 0.15, (0.5, 1.15)  # voxels, for each axis
P_SCALE, MAX_FACTOR = 0.5, 0.3  # intensities are multiplied by 1 + factor
P_SHIFT, MAX_OFFSET = 0.5, 0.1
P_NOISE, MAX_NOISE_STD = 0.15, 0.01
P_FLIP = 0.5  # of each axis


@dataclass(frozen=True)
class Draw:
    """What is to be done to one sample, in the order of the fields; None is not at all."""

    angles: tuple[float, float, float] | None = None  # radians about the first, second and third spatial axis
    zoom: float | None = None
    sigmas: tuple[float, float, float] | None = None  # voxels
    factor: float | None = None
    offset: float | None = None
    noise_std: float | None = None
    noise_seed: int = 0
    flips: tuple[int, ...] = ()  # spatial axes


def draw(rng: np.random.Generator) -> Draw:
    """Draw every step with its published probability and range, independently of the others."""
    chosen = {}
    if rng.random() < P_ROTATE:
        chosen["angles"] = tuple(rng.uniform(-MAX_ANGLE, MAX_ANGLE, 3).tolist())
    if rng.random() < P_ZOOM:
        chosen["zoom"] = rng.uniform(*ZOOM_RANGE)
    if rng.random() < P_SMOOTH:
        chosen["sigmas"] = tuple(rng.uniform(*SIGMA_RANGE, 3).tolist())
    if rng.random() < P_SCALE:
        chosen["factor"] = rng.uniform(-MAX_FACTOR, MAX_FACTOR)
    if rng.random() < P_SHIFT:
        chosen["offset"] = rng.uniform(-MAX_OFFSET, MAX_OFFSET)
    if rng.random() < P_NOISE:
        chosen.update(noise_std=rng.uniform(0, MAX_NOISE_STD), noise_seed=int(rng.integers(2**32)))
    return Draw(**chosen, flips=tuple(axis for axis in range(3) if rng.random() < P_FLIP))


def augment(image: torch.Tensor, label: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply ``draw``; call it outside autocast, which would round the coordinates of a rotation.

    The noise depends on the kind of device, all else on the draw only.

    Args:
        image: (channels, *spatial), float16 or float32, on any device; may be a view of memory that is read-only.
        label: (1, *spatial), uint8, on the same device.

    Returns:
        New, contiguous tensors of the same shapes, float32 and uint8.
    """
    image = image.to(torch.float32, copy=True)
    label = label.clone()
    if draw.angles is not None:
        image, label = _rotate(image, label, draw.angles)
    if draw.zoom is not None:
        image, label = _zoom(image, label, draw.zoom)
    if draw.sigmas is not None:
        image = _smooth(image, draw.sigmas)
    if draw.factor is not None:
        image.mul_(1 + draw.factor)
    if draw.offset is not None:
        image.add_(draw.offset)
    if draw.noise_std is not None:
        generator = torch.Generator(image.device).manual_seed(draw.noise_seed)
        image.add_(torch.randn(image.shape, generator=generator, device=image.device), alpha=draw.noise_std)
    if draw.flips:
        axes = [1 + axis for axis in draw.flips]
        image, label = image.flip(axes), label.flip(axes)
    return image.contiguous(), label.contiguous()


def _rotate(image: torch.Tensor, label: torch.Tensor, angles: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
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


def _zoom(image: torch.Tensor, label: torch.Tensor, zoom: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize, then cut out the middle, or repeat the border around it."""
    shape = image.shape[1:]
    size = [int(extent * zoom) for extent in shape]
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


def _smooth(image: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Gaussian filter, with zeros beyond the border; on a CPU 15 times faster than by convolutions."""
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
    return image
