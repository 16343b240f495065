"""The Decathlon's facts, and tasks as the plain values that a checkpoint holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dints.data.tasks import ARCHIVE_URL, ARCHIVES, TASKS, Task

# The table of docs/published.md, typed again. Z, the z-score, is None here, and so is the spacing where nothing is
# resampled.
ISOTROPIC, CUBE = (1.0, 1.0, 1.0), (96, 96, 96)
MSD = {
    "Task01_BrainTumour": (
        "MRI",
        4,
        4,
        484,
        266,
        None,
        None,
        CUBE,
        "240a19d752f0d9e9101544901065d872",
    ),
    "Task02_Heart": (
        "MRI",
        1,
        2,
        20,
        10,
        None,
        ISOTROPIC,
        CUBE,
        "06ee59366e1e5124267b774dbd654057",
    ),
    "Task03_Liver": (
        "CT",
        1,
        3,
        131,
        70,
        (-21, 189),
        ISOTROPIC,
        CUBE,
        "a90ec6c4aa7f6a3d087205e23d4e6397",
    ),
    "Task04_Hippocampus": (
        "MRI",
        1,
        3,
        260,
        130,
        None,
        None,
        (32, 32, 32),
        "9d24dba78a72977dbd1d2e110310f31b",
    ),
    "Task05_Prostate": (
        "MRI",
        2,
        3,
        32,
        16,
        None,
        ISOTROPIC,
        (96, 96, 32),
        "35138f08b1efaef89d7424d2bcc928db",
    ),
    "Task06_Lung": (
        "CT",
        1,
        2,
        63,
        32,
        (-1000, 1000),
        ISOTROPIC,
        CUBE,
        "8afd997733c7fc0432f71255ba4e52dc",
    ),
    "Task07_Pancreas": (
        "CT",
        1,
        3,
        281,
        139,
        (-87, 199),
        ISOTROPIC,
        CUBE,
        "4f7080cfca169fa8066d17ce6eb061e4",
    ),
    "Task08_HepaticVessel": (
        "CT",
        1,
        3,
        303,
        139,
        (0, 230),
        ISOTROPIC,
        CUBE,
        "641d79e80ec66453921d997fbf12a29c",
    ),
    "Task09_Spleen": (
        "CT",
        1,
        2,
        41,
        20,
        (-125, 275),
        ISOTROPIC,
        CUBE,
        "410d4a301da4e5b2f6f86ec3ddba524e",
    ),
    "Task10_Colon": (
        "CT",
        1,
        2,
        126,
        64,
        (-57, 175),
        ISOTROPIC,
        CUBE,
        "bad7a188931dc2f6acf72b08eb6202d0",
    ),
}


@pytest.mark.parametrize("name", MSD)
def test_the_decathlons_facts(name):
    modality, channels, classes, num_training, num_test, intensity, spacing, patch_size, md5 = MSD[
        name
    ]
    task, archive = TASKS[name], ARCHIVES[name]
    assert (task.name, task.modality, task.num_channels, task.num_classes) == (
        name,
        modality,
        channels,
        classes,
    )
    assert (task.intensity, task.spacing, task.patch_size) == (intensity, spacing, patch_size)
    assert (archive.num_training, archive.num_test, archive.md5) == (num_training, num_test, md5)
    assert task.class_names[0] == "background" and len(set(task.class_names)) == classes


def test_the_table_is_the_decathlon_and_the_phantom():
    assert ARCHIVES.keys() == MSD.keys()
    assert TASKS.keys() == {*MSD, "Task00_Phantom"}
    url = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task09_Spleen.tar"
    assert ARCHIVE_URL.format(task="Task09_Spleen") == url


def test_a_task_becomes_plain_values_and_back():
    for task in (TASKS["Task03_Liver"], replace(TASKS["Task04_Hippocampus"], channel_files=True)):
        values = task.to_dict()
        assert json.loads(json.dumps(values)) == values and Task.from_dict(values) == task


def test_channel_files_are_absent_from_older_model_files():
    values = replace(TASKS["Task05_Prostate"], channel_files=True).to_dict()
    assert values.pop("channel_files") is True
    assert Task.from_dict(values) == TASKS["Task05_Prostate"]


@pytest.mark.parametrize("name", MSD)
def test_the_page_has_the_decathlons_facts(name):
    _, channels, classes, _, _, intensity, spacing, patch_size, _ = MSD[name]
    window = "Z" if intensity is None else "{} to {}".format(*intensity)
    cells = [
        channels,
        classes,
        window,
        "1 mm" if spacing else "as it is",
        "x".join(map(str, patch_size)),
    ]
    page = (Path(__file__).parents[2] / "docs/published.md").read_text()
    assert f"| {name} | {' | '.join(map(str, cells))} |" in page
