"""The task's grid, and the way back from it, as MONAI makes them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import permutations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Orientationd, Spacingd
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from dints.data.grid import Resampling, in_c_order

# MONAI's, at axes of one voxel.
pytestmark = pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid")

# Of the intensities' range. MONAI interpolates in float64, and we in float32, whose weights and
# sums are rounded to 6e-8 along each axis. Where a header's float32 affine is oblique, its axes are
# askew by 1e-7 of a volume's length, which is ignored: 5e-5 of a voxel in 512, and so of the step
# to the next voxel. The cache rounds to 5e-4.
TOLERANCE = 1e-4


def affine_of(axes: str, spacing: Sequence[float], degrees: float = 0.0) -> np.ndarray:
    """Make it as a header holds it, in float32: axes towards ``axes``, turned by ``degrees``."""
    orientation = nib.orientations.axcodes2ornt(axes)
    affine = nib.orientations.inv_ornt_aff(orientation, (1, 1, 1)).T
    turn = Rotation.from_rotvec(np.deg2rad([degrees, -degrees / 2, degrees / 3])).as_matrix()
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, :3] *= spacing
    affine[:3, 3] = -91.3, 120.7, 33.1
    return affine.astype(np.float32).astype(np.float64)


def draw_voxels(
    shape: Sequence[int], num_channels: int = 1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image, float32, and a label, uint8: noise, the hardest to interpolate alike."""
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 300, (num_channels, *shape)).astype(np.float32)
    return image, rng.integers(0, 200, (1, *shape)).astype(np.uint8)


def monais_way(
    spacing: Sequence[float] | None, keys: Sequence[str] = ("image", "label")
) -> Compose:
    modes = ["bilinear" if key == "image" else "nearest" for key in keys]
    steps = [Orientationd(keys, axcodes="RAS", labels=None)]
    if spacing is not None:
        steps.append(Spacingd(keys, spacing, mode=modes, align_corners=True))
    return Compose(steps)


def with_place(voxels: np.ndarray, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.from_numpy(voxels.copy(order="C")), torch.from_numpy(affine))


def check_against_monai(
    image: np.ndarray,
    label: np.ndarray,
    affine: np.ndarray,
    spacing: Sequence[float] | None,
    tolerance: float = TOLERANCE,
) -> Resampling:
    case = {"image": with_place(image, affine), "label": with_place(label, affine)}
    expected = monais_way(spacing)(case)
    resampling = Resampling(image.shape[1:], affine, spacing)
    with warnings.catch_warnings():  # torch's, of arrays that lie in a file's bytes
        warnings.filterwarnings("error", message=".*not writable")
        ours, our_label = resampling.apply(image), resampling.apply(label, nearest=True)
    assert ours.shape == expected["image"].shape == (len(image), *resampling.shape)
    assert np.allclose(resampling.affine, expected["image"].affine, rtol=0, atol=1e-5)
    assert ours.dtype == np.float32 and our_label.dtype == label.dtype
    difference = np.abs(ours - expected["image"].numpy()).max()
    assert difference <= tolerance * max(np.ptp(image), 1)
    assert np.array_equal(our_label, expected["label"].numpy())
    for result in (ours, our_label):  # new arrays that torch takes, never the file's bytes
        assert result.flags.writeable and not np.shares_memory(result, image)
        assert np.array_equal(torch.from_numpy(result).numpy(), result)
    return resampling


GRIDS = {
    # file axes, degrees, the file's spacing, the grid's (RAS), voxels
    "finer": ("RAS", 0, (1.5, 2.0, 4.0), (1.0, 1.0, 1.0), (21, 16, 9)),
    "half, not round": ("RAS", 0, (0.703125, 0.7, 1.4), (0.3515625, 0.35, 0.7), (21, 16, 9)),
    "double, odd and even": ("RAS", 0, (1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (21, 16, 9)),
    "LAS, left-handed": ("LAS", 0, (0.9, 1.1, 3.0), (1.0, 1.0, 2.0), (20, 17, 8)),
    "SAL": ("SAL", 0, (3.0, 1.0, 2.0), (2.0, 1.5, 1.5), (12, 13, 14)),
    "oblique": ("LPS", 12, (0.8, 0.9, 3.0), (1.0, 1.0, 1.0), (20, 21, 9)),
    "oblique, half": ("LAS", 15, (2.0, 2.0, 2.0), (1.0, 1.0, 1.0), (15, 16, 9)),
    "nothing changes": ("RAS", 0, (1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (9, 10, 11)),
    "only turned": ("PIR", 0, (1.0, 2.0, 3.0), (3.0, 1.0, 2.0), (9, 10, 11)),
    "within MONAI's tolerance": ("LPS", 0, (0.9995, 1.0, 1.0008), (1.0, 1.0, 1.0), (9, 10, 400)),
    "just beyond it": ("RAS", 0, (1.002, 1.0, 1.0), (1.0, 1.0, 1.0), (400, 9, 10)),
    "no spacing, turned": ("SAL", 10, (1.0, 2.0, 3.0), None, (9, 10, 11)),
    "one voxel": ("PIR", 0, (1.0, 2.0, 5.0), (1.5, 1.0, 2.0), (1, 1, 1)),
    "becomes one slice": ("LAS", 0, (1.0, 1.0, 1.0), (1.0, 1.5, 9.0), (12, 13, 3)),
    "longer than a block": ("RAS", 0, (1.0, 3.0, 1.0), (0.7, 1.0, 1.7), (150, 9, 140)),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_the_grid_is_monais(grid):
    axes, degrees, own, spacing, shape = GRIDS[grid]
    affine = affine_of(axes, own, degrees)
    resampling = check_against_monai(*draw_voxels(shape), affine, spacing)
    assert nib.aff2axcodes(resampling.affine) == ("R", "A", "S")


OWN = [0.3, 0.5, 0.6, 0.703125, 0.7871, 0.79296875, 0.9997, 1.0, 1.0005, 1.25, 1.5, 2.0, 2.5, 5.0]


def test_random_grids_are_monais():
    for number in range(12):
        rng = np.random.default_rng([7, number])
        shape, own = rng.choice([1, 2, 3, 5, 8, 13, 20, 21, 32, 33], 3), rng.choice(OWN, 3)
        axes = "".join(rng.choice(list(pair)) for pair in rng.permutation(["RL", "AP", "SI"]))
        affine = affine_of(axes, own, rng.choice([0.0, 17.0]))
        turned = own[np.argsort(nib.orientations.io_orientation(affine)[:, 0])]
        spacings = (
            turned * rng.choice([0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4], 3),  # many a tie
            rng.choice([0.8, 1.0, 1.5, 2.0], 3),
            turned + rng.choice([0, 5e-4, -9e-4, 2e-3], 3),
        )
        spacing = spacings[number % 3]
        try:
            check_against_monai(*draw_voxels(shape, 2, number), affine, spacing)
        except AssertionError as error:
            raise AssertionError(f"{number}: {shape} {axes} {own} to {spacing}") from error


@pytest.mark.parametrize("grid", ["SAL", "oblique", "only turned"])
@pytest.mark.parametrize("dtype", ["float64", "int16", "uint16"])
def test_the_grid_is_monais_for_every_type_memory_order_and_several_channels(grid, dtype):
    axes, degrees, own, spacing, shape = GRIDS[grid]
    image, label = draw_voxels(shape, 3)
    image = (np.abs(image) % 256).astype(dtype)
    channels_last = [np.asfortranarray(np.moveaxis(voxels, 0, -1)) for voxels in (image, label)]
    as_read = [np.moveaxis(voxels, -1, 0) for voxels in channels_last]
    for voxels in ([image, label], as_read):
        for array in voxels:
            array.flags.writeable = False
        if dtype == "uint16":  # torch and MONAI have little use for it
            resampling = Resampling(shape, affine_of(axes, own, degrees), spacing)
            expected = resampling.apply(image.astype(np.float32))
            assert np.allclose(resampling.apply(voxels[0]), expected, rtol=0, atol=1e-3)
        else:
            check_against_monai(*voxels, affine_of(axes, own, degrees), spacing)


def test_the_grid_is_monais_for_an_affine_of_a_quaternion():
    """A header without sform has an affine that is orthogonal but for its own rounding."""
    for axes, spacing in (("LPS", None), ("LAS", (0.75, 1.25, 2.5))):
        header = nib.Nifti1Header()
        header.set_data_shape((17, 20, 9))
        header.set_zooms((1.5, 1.25, 5.0))
        header.set_qform(affine_of(axes, (1.5, 1.25, 5.0), 11), 1)
        assert header["sform_code"] == 0
        check_against_monai(*draw_voxels((17, 20, 9)), header.get_best_affine(), spacing)


def test_the_grid_is_monais_where_the_axes_are_askew():
    """The new axes are orthogonal, so that those of the old volume are not parallel to them."""
    affine = affine_of("SAL", (1.0, 1.5, 2.0), 10)
    affine[:3, :3] = affine[:3, :3] @ np.array([[1, 0.2, 0.05], [0, 1, -0.1], [0, 0, 1]])
    voxels = draw_voxels((12, 13, 14), 2)
    resampling = check_against_monai(*voxels, affine, (0.5, 0.75, 1.0), tolerance=1e-6)
    assert np.abs(resampling.matrix[:3, :3] * (1 - np.eye(3))).max() > 0.01


@pytest.mark.parametrize("spacing", [(0.5, 0.75, 1.0), (1.5, 1.5, 3.0)])
def test_labels_are_monais_where_the_axes_are_hardly_askew(spacing):
    """A thousandth of a voxel is ignored, but decides of a label halfway between two voxels."""
    affine = affine_of("LPS", (1.0, 1.5, 2.0), 10)
    affine[:3, :3] = affine[:3, :3] @ np.array([[1, 1e-5, -5e-6], [0, 1, 1e-5], [0, 0, 1]])
    check_against_monai(*draw_voxels((21, 16, 13)), affine, spacing, tolerance=5e-4)


@pytest.mark.parametrize(
    "grid", ["finer", "SAL", "oblique", "one voxel", "only turned", "no spacing, turned"]
)
def test_undoing_is_monais_inversion(grid):
    axes, degrees, own, spacing, shape = GRIDS[grid]
    image, affine = draw_voxels(shape)[0], affine_of(axes, own, degrees)
    forward = monais_way(spacing, ["image"])
    case = forward({"image": with_place(image, affine)})
    resampling = Resampling(shape, affine, spacing)
    logits = np.random.default_rng(1).normal(0, 9, (3, *resampling.shape))
    logits = torch.from_numpy(gaussian_filter(logits, (0, 1, 1, 1)))
    probabilities = logits.softmax(0).float()
    case["class"] = MetaTensor(probabilities, case["image"].affine)
    back = Invertd(["class"], forward, orig_keys=["image"], nearest_interp=False)
    expected = back(case)["class"]
    ours = resampling.undo(probabilities.numpy())
    assert ours.dtype == np.float32 and ours.shape == expected.shape == (3, *shape)
    assert np.abs(ours - expected.numpy()).max() < TOLERANCE
    assert np.allclose(ours.sum(0), 1, atol=1e-5)
    if resampling.matrix is None:  # turned alone: nothing is lost
        assert np.array_equal(resampling.undo(resampling.apply(image)), image)


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 6, 1)], ids=str)
@pytest.mark.parametrize(("given", "kept"), [(np.float32, torch.float16), (np.uint8, torch.uint8)])
def test_voxels_in_any_order_become_those_in_c_order(shape, given, kept):
    voxels = np.random.default_rng(0).uniform(0, 200, (3, *shape)).astype(given)
    for order in permutations(range(3)):  # the last one is a file's
        stored = np.ascontiguousarray(voxels.transpose(0, *(1 + axis for axis in order)))
        result = in_c_order(stored.transpose(0, *(1 + np.argsort(order))), kept)
        assert result.flags.c_contiguous and result.dtype == str(kept).removeprefix("torch.")
        assert np.array_equal(result, voxels.astype(result.dtype))
