"""infer_dints.py gives segmentations on the grid of their image, and scores; and its refusals."""

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
from scipy.spatial.transform import Rotation
from threshold import Threshold, knows, note_cases
from torch import nn
from volumes import save, voxels_of

import infer_dints
from dints.data import nifti
from dints.data.tasks import Task
from dints.errors import PartlyDone, UserError
from dints.network.discrete import DiscreteNetwork
from dints.network.model_file import save_model

TASK = Task("Toy", "CT", 1, ("background", "organ"), (2.0, 2.0, 2.0), (0.0, 200.0), (24,) * 3)
THREE = {"class_names": ("background", "x", "y")}
OBLIQUE = Rotation.from_euler("xz", (17, 17), degrees=True).as_matrix() @ np.diag([-1.6, 1.8, 2.2])
# Axes of the voxel grids in mm, and shapes that cover some 50 mm.
GRIDS = {
    "RAS": (np.diag([2.0, 2, 2]), (26, 24, 25)),
    "left-handed LAS": (np.diag([-2.0, 2, 1.6]), (25, 26, 32)),
    "permuted PIR": (np.array([[0, 0, 2.4], [-1.8, 0, 0], [0, -1.4, 0]]), (28, 36, 21)),
    "oblique": (OBLIQUE, (32, 29, 24)),
}
BESIDE = {".lock", ".cases", "run.json"}  # segmentations


def centred(axes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the affine with these axes whose origin is the middle of the volume."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = -axes @ (np.array(shape) - 1) / 2
    return affine


def body(grid: str = "RAS") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, label and affine of one anatomy without symmetry; HU fall off at its surface."""
    axes, shape = GRIDS[grid]
    affine = centred(axes, shape)
    places = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    x, y, z = np.moveaxis(places, -1, 0)
    ball = 13 - np.sqrt((x - 6) ** 2 + (y + 4) ** 2 + (z - 3) ** 2)
    along = np.clip(-16 - x, 0, None) ** 2 + np.clip(x, 0, None) ** 2
    depth = np.maximum(ball, 5 - np.sqrt((y - 4) ** 2 + (z + 6) ** 2 + along))  # mm inside
    image = np.clip(100 + 15 * depth, 0, 200).astype(np.float32)
    return image, (depth > 0).astype(np.uint8), affine


def save_body(path: Path) -> Path:
    image, _, affine = body()
    return save(path, image, affine)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first == 1, second == 1
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def run_of(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def states(out: Path) -> dict[str, str]:
    return {name: case["state"] for name, case in run_of(out)["cases"].items()}


def names_in(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.nii.gz")}


def refused(folder: Path, *arguments: object) -> str:
    with pytest.raises(UserError) as raised:
        infer(folder, *arguments)
    assert not list(folder.glob("*.nii*"))
    return str(raised.value)


@pytest.fixture
def knowing(monkeypatch):
    """Let the script load a network of the test's choice; it knows one that thresholds."""
    use = knows(monkeypatch, TASK)
    use(Threshold())
    return use


@pytest.fixture
def segmented(monkeypatch) -> list[str]:
    return note_cases(monkeypatch)


class TestSegmentations:
    @pytest.mark.parametrize(
        ("grid", "spacing"),
        [("permuted PIR", (1.5, 3.0, 2.5)), ("oblique", (1.5, 3.0, 2.5)), ("oblique", None)],
        ids=str,
    )
    def test_they_lie_where_the_anatomy_is(self, tmp_path, knowing, grid, spacing):
        image, label, affine = body(grid)
        source = save(tmp_path / "images/body.nii.gz", image, affine)
        knowing(Threshold(), replace(TASK, spacing=spacing))
        infer(tmp_path / "out", "--input", source)
        result = nib.load(tmp_path / "out/body.nii.gz")
        assert result.shape == label.shape and result.get_data_dtype() == np.uint8
        assert np.allclose(result.affine, affine, atol=1e-5)
        assert dice(np.asarray(result.dataobj), label) > (0.95 if spacing else 0.9999)

    @pytest.mark.parametrize("name", ["body.nii", "body.nii.gz"])
    def test_header_and_format_are_the_images(self, tmp_path, knowing, name):
        image, _, affine = body("oblique")
        source = nib.Nifti1Image(image, affine)
        source.set_sform(affine, code="talairach")
        source.set_qform(affine, code="scanner")
        source.header.set_xyzt_units("mm")
        source.header["cal_max"] = 1000  # a display range of labels would hide them
        nib.save(source, tmp_path / name)
        path = infer(tmp_path / "out", "--input", tmp_path / name) / name
        header, content = nib.load(path).header, path.read_bytes()
        assert (int(header["sform_code"]), int(header["qform_code"])) == (3, 1)
        assert header.get_xyzt_units()[0] == "mm" and header["cal_max"] == 0
        assert np.allclose(header.get_qform(), affine, atol=1e-4)
        assert (content[:2] == b"\x1f\x8b") == name.endswith(".gz")
        # no time of day, so that equal segmentations are equal files
        assert not name.endswith(".gz") or content[4:8] == bytes(4)

    def test_a_model_file_segments_four_dimensional_images(self, tmp_path):
        straight = connected(np.array([[1, 0, 0, 1]]), np.array([[1, 0, 0, 1]]))
        torch.manual_seed(0)
        task = replace(TASK, num_channels=2, patch_size=(16,) * 3, **THREE)
        network = DiscreteNetwork(straight, 2, 3, 0.125)
        save_model(tmp_path / "m.pth", network, straight, 0.125, task)
        axes, shape = GRIDS["permuted PIR"]
        image = np.random.default_rng(0).normal(100, 50, (*shape, 2)).astype(np.float32)
        source = save(tmp_path / "a.nii.gz", image, centred(axes, shape))
        out = infer(tmp_path / "out", "--checkpoint", tmp_path / "m.pth", "--input", source)
        assert voxels_of(out / "a.nii.gz").shape == shape
        assert names_in(out) == {"a.nii.gz", *BESIDE}  # no labels, no scores

    def test_folders_and_files_are_segmented_together(self, tmp_path, knowing):
        for name in ("in/a.nii.gz", "in/b.nii", "in/deeper/E.NII.GZ", "other/c.nii.gz", "d.nii.gz"):
            saved = save_body(tmp_path / f"saved{'.nii' if name.endswith('.nii') else '.nii.gz'}")
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            saved.rename(tmp_path / name)
        (tmp_path / "in/.hidden").mkdir()
        for name in ("in/._a.nii.gz", "in/notes.txt", "in/.hidden/f.nii.gz"):
            (tmp_path / name).write_text("not an image")
        for _ in range(2):  # the second time, what the first one wrote is no input
            out = infer(tmp_path / "in/out", "--input", tmp_path / "in", tmp_path / "d.nii.gz")
        assert names_in(out) == {"a.nii.gz", "b.nii", "d.nii.gz", "E.NII.GZ", *BESIDE}

    def test_images_of_a_test_list_are_not_scored(self, tmp_path, knowing, dataset):
        root = shutil.copytree(dataset, tmp_path / "data")
        described = json.loads((root / "dataset.json").read_text())
        described["test"] = ["./imagesTr/case_3.nii.gz", {"image": "./imagesTr/case_2.nii.gz"}]
        (root / "dataset.json").write_text(json.dumps(described))
        out = infer(tmp_path / "out", "--root", root, "--json_key", "test")
        assert names_in(out) == {"case_3.nii.gz", "case_2.nii.gz", *BESIDE}


class Bands(nn.Module):
    """Gives each third of the window's values its own row of class scores."""

    def __init__(self, scores: list[list[float]]):
        super().__init__()
        self.scores = torch.tensor(scores, dtype=torch.float32)

    def forward(self, image):
        return self.scores[(image[:, 0] * 3).long().clamp(0, 2)].movedim(-1, 1)


def bands(path: Path, width: int) -> Path:
    image = np.repeat(np.array([20, 100, 190], np.float32), width)[:, None, None]
    return save(path, image * np.ones((1, 10, 12), np.float32), np.diag([-1, 2, 2, 1]))


def test_maps_lie_beside_the_segmentation(tmp_path, knowing):
    """As NIfTI on the image's grid, scaled; a lost one is made again."""
    source, flags = (
        bands(tmp_path / "a.nii.gz", 16),
        ["--save_probabilities --save_uncertainty"],
    )
    task = replace(TASK, **THREE, spacing=None, patch_size=(8, 8, 8))
    knowing(Bands([[0, 0, -99], [0, 0, 0], [9, 0, -99]]), task)
    out = infer(tmp_path / "out", "--input", source, *flags)
    maps = [nib.load(out / name / "a.nii.gz") for name in ("probabilities", "uncertainty")]
    assert [one.shape for one in maps] == [(48, 10, 12, 3), (48, 10, 12)]
    assert np.allclose(maps[0].affine, nib.load(source).affine)
    # in the middle of a band
    probabilities, uncertainty = (one.get_fdata()[[2, 24, 45], 5, 5] for one in maps)
    assert np.allclose(probabilities, [[0.5, 0.5, 0], [1 / 3] * 3, [1, 0, 0]], atol=0.003)
    assert np.allclose(uncertainty, [np.log(2) / np.log(3), 1, 0], atol=0.003)
    (out / "uncertainty/a.nii.gz").unlink()
    infer(out, "--input", source, *flags)
    assert (out / "uncertainty/a.nii.gz").is_file()


class TestDicom:
    """A folder of a DICOM series is a volume; the segmentation is NIfTI on its grid."""

    @pytest.fixture
    def scans(self, tmp_path, knowing) -> Path:
        write_series = pytest.importorskip("slices").write_series
        image, _, affine = body("left-handed LAS")
        for name in ("first/CT", "second/CT"):
            write_series(tmp_path / "scans" / name, affine, image.round())
        save(tmp_path / "scans/third.nii.gz", image.round(), affine)
        return tmp_path / "scans"

    def test_it_is_segmented_as_the_same_nifti_file(self, tmp_path, scans):
        out = infer(tmp_path / "out", "--input", scans)
        names = ["first_CT.nii.gz", "second_CT.nii.gz", "third.nii.gz"]
        assert sorted(path.name for path in out.glob("*.nii.gz")) == names
        # DICOM counts slices along the planes' normal, here downwards: both are turned to RAS.
        turned = [nib.as_closest_canonical(nib.load(out / name)) for name in names[::2]]
        assert np.allclose(turned[0].affine, turned[1].affine, atol=1e-4)
        first, third = (np.asarray(one.dataobj) for one in turned)
        assert (first != third).mean() < 1e-3

    def test_a_bad_series_does_not_end_the_batch(self, tmp_path, scans):
        """And files that a killed batch converted are removed."""
        (scans / "second/CT/13.dcm").unlink()  # neither the first nor the last one
        left = save_body(tmp_path / "out/.dicom/patient.nii.gz")
        says = "1 of 3 cases .*second_CT.nii.gz: .*second/CT has slices"
        with pytest.raises(PartlyDone, match=says):
            infer(tmp_path / "out", "--input", scans)
        assert (tmp_path / "out/first_CT.nii.gz").is_file() and not left.exists()
        assert not list((tmp_path / "out").glob(".dicom/*"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Six cases on different grids, three in the first of two folds; the third is empty."""
    root, entries = tmp_path_factory.mktemp("data") / "Toy", []
    for number, grid in enumerate(["permuted PIR", "oblique", *["RAS"] * 4]):
        image, label, affine = body(grid)
        name = f"case_{number}.nii.gz"
        save(root / "imagesTr" / name, image, affine)
        save(root / "labelsTr" / name, 0 * label if number == 2 else label, affine)
        entries.append({"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"})
    (root / "dataset.json").write_text(json.dumps({"training": entries}))
    return root


FOLD = "--num_folds 2 --fold 0"


def read_scores(folder: Path) -> list[list[str]]:
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.reader(file))


def test_scores_are_the_dice_of_the_written_files(tmp_path, knowing, dataset, capsys):
    names = ("background", "organ", "never found")
    knowing(Threshold(0.55, num_classes=3), replace(TASK, class_names=names))
    out = infer(tmp_path / "out", "--root", dataset, FOLD)
    header, *rows = read_scores(out)
    assert header == ["case", "organ", "never found"]
    cases = [f"case_{number}.nii.gz" for number in range(3)]
    assert [row[0] for row in rows] == cases
    expected = [
        dice(voxels_of(out / name), voxels_of(dataset / "labelsTr" / name)) for name in cases[:2]
    ]
    assert [float(row[1]) for row in rows[:2]] == pytest.approx(expected, abs=1e-6)
    assert all(0.8 < value < 0.97 for value in expected)
    assert rows[2][1] == "" and [row[2] for row in rows] == ["", "", ""]  # nobody has the class
    mean = sum(expected) / 2
    said = f"Dice {mean:.4f} (organ {mean:.4f} (false positive cases: 1), never found absent)"
    assert said in capsys.readouterr().out


class TestItsOwnCases:
    """A model knows its cases: what it was trained on is not scored as if it were new."""

    TRAINED, VALIDATED = ["case_0", "case_1"], ["case_2", "case_4"]

    @pytest.fixture(autouse=True)
    def of_fold(self, knowing):
        knowing(Threshold(), training_cases=self.TRAINED, validation_cases=self.VALIDATED)

    def test_its_validation_cases_are_the_default(self, tmp_path, dataset):
        rows = read_scores(infer(tmp_path / "out", "--root", dataset))
        assert [row[0] for row in rows[1:]] == ["case_2.nii.gz", "case_4.nii.gz"]

    def test_training_cases_are_refused_or_marked(self, tmp_path, dataset, capsys):
        message = refused(tmp_path / "out", "--root", dataset, FOLD)
        assert "was trained on 2 of these " in message and "for example case_0, case_1" in message
        flags = ["--root", dataset, FOLD, "--allow_training_cases"]
        rows = read_scores(infer(tmp_path / "out", *flags))
        assert [row[2] for row in rows] == ["trained_on", "yes", "yes", "no"]
        assert ", 2 training cases among them" in capsys.readouterr().out

    def test_a_model_that_does_not_know_them_needs_a_fold(self, tmp_path, knowing, dataset):
        knowing(Threshold())
        said = "does not say which cases it was trained on: give --fold"
        assert said in refused(tmp_path / "out", "--root", dataset)

    def test_a_dataset_of_other_classes_is_refused(self, tmp_path, dataset):
        root = shutil.copytree(dataset, tmp_path / "data")
        described = json.loads((root / "dataset.json").read_text())
        described["labels"] = {"0": "background", "1": "organ", "2": "tumour"}
        (root / "dataset.json").write_text(json.dumps(described))
        said = "has the classes background, organ, tumour, and the model segments background, organ"
        assert said in refused(tmp_path / "out", "--root", root)


class TestRefusals:
    def test_two_images_of_one_name(self, tmp_path, knowing):
        paths = [save_body(tmp_path / folder / "a.nii.gz") for folder in ("one", "two")]
        message = refused(tmp_path / "out", "--input", *paths)
        assert "2 images are called a.nii.gz" in message and "--output_root" in message

    def test_inputs_are_not_overwritten(self, tmp_path, knowing, dataset):
        root = shutil.copytree(dataset, tmp_path / "data")
        before = contents(root)
        for folder, arguments in (
            ("imagesTr", ["--input", root / "imagesTr/case_0.nii.gz"]),
            ("labelsTr", ["--root", root, FOLD]),  # labels have the images' names, as in MSD
        ):
            says = f"{root / folder / 'case_0.nii.gz'} is an input .*--output_root"
            with pytest.raises(UserError, match=says):
                infer(root / folder, *arguments)
            assert contents(root) == before

    def test_input_without_images_or_with_labels(self, tmp_path, knowing, dataset):
        (tmp_path / "empty").mkdir()
        for path, says in (
            (tmp_path / "missing.nii.gz", "does not exist"),
            (tmp_path / "empty", "is no NIfTI file"),
            (dataset, f"is a dataset, with labels: give --root {dataset} to score its cases"),
        ):
            assert f"--input {path} {says}" in refused(tmp_path / "out", "--input", path)

    @pytest.mark.parametrize(
        ("name", "num_channels", "channel_files", "says"),
        [
            ("a", 2, False, "a.nii.gz has 1 channel, and the model takes 2 channels (CT, PET)"),
            ("a_0000", 2, True, "a has the files 0000, and the model takes"),
            ("a", 1, True, "its name does not say of which it is: give a_0000"),
        ],
    )
    def test_an_image_of_other_channels(
        self, tmp_path, knowing, name, num_channels, channel_files, says
    ):
        task = replace(TASK, num_channels=num_channels, channel_files=channel_files)
        knowing(Threshold(), task, data={"channels": ["CT", "PET"][:num_channels]})
        path = save(tmp_path / f"{name}.nii.gz", np.ones((9, 9, 9), np.float32), np.eye(4))
        message = refused(tmp_path / "out", "--input", path)
        assert says in message and str(tmp_path / "a") in message

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("", "--input"),
            ("--input a.nii.gz --root data", "--root"),
            ("--root data --fold 5", "--num_folds 5"),
        ],
    )
    def test_a_bad_command_line(self, line, expected, capsys):
        with pytest.raises(SystemExit, match="2"):
            infer_dints.parse_args(["--checkpoint", "model.pth", *line.split()])
        assert expected in capsys.readouterr().err


class TestBatches:
    """A bad case does not end a batch, and what is done is not done again."""

    @pytest.fixture
    def images(self, tmp_path, knowing) -> Path:
        for name in "abc":
            save_body(tmp_path / f"in/{name}.nii.gz")
        return tmp_path / "in"

    def test_the_others_are_finished_and_the_bad_one_is_named(self, tmp_path, images):
        content = (images / "b.nii.gz").read_bytes()
        (images / "b.nii.gz").write_bytes(content[: len(content) // 2])
        out, says = tmp_path / "out", r"1 of 3 cases are not segmented \(.*run.json .*b.nii.gz: "
        with pytest.raises(PartlyDone, match=says):
            infer(out, "--input", images)
        assert list(states(out).values()) == ["done", "failed", "done"]
        assert "b.nii.gz" in run_of(out)["cases"]["b.nii.gz"]["reason"]
        assert {path.name for path in out.glob("*.nii.gz")} == {"a.nii.gz", "c.nii.gz"}

    def test_none_that_can_be_segmented_is_an_error(self, tmp_path, images):
        for path in images.iterdir():
            path.write_bytes(b"nothing")
        said = "none of the 3 cases can be segmented, for exam"
        assert refused(tmp_path / "out", "--input", images).startswith(said)

    def test_what_is_done_is_kept(self, tmp_path, images, segmented):
        out = infer(tmp_path / "out", "--input", images)
        first = contents(out)
        infer(out, "--input", images, "--checkpoint", "moved/model.pth")
        assert segmented == ["a", "b", "c"] and {*states(out).values()} == {"done"}
        assert contents(out) == first

    def test_a_measured_precision_is_kept(self, tmp_path, images, segmented, monkeypatch, knowing):
        """On a busy machine another one may be the faster one, and all would be done again."""
        for faster in ("bf16", "fp32"):
            monkeypatch.setattr("dints.running.precision._faster_on_cpu", lambda name=faster: name)
            out = infer(tmp_path / "out", "--input", images, "--precision auto")
        assert segmented == ["a", "b", "c"] and run_of(out)["settings"]["precision"] == "bf16"
        knowing(Threshold(), digest="of another file")
        infer(out, "--input", images, "--precision auto")
        assert run_of(out)["settings"]["precision"] == "fp32"

    @pytest.mark.parametrize("change", ["image", "mask", "note", "model"])
    def test_what_has_changed_is_done_again(self, tmp_path, images, segmented, change, knowing):
        out = infer(tmp_path / "out", "--input", images)
        first = voxels_of(out / "b.nii.gz")
        if change == "image":
            image, _, affine = body()
            save(images / "b.nii.gz", image[::-1].copy(), affine)
        elif change == "mask":
            save(out / "b.nii.gz", 0 * first, np.eye(4))
        elif change == "note":
            (out / ".cases/b.nii.gz.json").write_text('{"state": "done", "key":')
        else:
            knowing(Threshold(), digest="of another file")
        segmented.clear()
        infer(out, "--input", images)
        assert segmented == (["a", "b", "c"] if change == "model" else ["b"])
        assert np.array_equal(
            voxels_of(out / "b.nii.gz"), first[::-1] if change == "image" else first
        )

    def test_a_bad_label_is_named_before_its_image_is_segmented(
        self, tmp_path, knowing, dataset, segmented
    ):
        root = shutil.copytree(dataset, tmp_path / "data")
        label = root / "labelsTr/case_0.nii.gz"
        save(label, voxels_of(label) * 9, nib.load(label).affine)
        with pytest.raises(PartlyDone, match=f"{label} holds the label 9"):
            infer(tmp_path / "out", "--root", root, FOLD)
        assert segmented == ["case_1", "case_2"]
        assert [row[1] != "" for row in read_scores(tmp_path / "out")[1:]] == [False, True, False]


class TestAnotherRunInTheFolder:
    """Nothing of an earlier run lies beside new segmentations as if it were of the new run."""

    MAPS = "--save_probabilities --save_uncertainty"

    def files(self, out: Path) -> dict[str, object]:
        """Return what people see of a folder, but for times."""
        paths = [path for path in out.rglob("*") if path.is_file()]
        found = {str(path.relative_to(out)): path.read_bytes() for path in paths}
        shown = {name: found[name] for name in found if name[0] != "."}
        return shown | {"run.json": [run_of(out)["settings"], states(out)]}

    @pytest.fixture
    def both(self, knowing):
        """Return a function that lets the script load another model than before."""
        knowing(Threshold(), digest="first")
        return lambda: knowing(Threshold(0.6), digest="second")

    @pytest.mark.fault("kill -9 in a batch, then other flags")
    def test_a_kill_leaves_nothing_to_other_flags(self, tmp_path, both, dataset, monkeypatch):
        """A batch is whole; another model's is killed at a file; a third has its own flags."""
        out = infer(tmp_path / "out", "--root", dataset, FOLD, "--save_uncertainty")
        (out / "report.html").write_text("of the first model")
        both()
        real, count = nifti.save_map, []

        def save_map(*given, **more):
            count.append(1)
            if len(count) > 1:
                raise KeyboardInterrupt  # which nothing in a batch catches
            real(*given, **more)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(nifti, "save_map", save_map)
            infer(out, "--root", dataset, FOLD, self.MAPS)
        (out / ".case_1.nii.gz.123.partial").write_bytes(b"half")
        assert not list(out.glob("scores.csv"))
        for folder in (out, tmp_path / "fresh"):
            infer(folder, "--root", dataset, FOLD, "--overlap_ratio 0.1")
        assert self.files(out) == self.files(tmp_path / "fresh")
        assert not list(out.rglob(".*.partial"))

    def test_segmentations_that_it_does_not_replace_are_named(
        self, tmp_path, both, dataset, caplog
    ):
        images = [dataset / f"imagesTr/case_{number}.nii.gz" for number in (0, 3)]
        out = infer(tmp_path / "out", "--root", dataset, FOLD)
        infer(out, "--input", images[1])
        assert "by other models" not in caplog.text
        both()
        infer(out, "--input", *images)
        said = "has 2 segmentations by other models or settings, which this run does not replace"
        assert said in caplog.text


def test_a_name_may_be_as_long_as_its_files_and_of_any_bytes(tmp_path, knowing, caplog):
    caplog.set_level(logging.CRITICAL + 1)  # pytest-xdist sends a log as UTF-8, which it is not
    name = os.fsdecode(b"caf\xe9" + b"n" * 242)
    (tmp_path / "in").mkdir()
    try:
        os.rename(save_body(tmp_path / "saved.nii.gz"), tmp_path / f"in/{name}.nii.gz")
    except OSError as error:
        pytest.skip(f"this file system holds no such name: {error}")
    (tmp_path / "in/dataset.json").write_text(json.dumps({"test": [{"image": f"{name}.nii.gz"}]}))
    knowing(Threshold(), architecture=chain(0, 1, 0, num_depths=2), channel_mul=0.125)
    for _ in range(2):  # once with each, and once with notes
        flags = ["--save_probabilities", "--report"]
        out = infer(tmp_path / "out", "--input", tmp_path / "in", *flags)
    assert (out / f"{name}.nii.gz").is_file() and (out / f"probabilities/{name}.nii.gz").is_file()
    assert states(out) == {f"{name}.nii.gz": "done"}
    assert "caf\\udce9" in (out / "report.html").read_text()
