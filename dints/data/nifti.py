"""NIfTI files: headers, voxels, and segmentations written on an image's grid."""

from __future__ import annotations

import gzip
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from dints.errors import UserError
from dints.files import write_atomically

GZIP_RATIO = 1032  # deflate cannot pack more bytes than that into one
GZIP = b"\x1f\x8b"  # what a file begins with
HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348
CHUNK = 1 << 20  # bytes
# Bytes after the voxels that a compressed file may have: a checksum lies at their end
SLACK = 64 << 20
# mm from the scanner's origin. Headers keep places as float32, which at 1e6 mm are steps of 0.06
# mm, and affines of an image and its label may differ by 0.001 mm. Resampling is in float64, which
# would do up to 1e15.
FARTHEST = 1e6
# Of a header's code of a unit, metre and micrometre; mm (2), none (0) and codes that mean nothing
# are taken for mm.
MM, UNIT_OF_LENGTH = {1: 1000.0, 3: 0.001}, 0b111
QUIET = logging.Logger("nibabel", logging.CRITICAL)  # its repairs of headers need no line


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
        """Bytes of the file up to the end of its voxels, once it is decompressed."""
        voxels = self.num_channels * int(np.prod(self.shape, dtype=object))
        return self.offset + voxels * self.nifti.get_data_dtype().itemsize

    @property
    def offset(self) -> int:
        """Bytes before the first voxel."""
        return max(int(self.nifti.get_data_offset()), self.nifti.single_vox_offset)


def read_header(path: str) -> Header:
    """Read the header of a .nii or .nii.gz file; no voxel is read.

    Raises:
        UserError: it is none, is not 3D, has no usable affine, or promises more voxels than the
            file can hold.
    """
    with _opened(path) as file:
        start = file.read(HEADER_BYTES)
        ratio = GZIP_RATIO if isinstance(file, gzip.GzipFile) else 1
        most = ratio * os.path.getsize(path)
    header = _parse_header(path, start)
    if header.num_bytes > most:
        shape = " x ".join(map(str, header.shape))
        raise _unreadable(path, f"its header promises {shape} voxels, more than the file can hold")
    return header


def read_voxels(header: Header) -> np.ndarray:
    """Read the voxels (channels, x, y, z) of the file.

    They are of its own type, or scaled (``scl_slope``) as float32. A compressed file is read to its
    end, so that damage anywhere in it is noticed.

    Raises:
        UserError: it is truncated or damaged, or the machine's memory does not suffice.
    """
    path, nifti = header.path, header.nifti
    try:
        with _opened(path) as file:
            content = file.read(header.num_bytes)  # nibabel would check no checksum
            if isinstance(file, gzip.GzipFile):
                _read_to_end(file, header)
        if len(content) < header.num_bytes:
            raise _unreadable(
                path, f"it is truncated: {len(content)} of {header.num_bytes} bytes are there"
            )
        count = header.num_channels * int(np.prod(header.shape))
        voxels = np.frombuffer(content, nifti.get_data_dtype(), count, header.offset)
        voxels = voxels.reshape((*header.shape, -1), order="F")
        slope, intercept = nifti.get_slope_inter()
        if slope is not None and (slope, intercept) != (1, 0):
            with np.errstate(over="ignore"):  # who uses them checks that they are finite
                voxels = np.multiply(voxels, slope, dtype=np.float32, casting="unsafe")
                voxels += np.float32(intercept or 0)
        native = voxels.dtype.newbyteorder("=")
        return np.moveaxis(voxels.astype(native, copy=False), -1, 0)
    except MemoryError as error:
        raise UserError(
            f"{path} needs {header.num_bytes / 2**30:.1f} GiB of memory, which this machine does "
            "not have free: lower --num_workers, or use a larger machine"
        ) from error


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """Open a file, decompressed where it begins as a gzip file does, whatever its name is.

    Raises:
        UserError: here or in the block: it cannot be read, or its compression is damaged.
    """
    try:
        with open(path, "rb") as file:
            is_compressed = file.read(2) == GZIP
        with gzip.open(path) if is_compressed else open(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _unreadable(path, f"its compression is damaged ({error})") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be read: {reason}; fix or replace the file") from error


def _read_to_end(file: BinaryIO, header: Header) -> None:
    """Read on, for the checksum, and keep nothing; a small file can hold gigabytes of zeros."""
    passed = 0
    while part := len(file.read(CHUNK)):
        passed += part
        if passed > SLACK:
            more = f"{SLACK >> 20} MiB and more follow the {header.num_bytes} bytes"
            raise _unreadable(header.path, f"{more} that its header promises")


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
        affine = np.array(nifti.get_best_affine(), np.float64)
        affine[:3] *= MM.get(int(nifti["xyzt_units"]) & UNIT_OF_LENGTH, 1.0)
        nifti.get_data_dtype(), nifti.get_slope_inter(), nifti.get_data_offset()
    except (HeaderDataError, WrapStructError, ValueError, TypeError, OverflowError) as error:
        raise _unreadable(path, f"its header is damaged ({error})") from error
    if nifti["magic"].item() not in (b"n+1", b"n+2"):
        raise _unreadable(
            path, f"its header says {nifti['magic'].item()!r}, where a single file has n+1 or n+2"
        )
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 5 and shape[3] == 1:  # NIfTI's vectors: the fourth dimension is time
        shape = (*shape[:3], shape[4])
    if len(shape) not in (3, 4) or min(shape) < 1:
        dimensions = " x ".join(map(str, shape))
        raise UserError(
            f"{path} is a {len(shape)}D image ({dimensions}) where a volume of 3 dimensions is "
            "expected: fix or remove the case"
        )
    if nifti.get_data_dtype().kind not in "iufb":
        raise UserError(
            f"{path} holds {nifti.get_value_label('datatype')} values, not numbers: convert it, or "
            "remove the case"
        )
    _check_affine(path, affine)
    return Header(path, shape[:3], shape[3] if len(shape) == 4 else 1, affine, nifti)


def _check_affine(path: str, affine: np.ndarray) -> None:
    """Refuse one that is not finite, has no voxels of a nm to a km, or axes in a plane."""
    with np.errstate(over="ignore"):
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
    is_sane = np.isfinite(affine).all() and sizes.min() > 1e-6 and sizes.max() < 1e6  # mm
    if not is_sane or abs(np.linalg.det(affine[:3, :3] / sizes)) <= 1e-3:
        raise UserError(
            f"{path} has an affine whose axes span no volume ({affine[:3].tolist()}): fix its "
            "header, or remove the case"
        )
    if np.abs(affine[:3, 3]).max() > FARTHEST:
        place = ", ".join(f"{along:g}" for along in affine[:3, 3])
        raise UserError(
            f"{path} has its first voxel at {place} mm, and places beyond {FARTHEST:g} mm are too "
            "coarse in a header: correct its affine, or remove the case"
        )


def save_segmentation(segmentation: np.ndarray, image: Header, path: Path) -> None:
    """Write labels (x, y, z), uint8, as NIfTI, with the place that the image's header has."""
    save_map(segmentation, image, path, unit=1)


def save_map(values: np.ndarray, image: Header, path: Path, unit: int) -> None:
    """Write a map (x, y, z) or (x, y, z, classes), uint8, as NIfTI, with the image's place.

    Args:
        unit: what a voxel holds for 1; the file's ``scl_slope`` says it.
    """
    file = nib.Nifti1Image(values, image.nifti.get_best_affine())  # in the header's own unit
    file.set_qform(*image.nifti.get_qform(coded=True))
    file.set_sform(*image.nifti.get_sform(coded=True))
    file.header["xyzt_units"] = int(image.nifti["xyzt_units"]) & UNIT_OF_LENGTH
    if unit != 1:
        file.header.set_slope_inter(1 / unit, 0)  # voxels are written as they are
    content = file.to_bytes()
    if path.suffix.lower() == ".gz":
        content = gzip.compress(content, mtime=0)
    write_atomically(path, content)
