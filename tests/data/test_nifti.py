"""Files read as nibabel reads them: every type, order of bytes and layout."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dints.data import nifti
from dints.data.nifti import read_header, read_voxels
from dints.errors import UserError

AFFINE = np.array([[-0.7, 0.04, 0, 9], [0.03, -0.8, 0.1, 4], [0, 0.03, 2.5, 30], [0, 0, 0, 1]], np.float32)


def write(path: Path, voxels: np.ndarray, kind: type = nib.Nifti1Image, header=None, dtype=None) -> str:
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
        assert voxels.dtype == expected.get_data_dtype().newbyteorder("=") and np.array_equal(voxels, values)
    else:
        assert np.abs(voxels - values).max() <= 1e-6 * np.abs(values).max()
    return voxels


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_voxels_are_read_in_their_own_type(tmp_path, dtype, suffix):
    voxels = np.random.default_rng(0).uniform(0, 127, (7, 5, 6)).astype(dtype)
    assert np.array_equal(check_against_nibabel(write(tmp_path / f"image{suffix}", voxels))[0], voxels)


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_scaled_voxels_become_float32(tmp_path, dtype):
    voxels = np.random.default_rng(0).uniform(-1000, 2000, (7, 5, 6))
    path = write(tmp_path / "image.nii.gz", voxels, dtype=dtype)
    slope, intercept = nib.load(path).dataobj.slope, nib.load(path).dataobj.inter
    assert slope not in (0, 1) and intercept != 0
    assert check_against_nibabel(path, exact=False).dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "endianness", "start"),
    [(nib.Nifti1Image, ">", b"\0\0\x01\x5c"), (nib.Nifti2Image, "<", b"\x1c\x02"), (nib.Nifti2Image, ">", b"\0\0\x02")],
)
def test_big_endian_files_and_nifti_2_are_read(tmp_path, kind, endianness, start):
    voxels = np.arange(-105, 105, dtype=f"{endianness}i2").reshape(7, 5, 6)
    path = write(tmp_path / "image.nii.gz", voxels, kind, kind.header_class(endianness=endianness))
    assert gzip.decompress(Path(path).read_bytes()).startswith(start)
    check_against_nibabel(path)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((7, 5, 6, 4), 4), ((7, 5, 6, 1), 1), ((7, 5, 6, 1, 3), 3), ((7, 5, 1), 1), ((1, 1, 6, 2), 2)],
)
def test_channels_come_first_in_their_order(tmp_path, shape, channels):
    voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    read = check_against_nibabel(write(tmp_path / "image.nii.gz", voxels))
    assert len(read) == channels
    for channel, values in enumerate(read):
        assert np.array_equal(values, voxels.reshape((*shape[:3], channels))[..., channel])


@pytest.mark.parametrize("size", [9000, 100])
def test_gzip_files_of_several_members_are_read(tmp_path, size):
    """Programs such as bgzip and pigz write them, in blocks, the first one empty; some append zeros."""
    path = write(tmp_path / "image.nii", np.random.default_rng(0).integers(-999, 999, (40, 30, 20)).astype(np.int16))
    content, several = Path(path).read_bytes(), tmp_path / "several.nii.gz"
    several.write_bytes(
        gzip.compress(b"")
        + b"".join(gzip.compress(content[start : start + size]) for start in range(0, len(content), size))
    )
    assert np.array_equal(check_against_nibabel(str(several)), check_against_nibabel(path))
    several.write_bytes(several.read_bytes() + bytes(512))
    assert np.array_equal(read_voxels(read_header(str(several))), check_against_nibabel(path))


@pytest.mark.fault("a small header with gigabytes of zeros behind its voxels")
def test_what_follows_the_voxels_is_read_no_further_than_a_file_may_have(tmp_path, monkeypatch):
    path = write(tmp_path / "image.nii", np.arange(210, dtype=np.int16).reshape(7, 5, 6))
    content, packed = Path(path).read_bytes(), tmp_path / "image.nii.gz"
    monkeypatch.setattr(nifti, "SLACK", 1 << 20)
    packed.write_bytes(gzip.compress(content + bytes(1 << 20), 1))
    assert np.array_equal(read_voxels(read_header(str(packed))), check_against_nibabel(path))
    unpacked, real = [], nifti.zlib.decompressobj

    class Counted:
        """Counts what is unpacked, which no clock measures on a busy machine."""

        def __init__(self, bits: int):
            self.stream = real(bits)

        def decompress(self, *given):
            unpacked.append(self.stream.decompress(*given))
            return unpacked[-1]

        def __getattr__(self, name: str):
            return getattr(self.stream, name)

    for several in (1, 8):  # a bomb may be of one member or of many
        packed.write_bytes(gzip.compress(content) + gzip.compress(bytes((64 << 20) // several), 1) * several)
        unpacked.clear()
        header = read_header(str(packed))
        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"image\.nii\.gz .* 1 MiB and more follow"):
            patch.setattr(nifti.zlib, "decompressobj", Counted)
            read_voxels(header)
        assert sum(map(len, unpacked)) < 4 << 20
    with open(path, "ab") as file:
        file.truncate(8 << 30)  # which takes no room on the disk
    assert read_voxels(read_header(path)).ravel("F").tolist() == list(np.arange(210).reshape(7, 5, 6).ravel("F"))


@pytest.mark.parametrize("repeats", [100, 200_000])
def test_extensions_before_the_voxels_are_passed_over(tmp_path, repeats):
    header = nib.Nifti1Header()
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"scanned on a Monday " * repeats))
    path = write(tmp_path / "image.nii.gz", np.arange(210, dtype=np.int16).reshape(7, 5, 6), header=header)
    assert read_header(path).offset > 20 * repeats
    check_against_nibabel(path)
