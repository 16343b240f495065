"""Random chains on a patch: the published one, and nnU-Net's.

`CHAINS`, at the end, lists their steps. What is drawn is apart from what is done with it: a process
may draw and any device apply. Each step draws from a stream of its own, so that one more, or one
less, does not change what the others draw. Each of the published ones gives what MONAI's transform
of that name gives, in less time: one sampling grid for image and label, sums of shifted copies in
place of convolutions, no metadata.
"""

from __future__ import annotations

import logging
import math
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

log = logging.getLogger(__name__)

SPATIAL, TINY = (1, 2, 3), 1e-7
# Image (channels, *spatial), float32, and label (1, *spatial), uint8
Sample = tuple[torch.Tensor, torch.Tensor]


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


@dataclass(frozen=True)
class Uniform:
    """Draws a number of a range; or one for each of 3 axes; or one, and a seed of noise.

    No lambda, since Windows and macOS must send it to their workers.
    """

    low: float
    high: float
    form: str = "number"  # or axes, or seeded

    def __call__(self, rng: np.random.Generator) -> float | tuple[float, ...]:
        if self.form == "axes":
            return tuple(rng.uniform(self.low, self.high, 3).tolist())
        value = rng.uniform(self.low, self.high)
        return (value, int(rng.integers(2**32))) if self.form == "seeded" else value


def draw(seed: int, steps: Sequence[Step]) -> dict[str, object]:
    """Draw what is to be done to one sample: of each step that is done, by its name, how."""
    drawn = {}
    for step in steps:
        rng = np.random.default_rng(seed_from(seed, step.name))
        if rng.random() < step.probability:
            drawn[step.name] = step.draw(rng)
    return drawn


def augment(
    image: torch.Tensor, label: torch.Tensor, drawn: Mapping[str, object], steps: Sequence[Step]
) -> Sample:
    """Do what was drawn of the steps.

    Call it outside autocast, which would round the coordinates of a rotation. The noise depends on
    the kind of device, all else on what was drawn only.

    Args:
        image: (channels, *spatial), float16 or float32, on any device; may be a view of memory that
            is read-only.
        label: (1, *spatial), uint8, on the same device.

    Returns:
        New, contiguous tensors of the same shapes, float32 and uint8.
    """
    image = image.to(torch.float32, copy=True)
    label = label.clone()
    for step in steps:
        if step.name in drawn:
            image, label = step.apply(image, label, drawn[step.name])
    return image.contiguous(), label.contiguous()


# nnU-Net's changes cost a training that is too short to learn them, and help one that would learn
# its cases by heart.
LONG, MANY_TIMES = 5000, 60  # iterations, and times that each case is seen: docs/recipes.md


def chosen(choice: str, iterations: int, patches_per_case: float) -> str:
    """Return the chain's name: the choice, or what ``auto`` makes of a training's length."""
    if choice != "auto":
        return choice
    name = "nnunet" if iterations >= LONG and patches_per_case >= MANY_TIMES else "published"
    log.info(
        "augmentation: %s, for %d iterations see each case %.0f times (nnunet from %d and %d on)",
        *(name, iterations, patches_per_case, LONG, MANY_TIMES),
    )
    return name


def chain(name: str = "published", flip_axes: Sequence[int] = (0, 1, 2)) -> tuple[Step, ...]:
    """Return the steps of a chain.

    Args:
        name: a key of `CHAINS`.
        flip_axes: the axes along which it may flip; all else is drawn as if they were all.
    """
    return (*CHAINS[name], Step("flip", 1.0, partial(_draw_flips, axes=tuple(flip_axes)), _flip))


def _draw_flips(rng: np.random.Generator, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Draw each axis as often as not, and of these keep the given ones."""
    flipped = [axis for axis in range(3) if rng.random() < 0.5]
    return tuple(axis for axis in flipped if axis in axes)


def _rotate(image: torch.Tensor, label: torch.Tensor, angles: Sequence[float]) -> Sample:
    """Turn about the centre; voxels from outside the patch repeat its border."""
    shape = image.shape[1:]
    centre = (np.array(shape) - 1) / 2
    pull = create_translate(3, centre) @ create_rotate(3, angles) @ create_translate(3, -centre)
    # Rounded where MONAI rounds, or a label voxel half-way between two others would now and then
    # take the other one.
    theta = to_norm_affine(
        torch.from_numpy(pull).to(torch.float32)[None], shape, shape, align_corners=False
    )
    theta = theta[:, [2, 1, 0]][:, :, [2, 1, 0, 3]]  # grids name the last axis first
    grid = F.affine_grid(
        theta.to(image.device, non_blocking=True), [1, 1, *shape], align_corners=False
    )
    sample = partial(F.grid_sample, grid=grid, padding_mode="border", align_corners=False)
    turned = sample(label[None].float(), mode="nearest")[0].to(label.dtype)
    return sample(image[None], mode="bilinear")[0], turned


def _zoom(image: torch.Tensor, label: torch.Tensor, factor: float) -> Sample:
    """Resize, then cut out the middle, or repeat the border around it."""
    shape = image.shape[1:]
    size = [int(extent * factor) for extent in shape]
    image = F.interpolate(image[None], size, mode="trilinear", align_corners=True)
    label_as_float = F.interpolate(label[None].float(), size, mode="nearest")
    return _fit(image, shape)[0], _fit(label_as_float, shape)[0].to(label.dtype)


def _fit(volume: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Crop or pad (batch, channels, *spatial) to ``shape``; an odd voxel is padded at the end."""
    padding = []
    for axis, extent in enumerate(shape, 2):
        size = volume.shape[axis]
        missing = max(extent - size, 0)
        # F.pad names the last axis first
        padding = [missing // 2, missing - missing // 2, *padding]
        if size > extent:
            volume = volume.narrow(axis, size // 2 - extent // 2, extent)
    return F.pad(volume, padding, mode="replicate") if any(padding) else volume


def _smooth(image: torch.Tensor, label: torch.Tensor, sigmas: Sequence[float]) -> Sample:
    """Filter by a Gaussian, with zeros beyond the border; 15 times faster than by convolutions."""
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


def _add_noise(
    image: torch.Tensor, label: torch.Tensor, deviation_and_seed: tuple[float, int]
) -> Sample:
    deviation, seed = deviation_and_seed
    return image.add_(_noise(image, seed), alpha=deviation), label


def _noise(image: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator(image.device).manual_seed(seed)
    return torch.randn(image.shape, generator=generator, device=image.device)


def _flip(image: torch.Tensor, label: torch.Tensor, axes: Sequence[int]) -> Sample:
    axes = [1 + axis for axis in axes]
    return image.flip(axes), label.flip(axes)


def _scale(image: torch.Tensor, label: torch.Tensor, factor: float) -> Sample:
    return image.mul_(factor), label


def _shift(image: torch.Tensor, label: torch.Tensor, offset: float) -> Sample:
    return image.add_(offset), label


def _add_relative_noise(
    image: torch.Tensor, label: torch.Tensor, variance_and_seed: tuple[float, int]
) -> Sample:
    """Add noise of a variance, that of the patch being one."""
    variance, seed = variance_and_seed
    return image + _noise(image, seed) * (variance**0.5 * image.std()), label


def _contrast(image: torch.Tensor, label: torch.Tensor, factor: float) -> Sample:
    """Bring intensities nearer to each channel's mean, or further from it, within their range."""
    low, high = image.amin(SPATIAL, keepdim=True), image.amax(SPATIAL, keepdim=True)
    mean = image.mean(SPATIAL, keepdim=True)
    return ((image - mean) * factor + mean).clamp(low, high), label


def _gamma(image: torch.Tensor, label: torch.Tensor, exponent: float) -> Sample:
    """Raise each channel's intensities, as 0 to 1, to a power; keep mean and deviation."""
    deviation, mean = torch.std_mean(image, SPATIAL, keepdim=True)
    low, high = image.amin(SPATIAL, keepdim=True), image.amax(SPATIAL, keepdim=True)
    raised = ((image - low) / (high - low + TINY)).clamp(0, 1) ** exponent
    new_deviation, new_mean = torch.std_mean(raised, SPATIAL, keepdim=True)
    return (raised - new_mean) / (new_deviation + TINY) * deviation + mean, label


def _inverted_gamma(image: torch.Tensor, label: torch.Tensor, exponent: float) -> Sample:
    return -_gamma(-image, label, exponent)[0], label


def _lower_resolution(image: torch.Tensor, label: torch.Tensor, factor: float) -> Sample:
    """Sample the image by its nearest voxels to a factor of its size, and interpolate it back."""
    shape = image.shape[1:]
    smaller = [max(1, round(extent * factor)) for extent in shape]
    sampled = F.interpolate(image[None], smaller, mode="nearest-exact")
    return F.interpolate(sampled, shape, mode="trilinear")[0], label


CHAINS = {
    # With the published probabilities and ranges.
    "published": (
        Step("rotate", 0.2, Uniform(-0.3, 0.3, "axes"), _rotate),  # radians
        Step("zoom", 0.16, Uniform(0.8, 1.2), _zoom),
        Step("smooth", 0.15, Uniform(0.5, 1.15, "axes"), _smooth),  # voxels
        Step("scale", 0.5, Uniform(0.7, 1.3), _scale),
        Step("shift", 0.5, Uniform(-0.1, 0.1), _shift),
        Step("noise", 0.15, Uniform(0, 0.01, "seeded"), _add_noise),
    ),
    # With nnU-Net's ranges (Isensee et al., Nature Methods 2021, supplementary note 4; as of its
    # version 2).
    "nnunet": (
        Step("rotate", 0.2, Uniform(-math.pi / 6, math.pi / 6, "axes"), _rotate),
        Step("zoom", 0.2, Uniform(0.7, 1.4), _zoom),
        Step("noise", 0.1, Uniform(0, 0.1, "seeded"), _add_relative_noise),
        Step("smooth", 0.2, Uniform(0.5, 1.0, "axes"), _smooth),
        Step("scale", 0.15, Uniform(0.75, 1.25), _scale),
        Step("contrast", 0.15, Uniform(0.75, 1.25), _contrast),
        Step("lower_resolution", 0.25, Uniform(0.5, 1.0), _lower_resolution),
        Step("inverted_gamma", 0.1, Uniform(0.7, 1.5), _inverted_gamma),
        Step("gamma", 0.3, Uniform(0.7, 1.5), _gamma),
    ),
}
