"""The grid that volumes are learned on: turned to RAS, resampled to a spacing; and the way back.

The grid is that of MONAI's ``Orientationd("RAS")`` and ``Spacingd(align_corners=True)``. Where the
new axes are those of the file, which is nearly always, each axis is interpolated by itself, in a
fraction of the time and memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import nibabel as nib
import numpy as np
import torch
from monai.data.utils import AFFINE_TOL, affine_to_spacing, compute_shape_offset, zoom_affine
from monai.networks.layers import AffineTransform
from monai.networks.utils import to_norm_affine

BLOCK = 64  # planes that are interpolated by one matrix product


class Resampling:
    """The way from a file's voxels to the task's grid, and back.

    Args:
        shape: voxels of the file.
        affine: (4, 4), the file's voxel indices to mm.
        spacing: mm between the voxels of the grid, in RAS order; None: the file's own.

    Attributes:
        shape, affine: of the grid.
    """

    def __init__(self, shape: Sequence[int], affine: np.ndarray, spacing: Sequence[float] | None):
        self.file_shape = tuple(shape)
        # To RAS: which axis each becomes, and whether it flips
        self.turn = nib.orientations.io_orientation(affine)
        self.turned_shape = tuple(self.file_shape[axis] for axis in self._axes_of_file)
        turned = affine @ nib.orientations.inv_ornt_aff(self.turn, self.file_shape)
        self.shape, self.affine = self.turned_shape, turned
        if spacing is not None:
            own, spacing = affine_to_spacing(turned), np.asarray(spacing, np.float64)
            # Such an axis keeps its own
            near = (spacing - AFFINE_TOL <= own) & (own <= spacing + AFFINE_TOL)
            self.affine = zoom_affine(turned, np.where(near, own, spacing), diagonal=False)
            shape, offset = compute_shape_offset(self.turned_shape, turned, self.affine)
            self.shape, self.affine[:3, 3] = tuple(int(count) for count in shape), offset
        # The grid's indices to those of the turned file
        self.matrix = np.linalg.solve(turned, self.affine)
        same = self.shape == self.turned_shape and (
            np.allclose(self.affine, turned, atol=AFFINE_TOL)
            or np.allclose(self.matrix, np.eye(4), atol=AFFINE_TOL)
        )
        if same:
            self.affine, self.matrix = turned, None

    @property
    def _axes_of_file(self) -> list[int]:
        """The file's axis for each axis of the grid."""
        return np.argsort(self.turn[:, 0]).tolist()

    def apply(self, voxels: np.ndarray, *, nearest: bool = False) -> np.ndarray:
        """Bring voxels (channels, *file) to the grid: interpolated, float32; or the ``nearest``."""
        turned = voxels.transpose([0, *(axis + 1 for axis in self._axes_of_file)])
        return _resample(self._flipped(turned), self.matrix, self.shape, nearest)

    def undo(self, voxels: np.ndarray) -> np.ndarray:
        """Bring voxels (channels, *grid) back to the file's grid, interpolated, float32."""
        matrix = None if self.matrix is None else np.linalg.inv(self.matrix)
        turned = self._flipped(_resample(voxels, matrix, self.turned_shape, nearest=False))
        return turned.transpose([0, *(int(axis) + 1 for axis in self.turn[:, 0])])

    @property
    def is_separable(self) -> bool:
        """Whether the axes are those of the file, so that each can be interpolated by itself."""
        return self.matrix is None or not _is_sheared(np.linalg.inv(self.matrix), self.turned_shape)

    def undone_by_slabs(
        self, slabs: Iterable[tuple[int, np.ndarray]], axis: int
    ) -> Iterator[np.ndarray]:
        """Bring a volume that comes in slabs back to the file's voxels, but for its orientation.

        Args:
            slabs: first plane along ``axis`` of the grid, and (channels, *slab) in C order; one
                after another.

        Yields:
            (channels, *slab), float32; `as_in_file` turns what they make together.
        """
        if self.matrix is None:
            yield from (slab for _, slab in slabs)
            return
        places = _places(np.linalg.inv(self.matrix), self.shape, self.turned_shape)
        done, last = 0, None
        for start, slab in slabs:
            if last is not None:  # a plane between two slabs needs both
                slab, start = np.concatenate([last, slab], 1 + axis), start - 1
            last = slab.take([-1], 1 + axis)
            end = start + slab.shape[1 + axis]
            is_last, reached = end == self.shape[axis], places[axis]
            stop = len(reached) if is_last else np.searchsorted(reached, end - 1, "right")
            if stop == done:
                continue
            wanted, done = [*places[:axis], reached[done:stop] - start, *places[axis + 1 :]], stop
            growth = [len(place) / size for place, size in zip(wanted, slab.shape[1:], strict=True)]
            for other in np.argsort(growth, kind="stable").tolist():
                slab = _interpolate(slab, 1 + other, wanted[other])
            yield slab

    def as_in_file(self, turned: np.ndarray) -> np.ndarray:
        """Turn a volume (x, y, z) of the file's voxels from RAS back to the file's order."""
        flipped = self._flipped(turned[None])[0]
        return np.ascontiguousarray(flipped.transpose(self.turn[:, 0].astype(int)))

    def _flipped(self, turned: np.ndarray) -> np.ndarray:
        # An axis of one voxel stays: its negative stride would count as contiguous, and torch takes
        # none.
        axes = [
            axis + 1
            for axis, file_axis in enumerate(self._axes_of_file)
            if self.turn[file_axis, 1] < 0 and self.file_shape[file_axis] > 1
        ]
        return np.flip(turned, axes)


def _resample(
    voxels: np.ndarray, matrix: np.ndarray | None, shape: tuple[int, ...], nearest: bool
) -> np.ndarray:
    """Sample voxels (channels, *spatial) on a grid of ``shape``, placed by ``matrix``."""
    if matrix is None:
        # A copy, so that no stride is negative
        return voxels.astype(voxels.dtype if nearest else np.float32)
    if _is_sheared(matrix, shape):
        return _resample_sheared(voxels, matrix, shape, nearest)
    places = _places(matrix, voxels.shape[1:], shape)
    if nearest:
        mixing = _mixing(matrix, shape)
        halfway = [np.abs(place - np.floor(place) - 0.5).min() for place in places]
        # The other axes decide to which side it is rounded
        if ((mixing > 0) & (halfway <= 2 * mixing + 1e-9)).any():
            return _resample_sheared(voxels, matrix, shape, nearest)
    # In the order of the file's memory, so that nothing is moved; first the axes that lose most
    # voxels.
    order = sorted(range(3), key=lambda axis: -abs(voxels.strides[axis + 1]))
    in_order = [0, *(axis + 1 for axis in order)]
    dtype = voxels.dtype if nearest else np.float32
    result = np.ascontiguousarray(voxels.transpose(in_order), dtype)
    for place in sorted(range(3), key=lambda place: shape[order[place]] / result.shape[place + 1]):
        if nearest:
            result = result.take(np.rint(places[order[place]]).astype(np.int64), place + 1)
        else:
            result = _interpolate(result, place + 1, places[order[place]])
    return result.transpose(np.argsort(in_order))


def _mixing(matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return by how many voxels a grid's other axes move a place along each axis."""
    return np.abs(matrix[:3, :3] * (1 - np.eye(3))) @ shape


def _is_sheared(matrix: np.ndarray, shape: Sequence[int]) -> bool:
    return bool((_mixing(matrix, shape) > 1e-3).any())  # voxels


def _places(matrix: np.ndarray, shape: Sequence[int], new_shape: Sequence[int]) -> list[np.ndarray]:
    """Tell for each axis where along the old one the new voxels are.

    In MONAI's arithmetic, so that a label halfway between two voxels goes to the same one as there.
    """
    theta = to_norm_affine(torch.from_numpy(matrix)[None], shape, new_shape, align_corners=True)[0]
    places = []
    for axis, (size, new_size) in enumerate(zip(shape, new_shape, strict=True)):
        grid = torch.zeros(1, dtype=torch.float64)
        if new_size > 1:
            grid = torch.linspace(-1, 1, new_size, dtype=torch.float64)
        place = grid * theta[axis, axis] + theta[axis, 3]
        places.append((((place + 1) / 2) * (size - 1)).clamp(0, size - 1).numpy())
    return places


def _interpolate(voxels: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Interpolate linearly along one axis of (channels, x, y, z), by products of matrices."""
    low = np.floor(places).astype(np.int64)
    high = np.minimum(low + 1, voxels.shape[axis] - 1)
    share = torch.from_numpy((places - low).astype(np.float32))
    tensor, parts = torch.from_numpy(voxels if voxels.flags.writeable else voxels.copy()), []
    for start in range(0, len(places), BLOCK):
        rows = slice(start, start + BLOCK)
        first, end = low[rows].min(), high[rows].max() + 1
        weights = torch.zeros(len(low[rows]), end - first)
        row = torch.arange(len(weights))
        weights[row, torch.from_numpy(low[rows] - first)] += 1 - share[rows]
        weights[row, torch.from_numpy(high[rows] - first)] += share[rows]
        source = tensor.narrow(axis, int(first), int(end - first))
        if axis == 3:
            parts.append(source @ weights.T)
        else:
            product = weights @ source.flatten(axis + 1)
            parts.append(product.unflatten(-1, voxels.shape[axis + 1 :]))
    return torch.cat(parts, axis).numpy()


def in_c_order(voxels: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Copy (channels, x, y, z) to an array in C order, quickly where it has a file's order."""
    source = torch.from_numpy(voxels.transpose(0, 3, 2, 1)).to(dtype)
    result = torch.empty(voxels.shape, dtype=dtype)
    if not source.is_contiguous():
        return result.copy_(source.permute(0, 3, 2, 1)).numpy()
    _, z, y, x = source.shape
    for target, channel in zip(result, source, strict=True):
        # As matrices, which PyTorch transposes block by block; a volume it would turn voxel by
        # voxel.
        planes = channel.view(z, y * x).t().contiguous().view(y, x, z)
        target.copy_(planes.transpose(0, 1))
    return result.numpy()


def _resample_sheared(
    voxels: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...], nearest: bool
) -> np.ndarray:
    """Do as `_resample`, where the axes of old and new grid are not parallel."""
    mode = "nearest" if nearest else "bilinear"
    transform = AffineTransform(
        shape, mode=mode, padding_mode="border", align_corners=True, normalized=False
    )
    source = torch.from_numpy(voxels.astype(np.float64))[None]
    result = transform(source, torch.from_numpy(matrix)[None])[0].numpy()
    return result.astype(voxels.dtype if nearest else np.float32)
