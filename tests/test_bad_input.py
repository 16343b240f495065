"""Faults of datasets, each in a real file: told before a training begins, by --check and by inference; or accepted."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from test_infer import Threshold

import infer_dints
import search_dints
from dints import data
from dints.cache import open_cache
from dints.cases import Prepared
from dints.errors import UserError
from dints.runtime import Processes
from dints.tasks import Task
from dints.volumes import Resampling, read_header, read_voxels

CHECKOUT = Path(__file__).resolve().parents[1]
ALONE = Processes(0, 1, torch.device("cpu"))
SHAPE, AFFINE = (20, 18, 16), np.array([[1.5, 0, 0, -9], [0, 1, 0, 4], [0, 0, 2, 30], [0, 0, 0, 1]])
TASK = Task("Toy", "MRI", 1, ("background", "a", "b"), spacing=(1.5, 1.0, 2.0), patch_size=(16, 16, 16))
IMAGE, LABEL, DESCRIPTION = "imagesTr/case_1.nii.gz", "labelsTr/case_1.nii.gz", "dataset.json"
PLACE = (3, 4, 5)  # of the voxel that is spoiled; the image is 77 there
REMEDIES = r"\b(mend|replace|remove|convert|give|list|complete|move)\b"


def write(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nib.save(nib.Nifti1Image(voxels, affine), path)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Four cases in MSD form; of a name that is not in the table of tasks."""
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


# Spoiling: functions of the dataset's folder


Spoil = Callable[[Path], None]


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def replaced(file: str, change: Callable[[bytes], bytes]) -> Spoil:
    """The file's bytes changed as they are on disk."""
    return lambda root: (root / file).write_bytes(change((root / file).read_bytes()))


def patched(file: str, offset: int, form: str, *values: float) -> Spoil:
    """Numbers of the header changed, in a sound gzip file."""

    def change(packed: bytes) -> bytes:
        header = bytearray(gzip.decompress(packed))
        struct.pack_into(f"<{form}", header, offset, *values)
        return gzip.compress(bytes(header))

    return replaced(file, change)


def flipped_bit(packed: bytes) -> bytes:
    """One bit of a voxel in a gzip file that does not compress, so that nothing but the CRC tells."""
    stored = bytearray(gzip.compress(gzip.decompress(packed), 0))
    stored[len(stored) // 2] ^= 4
    return bytes(stored)


def plain(file: str, change: Callable[[bytes], bytes] = bytes) -> Spoil:
    """The file as .nii instead of .nii.gz, its bytes changed."""

    def spoil(root: Path) -> None:
        (root / file.removesuffix(".gz")).write_bytes(change(content(root / file)))
        (root / file).unlink()
        description = (root / DESCRIPTION).read_text()
        (root / DESCRIPTION).write_text(description.replace(file, file.removesuffix(".gz")))

    return spoil


def of_size(*dimensions: int) -> Callable[[bytes], bytes]:
    """A header that tells these dimensions."""
    return lambda raw: raw[:40] + struct.pack(f"<{1 + len(dimensions)}h", len(dimensions), *dimensions) + raw[48:]


def voxel(file: str, value: float) -> Spoil:
    def spoil(root: Path) -> None:
        spoilt = voxels(root / file).astype(np.float32)
        spoilt[PLACE] = value
        write(root / file, spoilt)

    return spoil


def array(file: str, shape: tuple[int, ...], kind: type = np.int16) -> Spoil:
    return lambda root: write(root / file, np.ones(shape, kind))


def both(*changes: Spoil) -> Spoil:
    def spoil(root: Path) -> None:
        for change in changes:
            change(root)

    return spoil


def moved(file: str, column: int, row: int, mm: float) -> Spoil:
    def spoil(root: Path) -> None:
        affine = AFFINE.copy()
        affine[row, column] += mm
        write(root / file, voxels(root / file), affine)

    return spoil


def with_sform(column: int, value: float) -> Spoil:
    """One column of the affine set in header of image and label, past what nibabel would write."""
    fields = [280 + 16 * row + 4 * column for row in range(3)]
    return both(*(patched(file, field, "f", value) for file in (IMAGE, LABEL) for field in fields))


def with_affine(affine: np.ndarray) -> Spoil:
    """Image and label somewhere else in space."""
    return both(*(lambda root, file=file: write(root / file, voxels(root / file), affine) for file in (IMAGE, LABEL)))


def turned(*orientation: tuple[int, int]) -> Spoil:
    """Image and label in the same place, but with other axes in the file: which one each becomes, and its sign."""

    def spoil(root: Path) -> None:
        affine = AFFINE @ nib.orientations.inv_ornt_aff(orientation, SHAPE)
        for file in (IMAGE, LABEL):
            write(root / file, nib.orientations.apply_orientation(voxels(root / file), orientation), affine)

    return spoil


def scaled(root: Path) -> None:
    """The same values by other numbers in the file: 3 + 2 times half of them."""
    image = nib.Nifti1Image(((voxels(root / IMAGE).astype(np.float32) - 3) / 2), AFFINE)
    image.set_data_dtype(np.float32)
    nib.save(image, root / IMAGE)
    patched(IMAGE, 112, "ff", 2, 3)(root)


def big_endian(root: Path) -> None:
    for file in (IMAGE, LABEL):
        image = nib.Nifti1Image(voxels(root / file), AFFINE, nib.Nifti1Header(endianness=">"))
        image.header.set_data_dtype(voxels(root / file).dtype.newbyteorder(">"))
        nib.save(image, root / file)
    assert content(root / IMAGE)[:4] == b"\0\0\1\\"


def as_nifti2(root: Path) -> None:
    for file in (IMAGE, LABEL):
        nib.save(nib.Nifti2Image(voxels(root / file), AFFINE), root / file)


def rgb(root: Path) -> None:
    write(root / IMAGE, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))


def described(change: Callable[[dict], object]) -> Spoil:
    """dataset.json changed."""

    def spoil(root: Path) -> None:
        description = json.loads((root / DESCRIPTION).read_text())
        change(description)
        (root / DESCRIPTION).write_text(json.dumps(description))

    return spoil


def listed(key: str, path: str) -> Spoil:
    return described(lambda description: description["training"][1].update({key: path}))


def outside(link: bool = False, absolute: bool = False) -> Spoil:
    """The label is beside the dataset's folder."""

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


def folder_instead(root: Path) -> None:
    (root / IMAGE).unlink()
    (root / IMAGE).mkdir()


@dataclass(frozen=True)
class Fault:
    """How a dataset is spoiled, and parts of what is said of it: ``{root}`` stands for its folder."""

    spoil: Spoil
    says: tuple[str, ...]
    flags: str = ""


COS, SIN = np.cos(0.2), np.sin(0.2)
OBLIQUE = np.array([[COS, -SIN, 0, 5], [SIN, COS, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]]) @ AFFINE
IN_IMAGE, IN_LABEL = ("{root}/" + file for file in (IMAGE, LABEL))
IN_PLAIN = IN_IMAGE.removesuffix(".gz")
WRONG_LABEL = "Toy has the labels 0 to 2"

# Of files, which are named at the beginning
IMAGE_FAULTS = {
    "truncated gzip": Fault(replaced(IMAGE, lambda packed: packed[: len(packed) // 2]), ("ends too early",)),
    "gzip without its end": Fault(replaced(IMAGE, lambda packed: packed[:-4]), ("ends too early",)),
    "one flipped bit": Fault(replaced(IMAGE, flipped_bit), ("damaged", "incorrect data check")),
    "gzip that begins wrong": Fault(replaced(IMAGE, lambda packed: packed[:2] + b"??" + packed[4:]), ("damaged",)),
    "gzip of nothing": Fault(replaced(IMAGE, lambda packed: gzip.compress(b"")), ("no NIfTI file",)),
    "fewer voxels than promised": Fault(
        replaced(IMAGE, lambda packed: gzip.compress(gzip.decompress(packed)[:-1])),
        ("it is truncated: 11871 of 11872",),
    ),
    "wrong magic": Fault(patched(IMAGE, 344, "4s", b"XXXX"), ("header is damaged", "magic")),
    "pair of files": Fault(patched(IMAGE, 344, "4s", b"ni1\0"), ("ni1",)),
    "wrong sizeof_hdr": Fault(patched(IMAGE, 0, "i", 349), ("no NIfTI file",)),
    "unknown data type": Fault(patched(IMAGE, 70, "h", 3), ("header is damaged",)),
    "voxels that begin at NaN": Fault(patched(IMAGE, 108, "f", np.nan), ("header is damaged",)),
    "half a header": Fault(plain(IMAGE, lambda raw: raw[:200]), (IN_PLAIN, "header is damaged")),
    "text file": Fault(replaced(IMAGE, lambda packed: b"<html>404</html>\n"), ("no NIfTI file",)),
    "empty file": Fault(replaced(IMAGE, lambda packed: b""), ("no NIfTI file",)),
    "absurd dimensions": Fault(
        replaced(IMAGE, lambda packed: gzip.compress(of_size(30000, 30000, 30000)(gzip.decompress(packed)))),
        ("promises 30000 x 30000 x 30000 voxels, more than the file can hold",),
    ),
    "absurd dimensions, not compressed": Fault(
        plain(IMAGE, of_size(30000, 30000, 30000)), (IN_PLAIN, "promises 30000 x 30000 x 30000 voxels, more than")
    ),
    "voxel missing, not compressed": Fault(plain(IMAGE, lambda raw: raw[:-1]), (IN_PLAIN, "more than the file can")),
    "2D": Fault(array(IMAGE, SHAPE[:2]), ("2D image (20 x 18)",)),
    "no voxels": Fault(replaced(IMAGE, lambda packed: of_size(20, 0, 16)(gzip.decompress(packed))), ("20 x 0 x 16",)),
    "4D": Fault(array(IMAGE, (*SHAPE, 4)), ("has 4 channels", "Toy has 1")),
    "5D": Fault(array(IMAGE, (*SHAPE, 2, 3)), ("5D image (20 x 18 x 16 x 2 x 3)",)),
    "vectors": Fault(array(IMAGE, (*SHAPE, 1, 3)), ("has 3 channels", "Toy has 1")),
    "complex numbers": Fault(array(IMAGE, SHAPE, np.complex64), ("complex64 values",)),
    "RGB": Fault(rgb, ("RGB values",)),
    "affine with NaN": Fault(with_sform(1, np.nan), ("span no volume",)),
    "affine with a column of zeros": Fault(with_sform(2, 0), ("span no volume",)),
    "affine out of all bounds": Fault(with_sform(0, 1e30), ("span no volume",)),
    "NaN voxel": Fault(voxel(IMAGE, np.nan), ("has 1 NaN or infinite voxels", "--replace_nonfinite VALUE")),
    "infinite voxel": Fault(voxel(IMAGE, -np.inf), ("has 1 NaN or infinite voxels",)),
    "voxels beyond float32": Fault(
        lambda root: write(root / IMAGE, np.full(SHAPE, 1e300)), ("has 5760 NaN or infinite voxels",)
    ),
    "scaled beyond float32": Fault(patched(IMAGE, 112, "ff", 3e38, 0), ("NaN or infinite voxels",)),
    "no rights": Fault(no_rights, ("cannot be read: Permission denied",)),
}
CASE_FAULTS = {
    **IMAGE_FAULTS,
    "label: truncated gzip": Fault(replaced(LABEL, lambda packed: packed[:-9]), (IN_LABEL, "ends too early")),
    "label: one flipped bit": Fault(replaced(LABEL, flipped_bit), (IN_LABEL, "incorrect data check")),
    "label: 4D": Fault(array(LABEL, (*SHAPE, 2)), (IN_LABEL, "has 2 channels, and a label has 1")),
    "label: 2D": Fault(array(LABEL, SHAPE[:2]), (IN_LABEL, "2D image")),
    "label: other shape": Fault(
        array(LABEL, (20, 18, 15)), (IN_LABEL, "shape (20, 18, 15)", IN_IMAGE, "has (20, 18, 16)")
    ),
    "label: other origin": Fault(moved(LABEL, 3, 0, 0.01), (IN_LABEL, "lies elsewhere", "by up to 0.01", IN_IMAGE)),
    "label: other spacing": Fault(moved(LABEL, 0, 0, 0.5), (IN_LABEL, "lies elsewhere", "by up to 0.5")),
    "label: other shape, shapes trusted": Fault(array(LABEL, (20, 18, 15)), ("(20, 18, 15)",), "--trust_shapes"),
    "label 7": Fault(voxel(LABEL, 7), (IN_LABEL, "holds the label 7 in 1 voxels", WRONG_LABEL)),
    "label -1": Fault(voxel(LABEL, -1), (IN_LABEL, "holds the label -1 in 1", WRONG_LABEL)),
    "label 256": Fault(voxel(LABEL, 256), (IN_LABEL, "holds the label 256 in 1", WRONG_LABEL)),
    "label NaN": Fault(voxel(LABEL, np.nan), (IN_LABEL, "holds the label nan in 1", WRONG_LABEL)),
    "label infinite": Fault(voxel(LABEL, np.inf), (IN_LABEL, "holds the label inf in 1", WRONG_LABEL)),
    "label 1.4": Fault(voxel(LABEL, 1.4), (IN_LABEL, "holds the label 1.4 in 1", WRONG_LABEL)),
    "label NaN, voxels replaced": Fault(voxel(LABEL, np.nan), (IN_LABEL, "label nan"), "--replace_nonfinite 0"),
    "label that is its image": Fault(
        lambda root: shutil.copy(root / IMAGE, root / LABEL), (IN_LABEL, "more in 57", WRONG_LABEL)
    ),
    "voxels of a metre": Fault(with_affine(np.diag([1000.0, 1000, 1000, 1])), (IN_IMAGE, "1000 x 1000 x 1000 mm")),
}
# Of what dataset.json lists
LIST_FAULTS = {
    "malformed JSON": Fault(
        lambda root: (root / DESCRIPTION).write_text('{"modality":\n {"0": "MRI",}}'),
        ("{root}/dataset.json", "not valid JSON at line 2, column"),
    ),
    "JSON that ends early": Fault(replaced(DESCRIPTION, lambda raw: raw[:-3]), ("not valid JSON at line 27, column",)),
    "no description": Fault(removed(DESCRIPTION), ("{root}/dataset.json does not exist",)),
    "no list": Fault(described(lambda d: d.pop("training")), ("no cases under 'training'",)),
    "no image": Fault(described(lambda d: d["training"][1].pop("image")), ("entry 1 of 'training'", "'image'")),
    "no label": Fault(described(lambda d: d["training"][1].pop("label")), ("entry 1 of 'training'", "'label'")),
    "a number for a path": Fault(described(lambda d: d["training"][1].update(label=3)), ("entry 1 of 'training'",)),
    "no classes": Fault(described(lambda d: d.pop("labels")), ("no 'labels'",)),
    "files missing": Fault(removed(IMAGE, LABEL), ("2 of the 8 files", IN_IMAGE)),
    "folder for a file": Fault(folder_instead, ("1 of the 8 files",)),
    "entry twice": Fault(
        described(lambda d: d["training"].append(d["training"][0])), ("entry 0", "entry 4", "one file")
    ),
    "label twice": Fault(listed("label", "labelsTr/case_0.nii.gz"), ("entry 0", "entry 1", "one file")),
    "image as label": Fault(listed("label", IMAGE), ("an image of entry 1", "the label of entry 1", "one file")),
    "no NIfTI": Fault(listed("image", "imagesTr/case_1.mha"), ("case_1.mha", "convert")),
    "outside by ..": Fault(outside(), ("outside --root {root}", "../beside.nii.gz", "--allow_outside_root")),
    "outside, absolute": Fault(outside(absolute=True), ("outside --root", "beside.nii.gz", "--allow_outside_root")),
    "outside by a link": Fault(outside(link=True), (LABEL, "beside.nii.gz", "--allow_outside_root")),
}
FAULTS = {**CASE_FAULTS, **LIST_FAULTS}


def spoilt(dataset: Path, folder: Path, spoil: Spoil) -> Path:
    root = folder.resolve() / "Toy"
    shutil.copytree(dataset, root)
    spoil(root)
    return root


def options(root: Path, *flags: str):
    """As `search_dints.main` gets them."""
    always = ["--root", str(root), "--output_root", str(root.parent / "run"), "--device", "cpu", "--num_folds", "2"]
    return search_dints.parse_args([*always, "--patch_size", "32", "32", "32", *flags])


def held(root: Path, cache: str, *flags: str) -> Sequence[Prepared]:
    """What the stages do before they train, to all cases; without a cache none is prepared yet."""
    args = options(root, "--cache", cache, *flags)
    opened = data.open_dataset(args)
    return open_cache(opened.cases, opened.task, args, ALONE).hold(opened.cases, "training")


def refusal(function: Callable, *args: object) -> str:
    """The message with which it is refused, held against what every message must be."""
    with pytest.raises(UserError) as refused:
        function(*args)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 500
    return message


def assert_tells(message: str, root: Path, fault: Fault) -> None:
    for part in fault.says:
        assert part.format(root=root) in message
    if fault in LIST_FAULTS.values():  # some end with a list or an example; JSON's say what is expected
        assert re.search(f"{REMEDIES}|needs|add|Expecting", message), message
    else:
        assert re.search(REMEDIES, re.split("[:;] ", message)[-1]), message


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_before_a_training(name, dataset, tmp_path):
    fault = FAULTS[name]
    root = spoilt(dataset, tmp_path, fault.spoil)
    messages = {refusal(held, root, cache, *fault.flags.split()) for cache in ("ram", "disk", "none")}
    (message,) = messages
    assert_tells(message, root, fault)
    if name in IMAGE_FAULTS:
        assert message.startswith(f"{root}/imagesTr/case_1.nii")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_listed_by_check(name, dataset, tmp_path, capsys):
    fault = FAULTS[name]
    root = spoilt(dataset, tmp_path, fault.spoil)
    message = refusal(search_dints.main, options(root, "--check", *fault.flags.split()))
    if name in LIST_FAULTS:
        return assert_tells(message, root, fault)
    assert message == f"{root} is not fit for training: mend what is listed above"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"files are in {root}")
    found = [line for line in lines[1:] if re.match(r"error    case_1 +\S", line)]
    told = "\n".join(found)
    for part in fault.says:
        assert part.format(root=root).replace(f"{root}/", "") in told
    assert "Toy: 4 cases, 1 with errors" in "\n".join(lines)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("name", IMAGE_FAULTS)
def test_a_fault_of_an_image_is_told_by_inference(name, dataset, tmp_path, monkeypatch):
    fault = IMAGE_FAULTS[name]
    root = spoilt(dataset, tmp_path, fault.spoil)
    monkeypatch.setattr(infer_dints, "load_model", lambda path: (Threshold(num_classes=3), None, TASK, {}))
    (image,) = (root / "imagesTr").glob("case_1.*")
    message = refusal(infer, tmp_path / "out", "--input", image)
    assert message.startswith(str(image))
    assert_tells(message, root, fault)
    assert not list(tmp_path.glob("out/*.nii*"))


def infer(folder: Path, *flags: object) -> None:
    always = ["--checkpoint", "model.pth", "--output_root", folder, "--device", "cpu", "--precision", "fp32"]
    infer_dints.main(infer_dints.parse_args([str(flag) for flag in (*always, *flags)]))


# What is only unusual: the cases are prepared as those of the sound dataset are.
ACCEPTED = {
    "nothing": Fault(lambda root: None, ()),
    "affine within 1e-3": Fault(moved(LABEL, 3, 1, 9e-4), ()),
    "other affine, shapes trusted": Fault(moved(LABEL, 3, 1, 50), ("warning  case_1", "elsewhere"), "--trust_shapes"),
    "float label": Fault(lambda root: write(root / LABEL, voxels(root / LABEL).astype(np.float64)), ()),
    "label of int32": Fault(lambda root: write(root / LABEL, voxels(root / LABEL).astype(np.int32)), ()),
    "label as 4D": Fault(lambda root: write(root / LABEL, voxels(root / LABEL)[..., None]), ()),
    "NaN voxel, replaced": Fault(voxel(IMAGE, np.nan), ("has 1 NaN or infinite",), "--replace_nonfinite 77"),
    "infinite voxel, replaced": Fault(voxel(IMAGE, np.inf), ("has 1 NaN or infinite",), "--replace_nonfinite 77"),
    "float64 image": Fault(lambda root: write(root / IMAGE, voxels(root / IMAGE).astype(np.float64)), ()),
    "image as 4D": Fault(lambda root: write(root / IMAGE, voxels(root / IMAGE)[..., None]), ()),
    "scl_slope": Fault(scaled, ()),
    "big-endian": Fault(big_endian, ()),
    "NIfTI-2": Fault(as_nifti2, ()),
    "not compressed": Fault(plain(IMAGE), ()),
    "not compressed, whatever the name says": Fault(replaced(IMAGE, gzip.decompress), ()),
    "gzip of several members": Fault(
        replaced(IMAGE, lambda p: b"".join(map(gzip.compress, (gzip.decompress(p)[:999], gzip.decompress(p)[999:])))),
        (),
    ),
    "something after the voxels": Fault(replaced(IMAGE, lambda p: gzip.compress(gzip.decompress(p) + bytes(9))), ()),
    "left-handed": Fault(turned((0, -1), (1, 1), (2, 1)), ("RAS 3, LAS 1",)),
    "permuted": Fault(turned((2, 1), (0, -1), (1, 1)), ("RAS 3, PSR 1",)),
    "oblique": Fault(with_affine(OBLIQUE), ()),
    "absolute path": Fault(lambda root: listed("label", str(root / LABEL))(root), ()),
    "outside by ..": Fault(outside(), (), "--allow_outside_root"),
    "outside, absolute": Fault(outside(absolute=True), (), "--allow_outside_root"),
    "outside by a link": Fault(outside(link=True), (), "--allow_outside_root"),
}


@pytest.fixture(scope="session")
def sound(dataset) -> list[Prepared]:
    return list(held(dataset, "none"))


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_unusual_is_accepted_and_prepared_as_ever(name, dataset, sound, tmp_path, capsys):
    fault = ACCEPTED[name]
    flags = fault.flags.split()
    root = spoilt(dataset, tmp_path, fault.spoil)
    for cache in ("ram", "disk", "none"):
        for case, expected in zip(held(root, cache, *flags), sound, strict=True):
            assert np.array_equal(case.label, expected.label)
            assert case.image.shape == expected.image.shape and np.abs(case.image - expected.image).max() < 2e-3
    search_dints.main(options(root, "--check", *flags))
    said = capsys.readouterr().out
    assert "Toy: 4 cases, 0 with errors" in said and "\nerror" not in said
    for part in fault.says:
        assert part in said


@pytest.mark.parametrize("name", [name for name, fault in ACCEPTED.items() if not fault.flags])
def test_what_is_unusual_is_segmented(name, dataset, tmp_path, monkeypatch):
    """With a network that needs no neighbours, so that its segmentation follows the image wherever that lies."""
    root = spoilt(dataset, tmp_path, ACCEPTED[name].spoil)
    monkeypatch.setattr(infer_dints, "load_model", lambda path: (Threshold(0, 3), None, TASK, {}))
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
    """In CT, whose window is measured on it; whichever cases are used."""
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
    """Never anything but a `UserError`: of each byte, the lowest and highest values."""
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


def test_the_script_says_one_line_and_no_traceback(dataset, tmp_path):
    faults = [FAULTS[name] for name in ("truncated gzip", "label 7", "malformed JSON")]
    roots = [spoilt(dataset, tmp_path / str(number), fault.spoil) for number, fault in enumerate(faults)]
    running = []
    for root in roots:
        command = [sys.executable, "search_dints.py", "--root", root, "--output_root", root.parent / "run"]
        command += ["--device", "cpu", "--patch_size", "32", "32", "32", "--num_folds", "2"]
        running.append(subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True))
    for process, root, fault in zip(running, roots, faults, strict=True):
        said = process.communicate(timeout=120)[1]
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert process.returncode == 1 and len(errors) == 1 and "Traceback" not in said, said
        assert_tells(errors[0], root, fault)
