"""Writes DICOM series, as a scanner does; for tests."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")


def write_series(
    folder: Path, affine: np.ndarray, volume: np.ndarray, uid: str = "1.2.3", **changes: object
) -> None:
    """Write a volume as slices, under names whose order is not theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(volume.shape[2]):
        slice_ = _image(volume.shape, uid, number)
        for name, value in _place(affine, number).items():
            setattr(slice_, name, value)
        slice_.RescaleSlope, slice_.RescaleIntercept = 1, -1024
        for key, value in changes.items():
            setattr(slice_, key, value)
        slice_.PixelData = stored(volume[:, :, number]).tobytes()
        slice_.save_as(folder / name_of(number, volume.shape[2]), enforce_file_format=True)


def name_of(number: int, count: int) -> str:
    """Return under which name a slice is written."""
    return f"{(number * 3 + 1) % count}.dcm"


def stored(plane: np.ndarray) -> np.ndarray:
    """Return values (x, y) as they are stored: by rows, and not negative."""
    return (plane.T.astype(np.int32) + 1024).astype(np.uint16)


def write_enhanced(
    path: Path, affine: np.ndarray, volume: np.ndarray, order: list[int], uid: str = "1.2.3"
) -> None:
    """Write slices as frames of one file, in the given order; frames are scaled by 1, 2, 1, 2,
    ...
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    image = _image(volume.shape, uid, 0)
    image.SOPClassUID, image.NumberOfFrames = pydicom.uid.EnhancedCTImageStorage, len(order)
    shared, frames, planes = pydicom.Dataset(), [], []
    for frame, number in enumerate(order):
        place = _place(affine, number)
        measures = {"PixelSpacing": place["PixelSpacing"], "SliceThickness": 5}
        shared.PlaneOrientationSequence = [
            _dataset(ImageOrientationPatient=place["ImageOrientationPatient"])
        ]
        shared.PixelMeasuresSequence = [_dataset(**measures)]
        slope = frame % 2 + 1
        frames.append(
            _dataset(
                PlanePositionSequence=[
                    _dataset(ImagePositionPatient=place["ImagePositionPatient"])
                ],
                PixelValueTransformationSequence=[
                    _dataset(RescaleSlope=slope, RescaleIntercept=-1024 * slope)
                ],
            )
        )
        planes.append(stored(volume[:, :, number] // slope))
    image.SharedFunctionalGroupsSequence, image.PerFrameFunctionalGroupsSequence = [shared], frames
    image.PixelData = np.stack(planes).tobytes()
    image.save_as(path, enforce_file_format=True)


def rewrite(path: Path, **values: object) -> None:
    """Change a file; bytes are put in as they stand, be they valid or not, and None removes the
    tag.
    """
    valid = {key: value for key, value in values.items() if not isinstance(value, bytes | None)}
    if valid:
        content = pydicom.dcmread(path)
        for key, value in valid.items():
            setattr(content, key, value)
        content.save_as(path)
    for key, value in values.items():
        if key not in valid:
            path.write_bytes(put(path.read_bytes(), key, value))


def put(content: bytes, key: str, value: bytes | None) -> bytes:
    """Put a value into the bytes of a file in explicit little endian; None removes the tag."""
    tag = pydicom.tag.Tag(key)
    at = re.search(
        re.escape(struct.pack("<HH", tag.group, tag.elem)) + rb"[A-Z]{2}", content
    ).start()
    kind = content[at + 4 : at + 6]
    size, start = ("<I", at + 8) if kind in (b"OB", b"OW", b"SQ") else ("<H", at + 6)
    rest = start + struct.calcsize(size) + struct.unpack_from(size, content, start)[0]
    changed = b"" if value is None else content[at:start] + struct.pack(size, len(value)) + value
    return content[:at] + changed + content[rest:]


def _dataset(**values: object) -> pydicom.Dataset:
    made = pydicom.Dataset()
    for key, value in values.items():
        setattr(made, key, value)
    return made


def _image(shape: tuple[int, ...], uid: str, number: int) -> pydicom.Dataset:
    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    image.SOPClassUID, image.SOPInstanceUID = pydicom.uid.CTImageStorage, f"{uid}.{number + 1}"
    image.SeriesInstanceUID, image.Modality, image.PatientName = uid, "CT", "Somebody"
    image.Columns, image.Rows = shape[:2]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, 0
    return image


def _place(affine: np.ndarray, number: int) -> dict[str, list[float]]:
    in_lps = np.diag([-1.0, -1, 1, 1]) @ affine
    sizes = np.linalg.norm(in_lps[:3, :3], axis=0)
    return {
        "ImagePositionPatient": [*np.round(in_lps @ [0, 0, number, 1], 6)[:3]],
        "ImageOrientationPatient": [*np.round((in_lps[:3, :2] / sizes[:2]).T.ravel(), 8)],
        "PixelSpacing": [round(sizes[1], 6), round(sizes[0], 6)],  # of rows, then of columns
    }
