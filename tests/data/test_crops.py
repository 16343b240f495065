"""Masks grown by 48 binary dilations, centres as MONAI draws them, patches as MONAI pads and
cuts.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import RandCropByLabelClasses, SpatialPad
from monai.transforms.utils import correct_crop_centers
from scipy.ndimage import binary_dilation
from scipy.stats import chi2
from toys import stored_mask

from dints.data import crops
from dints.data.crops import (
    CROP_DILATION,
    CropMasks,
    bounding_box,
    crop_masks,
    cut_patch,
    grown_mask,
)

FALSE_ALARM = 1e-9  # the chance that a chi-square test refuses draws of the right distribution
Shape = tuple[int, ...]


def label_of(shape: Shape, *blocks: tuple, fill: int = 0) -> np.ndarray:
    """Make a label of pairs of region and value, one over the other."""
    label = np.full(shape, fill, np.uint8)
    for region, value in blocks:
        label[region] = value
    return label


# Grown masks


def check_masks(label: np.ndarray, num_classes: int) -> CropMasks:
    masks = crop_masks(label, num_classes)
    for value in range(num_classes):
        expected = binary_dilation(label == value, iterations=CROP_DILATION)
        assert np.array_equal(stored_mask(masks, value, label.shape), expected), value
        box = bounding_box(expected)
        assert np.array_equal(masks.boxes[value], np.zeros((2, 3)) if box is None else box), value
        full = box is None or expected[tuple(slice(*span) for span in box.T)].all()
        assert (masks.starts[value] == -1) == full, value  # a full box has no bits
    assert masks.present.tolist() == np.unique(label).tolist()
    assert masks.bits.nbytes <= num_classes * (label.size // 8 + 1) + 1
    return masks


LABELS = {
    "a corner, a border, two parts, an absent class": label_of(
        (120, 70, 9),
        *((np.s_[0, 0, 0], 1), (np.s_[60:75, 65:, 3:6], 2)),
        *((np.s_[40, 30, 4], 4), (np.s_[110, 5, 8], 4)),
    ),
    "one class only": label_of((30, 40, 50), fill=1),
    # A class surrounds a hole, whose middle is too far away from it.
    "a gap wider than the growth": label_of(
        (106, 105, 104), (np.s_[3:103, 2:102, :101], 0), fill=1
    ),
    "thin": label_of((3, 1, 125), (np.s_[1, 0, 25], 1)),
}


@pytest.mark.parametrize("name", LABELS)
def test_class_masks_are_48_binary_dilations(name):
    check_masks(LABELS[name], 5)


@pytest.mark.parametrize("seed", range(2))
def test_masks_of_random_labels(seed):
    """There are a few boxes of several classes, anywhere, up to 130 voxels along an axis."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, [[131, 60, 40], [40, 60, 131]][seed])
    label = np.full(shape, rng.integers(0, 5), np.uint8)
    for _ in range(4):
        first = rng.integers(0, shape)
        size = rng.integers(1, 2 if rng.random() < 0.5 else 60, 3)
        label[tuple(map(slice, first, first + size))] = rng.integers(0, 5)
    check_masks(label, 5)


# Centres


def dilated(label: np.ndarray, num_classes: int, steps: int) -> np.ndarray:
    """Make the published masks (classes, x, y, z): one-hot, grown."""
    masks = np.zeros((num_classes, *label.shape), np.uint8)
    for value in np.unique(label):
        masks[value] = binary_dilation(label == value, iterations=steps)
    return masks


def published_padding(volume: np.ndarray, patch_size: Shape, modes: tuple[str, str]) -> np.ndarray:
    """Pad (channels, x, y, z) to the patch's size; first a volume that cannot be reflected."""
    sizes = [size // 3 + 1 for size in patch_size], patch_size
    for size, mode in zip(sizes, modes, strict=True):
        volume = SpatialPad(size, mode=mode)(volume)
    return np.asarray(volume)


IMAGE, LABEL = ("edge", "reflect"), ("constant", "constant")


class Places:
    """The centres to which MONAI moves those of patches that would stick out of a volume."""

    def __init__(self, masks: np.ndarray, patch_size: Shape):
        self.masks, self.patch_size = masks, patch_size
        self.padded = published_padding(masks, patch_size, LABEL)
        inside = published_padding(np.ones_like(masks[:1]), patch_size, LABEL)[0]
        self.before = np.argwhere(inside).min(0)
        self.moved = cache(self._moved)

    def _moved(self, *centre: int) -> Shape:
        centre, shape = (centre + self.before).tolist(), self.padded.shape[1:]
        return tuple(correct_crop_centers(centre, self.patch_size, shape))

    def probabilities(self) -> np.ndarray:
        """Sum up by MONAI's definition: each present class, then each voxel of its mask."""
        present = [mask / mask.sum() for mask in self.masks.astype(float) if mask.any()]
        of_voxels, moved = sum(present) / len(present), np.zeros(self.padded.shape[1:])
        for voxel in np.ndindex(of_voxels.shape):
            moved[self.moved(*voxel)] += of_voxels[voxel]
        assert moved.sum() == pytest.approx(1)
        return moved

    def monais(self, count: int) -> list[Shape]:
        ratios = [1] * len(self.masks)
        crop = RandCropByLabelClasses(self.patch_size, ratios=ratios, num_samples=count, warn=False)
        crop.set_random_state(0).randomize(torch.from_numpy(self.padded))
        return crop.centers

    def ours(self, masks: CropMasks, count: int) -> list[Shape]:
        rng = np.random.default_rng(0)
        return [self.moved(*masks.draw_centre(rng)) for _ in range(count)]


def check_centres(centres: list[Shape], probability: np.ndarray) -> None:
    """Compare drawn centres by chi-square; those expected fewer than five times count together."""
    counts = np.zeros(probability.shape)
    np.add.at(counts, tuple(np.array(centres).T), 1)
    assert counts[probability == 0].sum() == 0
    expected = probability * len(centres)
    rare = expected < 5
    pairs = list(zip(counts[~rare], expected[~rare], strict=True))
    if expected[rare].sum() >= 5:
        pairs.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum((count - mean) ** 2 / mean for count, mean in pairs)
    assert len(pairs) == 1 or chi2.sf(statistic, len(pairs) - 1) > FALSE_ALARM


def blocks(shape: Shape, *regions: tuple[slice, ...]) -> np.ndarray:
    return label_of(shape, *zip(regions, range(1, 9), strict=False))


def scattered(shape: Shape, values: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, values, shape).astype(np.uint8)


DRAWS = {
    # label, classes, patch size, steps of growth
    "absent classes": (blocks((9, 8, 7), np.s_[:0], np.s_[6:, 6:, :2]), 5, (4, 5, 3), 2),
    "smaller along two axes": (
        *(blocks((3, 12, 4), np.s_[2, 2:5, 1], np.s_[:, 9:, :2]), 3, (9, 5, 7), 2),
    ),
    "255 classes": (scattered((5, 4, 6), 254), 255, (4, 5, 5), 1),
}


@pytest.mark.parametrize("case", DRAWS)
def test_centres_are_drawn_as_monai_draws_them(monkeypatch, case):
    label, num_classes, patch_size, steps = DRAWS[case]
    monkeypatch.setattr(crops, "grown_mask", partial(grown_mask, steps=steps))
    places = Places(dilated(label, num_classes, steps), patch_size)
    probability = places.probabilities()
    check_centres(places.monais(1000), probability)
    ours = places.ours(crop_masks(label, num_classes), 4000)
    check_centres(ours, probability)
    uniform = np.where(probability > 0, 1 / np.count_nonzero(probability), 0)
    if not np.allclose(uniform, probability):
        with pytest.raises(AssertionError):  # so many draws do tell distributions apart
            check_centres(ours, uniform)


# Patches


def volume(shape: Shape, num_channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(num_channels, *shape)).astype(np.float16)
    return image, rng.integers(1, 5, shape).astype(np.uint8)


def test_image_and_label_are_padded_alike():
    """The two steps of the image's padding do not shift it where gaps are odd."""
    for size in (1, 2, 7, 16, 33):
        for count in range(1, size + 2):
            label = np.arange(1, count + 1, dtype=np.uint8).reshape(count, 1, 1)
            image = label[None].astype(np.float16)
            patch, its_label = cut_patch(image, label, (count // 2, 0, 0), (size, 1, 1))
            labelled = its_label > 0
            assert labelled.sum() == min(size, count)
            assert np.array_equal(patch[labelled], its_label[labelled])
            assert np.isin(patch, label).all()


@pytest.mark.parametrize("patch_size", [(16, 16, 16), (9, 12, 7)], ids=str)
@pytest.mark.parametrize("shape", [(20, 20, 20), (3, 14, 2)], ids=str)
def test_patches_are_monais_of_the_padded_volume(shape, patch_size):
    image, label = volume(shape)
    places = Places(label[None], patch_size)
    padded = published_padding(image.astype(np.float32), patch_size, IMAGE)
    for centre in np.random.default_rng(1).integers(0, shape, (8, 3)):
        start = np.subtract(places.moved(*centre), np.array(patch_size) // 2)
        region = (slice(None), *map(slice, start, start + patch_size))
        patch, its_label = cut_patch(image, label, centre, patch_size)
        assert patch.shape == (2, *patch_size) and its_label.shape == (1, *patch_size)
        assert np.array_equal(patch, padded[region])
        assert np.array_equal(its_label, places.padded[region])


@pytest.mark.parametrize("patch_size", [(12, 11, 10), (4, 20, 6)], ids=str)
def test_patches_are_copies_of_the_same_type(tmp_path: Path, patch_size):
    """They are contiguous and writable, though the file's array is mapped read-only."""
    image, label = map(np.asfortranarray, volume((12, 11, 10)))
    kept = image.copy(), label.copy()
    paths = tmp_path / "image.npy", tmp_path / "label.npy"
    for path, array in zip(paths, (image, label), strict=True):
        np.save(path, array)
    image, label = (np.load(path, mmap_mode="r") for path in paths)
    patch, its_label = cut_patch(image, label, (5, 5, 5), patch_size)
    for array, dtype in ((patch, np.float16), (its_label, np.uint8)):
        assert type(array) is np.ndarray and array.dtype == dtype
        assert array.flags.c_contiguous and array.flags.writeable
        assert not np.shares_memory(array, image) and not np.shares_memory(array, label)
    patch[:], its_label[:] = 7, 7
    assert np.array_equal(image, kept[0]) and np.array_equal(label, kept[1])
