"""NIfTI files as arrays, and the grid that they are learned on: turned to RAS, resampled to a spacing; and back.

The grid is that of MONAI's ``Orientationd("RAS")`` and ``Spacingd(align_corners=True)``. Where the new axes are those
of the file, which is nearly always, each axis is interpolated by itself, in a fraction of the time and memory.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data.utils import AFFINE_TOL, affine_to_spacing, compute_shape_offset, zoom_affine
from monai.networks.layers import AffineTransform
from monai.networks.utils import to_norm_affine
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from dints.errors import UserError

GZIP_RATIO = 1032  # deflate cannot pack more bytes than that into one
GZIP = b"\x1f\x8b"  # what a file begins with
HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348
CHUNK = 1 << 20  # bytes
QUIET = logging.Logger("nibabel", logging.CRITICAL)  # what it mends in a header is not worth a line that names no file
BLOCK = 64  # planes that are interpolated by one matrix product


@dataclass(frozen=True)
class Header:
    """What a NIfTI header says.

    Attributes:
        path: the file.
        shape: voxels along x, y, z.
        num_channels: of the file: its fourth dimension (or fifth, as in NIfTI's vectors).
        affine: (4, 4), voxel indices to mm.
    """

    path: str
    shape: tuple[int, int, int]
    num_channels: int
    affine: np.ndarray
    nifti: nib.Nifti1Header

    @property
    def spacing(self) -> np.ndarray:
        """mm between voxels along x, y and z of the file."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def num_bytes(self) -> int:
        """Of the voxels, and of all that stands before them."""
        voxels = self.num_channels * int(np.prod(self.shape, dtype=object))
        return self.offset + voxels * self.nifti.get_data_dtype().itemsize

    @property
    def offset(self) -> int:
        """Of the first voxel in the file, bytes."""
        return max(int(self.nifti.get_data_offset()), self.nifti.single_vox_offset)


def read_header(path: str) -> Header:
    """The header of a .nii or .nii.gz file; no voxel is read.

    Raises:
        UserError: it is none, is not 3D, has no usable affine, or promises more voxels than the file can hold.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(HEADER_BYTES)
            size = file.seek(0, 2)
            if start[:2] == GZIP:
                file.seek(0)
                start = gzip.GzipFile(fileobj=file).read(HEADER_BYTES)
                size *= GZIP_RATIO
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _unreadable(path, f"its compression is damaged ({error})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; mend or replace the file") from error
    header = _parse_header(path, start)
    if header.num_bytes > size:
        dimensions = " x ".join(map(str, header.shape))
        raise _unreadable(path, f"its header promises {dimensions} voxels, more than the file can hold")
    return header


def read_voxels(header: Header) -> np.ndarray:
    """The voxels (channels, x, y, z) of the file, in its own type, or scaled (``scl_slope``) as float32.

    The whole file is read, so that damage anywhere in it is noticed.

    Raises:
        UserError: it is truncated or damaged, or the machine's memory does not suffice.
    """
    path, nifti = header.path, header.nifti
    try:
        content = Path(path).read_bytes()
        if content[:2] == GZIP:
            content = _gunzip(path, content, header.num_bytes)
        dtype = nifti.get_data_dtype()
        if len(content) < header.num_bytes:
            raise _unreadable(path, f"it is truncated: {len(content)} of {header.num_bytes} bytes are there")
        count = header.num_channels * int(np.prod(header.shape))
        voxels = np.frombuffer(content, dtype, count, header.offset).reshape((*header.shape, -1), order="F")
        slope, intercept = nifti.get_slope_inter()
        if slope is not None and (slope, intercept) != (1, 0):
            with np.errstate(over="ignore"):  # infinite voxels are told by who uses them
                voxels = np.multiply(voxels, slope, dtype=np.float32, casting="unsafe")
                voxels += np.float32(intercept or 0)
        return np.moveaxis(voxels.astype(voxels.dtype.newbyteorder("="), copy=False), -1, 0)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; mend or replace the file") from error
    except MemoryError as error:
        raise UserError(
            f"{path} needs {header.num_bytes / 2**30:.1f} GiB of memory, which this machine does not have free: "
            "lower --num_workers, or use a larger machine"
        ) from error


def _unreadable(path: str, finding: str) -> UserError:
    return UserError(f"{path} cannot be read: {finding}; replace the file")


def _parse_header(path: str, start: bytes) -> Header:
    kinds = {
        np.array(size, f"{order}i4").tobytes(): (kind, order)
        for kind, size in ((nib.Nifti1Header, 348), (nib.Nifti2Header, 540))
        for order in "<>"
    }
    if start[:4] not in kinds:
        raise _unreadable(path, "it is no NIfTI file (.nii or .nii.gz)")
    kind, order = kinds[start[:4]]
    try:
        nifti = kind(start[: kind.template_dtype.itemsize], order, check=False)
        nifti.check_fix(logger=QUIET)
        shape = tuple(int(count) for count in nifti.get_data_shape())
        affine = np.asarray(nifti.get_best_affine(), np.float64)
        nifti.get_data_dtype(), nifti.get_slope_inter(), nifti.get_data_offset()
    except (HeaderDataError, WrapStructError, ValueError, TypeError, OverflowError) as error:
        raise _unreadable(path, f"its header is damaged ({error})") from error
    if nifti["magic"].item() not in (b"n+1", b"n+2"):
        raise _unreadable(path, f"its header says {nifti['magic'].item()!r}, where a single file has n+1 or n+2")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 5 and shape[3] == 1:  # NIfTI's vectors: the fourth dimension is time
        shape = (*shape[:3], shape[4])
    if len(shape) not in (3, 4) or min(shape) < 1:
        dimensions = " x ".join(map(str, shape))
        raise UserError(
            f"{path} is a {len(shape)}D image ({dimensions}) where a volume of 3 dimensions is expected: mend or "
            "remove the case"
        )
    if nifti.get_data_dtype().fields or nifti.get_data_dtype().kind not in "iufb":
        raise UserError(
            f"{path} holds {nifti.get_value_label('datatype')} values, not numbers: convert it, or remove the case"
        )
    if not _spans_space(affine):
        raise UserError(
            f"{path} has an affine whose axes span no volume ({affine[:3].tolist()}): mend its header, or remove the "
            "case"
        )
    return Header(path, shape[:3], shape[3] if len(shape) == 4 else 1, affine, nifti)


def _spans_space(affine: np.ndarray) -> bool:
    """Whether it is finite, with voxels of a nm to a km, and axes that do not lie in a plane."""
    with np.errstate(over="ignore"):
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
    is_sane = np.isfinite(affine).all() and sizes.min() > 1e-6 and sizes.max() < 1e6  # mm
    return bool(is_sane and abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-3)


def _gunzip(path: str, content: bytes, limit: int) -> bytes:
    """The first ``limit`` bytes; the rest is decompressed too, for its checksum, but not kept."""
    parts, kept = [], 0
    while content[:2] == GZIP:  # one member after another
        stream = zlib.decompressobj(31)
        try:
            while not stream.eof:
                part = stream.decompress(content, max(limit - kept, CHUNK))
                content = stream.unconsumed_tail
                if not part and not content and not stream.eof:
                    raise _unreadable(path, "its compressed data ends too early")
                if kept < limit:
                    parts.append(part)
                    kept += len(part)
        except zlib.error as error:
            raise _unreadable(path, f"its compressed data is damaged ({error})") from error
        content = stream.unused_data
    return parts[0] if len(parts) == 1 else b"".join(parts)


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
        self.turn = nib.orientations.io_orientation(affine)  # to RAS: which axis each becomes, and whether it flips
        self.turned_shape = tuple(self.file_shape[axis] for axis in self._axes_of_file)
        turned = affine @ nib.orientations.inv_ornt_aff(self.turn, self.file_shape)
        self.shape, self.affine = self.turned_shape, turned
        if spacing is not None:
            own, spacing = affine_to_spacing(turned), np.asarray(spacing, np.float64)
            near = (spacing - AFFINE_TOL <= own) & (own <= spacing + AFFINE_TOL)  # such an axis keeps its own
            self.affine = zoom_affine(turned, np.where(near, own, spacing), diagonal=False)
            shape, offset = compute_shape_offset(self.turned_shape, turned, self.affine)
            self.shape, self.affine[:3, 3] = tuple(int(count) for count in shape), offset
        self.matrix = np.linalg.solve(turned, self.affine)  # the grid's indices to those of the turned file
        same = self.shape == self.turned_shape and (
            np.allclose(self.affine, turned, atol=AFFINE_TOL) or np.allclose(self.matrix, np.eye(4), atol=AFFINE_TOL)
        )
        if same:
            self.affine, self.matrix = turned, None

    @property
    def _axes_of_file(self) -> list[int]:
        """For each axis of the grid, that of the file."""
        return np.argsort(self.turn[:, 0]).tolist()

    def apply(self, voxels: np.ndarray, *, nearest: bool = False) -> np.ndarray:
        """Voxels (channels, *file) on the grid: interpolated, float32; or of the ``nearest`` voxel, in their type."""
        turned = voxels.transpose([0, *(axis + 1 for axis in self._axes_of_file)])
        return _resample(self._flipped(turned), self.matrix, self.shape, nearest)

    def undo(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (channels, *grid) on the file's grid, interpolated, float32."""
        matrix = None if self.matrix is None else np.linalg.inv(self.matrix)
        turned = self._flipped(_resample(voxels, matrix, self.turned_shape, nearest=False))
        return turned.transpose([0, *(int(axis) + 1 for axis in self.turn[:, 0])])

    def _flipped(self, turned: np.ndarray) -> np.ndarray:
        # An axis of one voxel stays: its negative stride would count as contiguous, and torch takes none.
        steps = [int(self.turn[axis, 1]) if self.file_shape[axis] > 1 else 1 for axis in self._axes_of_file]
        return turned[(slice(None), *(slice(None, None, step) for step in steps))]


def _resample(voxels: np.ndarray, matrix: np.ndarray | None, shape: tuple[int, ...], nearest: bool) -> np.ndarray:
    """Voxels (channels, *spatial) at the places that ``matrix`` gives to the indices of a grid of ``shape``."""
    if matrix is None:
        return voxels.astype(voxels.dtype if nearest else np.float32)  # a copy, so that no stride is negative
    mixing = np.abs(matrix[:3, :3] * (1 - np.eye(3))) @ shape
    if (mixing > 1e-3).any():  # voxels
        return _resample_sheared(voxels, matrix, shape, nearest)
    places = _places(matrix, voxels.shape[1:], shape)
    if nearest:
        halfway = [np.abs(place - np.floor(place) - 0.5).min() for place in places]
        if ((mixing > 0) & (halfway <= 2 * mixing + 1e-9)).any():  # the other axes decide to which side it is rounded
            return _resample_sheared(voxels, matrix, shape, nearest)
    # In the order of the file's memory, so that nothing is moved; first the axes that lose most voxels.
    order = sorted(range(3), key=lambda axis: -abs(voxels.strides[axis + 1]))
    in_order = [0, *(axis + 1 for axis in order)]
    result = np.ascontiguousarray(voxels.transpose(in_order), voxels.dtype if nearest else np.float32)
    for place in sorted(range(3), key=lambda place: shape[order[place]] / result.shape[place + 1]):
        if nearest:
            result = result.take(np.rint(places[order[place]]).astype(np.int64), place + 1)
        else:
            result = _interpolate(result, place + 1, places[order[place]])
    return result.transpose(np.argsort(in_order))


def _places(matrix: np.ndarray, shape: Sequence[int], new_shape: Sequence[int]) -> list[np.ndarray]:
    """For each axis, where along the old axis the new voxels are, within it; in MONAI's arithmetic, rounding included.

    A label that lies halfway between two voxels goes to the same one as there.
    """
    theta = to_norm_affine(torch.from_numpy(matrix)[None], shape, new_shape, align_corners=True)[0]
    places = []
    for axis, (size, new_size) in enumerate(zip(shape, new_shape, strict=True)):
        grid = torch.linspace(-1, 1, new_size, dtype=torch.float64) if new_size > 1 else torch.zeros(1).double()
        place = grid * theta[axis, axis] + theta[axis, 3]
        places.append((((place + 1) / 2) * (size - 1)).clamp(0, size - 1).numpy())
    return places


def _interpolate(voxels: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Linear interpolation along one axis of (channels, x, y, z): products with small matrices, two weights a row."""
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
            parts.append((weights @ source.flatten(axis + 1)).unflatten(-1, voxels.shape[axis + 1 :]))
    return torch.cat(parts, axis).numpy()


def in_c_order(voxels: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Volumes (channels, x, y, z) as a new array of ``dtype`` in C order; quick where they have a file's order."""
    source = torch.from_numpy(voxels.transpose(0, 3, 2, 1)).to(dtype)
    result = torch.empty(voxels.shape, dtype=dtype)
    if not source.is_contiguous():
        return result.copy_(source.permute(0, 3, 2, 1)).numpy()
    _, z, y, x = source.shape
    for target, channel in zip(result, source, strict=True):
        # As matrices, which PyTorch transposes block by block; a volume it would turn voxel by voxel.
        planes = channel.view(z, y * x).t().contiguous().view(y, x, z)
        target.copy_(planes.transpose(0, 1))
    return result.numpy()


def _resample_sheared(voxels: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...], nearest: bool) -> np.ndarray:
    """As `_resample`, where the axes of old and new grid are not parallel."""
    mode = "nearest" if nearest else "bilinear"
    transform = AffineTransform(shape, mode=mode, padding_mode="border", align_corners=True, normalized=False)
    source = torch.from_numpy(voxels.astype(np.float64))[None]
    result = transform(source, torch.from_numpy(matrix)[None])[0].numpy()
    return result.astype(voxels.dtype if nearest else np.float32)
