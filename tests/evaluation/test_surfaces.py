"""Surface distances equal a computation from the definitions, and the values of DeepMind's package."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from commands import CHECKOUT
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

from dints.evaluation import surfaces
from dints.evaluation.surfaces import cell_areas, surface_distances

CORNERS = list(itertools.product((0, 1), repeat=3))
UNIT, STRETCHED = (1.0, 1.0, 1.0), (0.7, 1.3, 3.1)


def area_of_group(corners: np.ndarray, spacing: np.ndarray) -> float:
    """Measure what cuts off connected corners: their hull with the middles of the edges to others, within the cell."""
    across = np.prod(spacing) / spacing
    links = (np.abs(corners[:, None] - corners[None]).sum(-1) == 1).sum(1)
    if sorted(links) == [1, 1, 2, 2]:  # a chain around the centre: a flat rectangle through that, and two triangles
        (middle,) = np.flatnonzero(np.subtract(*corners[links == 2]))
        first, second = (axis for axis in range(3) if axis != middle)
        triangles = np.hypot(across[middle], across[first]) + np.hypot(across[middle], across[second])
        return np.linalg.norm(across) / 2 + triangles / 4
    own = {tuple(corner) for corner in corners}
    middles = [(a + np.array(b)) / 2 for a in corners for b in CORNERS if b not in own and abs(a - b).sum() == 1]
    points = np.array([*corners, *middles])
    hull, area = ConvexHull(points * spacing), 0.0
    for simplex in hull.simplices:
        triangle = points[simplex]
        if not ((triangle == triangle[0]).all(0) & (triangle[0] % 1 == 0)).any():  # else it lies in the cell's face
            one, two = (triangle[1:] - triangle[0]) * spacing
            area += np.linalg.norm(np.cross(one, two)) / 2
    return area


def area_of_cell(cell: np.ndarray, spacing: np.ndarray) -> float:
    rarer = cell if cell.sum() <= 4 else ~cell
    groups, count = ndimage.label(rarer)
    return sum(area_of_group(np.argwhere(groups == number + 1), spacing) for number in range(count))


def elements(mask: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places in mm (n, 3) and areas of a mask's surface elements."""
    padded, places, areas, known = np.pad(mask, 1), [], [], {}
    for start in itertools.product(*(range(size + 1) for size in mask.shape)):
        cell = padded[tuple(slice(first, first + 2) for first in start)]
        if cell.any() and not cell.all():
            places.append(start * spacing)
            if cell.tobytes() not in known:
                known[cell.tobytes()] = area_of_cell(cell, spacing)
            areas.append(known[cell.tobytes()])
    return np.array(places), np.array(areas)


def by_definition(reference, prediction, spacing, tolerance) -> tuple[float, float]:
    spacing = np.array(spacing)
    (first, first_areas), (second, second_areas) = elements(reference, spacing), elements(prediction, spacing)
    between, distances = cdist(first, second), []
    within = 0.0
    for nearest, areas in ((between.min(1), first_areas), (between.min(0), second_areas)):
        within += sum(area for distance, area in zip(nearest, areas, strict=True) if distance <= tolerance)
        reached = 0.0
        for distance, area in sorted(zip(nearest, areas, strict=True)):
            reached += area
            if reached >= 0.95 * areas.sum() - 1e-12:
                distances.append(distance)
                break
    return within / (first_areas.sum() + second_areas.sum()), max(distances)


def blobs(seed: int, shape=(9, 8, 7), smooth=0.8) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), smooth) for _ in range(2)]
    return [field > np.quantile(field, 0.7) for field in fields]


def ellipsoids() -> tuple[np.ndarray, np.ndarray]:
    x, y, z = np.indices((24, 20, 16))
    first = (x - 11) ** 2 / 64 + (y - 9) ** 2 / 49 + (z - 7) ** 2 / 25 < 1
    return first, (x - 12) ** 2 / 56 + (y - 9) ** 2 / 60 + (z - 8) ** 2 / 20 + 0.2 * np.sin(x + 2 * y) < 1


@pytest.mark.parametrize("spacing", [UNIT, STRETCHED])
def test_the_area_of_every_cell_is_that_of_its_geometry(spacing):
    areas = cell_areas(spacing)
    for code in range(256):
        cell = np.array([code >> bit & 1 for bit in range(8)], bool).reshape(2, 2, 2)
        assert areas[code] == pytest.approx(area_of_cell(cell, np.array(spacing)), rel=1e-12), code
    # The sum of the table of surface-distance 0.1.
    assert areas.sum() == pytest.approx({UNIT: 241.343139706, STRETCHED: 629.983834645}[spacing], abs=1e-8)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [UNIT, (0.7, 1.3, 2.9)])
def test_it_is_what_the_definitions_say(seed, spacing):
    masks = blobs(seed, smooth=(0.5, 0.8, 1.2)[seed % 3])
    distances = surface_distances(*masks, spacing)
    dice, hausdorff = by_definition(*masks, spacing, 1.0)
    assert distances.surface_dice(1.0) == pytest.approx(dice, abs=1e-9)
    assert distances.hausdorff(95) == pytest.approx(hausdorff, abs=1e-9)


# surface-distance 0.1 (PyPI) on these ellipsoids: surface Dice at 0.5, 1 and 2 mm, Hausdorff distances, areas in mm².
DEEPMIND = {
    UNIT: ((0.501969129, 0.915218604, 0.99865231), (1.414213562, 2.449489743), (583.57096228, 701.629198245)),
    STRETCHED: ((0.512457575, 0.737895951, 0.910963951), (3.1, 3.733630941), (1301.253900641, 1660.251579202)),
}


@pytest.mark.parametrize("spacing", DEEPMIND)
def test_it_is_what_deepminds_package_says(spacing):
    dice, hausdorff, areas = DEEPMIND[spacing]
    distances = surface_distances(*ellipsoids(), spacing)
    assert [distances.surface_dice(tolerance) for tolerance in (0.5, 1.0, 2.0)] == pytest.approx(dice, abs=1e-8)
    assert [distances.hausdorff(percent) for percent in (95, 100)] == pytest.approx(hausdorff, abs=1e-8)
    assert [distances.reference_areas.sum(), distances.prediction_areas.sum()] == pytest.approx(areas, abs=1e-7)


def test_it_is_what_deepminds_package_says_of_many_masks():
    package = pytest.importorskip("surface_distance")
    for seed in range(20):
        masks = blobs(seed, (14, 11, 12), smooth=1.2)
        ours, theirs = (
            function(*masks, STRETCHED) for function in (surface_distances, package.compute_surface_distances)
        )
        assert ours.surface_dice(1.3) == pytest.approx(package.compute_surface_dice_at_tolerance(theirs, 1.3))
        assert ours.hausdorff(95) == pytest.approx(package.compute_robust_hausdorff(theirs, 95))


def numbers(reference, prediction, spacing) -> list[float]:
    distances = surface_distances(reference, prediction, spacing)
    return [distances.surface_dice(1.3), distances.hausdorff(95), distances.hausdorff(100)]


@pytest.mark.parametrize("seed", range(3))
def test_neither_turns_nor_flips_nor_the_order_of_the_masks_matter(seed):
    masks = blobs(seed, (12, 10, 8))
    expected = pytest.approx(numbers(*masks, STRETCHED), abs=1e-9)
    assert numbers(*masks[::-1], STRETCHED) == expected
    for axes in itertools.permutations(range(3)):
        turned = [mask.transpose(axes)[::-1, :, ::-1] for mask in masks]
        assert numbers(*turned, [STRETCHED[axis] for axis in axes]) == expected


def test_distances_grow_with_the_spacing():
    masks = blobs(0, (12, 10, 8))
    once, twice = (surface_distances(*masks, factor * np.array(STRETCHED)) for factor in (1, 2))
    assert twice.hausdorff() == pytest.approx(2 * once.hausdorff())
    assert twice.surface_dice(2.6) == pytest.approx(once.surface_dice(1.3))
    assert twice.reference_areas.sum() == pytest.approx(4 * once.reference_areas.sum())


def test_tree_and_transform_agree(monkeypatch):
    masks = [np.zeros((40, 12, 12), bool), np.zeros((40, 12, 12), bool)]
    masks[0][2:9, 3:9, 3:9] = masks[1][3:10, 3:9, 2:8] = masks[1][30:35, 4:8, 4:8] = True  # near, and far away
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
        assert (surface_distances(*masks, UNIT).surface_dice(1), surface_distances(*masks, UNIT).hausdorff()) == (
            0,
            np.inf,
        )
    nothing = surface_distances(empty, empty, UNIT)
    assert np.isnan(nothing.surface_dice(1)) and np.isnan(nothing.hausdorff())
    same = surface_distances(full, full, UNIT)
    assert (same.surface_dice(0), same.hausdorff(100)) == (1, 0)


def test_a_flat_face_has_its_area():
    slab = np.ones((5, 40, 40), bool)
    areas = surface_distances(slab, slab, (2.0, 0.5, 1.0)).reference_areas
    assert areas.sum() == pytest.approx(2 * 20 * 40 + 2 * (20 + 40) * 10, rel=0.1)  # edges and corners are cut off


def test_the_wing_needs_no_pytorch():
    program = """if True:
        import sys
        from dints.data import formats
        from dints.evaluation import lesions, masks, scores, summary, surfaces
        print(sorted({"torch", "monai"} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
