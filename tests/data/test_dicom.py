"""A DICOM series lies where the scanner says, in its units; what is no volume is refused."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from slices import write_series

from dints.data import dicom
from dints.errors import UserError

pydicom = pytest.importorskip("pydicom")

ANGLE = np.radians(20)
# Of the voxel grid, in mm in RAS as NIfTI has it: axial slices, sagittal ones, and oblique ones of a tilted gantry.
AXES = {
    "axial": np.array([[-0.8, 0, 0], [0, -0.7, 0], [0, 0, 2.5]]),
    "sagittal": np.array([[0, 0, 3.0], [-0.8, 0, 0], [0, -0.7, 0]]),
    "tilted": np.array(
        [[-0.8, 0, 0], [0, -0.7 * np.cos(ANGLE), 0], [0, -0.7 * np.sin(ANGLE), 2.5]],
    ),
}


def affine_of(name: str) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = AXES[name], (40, -30, 20)
    return affine


def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1500, (5, 6, 4)).astype(np.int16)


@pytest.mark.parametrize("name", AXES)
def test_it_lies_where_the_scanner_says(tmp_path, name):
    """Slices may run either way along their normal: each voxel keeps its value and its place."""
    write_series(tmp_path, affine_of(name), voxels())
    found, affine = dicom.read_series(tmp_path)
    assert found.dtype == np.int16 and found.shape == (5, 6, 4)
    if not np.allclose(affine[:3, 3], affine_of(name)[:3, 3], atol=1e-4):  # from the other end
        found, affine = found[:, :, ::-1], affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 3], [0, 0, 0, 1]])
    assert np.allclose(affine, affine_of(name), atol=1e-4) and np.array_equal(found, voxels())


def test_a_scale_makes_fractions(tmp_path):
    write_series(tmp_path, affine_of("axial"), voxels(), RescaleSlope=0.5, RescaleIntercept=0)
    found, _ = dicom.read_series(tmp_path)
    assert found.dtype == np.float32 and np.array_equal(found, (voxels() + 1024) / 2)


def test_series_are_found_in_folders(tmp_path):
    for name in ("one", "two/CT", ".hidden"):
        write_series(tmp_path / name, affine_of("axial"), voxels())
    (tmp_path / "three").mkdir()
    for name in ("one/DICOMDIR", "three/notes.txt"):
        (tmp_path / name).write_bytes(b" " * 128 + (b"DICM" if name.endswith("DIR") else b"none"))
    assert dicom.folders_with_dicom(tmp_path) == [tmp_path / "one", tmp_path / "two/CT"]


def damage(folder: Path, what: str) -> None:
    """Make of a whole series one that is no volume."""
    files = sorted(folder.iterdir())
    if what == "a slice is missing":
        next(file for file in files if pydicom.dcmread(file).SOPInstanceUID == "1.2.3.2").unlink()
    elif what == "two series":
        write_series(folder / "other", affine_of("axial"), voxels(), uid="1.2.9")
        (folder / "other/0.dcm").rename(folder / "z.dcm")
    elif what == "one slice twice":
        (folder / "z.dcm").write_bytes(files[0].read_bytes())
    elif what == "cut short":
        files[0].write_bytes(files[0].read_bytes()[:-20])
    elif what == "no image":
        for file in files:
            content = pydicom.dcmread(file)
            del content.Rows, content.PixelData
            content.save_as(file)
    else:
        content = pydicom.dcmread(files[0])
        if what == "another direction":
            content.ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
        elif what == "another size":
            content.Rows = 3
        elif what == "no place":
            del content.ImagePositionPatient
        elif what == "frames":
            content.NumberOfFrames = 2
        content.save_as(files[0])


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("a slice is missing", r"slices 2.5 mm apart, but 5 mm between .*\.dcm and .*\.dcm: complete the series"),
        ("two series", "holds 2 DICOM series: give each a folder of its own"),
        ("one slice twice", "several slices at one place"),
        ("cut short", "cannot be decoded"),
        ("no image", "no image among them"),
        ("another direction", "not parallel"),
        ("another size", "slices of 2 heights"),
        ("no place", "does not say where it lies .no ImagePositionPatient"),
        ("frames", "several frames or colours"),
    ],
)
def test_what_is_no_volume_is_refused(tmp_path, what, expected):
    write_series(tmp_path / "series", affine_of("axial"), voxels())
    damage(tmp_path / "series", what)
    with pytest.raises(UserError, match=expected) as raised:
        dicom.write_nifti(tmp_path / "series", tmp_path / "out.nii.gz")
    assert str(tmp_path / "series") in str(raised.value) and not (tmp_path / "out.nii.gz").exists()


def test_without_pydicom_the_command_that_brings_it_is_told(tmp_path, monkeypatch):
    write_series(tmp_path, affine_of("axial"), voxels())

    def absent(name: str, *more: object):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match="which pydicom reads: pip install pydicom"):
        dicom.read_series(tmp_path)
