"""DICOM series: slices, or frames in one file, which become one NIfTI file.

Whatever a header lacks or says wrongly ends in one line that names the file; no slice is guessed,
moved or left out. pydicom, which reads them, is not among the requirements.
"""

from __future__ import annotations

import gzip
import importlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from dints.errors import UserError
from dints.files import write_atomically

if TYPE_CHECKING:
    from pydicom import Dataset

MARK, PLACE = b"DICM", 128  # what a DICOM file has, and where
# Without it (no preamble), a file begins with the tag of its first element, then with its type or
# its length.
BARE = re.compile(
    rb"(\x02\x00[\0-\x02]\0|\x08\x00[\0-\x20]\0)(UL|OB|UI|CS|DA|TM|SH|LO|[\0-\x40]\0\0\0)",
    re.DOTALL,
)
SAME = 1e-4  # by which orientation (an entry) and spacing (mm) may differ between slices
PERPENDICULAR = 1e-3  # by which directions may miss unit length and a right angle
DISPLACED = 0.1  # voxels that a slice may lie off its place
STEEPEST = 1.0  # mm sideways per mm of height; a gantry tilts by 30 degrees, 0.58
SIZES = 1e-3, 1e3  # mm of a voxel's sides
FLOATS = -3e38, 3e38  # what voxels and affine can be
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
FRAMES, SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
# Where an enhanced object keeps for each frame, or for all, what other files have at the top.
MACROS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)
# What is read of a header at first; nothing of the patient.
TAGS = [
    "SOPClassUID",
    "SeriesInstanceUID",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    FRAMES,
    SHARED,
]


@dataclass(frozen=True)
class Slice:
    """What a header says of a slice: a file, or a frame of one.

    Attributes:
        frame: which of the file's.
        shape: columns and rows.
        axes: (2, 3), unit vectors in LPS along which columns and rows are counted.
        spacing: mm along them.
        scale: slope and intercept, where the header has them.
    """

    path: Path
    frame: int
    series: str
    shape: tuple[int, int]
    position: np.ndarray
    axes: np.ndarray
    spacing: np.ndarray
    thickness: float | None
    scale: tuple[float, float] | None


def folders_with_dicom(folder: Path) -> list[Path]:
    """List ``folder`` and the folders in it that hold DICOM files, without hidden ones."""
    found = {
        path.parent
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and is_dicom(path)
    }
    return sorted(found)


def is_dicom(path: Path) -> bool:
    """Tell whether it is a DICOM file that may hold an image; a DICOMDIR is a table of contents."""
    try:
        if not path.is_file() or path.name == "DICOMDIR":
            return False
        with path.open("rb") as file:
            start = file.read(PLACE + len(MARK))
    except OSError:
        return False  # named where its folder holds a series
    return start[PLACE:] == MARK or BARE.match(start) is not None


def write_nifti(folder: Path, path: Path) -> None:
    """Write the series in a folder as NIfTI, with voxels in the scanner's units (CT: HU).

    Files without an image, such as reports and contours, are passed over.

    Raises:
        UserError: pydicom is not installed; the folder holds more than one series, or slices that
            make no volume (missing, twice, displaced, not parallel); or a file cannot be read, or
            does not say what it has to.
    """
    voxels, affine = read_series(folder)
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    write_atomically(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels (x, y, z) of the series in a folder, and their affine (4, 4), to mm in RAS.

    They are int16 where they are whole numbers of that range, as HU are, else float32.
    """
    # Pydicom's, of what it repairs: all that counts is checked here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        slices = _slices(folder)
        affine, order = _geometry(slices, folder)
        voxels = np.empty((*slices[0].shape, len(slices)), np.float32, order="F")
        for path, of_path in groupby(
            zip(slices, np.argsort(order), strict=True), lambda pair: pair[0].path
        ):
            of_path = list(of_path)
            pixels = _pixels(path, len(of_path))
            for one, place in of_path:
                slope, intercept = one.scale or (1.0, 0.0)
                voxels[:, :, place] = pixels[one.frame].T.astype(np.float32) * slope + intercept
    limits = np.iinfo(np.int16)
    planes = np.moveaxis(voxels, -1, 0)
    if all(
        limits.min <= plane.min() and plane.max() <= limits.max and not (plane % 1).any()
        for plane in planes
    ):
        voxels = voxels.astype(np.int16)
    return voxels, affine


def _pydicom(folder: Path):
    try:
        pydicom = importlib.import_module("pydicom")
    except ModuleNotFoundError as error:
        raise UserError(
            f"{folder} is a DICOM series, which pydicom reads: pip install pydicom"
        ) from error
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    return pydicom


@contextmanager
def _named(path: Path, action: str, remedy: str) -> Iterator[None]:
    """Make an error that names the file of whatever pydicom's converters and decoders raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be {action} ({reason}): {remedy}") from error


# Headers


def _slices(folder: Path) -> list[Slice]:
    """Read the headers of the images in a folder, which must be of one series and one shape."""
    pydicom = _pydicom(folder)
    slices, others = [], []
    for path in _files(folder):
        with _named(path, "read as DICOM", "replace the file"):
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS, force=True)
            if _is_image(header, pydicom):
                slices.extend(_frames(path, header))
            else:
                others.append((path, str(header.get("SeriesInstanceUID"))))
    if not slices:
        names = ", ".join(path.name for path, _ in others[:2])
        raise UserError(
            f"{folder} holds DICOM files ({names}), but no image among them: give the folder of a "
            "series"
        )
    for path, series in others:
        if series in {one.series for one in slices}:
            raise UserError(f"{path} is of the series and is no image: replace or remove the file")
    _check_alike(
        folder, slices, "DICOM series", lambda one: one.series, "give each a folder of its own"
    )
    _check_alike(
        folder, slices, "sizes of slices", lambda one: one.shape, "remove what is not of the volume"
    )
    _check_alike(
        folder,
        slices,
        "kinds of slices",
        lambda one: one.scale is None,
        "RescaleSlope is in all of them, or in none",
    )
    return slices


def _files(folder: Path) -> list[Path]:
    """List the DICOM files; another one that is called like them might be a lost slice."""
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]
    found = {path for path in paths if is_dicom(path)}
    endings = {_ending(path) for path in found}
    for path in paths:
        if path not in found and path.name != "DICOMDIR" and _ending(path) in endings:
            raise UserError(
                f"{path} is called like the DICOM files beside it and is none: replace or remove "
                "the file"
            )
    return [path for path in paths if path in found]


def _ending(path: Path) -> str:
    return re.sub(r"\.\d*$", "", path.suffix.lower())  # numbers are none, as at the end of a UID


def _is_image(header: Dataset, pydicom) -> bool:
    """Tell an image from a report, contours or a segmentation, by its class.

    A file of a private class is one if it has rows; and one without a series is a damaged image.
    """
    uid = str(header.get("SOPClassUID"))
    name = pydicom.uid.UID(uid).name
    return (
        "Rows" in header or not header.get("SeriesInstanceUID")
        if name == uid
        else "Image Storage" in name
    )


def _frames(path: Path, header: Dataset) -> list[Slice]:
    """Return a file, or the frames of an enhanced object (DICOM Part 3, C.7.6.16), as slices."""
    count = _whole(path, header, "NumberOfFrames") if "NumberOfFrames" in header else 1
    if FRAMES not in header:
        if count > 1:
            raise UserError(
                f"{path} holds several frames that do not say where they lie: convert it with "
                "dcm2niix"
            )
        return [_slice(path, 0, header, header)]
    groups, shared = header[FRAMES].value, header.get(SHARED) or [{}]
    if len(groups) != count:
        raise UserError(
            f"{path} has {count} frames (NumberOfFrames), and {FRAMES} of {len(groups)}: replace "
            "the file"
        )
    return [
        _slice(path, frame, header, _joined(path, shared[0], group))
        for frame, group in enumerate(groups)
    ]


def _joined(path: Path, *groups: Dataset) -> Dataset:
    """Put what an enhanced object says of a frame where other files have it."""
    joined = _pydicom(path.parent).Dataset()
    for group in groups:
        for macro in MACROS:
            for item in group[macro].value[:1] if macro in group else ():
                joined.update(item)
    return joined


def _slice(path: Path, frame: int, header: Dataset, place: Dataset) -> Slice:
    """Read a header, and of an enhanced object what it says of a frame."""
    colours = header.get("PhotometricInterpretation")
    if _whole(path, header, "SamplesPerPixel") != 1 or colours not in (
        "MONOCHROME1",
        "MONOCHROME2",
    ):
        raise UserError(
            f"{path} holds colours (SamplesPerPixel {header.SamplesPerPixel}, "
            f"PhotometricInterpretation {_shown(colours)}), not one value a voxel: replace the file"
        )
    if "ModalityLUTSequence" in header:
        raise UserError(
            f"{path} has a table of values (ModalityLUTSequence): convert the series with dcm2niix"
        )
    scale = None
    if "RescaleSlope" in place or "RescaleIntercept" in place:
        scale = (
            _numbers(path, place, "RescaleSlope")[0],
            _numbers(path, place, "RescaleIntercept")[0],
        )
        if scale[0] == 0:
            raise UserError(
                f"{path} has RescaleSlope 0, which makes all voxels equal: replace the file"
            )
    axes = np.array(_numbers(path, place, "ImageOrientationPatient", 6)).reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if np.abs(axes @ axes.T - np.eye(2)).max() > 2 * PERPENDICULAR:
        raise UserError(
            f"{path} has ImageOrientationPatient {_shown(place.ImageOrientationPatient)}, not two "
            "unit vectors at a right angle: replace the file"
        )
    # It may be there and empty
    has_thickness = "SliceThickness" in place and place.get_item("SliceThickness").value
    # The header has that of rows first
    return Slice(
        path=path,
        frame=frame,
        series=str(header.get("SeriesInstanceUID")),
        shape=(_whole(path, header, "Columns"), _whole(path, header, "Rows")),
        position=np.array(_numbers(path, place, "ImagePositionPatient", 3)),
        axes=axes / lengths[:, None],
        spacing=np.array(_numbers(path, place, "PixelSpacing", 2, SIZES)[::-1]),
        thickness=_numbers(path, place, "SliceThickness")[0] if has_thickness else None,
        scale=scale,
    )


def _whole(path: Path, header: Dataset, tag: str) -> int:
    (number,) = _numbers(path, header, tag, limits=(1, 2**31))
    if number % 1:
        raise UserError(f"{path} has {tag} {number}, not a whole number: replace the file")
    return int(number)


def _numbers(
    path: Path, header: Dataset, tag: str, count: int = 1, limits: tuple[float, float] = FLOATS
) -> list[float]:
    """Return the ``count`` finite numbers of a tag; pydicom converts them only when asked."""
    if tag not in header:
        raise UserError(
            f"{path} has no {tag}: replace the file, or convert the series with dcm2niix"
        )
    try:
        value = header[tag].value
        numbers = [
            float(number) for number in (value if isinstance(value, MutableSequence) else [value])
        ]
    except Exception:  # noqa: BLE001  it is the parser of a value that somebody else wrote
        numbers = []
    if len(numbers) != count or not all(
        limits[0] <= number <= limits[1] for number in np.float32(numbers)
    ):
        wanted = "a number" if count == 1 else f"{count} numbers"
        where = "" if limits == FLOATS else f" from {limits[0]:g} to {limits[1]:g}"
        raise UserError(
            f"{path} has {tag} {_shown(header.get_item(tag).value)}, not {wanted}{where}: replace "
            "the file"
        )
    return numbers


def _shown(value: object) -> str:
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return ascii(text[:60].strip("\0 "))


def _check_alike(
    folder: Path, slices: Sequence[Slice], what: str, key: Callable, remedy: str
) -> None:
    """Raise `UserError` where slices differ; it names one of the fewest and one of the most."""
    counts = Counter(key(one) for one in slices)
    if len(counts) > 1:
        most, fewest = (
            next(one for one in slices if key(one) == counts.most_common()[at][0]) for at in (0, -1)
        )
        names = f"{_name(fewest)} is of another than {_name(most)}"
        raise UserError(f"{folder} holds {len(counts)} {what} ({names}): {remedy}")


def _name(one: Slice) -> str:
    return one.path.name + (f" frame {one.frame + 1}" if one.frame else "")


# Volumes


def _geometry(slices: Sequence[Slice], folder: Path) -> tuple[np.ndarray, list[int]]:
    """Return the affine to mm in RAS, and the slices' order along the normal of their planes.

    DICOM Part 3, C.7.6.2.1.1: columns advance along the first three numbers of
    ImageOrientationPatient, rows along the others. Slices of a tilted gantry are shifted evenly:
    their affine is sheared, and exact.
    """
    for what, values in (
        ("orientation", [one.axes for one in slices]),
        ("spacing", [one.spacing for one in slices]),
    ):
        values = np.array(values).reshape(len(slices), -1)
        off = np.abs(values - np.median(values, 0)).max(1)
        if off.max() > SAME:
            name = _name(slices[off.argmax()])
            raise UserError(
                f"{folder} holds slices of several {what}s, for example {name}: remove what is not "
                "of the volume"
            )
    affine = np.eye(4)
    affine[:3, :2] = (slices[0].axes * slices[0].spacing[:, None]).T
    normal = np.cross(*slices[0].axes)
    positions = np.array([one.position for one in slices])
    order = np.argsort(positions @ normal, kind="stable")
    affine[:3, 3] = positions[order[0]]
    if len(slices) == 1:
        if not SIZES[0] <= (slices[0].thickness or 0) <= SIZES[1]:
            raise UserError(
                f"{slices[0].path} is a series of one slice, and its SliceThickness is "
                f"{slices[0].thickness}, not a number of mm: replace the file"
            )
        affine[:3, 2] = normal * slices[0].thickness
    else:
        affine[:3, 2] = (positions[order[-1]] - positions[order[0]]) / (len(slices) - 1)
        _check_places([slices[number] for number in order], affine, normal, folder)
    return LPS_TO_RAS @ affine, order.tolist()


def _check_places(
    ordered: Sequence[Slice], affine: np.ndarray, normal: np.ndarray, folder: Path
) -> None:
    """Raise `UserError` where slices are missing, twice, or not where the affine has them."""
    positions = np.array([one.position for one in ordered])
    steps = np.diff(positions, axis=0)
    heights = steps @ normal
    if heights.min() < SIZES[0]:
        at = heights.argmin()
        raise UserError(
            f"{folder} holds several slices at one place, {_name(ordered[at])} and "
            f"{_name(ordered[at + 1])}: give a "
            "folder with one image of each place, or convert the series with dcm2niix"
        )
    off = positions - (positions[0] + np.arange(len(positions))[:, None] * affine[:3, 2])
    if np.abs(np.linalg.solve(affine[:3, :3], off.T)).max() <= DISPLACED:
        aside = np.linalg.norm(affine[:3, 2] - heights.mean() * normal)
        if aside > STEEPEST * heights.mean():
            raise UserError(
                f"{folder} has slices {heights.mean():.4g} mm apart and displaced by {aside:.4g} "
                "mm sideways, from "
                f"{_name(ordered[0])} to {_name(ordered[-1])}: no gantry is tilted so far"
            )
        return
    usual = np.sort(steps, axis=0)[(len(steps) - 1) // 2]  # the median, never between two
    at = np.linalg.norm(steps - usual, axis=1).argmax()
    between = f"between {_name(ordered[at])} and {_name(ordered[at + 1])}"
    height = float(usual @ normal)
    apart, sideways = heights[at] - height, (steps[at] - usual) - (heights[at] - height) * normal
    if abs(apart) >= np.linalg.norm(sideways):
        raise UserError(
            f"{folder} has slices {height:.4g} mm apart, but {heights[at]:.4g} mm {between}: "
            "complete the series"
        )
    aside = np.linalg.norm(steps[at] - heights[at] * normal)
    raise UserError(
        f"{folder} has slices displaced by {aside:.4g} mm sideways {between}, and by "
        f"{np.linalg.norm(usual - height * normal):.4g} mm between most: replace or remove what is "
        "displaced"
    )


# Pixels


def _pixels(path: Path, num_frames: int) -> np.ndarray:
    """Read the stored values (frames, rows, columns) of a file."""
    pydicom = _pydicom(path.parent)
    with _named(path, "decoded", "replace the file, or convert the series with dcm2niix"):
        whole = pydicom.dcmread(path, force=True)
        meta = whole.file_meta
        # Nor in what lacks a preamble: as pydicom read the rest
        if "TransferSyntaxUID" not in meta:
            implicit, little = whole.original_encoding
            uids = pydicom.uid
            explicit = uids.ExplicitVRLittleEndian if little else uids.ExplicitVRBigEndian
            meta.TransferSyntaxUID = uids.ImplicitVRLittleEndian if implicit else explicit
        # It would cut values that are too large
        whole.pixel_array_options(correct_unused_bits=False)
        pixels = whole.pixel_array
        pixels = pixels.reshape(-1, *pixels.shape[-2:])
        size = len(whole.PixelData) if "PixelData" in whole else pixels.nbytes
        is_native = not meta.TransferSyntaxUID.is_compressed
        # Padded to be even
        if len(pixels) != num_frames or is_native and size - pixels.nbytes not in (0, 1):
            raise ValueError(
                f"its {size} bytes of pixels are more than Rows, Columns, BitsAllocated and frames "
                "make"
            )
        return pixels if pixels.dtype.kind == "f" else _signed(pixels, int(whole.BitsStored))


def _signed(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Return integers of ``bits`` bits as signed ones where their type is.

    Some writers leave the bits above at 0.
    """
    span = 1 << bits
    low = -span // 2 if pixels.dtype.kind == "i" else 0
    if low and pixels.max() >= span // 2:
        pixels = np.where(pixels >= span // 2, pixels.astype(np.int64) - span, pixels)
    if pixels.min() < low or pixels.max() >= low + span:
        raise ValueError(f"it has values that take more than the {bits} bits of BitsStored")
    return pixels
