"""DICOM series, as scanners and archives have them: a folder of slices, made one NIfTI file to be read as any other.

pydicom, which reads them, is not among the requirements.
"""

from __future__ import annotations

import gzip
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from dints.errors import UserError
from dints.files import write_atomically

if TYPE_CHECKING:
    from pydicom import Dataset

MARK, PLACE = b"DICM", 128  # what a DICOM file has, and where
PARALLEL = 1e-3  # by which the slices' axes may differ, an entry
EVEN = 0.05  # by which the distance of two slices may differ from the others', as a share
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# What is read of a header at first; nothing of the patient.
TAGS = [
    "SeriesInstanceUID",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
]


def folders_with_dicom(folder: Path) -> list[Path]:
    """List the folders, ``folder`` itself and those in it, that hold DICOM files, but for hidden ones."""
    found = {
        path.parent
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and is_dicom(path)
    }
    return sorted(found)


def is_dicom(path: Path) -> bool:
    """Tell whether it is a DICOM file that may hold an image; a DICOMDIR is a table of contents."""
    if not path.is_file() or path.name == "DICOMDIR":
        return False
    with path.open("rb") as file:
        return file.read(PLACE + len(MARK))[PLACE:] == MARK


def write_nifti(folder: Path, path: Path) -> None:
    """Write the series in a folder as NIfTI: voxels in the scanner's units (CT: HU), and their place in space.

    Files without an image, such as reports and contours, are passed over.

    Raises:
        UserError: pydicom is not installed; the folder holds more than one series, or slices that make no volume
            (missing, twice, not parallel); or it cannot be read.
    """
    voxels, affine = read_series(folder)
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    write_atomically(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels (x, y, z) of the series in a folder, and their affine (4, 4), to mm in RAS.

    They are int16 where they are whole numbers of that range, as HU are, else float32.
    """
    slices = _slices(folder)
    affine, order = _geometry(slices, folder)
    planes = [_plane(slices[number][0]) for number in order]
    voxels = np.stack(planes, -1)
    limits = np.iinfo(np.int16)
    if voxels.min() >= limits.min and voxels.max() <= limits.max and (voxels == np.rint(voxels)).all():
        voxels = voxels.astype(np.int16)
    return voxels, affine


def _pydicom(folder: Path):
    try:
        return importlib.import_module("pydicom")
    except ModuleNotFoundError as error:
        raise UserError(f"{folder} is a DICOM series, which pydicom reads: pip install pydicom") from error


def _slices(folder: Path) -> list[tuple[Path, Dataset]]:
    """Read the headers of the images in a folder, which must be of one series and one shape."""
    pydicom = _pydicom(folder)
    slices = []
    for path in sorted(path for path in folder.iterdir() if is_dicom(path)):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
        except (pydicom.errors.InvalidDicomError, OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read as DICOM ({error}): replace the file") from error
        if "Rows" in header:
            slices.append((path, header))
    if not slices:
        raise UserError(f"{folder} holds DICOM files, but no image among them: give the folder of a series")
    for name, fault in (
        ("SeriesInstanceUID", "{} DICOM series: give each a folder of its own"),
        ("Rows", "slices of {} heights: it is no volume"),
        ("Columns", "slices of {} widths: it is no volume"),
    ):
        count = len({str(header.get(name)) for _, header in slices})
        if count > 1:
            raise UserError(f"{folder} holds {fault.format(count)}")
    for path, header in slices:
        if int(header.get("NumberOfFrames", 1) or 1) > 1 or int(header.get("SamplesPerPixel", 1)) > 1:
            raise UserError(f"{path} holds several frames or colours, not one slice: convert the series to NIfTI")
        for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            if tag not in header:
                raise UserError(f"{path} does not say where it lies (no {tag}): convert the series to NIfTI")
    return slices


def _geometry(slices: Sequence[tuple[Path, Dataset]], folder: Path) -> tuple[np.ndarray, list[int]]:
    """Return the affine to mm in RAS, and the slices' order along the normal of their planes.

    DICOM Part 3, C.7.6.2.1.1: columns advance along the first three numbers of ImageOrientationPatient, rows along the
    others; PixelSpacing has the distance of rows first.
    """
    axes = np.array([header.ImageOrientationPatient for _, header in slices], float)
    spacings = np.array([header.PixelSpacing for _, header in slices], float)
    if np.abs(axes - axes[0]).max() > PARALLEL or np.abs(spacings - spacings[0]).max() > PARALLEL:
        raise UserError(f"{folder} holds slices that are not parallel, or of several spacings: it is no volume")
    along_columns, along_rows = axes[0, :3], axes[0, 3:]
    normal = np.cross(along_columns, along_rows)
    positions = np.array([header.ImagePositionPatient for _, header in slices], float)
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    if len(slices) == 1:
        step = normal * float(slices[0][1].get("SliceThickness") or 1)
    else:
        steps = np.diff(heights[order])
        usual = float(np.sort(steps)[(len(steps) - 1) // 2])  # the median, never between two
        if steps.min() < 1e-3:
            raise UserError(f"{folder} holds several slices at one place: give a folder with one image of each place")
        if np.abs(steps - usual).max() > EVEN * usual:
            place = int(np.abs(steps - usual).argmax())
            raise UserError(
                f"{folder} has slices {usual:.4g} mm apart, but {steps[place]:.4g} mm between "
                f"{slices[order[place]][0].name} and {slices[order[place + 1]][0].name}: complete the series"
            )
        step = (positions[order[-1]] - positions[order[0]]) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_columns * spacings[0, 1], along_rows * spacings[0, 0]
    affine[:3, 2], affine[:3, 3] = step, positions[order[0]]
    return LPS_TO_RAS @ affine, order.tolist()


def _plane(path: Path) -> np.ndarray:
    """Read the voxels (x, y) of a slice, float32, in the scanner's units."""
    pydicom = _pydicom(path.parent)
    try:
        whole = pydicom.dcmread(path)
        values = whole.pixel_array.astype(np.float32)
    # pydicom's words for a compression that it has no decoder of, and for pixels that are cut short
    except (RuntimeError, NotImplementedError, AttributeError, ValueError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be decoded ({reason}): convert the series to NIfTI") from error
    return values.T * float(whole.get("RescaleSlope", 1)) + float(whole.get("RescaleIntercept", 0))
