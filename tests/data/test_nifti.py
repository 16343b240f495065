"""Files read as nibabel reads them: every type, order of bytes and layout."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dints.data import nifti
from dints.data.nifti import read_header, read_voxels, save_segmentation
from dints.errors import UserError

AFFINE = np.array(
    [[-0.7, 0.04, 0, 9], [0.03, -0.8, 0.1, 4], [0, 0.03, 2.5, 30], [0, 0, 0, 1]], np.float32
)
SMALL = np.arange(-105, 105, dtype=np.int16).reshape(7, 5, 6)


def write(path: Path, voxels: np.ndarray, kind: type = nib.Nifti1Image, header=None, dtype=None):
    image = kind(voxels, AFFINE, header)
    if dtype is not None:
        image.set_data_dtype(dtype)
    nib.save(image, path)
    return str(path)


def check_against_nibabel(path: str, exact: bool = True) -> np.ndarray:
    expected = nib.load(path)
    header, values = read_header(path), expected.get_fdata()
    values = np.moveaxis(values.reshape((*values.shape[:3], -1), order="F"), -1, 0)
    voxels = read_voxels(header)
    assert (header.num_channels, *header.shape) == voxels.shape == values.shape
    assert np.array_equal(header.affine, expected.affine)
    assert np.allclose(header.spacing, expected.header.get_zooms()[:3], rtol=1e-6)
    assert voxels.dtype.isnative
    if exact:
        assert voxels.dtype == expected.get_data_dtype().newbyteorder("=")
        assert np.array_equal(voxels, values)
    else:
        assert np.abs(voxels - values).max() <= 1e-6 * np.abs(values).max()
    return voxels


@pytest.mark.parametrize("dtype", ["uint16", "float32", "float64"])
def test_voxels_are_read_in_their_own_type(tmp_path, dtype):
    voxels = np.random.default_rng(0).uniform(0, 127, (7, 5, 6)).astype(dtype)
    for ending in (".nii", ".nii.gz"):
        read = check_against_nibabel(write(tmp_path / f"image{ending}", voxels))
        assert np.array_equal(read[0], voxels)


def test_scaled_voxels_become_float32(tmp_path):
    voxels = np.random.default_rng(0).uniform(-1000, 2000, (7, 5, 6))
    path = write(tmp_path / "image.nii.gz", voxels, dtype="int16")
    assert nib.load(path).dataobj.slope not in (0, 1) and nib.load(path).dataobj.inter != 0
    assert check_against_nibabel(path, exact=False).dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "endianness", "start"),
    [
        (nib.Nifti1Image, ">", b"\0\0\x01\x5c"),
        (nib.Nifti2Image, ">", b"\0\0\x02"),
    ],
)
def test_big_endian_files_and_nifti_2_are_read(tmp_path, kind, endianness, start):
    header = kind.header_class(endianness=endianness)
    path = write(tmp_path / "image.nii.gz", SMALL.astype(f"{endianness}i2"), kind, header)
    assert gzip.decompress(Path(path).read_bytes()).startswith(start)
    check_against_nibabel(path)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((7, 5, 6, 4), 4), ((7, 5, 6, 1, 3), 3), ((7, 5, 1), 1)],
)
def test_channels_come_first_in_their_order(tmp_path, shape, channels):
    voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    read = check_against_nibabel(write(tmp_path / "image.nii.gz", voxels))
    assert len(read) == channels
    for channel, values in enumerate(read):
        assert np.array_equal(values, voxels.reshape((*shape[:3], channels))[..., channel])


def test_gzip_files_of_several_members_are_read(tmp_path):
    """Programs such as bgzip write them, in blocks, the first one empty; some append zeros."""
    voxels = np.random.default_rng(0).integers(-999, 999, (40, 30, 20)).astype(np.int16)
    content = Path(write(tmp_path / "image.nii", voxels)).read_bytes()
    blocks = [content[start : start + 100] for start in range(0, len(content), 100)]
    several = tmp_path / "several.nii.gz"
    several.write_bytes(b"".join(gzip.compress(block) for block in (b"", *blocks)))
    assert np.array_equal(check_against_nibabel(str(several))[0], voxels)
    several.write_bytes(several.read_bytes() + bytes(512))
    assert np.array_equal(read_voxels(read_header(str(several)))[0], voxels)


@pytest.mark.fault("a small header with gigabytes of zeros behind its voxels")
def test_a_file_is_read_no_further_than_it_may_reach_beyond_its_voxels(tmp_path, monkeypatch):
    path = write(tmp_path / "image.nii", SMALL)
    content, packed = Path(path).read_bytes(), tmp_path / "image.nii.gz"
    monkeypatch.setattr(nifti, "SLACK", 2 << 20)
    packed.write_bytes(gzip.compress(content + bytes(1 << 20), 1))
    assert np.array_equal(read_voxels(read_header(str(packed)))[0], SMALL)
    read, unpacked = gzip.GzipFile.read, []
    monkeypatch.setattr(
        gzip.GzipFile, "read", lambda *args: unpacked.append(read(*args)) or unpacked[-1]
    )
    for several in (1, 8):  # a bomb may be of one member or of many
        bomb = gzip.compress(bytes((64 << 20) // several), 1) * several
        packed.write_bytes(gzip.compress(content) + bomb)
        unpacked.clear()
        with pytest.raises(UserError, match=r"image\.nii\.gz .* 2 MiB and more follow"):
            read_voxels(read_header(str(packed)))
        assert sum(map(len, unpacked)) < 4 << 20
    with open(path, "ab") as file:
        file.truncate(8 << 30)  # which takes no room on the disk
    assert np.array_equal(read_voxels(read_header(path))[0], SMALL)


def test_a_compressed_file_takes_little_more_memory_than_its_voxels(tmp_path):
    """Neither the compressed file nor a second copy of a large CT is held."""
    voxels = np.random.default_rng(0).integers(0, 9, (128, 128, 64)).astype(np.int16)
    header = read_header(write(tmp_path / "image.nii.gz", voxels))
    tracemalloc.start()
    try:
        assert read_voxels(header).nbytes == voxels.nbytes
        assert tracemalloc.get_traced_memory()[1] < 1.7 * voxels.nbytes
    finally:
        tracemalloc.stop()


def test_extensions_before_the_voxels_are_passed_over(tmp_path):
    header = nib.Nifti1Header()
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"scanned on a Monday " * 9999))
    path = write(tmp_path / "image.nii.gz", SMALL, header=header)
    assert read_header(path).offset > 20 * 9999
    check_against_nibabel(path)


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e-3), ("unknown", 1)])
def test_a_headers_unit_counts_and_its_segmentation_has_it_too(tmp_path, unit, factor):
    affine = np.diag([-2.0 * factor, 1.5 * factor, 3 * factor, 1])
    affine[:3, 3] = np.array([40, -30, 10]) * factor
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    header = read_header(str(tmp_path / "a.nii"))
    assert header.spacing == pytest.approx([2, 1.5, 3])
    assert header.affine[:3, 3] == pytest.approx([40, -30, 10])
    save_segmentation(np.ones((4, 5, 6), np.uint8), header, tmp_path / "b.nii")
    segmentation = nib.load(tmp_path / "b.nii")
    assert np.allclose(segmentation.affine, affine)
    assert segmentation.header.get_xyzt_units()[0] == unit
