"""Distances between two masks' surfaces: normalised surface Dice, and 95% Hausdorff distance.

Both are those of DeepMind's ``surface-distance`` (Nikolov et al., JMIR 2021, doi:10.2196/26151).
Eight neighbouring voxel centres are the corners of a cell; a cell whose corners are partly in the
mask holds a piece of its surface, a surface element, at the cell's centre, with the area that
marching cubes gives it. Distances run from centre to centre. A mask ends at the volume's border:
what touches it has a surface there.

That package (0.1 on PyPI, of 2022) fails on NumPy 2 where a mask is empty (``np.Inf``). It also
transforms the whole box of both masks where the surfaces are near each other; their cells in a k-d
tree are found 5 to 8 times faster. A tree alone would take minutes where one surface encloses
another far away. MONAI's surface Dice with ``use_subvoxels=True`` is the same number; its Hausdorff
distance is not weighted by area, and it needs PyTorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

# of a cell; corner k is bit k of its code
CORNERS = np.array(list(itertools.product((0, 1), repeat=3)))
FULL = 255  # the code of a cell inside the mask
# Headers hold float32, so that 1 mm is read as 0.9999999 or 1.0000001: both are within 1 mm.
SLACK = 1e-5
# voxels of the longest side within which a k-d tree is asked; its time grows with the distance
NEAR = 5
SPARSE = 0.08  # surface cells of all, up to which it is faster than a distance transform


@dataclass(frozen=True)
class SurfaceDistances:
    """Surface elements of two masks, each with its distance to the other's nearest.

    Attributes:
        to_prediction, to_reference: mm, from each element of the reference to the prediction, and
            the other way; infinite where the other mask is empty.
        reference_areas, prediction_areas: mm², in the same order.
    """

    to_prediction: np.ndarray
    reference_areas: np.ndarray
    to_reference: np.ndarray
    prediction_areas: np.ndarray

    def surface_dice(self, tolerance_mm: float) -> float:
        """Return the share of both surfaces' area within ``tolerance_mm`` of the other, or NaN."""
        limit = tolerance_mm * (1 + SLACK)
        within = self.reference_areas[self.to_prediction <= limit].sum()
        within += self.prediction_areas[self.to_reference <= limit].sum()
        area = self.reference_areas.sum() + self.prediction_areas.sum()
        return float(within / area) if area else float("nan")

    def hausdorff(self, percent: float = 95) -> float:
        """Return the larger of both ways' distance in mm that holds ``percent`` of the area.

        It is infinite where one mask is empty, and NaN where both are.
        """
        if not len(self.to_prediction) and not len(self.to_reference):
            return float("nan")
        if not len(self.to_prediction) or not len(self.to_reference):
            return float("inf")
        return max(
            _percentile(self.to_prediction, self.reference_areas, percent),
            _percentile(self.to_reference, self.prediction_areas, percent),
        )


def surface_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> SurfaceDistances:
    """Compare the surfaces of two bool masks of one shape (x, y, z), with ``spacing`` in mm.

    The time grows with their size: give a crop that holds both.
    """
    spacing = np.asarray(spacing, np.float64)
    areas = cell_areas(tuple(spacing.tolist()))
    codes = [_cell_codes(mask) for mask in (reference, prediction)]
    cells = [np.flatnonzero((code != 0) & (code != FULL)) for code in codes]
    distances = []
    for own, other in ((0, 1), (1, 0)):
        distance = np.full(len(cells[own]), 0.0 if len(cells[other]) else np.inf)
        apart = ~np.isin(cells[own], cells[other], assume_unique=True)  # elsewhere it is 0
        if len(cells[other]):
            distance[apart] = _nearest(cells[own][apart], cells[other], codes[0].shape, spacing)
        distances.append(distance)
    reference_areas, prediction_areas = (
        areas[code.ravel()[flat]] for code, flat in zip(codes, cells, strict=True)
    )
    return SurfaceDistances(distances[0], reference_areas, distances[1], prediction_areas)


@cache
def cell_areas(spacing: tuple[float, float, float]) -> np.ndarray:
    """Return the area in mm² of the surface in a cell, for each of its corners' 256 codes."""
    across = np.prod(spacing) / np.asarray(spacing)  # what the faces across x, y and z grow by
    return np.array([np.linalg.norm(normals * across, axis=1).sum() for normals in _cell_normals()])


@cache
def _cell_normals() -> list[np.ndarray]:
    """Return for each code the normals (triangles, 3) in a unit cell, as long as areas.

    The surface passes through the middles of the edges that lead out of the mask, and cuts off the
    corners of the rarer kind, each group of them that edges connect by itself; so a mask has its
    complement's surface.
    """
    corners, normals = [tuple(corner) for corner in CORNERS.tolist()], []
    for code in range(256):
        inside = {corner for bit, corner in enumerate(corners) if code >> bit & 1}
        rarer = inside if len(inside) <= 4 else {*corners} - inside
        patches = [_patch(group) for group in _groups(rarer)]
        normals.append(np.concatenate([np.zeros((0, 3)), *patches]))
    return normals


def _groups(corners: set[tuple]) -> list[set[tuple]]:
    """Divide corners of a cell into those that are connected by its edges."""
    groups = []
    for corner in corners:
        touching = [group for group in groups if any(_apart(corner, other) == 1 for other in group)]
        groups = [group for group in groups if group not in touching] + [{corner}.union(*touching)]
    return groups


def _patch(corners: set[tuple]) -> np.ndarray:
    """Return the normals of the triangles that cut a connected group of corners off.

    The middles form a ring, of which neighbours share a face of the cell. Five, or the six around a
    chain of corners, do not lie in a plane, so that the triangles matter: of the fans that a middle
    can span, the largest is taken. For five it is the convex hull's. For the chain it goes through
    the cell's centre, and is the same from both sides.
    """
    middles = [
        (np.array(corner) + other) / 2
        for corner in corners
        for other in map(tuple, CORNERS.tolist())
        if other not in corners and _apart(corner, other) == 1
    ]
    ring = [middles.pop()]
    while middles:
        shared = [((middle == ring[-1]) & (middle % 1 == 0)).any() for middle in middles]
        ring.append(middles.pop(shared.index(True)))
    fans = []
    for start in range(len(ring)):
        spokes = np.array(ring[start + 1 :] + ring[:start]) - ring[start]
        fans.append(np.cross(spokes[:-1], spokes[1:]) / 2)
    return max(fans, key=lambda fan: np.linalg.norm(fan, axis=1).sum())


def _apart(one: tuple, other: tuple) -> int:
    """Count the edges between two corners."""
    return sum(a != b for a, b in zip(one, other, strict=True))


def _cell_codes(mask: np.ndarray) -> np.ndarray:
    """Return each cell's code, uint8, one more than voxels along an axis, of a mask in nothing."""
    padded = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([size + 1 for size in mask.shape], np.uint8)
    for bit, (x, y, z) in enumerate(CORNERS):
        corner = padded[x : x + codes.shape[0], y : y + codes.shape[1], z : z + codes.shape[2]]
        codes |= corner << np.uint8(bit)
    return codes


def _nearest(
    cells: np.ndarray, others: np.ndarray, shape: tuple[int, ...], spacing: np.ndarray
) -> np.ndarray:
    """Return the distance in mm from ``cells`` to the nearest of ``others``, as flat indices."""
    places, other_places = (np.stack(np.unravel_index(flat, shape), -1) for flat in (cells, others))
    nearest = np.empty_like(places)
    left = np.ones(len(cells), bool)
    if max(len(cells), len(others)) <= SPARSE * np.prod(shape):
        tree = KDTree(other_places * spacing, balanced_tree=False)
        _, number = tree.query(places * spacing, distance_upper_bound=NEAR * spacing.max())
        left = number == len(others)
        nearest[~left] = other_places[number[~left]]
    if left.any():
        elsewhere = np.ones(shape, bool)
        elsewhere.ravel()[others] = False
        indices = ndimage.distance_transform_edt(
            elsewhere, spacing, return_distances=False, return_indices=True
        )
        nearest[left] = indices.reshape(3, -1)[:, cells[left]].T
    # From whole voxels, so that a distance that is the tolerance is not longer by a rounding.
    return np.linalg.norm((places - nearest) * spacing, axis=1)


def _percentile(distances: np.ndarray, areas: np.ndarray, percent: float) -> float:
    """Return the least distance within which ``percent`` of the area lies."""
    order = np.argsort(distances, kind="stable")
    reached = np.cumsum(areas[order]) / areas.sum()
    return float(distances[order][min(np.searchsorted(reached, percent / 100), len(order) - 1)])
