"""The random chain: every step against MONAI's transform of that name, and what is drawn for it."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import (
    Compose,
    MapTransform,
    RandFlipd,
    RandGaussianNoise,
    RandGaussianSmoothd,
    RandRotated,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandZoomd,
)
from scipy.stats import kstest

from dints.augmentation import Draw, augment, draw

SHAPES = [(1, 32, 32, 32), (1, 24, 40, 16), (3, 19, 32, 10)]
EVERYTHING = Draw((0.2, -0.1, 0.3), 0.9, (0.6, 0.8, 1.1), 0.2, -0.1, 0.01, 7, (0, 2))
STEPS = {
    "rotate": Draw(angles=(0.2, -0.1, 0.3)),
    "zoom in": Draw(zoom=1.13),
    "zoom out": Draw(zoom=0.87),
    "smooth": Draw(sigmas=(0.6, 0.8, 1.1)),
    "scale": Draw(factor=0.2),
    "shift": Draw(offset=-0.1),
    "noise": Draw(noise_std=0.01, noise_seed=7),
    "flip": Draw(flips=(1,)),
    "everything": EVERYTHING,
    "nothing": Draw(),
}

# MONAI's transforms with the published arguments, each with how to read what it drew, as fields of a Draw.
KEYS, MODES = ["image", "label"], ["bilinear", "nearest"]
PUBLISHED: dict[str, tuple[Callable[[], MapTransform], Callable[[MapTransform], dict]]] = {
    "rotate": (
        lambda: RandRotated(KEYS, range_x=0.3, range_y=0.3, range_z=0.3, mode=MODES, keep_size=True, prob=1.0),
        lambda t: {"angles": (t.rand_rotate.x, t.rand_rotate.y, t.rand_rotate.z)},
    ),
    "zoom": (
        lambda: RandZoomd(
            KEYS, min_zoom=0.8, max_zoom=1.2, mode=["trilinear", "nearest"], align_corners=[True, None], prob=1.0
        ),
        lambda t: {"zoom": t.rand_zoom._zoom[0]},
    ),
    "smooth": (
        lambda: RandGaussianSmoothd(["image"], sigma_x=(0.5, 1.15), sigma_y=(0.5, 1.15), sigma_z=(0.5, 1.15), prob=1.0),
        lambda t: {"sigmas": (t.rand_smooth.x, t.rand_smooth.y, t.rand_smooth.z)},
    ),
    "scale": (
        lambda: RandScaleIntensityd(["image"], factors=0.3, prob=1.0),
        lambda t: {"factor": t.scaler.factor},
    ),
    "shift": (
        lambda: RandShiftIntensityd(["image"], offsets=0.1, prob=1.0),
        lambda t: {"offset": t.shifter._offset},
    ),
    **{
        f"flip {axis}": (
            lambda axis=axis: RandFlipd(KEYS, spatial_axis=axis, prob=1.0),
            lambda t: {"flips": (t.flipper.spatial_axis,)},
        )
        for axis in range(3)
    },
}


@pytest.fixture(scope="module")
def draws() -> list[Draw]:
    rng = np.random.default_rng(1)
    return [draw(rng) for _ in range(40000)]


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and labels that change from voxel to voxel."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape, generator=generator).to(dtype)
    return image, torch.randint(0, 5, (1, *shape[1:]), generator=generator, dtype=torch.uint8)


def check_against(transform: MapTransform | Compose, drawn: Callable[[], Draw], shape: tuple[int, ...]) -> bool:
    """Compare ours with MONAI's, given what ``transform`` has drawn after it ran; whether the image changed."""
    image, label = sample(shape)
    expected = transform({"image": image, "label": label})
    ours = augment(image, label, drawn())
    torch.testing.assert_close(ours[0], torch.as_tensor(expected["image"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1], torch.as_tensor(expected["label"]).to(torch.uint8), rtol=0, atol=0)
    return not torch.equal(ours[0], image)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", PUBLISHED)
def test_a_step_gives_what_the_published_transform_gives(step: str, shape: tuple[int, ...]):
    make, read = PUBLISHED[step]
    transform = make()
    changed = []
    for seed in range(8):  # larger and smaller zooms, angles and sigmas
        transform.set_random_state(seed)
        changed.append(check_against(transform, lambda: Draw(**read(transform)), shape))
    assert sum(changed) >= 6  # a zoom by a fraction of a voxel is none


def test_a_rotation_rounds_as_the_published_one():
    """In 900,000 voxels some are so near to half-way that another order of operations would take another label."""
    make, read = PUBLISHED["rotate"]
    transform = make()
    for seed in range(4):
        transform.set_random_state(seed)
        check_against(transform, lambda: Draw(**read(transform)), (1, 96, 96, 96))


@pytest.mark.parametrize("zoom", [0.8, 0.93, 0.9999, 1.0001, 1.05, 1.2])
def test_zooms_to_sizes_that_differ_by_an_odd_number_of_voxels_or_not_at_all(zoom: float):
    make, _ = PUBLISHED["zoom"]
    transform = make()
    transform.rand_zoom.min_zoom = transform.rand_zoom.max_zoom = (zoom,)
    changed = check_against(transform, lambda: Draw(zoom=zoom), (1, 31, 24, 10))
    assert changed == (zoom != 1.0001)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_follow_each_other_as_published(shape: tuple[int, ...]):
    steps = [(make(), read) for make, read in PUBLISHED.values()]
    chain = Compose([transform for transform, _ in steps])

    def drawn() -> Draw:
        fields = {name: value for transform, read in steps for name, value in read(transform).items()}
        return Draw(**{**fields, "flips": (0, 1, 2)})

    for seed in range(4):
        assert check_against(chain.set_random_state(seed), drawn, shape)


def test_noise_comes_after_scale_and_shift_and_before_the_flip():
    image, label = sample((1, 16, 16, 16))
    noise = augment(torch.zeros_like(image), label, Draw(noise_std=0.01, noise_seed=7))[0]
    both = augment(image, label, Draw(factor=0.2, offset=-0.1, noise_std=0.01, noise_seed=7, flips=(2,)))[0]
    torch.testing.assert_close(both, (image * 1.2 - 0.1 + noise).flip(3))


def test_noise_is_gaussian_and_of_the_drawn_width():
    zeros, label = torch.zeros(2, 24, 24, 24), torch.zeros(1, 24, 24, 24, dtype=torch.uint8)
    noise = augment(zeros, label, Draw(noise_std=0.004, noise_seed=3))[0]
    assert kstest(noise.flatten().numpy(), "norm", args=(0, 0.004)).pvalue > 1e-4
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 4.5 / 24**1.5
    other = augment(zeros, label, Draw(noise_std=0.004, noise_seed=4))[0]
    assert abs(np.corrcoef(noise.flatten(), other.flatten())[0, 1]) < 4.5 / (2 * 24**3) ** 0.5


@pytest.mark.parametrize(
    ("probability", "applied"),
    [
        (0.2, lambda d: d.angles is not None),
        (0.16, lambda d: d.zoom is not None),
        (0.15, lambda d: d.sigmas is not None),
        (0.5, lambda d: d.factor is not None),
        (0.5, lambda d: d.offset is not None),
        (0.15, lambda d: d.noise_std is not None),
        *((0.5, lambda d, axis=axis: axis in d.flips) for axis in range(3)),
    ],
    ids=["rotate", "zoom", "smooth", "scale", "shift", "noise", "flip 0", "flip 1", "flip 2"],
)
def test_a_step_is_drawn_with_the_published_probability(
    draws: list[Draw], probability: float, applied: Callable[[Draw], bool]
):
    share = np.mean([applied(d) for d in draws])
    assert abs(share - probability) < 4.5 * (probability * (1 - probability) / len(draws)) ** 0.5


def test_steps_are_drawn_independently(draws: list[Draw]):
    columns = [
        [value is not None for value in (d.angles, d.zoom, d.sigmas, d.factor, d.offset, d.noise_std)]
        + [axis in d.flips for axis in range(3)]
        for d in draws
    ]
    correlation = np.corrcoef(np.array(columns, float), rowvar=False)
    assert np.abs(correlation - np.eye(9)).max() < 4.5 / len(draws) ** 0.5


@pytest.mark.parametrize(
    ("low", "high", "values"),
    [
        *((-0.3, 0.3, lambda d, axis=axis: d.angles and d.angles[axis]) for axis in range(3)),
        (0.8, 1.2, lambda d: d.zoom),
        *((0.5, 1.15, lambda d, axis=axis: d.sigmas and d.sigmas[axis]) for axis in range(3)),
        (-0.3, 0.3, lambda d: d.factor),
        (-0.1, 0.1, lambda d: d.offset),
        (0, 0.01, lambda d: d.noise_std),
    ],
    ids=["angle 0", "angle 1", "angle 2", "zoom", "sigma 0", "sigma 1", "sigma 2", "factor", "offset", "noise"],
)
def test_parameters_are_uniform_in_the_published_range(
    draws: list[Draw], low: float, high: float, values: Callable[[Draw], float | None]
):
    drawn = np.array([values(d) for d in draws if values(d) is not None])
    assert low <= drawn.min() < drawn.max() <= high
    assert kstest(drawn, "uniform", args=(low, high - low)).pvalue > 1e-4


@pytest.mark.parametrize("name", ["angles", "sigmas"])
def test_axes_are_drawn_independently(draws: list[Draw], name: str):
    drawn = np.array([getattr(d, name) for d in draws if getattr(d, name) is not None])
    for first, second in combinations(range(3), 2):
        assert abs(np.corrcoef(drawn[:, first], drawn[:, second])[0, 1]) < 4.5 / len(drawn) ** 0.5


def test_noise_std_is_what_monai_draws():
    """MONAI draws the width too (``sample_std``), and keeps only the noise."""
    transform = RandGaussianNoise(prob=1.0, std=0.01).set_random_state(0)
    widths = [(transform(torch.zeros(1000)), float(transform.noise.std()))[1] for _ in range(500)]
    assert kstest(widths, "uniform", args=(0, 0.01)).pvalue > 1e-4


def test_draws_depend_on_the_generator_and_travel(draws: list[Draw]):
    assert [draw(np.random.default_rng(5)) for _ in range(3)] == [draw(np.random.default_rng(5))] * 3
    assert len(set(draws)) > 0.8 * len(draws)  # in 12 of 100 nothing is drawn but the flips
    noises = [d.noise_seed for d in draws if d.noise_std is not None]
    assert len(set(noises)) > 0.99 * len(noises)
    for d in [*draws[:50], EVERYTHING]:
        assert pickle.loads(pickle.dumps(d)) == d
        assert len(pickle.dumps(d)) < 500
    values = [value for d in draws for value in vars(d).values()]
    numbers = [number for value in values for number in (value if isinstance(value, tuple) else [value])]
    assert {type(number) for number in numbers} == {int, float, type(None)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("axes", [(1, 1), (1, 3)], ids=["contiguous", "view"])
@pytest.mark.parametrize("step", STEPS)
def test_the_result_is_new_contiguous_and_the_same_each_time(step: str, axes: tuple[int, int], dtype: torch.dtype):
    image, label = sample((2, 24, 20, 12), dtype)
    views = image.transpose(*axes), label.transpose(*axes)
    kept = image.clone(), label.clone()
    first, second = augment(*views, STEPS[step]), augment(*views, STEPS[step])
    for result, again, view, kind in zip(first, second, views, (torch.float32, torch.uint8), strict=True):
        assert torch.equal(result, again)
        assert result.dtype == kind and result.shape == view.shape and result.is_contiguous()
        result.zero_()
    assert torch.equal(image, kept[0]) and torch.equal(label, kept[1])


def test_different_draws_give_different_results():
    image, label = sample((1, 16, 16, 16))
    changes = {
        "angles": (0.2, -0.1, 0.29),
        "zoom": 1.1,
        "sigmas": (0.6, 0.8, 1.0),
        "factor": 0.19,
        "offset": 0.1,
        "noise_std": 0.009,
        "noise_seed": 8,
        "flips": (0,),
    }
    results = [augment(image, label, replace(EVERYTHING, **{name: value})) for name, value in changes.items()]
    for (image_1, _), (image_2, _) in combinations([augment(image, label, EVERYTHING), *results], 2):
        assert not torch.equal(image_1, image_2)


@pytest.mark.parametrize("step", STEPS)
def test_float16_is_computed_in_float32(step: str):
    image, label = sample((1, 16, 16, 16), torch.float16)
    half, full = augment(image, label, STEPS[step]), augment(image.float(), label, STEPS[step])
    assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_reads_a_read_only_memory_map(tmp_path: Path, dtype: type):
    """A write into one would end the process."""
    image, label = sample((1, 20, 20, 20))
    np.save(tmp_path / "image.npy", image.numpy().astype(dtype))
    np.save(tmp_path / "label.npy", label.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of memory that it must not write
        views = [torch.from_numpy(np.load(tmp_path / f"{key}.npy", "r"))[:, 2:18, 2:18, 2:18] for key in KEYS]
    for step in STEPS.values():
        results = augment(*views, step)
        for result, expected in zip(results, augment(*(view.clone() for view in views), step), strict=True):
            assert torch.equal(result, expected)
            result.add_(1)
