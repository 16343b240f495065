"""The report of --check on a dataset, and its verdict."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from toys import CLASSES, save, write_dataset

from dints.data import check
from dints.data.check import check_dataset
from dints.data.listing import Case, ReadOptions
from dints.data.tasks import Task
from dints.errors import UserError
from dints.settings import DataSettings

TASK = Task("Toy", "MRI", 1, CLASSES, spacing=None)
KNOWN = replace(TASK, name="Task00_Phantom")  # is not resampled to the median
AFFINE = np.diag([1.0, 2, 3, 1])
SHAPE = (12, 10, 8)


def write(
    folder: Path, name: str, image: np.ndarray, label: np.ndarray, affine: np.ndarray = AFFINE
) -> Case:
    """Write a case; an image of five dimensions becomes a file a channel."""
    channels = enumerate(image if image.ndim == 5 else [image])
    paths = [save(folder / f"{name}_{number}.nii.gz", file, affine) for number, file in channels]
    return Case(name, tuple(paths), save(folder / f"{name}_label.nii.gz", label, affine))


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def labelled(organ: int, lesion: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Label so many voxels with each class."""
    label = np.zeros(shape, np.uint8)
    label.flat[:organ], label.flat[organ : organ + lesion] = 1, 2
    return label


@pytest.fixture
def cases(tmp_path) -> list[Case]:
    """Write three sound cases: voxels of 6 mm^3, 100 to 300 of them organ, lesions in two."""
    return [
        write(tmp_path, f"case_{n}", noise(n), labelled(100 * (n + 1), 10 * n)) for n in range(3)
    ]


Finding = tuple[str, str, str]  # error or warning, case, text


def checked(
    cases: Sequence[Case], task: Task = TASK, folds: Sequence[int] | None = None
) -> tuple[list[Finding], list[str]]:
    """Return the findings, and the summary's lines."""
    text, is_good = check_dataset(cases, folds or range(len(cases)), task, 2)
    lines = text.splitlines()
    found = [re.match(r"(error|warning) +(\S+) +(.+)", line) for line in lines]
    findings = [match.groups() for match in found if match]
    assert is_good == (not any(kind == "error" for kind, _, _ in findings))
    assert findings == sorted(findings, key=lambda finding: finding[0])  # errors first
    assert not findings or lines[0].startswith("kind") and lines[len(findings) + 1] == ""
    return findings, lines[len(findings) + 2 if findings else 0 :]


def test_the_summary_is_in_the_patients_axes(tmp_path, cases):
    turned = AFFINE @ nib.orientations.inv_ornt_aff([[2, 1], [0, -1], [1, 1]], SHAPE)
    label = labelled(300, 0, (10, 8, 12)).astype(np.float32)
    cases[2] = write(tmp_path, "turned", noise(7, (10, 8, 12)), label, turned)
    cases.append(write(tmp_path, "large", noise(8, (14, 20, 16)), labelled(9, 9, (14, 20, 16))))
    findings, summary = checked(cases)
    assert not findings
    assert summary == [
        "Toy: 4 cases, 0 with errors, 0 with warnings",
        "MRI, 1 channel; classes: background, organ, lesion",
        "orientation: RAS 3, PSR 1",
        "images: int16 4; labels: uint8 3, float32 1",
        "             cases  smallest     median       largest",
        "voxels           4  12 x 10 x 8  12 x 10 x 8  14 x 20 x 16",
        "spacing, mm      4  1 x 2 x 3    1 x 2 x 3    1 x 2 x 3",
        "organ, cm3       4  0.054        0.9          1.8",
        "lesion, cm3      2  0.054        0.057        0.06",
    ]


# Duplicates


@pytest.mark.parametrize("kept_as", ["float32", "turned", "scaled"])
def test_copies_across_folds_are_an_error_however_they_are_kept(tmp_path, cases, kept_as):
    image, affine = noise(0), AFFINE
    if kept_as == "float32":
        image = image.astype(np.float32)
    if kept_as == "turned":
        image, affine = image[::-1], AFFINE @ np.diag([-1, 1, 1, 1])
    cases[2] = write(tmp_path, "copy", image, labelled(5, 5), affine)
    if kept_as == "scaled":
        scaled = nib.Nifti1Image((image.astype(np.float32) - 1) / 2, affine)
        scaled.header.set_slope_inter(2, 1)
        scaled.to_filename(cases[2].images[0])
    ((kind, name, finding),), summary = checked(cases)
    says = (
        "copy_0.nii.gz holds the same voxels as case_0_0.nii.gz, but they are in the folds 2 and 0"
    )
    assert (kind, name) == ("error", "copy") and finding.startswith(says)
    assert summary[0] == "Toy: 3 cases, 1 with errors, 0 with warnings"
    if kept_as != "float32":
        return
    ((kind, name, finding),), _ = checked(cases, folds=[0, 1, 0])
    says = "copy_0.nii.gz holds the same voxels as case_0_0.nii.gz: remove one of the cases"
    assert (kind, name, finding) == ("warning", "copy", says)  # within a fold
    save(Path(cases[2].images[0]), noise(0).reshape((10, 12, 8), order="F"))
    save(Path(cases[2].label), labelled(5, 5, (10, 12, 8)))
    assert "same voxels" not in str(checked(cases)[0])  # the same numbers in another shape


def test_cases_that_share_one_channel_are_no_copies(tmp_path):
    images = [np.stack([noise(0)[..., None], noise(n)[..., None]]) for n in (1, 2)]
    pair = [write(tmp_path, f"pair_{n}", image, labelled(5, 5)) for n, image in enumerate(images)]
    assert checked(pair, replace(TASK, num_channels=2))[0] == []


# Warnings


def only_warning(cases: Sequence[Case], task: Task = TASK) -> tuple[str, str]:
    ((kind, name, finding),), summary = checked(cases, task)
    assert kind == "warning" and "0 with errors" in summary[0]
    return name, finding


def test_a_label_without_foreground_and_a_class_that_no_case_has(tmp_path, cases):
    cases[1] = write(tmp_path, "empty", noise(9), labelled(0))
    assert only_warning(cases) == (
        "empty",
        "empty_label.nii.gz has no foreground: look at the label",
    )
    says = "no case has the class lesion: look at the labels in dataset.json"
    assert only_warning(cases[:1]) == ("all", says)
    assert checked(cases[:1])[1][-1] == "lesion, cm3      0"


def test_a_channel_without_contrast(tmp_path):
    images = [noise(n, (*SHAPE, 2)) for n in range(3)]
    images[2][..., 1] = 7
    cases = [write(tmp_path, f"{n}", image, labelled(9, 9)) for n, image in enumerate(images)]
    says = "2_0.nii.gz has the value 7 everywhere in channel 1: look at the image"
    assert only_warning(cases, replace(TASK, num_channels=2)) == ("2", says)


@pytest.mark.parametrize(
    ("factor", "shape", "says"),
    [
        (1 / 6, SHAPE, "spacing, mm: 1 x 0.3333 x 3, where the median is 1 x 2 x 3: look at its"),
        (1, (12, 10, 50), "number of voxels: 12 x 10 x 50, where the median is 12 x 10 x 8: look"),
    ],
)
def test_a_grid_far_from_the_median(tmp_path, cases, factor, shape, says):
    affine = AFFINE @ np.diag([1, factor, 1, 1])
    far = write(tmp_path, "far", noise(9, shape), labelled(9, 0, shape), affine)
    name, finding = only_warning([*cases, far], KNOWN)
    assert name == "far"
    assert finding.startswith(f"far_0.nii.gz is far from the others in {says}")


def test_faults_that_the_read_options_let_pass(tmp_path, cases):
    image = noise(9).astype(np.float32)
    image[0, 0, :3] = np.nan, np.inf, -np.inf
    cases[1] = write(tmp_path, "holes", image, labelled(9))
    lenient = [replace(case, options=ReadOptions(True, 0.0)) for case in cases]
    assert "has 3 NaN or infinite voxels" in only_warning(lenient)[1]
    assert [kind for kind, _, _ in checked(cases)[0]] == ["error"]


# Errors


def test_all_faults_of_a_case_are_listed(tmp_path, cases):
    """Each file is judged though another one is damaged; the case is left out of the figures."""
    image = np.stack([noise(n)[..., None].astype(np.float32) for n in range(3)])
    image[1, 0, 0, 0] = np.nan
    bad = write(tmp_path, "bad", image, labelled(9) + np.uint8(4))
    Path(bad.images[0]).write_bytes(b"no image")
    Path(bad.images[2]).write_bytes(Path(bad.images[2]).read_bytes()[:-20])
    findings, summary = checked([*cases, bad])
    assert {(kind, name) for kind, name, _ in findings} == {("error", "bad")}
    says = [
        "bad_0.nii.gz cannot be read: it is no NIfTI file",
        "bad_1.nii.gz has 1 NaN",
        "bad_2.nii.gz cannot be read: its compression is damaged",
        "bad_label.nii.gz holds the label 4 and 1 more in 960 voxels",
    ]
    texts = [text for _, _, text in findings]
    assert [text[: len(start)] for text, start in zip(texts, says, strict=True)] == says
    assert summary[0] == "Toy: 4 cases, 1 with errors, 0 with warnings"
    counts = [line.split()[i] for line, i in zip(summary[5:], (1, 2, 2, 2), strict=True)]
    assert counts == ["3", "3", "3", "2"]


def test_no_foreground_in_any_case_or_nothing_that_can_be_read(cases):
    for case in cases:
        save(Path(case.label), labelled(0), AFFINE)
    findings, _ = checked(cases)
    assert findings[0][:2] == ("error", "all")
    assert findings[0][2].startswith("no case has any foreground")
    assert [kind for kind, _, _ in findings[1:]] == ["warning"] * 3
    for case in cases:
        for path in case.files:
            Path(path).write_bytes(b"")
    cases = [replace(case) for case in cases]  # their headers are read again
    findings, summary = checked(cases)  # absent classes are not guessed
    assert len(findings) == 6 and summary[0] == "Toy: 3 cases, 3 with errors, 0 with warnings"


# Of a dataset


@pytest.fixture
def root(tmp_path) -> Path:
    numbers = range(3)
    volumes = [(noise(n)[..., None], labelled(100 * (n + 1), 10 * n), AFFINE) for n in numbers]
    return write_dataset(tmp_path / "Toy", volumes, ["MRI"])


def test_a_dataset_is_refused_for_errors_only(root, capsys):
    """Folds are those of the training: of two, the first validates one case, the other one two."""
    settings, last = DataSettings(root=root, num_folds=2), root / "imagesTr/case_2.nii.gz"
    last.write_bytes((root / "imagesTr/case_1.nii.gz").read_bytes())
    check.check(settings)
    assert "Toy: 3 cases, 0 with errors, 1 with warnings\n" in capsys.readouterr().out
    last.write_bytes((root / "imagesTr/case_0.nii.gz").read_bytes())
    with pytest.raises(UserError, match=f"^{root} is not fit for training: correct"):
        check.check(settings)
    check.check(DataSettings(root=root, fold="all"))  # every case is trained on, none validated
    assert "case_0.nii.gz: remove one" in capsys.readouterr().out
    (root / "labelsTr/case_1.nii.gz").write_text("")
    with pytest.raises(UserError, match="not fit for training"):
        check.check(settings)
    says = r"^error    case_1  labelsTr/case_1.nii.gz cannot be read"
    assert re.search(says, capsys.readouterr().out, re.M)
