"""Datasets are spoiled in real files: it is told before a training begins, by --check and by inference; or accepted."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import SPACE, TINY, infer, only_error, run, words
from dints.data.opening import open_dataset
from threshold import Threshold, knows

import search_dints
from dints import options
from dints.data.cache import open_cache
from dints.data.cases import Prepared
from dints.data.grid import Resampling
from dints.data.nifti import read_header, read_voxels
from dints.data.tasks import Task
from dints.errors import UserError
from dints.running.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
SHAPE, AFFINE = (20, 18, 16), np.array([[1.5, 0, 0, -9], [0, 1, 0, 4], [0, 0, 2, 30], [0, 0, 0, 1]])
TASK = Task("Toy", "MRI", 1, ("background", "a", "b"), spacing=(1.5, 1.0, 2.0), patch_size=(16, 16, 16))
PAIR = IMAGE, LABEL = "imagesTr/case_1.nii.gz", "labelsTr/case_1.nii.gz"
DESCRIPTION = "dataset.json"
PLACE = (3, 4, 5)  # of the voxel that is spoiled; the image is 77 there
REMEDIES = r"\b(mend|write|replace|remove|convert|give|list|complete|move)\b"


def write(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nib.save(nib.Nifti1Image(voxels, affine), path)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Write four cases in MSD form, under a name that is not in the table of tasks."""
    root = tmp_path_factory.mktemp("sound") / "Toy"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(4):
        image = rng.integers(-500, 500, SHAPE).astype(np.int16)
        image[image == 0] = 1  # none counts as background
        image[PLACE] = 77
        label = np.zeros(SHAPE, np.uint8)
        label[4:12, 5:11, 3:9], label[8:12, 5:8, 3:9] = 1, 2
        write(root / f"imagesTr/case_{number}.nii.gz", image)
        write(root / f"labelsTr/case_{number}.nii.gz", label)
    training = [{"image": f"./imagesTr/case_{n}.nii.gz", "label": f"./labelsTr/case_{n}.nii.gz"} for n in range(4)]
    labels = {"0": "background", "1": "a", "2": "b"}
    description = {"modality": {"0": "MRI"}, "labels": labels, "training": training}
    (root / DESCRIPTION).write_text(json.dumps(description, indent=1))
    return root


# Ways to spoil a dataset: functions of its folder.

Spoil = Callable[[Path], None]
Bytes = Callable[[bytes], bytes]


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


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
    """Flip one bit of a voxel in a gzip file that does not compress, so that nothing but the CRC tells."""
    stored = bytearray(gzip.compress(gzip.decompress(packed), 0))
    stored[len(stored) // 2] ^= 4
    return bytes(stored)


def members(packed: bytes) -> bytes:
    """Pack the file in two parts, one after the other."""
    raw = gzip.decompress(packed)
    return gzip.compress(raw[:999]) + gzip.compress(raw[999:])


def plain(file: str, change: Bytes = bytes) -> Spoil:
    """Write the file as .nii instead of .nii.gz, its bytes changed."""

    def spoil(root: Path) -> None:
        (root / file.removesuffix(".gz")).write_bytes(change(content(root / file)))
        (root / file).unlink()
        description = (root / DESCRIPTION).read_text()
        (root / DESCRIPTION).write_text(description.replace(file, file.removesuffix(".gz")))

    return spoil


def of_size(*dimensions: int) -> Bytes:
    """Have a header tell these dimensions."""
    return lambda raw: raw[:40] + struct.pack(f"<{1 + len(dimensions)}h", len(dimensions), *dimensions) + raw[48:]


def changed(file: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Change the voxels."""
    return lambda root: write(root / file, change(voxels(root / file)))


def voxel(file: str, value: float) -> Spoil:
    def spoil(values: np.ndarray) -> np.ndarray:
        spoilt = values.astype(np.float32)
        spoilt[PLACE] = value
        return spoilt

    return changed(file, spoil)


def array(file: str, shape: tuple[int, ...], kind: type = np.int16) -> Spoil:
    return lambda root: write(root / file, np.ones(shape, kind))


def both(*changes: Spoil) -> Spoil:
    def spoil(root: Path) -> None:
        for change in changes:
            change(root)

    return spoil


def with_affine(affine: np.ndarray, *files: str) -> Spoil:
    """Put image and label, or only one of them, somewhere else in space."""
    return both(*(lambda root, file=file: write(root / file, voxels(root / file), affine) for file in files or PAIR))


def moved(file: str, column: int, row: int, mm: float) -> Spoil:
    affine = AFFINE.copy()
    affine[row, column] += mm
    return with_affine(affine, file)


def with_sform(column: int, value: float) -> Spoil:
    """Set one column of the affine in the headers of image and label, past what nibabel would write."""
    fields = [280 + 16 * row + 4 * column for row in range(3)]
    return both(*(patched(file, field, "f", value) for file in PAIR for field in fields))


def turned(*orientation: tuple[int, int]) -> Spoil:
    """Leave both in their place, but with other axes in the file: which one each becomes, and its sign."""

    def spoil(root: Path) -> None:
        affine = AFFINE @ nib.orientations.inv_ornt_aff(orientation, SHAPE)
        for file in PAIR:
            write(root / file, nib.orientations.apply_orientation(voxels(root / file), orientation), affine)

    return spoil


def scaled(root: Path) -> None:
    """Store the same values by other numbers in the file: 3 + 2 times half of them."""
    changed(IMAGE, lambda values: (values.astype(np.float32) - 3) / 2)(root)
    patched(IMAGE, 112, "ff", 2, 3)(root)


def big_endian(root: Path) -> None:
    for file in PAIR:
        image = nib.Nifti1Image(voxels(root / file), AFFINE, nib.Nifti1Header(endianness=">"))
        image.header.set_data_dtype(voxels(root / file).dtype.newbyteorder(">"))
        nib.save(image, root / file)
    assert content(root / IMAGE)[:4] == b"\0\0\1\\"


def as_nifti2(root: Path) -> None:
    for file in PAIR:
        nib.save(nib.Nifti2Image(voxels(root / file), AFFINE), root / file)


def described(change: Callable[[dict], object]) -> Spoil:
    """Change dataset.json."""

    def spoil(root: Path) -> None:
        description = json.loads((root / DESCRIPTION).read_text())
        change(description)
        (root / DESCRIPTION).write_text(json.dumps(description))

    return spoil


def listed(key: str, path: str | int) -> Spoil:
    return described(lambda description: description["training"][1].update({key: path}))


def outside(link: bool = False, absolute: bool = False) -> Spoil:
    """Put the label beside the dataset's folder."""

    def spoil(root: Path) -> None:
        beside = root.parent / "beside.nii.gz"
        shutil.move(root / LABEL, beside)
        if link:
            (root / LABEL).symlink_to(beside)
        else:
            listed("label", str(beside) if absolute else "../beside.nii.gz")(root)

    return spoil


def removed(*files: str) -> Spoil:
    return both(*(lambda root, file=file: (root / file).unlink() for file in files))


def no_rights(root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (root / IMAGE).chmod(0)


@dataclass(frozen=True)
class Fault:
    """A way to spoil a dataset, and parts of what is said of it: ``{root}`` stands for its folder."""

    spoil: Spoil
    says: tuple[str, ...]
    flags: str


def fault(spoil: Spoil, *says: str, flags: str = "") -> Fault:
    return Fault(spoil, says, flags)


COS, SIN = np.cos(0.2), np.sin(0.2)
OBLIQUE = np.array([[COS, -SIN, 0, 5], [SIN, COS, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]]) @ AFFINE
RGB = [("R", "u1"), ("G", "u1"), ("B", "u1")]
IN_IMAGE, IN_LABEL = ("{root}/" + file for file in PAIR)
IN_PLAIN = IN_IMAGE.removesuffix(".gz")
WRONG_LABEL = "Toy has the labels 0 to 2"
HUGE, OF_HUGE = of_size(30000, 30000, 30000), "promises 30000 x 30000 x 30000 voxels, more than the file can hold"

# Faults of an image, whose file the message begins with.
IMAGE_FAULTS = {
    "truncated gzip": fault(replaced(IMAGE, lambda packed: packed[: len(packed) // 2]), "ends too early"),
    "gzip without its end": fault(replaced(IMAGE, lambda packed: packed[:-4]), "ends too early"),
    "one flipped bit": fault(replaced(IMAGE, flipped_bit), "damaged", "incorrect data check"),
    "gzip that begins wrong": fault(replaced(IMAGE, lambda packed: packed[:2] + b"??" + packed[4:]), "damaged"),
    "gzip of nothing": fault(repacked(IMAGE, lambda raw: b""), "no NIfTI file"),
    "fewer voxels than promised": fault(repacked(IMAGE, lambda raw: raw[:-1]), "it is truncated: 11871 of 11872"),
    "wrong magic": fault(patched(IMAGE, 344, "4s", b"XXXX"), "header is damaged", "magic"),
    "pair of files": fault(patched(IMAGE, 344, "4s", b"ni1\0"), "ni1"),
    "wrong sizeof_hdr": fault(patched(IMAGE, 0, "i", 349), "no NIfTI file"),
    "unknown data type": fault(patched(IMAGE, 70, "h", 3), "header is damaged"),
    "voxels that begin at NaN": fault(patched(IMAGE, 108, "f", np.nan), "header is damaged"),
    "half a header": fault(plain(IMAGE, lambda raw: raw[:200]), IN_PLAIN, "header is damaged"),
    "text file": fault(replaced(IMAGE, lambda packed: b"<html>404</html>\n"), "no NIfTI file"),
    "empty file": fault(replaced(IMAGE, lambda packed: b""), "no NIfTI file"),
    "absurd dimensions": fault(repacked(IMAGE, HUGE), OF_HUGE),
    "absurd dimensions, not compressed": fault(plain(IMAGE, HUGE), IN_PLAIN, OF_HUGE),
    "voxel missing, not compressed": fault(plain(IMAGE, lambda raw: raw[:-1]), IN_PLAIN, "more than the file can"),
    "2D": fault(array(IMAGE, SHAPE[:2]), "2D image (20 x 18)"),
    "no voxels": fault(replaced(IMAGE, lambda packed: of_size(20, 0, 16)(gzip.decompress(packed))), "20 x 0 x 16"),
    "4D": fault(array(IMAGE, (*SHAPE, 4)), "has 4 channels", " 1"),
    "5D": fault(array(IMAGE, (*SHAPE, 2, 3)), "5D image (20 x 18 x 16 x 2 x 3)"),
    "vectors": fault(array(IMAGE, (*SHAPE, 1, 3)), "has 3 channels", " 1"),
    "complex numbers": fault(array(IMAGE, SHAPE, np.complex64), "complex64 values"),
    "RGB": fault(array(IMAGE, SHAPE, RGB), "RGB values"),
    "affine with NaN": fault(with_sform(1, np.nan), "span no volume"),
    "affine with a column of zeros": fault(with_sform(2, 0), "span no volume"),
    "affine out of all bounds": fault(with_sform(0, 1e30), "span no volume"),
    "origin beyond float32's places": fault(
        with_affine(np.array([[-2.0, 0, 0, 9], [0, 2, 0, 1e18], [0, 0, 2, 5], [0, 0, 0, 1]])),
        "first voxel at 9, 1e+18, 5 mm",
        "correct its affine",
    ),
    "NaN voxel": fault(voxel(IMAGE, np.nan), "has 1 NaN or infinite voxels", "--replace_nonfinite VALUE"),
    "infinite voxel": fault(voxel(IMAGE, -np.inf), "has 1 NaN or infinite voxels"),
    "beyond float32": fault(lambda root: write(root / IMAGE, np.full(SHAPE, 1e300)), "has 5760 NaN or infinite voxels"),
    "scaled beyond float32": fault(patched(IMAGE, 112, "ff", 3e38, 0), "NaN or infinite voxels"),
    "no rights": fault(no_rights, "cannot be read: Permission denied"),
}
WRONG_LABELS = {"7": 7, "-1": -1, "256": 256, "NaN": np.nan, "infinite": np.inf, "1.4": 1.4, "1.0000001": 1.0000001}
CASE_FAULTS = {
    **IMAGE_FAULTS,
    **{
        f"label {name}": fault(voxel(LABEL, value), IN_LABEL, f"holds the label {value} in 1 voxels", WRONG_LABEL)
        for name, value in WRONG_LABELS.items()
    },
    "label NaN, voxels replaced": fault(voxel(LABEL, np.nan), IN_LABEL, "label nan", flags="--replace_nonfinite 0"),
    "label: truncated gzip": fault(replaced(LABEL, lambda packed: packed[:-9]), IN_LABEL, "ends too early"),
    "label: one flipped bit": fault(replaced(LABEL, flipped_bit), IN_LABEL, "incorrect data check"),
    "label: 4D": fault(array(LABEL, (*SHAPE, 2)), IN_LABEL, "has 2 channels, and a label has 1"),
    "label: 2D": fault(array(LABEL, SHAPE[:2]), IN_LABEL, "2D image"),
    "label: other shape": fault(
        array(LABEL, (20, 18, 15)), IN_LABEL, "shape (20, 18, 15)", IN_IMAGE, "has (20, 18, 16)"
    ),
    "label: other origin": fault(moved(LABEL, 3, 0, 0.01), IN_LABEL, "lies elsewhere", "by up to 0.01", IN_IMAGE),
    "label: other spacing": fault(moved(LABEL, 0, 0, 0.5), IN_LABEL, "lies elsewhere", "by up to 0.5"),
    "label: other shape, shapes trusted": fault(array(LABEL, (20, 18, 15)), "(20, 18, 15)", flags="--trust_shapes"),
    "label that is its image": fault(
        lambda root: shutil.copy(root / IMAGE, root / LABEL), IN_LABEL, "more in 57", WRONG_LABEL, "looks like an image"
    ),
    "voxels of a metre": fault(with_affine(np.diag([1000.0, 1000, 1000, 1])), IN_IMAGE, "1000 x 1000 x 1000 mm"),
}
TRAILING_COMMA = b'{"modality":\n {"0": "MRI",}}'
LIST_FAULTS = {  # of what dataset.json lists
    "malformed JSON": fault(
        replaced(DESCRIPTION, lambda raw: TRAILING_COMMA), "{root}/dataset.json", "not valid JSON at line 2, column"
    ),
    "JSON that ends early": fault(replaced(DESCRIPTION, lambda raw: raw[:-3]), "not valid JSON at line 27, column"),
    "no description": fault(removed(DESCRIPTION), "{root}/dataset.json does not exist"),
    "no list": fault(described(lambda d: d.pop("training")), "no cases under 'training'"),
    "no image": fault(described(lambda d: d["training"][1].pop("image")), "entry 1 of 'training'", "'image'"),
    "no label": fault(described(lambda d: d["training"][1].pop("label")), "entry 1 of 'training'", "'label'"),
    "a number for a path": fault(listed("label", 3), "entry 1 of 'training'"),
    "no classes": fault(described(lambda d: d.pop("labels")), "no 'labels'"),
    "files missing": fault(removed(IMAGE, LABEL), "2 of the 8 files", IN_IMAGE),
    "folder for a file": fault(both(removed(IMAGE), lambda root: (root / IMAGE).mkdir()), "1 of the 8 files"),
    "entry twice": fault(described(lambda d: d["training"].append(d["training"][0])), "entry 0", "entry 4", "one file"),
    "label twice": fault(listed("label", "labelsTr/case_0.nii.gz"), "entry 0", "entry 1", "one file"),
    "image as label": fault(listed("label", IMAGE), "an image of entry 1", "the label of entry 1", "one file"),
    "no NIfTI": fault(listed("image", "imagesTr/case_1.mha"), "case_1.mha", "convert"),
    "outside by ..": fault(outside(), "outside --root {root}", "../beside.nii.gz", "--allow_outside_root"),
    "outside, absolute": fault(outside(absolute=True), "outside --root", "beside.nii.gz", "--allow_outside_root"),
    "outside by a link": fault(outside(link=True), LABEL, "beside.nii.gz", "--allow_outside_root"),
}
FAULTS = {**CASE_FAULTS, **LIST_FAULTS}
# Rows of the list of faults that the scripts survive.
PROVOKED = {
    "damaged bytes": ("truncated gzip", "one flipped bit", "label: one flipped bit", "wrong sizeof_hdr"),
    "header that claims 30000 x 30000 x 30000": ("absurd dimensions", "absurd dimensions, not compressed"),
    "image and label of different shape or affine": (
        *("label: other shape", "label: other origin", "label: other spacing"),
    ),
    "4D image for a one-channel task; 4D label": ("4D", "label: 4D"),
    "label values 7, -1, 256, NaN, 1.4": ("label 7", "label -1", "label 256", "label NaN", "label 1.4"),
    "NaN or Inf voxel": ("NaN voxel", "infinite voxel", "NaN voxel, replaced", "infinite voxel, replaced"),
    "missing files": ("files missing",),
    "malformed JSON, missing keys, wrong types": ("malformed JSON", "no classes", "a number for a path"),
    "paths that leave the root": ("outside by ..", "outside, absolute", "outside by a link"),
}


def rows(table: dict[str, Fault]) -> list:
    """List the table's names for parametrize, those marked that provoke a fault of the list."""
    named = {name: pytest.mark.fault(fault) for fault, names in PROVOKED.items() for name in names}
    return [pytest.param(name, marks=named[name]) if name in named else name for name in table]


def spoilt(dataset: Path, folder: Path, spoil: Spoil) -> Path:
    root = folder.resolve() / "Toy"
    shutil.copytree(dataset, root)
    spoil(root)
    return root


def command(root: Path, *flags: str):
    """Parse a command line of the search."""
    always = "--output_root", root.parent / "run", "--device cpu --num_folds 2 --patch_size 32 32 32"
    return search_dints.parse_args(words("--root", root, *always, *flags))


def held(root: Path, mode: str, *flags: str) -> Sequence[Prepared]:
    """Do with all cases what the stages do before they train; without a cache none is prepared yet."""
    opened = open_dataset(**options.dataset(command(root, *flags)))
    folder, leniency = root.parent / "cache", opened.leniency
    cache = open_cache(opened.cases, opened.task, folder, ALONE, mode=mode, leniency=leniency)
    return cache.hold(opened.cases, "training")


def refusal(function: Callable, *args: object) -> str:
    """Return the message with which it is refused, held against what every message must be."""
    with pytest.raises(UserError) as refused:
        function(*args)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 500
    return message


def assert_tells(message: str, root: Path, row: Fault) -> None:
    for part in row.says:
        assert part.format(root=root) in message
    if row in LIST_FAULTS.values():  # some end with a list or an example; JSON's say what is expected
        assert re.search(f"{REMEDIES}|needs|add|Expecting", message), message
    else:
        assert re.search(REMEDIES, re.split("[:;] ", message)[-1]), message


@pytest.mark.parametrize("name", rows(FAULTS))
def test_a_fault_is_told_before_a_training(name, dataset, tmp_path):
    row = FAULTS[name]
    root = spoilt(dataset, tmp_path, row.spoil)
    (message,) = {refusal(held, root, mode, row.flags) for mode in ("ram", "disk", "none")}
    assert_tells(message, root, row)
    if name in IMAGE_FAULTS:
        assert message.startswith(f"{root}/imagesTr/case_1.nii")


def test_names_that_python_takes_for_ascii_are_told_with_the_remedy(dataset, tmp_path, monkeypatch):
    """With LC_ALL=C and PYTHONUTF8=0 it finds no file whose name is not ASCII."""
    root = spoilt(dataset, tmp_path, listed("image", "imagesTr/f\u00e4ll.nii.gz"))
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    assert "set PYTHONUTF8=1, since this Python takes all names for ascii" in refusal(held, root, "none")


@pytest.mark.parametrize("name", rows(FAULTS))
def test_a_fault_is_listed_by_check(name, dataset, tmp_path, capsys):
    row = FAULTS[name]
    root = spoilt(dataset, tmp_path, row.spoil)
    message = refusal(search_dints.main, command(root, "--check", row.flags))
    if name in LIST_FAULTS:
        return assert_tells(message, root, row)
    assert message == f"{root} is not fit for training: mend what is listed above"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"files are in {root}")
    found = [line for line in lines[1:] if re.match(r"error    case_1 +\S", line)]
    told = "\n".join(found)
    for part in row.says:
        assert part.format(root=root).replace(f"{root}/", "") in told
    assert "Toy: 4 cases, 1 with errors" in "\n".join(lines)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("name", rows(IMAGE_FAULTS))
def test_a_fault_of_an_image_is_told_by_inference(name, dataset, tmp_path, monkeypatch):
    row = IMAGE_FAULTS[name]
    root = spoilt(dataset, tmp_path, row.spoil)
    knows(monkeypatch, TASK)(Threshold(num_classes=3))
    (image,) = (root / "imagesTr").glob("case_1.*")
    message = refusal(infer, tmp_path / "out", "--input", image)
    assert message.startswith(str(image))
    assert_tells(message, root, row)
    assert not list(tmp_path.glob("out/*.nii*"))


# What is only unusual: the cases are prepared as those of the sound dataset are.
ACCEPTED = {
    "nothing": fault(lambda root: None),
    "affine within 1e-3": fault(moved(LABEL, 3, 1, 9e-4)),
    "other affine, shapes trusted": fault(
        moved(LABEL, 3, 1, 50), "warning  case_1", "elsewhere", flags="--trust_shapes"
    ),
    "float label": fault(changed(LABEL, lambda values: values.astype(np.float64))),
    "label of int32": fault(changed(LABEL, lambda values: values.astype(np.int32))),
    "label as 4D": fault(changed(LABEL, lambda values: values[..., None])),
    "NaN voxel, replaced": fault(voxel(IMAGE, np.nan), "has 1 NaN or infinite", flags="--replace_nonfinite 77"),
    "infinite voxel, replaced": fault(voxel(IMAGE, np.inf), "has 1 NaN or infinite", flags="--replace_nonfinite 77"),
    "float64 image": fault(changed(IMAGE, lambda values: values.astype(np.float64))),
    "image as 4D": fault(changed(IMAGE, lambda values: values[..., None])),
    "scl_slope": fault(scaled),
    "big-endian": fault(big_endian),
    "NIfTI-2": fault(as_nifti2),
    "not compressed": fault(plain(IMAGE)),
    "not compressed, whatever the name says": fault(replaced(IMAGE, gzip.decompress)),
    "gzip of several members": fault(replaced(IMAGE, members)),
    "something after the voxels": fault(repacked(IMAGE, lambda raw: raw + bytes(9))),
    "left-handed": fault(turned((0, -1), (1, 1), (2, 1)), "RAS 3, LAS 1"),
    "permuted": fault(turned((2, 1), (0, -1), (1, 1)), "RAS 3, PSR 1"),
    "oblique": fault(with_affine(OBLIQUE)),
    "absolute path": fault(lambda root: listed("label", str(root / LABEL))(root)),
    "outside by ..": fault(outside(), flags="--allow_outside_root"),
    "outside, absolute": fault(outside(absolute=True), flags="--allow_outside_root"),
    "outside by a link": fault(outside(link=True), flags="--allow_outside_root"),
}


@pytest.fixture(scope="session")
def sound(dataset) -> list[Prepared]:
    return list(held(dataset, "none"))


@pytest.mark.parametrize("name", rows(ACCEPTED))
def test_what_is_unusual_is_accepted_and_prepared_as_ever(name, dataset, sound, tmp_path, capsys):
    row = ACCEPTED[name]
    root = spoilt(dataset, tmp_path, row.spoil)
    for mode in ("ram", "disk", "none"):
        for case, expected in zip(held(root, mode, row.flags), sound, strict=True):
            assert np.array_equal(case.label, expected.label)
            assert case.image.shape == expected.image.shape and np.abs(case.image - expected.image).max() < 2e-3
    search_dints.main(command(root, "--check", row.flags))
    said = capsys.readouterr().out
    assert "Toy: 4 cases, 0 with errors" in said and "\nerror" not in said
    for part in row.says:
        assert part in said


@pytest.mark.parametrize("name", [name for name, row in ACCEPTED.items() if not row.flags])
def test_what_is_unusual_is_segmented(name, dataset, tmp_path, monkeypatch):
    """The network needs no neighbours, so that its segmentation follows the image wherever that lies."""
    root = spoilt(dataset, tmp_path, ACCEPTED[name].spoil)
    knows(monkeypatch, TASK)(Threshold(0, 3))
    (image,) = (root / "imagesTr").glob("case_1.*")
    infer(tmp_path / "out", "--input", image)
    (found,) = (tmp_path / "out").glob("case_1.*")
    segmented = np.asarray(nib.load(found).dataobj)
    assert 0.4 < segmented.mean() < 0.6
    mean = voxels(dataset / IMAGE).mean()
    if name in ("left-handed", "permuted"):
        assert nib.aff2axcodes(nib.load(found).affine) == nib.aff2axcodes(nib.load(image).affine)
        segmented = nib.as_closest_canonical(nib.load(found)).get_fdata()
    assert np.array_equal(segmented, voxels(dataset / IMAGE) > mean)


def test_foreground_is_missed_before_a_training(dataset, tmp_path):
    """CT's window is measured on it, whichever cases are used."""
    root = spoilt(dataset, tmp_path, described(lambda description: description.update(modality={"0": "CT"})))
    assert len(held(root, "ram")) == 4
    for number in range(4):
        write(root / f"labelsTr/case_{number}.nii.gz", np.zeros(SHAPE, np.uint8))
    assert "no case has any foreground" in refusal(held, root, "ram")


def test_all_bad_cases_are_counted(dataset, tmp_path):
    spoil = both(array(IMAGE, SHAPE[:2]), array(LABEL.replace("1", "3"), (5, 5, 5)))
    root = spoilt(dataset, tmp_path, spoil)
    message = refusal(held, root, "ram")
    assert message.startswith("2 of 4 cases cannot be used (search_dints.py --check lists them), for example ")
    assert IMAGE in message


def test_a_header_with_any_byte_changed_is_read_or_refused(dataset, tmp_path):
    """Reading raises nothing but `UserError`; each byte takes its lowest and highest values."""
    path, raw = tmp_path / "image.nii", content(dataset / IMAGE)
    refused = 0
    for place in range(352):
        for value in (0, 1, 127, 255):
            path.write_bytes(raw[:place] + bytes([value]) + raw[place + 1 :])
            try:
                header = read_header(str(path))
                Resampling(header.shape, header.affine, None).apply(read_voxels(header), nearest=True)
            except UserError as error:
                refused += 1
                assert str(error).startswith(str(path)) and len(str(error)) < 500
    assert 50 < refused < 500


@pytest.mark.slow
def test_a_process_says_one_line(dataset, tmp_path):
    row = FAULTS["truncated gzip"]
    root = spoilt(dataset, tmp_path, row.spoil)
    done = run("search_dints.py", TINY, SPACE, "--root", root, "--output_root", tmp_path / "run")
    assert_tells(only_error(done), root, row)
