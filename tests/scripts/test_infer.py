"""infer_dints.py gives segmentations on the grid of their image, and scores; and what it
refuses.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from architectures import chain, connected
from commands import infer
from threshold import Threshold, knows
from torch import nn

import infer_dints
from dints.data import nifti
from dints.data.tasks import Task
from dints.errors import PartlyDone, UserError
from dints.network.discrete import DiscreteNetwork
from dints.network.model_file import save_model

TASK = Task(
    "Toy",
    "CT",
    1,
    ("background", "organ"),
    spacing=(2.0, 2.0, 2.0),
    intensity=(0.0, 200.0),
    patch_size=(24,) * 3,
)


def rotated(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, cos, -sin], [0, sin, cos]]
    )


def centred(axes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the affine with these axes whose origin is the middle of the volume."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = -axes @ (np.array(shape) - 1) / 2
    return affine


# Axes of the voxel grids in mm, and shapes that cover some 50 mm.
GRIDS = {
    "RAS": (np.diag([2.0, 2, 2]), (26, 24, 25)),
    "LPS": (np.diag([-1.5, -1.5, 2.5]), (34, 35, 20)),
    "left-handed LAS": (np.diag([-2.0, 2, 1.6]), (25, 26, 32)),
    "permuted PIR": (np.array([[0, 0, 2.4], [-1.8, 0, 0], [0, -1.4, 0]]), (28, 36, 21)),
    "oblique": (rotated(17) @ np.diag([-1.6, 1.8, 2.2]), (32, 29, 24)),
}


def body(grid: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, label and affine of one anatomy without any symmetry, sampled on a grid; HU fall off
    at its surface.
    """
    axes, shape = GRIDS[grid]
    affine = centred(axes, shape)
    x, y, z = np.moveaxis(
        nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0
    )
    ball = 13 - np.sqrt((x - 6) ** 2 + (y + 4) ** 2 + (z - 3) ** 2)
    arm = 5 - np.sqrt(
        (y - 4) ** 2 + (z + 6) ** 2 + np.clip(-16 - x, 0, None) ** 2 + np.clip(x, 0, None) ** 2
    )
    depth = np.maximum(ball, arm)  # mm below the surface
    return (
        np.clip(100 + 15 * depth, 0, 200).astype(np.float32),
        (depth > 0).astype(np.uint8),
        affine,
    )


def save(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


@pytest.fixture
def knowing(monkeypatch):
    """Let the script load a network of the test's choice."""
    return knows(monkeypatch, TASK)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Write a model file of one block and two depths, both straight on, with random weights."""
    straight = np.array([[1, 0, 0, 1]])
    found = connected(straight, straight)
    torch.manual_seed(0)
    task = replace(
        TASK, num_channels=2, class_names=("background", "a", "b"), patch_size=(16, 16, 16)
    )
    path = tmp_path_factory.mktemp("model") / "best_metric_model.pth"
    save_model(path, DiscreteNetwork(found, 2, 3, 0.125), found, 0.125, task)
    return path


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def dice(first: np.ndarray, second: np.ndarray, value: int = 1) -> float:
    first, second = first == value, second == value
    return 2 * (first & second).sum() / (first.sum() + second.sum())


BESIDE = {".lock", ".cases", "run.json"}  # segmentations

# Segmentations


@pytest.mark.parametrize(
    ("grid", "spacing"), [*((grid, (1.5, 3.0, 2.5)) for grid in GRIDS), ("oblique", None)], ids=str
)
def test_segmentation_lies_where_the_anatomy_is(tmp_path, knowing, grid, spacing):
    image, label, affine = body(grid)
    source = save(tmp_path / "images/body.nii.gz", image, affine)
    knowing(Threshold(), replace(TASK, spacing=spacing))
    infer(tmp_path / "out", "--input", source)
    result = nib.load(tmp_path / "out/body.nii.gz")
    assert result.shape == label.shape and result.get_data_dtype() == np.uint8
    assert np.allclose(result.affine, affine, atol=1e-5)
    assert dice(np.asarray(result.dataobj), label) > (0.95 if spacing else 0.9999)


class Bands(nn.Module):
    """Gives each third of the window's values its own row of class scores."""

    def __init__(self, scores: list[list[float]]):
        super().__init__()
        self.scores = torch.tensor(scores, dtype=torch.float32)

    def forward(self, image):
        return self.scores[(image[:, 0] * 3).long().clamp(0, 2)].movedim(-1, 1)


def bands(path: Path, width: int, spacing: float) -> Path:
    image = np.repeat(np.array([20, 100, 190], np.float32), width)[:, None, None] * np.ones(
        (1, 10, 12), np.float32
    )
    return save(path, image, np.diag([-spacing, 2, 2, 1]))


def test_the_most_probable_of_many_classes_is_taken(tmp_path, knowing):
    """Whatever the order of the classes' probabilities, and though they are resampled one after
    another.
    """
    source = bands(tmp_path / "a.nii.gz", 8, 1.0)
    knowing(Bands([[2, 1, 0], [1, 3, 2], [2, 1, 3]]), replace(TASK, class_names=("b", "x", "y")))
    result = voxels(infer(tmp_path / "out", "--input", source) / "a.nii.gz")
    assert [np.unique(part).tolist() for part in (result[:7], result[9:15], result[17:])] == [
        [0],
        [1],
        [2],
    ]


@pytest.mark.parametrize("name", ["body.nii", "body.nii.gz"])
def test_header_and_format_are_the_images(tmp_path, knowing, name):
    image, _, affine = body("oblique")
    source = nib.Nifti1Image(image, affine)
    source.set_sform(affine, code="talairach")
    source.set_qform(affine, code="scanner")
    source.header.set_xyzt_units("mm")
    source.header["cal_max"] = 1000  # a display range of labels would hide them
    nib.save(source, tmp_path / name)
    knowing(Threshold())
    path = infer(tmp_path / "out", "--input", tmp_path / name) / name
    header = nib.load(path).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (3, 1)
    assert header.get_xyzt_units()[0] == "mm" and header["cal_max"] == 0
    assert np.allclose(header.get_qform(), affine, atol=1e-4) and np.allclose(
        header.get_sform(), affine
    )
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    if name.endswith(".gz"):
        # no time of day, so that equal segmentations are equal files
        assert path.read_bytes()[4:8] == bytes(4)


def test_a_model_file_segments_four_dimensional_images(tmp_path, model):
    rng = np.random.default_rng(0)
    axes, shape = GRIDS["LPS"]
    source = save(
        tmp_path / "a.nii.gz",
        rng.normal(100, 50, (*shape, 2)).astype(np.float32),
        centred(axes, shape),
    )
    out = infer(tmp_path / "out", "--checkpoint", model, "--input", source)
    result = nib.load(out / "a.nii.gz")
    assert result.shape == shape and np.allclose(result.affine, centred(axes, shape))
    assert set(np.unique(voxels(out / "a.nii.gz"))) <= {0, 1, 2}
    assert {path.name for path in out.iterdir()} == {"a.nii.gz", *BESIDE}  # no labels, no scores


def test_maps_lie_beside_the_segmentation(tmp_path, knowing):
    """As NIfTI on the image's grid, scaled; a volume without doubt has none."""
    source = bands(tmp_path / "a.nii.gz", 16, 1.0)
    even = [[0, 0, -99], [0, 0, 0], [9, 0, -99]]
    knowing(
        Bands(even), replace(TASK, class_names=("b", "x", "y"), spacing=None, patch_size=(8, 8, 8))
    )
    out = infer(tmp_path / "out", "--input", source, "--save_probabilities", "--save_uncertainty")
    probabilities, uncertainty = (
        nib.load(out / name / "a.nii.gz") for name in ("probabilities", "uncertainty")
    )
    assert probabilities.shape == (48, 10, 12, 3) and uncertainty.shape == (48, 10, 12)
    assert np.allclose(probabilities.affine, nib.load(source).affine)
    places = [2, 24, 45]  # in the middle of a band
    assert np.allclose(
        probabilities.get_fdata()[places, 5, 5], [[0.5, 0.5, 0], [1 / 3] * 3, [1, 0, 0]], atol=0.003
    )
    assert np.allclose(
        uncertainty.get_fdata()[places, 5, 5], [np.log(2) / np.log(3), 1, 0], atol=0.003
    )
    (out / "uncertainty/a.nii.gz").unlink()
    infer(out, "--input", source, "--save_probabilities", "--save_uncertainty")
    assert (out / "uncertainty/a.nii.gz").is_file()


def test_folders_and_files_are_segmented_together(tmp_path, knowing):
    image, _, affine = body("RAS")
    for name in (
        "in/a.nii.gz",
        "in/b.nii",
        "in/deeper/E.NII.GZ",
        "other/c.nii.gz",
        "other/d.nii.gz",
    ):
        save(tmp_path / "saved.nii.gz", image, affine)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (
            save(tmp_path / "saved.nii", image, affine)
            if name.endswith(".nii")
            else tmp_path / "saved.nii.gz"
        ).rename(tmp_path / name)
    (tmp_path / "in/.hidden").mkdir()
    for name in ("in/._a.nii.gz", "in/notes.txt", "in/a.nii.gz.json", "in/.hidden/f.nii.gz"):
        (tmp_path / name).write_text("not an image")
    knowing(Threshold())
    for _ in range(2):  # the second time, what the first one wrote is no input
        out = infer(tmp_path / "in/out", "--input", tmp_path / "in", tmp_path / "other/d.nii.gz")
    assert {path.name for path in out.iterdir()} == {
        "a.nii.gz",
        "b.nii",
        "d.nii.gz",
        "E.NII.GZ",
        *BESIDE,
    }
    assert np.array_equal(voxels(out / "E.NII.GZ"), voxels(out / "a.nii.gz"))


class TestDicom:
    """A folder of a DICOM series is a volume; the segmentation is NIfTI on its grid."""

    @pytest.fixture
    def scans(self, tmp_path) -> Path:
        write_series = pytest.importorskip("slices").write_series
        image, _, _ = body("left-handed LAS")
        for name in ("first/CT", "second/CT"):
            write_series(
                tmp_path / "scans" / name, centred(*GRIDS["left-handed LAS"]), image.round()
            )
        return tmp_path / "scans"

    def test_it_is_segmented_as_the_same_nifti_file(self, tmp_path, knowing, scans):
        image, _, affine = body("left-handed LAS")
        save(scans / "third.nii.gz", image.round(), affine)
        knowing(Threshold())
        out = infer(tmp_path / "out", "--input", scans)
        names = ["first_CT.nii.gz", "second_CT.nii.gz", "third.nii.gz"]
        assert sorted(path.name for path in out.glob("*.nii.gz")) == names and not list(
            out.glob(".dicom/*")
        )
        # DICOM counts slices along the planes' normal, here downwards: both are turned to RAS.
        expected, found = (
            nib.as_closest_canonical(nib.load(out / names[number])) for number in (2, 0)
        )
        assert np.allclose(found.affine, expected.affine, atol=1e-4)
        assert (np.asarray(found.dataobj) != np.asarray(expected.dataobj)).mean() < 1e-3

    def test_a_bad_series_does_not_end_the_batch(self, tmp_path, knowing, scans):
        (scans / "second/CT/13.dcm").unlink()  # neither the first nor the last one
        knowing(Threshold())
        with pytest.raises(
            PartlyDone, match="1 of 2 cases .*second_CT.nii.gz: .*second/CT has slices"
        ):
            infer(tmp_path / "out", "--input", scans)
        assert (tmp_path / "out/first_CT.nii.gz").is_file() and not list(
            (tmp_path / "out").glob(".dicom/*")
        )

    def test_what_a_killed_batch_converted_is_removed(self, tmp_path, knowing):
        image, _, affine = body("RAS")
        left = save(tmp_path / "out/.dicom/patient.nii.gz", image, affine)
        knowing(Threshold())
        infer(tmp_path / "out", "--input", save(tmp_path / "a.nii.gz", image, affine))
        assert not left.exists()


# Scores


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Six cases on different grids, three a fold; the third has no foreground."""
    root = tmp_path_factory.mktemp("data") / "Toy"
    entries = []
    for number, grid in enumerate(["LPS", "oblique", "RAS", "RAS", "RAS", "RAS"]):
        image, label, affine = body(grid)
        save(root / f"imagesTr/case_{number}.nii.gz", image, affine)
        save(root / f"labelsTr/case_{number}.nii.gz", 0 * label if number == 2 else label, affine)
        entries.append(
            {"image": f"imagesTr/case_{number}.nii.gz", "label": f"labelsTr/case_{number}.nii.gz"}
        )
    (root / "dataset.json").write_text(json.dumps({"training": entries}))
    return root


def read_scores(folder: Path) -> list[list[str]]:
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.reader(file))


def test_scores_are_the_dice_of_the_written_files(tmp_path, knowing, dataset, capsys):
    knowing(
        Threshold(0.55, num_classes=3),
        replace(TASK, class_names=("background", "organ", "never found")),
    )
    out = infer(tmp_path / "out", "--root", dataset, "--num_folds", 2, "--fold", 0)
    header, *rows = read_scores(out)
    assert header == ["case", "organ", "never found"]
    assert [row[0] for row in rows] == ["case_0.nii.gz", "case_1.nii.gz", "case_2.nii.gz"]
    expected = [
        dice(voxels(out / row[0]), voxels(dataset / "labelsTr" / row[0])) for row in rows[:2]
    ]
    assert [float(row[1]) for row in rows[:2]] == pytest.approx(expected, abs=1e-6)
    assert all(0.8 < value < 0.97 for value in expected)
    assert rows[2][1] == "" and [row[2] for row in rows] == ["", "", ""]  # nobody has the class
    mean = sum(expected) / 2
    assert (
        f"Dice {mean:.4f} (organ {mean:.4f} (false positive cases: 1), never found absent)"
        in capsys.readouterr().out
    )


class TestItsOwnCases:
    """A model knows its cases: what it was trained on is not scored as if it were new."""

    TRAINED, VALIDATED = ["case_0", "case_1", "case_5"], ["case_2", "case_4"]

    @pytest.fixture
    def of_fold(self, knowing):
        """Let the script load a model of some of the dataset's cases."""
        knowing(Threshold(), training_cases=self.TRAINED, validation_cases=self.VALIDATED)

    def names(self, out: Path) -> list[str]:
        return [row[0].removesuffix(".nii.gz") for row in read_scores(out)[1:]]

    def test_its_validation_cases_are_the_default(self, tmp_path, of_fold, dataset):
        assert self.names(infer(tmp_path / "out", "--root", dataset)) == self.VALIDATED

    def test_training_cases_are_refused_by_name(self, tmp_path, of_fold, dataset):
        message = refused(tmp_path / "out", "--root", dataset, "--num_folds", 2, "--fold", 0)
        assert "was trained on 2 of these " in message and "for example case_0, case_1" in message
        assert "--allow_training_cases" in message

    def test_they_are_marked_where_they_are_allowed(self, tmp_path, of_fold, dataset, capsys):
        flags = ["--root", dataset, "--num_folds", 2, "--fold", 0, "--allow_training_cases"]
        rows = read_scores(infer(tmp_path / "out", *flags))
        assert rows[0] == ["case", "organ", "trained_on"] and [row[2] for row in rows[1:]] == [
            "yes",
            "yes",
            "no",
        ]
        assert ", 2 training cases among them" in capsys.readouterr().out

    def test_a_model_that_does_not_know_them_needs_a_fold(self, tmp_path, knowing, dataset):
        knowing(Threshold())
        assert "does not say which cases it was trained on: give --fold" in refused(
            tmp_path / "out", "--root", dataset
        )

    def test_a_dataset_of_other_classes_is_refused(self, tmp_path, of_fold, dataset):
        root = shutil.copytree(dataset, tmp_path / "data")
        described = json.loads((root / "dataset.json").read_text())
        described["labels"] = {"0": "background", "1": "organ", "2": "tumour"}
        (root / "dataset.json").write_text(json.dumps(described))
        message = refused(tmp_path / "out", "--root", root)
        assert (
            "has the classes background, organ, tumour" in message
            and ("segments background, organ:") in message
        )


# Refusals


def refused(folder: Path, *arguments: object) -> str:
    with pytest.raises(UserError) as raised:
        infer(folder, *arguments)
    assert not list(folder.glob("*.nii*"))
    return str(raised.value)


def test_two_images_of_one_name_are_refused(tmp_path, knowing):
    image, _, affine = body("RAS")
    paths = [save(tmp_path / folder / "a.nii.gz", image, affine) for folder in ("one", "two")]
    knowing(Threshold())
    message = refused(tmp_path / "out", "--input", *paths)
    assert "2 images are called a.nii.gz" in message and "--output_root" in message


def test_inputs_are_not_overwritten(tmp_path, knowing, dataset):
    root = shutil.copytree(dataset, tmp_path / "data")
    knowing(Threshold())
    for folder, arguments in (
        ("imagesTr", ["--input", root / "imagesTr/case_0.nii.gz"]),
        # where labels have the images' names, as in MSD
        ("labelsTr", ["--root", root, "--num_folds", 2, "--fold", 0]),
    ):
        before = {path: path.read_bytes() for path in root.rglob("*.nii.gz")}
        with pytest.raises(UserError) as raised:
            infer(root / folder, *arguments)
        assert str(root / folder / "case_0.nii.gz") in str(raised.value) and "--output_root" in str(
            raised.value
        )
        assert {path: path.read_bytes() for path in root.rglob("*.nii.gz")} == before


def test_input_without_images_is_refused(tmp_path, knowing):
    (tmp_path / "empty").mkdir()
    knowing(Threshold())
    for name, says in (("missing.nii.gz", "does not exist"), ("empty", "is no NIfTI file")):
        assert f"--input {tmp_path / name} {says}" in refused(
            tmp_path / "out", "--input", tmp_path / name
        )


CT_PET = {"num_channels": 2, "class_names": ("background", "organ")}


@pytest.mark.parametrize(
    ("files", "changes", "says"),
    [
        (["a:1"], CT_PET, "a.nii.gz has 1 channel, and the model takes 2 channels (CT, PET)"),
        (
            ["a_0000:1"],
            CT_PET | {"channel_files": True},
            "a has the files 0000, and the model takes",
        ),
        (["a:1"], {"channel_files": True}, "its name does not say of which it is: give a_0000"),
    ],
)
def test_an_image_of_other_channels_is_refused_with_those_that_the_model_takes(
    tmp_path, knowing, files, changes, says
):
    task = replace(TASK, **changes)
    knowing(Threshold(), task, data={"channels": ["CT", "PET"][: task.num_channels]})
    paths = []
    for name, count in (file.split(":") for file in files):
        shape = (9, 9, 9) if count == "1" else (9, 9, 9, int(count))
        paths.append(save(tmp_path / f"{name}.nii.gz", np.ones(shape, np.float32), np.eye(4)))
    message = refused(tmp_path / "out", "--input", *paths)
    assert says in message and str(tmp_path / "a") in message


def test_a_dataset_is_no_folder_of_images(tmp_path, knowing, dataset):
    """Its labels would be segmented too."""
    knowing(Threshold())
    message = refused(tmp_path / "out", "--input", dataset)
    assert (
        f"give --root {dataset} to score its cases" in message
        and f"--input {dataset}/imagesTr" in message
    )


class TestBatches:
    """A bad case does not end a batch, and what is done is not done again."""

    @pytest.fixture
    def images(self, tmp_path, knowing) -> Path:
        """Write three images, and count how often one is segmented."""
        image, _, affine = body("RAS")
        for name in "abc":
            save(tmp_path / f"in/{name}.nii.gz", image, affine)
        self.knowing = knowing
        knowing(Threshold())
        return tmp_path / "in"

    @pytest.fixture
    def segmented(self, monkeypatch) -> list[str]:
        names, real = [], infer_dints.Batch.decide
        monkeypatch.setattr(
            infer_dints.Batch,
            "decide",
            lambda batch, case: names.append(case.name) or real(batch, case),
        )
        return names

    def states(self, out: Path) -> dict[str, str]:
        return {
            name: case["state"]
            for name, case in json.loads((out / "run.json").read_text())["cases"].items()
        }

    def test_the_others_are_finished_and_the_bad_one_is_named(self, tmp_path, images):
        content = (images / "b.nii.gz").read_bytes()
        (images / "b.nii.gz").write_bytes(content[: len(content) // 2])
        with pytest.raises(
            PartlyDone,
            match=r"1 of 3 cases are not segmented \(.*run.json lists "
            r"them\).*b.nii.gz: ",
        ):
            infer(tmp_path / "out", "--input", images)
        assert self.states(tmp_path / "out") == {
            "a.nii.gz": "done",
            "b.nii.gz": "failed",
            "c.nii.gz": "done",
        }
        assert (
            "b.nii.gz"
            in json.loads((tmp_path / "out/run.json").read_text())["cases"]["b.nii.gz"]["reason"]
        )
        assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {
            "a.nii.gz",
            "c.nii.gz",
        }

    def test_none_that_can_be_segmented_is_an_error(self, tmp_path, images):
        for path in images.iterdir():
            path.write_bytes(b"nothing")
        assert refused(tmp_path / "out", "--input", images).startswith(
            "none of the 3 cases can be segmented, for exam"
        )

    def test_what_is_done_is_kept(self, tmp_path, images, segmented):
        infer(tmp_path / "out", "--input", images)
        first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.nii.gz")}
        infer(tmp_path / "out", "--input", images, "--checkpoint", "moved/model.pth")
        assert segmented == ["a", "b", "c"] and self.states(tmp_path / "out") == dict.fromkeys(
            first, "done"
        )
        assert {
            path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.nii.gz")
        } == first

    def test_a_measured_precision_is_kept(self, tmp_path, images, segmented, monkeypatch):
        """On a busy machine another one may be the faster one, and all would be done again."""
        for faster in ("bf16", "fp32"):
            monkeypatch.setattr("dints.running.precision._faster_on_cpu", lambda name=faster: name)
            infer(tmp_path / "out", "--input", images, "--precision auto")
        assert segmented == ["a", "b", "c"]
        assert (
            json.loads((tmp_path / "out/run.json").read_text())["settings"]["precision"] == "bf16"
        )
        self.knowing(Threshold(), digest="of another file")
        infer(tmp_path / "out", "--input", images, "--precision auto")
        assert (
            json.loads((tmp_path / "out/run.json").read_text())["settings"]["precision"] == "fp32"
        )

    @pytest.mark.parametrize(
        ("change", "again"),
        [("image", ["b"]), ("mask", ["b"]), ("note", ["b"]), ("model", ["a", "b", "c"])],
    )
    def test_what_has_changed_is_done_again(self, tmp_path, images, segmented, change, again):
        out = infer(tmp_path / "out", "--input", images)
        first = voxels(out / "b.nii.gz")
        if change == "image":
            image, _, affine = body("RAS")
            save(images / "b.nii.gz", image[::-1].copy(), affine)
        elif change == "mask":
            save(out / "b.nii.gz", 0 * first, np.eye(4))
        elif change == "note":
            (out / ".cases/b.nii.gz.json").write_text('{"state": "done", "key":')
        else:
            self.knowing(Threshold(), digest="of another file")
        segmented.clear()
        infer(out, "--input", images)
        assert segmented == again
        assert np.array_equal(voxels(out / "b.nii.gz"), first[::-1] if change == "image" else first)

    def test_a_bad_label_is_named_before_its_image_is_segmented(
        self, tmp_path, knowing, dataset, segmented
    ):
        root = shutil.copytree(dataset, tmp_path / "data")
        label = root / "labelsTr/case_0.nii.gz"
        save(label, voxels(label) * 9, nib.load(label).affine)
        knowing(Threshold())
        with pytest.raises(PartlyDone, match=f"{label} holds the label 9"):
            infer(tmp_path / "out", "--root", root, "--num_folds", 2, "--fold", 0)
        assert segmented == ["case_1", "case_2"]
        assert [row[1] != "" for row in read_scores(tmp_path / "out")[1:]] == [False, True, False]


class TestAnotherRunInTheFolder:
    """Nothing of an earlier run lies beside new segmentations that could be taken for the new
    run's.
    """

    FIRST = ("--save_probabilities", "--save_uncertainty")

    @pytest.fixture
    def root(self, tmp_path, dataset) -> Path:
        root = shutil.copytree(dataset, tmp_path / "data")
        (root / "labelsTs").mkdir()
        return root

    def files(self, out: Path) -> dict[str, object]:
        """Return what people see of a folder, but for times."""
        found = {
            str(path.relative_to(out)): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file()
        }
        run = json.loads(found.pop("run.json"))
        states = {name: case["state"] for name, case in run["cases"].items()}
        return {"run": [run["settings"], states]} | {
            name: found[name] for name in found if name[0] != "."
        }

    def score(self, out: Path, root: Path, *flags: object) -> Path:
        return infer(out, "--root", root, "--num_folds", 2, "--fold", 0, *flags)

    @pytest.fixture
    def both(self, knowing):
        """Return a function that lets the script load another model than before."""
        knowing(Threshold(), digest="first")
        return lambda: knowing(Threshold(0.6), digest="second")

    def test_its_maps_scores_and_report_are_gone(self, tmp_path, both, root):
        out = self.score(tmp_path / "out", root, *self.FIRST)
        (out / "report.html").write_text("of the first model")
        both()
        images = [root / f"imagesTr/case_{number}.nii.gz" for number in range(3)]
        for folder in (out, tmp_path / "fresh"):
            infer(folder, "--input", *images)
        assert self.files(out) == self.files(tmp_path / "fresh")

    @pytest.mark.fault("kill -9 in a batch, then other flags")
    def test_a_kill_leaves_nothing_to_a_run_with_other_flags(
        self, tmp_path, both, root, monkeypatch
    ):
        """The first batch of one model is whole; one of another is killed at a file; a third has
        its own flags.
        """
        self.score(tmp_path / "out", root, "--save_uncertainty")
        both()
        real, count = nifti.save_map, []

        def save_map(*given, **more):
            count.append(1)
            if len(count) > 1:
                raise KeyboardInterrupt  # which nothing in a batch catches
            real(*given, **more)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(nifti, "save_map", save_map)
            self.score(tmp_path / "out", root, *self.FIRST)
        (tmp_path / "out/.case_1.nii.gz.123.partial").write_bytes(b"half")
        assert not list((tmp_path / "out").glob("scores.csv"))
        for folder in ("out", "fresh"):
            self.score(tmp_path / folder, root, "--overlap_ratio", 0.1)
        assert self.files(tmp_path / "out") == self.files(tmp_path / "fresh")
        assert not list((tmp_path / "out").rglob(".*.partial"))

    def test_segmentations_that_it_does_not_replace_are_told(self, tmp_path, both, root, caplog):
        out = self.score(tmp_path / "out", root)
        said = (
            "out has 2 segmentations by other models or settings, which this run does not replace, "
            "for example case_1"
        )
        self.score(out, root)
        infer(out, "--input", root / "imagesTr/case_3.nii.gz")
        assert "by other models" not in caplog.text
        both()
        infer(out, "--input", root / "imagesTr/case_0.nii.gz", root / "imagesTr/case_3.nii.gz")
        assert said in caplog.text


class TestNames:
    """A name may be as long as its file's, and of any bytes."""

    @pytest.fixture(autouse=True)
    def silence(self, caplog):
        """Log nothing: pytest-xdist sends a test's log as UTF-8, which these names are not."""
        caplog.set_level(logging.CRITICAL + 1)

    def image(self, folder: Path, name: str | bytes) -> None:
        voxels, _, affine = body("RAS")
        folder.mkdir(exist_ok=True)
        saved = save(folder.parent / "saved.nii.gz", voxels, affine)
        os.rename(saved, os.path.join(os.fsencode(folder), os.fsencode(name)))

    def test_a_case_of_such_a_name_is_as_any_other(self, tmp_path, knowing):
        name = os.fsdecode(b"caf\xe9" + b"n" * 242)
        try:
            for case in (name, "a", "b"):
                self.image(tmp_path / "in", f"{case}.nii.gz")
        except OSError as error:
            pytest.skip(f"this file system holds no such name: {error}")
        entries = [{"image": f"{case}.nii.gz"} for case in (name, "a", "b")]
        (tmp_path / "in/dataset.json").write_text(json.dumps({"test": entries}))
        knowing(Threshold())
        flags = ["--save_probabilities", "--save_uncertainty", "--report"]
        knowing(Threshold(), architecture=chain(0, 1, 0, num_depths=2), channel_mul=0.125)
        for _ in range(2):  # once with each, and once with notes
            out = infer(tmp_path / "out", "--input", tmp_path / "in", *flags)
        assert (out / f"{name}.nii.gz").is_file() and (
            out / f"probabilities/{name}.nii.gz"
        ).is_file()
        states = {
            case: told["state"]
            for case, told in json.loads((out / "run.json").read_text())["cases"].items()
        }
        assert states == dict.fromkeys([f"{case}.nii.gz" for case in (name, "a", "b")], "done")
        assert "caf\\udce9" in (out / "report.html").read_text()


def test_images_of_a_test_list_are_segmented_and_not_scored(tmp_path, knowing, dataset):
    root = shutil.copytree(dataset, tmp_path / "data")
    described = json.loads((root / "dataset.json").read_text())
    described["test"] = ["./imagesTr/case_3.nii.gz", {"image": "./imagesTr/case_4.nii.gz"}]
    (root / "dataset.json").write_text(json.dumps(described))
    knowing(Threshold())
    out = infer(tmp_path / "out", "--root", root, "--json_key", "test")
    assert {path.name for path in out.iterdir()} == {"case_3.nii.gz", "case_4.nii.gz", *BESIDE}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--input"),
        (["--input", "a.nii.gz", "--root", "data"], "--root"),
        (["--root", "data", "--fold", "5"], "--num_folds 5"),
    ],
)
def test_command_line_is_checked(arguments, expected, capsys):
    with pytest.raises(SystemExit) as raised:
        infer_dints.parse_args(["--checkpoint", "model.pth", *arguments])
    assert raised.value.code == 2 and expected in capsys.readouterr().err
