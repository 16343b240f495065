"""The built-in dataset: layout, variety, determinism, difficulty, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dints.errors import UserError
from dints.phantom import LESION, LIVER, make_case, write_phantom
from dints.tasks import TASKS, read_json, task_of_dataset

TASK = TASKS["Task00_Phantom"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("data") / "Task00_Phantom")


@pytest.fixture(scope="module")
def cases(root) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    """(image, label) of the training cases, in file order."""
    description = read_json(root / "dataset.json")
    return [(nib.load(root / case["image"]), nib.load(root / case["label"])) for case in description["training"]]


def voxels(image: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(image.dataobj)


def volume(label: nib.Nifti1Image, value: int = 0) -> float:
    """mL of one label value, or of everything labelled."""
    mask = voxels(label) == value if value else voxels(label) > 0
    return mask.sum() * np.prod(label.header.get_zooms()) / 1000


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_layout_is_the_decathlons(root):
    description = read_json(root / "dataset.json")
    assert description["modality"] == {"0": "CT"} and description["tensorImageSize"] == "3D"
    assert (description["numTraining"], description["numTest"]) == (16, 4)
    assert len(description["training"]) == 16 and len(description["test"]) == 4
    named = [path for case in description["training"] for path in case.values()] + description["test"]
    found = {path.relative_to(root) for path in root.rglob("*.nii.gz")}
    assert {Path(path) for path in named} == found and len(found) == 36
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 10e6
    assert task_of_dataset(description, root / "dataset.json", "Task00_Phantom") == TASK


def test_images_and_labels_fit_and_vary(cases):
    for image, label in cases:
        assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
        assert image.shape == label.shape and len(image.shape) == 3
        assert np.array_equal(image.affine, label.affine)
        assert min(image.shape) >= 48 and max(image.shape) <= 72
        assert all(1.5 <= size <= 2.6 for size in image.header.get_zooms())
        assert set(np.unique(voxels(label))) <= set(range(TASK.num_classes))
        assert voxels(image).min() >= -1024 and voxels(image).max() > 300  # air and bone
    assert len({image.shape for image, _ in cases}) > 8
    assert len({image.header.get_zooms() for image, _ in cases}) > 8
    assert any(max(image.header.get_zooms()) > 1.1 * min(image.header.get_zooms()) for image, _ in cases)
    orientations = ["".join(nib.aff2axcodes(image.affine)) for image, _ in cases]
    assert set(orientations) == {"RAS", "LPS", "LAS"} and orientations.count("RAS") > 8


def test_liver_is_always_there_and_the_lesion_is_not(cases):
    lesion_free = [number for number, (_, label) in enumerate(cases) if not (voxels(label) == LESION).any()]
    assert lesion_free == [0, 8]
    assert all(25 < volume(label, LIVER) < 100 for _, label in cases)
    assert any(ndimage.label(voxels(label) == LESION)[1] > 1 for _, label in cases)


def test_liver_is_on_the_patients_right_in_every_orientation(cases):
    for image, label in cases:
        liver = nib.affines.apply_affine(label.affine, np.argwhere(voxels(label) == LIVER)).mean(axis=0)
        body = nib.affines.apply_affine(image.affine, np.argwhere(voxels(image) > -200)).mean(axis=0)
        assert liver[0] > body[0] + 5


@pytest.mark.parametrize("value, limit", [(LIVER, 0.6), (LESION, 0.4)])
def test_no_threshold_solves_the_task(cases, value, limit):
    """The best of all HU intervals, with and without smoothing, over the cases that have the class."""
    images = [(voxels(image).astype(np.float32), voxels(label) == value) for image, label in cases[1:13:2]]
    smoothed = [(ndimage.gaussian_filter(image, 1), reference) for image, reference in images]
    best = 0.0
    for pairs in (images, smoothed):
        for low in range(-20, 81, 10):
            for high in range(low + 10, 131, 10):
                masks = [((image >= low) & (image < high), reference) for image, reference in pairs]
                dice = [2 * (mask & ref).sum() / (mask.sum() + ref.sum()) for mask, ref in masks]
                best = max(best, float(np.mean(dice)))
    assert 0 < best < limit


def test_lesions_are_darker_than_the_liver_around_them(cases):
    """Without a contrast the task would be impossible; lesion and liver differ by less than two deviations of noise."""
    for image, label in cases[1:8]:
        liver, lesion = (voxels(image)[voxels(label) == value] for value in (LIVER, LESION))
        assert 8 < liver.mean() - lesion.mean() < 2 * liver.std() + 15


def test_a_case_does_not_depend_on_how_many_are_written(root, tmp_path):
    few = write_phantom(tmp_path / "few", num_training=3, num_test=1)
    for name in ("imagesTr/phantom_002.nii.gz", "labelsTr/phantom_002.nii.gz", "imagesTs/phantom_test_000.nii.gz"):
        assert np.array_equal(voxels(nib.load(few / name)), voxels(nib.load(root / name)))


def test_seed_case_and_split_give_different_voxels():
    first = voxels(make_case(0, 1)[0])
    for seed, case, split in ((1, 1, "Tr"), (0, 2, "Tr"), (0, 1, "Ts")):
        assert not np.array_equal(first, voxels(make_case(seed, case, split)[0]))


def test_organ_size_in_mm_does_not_depend_on_the_voxels():
    coarse, fine = (make_case(0, 2, spacing=spacing)[1] for spacing in ((3, 3, 3), (1.5, 1.5, 2)))
    assert coarse.shape != fine.shape
    assert volume(coarse) == pytest.approx(volume(fine), rel=0.05)


def test_given_shape_and_spacing_hold_and_the_anatomy_fills_them():
    image, label = make_case(0, 2, shape=(60, 64, 40), spacing=(5, 4, 6))
    assert sorted(image.shape) == [40, 60, 64] and sorted(image.header.get_zooms()) == [4, 5, 6]
    assert volume(label) > 500  # an adult's, where 118 mm across hold 70 mL
    assert make_case(0, 2, shape=(48, 50, 52))[0].shape == (48, 50, 52)


def test_second_call_does_nothing_and_other_parameters_replace(tmp_path):
    root = write_phantom(tmp_path / "phantom", num_training=2, num_test=1)
    before = snapshot(root)
    write_phantom(root, num_training=2, num_test=1)
    assert snapshot(root) == before

    (root / "labelsTr" / "phantom_001.nii.gz").unlink()
    write_phantom(root, num_training=2, num_test=1)
    assert snapshot(root).keys() == before.keys()

    write_phantom(root, num_training=3, num_test=0, seed=5)
    assert read_json(root / "dataset.json")["phantom"]["seed"] == 5
    assert len(list(root.rglob("*.nii.gz"))) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["phantom"]  # no temporary folder is left


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def save(image, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", save)
    with pytest.raises(UserError, match="No space left"):
        write_phantom(tmp_path / "phantom", num_training=2, num_test=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "file, content",
    [
        ("notes.txt", "mine"),
        ("dataset.json", json.dumps({"name": "Spleen", "training": []})),
        ("imagesTr/spleen_1.nii.gz", "voxels"),
    ],
)
def test_foreign_folders_are_left_alone(tmp_path, file, content):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=r"--root .* not a phantom .* --root"):
        write_phantom(tmp_path, num_training=2, num_test=0)
    assert (tmp_path / file).read_text() == content


def test_a_foreign_file_among_the_phantoms_is_kept(tmp_path):
    root = write_phantom(tmp_path / "phantom", num_training=2, num_test=0)
    (root / "labelsTr" / "corrected.nii.gz").write_text("mine")
    with pytest.raises(UserError, match="corrected.nii.gz"):
        write_phantom(root, num_training=2, num_test=0, seed=1)
    assert (root / "labelsTr" / "corrected.nii.gz").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "phantom").write_text("mine")
    with pytest.raises(UserError, match="not a plain folder"):
        write_phantom(tmp_path / "phantom")
    with pytest.raises(UserError, match="--root .* cannot be written"):
        write_phantom(tmp_path / "phantom" / "below")


@pytest.mark.parametrize(
    "arguments, flag",
    [
        ({"num_training": 1}, "--num_training is 1"),
        ({"num_test": -1}, "--num_test is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"shape": (48, 0, 48)}, "--shape is 48 0 48"),
        ({"shape": (48, 48, -48)}, "--shape is 48 48 -48"),
        ({"shape": (30000, 30000, 30000)}, "--shape is 30000 30000 30000"),
        ({"shape": (48, 48)}, "--shape is 48 48"),
        ({"spacing": (2, 2, 0)}, "--spacing is 2 2 0"),
        ({"spacing": (2, -2, 2)}, "--spacing is 2 -2 2"),
        ({"spacing": (2, float("nan"), 2)}, "--spacing is 2 nan 2"),
    ],
)
def test_bad_arguments_name_the_flag_and_write_nothing(tmp_path, arguments, flag):
    with pytest.raises(UserError, match=flag):
        write_phantom(tmp_path / "phantom", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "dints.phantom", "--root", tmp_path / "phantom", "--num_test", "0"]
    options = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True}

    good = subprocess.run([*command, "--num_training", "2", "--shape", "20", "24", "28"], **options)
    assert good.returncode == 0, good.stderr
    assert {nib.load(path).shape for path in (tmp_path / "phantom").rglob("*.nii.gz")} == {(20, 24, 28)}

    bad = subprocess.run([*command, "--num_training", "1"], **options)
    assert bad.returncode != 0
    assert bad.stderr == "error: --num_training is 1: it must be at least 2\n"
