"""dints/tasks.py: the Decathlon's facts, and tasks read from a dataset.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dints.errors import UserError
from dints.tasks import (
    ARCHIVE_URL,
    ARCHIVES,
    TASKS,
    Task,
    channel_names,
    has_channel_files,
    read_json,
    task_of_dataset,
)

# Section 6 of DESIGN, typed again. Z, the z-score, is None here, and so is the spacing where nothing is resampled.
ISOTROPIC, CUBE = (1.0, 1.0, 1.0), (96, 96, 96)
MSD = {
    "Task01_BrainTumour": ("MRI", 4, 4, 484, 266, None, None, CUBE, "240a19d752f0d9e9101544901065d872"),
    "Task02_Heart": ("MRI", 1, 2, 20, 10, None, ISOTROPIC, CUBE, "06ee59366e1e5124267b774dbd654057"),
    "Task03_Liver": ("CT", 1, 3, 131, 70, (-21, 189), ISOTROPIC, CUBE, "a90ec6c4aa7f6a3d087205e23d4e6397"),
    "Task04_Hippocampus": ("MRI", 1, 3, 260, 130, None, None, (32, 32, 32), "9d24dba78a72977dbd1d2e110310f31b"),
    "Task05_Prostate": ("MRI", 2, 3, 32, 16, None, ISOTROPIC, (96, 96, 32), "35138f08b1efaef89d7424d2bcc928db"),
    "Task06_Lung": ("CT", 1, 2, 63, 32, (-1000, 1000), ISOTROPIC, CUBE, "8afd997733c7fc0432f71255ba4e52dc"),
    "Task07_Pancreas": ("CT", 1, 3, 281, 139, (-87, 199), ISOTROPIC, CUBE, "4f7080cfca169fa8066d17ce6eb061e4"),
    "Task08_HepaticVessel": ("CT", 1, 3, 303, 139, (0, 230), ISOTROPIC, CUBE, "641d79e80ec66453921d997fbf12a29c"),
    "Task09_Spleen": ("CT", 1, 2, 41, 20, (-125, 275), ISOTROPIC, CUBE, "410d4a301da4e5b2f6f86ec3ddba524e"),
    "Task10_Colon": ("CT", 1, 2, 126, 64, (-57, 175), ISOTROPIC, CUBE, "bad7a188931dc2f6acf72b08eb6202d0"),
}


@pytest.mark.parametrize("name", MSD)
def test_the_decathlons_facts(name):
    modality, channels, classes, num_training, num_test, intensity, spacing, patch_size, md5 = MSD[name]
    task, archive = TASKS[name], ARCHIVES[name]
    assert (task.name, task.modality, task.num_channels, task.num_classes) == (name, modality, channels, classes)
    assert (task.intensity, task.spacing, task.patch_size) == (intensity, spacing, patch_size)
    assert (archive.num_training, archive.num_test, archive.md5) == (num_training, num_test, md5)
    assert task.class_names[0] == "background" and len(set(task.class_names)) == classes


def test_the_table_is_the_decathlon_and_the_phantom():
    assert ARCHIVES.keys() == MSD.keys()
    assert TASKS.keys() == {*MSD, "Task00_Phantom"}
    assert ARCHIVE_URL.format(task="Task09_Spleen") == (
        "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task09_Spleen.tar"
    )


@pytest.mark.parametrize("name", TASKS)
def test_plain_values_and_back(name):
    values = TASKS[name].to_dict()
    assert json.loads(json.dumps(values)) == values
    assert Task.from_dict(values) == TASKS[name]


def test_channel_files_are_kept_and_absent_from_older_model_files():
    task = replace(TASKS["Task05_Prostate"], channel_files=True)
    values = task.to_dict()
    assert values["channel_files"] is True and Task.from_dict(values) == task
    del values["channel_files"]
    assert Task.from_dict(values) == TASKS["Task05_Prostate"]


def description(modality: object, labels: object) -> dict:
    return {"modality": modality, "labels": labels, "training": []}


def nnunet(channels: object, labels: object) -> dict:
    return {"channel_names": channels, "labels": labels, "numTraining": 2, "file_ending": ".nii.gz"}


def measured(
    name: str, modality: str, num_channels: int, classes: tuple[str, ...], channel_files: bool = False
) -> Task:
    """A task whose spacing and window the table does not know."""
    return Task(name, modality, num_channels, classes, None, None, (96, 96, 96), channel_files)


CT_SPLEEN = description({"0": "CT"}, {"0": "background", "1": "spleen"})
ORGANS = ("background", *(f"organ {number}" for number in range(1, 13)))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("Task09_Spleen", CT_SPLEEN, TASKS["Task09_Spleen"]),
        (
            "Task05_Prostate",
            description({"0": "T2", "1": "ADC"}, {"0": "background", "1": "PZ", "2": "TZ"}),
            TASKS["Task05_Prostate"],
        ),
        # The file says what is in the images; the table how to look at them.
        (
            "Task07_Pancreas",
            description({"1": "CT", "0": "CT"}, {"0": "background", "1": "pancreas"}),
            replace(TASKS["Task07_Pancreas"], num_channels=2, class_names=("background", "pancreas")),
        ),
        ("Spleens", CT_SPLEEN, measured("Spleens", "CT", 1, ("background", "spleen"))),
        (
            "Lowercase",
            description({"0": "ct"}, {"0": "background", "1": "bone"}),
            measured("Lowercase", "CT", 1, ("background", "bone")),
        ),
        (
            "Brains",
            description({"0": "T1", "1": "FLAIR"}, {"1": "tumour", "0": "background"}),
            measured("Brains", "MRI", 2, ("background", "tumour")),
        ),
        (
            "PET-CT",
            description({"0": "CT", "1": "PET"}, {"0": "b", "1": "x"}),
            measured("PET-CT", "MRI", 2, ("b", "x")),
        ),
        ("Phases", description({"0": "CT", "1": "Ct"}, {"0": "b", "1": "x"}), measured("Phases", "CT", 2, ("b", "x"))),
        (
            "Organs",
            description({"0": "MRI"}, {str(number): name for number, name in enumerate(ORGANS)}),
            measured("Organs", "MRI", 1, ORGANS),
        ),
        # nnU-Net v2: numbers of names, in any order; whatever has 0 is the background.
        (
            "Dataset009_Spleen",
            nnunet({"0": "CT"}, {"spleen": 1, "air": 0}),
            measured("Dataset009_Spleen", "CT", 1, ("air", "spleen"), True),
        ),
        (
            "Dataset005_Prostate",
            nnunet({"1": "ADC", "0": "T2"}, {"background": 0, "TZ": 2, "PZ": 1}),
            measured("Dataset005_Prostate", "MRI", 2, ("background", "PZ", "TZ"), True),
        ),
        (
            "Task05_Prostate",
            nnunet({"0": "T2", "1": "ADC"}, {"background": 0, "PZ": 1, "TZ": 2}),
            replace(TASKS["Task05_Prostate"], channel_files=True),
        ),
        # The forms mix: labels of either with channels of either; a list of cases means one file a case.
        (
            "Mixed",
            nnunet({"0": "CT"}, {"0": "background", "1": "bone"}),
            measured("Mixed", "CT", 1, ("background", "bone"), True),
        ),
        (
            "Listed",
            {**nnunet({"0": "CT"}, {"background": 0, "bone": 1}), "training": []},
            measured("Listed", "CT", 1, ("background", "bone")),
        ),
        (
            "Numbers",
            description({"0": "MRI"}, {"background": 0, "0": 1}),
            measured("Numbers", "MRI", 1, ("background", "0")),
        ),
        (
            "Both",  # nnU-Net allows any further key
            {**nnunet({"0": "CT"}, {"background": 0, "bone": 1}), "modality": "PET"},
            measured("Both", "CT", 1, ("background", "bone"), True),
        ),
        (
            "Many",
            nnunet({"0": "CT"}, {f"part {number}": number for number in range(255)}),
            measured("Many", "CT", 1, tuple(f"part {number}" for number in range(255)), True),
        ),
    ],
)
def test_task_of_dataset(name, content, expected):
    assert task_of_dataset(content, "dataset.json", name) == expected


@pytest.mark.parametrize(
    ("content", "key", "expected"),
    [
        ({"channel_names": {}}, "training", True),
        ({"file_ending": ".nii.gz"}, "training", True),
        ({"channel_names": {}, "dataset": {}}, "training", True),
        ({"channel_names": {}, "training": []}, "training", False),
        ({"channel_names": {}, "mine": []}, "mine", False),
        ({"channel_names": {}}, "mine", False),  # a key that was asked for is not replaced by the folders
        ({"modality": {}}, "training", False),
        ({"modality": {}, "training": []}, "training", False),
    ],
)
def test_which_form_holds_a_file_a_channel(content, key, expected):
    assert has_channel_files(content, key) is expected


@pytest.mark.parametrize(("key", "expected"), [("training", True), ("mine", False)])
def test_the_key_of_the_cases_tells_the_form(key, expected):
    content = {**nnunet({"0": "CT"}, {"background": 0, "bone": 1}), "mine": []}
    assert task_of_dataset(content, "dataset.json", "Bones", key).channel_files is expected


def test_channel_names():
    assert channel_names({"channel_names": {"1": "b", "0": "a"}, "modality": {"0": "c"}}, "dataset.json") == ("a", "b")
    assert channel_names({"modality": {"0": "c"}}, "dataset.json") == ("c",)


def test_task_of_the_real_dataset(task04):
    assert (
        task_of_dataset(read_json(task04 / "dataset.json"), "dataset.json", "Task04_Hippocampus")
        == (TASKS["Task04_Hippocampus"])
    )


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
        ({"labels": {"1": "spleen", "2": "liver"}}, r"keys of 'labels' .* \"0\" to \"1\", not \['1', '2'\]"),
        ({"labels": {"00": "background", "1": "spleen"}}, r"keys of 'labels' .*, not \['00', '1'\]"),
        ({"channel_names": {"1": "CT"}}, r"keys of 'channel_names' .* \"0\" to \"0\", not \['1'\]"),
        ({"channel_names": "CT"}, "'channel_names' must be an object .*, not 'CT'"),
        ({"labels": {"background": "0", "spleen": "1"}}, r"keys of 'labels' .*'spleen'\]: write .*\"tumour\": 1}"),
        ({"labels": {"background": 0, "spleen": 2}}, r"numbers of 'labels' must be 0 to 1, each once, not \[0, 2\]"),
        ({"labels": {"liver": 1, "spleen": 2}}, r"numbers of 'labels' must be 0 to 1, each once, not \[1, 2\]"),
        ({"labels": {"b": 0, "c": 1, "d": 1}}, r"numbers of 'labels' must be 0 to 2, each once, not \[0, 1, 1\]"),
        ({"labels": {"background": 0, "spleen": -1}}, r"numbers of 'labels' .*, not \[0, -1\]"),
        ({"labels": {"background": 0, "spleen": 1.0}}, r"numbers of 'labels' .*, not \[0, 1.0\]"),
        ({"labels": {"background": False, "spleen": True}}, r"numbers of 'labels' .*, not \[False, True\]"),
        ({"labels": {"background": 0, "spleen": "1"}}, r"numbers of 'labels' .*, not \[0, '1'\]: write"),
        ({"labels": {"background": 0}}, "'labels' names only 'background'; .* at least one more"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": [2]}}, r"regions, .* \(whole, core\), .* one number"),
        (
            {"labels": {"background": 0, "spleen": 1, "ignore": 2}},
            "'ignore' label, which is not supported: every voxel",
        ),
        ({"labels": {f"part {number}": number for number in range(256)}}, "256 values; at most 255, .*: merge classes"),
        ({"labels": {str(number): f"part {number}" for number in range(300)}}, "300 values; at most 255"),
        ({"labels": {"0": "background"}}, "'labels' names only 'background'; .* at least one more"),
        ({"labels": {"0": "background", "1": "lung", "2": "lung"}}, "two classes one name .*lung, lung"),
    ],
)
def test_description_that_is_no_task(name, changes, fault):
    with pytest.raises(UserError, match=f"sets/dataset.json: .*{fault}") as caught:
        task_of_dataset({**CT_SPLEEN, **changes}, "sets/dataset.json", name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Task09_Spleen", "Spleens"])
@pytest.mark.parametrize("key", ["modality", "labels"])
def test_description_that_lacks_a_key(name, key):
    with pytest.raises(UserError, match=f"sets/dataset.json has no '{key}'"):
        task_of_dataset({k: v for k, v in CT_SPLEEN.items() if k != key}, "sets/dataset.json", name)


def test_read_json(tmp_path):
    (tmp_path / "dataset.json").write_text('{"name": "Überprüfung"}', encoding="utf-8")
    assert read_json(tmp_path / "dataset.json") == {"name": "Überprüfung"}


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
    ],
    ids=["missing", "comma", "cut", "empty", "list", "string", "not UTF-8", "nested", "endless number"],
)
def test_json_that_cannot_be_read(tmp_path, content, fault):
    file = tmp_path / "dataset.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} {fault}"):
        read_json(file)


def test_a_folder_is_no_dataset_description(tmp_path: Path):
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read as a dataset description"):
        read_json(tmp_path)
