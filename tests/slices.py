"""Writes DICOM series, as a scanner does; for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")


def write_series(folder: Path, affine: np.ndarray, volume: np.ndarray, uid: str = "1.2.3", **changes: object) -> None:
    """Write a volume as slices, under names whose order is not theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    in_lps = np.diag([-1.0, -1, 1, 1]) @ affine
    sizes = np.linalg.norm(in_lps[:3, :3], axis=0)
    for number in range(volume.shape[2]):
        slice_ = pydicom.Dataset()
        slice_.file_meta = pydicom.dataset.FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        slice_.SOPClassUID, slice_.SOPInstanceUID = pydicom.uid.CTImageStorage, f"{uid}.{number + 1}"
        slice_.SeriesInstanceUID, slice_.Modality, slice_.PatientName = uid, "CT", "Somebody"
        slice_.Columns, slice_.Rows = volume.shape[:2]
        slice_.ImagePositionPatient = [*np.round(in_lps @ [0, 0, number, 1], 6)[:3]]
        slice_.ImageOrientationPatient = [*np.round((in_lps[:3, :2] / sizes[:2]).T.ravel(), 8)]
        slice_.PixelSpacing = [round(sizes[1], 6), round(sizes[0], 6)]  # of rows, then of columns
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated = slice_.BitsStored = 16
        slice_.HighBit, slice_.PixelRepresentation = 15, 0
        slice_.RescaleSlope, slice_.RescaleIntercept = 1, -1024
        for key, value in changes.items():
            setattr(slice_, key, value)
        slice_.PixelData = (volume[:, :, number].T.astype(np.int32) + 1024).astype(np.uint16).tobytes()
        slice_.save_as(folder / f"{(number * 3 + 1) % volume.shape[2]}.dcm", enforce_file_format=True)
