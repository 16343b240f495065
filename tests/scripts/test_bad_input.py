"""Each script says one line of a damaged file; all faults of data are tested in tests/data."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from architectures import chain
from commands import infer, train
from threshold import Threshold, knows

import search_dints
from dints.data.tasks import TASKS
from dints.errors import PartlyDone, UserError
from dints.network.architecture import save_architecture

IMAGE = "imagesTr/phantom_001.nii.gz"
SAYS = f"{IMAGE} cannot be read: its compression is damaged"


@pytest.fixture
def root(phantom, tmp_path) -> Path:
    """Copy the phantom, and cut the end of an image."""
    copy = shutil.copytree(phantom, tmp_path / "Task00_Phantom")
    (copy / IMAGE).write_bytes((copy / IMAGE).read_bytes()[:-9])
    return copy


@pytest.mark.fault("damaged bytes")
def test_a_stage_says_one_line(root, tmp_path):
    save_architecture(tmp_path / "arch.pth", chain(0, 1, 0, num_depths=2))
    with pytest.raises(UserError, match=SAYS):
        train(root, tmp_path / "run", tmp_path / "arch.pth")


def test_check_lists_it_and_begins_no_run(root, tmp_path, capsys):
    arguments = ["--root", str(root), "--output_root", str(tmp_path / "run"), "--check"]
    with pytest.raises(UserError, match=f"^{root} is not fit for training"):
        search_dints.main(search_dints.parse_args(arguments))
    listed = r"^error    phantom_001 +imagesTr/phantom_001.nii.gz cannot be read"
    assert re.search(listed, capsys.readouterr().out, re.M)
    assert not (tmp_path / "run").exists()


def test_inference_names_the_image_and_segments_the_others(root, tmp_path, monkeypatch):
    knows(monkeypatch, TASKS["Task00_Phantom"])(Threshold(num_classes=3))
    (tmp_path / "images").mkdir()
    for number in (0, 1):
        name = f"phantom_00{number}.nii.gz"
        shutil.copy(root / "imagesTr" / name, tmp_path / "images" / name)
    with pytest.raises(PartlyDone, match="phantom_001.nii.gz"):
        infer(tmp_path / "out", "--input", tmp_path / "images")
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["phantom_000.nii.gz"]
