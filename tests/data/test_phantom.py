"""The built-in dataset: layout, variety, determinism, difficulty, and its refusals."""

from __future__ import annotations

import json
import os
from itertools import permutations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import run
from scipy import ndimage
from toys import touch

from dints.data.formats import read_dataset, read_json
from dints.data.phantom import LESION, LIVER, make_case, write_phantom
from dints.data.tasks import TASKS
from dints.errors import UserError

TASK = TASKS["Task00_Phantom"]
SMALL = {"shape": (16, 16, 16)}


@pytest.fixture(scope="module")
def cases(phantom) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    """Load (image, label) of the training cases, in file order."""
    training = read_json(phantom / "dataset.json")["training"]
    return [
        (nib.load(phantom / case["image"]), nib.load(phantom / case["label"])) for case in training
    ]


def voxels(image: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(image.dataobj)


def volume(label: nib.Nifti1Image, *values: int) -> float:
    """Measure the mL of some label values."""
    return np.isin(voxels(label), values).sum() * np.prod(label.header.get_zooms()) / 1000


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_layout_is_the_decathlons(phantom):
    description = read_json(phantom / "dataset.json")
    assert (description["numTraining"], description["numTest"]) == (8, 2)
    named = [path for case in description["training"] for path in case.values()]
    named += description["test"]
    found = {path.relative_to(phantom) for path in phantom.rglob("*.nii.gz")}
    assert {Path(path) for path in named} == found and len(found) == 18
    assert sum(path.stat().st_size for path in phantom.rglob("*") if path.is_file()) < 6e6
    assert read_dataset(phantom)[0] == TASK


def test_images_and_labels_fit_and_vary(cases):
    for image, label in cases:
        assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
        assert image.shape == label.shape and np.array_equal(image.affine, label.affine)
        assert min(image.shape) >= 48 and max(image.shape) <= 72
        assert all(1.5 <= size <= 2.6 for size in image.header.get_zooms())
        assert set(np.unique(voxels(label))) <= set(range(TASK.num_classes))
        assert voxels(image).min() >= -1024 and voxels(image).max() > 300  # air and bone
    assert len({image.shape for image, _ in cases}) > 5
    assert len({image.header.get_zooms() for image, _ in cases}) > 5
    orientations = {"".join(nib.aff2axcodes(image.affine)) for image, _ in cases}
    assert orientations == {"RAS", "LPS", "LAS"}


def test_liver_is_always_there_on_the_patients_right_and_the_lesion_is_not(cases):
    assert [n for n, (_, label) in enumerate(cases) if not volume(label, LESION)] == [0]
    assert any(ndimage.label(voxels(label) == LESION)[1] > 1 for _, label in cases)
    for image, label in cases:
        assert 25 < volume(label, LIVER) < 100
        voxels_of_liver, voxels_of_body = voxels(label) == LIVER, voxels(image) > -200
        liver, body = (
            nib.affines.apply_affine(image.affine, np.argwhere(mask)).mean(axis=0)
            for mask in (voxels_of_liver, voxels_of_body)
        )
        assert liver[0] > body[0] + 5


def test_a_second_call_does_nothing_and_other_parameters_replace(tmp_path):
    root = write_phantom(tmp_path / "phantom", 2, 1, **SMALL)
    before = snapshot(root)
    write_phantom(root, 2, 1, **SMALL)
    assert snapshot(root) == before
    (root / "labelsTr" / "phantom_001.nii.gz").unlink()
    write_phantom(root, 2, 1, **SMALL)
    assert snapshot(root).keys() == before.keys()
    write_phantom(root, 3, 0, seed=5, shape=(20, 18, 16), spacing=(5, 4, 6))
    assert read_json(root / "dataset.json")["phantom"]["seed"] == 5
    assert len(list(root.rglob("*.nii.gz"))) == 6
    image = nib.load(root / "imagesTr/phantom_000.nii.gz")
    assert image.shape in permutations((20, 18, 16)) and max(image.header.get_zooms()) == 6
    assert os.listdir(tmp_path) == ["phantom"]  # no temporary folder is left


def test_an_interrupted_run_leaves_everything_as_it_was(tmp_path, monkeypatch):
    def save(image, path):
        raise OSError(28, "No space left on device")

    root = write_phantom(tmp_path / "phantom", 2, 0, **SMALL)
    before = snapshot(tmp_path)
    monkeypatch.setattr(nib, "save", save)
    for folder in (root, tmp_path / "other"):
        with pytest.raises(UserError, match="No space left"):
            write_phantom(folder, 3, 0, **SMALL)
    assert snapshot(tmp_path) == before and list(tmp_path.iterdir()) == [root]


def test_foreign_files_and_folders_are_left_alone(tmp_path):
    other = tmp_path / "other"
    touch(other, "imagesTr/phantom_000.nii.gz")
    (other / "dataset.json").write_text(json.dumps({"name": "Spleen", "training": []}))
    root = write_phantom(tmp_path / "phantom", 2, 0, **SMALL)
    (root / "labelsTr/corrected.nii.gz").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    for name, says in (
        ("other", "--root .* holds dataset.json, which is not a phantom's: name another folder"),
        ("phantom", "holds labelsTr/corrected.nii.gz"),
        ("link", "not a plain folder"),
        ("file/below", "--root .* cannot be written"),
    ):
        with pytest.raises(UserError, match=says):
            write_phantom(tmp_path / name, 2, 0, seed=1, **SMALL)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "arguments, flag",
    [
        ({"num_training": 1}, "--num_training is 1"),
        ({"seed": -1}, "--seed is -1"),
        ({"shape": (30000, 30000, 30000)}, "--shape is 30000 30000 30000"),
        ({"spacing": (2, float("nan"), 2)}, "--spacing is 2 nan 2"),
    ],
)
def test_bad_arguments_name_the_flag_and_write_nothing(tmp_path, arguments, flag):
    with pytest.raises(UserError, match=flag):
        write_phantom(tmp_path / "phantom", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_process_writes_the_same_voxels_as_a_longer_call(phantom, tmp_path):
    done = run("-m dints.data.phantom --num_test 0 --num_training 2 --root", tmp_path / "few")
    assert done.returncode == 0, done.stderr
    written = {path.relative_to(tmp_path / "few") for path in tmp_path.rglob("*.nii.gz")}
    assert len(written) == 4
    for name in written:
        few, many = (nib.load(folder / name) for folder in (tmp_path / "few", phantom))
        assert np.array_equal(voxels(few), voxels(many))
    keys = (0, 1, "Tr"), (1, 1, "Tr"), (0, 2, "Tr"), (0, 1, "Ts")
    assert len({voxels(make_case(*key, **SMALL)[0]).tobytes() for key in keys}) == 4
