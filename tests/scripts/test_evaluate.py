"""evaluate.py scores two folders, names a bad file in one line, and never imports PyTorch."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run, words
from volumes import AFFINE, save

import evaluate
from dints.errors import UserError


def mask(start: int, label: int = 1) -> np.ndarray:
    voxels = np.zeros((16, 12, 10), np.uint8)
    voxels[start : start + 4, 3:7, 3:7] = label
    return voxels


@pytest.fixture
def folders(tmp_path) -> Path:
    """Write three cases: equal; a voxel apart; the second class not in the reference."""
    second = mask(9, label=2)
    for name, reference, prediction in (
        ("a", mask(2), mask(2)),
        ("b", mask(2) + second, mask(3) + second),
        ("c", mask(2), mask(2) + second),
    ):
        save(tmp_path / f"reference/{name}.nii.gz", reference)
        save(tmp_path / f"prediction/{name}.nii", prediction)  # another ending
    (tmp_path / "reference/._a.nii.gz").write_bytes(b"macOS")
    (tmp_path / "prediction/scores.csv").write_text("no mask")
    return tmp_path


def main(folder: Path, *flags: object) -> tuple[list[dict], dict]:
    """Score in this process; return the rows of scores.csv, and what summary.json holds."""
    paths = words("--prediction", folder / "prediction", "--reference", folder / "reference")
    output = folder / "evaluation"
    evaluate.main(evaluate.parse_args([*paths, *words("--output_root", output, *flags)]))
    rows = list(csv.DictReader((output / "scores.csv").read_text().splitlines()))
    return rows, json.loads((output / "summary.json").read_text())


def test_it_scores_cases_and_classes(folders, capsys):
    rows, found = main(folders)
    assert [(row["case"], row["label"]) for row in rows] == [
        (case, label) for case in "abc" for label in "12"
    ]
    dice = ["1.000000", "", "0.750000", "1.000000", "1.000000", ""]
    assert [row["dice"] for row in rows] == dice
    nnunet = [*dice[:5], "0.000000"]
    assert [row["dice_nnunet"] for row in rows] == nnunet
    assert rows[2]["hausdorff95_mm"] == "1.000000" and rows[2]["surface_dice"] == "1.000000"
    assert rows[2]["reference_ml"] == "0.192000" and rows[5]["false_positive"] == "1"
    assert (found["num_cases"], found["num_missing"], found["tolerance_mm"]) == (3, 0, 1.0)
    one, two = found["classes"]["1"], found["classes"]["2"]
    assert one["dice"]["mean"] == pytest.approx(2.75 / 3)
    assert two["dice"]["mean"] == 1 and two["dice_nnunet"]["mean"] == 0.5
    assert found["all"]["false_positive_cases"] == 1
    printed = capsys.readouterr().out
    assert "| 1 | dice | 3 | 0.9167 |" in printed and "| all | dice | 3 | 0.9583 |" in printed


def test_labels_name_classes_that_need_not_occur(folders):
    description = folders / "dataset.json"
    labels = {"0": "background", "1": "liver", "2": "lesion", "3": "vessel"}
    description.write_text(json.dumps({"labels": labels}))
    rows, found = main(folders, "--labels", description)
    assert [row["label"] for row in rows[:3]] == ["liver", "lesion", "vessel"]
    assert found["classes"]["vessel"]["dice"]["n"] == 0 and found["all"]["dice"]["n"] == 3


def test_missing_predictions_are_refused_or_empty_or_left_out(folders, capsys, caplog):
    caplog.set_level("INFO")
    (folders / "prediction/a.nii").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 3 cases .*a\.nii\.gz.*--allow_missing"):
        main(folders)
    rows, found = main(folders, "--allow_missing")
    assert (rows[0]["dice"], rows[0]["hausdorff95_mm"]) == ("0.000000", "inf")
    assert (found["num_missing"], found["missing"]) == (1, ["a"])
    assert found["classes"]["1"]["hausdorff95_mm"]["infinite"] == 1
    assert "1 of 3 cases have no prediction" in capsys.readouterr().out
    rows, found = main(folders, "--predicted_only")
    assert {row["case"] for row in rows} == {"b", "c"} and found["num_missing"] == 0
    assert "1 of 3 references have no prediction and are left out" in caplog.text


HALF, MOVED = mask(3).astype(np.float32), AFFINE.copy()
HALF[4, 4, 4], MOVED[0, 3] = 0.5, 0.1
BAD = {  # a way to spoil a file of the folders, and the refusal
    "half": (lambda b: save(b, HALF), r"/b\.nii has the value 0\.5, which is no integer label"),
    "image": (
        lambda b: save(b, mask(3).astype(np.int16) * 999),
        r"/b\.nii has values from 0 to 999",
    ),
    "shape": (
        lambda b: save(b, mask(3)[1:]),
        r"/b\.nii has 15 x 12 x 10 voxels and .*reference/b\.nii\.gz 16 x 12 x 10",
    ),
    "affine": (
        lambda b: save(b, mask(3), MOVED),
        r"/b\.nii has another affine than .*/b\.nii\.gz \(an entry differs by 0\.1\)",
    ),
    "4D": (lambda b: save(b, np.stack([mask(3)] * 2, -1)), r"/b\.nii has 2 volumes"),
    "no file": (lambda b: b.write_bytes(b"nothing"), r"/b\.nii cannot be read: it is no NIfTI"),
    "unknown label": (
        lambda b: save(b, mask(3, label=7)),
        r"/b\.nii has the label 7, and references have 1, 2",
    ),
    "twice": (lambda b: shutil.copy(b, b.with_name("b.nii.gz")), r"has both b\.nii and b\.nii\.gz"),
    "extra": (
        lambda b: shutil.copy(b, b.with_name("d.nii")),
        r"has 1 masks without a reference .*d\.nii",
    ),
    "no labels": (
        lambda b: [save(file, 0 * mask(2)) for file in b.parents[1].glob("*/[abc].nii*")],
        r"no reference beside .* has any label",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_masks_are_refused_before_a_case_is_scored(name, folders, monkeypatch):
    monkeypatch.setattr(evaluate, "score_case", lambda *_, **__: pytest.fail("a case was scored"))
    spoil, refusal = BAD[name]
    spoil(folders / "prediction/b.nii")
    with pytest.raises(UserError, match=refusal):
        main(folders)
    assert not (folders / "evaluation").exists()


def test_bad_flags_are_refused(folders, capsys):
    for flags, said in (
        ("--labels none.json", "--labels none.json is no file: give a dataset.json"),
        (f"--output_root {folders}/prediction", "give another folder"),
    ):
        with pytest.raises(UserError, match=said):
            main(folders, flags)
    for flags, said in (
        ("--lesion_iou 2", "argument --lesion_iou: 2 is not at least 0 and at most 1"),
        ("--allow_missing --predicted_only", "--allow_missing and --predicted_only: give one"),
    ):
        with pytest.raises(SystemExit):
            main(folders, flags)
        assert said in capsys.readouterr().err


def test_a_process_of_its_own_never_imports_pytorch(folders):
    code = f"import runpy, sys; runpy.run_path({evaluate.__file__!r}, run_name='__main__'); "
    code += "print(sorted({'torch', 'monai'} & sys.modules.keys()))"
    flags = ["--prediction", folders / "prediction", "--reference", folders / "reference"]
    done = run("-c", Path(code), *flags, "--output_root", folders / "evaluation")
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr
    assert "| all | dice | 3 |" in done.stdout
