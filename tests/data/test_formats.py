"""A dataset.json in either form, or a third one: the task, the cases, and what is refused without reading voxels."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dints.data.opening import open_dataset
from toys import TASK, make_case, touch

from dints.data import formats
from dints.data.formats import Description, Form, read_dataset, read_json
from dints.data.listing import ListedCase
from dints.data.tasks import TASKS, Task
from dints.errors import UserError

MSD = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "x"}}
NNUNET = {"channel_names": {"0": "T2", "1": "ADC"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
CT_SPLEEN = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"}}


def msd(modality: dict, labels: dict) -> dict:
    return {"modality": modality, "labels": labels, **listing(("a.nii.gz", "b.nii.gz"))}


def nnunet(channels: dict, labels: dict) -> dict:
    return {"channel_names": channels, "labels": labels, "numTraining": 2, "file_ending": ".nii.gz"}


def listing(*entries: object) -> dict:
    """Make a list of cases, each an entry or a pair of image and label."""
    return {"training": [dict(zip(("image", "label"), e, strict=True)) if isinstance(e, tuple) else e for e in entries]}


def read(root: Path, content: dict, **options: object) -> tuple[Task, list[ListedCase]]:
    source = root.parent / "my.json"
    source.write_text(json.dumps(content))
    return read_dataset(root, source, **options)


def told(cases: list[ListedCase]) -> list[tuple]:
    """Return names, images and labels; where a case is listed is for messages."""
    return [(case.name, case.images, case.label) for case in cases]


def refusal(root: Path, content: dict, **options: object) -> str:
    with pytest.raises(UserError, match=r"my\.json") as raised:
        read(root, content, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# Tasks


def measured(name: str, modality: str, num_channels: int, classes: tuple[str, ...], files: bool = False) -> Task:
    """Make a task whose spacing and window the table does not know."""
    return Task(name, modality, num_channels, classes, None, None, (96, 96, 96), files)


ORGANS = ("background", *(f"organ {number}" for number in range(1, 13)))
PARTS = tuple(f"part {number}" for number in range(255))
PROSTATE = TASKS["Task05_Prostate"]
BONE, B_X = ("background", "bone"), {"0": "b", "1": "x"}
READ_TASKS = [
    (msd(**CT_SPLEEN), TASKS["Task09_Spleen"]),
    (msd({"0": "T2", "1": "ADC"}, {"0": "background", "1": "PZ", "2": "TZ"}), PROSTATE),
    # The file says what is in the images; the table how to look at them.
    (
        msd({"1": "CT", "0": "CT"}, {"0": "background", "1": "pancreas"}),
        replace(TASKS["Task07_Pancreas"], num_channels=2, class_names=("background", "pancreas")),
    ),
    (msd(**CT_SPLEEN), measured("Spleens", "CT", 1, ("background", "spleen"))),
    (msd({"0": "ct"}, {"0": "background", "1": "bone"}), measured("Lowercase", "CT", 1, BONE)),
    (
        msd({"0": "T1", "1": "FLAIR"}, {"1": "tumour", "0": "background"}),
        measured("Brains", "MRI", 2, ("background", "tumour")),
    ),
    (msd({"0": "CT", "1": "PET"}, B_X), measured("PET-CT", "MRI", 2, ("b", "x"))),
    (msd({"0": "CT", "1": "Ct"}, B_X), measured("Phases", "CT", 2, ("b", "x"))),
    (msd({"0": "MRI"}, {str(n): name for n, name in enumerate(ORGANS)}), measured("Organs", "MRI", 1, ORGANS)),
    # nnU-Net v2: numbers of names, in any order; whatever has 0 is the background.
    (nnunet({"0": "CT"}, {"spleen": 1, "air": 0}), measured("Dataset009_Spleen", "CT", 1, ("air", "spleen"), True)),
    (
        nnunet({"1": "ADC", "0": "T2"}, {"background": 0, "TZ": 2, "PZ": 1}),
        measured("Dataset005_Prostate", "MRI", 2, PROSTATE.class_names, True),
    ),
    (
        nnunet({"0": "T2", "1": "ADC"}, {"background": 0, "PZ": 1, "TZ": 2}),
        replace(PROSTATE, channel_files=True),
    ),
    # The forms mix: labels of either with channels of either; a list of cases with one file each means one file a case.
    (nnunet({"0": "CT"}, {"0": "background", "1": "bone"}), measured("Mixed", "CT", 1, BONE, True)),
    (
        {**nnunet({"0": "CT"}, {"background": 0, "bone": 1}), **listing(("a.nii.gz", "b.nii.gz"))},
        measured("Listed", "CT", 1, BONE),
    ),
    (
        {**MSD, **listing((["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"], "b.nii.gz"))},
        measured("A file a channel", "MRI", 2, ("background", "x"), True),
    ),
    (msd({"0": "MRI"}, {"background": 0, "0": 1}), measured("Numbers", "MRI", 1, ("background", "0"))),
    # nnU-Net allows any further key.
    (
        {**nnunet({"0": "CT"}, {"background": 0, "bone": 1}), "modality": "PET"},
        measured("Both", "CT", 1, BONE, True),
    ),
    (nnunet({"0": "CT"}, {name: n for n, name in enumerate(PARTS)}), measured("Many", "CT", 1, PARTS, True)),
]


@pytest.mark.parametrize(("content", "task"), READ_TASKS, ids=[task.name for _, task in READ_TASKS])
def test_the_task_of_a_dataset(tmp_path, content, task):
    root = tmp_path / task.name
    images = [f"imagesTr/a_{channel:04d}.nii.gz" for channel in range(task.num_channels)]
    touch(root, "a.nii.gz", "b.nii.gz", "labelsTr/a.nii.gz", *images)
    assert read(root, content)[0] == task


@pytest.mark.parametrize("name", ["Task09_Spleen", "Spleens"])
@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"modality": None}, "'modality' must be an object .*, not None"),
        ({"modality": "CT"}, "'modality' must be an object .*, not 'CT'"),
        ({"modality": {}}, "'modality' must be an object .*, not {}"),
        ({"modality": {"1": "CT"}}, r"keys of 'modality' .* \"0\" to \"0\", not \['1'\]"),
        ({"labels": ["background", "spleen"]}, r"'labels' must be an object .*, not \['background', 'spleen'\]"),
        ({"labels": {"0": "background", "2": "spleen"}}, r"keys of 'labels' .* \"0\" to \"1\", not \['0', '2'\]"),
        ({"labels": {"00": "background", "1": "spleen"}}, r"keys of 'labels' .*, not \['00', '1'\]"),
        ({"channel_names": {"1": "CT"}}, r"keys of 'channel_names' .* \"0\" to \"0\", not \['1'\]"),
        ({"channel_names": "CT"}, "'channel_names' must be an object .*, not 'CT'"),
        ({"labels": {"background": "0", "spleen": "1"}}, r"keys of 'labels' .*'spleen'\]: write .*\"tumour\": 1}"),
        ({"labels": {"background": 0, "spleen": 2}}, r"numbers of 'labels' must be 0 to 1, each once, not \[0, 2\]"),
        ({"labels": {"b": 0, "c": 1, "d": 1}}, r"numbers of 'labels' must be 0 to 2, each once, not \[0, 1, 1\]"),
        ({"labels": {"background": 0, "spleen": 1.0}}, r"numbers of 'labels' .*, not \[0, 1.0\]"),
        ({"labels": {"background": False, "spleen": True}}, r"numbers of 'labels' .*, not \[False, True\]"),
        ({"labels": {"background": 0, "spleen": "1"}}, r"numbers of 'labels' .*, not \[0, '1'\]: write"),
        ({"labels": {"background": 0}}, "'labels' names only 'background'; .* at least one more"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": [2]}}, r"regions, .* \(whole, core\), .* one number"),
        ({"labels": {"background": 0, "spleen": 1, "ignore": 2}}, "'ignore' label, which is not supported: every"),
        ({"labels": {f"part {number}": number for number in range(256)}}, "256 values; at most 255, .*: merge classes"),
        ({"labels": {"0": "background", "1": "lung", "2": "lung"}}, "two classes one name .*lung, lung"),
        ({"modality": ...}, "has no 'modality'"),
        ({"labels": ...}, "has no 'labels'"),
    ],
)
@pytest.mark.fault("malformed JSON, missing keys, wrong types")
def test_a_description_that_is_no_task_is_refused(tmp_path, name, changes, fault):
    content = {key: value for key, value in {**CT_SPLEEN, **changes}.items() if value is not ...}
    assert re.search(rf"my\.json.* {fault}", refusal(tmp_path / name, content))


def test_where_a_dataset_comes_from_is_told_as_it_says_it(tmp_path):
    content = {**CT_SPLEEN, "licence": "CC-BY-SA 4.0", "reference": "Somewhere", "release": 1.0}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    expected = {"licence": "CC-BY-SA 4.0", "reference": "Somewhere", "channels": ["CT"]}
    expected |= {key: content[key] for key in ("name", "description") if key in content}
    assert formats.provenance(tmp_path) == expected


# JSON


def test_json_is_read_as_utf_8(tmp_path):
    (tmp_path / "dataset.json").write_text('{"name": "Überprüfung"}', encoding="utf-8")
    assert read_json(tmp_path / "dataset.json") == {"name": "Überprüfung"}
    (tmp_path / "dataset.json").write_text('{"name": "Überprüfung"}', encoding="utf-8-sig")  # as Windows' editors do
    assert read_json(tmp_path / "dataset.json") == {"name": "Überprüfung"}


@pytest.mark.parametrize(
    ("root", "description", "meant"),
    [
        ("data/Task/dataset.json", None, "--root data/Task"),
        ("data/Task/fold.json", None, "--root data/Task --json data/Task/fold.json"),
        ("data/Task/imagesTr", None, "--root data/Task"),
        ("data/Task/imagesTr/a.nii.gz", None, "--root data/Task"),
        ("data", None, "--root data/Task"),
        ("data/task", None, "--root data/Task"),
        ("data/Other", None, "--json data/Other/list.json"),
        ("data/Task", "fold.json", "--json data/Task/fold.json"),
        ("data/Empty", None, None),
        ("nowhere", None, None),
        ("data/Task", "none.json", None),
    ],
)
def test_a_root_that_is_none_is_refused_with_the_one_that_is_probably_meant(
    tmp_path, monkeypatch, root, description, meant
):
    monkeypatch.chdir(tmp_path)
    touch(Path("data/Task"), "dataset.json", "fold.json", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    touch(Path("data"), "Other/list.json")
    Path("data/Empty").mkdir()
    with pytest.raises(UserError) as refusal:
        formats.read_dataset(root, description)
    said = str(refusal.value)
    assert said.startswith(f"--json {description} " if description else (f"--root {root} ", f"{root}/dataset.json "))
    if meant is None:
        assert "does not exist" in said and "give" in said and "did you mean" not in said
    else:
        assert said.endswith((f": did you mean {meant}?", f": give the dataset's folder, {meant}"))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "does not exist: .* --json, .* --root"),
        (b'{\n  "labels": {"0": "background",}\n}', "is not valid JSON at line 2, column 3[0-9]: "),
        (b'{"name": "cut', "is not valid JSON at line 1, column 10: Unterminated string"),
        (b"", "is not valid JSON at line 1, column 1: "),
        (b"[1, 2]", "holds a list where a dataset description"),
        (b'"Task09_Spleen"', "holds a str where a dataset description"),
        (b'{"name": "\xff\xfe"}', "cannot be read as a dataset description: .*utf-8"),
        (b"[" * 100_000, "cannot be read as a dataset description: .*recursion"),
        (b'{"numTraining": ' + b"9" * 5000 + b"}", "cannot be read as a dataset description: .*digits"),
        ("a folder", "cannot be read as a dataset description"),
    ],
    ids=["missing", "comma", "cut", "empty", "list", "string", "not UTF-8", "nested", "endless number", "folder"],
)
@pytest.mark.fault("malformed JSON, missing keys, wrong types")
def test_json_that_cannot_be_read_is_refused(tmp_path, content, fault):
    file = tmp_path / "dataset.json"
    if content == "a folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} {fault}"):
        read_json(file)


def test_images_and_labels_without_a_description_are_refused_with_one_to_write(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    with pytest.raises(UserError, match=r"dataset.json does not exist: write one, such as (\{.*\}) for") as refusal:
        formats.read_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text(re.search(r"such as (\{.*\}) for", str(refusal.value))[1])
    task, (case,) = formats.read_dataset(tmp_path)
    assert task.class_names == ("background", "tumour") and Path(case.images[0]).name == "a_0000.nii.gz"


# Lists of cases (MSD)


def test_a_list_of_cases(root):
    touch(root, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "b_image.nii", "b_label.nii")
    entries = ("./imagesTr/a.nii.gz", "imagesTr/../labelsTr/a.nii.gz"), (f"{root}/b_image.nii", "b_label.nii")
    _, cases = read(root, {**MSD, **listing(*entries)})
    assert told(cases) == [
        ("a", (f"{root}/imagesTr/a.nii.gz",), f"{root}/imagesTr/../labelsTr/a.nii.gz"),
        ("b_image", (f"{root}/b_image.nii",), f"{root}/b_label.nii"),
    ]
    assert cases[0].files == (*cases[0].images, cases[0].label)
    assert ListedCase("a", ("a.nii", "b.nii")).files == ("a.nii", "b.nii")


@pytest.mark.parametrize(
    ("images", "name"),
    [
        (["a_0000.nii.gz", "a_0001.nii.gz"], "a"),
        (["a_t2.nii.gz", "a_adc.nii.gz"], "a_t2"),
        (["a_0000.nii.gz"], "a_0000"),  # one file that holds both channels
        ("a_0000.nii.gz", "a_0000"),
    ],
)
def test_an_entry_names_one_file_or_one_a_channel(root, images, name):
    files = [images] if isinstance(images, str) else images
    touch(root, "label.nii.gz", *files)
    _, cases = read(root, {**MSD, **listing((images, "label.nii.gz"))})
    assert told(cases) == [(name, tuple(f"{root}/{file}" for file in files), f"{root}/label.nii.gz")]


@pytest.mark.parametrize("count", [3, 4])
def test_files_and_channels_that_do_not_match(root, count):
    images = [f"a{channel}.nii.gz" for channel in range(count)]
    touch(root, "good.nii.gz", "good_label.nii.gz", "label.nii.gz", *images)
    message = refusal(root, {**MSD, **listing(("good.nii.gz", "good_label.nii.gz"), (images, "label.nii.gz"))})
    assert f"entry 1 of 'training' has {count} image files for 2 channels (T2, ADC): list one a channel" in message


def test_paths_are_absolute_though_root_is_not(root, monkeypatch):
    touch(root, "a.nii.gz", "b.nii.gz")
    monkeypatch.chdir(root.parent)
    for relative in (Path("data"), Path("./data/")):
        _, (case,) = read(relative, {**MSD, **listing(("a.nii.gz", "b.nii.gz"))})
        assert case.files == (f"{root}/a.nii.gz", f"{root}/b.nii.gz")


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ({"validation": [], "test": [1]}, ["'training'", "--json_key", "validation, test"]),
        ({"name": "x"}, ["'training'", "--json_key", "none"]),
        ({"training": {"image": "a"}}, ["'training'", "--json_key"]),
        ({**NNUNET, "training": []}, ["'training'", "--json_key"]),
        ({"training": ["a.nii.gz"]}, ["entry 0 of 'training'", "'image' and 'label'", "'a.nii.gz'"]),
        ({"training": [{"image": "a.nii.gz"}]}, ["entry 0 of 'training'", "'label'"]),
        ({"training": [{"label": "a.nii.gz"}]}, ["entry 0 of 'training'", "'image'"]),
        ({"training": [{"image": "a.nii", "label": ["c.nii"]}]}, ["entry 0 of 'training'", "['c.nii']"]),
        ({"training": [{"image": "a", "label": "b"}, {"image": 3, "label": "c"}]}, ["entry 1 of 'training'", "3"]),
        ({"training": [{"image": ["a", 3], "label": "c"}]}, ["entry 0 of 'training'", "['a', 3]"]),
        ({"training": [{"image": [], "label": "c"}]}, ["entry 0 of 'training'", "[]"]),
        ({"training": [{"image": {"0": "a"}, "label": "c"}]}, ["entry 0 of 'training'", "{'0': 'a'}"]),
    ],
)
@pytest.mark.fault("malformed JSON, missing keys, wrong types")
def test_a_malformed_case_list_is_named(root, description, expected):
    message = refusal(root, {**MSD, **description})
    assert all(part in message for part in expected), message


def test_the_key_that_nnunets_folders_answer_to_is_named(root):
    message = refusal(root, NNUNET, key="mine")
    assert "no cases under 'mine': give --json_key (lists in the file: training)" in message


# nnU-Net v2


def touch_nnunet(root: Path, *cases: str, ending: str = ".nii.gz") -> None:
    for case in cases:
        touch(root, f"labelsTr/{case}{ending}", *(f"imagesTr/{case}_000{channel}{ending}" for channel in range(2)))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", None])
def test_nnunets_folders(root, ending):
    content = {**NNUNET, "file_ending": ending}
    if ending is None:
        content.pop("file_ending")
        ending = ".nii.gz"
    touch_nnunet(root, "b_1", "b", "a", ending=ending)
    # Other files are none of its business, nor what macOS leaves behind.
    touch(root, "imagesTs/c_0000.nii.gz", "labelsTr/notes.txt", "labelsTr/._a.nii.gz", "imagesTr/._a_0000.nii.gz")
    _, cases = read(root, content)
    assert [case.name for case in cases] == ["a", "b", "b_1"]
    images = (f"{root}/imagesTr/a_0000{ending}", f"{root}/imagesTr/a_0001{ending}")
    assert told(cases[:1]) == [("a", images, f"{root}/labelsTr/a{ending}")]


def test_channels_from_the_tenth_on(root):
    channels = {str(channel): f"c{channel}" for channel in range(12)}
    touch(root, "labelsTr/a.nii.gz", *(f"imagesTr/a_{channel:04d}.nii.gz" for channel in range(12)))
    _, (case,) = read(root, {**NNUNET, "channel_names": channels})
    assert case.images[2].endswith("a_0002.nii.gz") and case.images[11].endswith("a_0011.nii.gz")


def test_nnunets_dataset_object(root):
    touch(root, "x/1.nii.gz", "x/2.nii.gz", "y.nii", "labelsTr/other.nii.gz")
    entry = {"images": ["x/1.nii.gz", "x/2.nii.gz"], "label": "y.nii"}
    task, cases = read(root, {**NNUNET, "dataset": {"case 7": entry}})
    assert task.channel_files and told(cases) == [
        ("case 7", (f"{root}/x/1.nii.gz", f"{root}/x/2.nii.gz"), f"{root}/y.nii")
    ]


@pytest.mark.parametrize("key", ["training", "mine"])
def test_a_list_of_cases_comes_before_nnunets_folders(root, key):
    touch_nnunet(root, "a")
    touch(root, "b.nii", "b_label.nii")
    task, (case,) = read(root, {**NNUNET, key: listing(("b.nii", "b_label.nii"))["training"]}, key=key)
    assert case.name == "b" and not task.channel_files


@pytest.mark.parametrize("ending", [".png", ".nrrd", "nii.gz", "", None, [".nii"]])
def test_nnunets_other_files_are_to_be_converted(root, ending):
    touch_nnunet(root, "a", ending=ending if isinstance(ending, str) else ".nii")
    assert f"'file_ending' is {ending!r}: convert" in refusal(root, {**NNUNET, "file_ending": ending})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], ["labelsTr cannot be read (No such file or directory)", "--root"]),
        (["labelsTr"], ["labelsTr cannot be read (Not a directory)", "--root"]),
        (["labelsTr/a.nii", "imagesTr/a_0000.nii"], ["labelsTr has no .nii.gz file", "'file_ending'", "--root"]),
        (["labelsTr/a.nii.gz"], ["imagesTr cannot be read (No such file or directory)"]),
        (["labelsTr/a.nii.gz", "imagesTr/a_0000.nii.gz"], ["1 of the 3 files", "imagesTr/a_0001.nii.gz"]),
        (
            ["labelsTr/a.nii.gz", "imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz"],
            ["2 files in", "imagesTr are not <case>_0000 to <case>_0001", "b_0000.nii.gz: add its label"],
        ),
        (
            ["labelsTr/a.nii.gz", *(f"imagesTr/a_000{channel}.nii.gz" for channel in range(3))],
            ["1 files in", "a_0002.nii.gz"],
        ),
        (["labelsTr/a.nii.gz", "imagesTr/a.nii.gz"], ["1 files in", "for example a.nii.gz"]),
    ],
)
@pytest.mark.fault("missing files")
def test_what_nnunets_folders_lack_is_told(root, files, expected):
    touch(root, *files)
    message = refusal(root, NNUNET)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ({}, "'dataset' must be an object such as"),
        ("BraTS", "'dataset' must be an object such as .* not 'BraTS'"),
        ({"a": None}, "case 'a' of 'dataset' needs the paths 'images' and 'label', and is None"),
        ({"a": {"images": ["0.nii", "1.nii"]}}, "case 'a' of 'dataset' needs the paths 'images' and 'label'"),
        ({"a": {"image": "0.nii", "label": "l.nii"}}, "case 'a' of 'dataset' needs the paths 'images' and 'label'"),
        ({"a": {"images": ["0.nii"], "label": "l.nii"}}, "case 'a' of 'dataset' has 1 image files for 2 channels"),
        ({"a": {"images": "0.nii", "label": "l.nii"}}, "case 'a' of 'dataset' has 1 image files for 2 channels"),
        ({"a": {"images": ["0.nii", "2.nii"], "label": "l.nii"}}, "1 of the 3 files .* are not under --root .*/2.nii"),
        ({"a": {"images": ["0.nii", "1.nii"], "label": "l.png"}}, "1 of the 3 files .* do not end in .nii .*/l.png"),
        ({"a": {"images": ["0.nii", "1.nii"], "label": "../outside.nii.gz"}}, "1 of the 3 files .* outside --root"),
        (
            {name: {"images": [f"{name}.nii", "1.nii"], "label": f"{name}.nii.gz"} for name in "01"},
            "an image of case '0' of 'dataset' and an image of case '1' of 'dataset' are one file",
        ),
        *(
            ({name: {"images": ["0.nii", "1.nii"], "label": "l.nii"}}, "a name that no file can have: rename it")
            for name in ("", "../a", "a/b", "..", "a/", ".a")
        ),
    ],
)
@pytest.mark.fault("malformed JSON, missing keys, wrong types")
def test_a_dataset_object_that_is_refused(root, dataset, expected):
    touch(root, "0.nii", "1.nii", "l.nii", "l.png", "0.nii.gz", "1.nii.gz", "../outside.nii.gz")
    assert re.search(expected, refusal(root, {**NNUNET, "dataset": dataset}))


# A third form


def test_another_form_is_one_more_entry_of_the_table(root, monkeypatch):
    """Read a dataset whose description has ``"volumes": {image: label}``; the other forms stay as they were."""

    def cases_of_pairs(description: Description) -> list[ListedCase]:
        root, pairs = description.root, description.content["volumes"].items()
        return [ListedCase(Path(image).stem, (f"{root}/{image}",), f"{root}/{label}") for image, label in pairs]

    make_case(root / "case")
    description = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "organ", "2": "lesion"}}
    content = {**description, "volumes": {"case/image.nii.gz": "case/label.nii.gz"}}
    assert "no cases under 'training'" in refusal(root, content)
    monkeypatch.setattr(formats, "FORMS", (Form(lambda d: "volumes" in d.content, cases_of_pairs), *formats.FORMS))
    dataset = open_dataset(root, root.parent / "my.json")
    assert dataset.task.class_names == TASK.class_names and dataset.measured.num_cases == 1
    assert [np.prod(case.shape) for case in dataset.cases] == [8000]
    touch(root, "a.nii", "b.nii")
    assert len(read(root, {**description, **listing(("a.nii", "b.nii"))})[1]) == 1
    content["volumes"] = {"none.nii": "case/label.nii.gz"}
    assert "1 of the 2 files" in refusal(root, content)  # what is asked of files holds for those of any form
