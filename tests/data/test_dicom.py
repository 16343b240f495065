"""A DICOM series lies where the scanner says, in its units; what is no volume is refused, by the file's name."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from slices import name_of, put, rewrite, stored, write_enhanced, write_series

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
NAMES = [name_of(number, 4) for number in range(4)]  # of the slices, from bottom to top


def affine_of(name: str) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = AXES[name], (40, -30, 20)
    return affine


def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1500, (5, 6, 4)).astype(np.int16)


def check(folder: Path, name: str = "axial") -> None:
    """Check that a folder is read as the volume: each voxel has its value and its place."""
    found, affine = dicom.read_series(folder)
    assert found.dtype == np.int16 and found.shape == (5, 6, 4)
    if not np.allclose(affine[:3, 3], affine_of(name)[:3, 3], atol=1e-4):  # from the other end
        found, affine = found[:, :, ::-1], affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 3], [0, 0, 0, 1]])
    assert np.allclose(affine, affine_of(name), atol=1e-4) and np.array_equal(found, voxels())


@pytest.mark.parametrize("name", AXES)
def test_it_lies_where_the_scanner_says(tmp_path, name):
    """Slices may run either way along their normal, and be shifted evenly, as by a tilted gantry."""
    write_series(tmp_path, affine_of(name), voxels())
    check(tmp_path, name)


def test_a_scale_makes_fractions(tmp_path):
    write_series(tmp_path, affine_of("axial"), voxels(), RescaleSlope=0.5, RescaleIntercept=0)
    found, _ = dicom.read_series(tmp_path)
    assert found.dtype == np.float32 and np.array_equal(found, (voxels() + 1024) / 2)


def test_each_slice_has_its_scale(tmp_path):
    write_series(tmp_path, affine_of("axial"), voxels())
    for number in (1, 2):
        pixels = stored(2 * voxels()[:, :, number] + 1024).tobytes()
        rewrite(tmp_path / NAMES[number], RescaleSlope=0.5, RescaleIntercept=-1024, PixelData=pixels)
    check(tmp_path)


@pytest.mark.parametrize("syntax", ["RLELossless", "DeflatedExplicitVRLittleEndian", "ImplicitVRLittleEndian"])
def test_compressions(tmp_path, syntax):
    write_series(tmp_path, affine_of("axial"), voxels())
    for path in tmp_path.iterdir():
        content = pydicom.dcmread(path)
        if syntax == "RLELossless":
            content.compress(pydicom.uid.RLELossless)
        content.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
        pydicom.dcmwrite(path, content)
    check(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=path.name):
        dicom.read_series(tmp_path)


@pytest.mark.parametrize("kept", ["meta", "dataset", "implicit"])
def test_files_without_a_preamble_are_slices(tmp_path, kept):
    """As old archives have them: the 128 bytes and the mark are not there, nor, often, what says the syntax."""
    write_series(tmp_path, affine_of("axial"), voxels())
    for name in NAMES[::2]:
        content = pydicom.dcmread(tmp_path / name)
        if kept == "meta":
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[132:])
        else:
            implicit = kept == "implicit"
            bare = pydicom.Dataset({element.tag: element for element in content})
            pydicom.dcmwrite(tmp_path / name, bare, implicit_vr=implicit, little_endian=True)
        assert dicom.is_dicom(tmp_path / name) and b"DICM" not in (tmp_path / name).read_bytes()
    check(tmp_path)


def test_series_are_found_in_folders(tmp_path):
    for name in ("one", "two/CT", ".hidden"):
        write_series(tmp_path / name, affine_of("axial"), voxels())
    (tmp_path / "three").mkdir()
    for name in ("one/DICOMDIR", "three/notes.txt"):
        (tmp_path / name).write_bytes(b" " * 128 + (b"DICM" if name.endswith("DIR") else b"none"))
    assert dicom.folders_with_dicom(tmp_path) == [tmp_path / "one", tmp_path / "two/CT"]


def test_what_is_no_image_is_passed_over(tmp_path):
    write_series(tmp_path, affine_of("axial"), voxels())
    (tmp_path / "report").write_bytes((tmp_path / NAMES[0]).read_bytes())
    contours = pydicom.uid.RTStructureSetStorage
    rewrite(tmp_path / "report", SOPClassUID=contours, SeriesInstanceUID="1.2.4", Rows=None)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._0.dcm").write_text("as macOS leaves it")
    check(tmp_path)


# What is no volume


def moved(path: Path, *by: float) -> None:
    """Move a slice, by mm in LPS."""
    position = pydicom.dcmread(path).ImagePositionPatient
    rewrite(path, ImagePositionPatient=[round(old + mm, 6) for old, mm in zip(position, by, strict=True)])


def damage(folder: Path, what: str) -> None:
    """Make of a whole series one that is no volume."""
    second = folder / NAMES[1]
    if what == "a slice is missing":
        second.unlink()
    elif what == "two series":
        write_series(folder / "other", affine_of("axial"), voxels(), uid="1.2.9")
        (folder / "other/0.dcm").rename(folder / "z.dcm")
    elif what == "one slice twice":
        (folder / "z.dcm").write_bytes(second.read_bytes())
    elif what == "cut short":
        second.write_bytes(second.read_bytes()[:-20])
    elif what == "empty":
        second.write_bytes(b"")
    elif what == "cut in its header":
        second.write_bytes(second.read_bytes()[:400])
    elif what == "no image":
        for file in folder.iterdir():
            rewrite(file, SOPClassUID=pydicom.uid.EncapsulatedPDFStorage, Rows=None, PixelData=None)
    elif what == "first aside":
        moved(folder / NAMES[0], 10, 0, 0)
    elif what == "second aside":
        moved(folder / NAMES[1], 0, 10, 0)
    elif what == "last aside":
        moved(folder / NAMES[3], 0, -10, 0)
    elif what == "a drift":
        write_series(folder, affine_of("axial"), np.repeat(voxels(), 5, 2))
        for number in range(20):  # of steps that hardly differ, and of slices that are 0.9 mm off
            moved(folder / name_of(number, 20), 0, 0, 0.1 * abs(number - 10))
    elif what == "all aside":
        for number in range(4):
            moved(folder / NAMES[number], 3 * number, 0, 0)
    elif what == "skewed":
        for file in folder.iterdir():
            rewrite(file, ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0])
    elif what == "long vectors":
        for file in folder.iterdir():
            rewrite(file, ImageOrientationPatient=[1.01, 0, 0, 0, 1, 0])
    elif what == "one slice, no thickness":
        for name in NAMES[1:]:
            (folder / name).unlink()
    else:
        changes = {
            "another direction": {"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]},
            "another spacing": {"PixelSpacing": [0.7, 0.81]},
            "another size": {"Rows": 3},
            "another class": {"SOPClassUID": pydicom.uid.RTStructureSetStorage},
            "no place": {"ImagePositionPatient": None},
            "frames": {"NumberOfFrames": 2},
            "colours": {"PhotometricInterpretation": "PALETTE COLOR"},
            "a table": {"ModalityLUTSequence": [pydicom.Dataset()]},
            "no scale": {"RescaleSlope": None, "RescaleIntercept": None},
        }
        rewrite(second, **changes[what])


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("a slice is missing", r"slices 2.5 mm apart, but 5 mm between .*\.dcm and .*\.dcm: complete the series"),
        ("two series", r"holds 2 DICOM series .z.dcm is of another than .\.dcm.: give each a folder of its own"),
        ("one slice twice", rf"several slices at one place, {NAMES[1]} and z.dcm"),
        ("cut short", f"{NAMES[1]} cannot be decoded"),
        ("empty", f"{NAMES[1]} is called like the DICOM files beside it and is none"),
        ("cut in its header", f"{NAMES[1]} has no "),
        ("no image", "no image among them"),
        ("first aside", f"displaced by 10 mm sideways between {NAMES[0]} and {NAMES[1]}, and by 0 mm"),
        ("second aside", f"displaced by 10 mm sideways between {NAMES[0]} and {NAMES[1]}, and by 0 mm"),
        ("last aside", f"displaced by 10 mm sideways between {NAMES[2]} and {NAMES[3]}, and by 0 mm"),
        ("a drift", "slices 2.4 mm apart, but 2.6 mm between"),
        ("all aside", "slices 2.5 mm apart and displaced by 3 mm sideways, .*no gantry"),
        ("skewed", "not two unit vectors at a right angle"),
        ("long vectors", "not two unit vectors at a right angle"),
        ("one slice, no thickness", f"{NAMES[0]} is a series of one slice, and its SliceThickness is None"),
        ("another direction", f"slices of several orientations, for example {NAMES[1]}"),
        ("another spacing", f"slices of several spacings, for example {NAMES[1]}"),
        ("another size", rf"holds 2 sizes of slices .{NAMES[1]} is of another than"),
        ("another class", f"{NAMES[1]} is of the series and is no image"),
        ("no place", f"{NAMES[1]} has no ImagePositionPatient"),
        ("frames", f"{NAMES[1]} holds several frames that do not say where they lie: convert it with dcm2niix"),
        ("colours", f"{NAMES[1]} holds colours .SamplesPerPixel 1, PhotometricInterpretation 'PALETTE COLOR'"),
        ("a table", f"{NAMES[1]} has a table of values"),
        ("no scale", f"2 kinds of slices .{NAMES[1]} is of another .*RescaleSlope is in all of them, or in none"),
    ],
)
def test_what_is_no_volume_is_refused(tmp_path, what, expected):
    write_series(tmp_path / "series", affine_of("axial"), voxels())
    damage(tmp_path / "series", what)
    with pytest.raises(UserError, match=expected) as raised:
        dicom.write_nifti(tmp_path / "series", tmp_path / "out.nii.gz")
    assert str(tmp_path / "series") in str(raised.value) and not (tmp_path / "out.nii.gz").exists()


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write_series(tmp_path, affine_of("axial"), voxels())
    opened = Path.open

    def refusing(path: Path, *how: object):
        if path.name == NAMES[3]:
            raise PermissionError(13, "Permission denied")
        return opened(path, *how)

    monkeypatch.setattr(Path, "open", refusing)
    assert dicom.folders_with_dicom(tmp_path) == [tmp_path]
    with pytest.raises(UserError, match=NAMES[3]):
        dicom.read_series(tmp_path)


NUMBERS = [b"", b"  ", b"abc ", b"nan ", b"inf ", b"-inf", b"1e99", b"1e999 ", b"0x10", b"1,5 ", b"\xff\xfe", b"\\ "]
COUNTS = [b"", b"\x05", *(struct.pack("<H", count) for count in (0, 2, 3, 7, 8, 12, 32, 65535)), b"\x01\0\x01\0"]
UIDS = [b"", b"abc ", b"\xff\xfe", b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.5\0"]
BAD = {
    "RescaleSlope": [*NUMBERS, b"1\\1 ", b"0 "],
    "RescaleIntercept": [*NUMBERS, b"1\\1 "],
    "ImagePositionPatient": [
        *(*NUMBERS, b"1\\2 ", b"1\\2\\nan", b"1\\2\\abc ", b"1\\2\\3\\4 ", b"0\\0\\0 ", b"0\\0\\1e30"),
    ],
    "ImageOrientationPatient": [
        *(*NUMBERS, b"1\\0\\0\\0\\1 ", b"1\\0\\0\\0\\1\\", b"0\\0\\0\\0\\0\\0 ", b"1\\0\\0\\1\\0\\0 "),
        *(b"2\\0\\0\\0\\2\\0 ", b"1\\0\\0\\0\\nan\\0 ", b"1\\0\\0\\0\\1\\0.5 ", b".9\\0\\0\\0\\.9\\0 "),
    ],
    "PixelSpacing": [*NUMBERS, b"0\\0 ", b"1 ", b"1\\1\\1 ", b"-1\\1", b"0\\1 ", b"1\\nan ", b"1e-9\\1"],
    "SliceThickness": [*NUMBERS, b"0 ", b"1\\1 "],
    "NumberOfFrames": [*NUMBERS, b"0 ", b"2 ", b"-1", b"1.5 ", b"1\\1 "],
    "PhotometricInterpretation": [b"", b"RGB ", b"\xff\xfe", b"YBR_FULL"],
    "SeriesInstanceUID": UIDS,
    "SOPClassUID": [*UIDS, b"1.2.840.10008.5.1.4.1.1.88.11"],
    "TransferSyntaxUID": UIDS,
    "PixelData": [b"", b"\0" * 58, b"\0" * 62, b"\0" * 120],
    **dict.fromkeys(["Rows", "Columns", "SamplesPerPixel", "BitsAllocated"], COUNTS),
    **dict.fromkeys(["BitsStored", "HighBit", "PixelRepresentation"], COUNTS),
}


def mutations() -> Iterator[tuple[str, bytes | None, list[str]]]:
    """Yield a tag, its bad value (None: it is missing), and the files that have it."""
    for tag, values in BAD.items():
        for value in (*values, None):
            yield tag, value, [NAMES[2]]
            yield tag, value, NAMES


def test_a_bad_value_is_named_or_does_no_harm(tmp_path):
    """Of each tag that counts, in one slice and in all: the volume is what it was, or the file is named."""
    write_series(tmp_path, affine_of("axial"), voxels(), SliceThickness=5, NumberOfFrames=1)
    whole = {name: (tmp_path / name).read_bytes() for name in NAMES}
    refused = {tag: 0 for tag in BAD}
    for tag, value, names in mutations():
        for name in names:
            (tmp_path / name).write_bytes(put(whole[name], tag, value))
        try:
            check(tmp_path)
        except UserError as error:
            refused[tag] += 1
            message = str(error)
            assert any(name in message for name in names) and "\n" not in message and len(message) < 500, message
            assert tag not in list(BAD)[:5] or tag in message or b"\\" in (value or b""), (tag, value, message)
        except BaseException as error:
            raise AssertionError(f"{tag} {value} in {len(names)} files") from error
        for name in names:
            (tmp_path / name).write_bytes(whole[name])
    check(tmp_path)
    assert {tag for tag, count in refused.items() if not count} == {"HighBit"}  # which takes no part in the values


# Enhanced objects


def test_frames_of_an_enhanced_object_are_slices(tmp_path):
    """Each frame has its place and its scale, whatever their order; a series may be in several files."""
    even = voxels() // 2 * 2
    write_enhanced(tmp_path / "tilted/one", affine_of("tilted"), even, [2, 0, 3, 1])
    found, affine = dicom.read_series(tmp_path / "tilted")
    assert np.allclose(affine, affine_of("tilted"), atol=1e-4) and np.array_equal(found, even)
    for name, order in (("one", [3, 0]), ("two", [1, 2])):
        write_enhanced(tmp_path / "two" / name, affine_of("tilted"), even, order)
    found, affine = dicom.read_series(tmp_path / "two")
    assert np.allclose(affine, affine_of("tilted"), atol=1e-4) and np.array_equal(found, even)


@pytest.mark.parametrize(
    ("order", "changes", "expected"),
    [
        ([0, 1, 1, 2], {}, "several slices at one place, one frame 2 and one frame 3"),
        ([0, 1, 3], {}, "slices 2.5 mm apart, but 5 mm between one frame 2 and one frame 3"),
        ([0, 1, 2], {"NumberOfFrames": 4}, "one has 4 frames .*PerFrameFunctionalGroupsSequence of 3"),
        ([0, 1, 2], {"SharedFunctionalGroupsSequence": None}, "one has no ImageOrientationPatient"),
        ([0, 1, 2], {"PerFrameFunctionalGroupsSequence": None}, "one holds several frames that do not say"),
        ([0, 1, 2], {"PixelData": b"\0" * 100}, "one cannot be decoded"),
    ],
)
def test_frames_that_make_no_volume_are_refused(tmp_path, order, changes, expected):
    write_enhanced(tmp_path / "one", affine_of("axial"), voxels(), order)
    rewrite(tmp_path / "one", **changes)
    with pytest.raises(UserError, match=expected):
        dicom.read_series(tmp_path)


def test_without_pydicom_the_command_that_brings_it_is_told(tmp_path, monkeypatch):
    write_series(tmp_path, affine_of("axial"), voxels())

    def absent(name: str, *more: object):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match="which pydicom reads: pip install pydicom"):
        dicom.read_series(tmp_path)
