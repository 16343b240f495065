"""A case in three views: planes of its image, with outlines of reference and segmentation.

Planes are shown in radiological convention, the patient's right on the left. Pixels are the file's
voxels and outlines are lines in the same coordinates; a browser stretches both to mm, so that no
voxel is squashed and little is stored.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from contourpy import contour_generator
from PIL import Image

from dints.data.grid import Resampling
from dints.data.tasks import Task

# By the axis of RAS across a plane: left, right, above and below once both axes are flipped.
DIRECTIONS = {2: ("axial", "RLAP"), 1: ("coronal", "RLSI"), 0: ("sagittal", "APSI")}
# around the structure: the larger of mm, and a share of its longest side
MARGIN_MM, MARGIN_SHARE = 8.0, 0.2
# of the non-zero voxels, shown from black to white where intensities are not absolute
PERCENTILES = 1, 99.5
SAMPLES = 500_000  # voxels that percentiles are taken of
# along a side of a picture; of those that a slider goes through
MOST_PIXELS, MOST_PIXELS_OF_MANY = 400, 220
# up to so many a picture is kept as it is: enlarged, its blocks would be seen
LOSSLESS_PIXELS = 1 << 14
QUALITY = 80  # of larger ones


@dataclass(frozen=True)
class Outline:
    """A class's outlines in a plane.

    Attributes:
        kind: ``reference`` or ``prediction``.
        label: the class's label value.
        path: SVG path data, in half voxels from the upper left corner.
        top: mm from the left and from above of the highest point, where the class's number stands.
    """

    kind: str
    label: int
    path: str
    top: tuple[float, float]


@dataclass(frozen=True)
class Plane:
    """A plane of a view.

    Attributes:
        number: of all that the volume has in this direction, from 1.
        image: a data URI.
    """

    number: int
    image: str
    outlines: tuple[Outline, ...]


@dataclass(frozen=True)
class View:
    """Planes of one direction.

    Attributes:
        name: ``axial``, ``coronal`` or ``sagittal``.
        letters: what lies left, right, above and below: R, L, A, P, S, I.
        count: planes that the volume has in this direction.
        width, height: mm.
        voxel: mm of a voxel across and down.
        planes: some of them, in the order from the left, the back or the bottom.
        shown: the number of the one that is shown first, from 1.
    """

    name: str
    letters: str
    count: int
    width: float
    height: float
    voxel: tuple[float, float]
    planes: tuple[Plane, ...]
    shown: int


@dataclass(frozen=True)
class Overlay:
    """A case's three views.

    Attributes:
        chosen: by what the planes that are shown first were chosen, for people.
    """

    views: tuple[View, ...]
    chosen: str

    @property
    def size(self) -> int:
        """Bytes that it takes in a page, about."""
        planes = [plane for view in self.views for plane in view.planes]
        return sum(
            len(plane.image) + 900 + sum(2 * len(o.path) + 300 for o in plane.outlines)
            for plane in planes
        )


def overlay(
    image: np.ndarray,
    prediction: np.ndarray,
    reference: np.ndarray | None,
    affine: np.ndarray,
    task: Task,
    most_planes: int = 1,
) -> Overlay:
    """Show a case in three views: the planes that hold most errors, else most of the structure.

    Args:
        image: (channels, x, y, z), as the file has it; the first channel is shown.
        prediction, reference: labels (x, y, z), uint8; None where there is no reference.
        affine: (4, 4), of all of them.
        most_planes: of a view, beside the shown one those through the structure.
    """
    turning = Resampling(image.shape[1:], affine, None)  # to RAS, and nothing else
    spacing = np.linalg.norm(turning.affine[:3, :3], axis=0)
    masks = {"reference": reference, "prediction": prediction}  # in the order of drawing
    given = {"image": image[0]} | {kind: mask for kind, mask in masks.items() if mask is not None}
    masks = {name: turning.apply(array[None], nearest=True)[0] for name, array in given.items()}
    volume = masks.pop("image")
    foreground = np.logical_or.reduce([mask > 0 for mask in masks.values()])
    box = box_around(foreground, spacing)
    errors = masks["prediction"][box] != masks.get("reference", masks["prediction"])[box]
    counted, chosen = errors, "with most errors"
    if not errors.any():
        counted = foreground[box]
        chosen = "with most of what was found" if counted.any() else "midway"
    shown = [side.start + number for side, number in zip(box, fullest_planes(counted), strict=True)]
    window = task.intensity or percentiles(volume[box])
    most_pixels = MOST_PIXELS if most_planes == 1 else MOST_PIXELS_OF_MANY

    def plane(axis: int, number: int, voxel: tuple[float, float]) -> Plane:
        place = tuple(number if axis == other else side for other, side in enumerate(box))
        pixels = data_uri(as_shown(volume[place]), window, most_pixels)
        shown_masks = {kind: as_shown(mask[place]) for kind, mask in masks.items()}
        return Plane(number + 1, pixels, _outlines(shown_masks, voxel))

    views = []
    for axis, (name, letters) in DIRECTIONS.items():
        across = [other for other in range(3) if other != axis]
        voxel = tuple(float(spacing[other]) for other in across)
        width, height = ((box[o].stop - box[o].start) * float(spacing[o]) for o in across)
        numbers = spread(box[axis], shown[axis], most_planes)
        planes = tuple(plane(axis, number, voxel) for number in numbers)
        size = volume.shape[axis], width, height, voxel
        views.append(View(name, letters, *size, planes, shown[axis] + 1))
    return Overlay(tuple(views), chosen)


def spread(side: slice, shown: int, most: int) -> list[int]:
    """Return planes through a box's side, at most so many, evenly spaced, and ``shown`` too."""
    step = -(-(side.stop - side.start) // most)
    return list(range(shown - (shown - side.start) // step * step, side.stop, step))


def _outlines(masks: dict[str, np.ndarray], voxel: tuple[float, float]) -> tuple[Outline, ...]:
    found = []
    for kind, mask in masks.items():
        for label in np.unique(mask[mask > 0]).tolist():
            path, (x, y) = outline(mask == label)
            found.append(Outline(kind, label, path, (x * voxel[0], y * voxel[1])))
    return tuple(found)


def as_shown(plane: np.ndarray) -> np.ndarray:
    """Return a plane of RAS as it is looked at: anterior or superior above, right left."""
    return plane[::-1, ::-1].T


def box_around(foreground: np.ndarray, spacing: np.ndarray) -> tuple[slice, slice, slice]:
    """Return the box of a bool mask (x, y, z) with a margin; of an empty one the whole volume.

    Args:
        spacing: mm.
    """
    ends = []
    for axis in range(3):
        held = np.flatnonzero(foreground.any(tuple({0, 1, 2} - {axis})))
        if not len(held):
            return tuple(slice(0, size) for size in foreground.shape)
        ends.append((held[0], held[-1] + 1))
    sides = np.array([stop - start for start, stop in ends]) * spacing
    margins = np.ceil(max(MARGIN_MM, MARGIN_SHARE * sides.max()) / spacing).astype(int)
    return tuple(
        slice(max(0, int(start - margin)), min(size, int(stop + margin)))
        for (start, stop), margin, size in zip(ends, margins, foreground.shape, strict=True)
    )


def fullest_planes(mask: np.ndarray) -> list[int]:
    """Return each axis's plane with most voxels of a bool mask; of an empty one the middle."""
    if not mask.any():
        return [size // 2 for size in mask.shape]
    return [int(mask.sum(tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]


def percentiles(volume: np.ndarray) -> tuple[float, float]:
    """Return the intensities that are shown black and white, where none are known of the task."""
    voxels = volume[volume != 0]
    voxels = voxels[:: len(voxels) // SAMPLES + 1]
    low, high = np.percentile(voxels, PERCENTILES) if len(voxels) else (0.0, 1.0)
    low, high = float(low), float(high)
    return low, max(high, low + 1e-6 * max(1.0, abs(low)))  # a step that float32 still resolves


def data_uri(pixels: np.ndarray, window: Sequence[float], most_pixels: int) -> str:
    """Encode a plane (rows, columns) as WebP, its window from black to white."""
    low, high = window
    grey = np.clip((pixels.astype(np.float32) - low) * (255 / (high - low)), 0, 255)
    picture = Image.fromarray(np.ascontiguousarray(grey.round().astype(np.uint8)))
    picture.thumbnail((most_pixels, most_pixels), Image.Resampling.BOX)
    content = io.BytesIO()
    picture.save(content, "WEBP", lossless=grey.size <= LOSSLESS_PIXELS, quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def outline(mask: np.ndarray) -> tuple[str, tuple[float, float]]:
    """Return outlines of a bool mask (rows, columns), SVG path data in half voxels; and their top.

    The lines pass midway between the centres of voxels within and without, as those of matplotlib's
    contours.

    Returns:
        the path data; the point's column and row, in voxels from the upper left corner.
    """
    lines = contour_generator(z=np.pad(mask, 1).astype(np.float32)).lines(0.5)
    # A padded mask's index is one more; a voxel's centre lies half a voxel from its edge.
    loops = [np.rint(2 * line - 1).astype(int) for line in lines]
    longest = max(loops, key=len)
    column, row = longest[longest[:, 1].argmin()] / 2
    return "".join(map(_path, loops)), (float(column), float(row))


def _path(loop: np.ndarray) -> str:
    """Write a closed loop of points (n, 2), last as first, without points on straight lines."""
    steps = np.diff(loop, axis=0)
    turns = (steps != np.roll(steps, 1, axis=0)).any(1)
    corners = loop[:-1][turns]
    moves = " ".join(f"{x} {y}" for x, y in np.diff(corners, axis=0).tolist())
    return f"M{corners[0, 0]} {corners[0, 1]}l{moves}z"
