"""The random chain: every step against MONAI's transform of that name, and its draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import published_data
import pytest
import torch
from monai.transforms import (
    AdjustContrast,
    Compose,
    MapTransform,
    RandSimulateLowResolution,
    ScaleIntensityFixedMean,
)
from scipy.stats import kstest
from toys import TASK

from dints.data import augmentation
from dints.data.augmentation import CHAINS, Step, chain, draw

SHAPE = (3, 19, 32, 10)
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
DRAWS = [*({name: value} for name, value in EVERYTHING.items()), {"zoom": 1.13}, EVERYTHING, {}]

KEYS = "image", "label"
# Of each step, how to read what MONAI's transform drew.
READ: dict[str, Callable[[MapTransform], object]] = {
    "rotate": lambda t: (t.rand_rotate.x, t.rand_rotate.y, t.rand_rotate.z),
    "zoom": lambda t: t.rand_zoom._zoom[0],
    "smooth": lambda t: (t.rand_smooth.x, t.rand_smooth.y, t.rand_smooth.z),
    "scale": lambda t: 1 + t.scaler.factor,
    "shift": lambda t: t.shifter._offset,
    "flip": lambda t: (0, 1, 2),
}


def published_transforms() -> dict[str, MapTransform | Compose]:
    """Make MONAI's transforms with the published arguments, but that all are always done."""
    transforms = published_data.sampling(TASK).transforms[2:11]
    for transform in transforms:
        transform.prob = 1.0
    *others, _ = transforms[:6]  # but noise
    return dict(zip(READ, [*others, Compose(transforms[6:])], strict=True))


def augment(image: torch.Tensor, label: torch.Tensor, drawn: dict) -> augmentation.Sample:
    """Do the drawn steps of the published chain."""
    return augmentation.augment(image, label, drawn, chain())


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> augmentation.Sample:
    """Make noise, and labels that change from voxel to voxel."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape, generator=generator).to(dtype)
    label = torch.randint(0, 5, (1, *shape[1:]), generator=generator, dtype=torch.uint8)
    return image, label


def check_against(
    transform: MapTransform | Compose, drawn: Callable[[], dict], shape: tuple[int, ...]
) -> bool:
    """Compare with MONAI's transform, given its draws; return whether the image changed."""
    image, label = sample(shape)
    expected = transform({"image": image, "label": label})
    ours = augment(image, label, drawn())
    same = torch.testing.assert_close
    same(ours[0], torch.as_tensor(expected["image"]), rtol=0, atol=1e-5)
    same(ours[1], torch.as_tensor(expected["label"]).to(torch.uint8), rtol=0, atol=0)
    return not torch.equal(ours[0], image)


# Steps


@pytest.mark.parametrize(
    ("step", "shape", "seeds"),
    # In 900,000 voxels some are so near to half-way that another order of operations would take
    # another label.
    [*((step, SHAPE, 4) for step in READ), ("rotate", (1, 96, 96, 96), 1)],
)
def test_a_step_gives_the_published_transforms_result(step, shape, seeds):
    transform, changed = published_transforms()[step], []
    for seed in range(seeds):  # larger and smaller zooms, angles and sigmas
        transform.set_random_state(seed)
        changed.append(check_against(transform, lambda: {step: READ[step](transform)}, shape))
    assert sum(changed) >= 0.75 * seeds  # a zoom by a fraction of a voxel is none


def test_steps_follow_each_other_as_published():
    """Noise, whose draws are not MONAI's, comes after scale and shift and before the flip."""
    transforms = published_transforms()
    whole = Compose([*transforms.values()])
    for seed in range(2):
        whole.set_random_state(seed)
        drawn = lambda: {name: READ[name](t) for name, t in transforms.items()}  # noqa: E731
        assert check_against(whole, drawn, SHAPE)
    image, label = sample((1, 16, 16, 16))
    noise = augment(torch.zeros_like(image), label, {"noise": (0.01, 7)})[0]
    drawn = {"flip": (2,), "noise": (0.01, 7), "shift": -0.1, "scale": 1.2}
    both = augment(image, label, drawn)[0]
    torch.testing.assert_close(both, (image * 1.2 - 0.1 + noise).flip(3))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_result_is_new_contiguous_and_the_same_each_time(tmp_path: Path, dtype):
    """Also of a view of a read-only memory map, where a write would end the process."""
    np.save(tmp_path / "image.npy", sample((2, 24, 20, 12))[0].numpy().astype(dtype))
    np.save(tmp_path / "label.npy", sample((2, 24, 20, 12))[1].numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of memory that it must not write
        maps = [torch.from_numpy(np.load(tmp_path / f"{key}.npy", "r")) for key in KEYS]
    views = [mapped[:, 2:18].transpose(1, 3) for mapped in maps]
    for drawn in DRAWS:
        first, second = augment(*views, drawn), augment(*views, drawn)
        full = augment(views[0].float(), views[1].clone(), drawn)  # float16 becomes float32
        kinds = torch.float32, torch.uint8
        for result, *others, view, kind in zip(first, second, full, views, kinds, strict=True):
            assert all(torch.equal(result, other) for other in others)
            assert result.dtype == kind and result.shape == view.shape and result.is_contiguous()
            result.zero_()


# Draws

# Of each step's parameters the published range.


# Of each step its probability and range, in the units of the publications.
TABLES = {
    "published": {
        **{"rotate": (0.2, -0.3, 0.3), "zoom": (0.16, 0.8, 1.2), "smooth": (0.15, 0.5, 1.15)},
        **{"scale": (0.5, 0.7, 1.3), "shift": (0.5, -0.1, 0.1), "noise": (0.15, 0, 0.01)},
    },
    "nnunet": {
        **{"rotate": (0.2, -np.pi / 6, np.pi / 6), "zoom": (0.2, 0.7, 1.4)},
        **{"noise": (0.1, 0, 0.1), "smooth": (0.2, 0.5, 1), "scale": (0.15, 0.75, 1.25)},
        **{"contrast": (0.15, 0.75, 1.25), "lower_resolution": (0.25, 0.5, 1)},
        **{"inverted_gamma": (0.1, 0.7, 1.5), "gamma": (0.3, 0.7, 1.5)},
    },
}


@pytest.mark.parametrize("name", CHAINS)
def test_steps_have_their_published_order_probabilities_and_ranges(name: str):
    found = {step.name: (step.probability, step.draw.low, step.draw.high) for step in CHAINS[name]}
    assert found == TABLES[name] and [*found] == [*TABLES[name]]


def test_steps_are_drawn_uniformly_and_independently_by_their_probabilities():
    steps = [step for step in chain() if step.name in ("rotate", "zoom", "noise", "flip")]
    draws = [draw(seed, steps) for seed in range(1000)]
    assert draw(5, steps) == draws[5]
    shares = [["rotate" in d, "zoom" in d, *(a in d["flip"] for a in range(3))] for d in draws]
    for share, probability in zip(np.mean(shares, axis=0), (0.2, 0.16, *[0.5] * 3), strict=True):
        variance = probability * (1 - probability) / len(draws)
        assert abs(share - probability) < 4.5 * variance**0.5
    angles = np.array([d["rotate"] for d in draws if "rotate" in d])
    zooms = np.array([d["zoom"] for d in draws if "zoom" in d])
    for drawn, least in ((np.array(shares, float), len(draws)), (angles, len(angles))):
        correlation = np.corrcoef(drawn, rowvar=False) - np.eye(drawn.shape[1])
        assert np.abs(correlation).max() < 4.5 / least**0.5
    for values, low, high in (*((axis, -0.3, 0.3) for axis in angles.T), (zooms, 0.8, 1.2)):
        assert kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-4
    seeds = [d["noise"][1] for d in draws if "noise" in d]
    assert len(set(seeds)) > 0.99 * len(seeds)


def test_one_more_step_is_an_entry_that_changes_no_others_draws(monkeypatch):
    more = Step(
        "invert", 0.5, lambda rng: rng.uniform(1, 2), lambda image, label, v: (v - image, label)
    )
    table, draws = CHAINS["published"], [draw(seed, chain()) for seed in range(30)]
    monkeypatch.setitem(CHAINS, "published", (*table[:3], more, *table[3:]))
    longer = [draw(seed, chain()) for seed in range(30)]
    assert 5 < sum(d.pop("invert", None) is not None for d in longer) < 25 and longer == draws
    image, label = sample((1, 8, 8, 8))
    shifted = augment(image, label, {"invert": 2.0, "shift": 0.5})[0]
    torch.testing.assert_close(shifted, 2 - image + 0.5)


@pytest.mark.parametrize("name", CHAINS)
def test_flips_are_drawn_along_the_given_axes_only(name: str):
    for seed in range(12):
        free = draw(seed, chain(name))
        for axes in ((0, 2), ()):
            flip = tuple(axis for axis in free["flip"] if axis in axes)
            assert draw(seed, chain(name, axes)) == {**free, "flip": flip}


# nnU-Net's chain

# Each step in MONAI's words; it sees one value of its range.
FIXED = {"preserve_range": True, "fixed_mean": True, "channel_wise": True}
NNUNET = {
    "contrast": lambda value: ScaleIntensityFixedMean(value - 1, **FIXED),
    "gamma": lambda value: AdjustContrast(value, retain_stats=True),
    "inverted_gamma": lambda value: AdjustContrast(value, invert_image=True, retain_stats=True),
}


def of_nnunet(name: str, value: object, image: torch.Tensor) -> torch.Tensor:
    label = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
    result, kept = augmentation.augment(image, label, {name: value}, chain("nnunet"))
    assert torch.equal(kept, label)
    assert result.shape == image.shape and result.dtype == torch.float32
    return result


@pytest.mark.parametrize("name", NNUNET)
def test_intensities_change_as_in_monai_channel_by_channel(name: str):
    image = 3 * sample((1, 12, 10, 14))[0] - 1
    for value in (0.75, 1.3):
        expected = torch.as_tensor(NNUNET[name](value)(image))
        torch.testing.assert_close(of_nnunet(name, value, image), expected, rtol=1e-4, atol=1e-4)
    image = torch.cat([image, 50 + 7 * image.flip(1)])
    both = of_nnunet(name, 1.2, image)
    for channel in (0, 1):
        alone = of_nnunet(name, 1.2, image[channel : channel + 1])[0]
        torch.testing.assert_close(both[channel], alone)


@pytest.mark.parametrize("step", CHAINS["nnunet"], ids=lambda step: step.name)
def test_an_image_without_contrast_stays_finite(step: Step):
    for seed in range(5):
        drawn = step.draw(np.random.default_rng(seed))
        assert of_nnunet(step.name, drawn, torch.full((1, 8, 9, 10), -3.0)).isfinite().all()


@pytest.mark.parametrize("factor", [0.5, 0.7, 0.97])
def test_a_lower_resolution_is_monais(factor: float):
    zoom = {"downsample_mode": "nearest-exact", "zoom_range": (factor, factor)}
    transform = RandSimulateLowResolution(1.0, **zoom).set_random_state(0)
    image = sample((1, 20, 16, 24))[0]
    found = of_nnunet("lower_resolution", factor, image)
    expected = torch.as_tensor(transform(image))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, image)


def test_noise_is_relative_to_the_patch():
    image = torch.randn(1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    changes = [of_nnunet("noise", (0.04, 3), s * image) - s * image for s in (1, 50)]
    assert abs(changes[0].std() - 0.2) < 0.01
    torch.testing.assert_close(changes[1], 50 * changes[0], rtol=1e-3, atol=1e-3)
