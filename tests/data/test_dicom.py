"""A DICOM series lies where the scanner says, in its units; no other is read, and its file is
named.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from slices import name_of, put, rewrite, stored, write_enhanced, write_series

from dints.data import dicom
from dints.errors import UserError

pydicom = pytest.importorskip("pydicom")

SIN, COS = np.sin(np.radians(20)), np.cos(np.radians(20))
# Of the voxel grid, in mm in RAS: axial slices, sagittal ones, and those of a tilted gantry.
AXES = {
    "axial": [[-0.8, 0, 0], [0, -0.7, 0], [0, 0, 2.5]],
    "sagittal": [[0, 0, 3.0], [-0.8, 0, 0], [0, -0.7, 0]],
    "tilted": [[-0.8, 0, 0], [0, -0.7 * COS, 0], [0, -0.7 * SIN, 2.5]],
}
NAMES = [name_of(number, 4) for number in range(4)]  # of the slices, from bottom to top
FROM_THE_OTHER_END = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 3], [0, 0, 0, 1]])


def affine_of(name: str) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = AXES[name], (40, -30, 20)
    return affine


AXIAL = affine_of("axial")
VOXELS = np.random.default_rng(0).integers(-1000, 1500, (5, 6, 4)).astype(np.int16)


def check(folder: Path, name: str = "axial", expected: np.ndarray = VOXELS) -> None:
    """Check that a folder is read as the volume: each voxel has its value and its place."""
    found, affine = dicom.read_series(folder)
    assert found.dtype == np.int16 and found.shape == (5, 6, 4)
    if not np.allclose(affine[:3, 3], affine_of(name)[:3, 3], atol=1e-4):
        found, affine = found[:, :, ::-1], affine @ FROM_THE_OTHER_END
    assert np.allclose(affine, affine_of(name), atol=1e-4) and np.array_equal(found, expected)


@pytest.fixture
def series(tmp_path) -> Path:
    write_series(tmp_path, AXIAL, VOXELS)
    return tmp_path


@pytest.mark.parametrize("name", AXES)
def test_it_lies_where_the_scanner_says(tmp_path, name):
    """Slices may run either way along their normal, and be shifted evenly, as by a tilt."""
    write_series(tmp_path, affine_of(name), VOXELS)
    check(tmp_path, name)


def test_each_slice_has_its_scale(series):
    for number in (1, 2):
        pixels = stored(2 * VOXELS[:, :, number] + 1024).tobytes()
        changes = {"RescaleSlope": 0.5, "RescaleIntercept": -1024, "PixelData": pixels}
        rewrite(series / NAMES[number], **changes)
    check(series)
    write_series(series, AXIAL, VOXELS, RescaleSlope=0.5, RescaleIntercept=0)
    found, _ = dicom.read_series(series)
    assert found.dtype == np.float32 and np.array_equal(found, (VOXELS + 1024) / 2)


def test_compressed_slices(series):
    for path in series.iterdir():
        content = pydicom.dcmread(path)
        content.compress(pydicom.uid.RLELossless)
        pydicom.dcmwrite(path, content)
    check(series)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=path.name):
        dicom.read_series(series)


@pytest.mark.parametrize("kept", ["meta", "implicit"])
def test_files_without_a_preamble_are_slices(series, kept):
    """As old archives have them: without 128 bytes, the mark and, often, the syntax."""
    for name in NAMES[::2]:
        path, content = series / name, pydicom.dcmread(series / name)
        if kept == "meta":
            path.write_bytes(path.read_bytes()[132:])
        else:
            bare = pydicom.Dataset({element.tag: element for element in content})
            pydicom.dcmwrite(path, bare, implicit_vr=True, little_endian=True)
        assert dicom.is_dicom(path) and b"DICM" not in path.read_bytes()
    check(series)


def test_series_are_found_in_folders_and_other_files_passed_over(tmp_path):
    for name in ("one", "two/CT", ".hidden"):
        write_series(tmp_path / name, AXIAL, VOXELS)
    (tmp_path / "one/DICOMDIR").write_bytes(b" " * 128 + b"DICM")
    (tmp_path / "three").mkdir()
    (tmp_path / "three/notes.txt").write_bytes(b" " * 128 + b"none")
    folders = [tmp_path / "one", tmp_path / "two/CT"]
    assert dicom.folders_with_dicom(tmp_path) == folders
    report = folders[0] / "report"
    report.write_bytes((folders[0] / NAMES[0]).read_bytes())
    contours = pydicom.uid.RTStructureSetStorage
    rewrite(report, SOPClassUID=contours, SeriesInstanceUID="1.2.4", Rows=None)
    (folders[0] / "notes.txt").write_text("not an image")
    (folders[0] / "._0.dcm").write_text("as macOS leaves it")
    check(folders[0])


# Series that are no volume


def moved(number: int, *by: float) -> Callable[[Path], None]:
    """Move a slice, by mm in LPS."""

    def damage(folder: Path) -> None:
        path = folder / name_of(number, len(list(folder.iterdir())))
        position = pydicom.dcmread(path).ImagePositionPatient
        rounded = [round(old + mm, 6) for old, mm in zip(position, by, strict=True)]
        rewrite(path, ImagePositionPatient=rounded)

    return damage


def drifting(folder: Path) -> None:
    """Have steps that hardly differ, and slices that are 0.9 mm off."""
    write_series(folder, AXIAL, np.repeat(VOXELS, 5, 2))
    for number in range(20):
        moved(number, 0, 0, 0.1 * abs(number - 10))(folder)


def leaning(folder: Path) -> None:
    for number in range(4):
        moved(number, 3 * number, 0, 0)(folder)


def two_series(folder: Path) -> None:
    write_series(folder / "other", AXIAL, VOXELS, uid="1.2.9")
    (folder / "other/0.dcm").rename(folder / "z.dcm")


def second(**changes: object) -> Callable[[Path], None]:
    """Change the second slice's header."""
    return lambda folder: rewrite(folder / NAMES[1], **changes)


def cut(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the second slice's bytes."""
    return lambda folder: (folder / NAMES[1]).write_bytes(change((folder / NAMES[1]).read_bytes()))


def every(**changes: object) -> Callable[[Path], None]:
    return lambda folder: [rewrite(file, **changes) for file in folder.iterdir()]


DAMAGE = {
    "a slice is missing": (
        lambda folder: (folder / NAMES[1]).unlink(),
        r"slices 2.5 mm apart, but 5 mm between .*\.dcm and .*\.dcm: complete the series",
    ),
    "two series": (two_series, r"holds 2 DICOM series .z.dcm is of another than .*a folder of its"),
    "one slice twice": (
        lambda folder: (folder / "z.dcm").write_bytes((folder / NAMES[1]).read_bytes()),
        rf"several slices at one place, {NAMES[1]} and z.dcm",
    ),
    "cut short": (cut(lambda content: content[:-20]), f"{NAMES[1]} cannot be decoded"),
    "empty": (cut(lambda content: b""), f"{NAMES[1]} is called like the DICOM files beside it"),
    "a drift": (drifting, "slices 2.4 mm apart, but 2.6 mm between"),
    "all aside": (leaning, "slices 2.5 mm apart and displaced by 3 mm sideways, .*no gantry"),
    "no image": (
        every(SOPClassUID=pydicom.uid.EncapsulatedPDFStorage, Rows=None, PixelData=None),
        "no image among them",
    ),
    "first aside": (
        moved(0, 10, 0, 0),
        f"displaced by 10 mm sideways between {NAMES[0]} and {NAMES[1]}, and by 0 mm",
    ),
    "one slice, no thickness": (
        lambda folder: [(folder / name).unlink() for name in NAMES[1:]],
        f"{NAMES[0]} is a series of one slice, and its SliceThickness is None",
    ),
    "another direction": (
        second(ImageOrientationPatient=[0, 1, 0, 1, 0, 0]),
        f"slices of several orientations, for example {NAMES[1]}",
    ),
    "another class": (
        second(SOPClassUID=pydicom.uid.RTStructureSetStorage),
        f"{NAMES[1]} is of the series and is no image",
    ),
    "frames": (second(NumberOfFrames=2), f"{NAMES[1]} holds several frames .* with dcm2niix"),
    "colours": (
        second(PhotometricInterpretation="PALETTE COLOR"),
        f"{NAMES[1]} holds colours .SamplesPerPixel 1, PhotometricInterpretation 'PALETTE COLOR'",
    ),
    "a table": (second(ModalityLUTSequence=[pydicom.Dataset()]), f"{NAMES[1]} has a table of"),
    "no scale": (
        second(RescaleSlope=None, RescaleIntercept=None),
        f"2 kinds of slices .{NAMES[1]} is of another .*RescaleSlope is in all of them, or in none",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_series_that_is_no_volume_is_refused(tmp_path, name):
    damage, expected = DAMAGE[name]
    write_series(tmp_path / "series", AXIAL, VOXELS)
    damage(tmp_path / "series")
    with pytest.raises(UserError, match=expected) as raised:
        dicom.write_nifti(tmp_path / "series", tmp_path / "out.nii.gz")
    assert str(tmp_path / "series") in str(raised.value) and not (tmp_path / "out.nii.gz").exists()


def test_a_file_that_may_not_be_read_is_named(series, monkeypatch):
    opened = Path.open

    def refusing(path: Path, *how: object):
        if path.name == NAMES[3]:
            raise PermissionError(13, "Permission denied")
        return opened(path, *how)

    monkeypatch.setattr(Path, "open", refusing)
    assert dicom.folders_with_dicom(series) == [series]
    with pytest.raises(UserError, match=NAMES[3]):
        dicom.read_series(series)


NUMBERS = b"|abc |nan |-inf|1e99|1e999 |\xff\xfe|\\ ".split(b"|")
COUNTS = [b"", b"\x05", *(struct.pack("<H", count) for count in (0, 2, 7, 8, 65535))]
UIDS = [b"", b"abc ", b"\xff\xfe", b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.4.50"]
# Bad values of each tag that counts, as bytes; backslashes separate several.
BAD = {
    "RescaleSlope": [*NUMBERS, b"1\\1 ", b"0 "],
    "RescaleIntercept": [*NUMBERS, b"1\\1 "],
    "ImagePositionPatient": [
        *(*NUMBERS, b"1\\2 ", b"1\\2\\nan", b"1\\2\\3\\4 ", b"0\\0\\0 ", b"0\\0\\1e30")
    ],
    "ImageOrientationPatient": [
        *(*NUMBERS, b"1\\0\\0\\0\\1 ", b"0\\0\\0\\0\\0\\0 ", b"2\\0\\0\\0\\2\\0 "),
        *(b"1\\0\\0\\0\\nan\\0 ", b"1\\0\\0\\0\\1\\0.5 ", b".9\\0\\0\\0\\.9\\0 "),
    ],
    "PixelSpacing": [*NUMBERS, b"0\\0 ", b"1 ", b"1\\1\\1 ", b"-1\\1", b"1\\nan ", b"1e-9\\1"],
    "SliceThickness": [*NUMBERS, b"0 ", b"1\\1 "],
    "NumberOfFrames": [*NUMBERS, b"0 ", b"2 ", b"-1", b"1.5 ", b"1\\1 "],
    "PhotometricInterpretation": [b"", b"RGB ", b"\xff\xfe"],
    "SeriesInstanceUID": UIDS,
    "SOPClassUID": [*UIDS, b"1.2.840.10008.5.1.4.1.1.88.11"],
    "TransferSyntaxUID": UIDS,
    "PixelData": [b"", b"\0" * 58, b"\0" * 62, b"\0" * 120],
    **dict.fromkeys(["Rows", "Columns", "SamplesPerPixel", "BitsAllocated"], COUNTS),
    **dict.fromkeys(["BitsStored", "HighBit", "PixelRepresentation"], COUNTS),
}


@pytest.mark.slow
def test_a_bad_value_is_named_or_does_no_harm(tmp_path):
    """In one slice or in all, in turn: the volume is as it was, or the file is named."""
    write_series(tmp_path, AXIAL, VOXELS, SliceThickness=5, NumberOfFrames=1)
    whole = {name: (tmp_path / name).read_bytes() for name in NAMES}
    refused = dict.fromkeys(BAD, 0)
    mutations = [(tag, value) for tag, values in BAD.items() for value in (*values, None)]
    for number, (tag, value) in enumerate(mutations):
        names = NAMES if number % 2 else [NAMES[2]]
        for name in names:
            (tmp_path / name).write_bytes(put(whole[name], tag, value))
        try:
            check(tmp_path)
        except UserError as error:
            refused[tag] += 1
            message = str(error)
            assert any(name in message for name in names), message
            assert "\n" not in message and len(message) < 500, message
            is_named = tag in message or b"\\" in (value or b"")
            assert is_named or tag not in list(BAD)[:5], (tag, value, message)
        except BaseException as error:
            raise AssertionError(f"{tag} {value} in {len(names)} files") from error
        for name in names:
            (tmp_path / name).write_bytes(whole[name])
    check(tmp_path)
    unharmed = {tag for tag, count in refused.items() if not count}
    assert unharmed == {"HighBit"}  # which takes no part in the values


# Enhanced objects


def test_frames_of_an_enhanced_object_are_slices(tmp_path):
    """Each frame has its place and its scale, in any order; a series may be in several files."""
    even = VOXELS // 2 * 2
    write_enhanced(tmp_path / "tilted/one", affine_of("tilted"), even, [2, 0, 3, 1])
    check(tmp_path / "tilted", "tilted", even)
    for name, order in (("one", [3, 0]), ("two", [1, 2])):
        write_enhanced(tmp_path / "two" / name, affine_of("tilted"), even, order)
    check(tmp_path / "two", "tilted", even)


SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"


@pytest.mark.parametrize(
    ("order", "changes", "expected"),
    [
        ([0, 1, 1, 2], {}, "several slices at one place, one frame 2 and one frame 3"),
        ([0, 1, 2], {"NumberOfFrames": 4}, f"one has 4 frames .*{PER_FRAME} of 3"),
        ([0, 1, 2], {SHARED: None}, "one has no ImageOrientationPatient"),
        ([0, 1, 2], {PER_FRAME: None}, "one holds several frames that do not say"),
    ],
)
def test_frames_that_make_no_volume_are_refused(tmp_path, order, changes, expected):
    write_enhanced(tmp_path / "one", AXIAL, VOXELS, order)
    rewrite(tmp_path / "one", **changes)
    with pytest.raises(UserError, match=expected):
        dicom.read_series(tmp_path)


def test_without_pydicom_the_command_that_installs_it_is_given(series, monkeypatch):
    def absent(name: str, *more: object):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match="which pydicom reads: pip install pydicom"):
        dicom.read_series(series)
