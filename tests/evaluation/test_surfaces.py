"""Surface distances are those of DeepMind's package and of MONAI with subvoxels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import compute_surface_dice
from scipy import ndimage

from dints.evaluation import surfaces
from dints.evaluation.surfaces import cell_areas, surface_distances

UNIT, STRETCHED = (1.0, 1.0, 1.0), (0.7, 1.3, 3.1)


def blobs(seed: int, shape=(9, 8, 7), smooth=0.8) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), smooth) for _ in range(2)]
    return [field > np.quantile(field, 0.7) for field in fields]


def ellipsoids() -> tuple[np.ndarray, np.ndarray]:
    x, y, z = np.indices((24, 20, 16))
    first = (x - 11) ** 2 / 64 + (y - 9) ** 2 / 49 + (z - 7) ** 2 / 25 < 1
    second = (x - 12) ** 2 / 56 + (y - 9) ** 2 / 60 + (z - 8) ** 2 / 20
    return first, second + 0.2 * np.sin(x + 2 * y) < 1


@pytest.mark.parametrize("seed", range(2))
def test_surface_dice_is_monais_with_subvoxels(seed):
    masks = blobs(seed, (14, 11, 12), smooth=(0.5, 1.2)[seed])
    reference, prediction = (torch.from_numpy(mask)[None, None] for mask in masks)
    settings = {"include_background": True, "spacing": STRETCHED, "use_subvoxels": True}
    expected = compute_surface_dice(prediction, reference, [1.3], **settings)
    assert surface_distances(*masks, STRETCHED).surface_dice(1.3) == pytest.approx(expected.item())


# surface-distance 0.1 (PyPI) on these ellipsoids: surface Dice at 0.5, 1 and 2 mm, Hausdorff
# distances, areas in mm².
DEEPMIND = {
    UNIT: (0.501969129, 0.915218604, 0.99865231, 1.414213562, 2.449489743, 583.570962, 701.629198),
    STRETCHED: (0.512457575, 0.737895951, 0.910963951, 3.1, 3.733630941, 1301.253901, 1660.251579),
}


@pytest.mark.parametrize("spacing", DEEPMIND)
def test_it_is_as_deepminds_package(spacing):
    distances = surface_distances(*ellipsoids(), spacing)
    found = [distances.surface_dice(tolerance) for tolerance in (0.5, 1.0, 2.0)]
    found += [distances.hausdorff(percent) for percent in (95, 100)]
    found += [distances.reference_areas.sum(), distances.prediction_areas.sum()]
    assert found == pytest.approx([*DEEPMIND[spacing]], rel=1e-8)
    # The sum of that package's table of areas.
    areas_of_cells = {UNIT: 241.343139706, STRETCHED: 629.983834645}[spacing]
    assert cell_areas(spacing).sum() == pytest.approx(areas_of_cells, abs=1e-8)


def test_tree_and_transform_agree(monkeypatch):
    masks = [np.zeros((40, 12, 12), bool), np.zeros((40, 12, 12), bool)]
    # near, and far away
    masks[0][2:9, 3:9, 3:9] = masks[1][3:10, 3:9, 2:8] = masks[1][30:35, 4:8, 4:8] = True
    found = []
    for near, sparse in ((5, 1.0), (1000, 1.0), (0, 0.0)):
        monkeypatch.setattr(surfaces, "NEAR", near)
        monkeypatch.setattr(surfaces, "SPARSE", sparse)
        found.append(surface_distances(*masks, STRETCHED))
    for other in found[1:]:
        assert np.array_equal(found[0].to_reference, other.to_reference)
        assert np.array_equal(found[0].to_prediction, other.to_prediction)
    assert found[0].to_reference.max() > 5 * 3.1


@pytest.mark.parametrize("size", [1.0, 1.0000001, 0.7000000029])
def test_a_voxel_as_large_as_the_tolerance_is_within_it_in_float32(size):
    cube = np.zeros((10, 10, 10), bool)
    cube[2:6, 2:6, 2:6] = True
    distances = surface_distances(cube, np.roll(cube, 1, 0), (size, size, size))
    assert distances.surface_dice(round(size, 1)) == 1 and distances.surface_dice(0.99 * size) < 1


def test_empty_masks():
    empty, full = np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)
    for masks in ((empty, full), (full, empty)):
        found = surface_distances(*masks, UNIT)
        assert (found.surface_dice(1), found.hausdorff()) == (0, np.inf)
    nothing = surface_distances(empty, empty, UNIT)
    assert np.isnan(nothing.surface_dice(1)) and np.isnan(nothing.hausdorff())
    same = surface_distances(full, full, UNIT)
    assert (same.surface_dice(0), same.hausdorff(100)) == (1, 0)
