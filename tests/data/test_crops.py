"""Grown masks as 48 binary dilations make them, centres as MONAI draws them, patches as MONAI pads and cuts them."""

from __future__ import annotations

from functools import cache, partial
from itertools import product
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
from dints.data.crops import CROP_DILATION, CropMasks, bounding_box, crop_masks, cut_patch, grown_mask

FALSE_ALARM = 1e-9  # the chance that a chi-square test refuses draws of the right distribution


# Grown masks


def check_masks(label: np.ndarray, num_classes: int) -> CropMasks:
    masks = crop_masks(label, num_classes)
    for value in range(num_classes):
        expected = binary_dilation(label == value, iterations=CROP_DILATION)
        assert np.array_equal(stored_mask(masks, value, label.shape), expected), value
        box = bounding_box(expected)
        assert np.array_equal(masks.boxes[value], np.zeros((2, 3)) if box is None else box), value
        full = box is None or expected[tuple(slice(*span) for span in box.T)].all()
        assert (masks.starts[value] == -1) == full, value  # no bits where the box tells all
    assert masks.present.tolist() == np.unique(label).tolist()
    assert masks.bits.dtype == np.uint8
    assert masks.bits.nbytes <= num_classes * (label.size // 8 + 1) + 1
    return masks


def label_of(shape: tuple[int, ...], *blocks: tuple, fill: int = 0) -> np.ndarray:
    """Make a label of pairs of region and value, one over the other."""
    label = np.full(shape, fill, np.uint8)
    for region, value in blocks:
        label[region] = value
    return label


LABELS = {
    "a corner, a border, two parts, an absent class": label_of(
        (120, 70, 9), (np.s_[0, 0, 0], 1), (np.s_[60:75, 65:, 3:6], 2), (np.s_[40, 30, 4], 4), (np.s_[110, 5, 8], 4)
    ),
    "one class only": label_of((30, 40, 50), fill=1),
    "all voxels but one": label_of((30, 40, 50), (np.s_[15, 20, 25], 0), fill=1),
    # One class surrounds a hole, whose middle is too far away from it; the other one is in that hole.
    "a gap wider than the growth": label_of((128, 126, 120), (np.s_[5:125, 3:123, :118], 0), fill=1),
    **{f"corner {c}": label_of((60, 53, 57), (c, 1)) for c in product((0, -1), repeat=3)},
    **{
        f"thin, {shape}": label_of(shape, (np.s_[shape[0] // 3, shape[1] // 2, shape[2] // 5], 1))
        for shape in [(1, 1, 1), (130, 1, 1), (1, 120, 2), (3, 1, 125), (60, 61, 1), (2, 70, 64)]
    },
}


@pytest.mark.parametrize("name", LABELS)
def test_class_masks_are_48_binary_dilations(name):
    check_masks(LABELS[name], 5)


@pytest.mark.parametrize("seed", range(12))
def test_masks_of_random_labels(seed):
    """There are a few boxes of several classes, anywhere, up to 130 voxels along an axis; sparse ones too."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, [[131, 131, 40], [40, 131, 131], [131, 40, 131]][seed % 3]))
    label = np.full(shape, rng.integers(0, 5), np.uint8)
    for _ in range(rng.integers(1, 6)):
        first = rng.integers(0, shape)
        size = rng.integers(1, [2, 2, 2] if rng.random() < 0.5 else [60, 60, 60])
        label[tuple(map(slice, first, first + size))] = rng.integers(0, 5)
    check_masks(label, 5)


@pytest.mark.parametrize("steps", [1, 2, 5, 254 - 1])
def test_masks_grow_by_any_number_of_steps(steps):
    rng = np.random.default_rng(steps)
    for count in (1, 3, 200):
        present = np.zeros((17, 300, 6), bool)
        present[tuple(rng.integers(0, present.shape, (count, 3)).T)] = True
        box, mask = grown_mask(present, steps)
        ours = np.zeros_like(present)
        ours[tuple(slice(*span) for span in box.T)] = True if mask is None else mask
        assert np.array_equal(ours, binary_dilation(present, iterations=steps))


def test_masks_take_an_eighth_of_a_byte_a_voxel_at_most():
    """Every class lies everywhere here, but nowhere fills its box: far apart, on a diagonal."""
    label = np.zeros((200, 100, 24), np.uint8)
    for value in range(1, 12):
        label[value, value, value] = label[-value, -value, -value] = value
    masks = crop_masks(label, 12)
    assert (masks.starts[1:] >= 0).all()
    assert label.size < masks.bits.nbytes <= 11 * label.size / 8 + 12


# Centres


def dilated(label: np.ndarray, num_classes: int, steps: int) -> np.ndarray:
    """Make the published masks (classes, x, y, z): one-hot, grown."""
    masks = np.zeros((num_classes, *label.shape), np.uint8)
    for value in np.unique(label):
        masks[value] = binary_dilation(label == value, iterations=steps)
    return masks


def published_padding(volume: np.ndarray, patch_size: tuple[int, ...], modes: tuple[str, str]) -> np.ndarray:
    """Pad (channels, x, y, z): what is too small to be reflected is padded first, then all to the patch's size."""
    for size, mode in zip(([size // 3 + 1 for size in patch_size], patch_size), modes, strict=True):
        volume = SpatialPad(size, mode=mode)(volume)
    return np.asarray(volume)


IMAGE, LABEL = ("edge", "reflect"), ("constant", "constant")


class Places:
    """The centres to which MONAI moves those of patches that would stick out of a padded volume."""

    def __init__(self, masks: np.ndarray, patch_size: tuple[int, ...]):
        self.masks, self.patch_size = masks, patch_size
        self.padded = published_padding(masks, patch_size, LABEL)
        self.before = np.argwhere(published_padding(np.ones_like(masks[:1]), patch_size, LABEL)[0]).min(0)
        self.moved = cache(self._moved)

    def _moved(self, *centre: int) -> tuple[int, ...]:
        return tuple(correct_crop_centers((centre + self.before).tolist(), self.patch_size, self.padded.shape[1:]))

    def probabilities(self) -> np.ndarray:
        """Sum them up by MONAI's definition: each present class is equally likely, then each voxel of its mask."""
        present = [mask / mask.sum() for mask in self.masks.astype(float) if mask.any()]
        of_voxels, moved = sum(present) / len(present), np.zeros(self.padded.shape[1:])
        for voxel in np.ndindex(of_voxels.shape):
            moved[self.moved(*voxel)] += of_voxels[voxel]
        assert moved.sum() == pytest.approx(1)
        return moved

    def monais(self, count: int) -> list[tuple[int, ...]]:
        crop = RandCropByLabelClasses(self.patch_size, ratios=[1] * len(self.masks), num_samples=count, warn=False)
        crop.set_random_state(0).randomize(torch.from_numpy(self.padded))
        return crop.centers

    def ours(self, masks: CropMasks, count: int) -> list[tuple[int, ...]]:
        rng = np.random.default_rng(0)
        return [self.moved(*masks.draw_centre(rng)) for _ in range(count)]


def check_centres(centres: list[tuple[int, ...]], probability: np.ndarray) -> None:
    """Compare drawn centres by chi-square; what is expected fewer than five times is counted together."""
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


def blocks(shape: tuple[int, ...], *regions: tuple[slice, ...]) -> np.ndarray:
    return label_of(shape, *zip(regions, range(1, 9), strict=False))


def scattered(shape: tuple[int, ...], values: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, values, shape).astype(np.uint8)


DRAWS = {
    # label, classes, patch size, steps of growth
    "even patch": (blocks((9, 8, 7), np.s_[1:3, 2:5, 3:5], np.s_[6:, 6:, :2]), 3, (4, 4, 2), 2),
    "odd patch": (blocks((9, 8, 7), np.s_[1:3, 2:5, 3:5], np.s_[6:, 6:, :2]), 3, (5, 3, 3), 2),
    "a patch of one voxel": (blocks((9, 4, 5), np.s_[1:3, 2:4, 3:5], np.s_[6:, 3:, :2]), 3, (1, 1, 1), 1),
    "absent classes": (blocks((9, 8, 7), np.s_[:0], np.s_[6:, 6:, :2]), 5, (4, 5, 3), 2),
    "no background": (blocks((9, 8, 7), np.s_[:5], np.s_[5:]), 3, (4, 5, 3), 1),
    "a tiny label": (blocks((12, 9, 5), np.s_[10, 1, 2]), 2, (3, 4, 3), 1),
    "it fills the volume": (np.full((8, 7, 6), 2, np.uint8), 4, (3, 4, 5), 2),
    "as large as the patch": (blocks((4, 5, 9), np.s_[1, 1, 1]), 2, (4, 5, 4), 1),
    "smaller along one axis": (blocks((9, 8, 3), np.s_[1:3, 2:5, 1], np.s_[6:, 6:, :2]), 3, (4, 3, 9), 2),
    "smaller along two axes": (blocks((3, 12, 4), np.s_[2, 2:5, 1], np.s_[:, 9:, :2]), 3, (9, 5, 7), 2),
    "smaller than the patch": (blocks((3, 4, 5), np.s_[1, 1, 1]), 2, (9, 7, 6), 1),
    "twelve classes": (scattered((9, 7, 6), 14) % 12, 12, (4, 3, 3), 1),
    "255 classes": (scattered((9, 8, 7), 254), 255, (4, 5, 5), 1),
    "48 steps": (
        blocks((130, 3, 4), np.s_[0, 0, 0], np.s_[70, 1, 1], np.s_[126:, 2:, 2:]),
        5,
        (30, 2, 3),
        CROP_DILATION,
    ),
}


@pytest.mark.parametrize("case", DRAWS)
def test_centres_are_drawn_as_monai_draws_them(monkeypatch, case):
    label, num_classes, patch_size, steps = DRAWS[case]
    monkeypatch.setattr(crops, "grown_mask", partial(grown_mask, steps=steps))
    places = Places(dilated(label, num_classes, steps), patch_size)
    probability = places.probabilities()
    check_centres(places.monais(2000), probability)
    ours = places.ours(crop_masks(label, num_classes), 8000)
    check_centres(ours, probability)
    uniform = np.where(probability > 0, 1 / np.count_nonzero(probability), 0)
    if not np.allclose(uniform, probability):
        with pytest.raises(AssertionError):  # so many draws do tell distributions apart
            check_centres(ours, uniform)


def test_centres_lie_in_masks_that_are_rare_in_their_box(monkeypatch):
    monkeypatch.setattr(crops, "grown_mask", partial(grown_mask, steps=1))
    label = blocks((40, 41, 42), np.s_[:], np.s_[1, 1, 1])
    label[-2, -2, -2] = 2
    masks = crop_masks(label, 3)
    rng, expected = np.random.default_rng(0), dilated(label, 3, 1)[2]
    counts = np.zeros(label.shape)
    only = CropMasks(masks.boxes * [[[0]], [[0]], [[1]]], masks.starts, masks.bits)  # the other class is absent
    for _ in range(300):
        counts[tuple(only.draw_centre(rng))] += 1
    assert expected.sum() == 14 and ((counts > 0) == expected).all()


def test_centres_depend_on_the_generator_alone():
    masks = crop_masks(blocks((60, 50, 40), np.s_[1:3, 2:5, 3:5], np.s_[50:, 40:, :2]), 3)
    first, again, other = (
        [masks.draw_centre(rng).tolist() for _ in range(20)] for rng in map(np.random.default_rng, (0, 0, 1))
    )
    assert first == again != other


# Patches


def volume(shape: tuple[int, ...], num_channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(num_channels, *shape)).astype(np.float16), rng.integers(1, 5, shape).astype(np.uint8)


def test_image_and_label_are_padded_alike():
    """The two steps of the image's padding do not shift it where gaps are odd; torch would not reflect 8 out of 3."""
    for size in range(1, 34):
        for count in range(1, size + 2):
            label = np.arange(1, count + 1, dtype=np.uint8).reshape(count, 1, 1)
            patch, its_label = cut_patch(label[None].astype(np.float16), label, (count // 2, 0, 0), (size, 1, 1))
            labelled = its_label > 0
            assert labelled.sum() == min(size, count) and np.array_equal(patch[labelled], its_label[labelled])
            assert np.isin(patch, label).all()


SHAPES = [(20, 20, 20), (40, 9, 17), (17, 16, 21), (5, 20, 4), (3, 4, 2), (20, 20, 1), (1, 1, 1)]


@pytest.mark.parametrize("patch_size", [(16, 16, 16), (9, 12, 7)], ids=str)
@pytest.mark.parametrize(
    "shape", [(20, 20, 20), (40, 9, 17), (17, 16, 21), (5, 20, 4), (3, 4, 2), (20, 20, 1), (1, 1, 1)], ids=str
)
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


@pytest.mark.parametrize("patch_size", [(4, 5, 6), (12, 11, 10), (16, 16, 16), (4, 20, 6)], ids=str)
@pytest.mark.parametrize("mapped", [False, True])
def test_patches_are_copies_of_the_same_type(tmp_path: Path, patch_size, mapped):
    """They are contiguous and writable, of arrays in any order, also of a file's that is mapped read-only."""
    image, label = volume((12, 11, 10))
    image, label = np.asfortranarray(image), np.asfortranarray(label)
    kept = image.copy(), label.copy()
    if mapped:
        for name, array in (("image", image), ("label", label)):
            np.save(tmp_path / f"{name}.npy", array)
        image, label = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("image", "label"))
    patch, its_label = cut_patch(image, label, (5, 5, 5), patch_size)
    for array, dtype in ((patch, np.float16), (its_label, np.uint8)):
        assert type(array) is np.ndarray and array.dtype == dtype
        assert array.flags.c_contiguous and array.flags.writeable
        assert not np.shares_memory(array, image) and not np.shares_memory(array, label)
    patch[:], its_label[:] = 7, 7
    assert np.array_equal(image, kept[0]) and np.array_equal(label, kept[1])
