"""Where training patches are cut out: around each class equally often.

The published scripts draw a patch's centre from these masks, so that small structures are seen
often but not always in the centre. MONAI's ``RandCropByLabelClassesd`` lists the indices of every
mask's voxels each time; here a mask is a bit a voxel inside its bounding box, and centres are drawn
from the box until one lies in the mask: the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Steps along the axes by which a class's mask grows before centres are drawn from it
CROP_DILATION = 48
DRAWS = 64  # centres drawn at once


@dataclass(frozen=True)
class CropMasks:
    """Each class's grown mask.

    Attributes:
        boxes: (classes, 2, 3), first voxel and end of the mask's bounding box; an absent class has
            an empty one.
        starts: (classes,), where a class's bits begin in ``bits``, bytes; -1: its mask fills its
            box, and has none.
        bits: uint8, the boxes' voxels in C order, eight a byte.
    """

    boxes: np.ndarray
    starts: np.ndarray
    bits: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """The classes that the case has."""
        return np.flatnonzero(np.all(self.boxes[:, 1] > self.boxes[:, 0], axis=1))

    def contains(self, value: int, voxels: np.ndarray) -> np.ndarray:
        """Tell which of ``voxels`` (n, 3), all in the box of class ``value``, its mask contains."""
        if self.starts[value] < 0:
            return np.ones(len(voxels), bool)
        first, end = self.boxes[value]
        index = np.ravel_multi_index(tuple((voxels - first).T), tuple(end - first))
        return (self.bits[self.starts[value] + (index >> 3)] >> (7 - (index & 7))) & 1 == 1

    def draw_centre(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a voxel: each present class is equally likely, then each voxel of its mask."""
        value = rng.choice(self.present)
        first, end = self.boxes[value]
        while True:
            voxels = rng.integers(first, end, (DRAWS, 3))
            inside = self.contains(value, voxels)
            if inside.any():
                return voxels[inside.argmax()]


def crop_masks(label: np.ndarray, num_classes: int) -> CropMasks:
    """Grow the masks of a label (x, y, z), uint8."""
    boxes, starts, parts, size = np.zeros((num_classes, 2, 3), np.int64), [], [], 0
    for value in range(num_classes):
        boxes[value], mask = grown_mask(label == value)
        starts.append(-1 if mask is None else size)
        if mask is not None:
            parts.append(np.packbits(mask))
            size += len(parts[-1])
    parts.append(np.zeros(1, np.uint8))  # an empty array cannot be memory-mapped
    return CropMasks(boxes, np.array(starts), np.concatenate(parts))


def grown_mask(
    present: np.ndarray, steps: int = CROP_DILATION
) -> tuple[np.ndarray, np.ndarray | None]:
    """Do as ``steps`` binary dilations of a mask (x, y, z): return its box (2, 3) and voxels.

    The voxels are None where the grown mask fills its box, which is empty where the mask is.
    """
    inner = bounding_box(present)
    if inner is None:
        return np.zeros((2, 3), np.int64), None
    box = np.stack([np.maximum(inner[0] - steps, 0), np.minimum(inner[1] + steps, present.shape)])
    gaps = bounding_box(~present)
    if gaps is None:
        return box, None
    # Beyond the gaps every voxel belongs to the class, so a gap's distance is known from what lies
    # right around it.
    first, end = np.maximum(box[0], gaps[0] - 1), np.minimum(box[1], gaps[1] + 1)
    region = tuple(map(slice, first, end))
    near = _distance(present[region], steps + 1) <= steps
    if near.all():
        return box, None
    mask = np.ones(box[1] - box[0], bool)
    mask[tuple(map(slice, first - box[0], end - box[0]))] = near
    return box, mask


def bounding_box(mask: np.ndarray) -> np.ndarray | None:
    """Return first voxel and end (2, 3) of what is true in a mask (x, y, z), or None."""
    spans = []
    for axes in ((1, 2), (0, 2), (0, 1)):
        found = np.flatnonzero(mask.any(axis=axes))
        if not len(found):
            return None
        spans.append((found[0], found[-1] + 1))
    return np.array(spans).T


def _distance(present: np.ndarray, limit: int) -> np.ndarray:
    """Count steps along the axes to the nearest present voxel, at most ``limit`` (below 255).

    Distances along one axis after another: each plane takes over its neighbour's, plus one.
    """
    distance = np.where(present, np.uint8(0), np.uint8(limit))
    for axes in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        view = distance.transpose(axes)
        # Single bytes apart would be slow
        planes = np.ascontiguousarray(view) if axes[0] == 2 else view
        for order in (range(1, len(planes)), range(len(planes) - 2, -1, -1)):
            for place in order:
                plane, neighbour = planes[place], planes[place - order.step]
                np.minimum(plane, neighbour + np.uint8(1), out=plane)
        if planes is not view:
            view[...] = planes
    return np.minimum(distance, np.uint8(limit), out=distance)


def cut_patch(
    image: np.ndarray, label: np.ndarray, centre: Sequence[int], patch_size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the patch around a centre, moved inside the volume where it would stick out; copies.

    A volume smaller than the patch is padded to both sides: the image by reflection (its border
    voxels first, where it is too small to be reflected), the label by background.

    Args:
        image: (channels, x, y, z).
        label: (x, y, z).

    Returns:
        image and label, (channels, *patch_size) and (1, *patch_size).
    """
    region = []
    for place, size, count in zip(centre, patch_size, label.shape, strict=True):
        start = int(np.clip(place - size // 2, 0, max(count - size, 0)))
        region.append(slice(start, start + size))
    image, label = _padded(image[(slice(None), *region)], label[tuple(region)], patch_size)
    return np.array(image, order="C"), np.array(label, order="C")[None]


def _padded(
    image: np.ndarray, label: np.ndarray, patch_size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    # A third of the patch is reflected to both sides of itself; what is smaller has too few voxels
    # for that.
    for sizes, mode in (([size // 3 + 1 for size in patch_size], "edge"), (patch_size, "reflect")):
        lacking = [max(size - count, 0) for size, count in zip(sizes, label.shape, strict=True)]
        if any(lacking):
            # The same for both, or they would drift apart
            padding = [(gap // 2, gap - gap // 2) for gap in lacking]
            image, label = np.pad(image, [(0, 0), *padding], mode), np.pad(label, padding)
    return image, label
