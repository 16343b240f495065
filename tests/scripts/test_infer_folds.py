"""infer_dints.py with what a cross-validation made: its post-processing, and the models of all
folds together.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from architectures import chain
from commands import infer
from threshold import Threshold, knows

from dints.data.tasks import Task
from dints.errors import UserError
from dints.evaluation.postprocessing import Postprocessing, Rule
from dints.inference.batch import Batch
from dints.network.model_file import Model

TASK = Task(
    "Toy",
    "CT",
    1,
    ("background", "organ"),
    spacing=None,
    intensity=(0.0, 100.0),
    patch_size=(16, 16, 16),
)
AFFINE = np.diag([-2.0, 1.0, 1.0, 1.0])


def image(*ends: tuple[int, int]) -> np.ndarray:
    """Make an image that is bright between the given ends along x."""
    voxels = np.zeros((40, 6, 5), np.float32)
    for start, end in ends:
        voxels[start:end, 1:4, 1:4] = 90
    return voxels


def write(path: Path, voxels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, AFFINE), path)
    return path


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


class TestPostprocessing:
    """The components that the file names are removed before a segmentation is written."""

    @pytest.fixture
    def source(self, tmp_path, monkeypatch) -> Path:
        knows(monkeypatch, TASK)(Threshold())
        return write(tmp_path / "in/a.nii.gz", image((2, 12), (20, 23), (30, 31)))

    @pytest.fixture
    def segmented(self, monkeypatch) -> list[str]:
        names, real = [], Batch.decide
        monkeypatch.setattr(Batch, "decide", lambda *a: names.append(a[1].name) or real(*a))
        return names

    def chosen(
        self, folder: Path, *rules: Rule, class_names: tuple[str, ...] = TASK.class_names
    ) -> Path:
        path = folder / "postprocessing.json"
        content = Postprocessing(class_names, False, rules).to_dict()
        path.write_text(json.dumps({**content, "chosen_on": {"num_cases": 9}}))
        return path

    @pytest.mark.parametrize(
        ("rule", "ends"),
        [
            (Rule(), [(2, 12), (20, 23), (30, 31)]),
            (Rule(largest=True), [(2, 12)]),
            (Rule(min_volume_mm3=18.5), [(2, 12), (20, 23)]),  # voxels of 2 mm3
        ],
    )
    def test_a_mask_lacks_what_is_removed(self, tmp_path, source, rule, ends):
        flags = ["--input", source, "--postprocessing", self.chosen(tmp_path, rule)]
        out = infer(tmp_path / "out", *flags)
        assert np.array_equal(voxels(out / "a.nii.gz"), image(*ends) > 0)

    def test_a_mask_is_done_again_where_something_else_is_removed(
        self, tmp_path, source, segmented
    ):
        out = infer(tmp_path / "out", "--input", source)
        flags = ["--input", source, "--postprocessing"]
        infer(out, *flags, self.chosen(tmp_path, Rule()))
        assert segmented == ["a"]  # a file that removes nothing changes nothing
        for _ in range(2):
            infer(out, *flags, self.chosen(tmp_path, Rule(largest=True)))
        assert segmented == ["a", "a"] and voxels(out / "a.nii.gz").sum() == 90
        noted = json.loads((out / "run.json").read_text())
        settings = noted["settings"]
        assert noted["searched_on"] == [{}]  # the network is of no search
        assert settings["postprocessing"]["classes"]["organ"] == {
            "largest": True,
            "min_volume_mm3": 0,
        }

    def test_scores_are_those_of_what_is_left(self, tmp_path, source):
        label = write(tmp_path / "in/label.nii.gz", (image((2, 12)) > 0).astype(np.uint8))
        entry = {"image": source.name, "label": label.name}
        (tmp_path / "in/dataset.json").write_text(json.dumps({"training": [entry]}))
        flags = ["--root", tmp_path / "in", "--fold", "all", "--postprocessing"]
        out = infer(tmp_path / "out", *flags, self.chosen(tmp_path, Rule(largest=True)))
        assert (out / "scores.csv").read_text().splitlines()[1] == "a.nii.gz,1.000000"

    OTHERS = (("background", "a"), ("organ", "background"), None)

    @pytest.mark.parametrize("class_names", OTHERS, ids=str)
    def test_a_file_that_does_not_fit_is_told_first(self, tmp_path, source, segmented, class_names):
        """One of another task, by its classes, their number, their order or the background's name;
        or none.
        """
        path, says = tmp_path / "none.json", "cannot be read"
        if class_names is not None:
            path = self.chosen(
                tmp_path, *[Rule()] * (len(class_names) - 1), class_names=class_names
            )
            says = (
                f"is of the classes {', '.join(class_names)}, and the model segments "
                "background, organ: give"
            )
        with pytest.raises(UserError, match=f"--postprocessing {path} {says}"):
            infer(tmp_path / "out", "--input", source, "--postprocessing", path)
        assert not segmented and not list((tmp_path / "out").glob("*.nii.gz"))


class TestModelsOfAllFolds:
    """Together they have seen every case of their dataset: only another's are scored."""

    @pytest.fixture
    def models(self, tmp_path, monkeypatch) -> list[Path]:
        """Name two models, of which each was trained on the other one's validation cases."""
        cases, paths = [["case_0", "case_1"], ["case_2", "case_3"]], []
        known = {}
        for fold, validated in enumerate(cases):
            info = {"training_cases": cases[1 - fold], "validation_cases": validated}
            paths.append(tmp_path / f"fold_{fold}/best_metric_model.pth")
            known[paths[-1]] = Model(
                Threshold(0.5), chain(0, 0, num_depths=2), TASK, info, str(fold)
            )
        monkeypatch.setattr("infer_dints.load_model", known.get)
        return paths

    @pytest.fixture
    def root(self, tmp_path) -> Path:
        """Write six cases: the four that are known, two that are new; a list of each, and one of
        all.
        """
        entries = []
        for number in range(6):
            write(tmp_path / f"data/imagesTr/case_{number}.nii.gz", image((2, 12)))
            write(
                tmp_path / f"data/labelsTr/case_{number}.nii.gz",
                (image((2, 12)) > 0).astype(np.uint8),
            )
            entries.append(
                {
                    "image": f"imagesTr/case_{number}.nii.gz",
                    "label": f"labelsTr/case_{number}.nii.gz",
                }
            )
        for name, listed in (("dataset", entries), ("unseen", entries[4:])):
            (tmp_path / f"data/{name}.json").write_text(json.dumps({"training": listed}))
        return tmp_path / "data"

    def names(self, out: Path) -> list[str]:
        with open(out / "scores.csv", newline="") as file:
            return [row["case"] for row in csv.DictReader(file)]

    def test_cases_that_none_has_seen_are_scored(self, tmp_path, models, root):
        flags = ["--checkpoint", *models, "--root", root, "--json", root / "unseen.json"]
        assert self.names(infer(tmp_path / "out", *flags)) == ["case_4.nii.gz", "case_5.nii.gz"]

    def test_cases_that_one_was_trained_on_are_refused_though_another_was_not(
        self, tmp_path, models, root
    ):
        flags = ["--checkpoint", *models, "--root", root]
        with pytest.raises(
            UserError, match="was trained on 4 of these 6 cases.*case_0, case_1, case_2"
        ):
            infer(tmp_path / "out", *flags)
