"""Cases scored out of fold: files that are taken, written and refused, and the printed table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from volumes import save, voxels_of

from dints.errors import UserError
from dints.evaluation import cross_validation

FOLDS = [["case_0", "case_1"], ["case_2"]]


def mask(*bars: tuple[int, int, int]) -> np.ndarray:
    voxels = np.zeros((40, 6, 5), np.uint8)
    for label, start, end in bars:
        voxels[start:end, 1:4, 1:4] = label
    return voxels


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write three cases in two folds, each segmented with a blob too many."""
    entries, labels = [], {"0": "background", "1": "organ", "2": "lesion"}
    for fold, names in enumerate(FOLDS):
        masks, notes = tmp_path / f"runs/out_of_fold/fold_{fold}", {}
        for name in names:
            reference = mask((1, 2, 12), (2, 12, 15))
            for place in ("imagesTr", "labelsTr"):
                save(tmp_path / f"data/{place}/{name}.nii.gz", reference)
            entries.append({"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"})
            save(masks / f"{name}.nii.gz", mask((1, 2, 12), (2, 12, 15), (1, 30, 32 + fold)))
            notes[f"{name}.nii.gz"] = {"state": "done"}
        save(masks / "old.nii.gz", mask())  # not of the last run
        (masks / "run.json").write_text(json.dumps({"settings": {}, "cases": notes}))
    description = {"modality": {"0": "CT"}, "labels": labels, "training": entries}
    (tmp_path / "data/dataset.json").write_text(json.dumps(description))
    return tmp_path


def validate(folder: Path, num_folds: int = 2, **settings) -> str:
    return cross_validation.cross_validate(folder / "data", folder / "runs", num_folds, **settings)


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "runs/summary.json").read_text())


def rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_case_is_scored_once_before_and_after(folder):
    said = validate(folder)
    before, after = (rows(folder / "runs" / f"scores{name}.csv") for name in ("", "_postprocessed"))
    assert [(row["case"], row["label"]) for row in before] == [
        (name, label) for names in FOLDS for name in names for label in ("organ", "lesion")
    ]
    expected = [20 / 22, 20 / 22, 20 / 23]
    assert [float(row["dice"]) for row in before[::2]] == pytest.approx(expected, abs=1e-6)
    assert [row["dice"] for row in after] == ["1.000000"] * 6
    summary = summary_of(folder)
    assert (summary["num_cases"], summary["num_folds"], summary["folds"]) == (3, 2, FOLDS)
    mean = float(np.mean(expected))
    assert summary["as_segmented"]["classes"]["organ"]["dice"]["mean"] == pytest.approx(mean)
    assert summary["postprocessed"]["all"]["dice"]["mean"] == 1
    for cells in (f"| organ | 3 | {mean:.4f} | ", "| all | 3 |", "| 1.0000 | 1.0000 to 1.0000 |"):
        assert cells in said
    assert {line.count("|") for line in said.splitlines() if line.startswith("|")} == {9}


def test_nothing_is_removed_where_nothing_helps(folder):
    validate(folder)
    for fold, names in enumerate(FOLDS):
        for name in names:
            path = folder / f"runs/out_of_fold/fold_{fold}/{name}.nii.gz"
            save(path, mask((1, 2, 11), (2, 12, 15)))
    said = validate(folder)
    assert "nothing is removed" in said
    assert {line.count("|") for line in said.splitlines()[:5]} == {6}
    assert not (folder / "runs/scores_postprocessed.csv").exists()  # it was of other masks
    assert "postprocessed" not in summary_of(folder)


def test_nothing_is_removed_where_the_check_finds_harm(folder):
    """The first fold's blobs are wrong and the second one's, which is smaller, is right."""
    right, masks = mask((1, 2, 12), (2, 12, 15), (1, 30, 36)), folder / "runs/out_of_fold"
    for place in ("imagesTr", "labelsTr"):
        save(folder / f"data/{place}/case_2.nii.gz", right)
    for name in FOLDS[0]:
        save(masks / f"fold_0/{name}.nii.gz", mask((1, 2, 12), (2, 12, 15), (1, 30, 38)))
    save(masks / "fold_1/case_2.nii.gz", right)
    said = validate(folder)
    found = json.loads((folder / "runs/postprocessing.json").read_text())
    dice = {name: of_all["mean"] for name, of_all in found["chosen_on"]["dice"].items()}
    assert dice["chosen_on_other_folds"] < dice["as_segmented"] == dice["postprocessed"]
    change = f"(Dice {dice['chosen_on_other_folds']:.4f} instead of {dice['as_segmented']:.4f})"
    assert f"choose harms a fold's cases {change}" in said and "removed:" not in said
    assert found["chosen_on"]["harms"]
    assert not any(step["kept"] for step in found["chosen_on"]["steps"])
    assert not (folder / "runs/scores_postprocessed.csv").exists()


def test_labels_that_lie_elsewhere_may_be_trusted(folder):
    for path in (folder / "data/labelsTr").iterdir():
        save(path, voxels_of(path), np.eye(4))
    with pytest.raises(UserError, match="has another affine"):
        validate(folder)
    validate(folder, trust_shapes=True)
    # 108 voxels of the image's 3 mm3
    assert rows(folder / "runs/scores.csv")[0]["prediction_ml"] == "0.324000"


@pytest.mark.parametrize(
    ("searched", "folds"),
    [
        (lambda fold: [], []),  # a U shape, or a published file
        (lambda fold: [{"task": "data", "fold": fold, "num_folds": 2}], []),
        (lambda fold: [{"task": "data", "fold": 1, "num_folds": 2}], [0]),
    ],
)
def test_a_search_that_saw_the_cases_is_named(folder, searched, folds):
    for fold in range(2):
        path = folder / f"runs/out_of_fold/fold_{fold}/run.json"
        noted = json.loads(path.read_text())
        path.write_text(json.dumps({**noted, "searched_on": searched(fold)}))
    lines = [line for line in validate(folder).splitlines() if "architecture" in line]
    assert [line.partition(":")[0] for line in lines] == [
        f"architecture of fold {n}" for n in folds
    ]
    assert summary_of(folder)["searched_with_folds"] == folds


def spoil(folder: Path, name: str) -> None:
    masks = folder / "runs/out_of_fold"
    first, second = masks / "fold_0/run.json", masks / "fold_1/run.json"
    noted = json.loads(first.read_text())
    if name == "a case that failed":
        noted["cases"]["case_1.nii.gz"] = {"state": "failed", "reason": "damaged"}
        first.write_text(json.dumps(noted))
    elif name == "no fold":
        second.unlink()
    elif name == "a case twice":
        second.write_text(
            json.dumps({"cases": {f"case_{n}.nii.gz": {"state": "done"} for n in (1, 2)}})
        )
    else:
        save(masks / "fold_1/case_2.nii.gz", mask((3, 0, 3)))


BAD = {
    "a case that failed": r"lacks 1 of the 3 cases, for example case_1: give the command with "
    r"FOLD=each again",
    "no fold": r"fold_1/run\.json cannot be read \(No such file",
    "a case twice": r"has case_1 in 2 folds of 2, and the dataset once",
    "unknown label": r"case_2\.nii\.gz has the label 3, and the dataset the classes background, "
    r"organ, lesion: correct",
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scored_is_told(name, folder):
    spoil(folder, name)
    with pytest.raises(UserError, match=BAD[name]) as refusal:
        validate(folder)
    assert "\n" not in str(refusal.value) and not (folder / "runs/postprocessing.json").exists()
