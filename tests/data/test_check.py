"""What --check tells of a dataset, and the exit code that it ends with."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dints.data.leniency import Leniency
from toys import save, write_dataset

import search_dints
from dints.data import check
from dints.data.check import check_dataset
from dints.data.listing import ListedCase
from dints.data.tasks import Task
from dints.errors import exit_on_user_error

TASK = Task("Toy", "MRI", 1, ("background", "organ", "lesion"), spacing=None)
STRICT = Leniency()
AFFINE = np.diag([1.0, 2, 3, 1])
SHAPE = (12, 10, 8)


def write(folder: Path, name: str, image: np.ndarray, label: np.ndarray, affine: np.ndarray = AFFINE) -> ListedCase:
    """Write a case; an image of five dimensions becomes a file a channel."""
    channels = image if image.ndim == 5 else [image]
    paths = [save(folder / f"{name}_{number}.nii.gz", channel, affine) for number, channel in enumerate(channels)]
    return ListedCase(name, tuple(paths), save(folder / f"{name}_label.nii.gz", label, affine))


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def labelled(organ: int, lesion: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Label so many voxels with each class."""
    label = np.zeros(shape, np.uint8)
    label.flat[:organ], label.flat[organ : organ + lesion] = 1, 2
    return label


@pytest.fixture
def cases(tmp_path) -> list[ListedCase]:
    """Write three sound cases: voxels of 6 mm^3, 100 to 300 of them organ, lesions in two cases."""
    return [write(tmp_path, f"case_{n}", noise(n), labelled(100 * (n + 1), 10 * n)) for n in range(3)]


def checked(cases: list[ListedCase], task: Task = TASK, leniency: Leniency = STRICT, folds: list[int] | None = None):
    """Return what is said: errors and warnings by case, and the summary's lines."""
    text, is_good = check_dataset(cases, folds or list(range(len(cases))), task, leniency, 2)
    lines = text.splitlines()
    found = [re.match(r"(error|warning) +(\S+) +(.+)", line) for line in lines]
    findings = [match.groups() for match in found if match]
    assert is_good == (not any(kind == "error" for kind, _, _ in findings))
    assert findings == sorted(findings, key=lambda finding: finding[0])  # errors first
    assert not findings or lines[0].startswith("kind") and lines[len(findings) + 1] == ""
    return findings, lines[len(findings) + 2 if findings else 0 :]


def test_the_summary_of_sound_cases(cases):
    findings, summary = checked(cases)
    assert not findings
    assert summary == [
        "Toy: 3 cases, 0 with errors, 0 with warnings",
        "MRI, 1 channel; classes: background, organ, lesion",
        "orientation: RAS 3",
        "images: int16 3; labels: uint8 3",
        "             cases  smallest     median       largest",
        "voxels           3  12 x 10 x 8  12 x 10 x 8  12 x 10 x 8",
        "spacing, mm      3  1 x 2 x 3    1 x 2 x 3    1 x 2 x 3",
        "organ, cm3       3  0.6          1.2          1.8",
        "lesion, cm3      2  0.06         0.09         0.12",
    ]


def test_the_summary_is_in_the_patients_axes(tmp_path, cases):
    turned = AFFINE @ nib.orientations.inv_ornt_aff([[2, 1], [0, -1], [1, 1]], SHAPE)
    image, label = noise(7, (10, 8, 12)), labelled(50, 0, (10, 8, 12)).astype(np.float32)
    cases[2] = write(tmp_path, "turned", image, label, turned)
    findings, summary = checked(cases)
    assert not findings
    assert summary[2:4] == ["orientation: RAS 2, PSR 1", "images: int16 3; labels: uint8 2, float32 1"]
    rows = [re.split("  +", line)[1:] for line in summary[5:8]]
    assert rows == [["3", *["12 x 10 x 8"] * 3], ["3", *["1 x 2 x 3"] * 3], ["3", "0.3", "0.6", "1.2"]]


def test_smallest_median_and_largest_are_of_each_axis(tmp_path):
    shapes = [(10, 30, 20), (14, 20, 24), (12, 28, 40)]
    cases = [write(tmp_path, f"c{n}", noise(n, s), labelled(9, 9, s)) for n, s in enumerate(shapes)]
    _, summary = checked(cases)
    assert re.split("  +", summary[5])[1:] == ["3", "10 x 20 x 20", "12 x 28 x 24", "14 x 30 x 40"]


class TestDuplicates:
    @pytest.mark.parametrize("kept_as", ["copy", "float32", "turned", "scaled"])
    def test_across_folds_are_an_error_however_they_are_kept(self, tmp_path, cases, kept_as):
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
        findings, summary = checked(cases)
        says = "copy_0.nii.gz holds the same voxels as case_0_0.nii.gz, but they are in the folds 2 and 0, so that"
        ((kind, name, finding),) = findings
        assert (kind, name) == ("error", "copy") and finding.startswith(says)
        assert finding.endswith("remove one of the cases")
        assert summary[0] == "Toy: 3 cases, 1 with errors, 0 with warnings"

    def test_within_a_fold_are_a_warning(self, tmp_path, cases):
        cases += [write(tmp_path, f"copy_{n}", noise(0), labelled(5, 5)) for n in range(2)]
        findings, _ = checked(cases, folds=[0, 1, 2, 0, 0])
        says = "holds the same voxels as case_0_0.nii.gz: remove one of the cases"
        assert findings == [("warning", f"copy_{n}", f"copy_{n}_0.nii.gz {says}") for n in range(2)]

    def test_are_not_cases_that_share_but_one_channel_nor_numbers_in_another_shape(self, tmp_path):
        two = replace(TASK, num_channels=2)
        images = [np.stack([noise(0)[..., None], noise(n)[..., None]]) for n in (1, 2)]
        pair = [write(tmp_path, f"pair_{n}", image, labelled(5, 5)) for n, image in enumerate(images)]
        assert len(pair[0].images) == 2
        assert checked(pair, two)[0] == []
        assert len(checked([pair[0], replace(pair[1], images=pair[0].images)], two)[0]) == 1
        for case in pair:  # what is left of them is the same
            Path(case.images[1]).write_bytes(b"")
        assert ["cannot be read" in finding for _, _, finding in checked(pair, two)[0]] == [True] * 2
        shapes = [SHAPE, (10, 12, 8)]
        one = [write(tmp_path, str(s), noise(0).reshape(s, order="F"), labelled(5, 5, s)) for s in shapes]
        assert checked(one)[0] == []


class TestWarnings:
    """A warning is no error."""

    def only(self, cases, *args) -> tuple[str, str]:
        findings, summary = checked(cases, *args)
        ((kind, name, finding),) = findings
        assert kind == "warning" and "0 with errors" in summary[0]
        return name, finding

    def test_no_foreground(self, tmp_path, cases):
        cases[1] = write(tmp_path, "empty", noise(9), labelled(0))
        assert self.only(cases) == ("empty", "empty_label.nii.gz has no foreground: look at the label")

    @pytest.mark.parametrize("channels", [1, 2])
    def test_a_channel_without_contrast(self, tmp_path, cases, channels):
        image = np.stack([noise(n) for n in range(channels)], -1)
        image[..., -1] = 7
        others = [write(tmp_path, f"{n}", noise(n, (*SHAPE, channels)), labelled(9, 9)) for n in range(5, 7)]
        flat = write(tmp_path, "flat", image, labelled(9, 9))
        found = self.only([*others, flat], replace(TASK, num_channels=channels))
        place = " in channel 1" if channels == 2 else ""
        assert found == ("flat", f"flat_0.nii.gz has the value 7 everywhere{place}: look at the image")

    def test_a_class_that_no_case_has(self, cases):
        name, finding = self.only(cases[:1])
        assert (name, finding) == ("all", "no case has the class lesion: look at the labels in dataset.json")
        assert checked(cases[:1])[1][-1] == "lesion, cm3      0"

    @pytest.mark.parametrize(
        ("factor", "shape", "says"),
        [
            (6, SHAPE, "spacing, mm: 1 x 12 x 3, where the median is 1 x 2 x 3: look at its header"),
            (1 / 6, SHAPE, "spacing, mm: 1 x 0.3333 x 3, where the median is 1 x 2 x 3: look at its header"),
            (1, (12, 10, 50), "number of voxels: 12 x 10 x 50, where the median is 12 x 10 x 8: look at its header"),
            (4, SHAPE, None),
        ],
    )
    def test_a_grid_far_from_the_median(self, tmp_path, cases, factor, shape, says):
        affine = AFFINE @ np.diag([1, factor, 1, 1])
        far = write(tmp_path, "far", noise(9, shape), labelled(9, 0, shape), affine)
        known = replace(TASK, name="Task00_Phantom")  # is not resampled to the median
        if says is None:
            assert checked([*cases, far], known)[0] == []
        else:
            assert self.only([*cases, far], known) == ("far", f"far_0.nii.gz is far from the others in {says}")

    def test_few_voxels_on_the_tasks_grid(self, tmp_path, cases):
        task = replace(TASK, name="Task00_Phantom", spacing=(1.0, 2.0, 3.0))
        cases[0] = write(tmp_path, "thin", noise(9, (12, 10, 3)), labelled(9, 9, (12, 10, 3)))
        assert self.only(cases, task) == (
            "thin",
            "thin_0.nii.gz has only 12 x 10 x 3 voxels on the task's grid: look at its header",
        )

    def test_few_voxels_in_most_cases_are_one_line(self, cases):
        """As in cardiac MRI: no header is wrong there."""
        task = replace(TASK, name="Task00_Phantom", spacing=(1.0, 2.0, 9.0))
        name, finding = self.only(cases, task)
        assert name == "all" and finding == (
            "3 of 3 cases have fewer than 8 voxels along an axis of the task's grid, for example case_0_0.nii.gz with "
            "12 x 10 x 3: there is little to learn in 3D along it"
        )

    def test_what_the_command_line_lets_pass(self, tmp_path, cases):
        image = noise(9).astype(np.float32)
        image[0, 0, :3] = np.nan, np.inf, -np.inf
        cases[1] = write(tmp_path, "holes", image, labelled(9))
        save(Path(cases[1].label), labelled(9), AFFINE + np.eye(4, k=3))
        findings, _ = checked(cases, TASK, Leniency(True, 0.0))
        assert [kind for kind, _, _ in findings] == ["warning"] * 2
        assert "lies elsewhere" in findings[0][2] and "has 3 NaN or infinite voxels" in findings[1][2]
        assert [kind for kind, _, _ in checked(cases)[0]] == ["error"] * 2


class TestErrors:
    def test_all_faults_of_a_case_are_listed(self, tmp_path, cases):
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
            "bad_2.nii.gz cannot be read: its compressed data ends too early",
            "bad_label.nii.gz holds the label 4 and 1 more in 960 voxels",
        ]
        assert [said[: len(start)] for (_, _, said), start in zip(findings, says, strict=True)] == says
        assert summary[0] == "Toy: 4 cases, 1 with errors, 0 with warnings"
        assert [line.split()[i] for line, i in zip(summary[5:], (1, 2, 2, 2), strict=True)] == ["3", "3", "3", "2"]

    def test_headers_that_do_not_fit_and_voxels_that_do_not_either(self, tmp_path, cases):
        cases[0] = write(tmp_path, "bad", noise(0, (*SHAPE, 2)), labelled(9, 0, (12, 10, 9)) * np.uint8(3))
        said = [finding for kind, name, finding in checked(cases)[0] if (kind, name) == ("error", "bad")]
        assert ["has 2 channels" in said[0], "has shape (12, 10, 9)" in said[1], "the label 3" in said[2]] == [True] * 3
        assert len(said) == 3

    def test_no_foreground_in_any_case(self, tmp_path, cases):
        for case in cases:
            save(Path(case.label), labelled(0), AFFINE)
        findings, _ = checked(cases)
        assert findings[0][:2] == ("error", "all") and findings[0][2].startswith("no case has any foreground")
        assert [kind for kind, _, _ in findings[1:]] == ["warning"] * 3

    def test_absent_classes_are_not_guessed_while_labels_are_unread(self, cases):
        Path(cases[2].label).write_bytes(b"")
        findings, _ = checked([cases[0], cases[2]])
        assert [name for _, name, _ in findings] == ["case_2"]

    def test_nothing_can_be_read(self, cases):
        for case in cases:
            for path in case.files:
                Path(path).write_bytes(b"")
        findings, summary = checked(cases)
        assert len(findings) == 6 and summary[0] == "Toy: 3 cases, 3 with errors, 0 with warnings"
        assert summary[-1].split() == ["lesion,", "cm3", "0"]


def test_few_cases_are_in_memory_at_once(cases, monkeypatch):
    """They are few however many cores there are."""
    at_once, most, lock = [0], [0], threading.Lock()
    everyone = threading.Event()

    def slow(*args):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        everyone.wait(0.05)
        with lock:
            at_once[0] -= 1
        return check.Report()

    monkeypatch.setattr(check, "judge_case", slow)
    check_dataset(cases * 8, [0] * 24, TASK, Leniency(), 64)
    assert most[0] == check.AT_ONCE


# As a user runs it


def run(root: Path, *flags: str) -> int:
    """Return the script's exit code."""
    args = ["--root", str(root), "--output_root", str(root / "run"), "--num_folds", "2", "--check", *flags]
    try:
        exit_on_user_error(search_dints.main, search_dints.parse_args(args))
    except SystemExit as ending:
        return ending.code
    return 0


@pytest.fixture
def msd(tmp_path) -> Path:
    cases = [(noise(n)[..., None], labelled(100 * (n + 1), 10 * n), AFFINE) for n in range(3)]
    return write_dataset(tmp_path / "Toy", cases, ["MRI"], TASK.class_names)


def test_the_exit_code_tells_whether_a_training_would_go_right(msd, capsys):
    assert run(msd) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Toy: 3 cases, 0 with errors, 0 with warnings\n") and not said.err
    save(msd / "labelsTr/case_1.nii.gz", labelled(0), AFFINE)  # a warning
    assert run(msd) == 0
    assert "1 with warnings" in capsys.readouterr().out
    (msd / "labelsTr/case_1.nii.gz").write_text("")
    assert run(msd) == 1
    said = capsys.readouterr()
    assert said.err == f"error: {msd} is not fit for training: mend what is listed above\n"
    assert re.search(r"^error    case_1  labelsTr/case_1.nii.gz cannot be read", said.out, re.M)
    assert not (msd / "run").exists()


def test_volumes_that_are_smaller_than_the_patch_are_counted(msd, caplog):
    with caplog.at_level("INFO"):
        assert run(msd) == 0
    assert caplog.text.count("3 of 3 cases are smaller than the patch (along X 3, Y 3, Z 3): they are padded") == 1


def test_folds_are_those_of_the_training(msd, capsys):
    """The first fold of two validates one case, the other one two."""
    for number, code in ((1, 0), (0, 1)):  # which case the last one is a copy of
        (msd / "imagesTr/case_2.nii.gz").write_bytes((msd / f"imagesTr/case_{number}.nii.gz").read_bytes())
        assert run(msd) == code
        assert f"case_{number}.nii.gz" in capsys.readouterr().out
        assert run(msd, "--fold", "all") == 0  # every case is trained on, none validated


def test_the_real_cases_are_sound(task04, capsys):
    args = ["--root", str(task04), "--output_root", "unused", "--check"]
    search_dints.main(search_dints.parse_args(args))
    said = capsys.readouterr().out
    assert re.match(r"Task04_Hippocampus: \d+ cases, 0 with errors, 0 with warnings\nMRI, 1 channel", said)
    assert re.search(r"^Anterior, cm3 +\d+ ", said, re.M)
