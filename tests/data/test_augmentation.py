"""The random chain: every step against MONAI's transform of that name, and what is drawn for it."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import (
    AdjustContrast,
    Compose,
    MapTransform,
    RandFlipd,
    RandGaussianNoise,
    RandGaussianSmoothd,
    RandRotated,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSimulateLowResolution,
    RandZoomd,
    ScaleIntensityFixedMean,
)
from scipy.stats import kstest

from dints.data import augmentation
from dints.data.augmentation import CHAINS, Step, chain, draw

SHAPES = [(1, 32, 32, 32), (1, 24, 40, 16), (3, 19, 32, 10)]
EVERYTHING = {
    "rotate": (0.2, -0.1, 0.3),
    "zoom": 0.9,
    "smooth": (0.6, 0.8, 1.1),
    "scale": 1.2,
    "shift": -0.1,
    "noise": (0.01, 7),
    "flip": (0, 2),
}
# Each by itself, zooms to either side, all, and none.
DRAWS = [{name: value} for name, value in EVERYTHING.items()] + [{"zoom": 1.13}, {"flip": ()}, EVERYTHING, {}]

# MONAI's transforms with the published arguments, each with how to read what it drew.
KEYS, MODES = ["image", "label"], ["bilinear", "nearest"]
PUBLISHED: dict[str, tuple[Callable[[], MapTransform], Callable[[MapTransform], dict]]] = {
    "rotate": (
        lambda: RandRotated(KEYS, range_x=0.3, range_y=0.3, range_z=0.3, mode=MODES, keep_size=True, prob=1.0),
        lambda t: {"rotate": (t.rand_rotate.x, t.rand_rotate.y, t.rand_rotate.z)},
    ),
    "zoom": (
        lambda: RandZoomd(
            KEYS, min_zoom=0.8, max_zoom=1.2, mode=["trilinear", "nearest"], align_corners=[True, None], prob=1.0
        ),
        lambda t: {"zoom": t.rand_zoom._zoom[0]},
    ),
    "smooth": (
        lambda: RandGaussianSmoothd(["image"], sigma_x=(0.5, 1.15), sigma_y=(0.5, 1.15), sigma_z=(0.5, 1.15), prob=1.0),
        lambda t: {"smooth": (t.rand_smooth.x, t.rand_smooth.y, t.rand_smooth.z)},
    ),
    "scale": (lambda: RandScaleIntensityd(["image"], 0.3, prob=1.0), lambda t: {"scale": 1 + t.scaler.factor}),
    "shift": (lambda: RandShiftIntensityd(["image"], 0.1, prob=1.0), lambda t: {"shift": t.shifter._offset}),
    **{
        f"flip {axis}": (
            lambda axis=axis: RandFlipd(KEYS, spatial_axis=axis, prob=1.0),
            lambda t: {"flip": (t.flipper.spatial_axis,)},
        )
        for axis in range(3)
    },
}


@pytest.fixture(scope="module")
def draws() -> list[dict]:
    return [draw(seed, chain()) for seed in range(10000)]


def augment(image: torch.Tensor, label: torch.Tensor, drawn: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what was drawn of the published chain."""
    return augmentation.augment(image, label, drawn, chain())


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Make noise, and labels that change from voxel to voxel."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape, generator=generator).to(dtype)
    return image, torch.randint(0, 5, (1, *shape[1:]), generator=generator, dtype=torch.uint8)


def check_against(transform: MapTransform | Compose, drawn: Callable[[], dict], shape: tuple[int, ...]) -> bool:
    """Compare ours with MONAI's, given what ``transform`` has drawn after it ran; tell whether the image changed."""
    image, label = sample(shape)
    expected = transform({"image": image, "label": label})
    ours = augment(image, label, drawn())
    torch.testing.assert_close(ours[0], torch.as_tensor(expected["image"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1], torch.as_tensor(expected["label"]).to(torch.uint8), rtol=0, atol=0)
    return not torch.equal(ours[0], image)


# What is done


@pytest.mark.parametrize(
    ("step", "shape", "seeds"),
    # In 900,000 voxels some are so near to half-way that another order of operations would take another label.
    [*((step, shape, 8) for step in PUBLISHED for shape in SHAPES), ("rotate", (1, 96, 96, 96), 4)],
)
def test_a_step_gives_what_the_published_transform_gives(step: str, shape: tuple[int, ...], seeds: int):
    make, read = PUBLISHED[step]
    transform, changed = make(), []
    for seed in range(seeds):  # larger and smaller zooms, angles and sigmas
        transform.set_random_state(seed)
        changed.append(check_against(transform, lambda: read(transform), shape))
    assert sum(changed) >= 0.75 * seeds  # a zoom by a fraction of a voxel is none


@pytest.mark.parametrize("zoom", [0.8, 0.93, 0.9999, 1.0001, 1.05, 1.2])
def test_zooms_to_sizes_that_differ_by_an_odd_number_of_voxels_or_not_at_all(zoom: float):
    make, _ = PUBLISHED["zoom"]
    transform = make()
    transform.rand_zoom.min_zoom = transform.rand_zoom.max_zoom = (zoom,)
    changed = check_against(transform, lambda: {"zoom": zoom}, (1, 31, 24, 10))
    assert changed == (zoom != 1.0001)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_follow_each_other_as_published(shape: tuple[int, ...]):
    steps = [(make(), read) for make, read in PUBLISHED.values()]
    chain = Compose([transform for transform, _ in steps])

    def drawn() -> dict:
        values = {name: value for transform, read in steps for name, value in read(transform).items()}
        return {**values, "flip": (0, 1, 2)}

    for seed in range(4):
        assert check_against(chain.set_random_state(seed), drawn, shape)


def test_noise_comes_after_scale_and_shift_and_before_the_flip():
    image, label = sample((1, 16, 16, 16))
    noise = augment(torch.zeros_like(image), label, {"noise": (0.01, 7)})[0]
    both = augment(image, label, {"flip": (2,), "noise": (0.01, 7), "shift": -0.1, "scale": 1.2})[0]
    torch.testing.assert_close(both, (image * 1.2 - 0.1 + noise).flip(3))


def test_noise_is_gaussian_and_of_the_drawn_width():
    zeros, label = torch.zeros(2, 24, 24, 24), torch.zeros(1, 24, 24, 24, dtype=torch.uint8)
    noise = augment(zeros, label, {"noise": (0.004, 3)})[0]
    assert kstest(noise.flatten().numpy(), "norm", args=(0, 0.004)).pvalue > 1e-4
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 4.5 / 24**1.5
    other = augment(zeros, label, {"noise": (0.004, 4)})[0]
    assert abs(np.corrcoef(noise.flatten(), other.flatten())[0, 1]) < 4.5 / (2 * 24**3) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("axes", [(1, 1), (1, 3)], ids=["contiguous", "view"])
@pytest.mark.parametrize("drawn", DRAWS, ids=str)
def test_the_result_is_new_contiguous_and_the_same_each_time(drawn: dict, axes: tuple[int, int], dtype: torch.dtype):
    image, label = sample((2, 24, 20, 12), dtype)
    views = image.transpose(*axes), label.transpose(*axes)
    kept = image.clone(), label.clone()
    first, second = augment(*views, drawn), augment(*views, drawn)
    full = augment(views[0].float(), views[1], drawn)  # float16 is computed in float32
    for result, again, other, view, kind in zip(first, second, full, views, (torch.float32, torch.uint8), strict=True):
        assert torch.equal(result, again) and torch.equal(result, other)
        assert result.dtype == kind and result.shape == view.shape and result.is_contiguous()
        result.zero_()
    assert torch.equal(image, kept[0]) and torch.equal(label, kept[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_reads_a_read_only_memory_map(tmp_path: Path, dtype: type):
    """A write into one would end the process."""
    image, label = sample((1, 20, 20, 20))
    np.save(tmp_path / "image.npy", image.numpy().astype(dtype))
    np.save(tmp_path / "label.npy", label.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of memory that it must not write
        views = [torch.from_numpy(np.load(tmp_path / f"{key}.npy", "r"))[:, 2:18, 2:18, 2:18] for key in KEYS]
    for drawn in DRAWS:
        results = augment(*views, drawn)
        for result, expected in zip(results, augment(*(view.clone() for view in views), drawn), strict=True):
            assert torch.equal(result, expected)
            result.add_(1)


# What is drawn

AXES = range(3)
PROBABILITIES = {"rotate": 0.2, "zoom": 0.16, "smooth": 0.15, "scale": 0.5, "shift": 0.5, "noise": 0.15}
# Of each step's parameters the published range.
RANGES = {
    **{f"rotate {axis}": (-0.3, 0.3, lambda d, axis=axis: d["rotate"][axis]) for axis in AXES},
    "zoom": (0.8, 1.2, lambda d: d["zoom"]),
    **{f"smooth {axis}": (0.5, 1.15, lambda d, axis=axis: d["smooth"][axis]) for axis in AXES},
    "scale": (0.7, 1.3, lambda d: d["scale"]),
    "shift": (-0.1, 0.1, lambda d: d["shift"]),
    "noise": (0, 0.01, lambda d: d["noise"][0]),
}


def test_steps_are_drawn_independently_and_with_their_published_probabilities(draws: list[dict]):
    columns = [[name in d for name in PROBABILITIES] + [axis in d["flip"] for axis in AXES] for d in draws]
    for share, probability in zip(np.mean(columns, axis=0), [*PROBABILITIES.values(), 0.5, 0.5, 0.5], strict=True):
        assert abs(share - probability) < 4.5 * (probability * (1 - probability) / len(draws)) ** 0.5
    correlation = np.corrcoef(np.array(columns, float), rowvar=False)
    assert np.abs(correlation - np.eye(9)).max() < 4.5 / len(draws) ** 0.5


@pytest.mark.parametrize("name", RANGES)
def test_parameters_are_uniform_in_the_published_range(draws: list[dict], name: str):
    low, high, value = RANGES[name]
    drawn = np.array([value(d) for d in draws if name.split()[0] in d])
    assert low <= drawn.min() < drawn.max() <= high
    assert kstest(drawn, "uniform", args=(low, high - low)).pvalue > 1e-4


@pytest.mark.parametrize("name", ["rotate", "smooth"])
def test_axes_are_drawn_independently(draws: list[dict], name: str):
    drawn = np.array([d[name] for d in draws if name in d])
    for first, second in combinations(AXES, 2):
        assert abs(np.corrcoef(drawn[:, first], drawn[:, second])[0, 1]) < 4.5 / len(drawn) ** 0.5


def test_monai_draws_the_width_of_noise_uniformly():
    """MONAI draws the width (``sample_std``), and keeps only the noise."""
    transform = RandGaussianNoise(prob=1.0, std=0.01).set_random_state(0)
    widths = [(transform(torch.zeros(1000)), float(transform.noise.std()))[1] for _ in range(500)]
    assert kstest(widths, "uniform", args=(0, 0.01)).pvalue > 1e-4


def test_draws_depend_on_the_seed_and_travel(draws: list[dict]):
    assert [draw(5, chain()) for _ in range(3)] == [draws[5]] * 3
    pickled = [pickle.dumps(d) for d in [*draws, EVERYTHING]]
    assert len(set(pickled)) > 0.8 * len(draws)  # in 12 of 100 nothing is drawn but the flips
    noises = [d["noise"][1] for d in draws if "noise" in d]
    assert len(set(noises)) > 0.99 * len(noises)
    assert max(map(len, pickled)) < 500
    values = [value for d in draws for value in d.values()]
    assert {type(n) for value in values for n in (value if isinstance(value, tuple) else [value])} == {int, float}


@pytest.mark.parametrize("place", [0, 3, 6])
def test_one_more_step_is_an_entry_that_changes_no_others_draws(monkeypatch, draws: list[dict], place: int):
    more = Step("invert", 0.5, lambda rng: rng.uniform(1, 2), lambda image, label, value: (value - image, label))
    table = CHAINS["published"]
    monkeypatch.setitem(CHAINS, "published", (*table[:place], more, *table[place:]))
    longer = [draw(seed, chain()) for seed in range(200)]
    assert 70 < sum("invert" in d for d in longer) < 130
    assert [{name: value for name, value in d.items() if name != "invert"} for d in longer] == draws[:200]
    image, label = sample((1, 8, 8, 8))
    torch.testing.assert_close(augment(image, label, {"invert": 2.0})[0], 2 - image)
    shifted = augment(image, label, {"invert": 2.0, "shift": 0.5})[0]
    torch.testing.assert_close(shifted, 2 - (image + 0.5) if place == len(table) else 2 - image + 0.5)


@pytest.mark.parametrize("name", CHAINS)
def test_flips_are_drawn_along_the_given_axes_only(name: str):
    free = [draw(seed, chain(name)) for seed in range(50)]
    for axes in ((0, 2), ()):
        for drawn, given in zip((draw(seed, chain(name, axes)) for seed in range(50)), free, strict=True):
            assert drawn == {**given, "flip": tuple(axis for axis in given["flip"] if axis in axes)}


# nnU-Net's chain

# What each step is in MONAI's words; each sees one value of its range.
NNUNET = {
    "contrast": lambda value: ScaleIntensityFixedMean(
        value - 1, preserve_range=True, fixed_mean=True, channel_wise=True
    ),
    "gamma": lambda value: AdjustContrast(value, retain_stats=True),
    "inverted_gamma": lambda value: AdjustContrast(value, invert_image=True, retain_stats=True),
}
NNUNET_RANGES = {
    "zoom": (0.2, 0.7, 1.4),
    "scale": (0.15, 0.75, 1.25),
    "contrast": (0.15, 0.75, 1.25),
    "lower_resolution": (0.25, 0.5, 1),
    "inverted_gamma": (0.1, 0.7, 1.5),
    "gamma": (0.3, 0.7, 1.5),
}


def of_nnunet(name: str, value: object, image: torch.Tensor) -> torch.Tensor:
    label = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
    result, kept = augmentation.augment(image, label, {name: value}, chain("nnunet"))
    assert torch.equal(kept, label) and result.shape == image.shape and result.dtype == torch.float32
    return result


@pytest.mark.parametrize("value", [0.75, 1.3])
@pytest.mark.parametrize("name", NNUNET)
def test_intensities_change_as_in_monai(name: str, value: float):
    image = 3 * sample((1, 12, 10, 14))[0] - 1
    expected = torch.as_tensor(NNUNET[name](value)(image))
    torch.testing.assert_close(of_nnunet(name, value, image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NNUNET)
def test_channels_change_by_themselves(name: str):
    image = torch.stack([sample((1, 8, 8, 8))[0][0], 50 + 7 * sample((1, 8, 8, 8))[0][0]])
    both = of_nnunet(name, 1.2, image)
    for channel in (0, 1):
        torch.testing.assert_close(both[channel], of_nnunet(name, 1.2, image[channel : channel + 1])[0])


@pytest.mark.parametrize("step", CHAINS["nnunet"], ids=lambda step: step.name)
def test_an_image_without_contrast_stays_finite(step: Step):
    for value in (0.0, -3.0):
        for seed in range(5):
            drawn = step.draw(np.random.default_rng(seed))
            assert of_nnunet(step.name, drawn, torch.full((1, 8, 9, 10), value)).isfinite().all()


@pytest.mark.parametrize("factor", [0.5, 0.7, 0.97])
def test_a_lower_resolution_is_monais(factor: float):
    transform = RandSimulateLowResolution(1.0, downsample_mode="nearest-exact", zoom_range=(factor, factor))
    transform.set_random_state(0)
    image = sample((1, 20, 16, 24))[0]
    expected = torch.as_tensor(transform(image))
    found = of_nnunet("lower_resolution", factor, image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, image)


def test_noise_is_relative_to_the_patch():
    image = torch.randn(1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    changes = [of_nnunet("noise", (0.04, 3), scale * image) - scale * image for scale in (1, 50)]
    assert abs(changes[0].std() - 0.2) < 0.01
    torch.testing.assert_close(changes[1], 50 * changes[0], rtol=1e-3, atol=1e-3)


def test_nnunets_steps_have_its_probabilities_and_ranges():
    drawn = [draw(seed, chain("nnunet")) for seed in range(10000)]
    for name, (probability, low, high) in NNUNET_RANGES.items():
        values = np.array([d[name] for d in drawn if name in d])
        assert abs(len(values) / len(drawn) - probability) < 4.5 * (probability * (1 - probability) / len(drawn)) ** 0.5
        assert kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-4
    angles = np.array([d["rotate"] for d in drawn if "rotate" in d])
    assert kstest(np.degrees(angles).flatten(), "uniform", args=(-30, 60)).pvalue > 1e-4
    variances = [d["noise"][0] for d in drawn if "noise" in d]
    assert kstest(variances, "uniform", args=(0, 0.1)).pvalue > 1e-4
