"""The Decathlon's facts, and tasks as the plain values that a checkpoint holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dints.data.tasks import ARCHIVES, TASKS, Task

# Typed again: name, modality, channels, classes, cases, window (Z: z-score), spacing, patch, md5.
FACTS = """
Task01_BrainTumour MRI 4 4 484/266 Z as_it_is 96x96x96 240a19d752f0d9e9101544901065d872
Task02_Heart MRI 1 2 20/10 Z 1_mm 96x96x96 06ee59366e1e5124267b774dbd654057
Task03_Liver CT 1 3 131/70 -21..189 1_mm 96x96x96 a90ec6c4aa7f6a3d087205e23d4e6397
Task04_Hippocampus MRI 1 3 260/130 Z as_it_is 32x32x32 9d24dba78a72977dbd1d2e110310f31b
Task05_Prostate MRI 2 3 32/16 Z 1_mm 96x96x32 35138f08b1efaef89d7424d2bcc928db
Task06_Lung CT 1 2 63/32 -1000..1000 1_mm 96x96x96 8afd997733c7fc0432f71255ba4e52dc
Task07_Pancreas CT 1 3 281/139 -87..199 1_mm 96x96x96 4f7080cfca169fa8066d17ce6eb061e4
Task08_HepaticVessel CT 1 3 303/139 0..230 1_mm 96x96x96 641d79e80ec66453921d997fbf12a29c
Task09_Spleen CT 1 2 41/20 -125..275 1_mm 96x96x96 410d4a301da4e5b2f6f86ec3ddba524e
Task10_Colon CT 1 2 126/64 -57..175 1_mm 96x96x96 bad7a188931dc2f6acf72b08eb6202d0
"""
PAGE = (Path(__file__).parents[2] / "docs/published.md").read_text()


@pytest.mark.parametrize("name", ARCHIVES)
def test_the_decathlons_facts(name):
    (facts,) = (line.split()[1:] for line in FACTS.splitlines() if line.startswith(name))
    task, archive = TASKS[name], ARCHIVES[name]
    window = "Z" if task.intensity is None else "{:g}..{:g}".format(*task.intensity)
    spacing = {None: "as_it_is", (1.0, 1.0, 1.0): "1_mm"}[task.spacing]
    patch_size = "x".join(map(str, task.patch_size))
    counts = f"{archive.num_training}/{archive.num_test}"
    sizes = [str(task.num_channels), str(task.num_classes)]
    assert [task.modality, *sizes, counts, window, spacing, patch_size, archive.md5] == facts
    assert task.name == name and task.class_names[0] == "background"
    cells = [name, *sizes, window.replace("..", " to "), spacing.replace("_", " "), patch_size]
    assert f"| {' | '.join(cells)} |" in PAGE


def test_a_task_becomes_plain_values_and_back():
    for task in (TASKS["Task03_Liver"], replace(TASKS["Task04_Hippocampus"], channel_files=True)):
        values = task.to_dict()
        assert json.loads(json.dumps(values)) == values and Task.from_dict(values) == task
    values.pop("channel_files")  # as in older model files
    assert Task.from_dict(values) == TASKS["Task04_Hippocampus"]
