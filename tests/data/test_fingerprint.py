"""A dataset that the table does not know is measured, and measured again where it changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from toys import measurable, opened, save, write_dataset

from dints.data import fingerprint
from dints.data.fingerprint import write_task
from dints.errors import UserError

THREE = [((40, 40, 40), (1, 1, 3)), ((40, 70, 50), (1, 1, 4)), ((40, 50, 60), (2, 2, 5))]


def write(root: Path, cases: list = THREE, channel: str = "CT", nnunet: bool = False) -> Path:
    return write_dataset(root, measurable(cases), [channel], nnunet=nnunet)


def test_an_unknown_dataset_is_measured(tmp_path):
    fold = opened(write(tmp_path / "Mine", nnunet=True))
    task = fold.task
    assert (task.name, task.modality, task.channel_files) == ("Mine", "CT", True)
    assert task.spacing == (1, 1, 4)
    # The foreground is 0 to 999.
    assert task.intensity == pytest.approx((0.005 * 999, 0.995 * 999), abs=0.1)
    # Voxels at that spacing: 40 40 30, 40 70 50, 79 99 75 (from outermost voxel to outermost one).
    assert fold.measured.shape == (40, 70, 50) and fold.measured.num_cases == 3
    assert task.patch_size == (32, 64, 48)


def test_patches_are_planned_at_a_spacing_that_is_given(tmp_path):
    task = opened(write(tmp_path / "Mine"), spacing=(2, 2, 2)).task
    assert task.spacing == (2, 2, 2) and task.patch_size == (16, 32, 96)  # of 20 35 100 voxels


def test_mri_of_an_unknown_dataset_is_z_scored(tmp_path):
    task = opened(write(tmp_path / "Mine", channel="T1")).task
    assert (task.modality, task.intensity, task.spacing) == ("MRI", None, (1, 1, 4))


def test_spacing_is_measured_in_the_patients_axes(tmp_path):
    """It is the same in whatever order a file stores its axes."""
    root = write(tmp_path / "Mine", THREE[:2])
    stored = nib.orientations.axcodes2ornt("SAL")
    turn = nib.orientations.ornt_transform(stored, [[0, 1], [1, 1], [2, 1]])
    for path in root.rglob("case_1*.nii.gz"):
        nib.save(nib.load(path).as_reoriented(turn), path)
    assert nib.aff2axcodes(nib.load(root / "labelsTr/case_1.nii.gz").affine) != ("R", "A", "S")
    assert opened(root).task.spacing == (1, 1, 3.5)


def test_measurements_are_kept_and_used_again(tmp_path, monkeypatch):
    root = write(tmp_path / "Mine")
    first = opened(root, patch_size=(48, 48, 48))
    write_task(tmp_path / "search", first.task, first.measured)
    kept = json.loads((tmp_path / "search" / "task.json").read_text())
    assert kept["task"]["patch_size"] == [48, 48, 48]
    assert kept["fingerprint"]["spacing"] == [1, 1, 4]
    monkeypatch.setattr(fingerprint, "read_image", lambda *_: pytest.fail("measured again"))
    again = opened(root, [tmp_path / "none", tmp_path / "search"])
    assert again.measured == first.measured
    # Flags of another run are not taken over.
    assert again.task == replace(first.task, patch_size=(32, 64, 48))


def test_the_measurements_of_another_dataset_are_not_used(tmp_path):
    root, run = tmp_path / "Mine", tmp_path / "search"
    first = opened(write(root))
    write_task(run, first.task, first.measured)
    root.rename(tmp_path / "old")
    other = opened(write(root, THREE[1:]), [run])
    assert other.task.spacing == (1.5, 1.5, 4.5)
    for damaged in ("{", '{"fingerprint": {"dataset": 1}}', '{"fingerprint": null}'):
        (run / "task.json").write_text(damaged)
        assert opened(root, [run]).task == other.task


def test_a_dataset_without_any_foreground_is_refused(tmp_path):
    root = write(tmp_path / "Mine")
    for path in (root / "labelsTr").iterdir():
        label = nib.load(path)
        save(path, np.zeros(label.shape, np.uint8), label.affine)
    with pytest.raises(UserError, match="no case has any foreground"):
        opened(root)
