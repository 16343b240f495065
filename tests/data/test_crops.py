"""Masks grown by 48 binary dilations, centres as MONAI draws them, patches as MONAI pads and
cuts.
"""

from __future__ import annotations

from functools import partial
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


def test_masks_of_random_labels():
    """There are a few boxes of several classes, anywhere, up to 130 voxels along an axis."""
    rng = np.random.default_rng(1)
    shape = rng.integers(1, [40, 60, 131])
    label = np.full(shape, rng.integers(0, 5), np.uint8)
    for _ in range(4):
        first = rng.integers(0, shape)
        size = rng.integers(1, 2 if rng.random() < 0.5 else 60, 3)
        label[tuple(map(slice, first, first + size))] = rng.integers(0, 5)
    check_masks(label, 5)


# Centres


def test_centres_are_drawn_as_monai_draws_them(monkeypatch):
    """Each present class is as likely as another, then each voxel of its mask."""
    monkeypatch.setattr(crops, "grown_mask", partial(grown_mask, steps=2))
    label, count = label_of((9, 8, 7), (np.s_[6:, 6:, :2], 1), (np.s_[1, 1, 1:3], 4)), 4000
    masks = np.stack([binary_dilation(label == value, iterations=2) for value in range(5)])
    present = [mask / mask.sum() for mask in masks if mask.any()]
    expected = count * sum(present) / len(present)
    monais = RandCropByLabelClasses((1, 1, 1), ratios=[1] * 5, num_samples=count, warn=False)
    monais.set_random_state(0).randomize(torch.from_numpy(masks))
    rng, ours = np.random.default_rng(0), crop_masks(label, 5)

    def statistic(centres: list, expected: np.ndarray) -> float:
        counts = np.zeros(label.shape)
        np.add.at(counts, tuple(np.array(centres).T), 1)
        return chi2.sf(((counts - expected) ** 2 / expected).sum(), label.size - 1)

    centres = [ours.draw_centre(rng) for _ in range(count)]
    assert statistic(monais.centers, expected) > 1e-6 < statistic(centres, expected)
    # So many draws do tell distributions apart.
    assert statistic(centres, np.full(label.shape, count / label.size)) < 1e-6


# Patches


def published_padding(volume: np.ndarray, patch_size: Shape, *modes: str) -> np.ndarray:
    """Pad (channels, x, y, z) to the patch's size; first a volume that cannot be reflected."""
    sizes = [size // 3 + 1 for size in patch_size], patch_size
    for size, mode in zip(sizes, modes, strict=True):
        volume = SpatialPad(size, mode=mode)(volume)
    return np.asarray(volume)


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
    padded = published_padding(image.astype(np.float32), patch_size, "edge", "reflect")
    padded_label = published_padding(label[None], patch_size, "constant", "constant")
    before = np.argwhere(padded_label[0]).min(0)  # no label is background
    for centre in np.random.default_rng(1).integers(0, shape, (8, 3)):
        moved = correct_crop_centers((centre + before).tolist(), patch_size, padded.shape[1:])
        start = np.subtract(moved, np.array(patch_size) // 2)
        region = (slice(None), *map(slice, start, start + patch_size))
        patch, its_label = cut_patch(image, label, centre, patch_size)
        assert patch.shape == (2, *patch_size) and its_label.shape == (1, *patch_size)
        assert np.array_equal(patch, padded[region])
        assert np.array_equal(its_label, padded_label[region])


def test_patches_are_copies_of_the_same_type(tmp_path: Path):
    """They are contiguous and writable, though the file's array is mapped read-only."""
    maps = []
    for name, array in zip(("image", "label"), volume((12, 11, 10)), strict=True):
        np.save(tmp_path / f"{name}.npy", np.asfortranarray(array))
        maps.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    for patch_size in ((12, 11, 10), (4, 20, 6)):
        patches = cut_patch(*maps, (5, 5, 5), patch_size)
        for array, source, dtype in zip(patches, maps, (np.float16, np.uint8), strict=True):
            assert type(array) is np.ndarray and array.dtype == dtype
            assert array.flags.c_contiguous and array.flags.writeable
            assert not np.shares_memory(array, source)
