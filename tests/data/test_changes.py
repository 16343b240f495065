"""A resumed run notices that a file was replaced, wherever its dataset lies now."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from toys import save, voxels_of

from dints.data.changes import NAME, check_unchanged, digest
from dints.data.formats import read_dataset
from dints.errors import UserError


@pytest.fixture
def root(phantom, tmp_path) -> Path:
    return shutil.copytree(phantom, tmp_path / "Task00_Phantom")


def check(folder: Path, root: Path, is_continued: bool = True, allow_changed: bool = False) -> dict:
    """Check a dataset's files, and return the notes."""
    check_unchanged(folder, read_dataset(root)[1], is_continued, allow_changed)
    return json.loads((folder / NAME).read_text())


def replace_label(root: Path) -> str:
    """Take the lesions out of the second case's label; return its name."""
    path = sorted((root / "labelsTr").iterdir())[1]
    save(path, np.minimum(voxels_of(path), 1))
    return path.name.removesuffix(".nii.gz")


def test_the_same_files_are_accepted_wherever_they_lie(root, tmp_path):
    noted = check(tmp_path, root, is_continued=False)
    assert len(noted["files"]) == 16 and noted["changes"] == []
    moved = root.rename(tmp_path / "moved")
    for path in moved.rglob("*.nii.gz"):
        os.utime(path, (1, 1))
    check(tmp_path, moved)


@pytest.mark.fault("resume with other data or other flags")
def test_a_replaced_file_is_refused_by_name_and_noted_where_it_is_allowed(root, tmp_path, caplog):
    check(tmp_path, root, is_continued=False)
    name = replace_label(root)
    says = f"1 files of the data .* for example the label of {name} .*--allow_changed"
    for _ in range(2):  # a refusal notes nothing
        with pytest.raises(UserError, match=says):
            check(tmp_path, root)
    assert check(tmp_path, root, allow_changed=True)["changes"] == [[f"label of {name}"]]
    assert f"the label of {name}" in caplog.text
    check(tmp_path, root)  # from now on, it is the run's
    replace_label(root)
    assert check(tmp_path, root, is_continued=False)["changes"] == []  # a new run has its own


@pytest.mark.parametrize("notes", [None, "[1]", '{"files": {"label of x": 5}}'])
def test_a_run_without_notes_begins_them(root, tmp_path, notes):
    if notes is not None:
        (tmp_path / NAME).write_text(notes)
    assert len(check(tmp_path, root)["files"]) == 16


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.nii.gz cannot be read: No such file"):
        digest(str(tmp_path / "gone.nii.gz"), None)
