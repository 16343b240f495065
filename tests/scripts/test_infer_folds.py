"""infer_dints.py with a cross-validation's post-processing, and with the models of all folds."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from architectures import chain
from commands import infer
from threshold import Threshold, knows, note_cases
from volumes import save, voxels_of

from dints.data.tasks import Task
from dints.errors import UserError
from dints.evaluation.postprocessing import Postprocessing, Rule
from dints.network.model_file import Model

TASK = Task("Toy", "CT", 1, ("background", "organ"), None, (0.0, 100.0), (16, 16, 16))
AFFINE = np.diag([-2.0, 1.0, 1.0, 1.0])
LARGEST = Rule(largest=True)


def image(*ends: tuple[int, int]) -> np.ndarray:
    """Make an image that is bright between the given ends along x."""
    voxels = np.zeros((40, 6, 5), np.float32)
    for start, end in ends:
        voxels[start:end, 1:4, 1:4] = 90
    return voxels


def write_case(folder: Path, name: str, *ends: tuple[int, int]) -> dict[str, str]:
    """Write a case whose label is the first bright part; return its entry in a description."""
    entry = {"image": f"{name}.nii.gz", "label": f"label_{name}.nii.gz"}
    save(folder / entry["image"], image(*ends), AFFINE)
    save(folder / entry["label"], (image(ends[0]) > 0).astype(np.uint8), AFFINE)
    return entry


class TestPostprocessing:
    """The components that the file names are removed before a segmentation is written."""

    @pytest.fixture
    def source(self, tmp_path, monkeypatch) -> Path:
        knows(monkeypatch, TASK)(Threshold())
        entry = write_case(tmp_path / "in", "a", (2, 12), (20, 23), (30, 31))
        (tmp_path / "in/dataset.json").write_text(json.dumps({"training": [entry]}))
        return tmp_path / "in/a.nii.gz"

    @pytest.fixture
    def segmented(self, monkeypatch) -> list[str]:
        return note_cases(monkeypatch)

    def chosen(self, folder: Path, rule: Rule, names: tuple[str, ...] = TASK.class_names) -> Path:
        path = folder / "postprocessing.json"
        content = Postprocessing(names, False, (rule,) * (len(names) - 1)).to_dict()
        path.write_text(json.dumps({**content, "chosen_on": {"num_cases": 9}}))
        return path

    @pytest.mark.parametrize(
        ("rule", "ends"),
        [
            (LARGEST, [(2, 12)]),
            (Rule(min_volume_mm3=18.5), [(2, 12), (20, 23)]),  # voxels of 2 mm3
        ],
    )
    def test_a_mask_lacks_removed_parts(self, tmp_path, source, rule, ends):
        flags = ["--input", source, "--postprocessing", self.chosen(tmp_path, rule)]
        out = infer(tmp_path / "out", *flags)
        assert np.array_equal(voxels_of(out / "a.nii.gz"), image(*ends) > 0)

    def test_another_removal_is_another_mask(self, tmp_path, source, segmented):
        out = infer(tmp_path / "out", "--input", source)
        flags = ["--input", source, "--postprocessing"]
        infer(out, *flags, self.chosen(tmp_path, Rule()))
        assert segmented == ["a"]  # a file that removes nothing changes nothing
        for _ in range(2):
            infer(out, *flags, self.chosen(tmp_path, LARGEST))
        assert segmented == ["a", "a"] and voxels_of(out / "a.nii.gz").sum() == 90
        noted = json.loads((out / "run.json").read_text())
        assert noted["searched_on"] == [{}]  # the network is of no search
        assert noted["settings"]["postprocessing"]["classes"]["organ"]["largest"]

    def test_scores_are_those_of_what_is_left(self, tmp_path, source):
        flags = ["--root", source.parent, "--fold", "all", "--postprocessing"]
        out = infer(tmp_path / "out", *flags, self.chosen(tmp_path, LARGEST))
        assert (out / "scores.csv").read_text().splitlines()[1] == "a.nii.gz,1.000000"

    @pytest.mark.parametrize("names", [("organ", "background"), None], ids=str)
    def test_a_file_that_does_not_fit_is_refused_first(self, tmp_path, source, segmented, names):
        path, says = tmp_path / "none.json", "cannot be read"
        if names is not None:
            path = self.chosen(tmp_path, Rule(), names)
            says = "is of the classes organ, background, and the model segments background, organ"
        with pytest.raises(UserError, match=f"--postprocessing {path} {says}"):
            infer(tmp_path / "out", "--input", source, "--postprocessing", path)
        assert not segmented and not list((tmp_path / "out").glob("*.nii.gz"))


class TestModelsOfAllFolds:
    """Together they have seen every case of their dataset: only another's are scored."""

    @pytest.fixture
    def flags(self, tmp_path, monkeypatch) -> list[object]:
        """Name two models, each trained on the other's validation cases, and a dataset.

        It has six cases: four that the models know, and two new ones, which unseen.json lists.
        """
        cases, known = [["case_0", "case_1"], ["case_2", "case_3"]], {}
        for fold, validated in enumerate(cases):
            info = {"training_cases": cases[1 - fold], "validation_cases": validated}
            model = Model(Threshold(0.5), chain(0, 0, num_depths=2), TASK, info, str(fold))
            known[tmp_path / f"fold_{fold}/best_metric_model.pth"] = model
        monkeypatch.setattr("infer_dints.load_model", known.get)
        root = tmp_path / "data"
        entries = [write_case(root, f"case_{number}", (2, 12)) for number in range(6)]
        for name, listed in (("dataset", entries), ("unseen", entries[4:])):
            (root / f"{name}.json").write_text(json.dumps({"training": listed}))
        return ["--checkpoint", *known, "--root", root]

    def test_cases_that_none_has_seen_are_scored(self, tmp_path, flags):
        out = infer(tmp_path / "out", *flags, "--json", tmp_path / "data/unseen.json")
        with open(out / "scores.csv", newline="") as file:
            names = [row["case"] for row in csv.DictReader(file)]
        assert names == ["case_4.nii.gz", "case_5.nii.gz"]

    def test_cases_that_one_was_trained_on_are_refused(self, tmp_path, flags):
        says = "was trained on 4 of these 6 cases.*case_0, case_1, case_2"
        with pytest.raises(UserError, match=says):
            infer(tmp_path / "out", *flags)
