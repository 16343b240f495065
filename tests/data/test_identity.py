"""A run that goes on notices that a file was replaced, wherever its dataset lies now."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dints.data.identity import NAME, check, digest
from dints.data.leniency import Leniency

from dints.data.cases import Case, open_cases
from dints.data.formats import read_dataset
from dints.errors import UserError


@pytest.fixture
def root(phantom, tmp_path) -> Path:
    return shutil.copytree(phantom, tmp_path / "Task00_Phantom")


def cases(root: Path) -> list[Case]:
    task, listed = read_dataset(root)
    return open_cases(listed, task, Leniency())


def replace_label(root: Path) -> str:
    """Take the lesions out of the second case's label; return its name."""
    path = sorted((root / "labelsTr").iterdir())[1]
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.minimum(np.asarray(image.dataobj), 1), image.affine, image.header), path)
    return path.name.removesuffix(".nii.gz")


def test_the_same_files_go_on_wherever_they_lie(root, tmp_path):
    check(tmp_path, cases(root), False, False)
    noted = json.loads((tmp_path / NAME).read_text())
    assert len(noted["files"]) == 2 * len(cases(root)) and noted["changes"] == []
    moved = root.rename(tmp_path / "moved")
    for path in moved.rglob("*.nii.gz"):
        os.utime(path, (1, 1))
    check(tmp_path, cases(moved), True, False)


def test_longer_digests_of_an_earlier_version_are_known(root, tmp_path):
    check(tmp_path, cases(root), False, False)
    noted = json.loads((tmp_path / NAME).read_text())
    for note in noted["files"].values():
        note[-1] += "0123"
    for times in (None, (1, 1)):  # of files that were moved, too
        (tmp_path / NAME).write_text(json.dumps(noted))
        for path in root.rglob("*.nii.gz"):
            os.utime(path, times)
        check(tmp_path, cases(root), True, False)
    (tmp_path / NAME).write_text(json.dumps({"files": {key: 5 for key in noted["files"]}}))
    check(tmp_path, cases(root), True, False)  # what is damaged counts as nothing


def test_a_replaced_file_is_refused_by_name_and_noted_where_that_is_allowed(root, tmp_path, caplog):
    check(tmp_path, cases(root), False, False)
    name = replace_label(root)
    for _ in range(2):  # what is refused is not noted
        with pytest.raises(
            UserError, match=f"1 files of the data .* for example the label of {name} .*--allow_changed"
        ):
            check(tmp_path, cases(root), True, False)
    check(tmp_path, cases(root), True, True)
    assert f"the label of {name}" in caplog.text
    assert json.loads((tmp_path / NAME).read_text())["changes"] == [[f"label of {name}"]]
    check(tmp_path, cases(root), True, False)  # from now on, it is the run's


@pytest.mark.parametrize("noted", [None, "", "[1]", '{"files": 3}', '{"files": {"label of x": "y"}}'])
def test_a_run_without_notes_begins_them(root, tmp_path, noted):
    if noted is not None:
        (tmp_path / NAME).write_text(noted)
    check(tmp_path, cases(root), True, False)
    assert len(json.loads((tmp_path / NAME).read_text())["files"]) == 2 * len(cases(root))


def test_a_new_run_has_its_own(root, tmp_path):
    check(tmp_path, cases(root), False, False)
    replace_label(root)
    check(tmp_path, cases(root), False, False)
    check(tmp_path, cases(root), True, False)


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.nii.gz cannot be read: No such file"):
        digest(str(tmp_path / "gone.nii.gz"), None)
