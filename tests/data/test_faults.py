"""Real files are spoiled: each fault is refused before a training begins; oddities are accepted."""

from __future__ import annotations

import gzip
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from toys import cache_of, opened, save, voxels_of, write_dataset

from dints.data.cases import Prepared
from dints.data.grid import Resampling
from dints.data.nifti import read_header, read_voxels
from dints.errors import UserError

SHAPE = (20, 18, 16)
AFFINE = np.array([[1.5, 0, 0, -9], [0, 1, 0, 4], [0, 0, 2, 30], [0, 0, 0, 1]])
PAIR = IMAGE, LABEL = "imagesTr/case_1.nii.gz", "labelsTr/case_1.nii.gz"
DESCRIPTION = "dataset.json"
PLACE = (3, 4, 5)  # of the voxel that is spoiled; the image is 77 there
REMEDIES = (
    r"\b(fix|correct|write|replace|remove|convert|give|list|complete|put|add|needs|Expecting|set)\b"
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Write three sound cases under a name that is not in the table of tasks."""
    rng, volumes = np.random.default_rng(0), []
    for _ in range(3):
        image = rng.integers(-500, 500, SHAPE).astype(np.int16)
        image[image == 0] = 1  # none counts as background
        image[PLACE] = 77
        label = np.zeros(SHAPE, np.uint8)
        label[4:12, 5:11, 3:9], label[8:12, 5:8, 3:9] = 1, 2
        volumes.append((image[..., None], label, AFFINE))
    return write_dataset(tmp_path_factory.mktemp("sound") / "Toy", volumes, ["MRI"])


# Ways to spoil a dataset: functions of its folder.

Spoil = Callable[[Path], None]
Bytes = Callable[[bytes], bytes]


def replaced(file: str, change: Bytes) -> Spoil:
    """Change the file's bytes as they are on disk."""
    return lambda root: (root / file).write_bytes(change((root / file).read_bytes()))


def repacked(file: str, change: Bytes) -> Spoil:
    """Change what is in a gzip file, which stays a sound one."""
    return replaced(file, lambda packed: gzip.compress(change(gzip.decompress(packed))))


def patched(file: str, offset: int, form: str, *values: float) -> Spoil:
    """Change numbers of the header."""
    numbers = struct.pack(f"<{form}", *values)
    return repacked(file, lambda raw: raw[:offset] + numbers + raw[offset + len(numbers) :])


def flipped_bit(packed: bytes) -> bytes:
    """Flip one bit of a voxel in a gzip file that does not compress: only its checksum tells."""
    stored = bytearray(gzip.compress(gzip.decompress(packed), 0))
    stored[len(stored) // 2] ^= 4
    return bytes(stored)


def of_size(*dimensions: int) -> Bytes:
    """Have a header promise these dimensions."""
    numbers = struct.pack(f"<{1 + len(dimensions)}h", len(dimensions), *dimensions)
    return lambda raw: raw[:40] + numbers + raw[40 + len(numbers) :]


def changed(file: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Change the voxels."""
    return lambda root: save(root / file, change(voxels_of(root / file)), AFFINE)


def array(file: str, shape: tuple[int, ...], kind: object = np.int16) -> Spoil:
    return lambda root: save(root / file, np.ones(shape, kind), AFFINE)


def voxel(file: str, value: float) -> Spoil:
    def spoil(values: np.ndarray) -> np.ndarray:
        spoilt = values.astype(np.float32)
        spoilt[PLACE] = value
        return spoilt

    return changed(file, spoil)


def with_affine(affine: np.ndarray, *files: str) -> Spoil:
    """Put image and label, or only one of them, somewhere else in space."""

    def spoil(root: Path) -> None:
        for file in files or PAIR:
            save(root / file, voxels_of(root / file), affine)

    return spoil


def moved(column: int, row: int, mm: float) -> Spoil:
    """Put the label elsewhere than its image."""
    affine = AFFINE.copy()
    affine[row, column] += mm
    return with_affine(affine, LABEL)


def fault(spoil: Spoil, *says: str, row: str | None = None, **settings: object) -> tuple:
    """Describe a fault.

    Args:
        says: parts of the message: ``{root}`` stands for the dataset's folder.
        row: the fault of the list of those that the scripts survive.
        settings: of the data.
    """
    return spoil, says, row, settings


IN_IMAGE, IN_LABEL = ("{root}/" + file for file in PAIR)
WRONG_LABEL = "Toy has the labels 0 to 2"
HUGE = of_size(30000, 30000, 30000)
OF_HUGE = "promises 30000 x 30000 x 30000 voxels, more than the file can hold"
DAMAGED, ABSURD, UNLIKE, WRONG, NONFINITE = (
    "damaged bytes",
    "header that claims 30000 x 30000 x 30000",
    "image and label of different shape or affine",
    "label values 7, -1, 256, NaN, 1.4",
    "NaN or Inf voxel",
)
CHANNELS = "4D image for a one-channel task; 4D label"

IMAGE_FAULTS = {
    "truncated gzip": fault(
        replaced(IMAGE, lambda packed: packed[: len(packed) // 2]), "ended before", row=DAMAGED
    ),
    "one flipped bit": fault(replaced(IMAGE, flipped_bit), "CRC check failed", row=DAMAGED),
    "text after the gzip file": fault(
        replaced(IMAGE, lambda packed: packed + b"<html>"), "compression is damaged"
    ),
    "fewer voxels than promised": fault(
        repacked(IMAGE, lambda raw: raw[:-1]), "it is truncated: 11871 of 11872"
    ),
    "wrong magic": fault(patched(IMAGE, 344, "4s", b"XXXX"), "header is damaged", "magic"),
    "pair of files": fault(patched(IMAGE, 344, "4s", b"ni1\0"), "ni1"),
    "half a header": fault(
        replaced(IMAGE, lambda packed: gzip.decompress(packed)[:200]), "header is damaged"
    ),
    "wrong sizeof_hdr": fault(patched(IMAGE, 0, "i", 349), "no NIfTI file", row=DAMAGED),
    "voxels that begin at NaN": fault(patched(IMAGE, 108, "f", np.nan), "header is damaged"),
    "text file": fault(replaced(IMAGE, lambda packed: b"<html>404</html>\n"), "no NIfTI file"),
    "absurd dimensions": fault(repacked(IMAGE, HUGE), OF_HUGE, row=ABSURD),
    "absurd dimensions, not compressed": fault(
        replaced(IMAGE, lambda packed: HUGE(gzip.decompress(packed))), OF_HUGE, row=ABSURD
    ),
    "2D": fault(array(IMAGE, SHAPE[:2]), "2D image (20 x 18)"),
    "no voxels": fault(repacked(IMAGE, of_size(20, 0, 16)), "20 x 0 x 16"),
    "4D": fault(array(IMAGE, (*SHAPE, 4)), "has 4 channels", " 1", row=CHANNELS),
    "complex numbers": fault(array(IMAGE, SHAPE, np.complex64), "complex64 values"),
    "affine out of all bounds": fault(patched(IMAGE, 280, "f", 1e30), "span no volume"),
    "affine with a column of zeros": fault(patched(IMAGE, 320, "f", 0), "span no volume"),
    "affine with an origin of NaN": fault(patched(IMAGE, 292, "f", np.nan), "span no volume"),
    "RGB": fault(array(IMAGE, SHAPE, [(colour, "u1") for colour in "RGB"]), "RGB values"),
    "origin beyond float32's places": fault(
        with_affine(np.array([[-2.0, 0, 0, 9], [0, 2, 0, 1e18], [0, 0, 2, 5], [0, 0, 0, 1]])),
        *("first voxel at 9, 1e+18, 5 mm", "correct its affine"),
    ),
    "NaN voxel": fault(
        *(voxel(IMAGE, np.nan), "1 NaN or infinite voxels", "--replace_nonfinite VALUE"),
        row=NONFINITE,
    ),
    "beyond float32": fault(
        changed(IMAGE, lambda values: np.full(SHAPE, 1e300)), "has 5760 NaN or infinite voxels"
    ),
}
FAULTS = {
    **IMAGE_FAULTS,
    **{
        f"label {value}": fault(
            *(voxel(LABEL, value), IN_LABEL, f"holds the label {value} in 1 voxels", WRONG_LABEL),
            row=WRONG,
        )
        for value in (7, -1, 256, np.nan, 1.4)
    },
    "label: 4D": fault(array(LABEL, (*SHAPE, 2)), IN_LABEL, "has 2 channels", row=CHANNELS),
    "label: other shape": fault(
        *(array(LABEL, (20, 18, 15)), IN_LABEL, "shape (20, 18, 15)", IN_IMAGE, "(20, 18, 16)"),
        row=UNLIKE,
    ),
    "label: other shape, trusted": fault(
        array(LABEL, (20, 18, 15)), "(20, 18, 15)", trust_shapes=True
    ),
    "label: other origin": fault(
        moved(3, 0, 0.01), IN_LABEL, "lies elsewhere", "up to 0.01", IN_IMAGE, row=UNLIKE
    ),
    "label that is its image": fault(
        lambda root: shutil.copy(root / IMAGE, root / LABEL), IN_LABEL, "looks like an image"
    ),
    "voxels of a metre": fault(
        with_affine(np.diag([1000.0, 1000, 1000, 1])), IN_IMAGE, "1000 x 1000 x 1000 mm"
    ),
}


def rows(table: dict[str, tuple]) -> list:
    """List the table's names for parametrize, those marked that provoke a fault of the list."""
    return [
        pytest.param(name, marks=[pytest.mark.fault(row)] if row else [])
        for name, (_, _, row, _) in table.items()
    ]


def spoilt(dataset: Path, folder: Path, spoil: Spoil) -> Path:
    root = folder.resolve() / "Toy"
    shutil.copytree(dataset, root)
    spoil(root)
    return root


def held(root: Path, mode: str = "none", **settings: object) -> Sequence[Prepared]:
    """Do with all cases what the stages do before they train; without a cache none is prepared."""
    fold = opened(root, patch_size=(32, 32, 32), **settings)
    return cache_of(mode, root.parent / "cache", fold.task).hold(fold.cases, "training")


def refusal(function: Callable, *args: object, **settings: object) -> str:
    with pytest.raises(UserError) as refused:
        function(*args, **settings)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 500 and re.search(REMEDIES, message), message
    return message


@pytest.mark.parametrize("name", rows(FAULTS))
def test_a_fault_is_named_before_a_training(name, dataset, tmp_path):
    spoil, says, _, settings = FAULTS[name]
    root = spoilt(dataset, tmp_path, spoil)
    message = refusal(held, root, **settings)
    assert all(part.format(root=root) in message for part in says), message
    if name in IMAGE_FAULTS:
        assert message.startswith(f"{root}/imagesTr/case_1.nii")


def test_a_damaged_file_is_named_whatever_the_cache(dataset, tmp_path):
    root = spoilt(dataset, tmp_path, FAULTS["one flipped bit"][0])
    expected = refusal(held, root)
    assert all(refusal(held, root, mode) == expected for mode in ("ram", "disk"))


def test_names_that_python_takes_for_ascii_are_named_with_the_remedy(
    dataset, tmp_path, monkeypatch
):
    """With LC_ALL=C and PYTHONUTF8=0 it finds no file whose name is not ASCII."""
    change = replaced(DESCRIPTION, lambda raw: raw.replace(b"Tr/case_1", "Tr/f\u00e4ll".encode()))
    root = spoilt(dataset, tmp_path, change)
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    assert "set PYTHONUTF8=1, since this Python takes all names for ascii" in refusal(held, root)


def test_all_bad_cases_are_counted(dataset, tmp_path):
    root = spoilt(dataset, tmp_path, array(IMAGE, SHAPE[:2]))
    array(LABEL.replace("1", "2"), (5, 5, 5))(root)
    message = refusal(held, root)
    assert message.startswith("2 of 3 cases cannot be used (search_dints.py --check lists them), ")
    assert IMAGE in message


def scaled(root: Path) -> None:
    """Store the same values by other numbers in the file: 3 + 2 times half of them."""
    changed(IMAGE, lambda values: (values.astype(np.float32) - 3) / 2)(root)
    patched(IMAGE, 112, "ff", 2, 3)(root)


# The cases are prepared as those of the sound dataset are.
ACCEPTED = {
    "affine within 1e-3": fault(moved(3, 1, 9e-4)),
    "other affine, shapes trusted": fault(moved(3, 1, 50), trust_shapes=True),
    "label as 4D": fault(changed(LABEL, lambda values: values[..., None])),
    "NaN voxel, replaced": fault(voxel(IMAGE, np.nan), row=NONFINITE, replace_nonfinite=77.0),
    "scl_slope": fault(scaled),
    "not compressed, whatever the name says": fault(replaced(IMAGE, gzip.decompress)),
}


@pytest.fixture(scope="module")
def sound(dataset) -> list[Prepared]:
    return list(held(dataset))


@pytest.mark.parametrize("name", rows(ACCEPTED))
def test_an_oddity_is_accepted_and_changes_nothing(name, dataset, sound, tmp_path):
    spoil, _, _, settings = ACCEPTED[name]
    root = spoilt(dataset, tmp_path, spoil)
    for found, expected in zip(held(root, **settings), sound, strict=True):
        assert np.array_equal(found.label, expected.label)
        assert np.abs(found.image - expected.image).max() < 2e-3


@pytest.mark.slow
def test_a_header_with_any_byte_changed_is_read_or_refused(dataset, tmp_path):
    """Reading raises nothing but `UserError`; each byte takes its lowest and highest values."""
    path, raw = tmp_path / "image.nii", gzip.decompress((dataset / IMAGE).read_bytes())
    refused = 0
    for place in range(352):
        for value in (127, 255):
            path.write_bytes(raw[:place] + bytes([value]) + raw[place + 1 :])
            try:
                header = read_header(str(path))
                turn = Resampling(header.shape, header.affine, None)
                turn.apply(read_voxels(header), nearest=True)
            except UserError as error:
                refused += 1
                assert str(error).startswith(str(path)) and len(str(error)) < 500
    assert 30 < refused < 300
