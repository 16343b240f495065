"""A dataset.json in either form, or a third one: its task, its cases, and refusals by name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from toys import touch

from dints.data import formats
from dints.data.formats import Description, Form, read_dataset, read_json
from dints.data.listing import Case
from dints.data.tasks import TASKS, Task
from dints.errors import UserError

MSD = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "x"}}
NNUNET = {
    "channel_names": {"0": "T2", "1": "ADC"},
    "labels": {"background": 0, "x": 1},
    "file_ending": ".nii.gz",
}
CT_SPLEEN = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"}}
MALFORMED = pytest.mark.fault("malformed JSON, missing keys, wrong types")


def listing(*entries: object) -> dict:
    """Make a list of cases, each an entry or a pair of image and label."""
    keys = "image", "label"
    pairs = [dict(zip(keys, e, strict=True)) if isinstance(e, tuple) else e for e in entries]
    return {"training": pairs}


def msd(modality: dict, labels: dict) -> dict:
    return {"modality": modality, "labels": labels, **listing(("a.nii.gz", "b.nii.gz"))}


def nnunet(channels: dict, labels: dict) -> dict:
    return {"channel_names": channels, "labels": labels, "numTraining": 2}


def read(root: Path, content: dict, **options: object) -> tuple[Task, list[Case]]:
    source = root.parent / "my.json"
    source.write_text(json.dumps(content))
    return read_dataset(root, source, **options)


def files_of(cases: list[Case]) -> list[tuple]:
    """Return names, images and labels; the place where a case is listed is for messages."""
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


def unknown(
    name: str, modality: str, channels: int, classes: tuple[str, ...], files: bool = False
) -> Task:
    """Make a task whose spacing and window the table does not have."""
    return Task(name, modality, channels, classes, None, None, (96, 96, 96), files)


PROSTATE = TASKS["Task05_Prostate"]
BONE, B_X = ("background", "bone"), {"0": "b", "1": "x"}
PAIR = (["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"], "b.nii.gz")
READ_TASKS = [
    (msd(**CT_SPLEEN), TASKS["Task09_Spleen"]),
    # The file says what is in the images; the table how to look at them.
    (
        msd({"1": "CT", "0": "CT"}, {"0": "background", "1": "pancreas"}),
        replace(TASKS["Task07_Pancreas"], num_channels=2, class_names=("background", "pancreas")),
    ),
    (msd({"0": "CT", "1": "PET"}, B_X), unknown("PET-CT", "MRI", 2, ("b", "x"))),
    # nnU-Net v2: numbers of names, in any order; the one with 0 is the background.
    (
        nnunet({"1": "ADC", "0": "T2"}, {"background": 0, "TZ": 2, "PZ": 1}),
        replace(PROSTATE, channel_files=True),
    ),
    # The forms mix: labels of either with channels of either, and a list with either.
    (
        {**nnunet({"0": "CT"}, {"0": "background", "1": "bone"}), "modality": "PET"},
        unknown("Mixed", "CT", 1, BONE, True),
    ),
    ({**MSD, **listing(PAIR)}, unknown("A file a channel", "MRI", 2, ("background", "x"), True)),
]


@pytest.mark.parametrize(("content", "task"), READ_TASKS, ids=[task.name for _, task in READ_TASKS])
def test_the_task_of_a_dataset(tmp_path, content, task):
    root = tmp_path / task.name
    images = [f"imagesTr/a_{channel:04d}.nii.gz" for channel in range(task.num_channels)]
    touch(root, "a.nii.gz", "b.nii.gz", "labelsTr/a.nii.gz", *images)
    assert read(root, content)[0] == task


OBJECT = {"images": ["0.nii", "1.nii"], "label": "l.nii"}
REFUSED = [
    (CT_SPLEEN, {"modality": None}, "'modality' must be an object .*, not None"),
    (CT_SPLEEN, {"labels": {"0": "a", "2": "b"}}, r"\"0\" to \"1\", not \['0', '2'\]"),
    (CT_SPLEEN, {"labels": {"b": "0", "c": "1"}}, r"keys of 'labels' .*: write .*\"tumour\""),
    (CT_SPLEEN, {"labels": {"b": 0, "c": 1, "d": 1}}, r"0 to 2, each once, not \[0, 1, 1\]"),
    (CT_SPLEEN, {"labels": {"b": 0, "c": True}}, r"0 to 1, each once, not \[0, True\]"),
    (CT_SPLEEN, {"labels": {"b": 0}}, "'labels' names only 'b'; .* at least one more"),
    (CT_SPLEEN, {"labels": {"b": 0, "whole": [1, 2], "core": [2]}}, r"regions, .*whole, core"),
    (CT_SPLEEN, {"labels": {"b": 0, "ignore": 1}}, "'ignore' label, which is not supported"),
    (CT_SPLEEN, {"labels": {f"{n}": f"{n}" for n in range(256)}}, "256 values; .*: merge classes"),
    (CT_SPLEEN, {"labels": {"0": "b", "1": "l", "2": "l"}}, "two classes one name .b, l, l"),
    (CT_SPLEEN, {"labels": ...}, "has no 'labels'"),
    (MSD, {"validation": [], "test": [1]}, "'training': give --json_key .*validation, test"),
    (MSD, {"training": ["a.nii"]}, "entry 0 of 'training' .*'image' and 'label'.*'a.nii'"),
    (MSD, {"training": [{"image": [], "label": "c"}]}, r"entry 0 of 'training' .*\[\]"),
    (MSD, listing(("a", "b"), {"image": 3, "label": "c"}), "entry 1 of 'training' .*3"),
    (MSD, listing((["a.nii"] * 3, "c")), r"entry 0 .* 3 image files for 2 channels \(T2, ADC\)"),
    (NNUNET, {"dataset": {}}, "'dataset' must be an object such as"),
    (NNUNET, {"dataset": {"a": None}}, "case 'a' of 'dataset' .* 'images' and .*, and is None"),
    (NNUNET, {"dataset": {"": OBJECT}}, "no file can have: rename"),
    (NNUNET, {"dataset": {"../a": OBJECT}}, "no file can have: rename"),
    (NNUNET, {"file_ending": ".nrrd"}, "'file_ending' is '.nrrd': convert"),
]


@pytest.mark.parametrize(("content", "changes", "fault"), REFUSED)
@MALFORMED
def test_a_malformed_description_is_refused(root, content, changes, fault):
    touch(root, "0.nii", "1.nii", "l.nii")
    content = {key: value for key, value in {**content, **changes}.items() if value is not ...}
    assert re.search(rf"my\.json.* {fault}", refusal(root, content))


def test_a_datasets_origin_is_given_as_it_says_it(tmp_path):
    content = {**CT_SPLEEN, "licence": "CC-BY-SA 4.0", "reference": "Somewhere", "release": 1.0}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    expected = {"licence": "CC-BY-SA 4.0", "reference": "Somewhere", "channels": ["CT"]}
    assert formats.provenance(tmp_path) == expected


# JSON


def test_json_is_read_as_utf_8(tmp_path):
    """Also with the mark that Windows' editors write."""
    (tmp_path / "dataset.json").write_text('{"name": "Überprüfung"}', encoding="utf-8-sig")
    assert read_json(tmp_path / "dataset.json") == {"name": "Überprüfung"}


@pytest.mark.parametrize(
    ("root", "description", "meant"),
    [
        ("data/Task/dataset.json", None, "is a file: give the dataset's folder"),
        ("data/None", None, "give the dataset's folder"),
        ("data", None, "did you mean --root data/Task?"),
        ("data/Plain", None, "labelsTr/<case>.nii.gz (docs/data.md)"),
        ("data/Task", "none.json", "or another description with --json"),
    ],
)
def test_a_wrong_root_is_refused_with_the_remedy(tmp_path, monkeypatch, root, description, meant):
    monkeypatch.chdir(tmp_path)
    touch(Path("data/Task"), "dataset.json")
    touch(Path("data/Plain"), "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    with pytest.raises(UserError) as refused:
        read_dataset(root, description)
    assert str(refused.value).endswith(meant)
    assert str(refused.value).startswith((f"--root {root} ", f"{root}/dataset.json ", "none.json "))
    example = re.search(r"such as (\{.*\}) for", str(refused.value))
    if example:  # it works
        Path(root, "dataset.json").write_text(example[1])
        assert read_dataset(root)[0].class_names == ("background", "tumour")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{\n  "labels": {"0": "background",}\n}', "is not valid JSON at line 2, column 3[0-9]: "),
        (b"[1, 2]", "holds a list where a dataset description"),
        (b'{"name": "\xff\xfe"}', "cannot be read as a dataset description: .*utf-8"),
        (b"[" * 100_000, "cannot be read as a dataset description: .*recursion"),
        ("a folder", "cannot be read as a dataset description"),
    ],
    ids=["comma", "list", "not UTF-8", "nested", "folder"],
)
@MALFORMED
def test_json_that_cannot_be_read_is_refused(tmp_path, content, fault):
    file = tmp_path / "dataset.json"
    with pytest.raises(UserError, match=f"{file} does not exist: .* --json, .* --root"):
        read_json(file)
    file.mkdir() if content == "a folder" else file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} {fault}"):
        read_json(file)


# Lists of cases (MSD)


def test_a_list_of_cases(root, monkeypatch):
    touch(root, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "b_image.nii", "b_label.nii")
    first = "./imagesTr/a.nii.gz", "imagesTr/../labelsTr/a.nii.gz"
    content = {**MSD, **listing(first, (f"{root}/b_image.nii", "b_label.nii"))}
    monkeypatch.chdir(root.parent)
    for given in (root, Path("data"), Path("./data/")):  # paths are absolute though it is not
        _, cases = read(given, content)
        assert files_of(cases) == [
            ("a", (f"{root}/imagesTr/a.nii.gz",), f"{root}/imagesTr/../labelsTr/a.nii.gz"),
            ("b_image", (f"{root}/b_image.nii",), f"{root}/b_label.nii"),
        ]
    channels = ["x_0000.nii", "x_0001.nii"]
    touch(root, *channels)
    _, (case,) = read(root, {**MSD, **listing((channels, "b_label.nii"))})
    paths = tuple(f"{root}/{file}" for file in channels)
    assert files_of([case]) == [("x", paths, f"{root}/b_label.nii")]


# nnU-Net v2


@pytest.mark.parametrize("ending", [".nii", None])
def test_nnunets_folders(root, ending):
    content = {**NNUNET, "file_ending": ending}
    if ending is None:
        content.pop("file_ending")
        ending = ".nii.gz"
    for case in ("b_1", "b", "a"):
        images = [f"imagesTr/{case}_000{channel}{ending}" for channel in range(2)]
        touch(root, f"labelsTr/{case}{ending}", *images)
    # Other files are none of its business, nor those that macOS leaves behind.
    touch(root, "imagesTs/c_0000.nii.gz", "labelsTr/notes.txt", "labelsTr/._a.nii.gz")
    _, cases = read(root, content)
    assert [case.name for case in cases] == ["a", "b", "b_1"]
    images = (f"{root}/imagesTr/a_0000{ending}", f"{root}/imagesTr/a_0001{ending}")
    assert files_of(cases[:1]) == [("a", images, f"{root}/labelsTr/a{ending}")]
    says = "no cases under 'mine': give --json_key (lists in the file: training)"
    assert says in refusal(root, content, key="mine")
    touch(root, "b.nii", "b_label.nii")
    for key in ("training", "mine"):  # a list comes before folders
        content[key] = listing(("b.nii", "b_label.nii"))["training"]
        task, (case,) = read(root, content, key=key)
        assert case.name == "b" and not task.channel_files


def test_nnunets_dataset_object(root):
    touch(root, "x/1.nii.gz", "x/2.nii.gz", "y.nii", "labelsTr/other.nii.gz")
    entry = {"images": ["x/1.nii.gz", "x/2.nii.gz"], "label": "y.nii"}
    task, cases = read(root, {**NNUNET, "dataset": {"case 7": entry}})
    images = f"{root}/x/1.nii.gz", f"{root}/x/2.nii.gz"
    assert task.channel_files and files_of(cases) == [("case 7", images, f"{root}/y.nii")]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("", r"labelsTr cannot be read \(No such file or directory\).* --root"),
        ("labelsTr/a.nii imagesTr/a_0000.nii", "labelsTr has no .nii.gz file.* 'file_ending'"),
        ("labelsTr/a.nii.gz imagesTr/a_0000.nii.gz", "1 of the 3 files .*imagesTr/a_0001.nii.gz"),
        (
            "labelsTr/a.nii.gz imagesTr/b_0000.nii.gz imagesTr/b_0001.nii.gz",
            "2 files in .*imagesTr are not <case>_0000 to <case>_0001.* b_0000.nii.gz: add its",
        ),
    ],
)
@pytest.mark.fault("missing files")
def test_incomplete_folders_of_nnunet_are_refused(root, files, expected):
    touch(root, *files.split())
    assert re.search(expected, refusal(root, NNUNET))


# A third form


def test_another_form_is_one_more_entry_of_the_table(root, monkeypatch):
    """Read a dataset whose description has ``"volumes": {image: label}``; the others stay."""

    def cases_of_pairs(description: Description) -> list[Case]:
        root, pairs = description.root, description.content["volumes"].items()
        return [Case(image, (f"{root}/{image}",), f"{root}/{label}") for image, label in pairs]

    touch(root, "a.nii", "b.nii")
    content = {**CT_SPLEEN, "volumes": {"a.nii": "b.nii"}}
    assert "no cases under 'training'" in refusal(root, content)
    form = Form(lambda described: "volumes" in described.content, cases_of_pairs)
    monkeypatch.setattr(formats, "FORMS", (form, *formats.FORMS))
    assert files_of(read(root, content)[1]) == [("a.nii", (f"{root}/a.nii",), f"{root}/b.nii")]
    assert len(read(root, {**CT_SPLEEN, **listing(("a.nii", "b.nii"))})[1]) == 1
    content["volumes"] = {"none.nii": "b.nii"}
    assert "1 of the 2 files" in refusal(root, content)  # files of any form are checked
