r"""Score a folder of segmentations, of any system, against a folder of references.

    python evaluate.py --prediction segmentations --reference data_msd/Task09_Spleen/labelsTr \
        --output_root evaluation

Files of one name are a case, and lie on one grid. OUTPUT_ROOT/scores.csv has a row for each case
and class: Dice, ours and nnU-Net's for a class that the reference does not have; normalised surface
Dice and 95% Hausdorff distance as DeepMind's surface-distance defines them; volumes; lesions found
and missed. OUTPUT_ROOT/summary.json, and a table that is printed, have the means over the cases
with bootstrap intervals. PyTorch is not needed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dints.options import Settings, number, option, parse


@dataclass(frozen=True, kw_only=True)
class ScoringSettings(Settings):
    """Scoring."""

    prediction: Path = option(
        "folder of the segmentations, .nii or .nii.gz", common=True, type=Path
    )
    reference: Path = option("folder of the references, of the same names", common=True, type=Path)
    output_root: Path = option(
        "folder for scores.csv and summary.json", common=True, default=Path("evaluation"), type=Path
    )
    labels: Path | None = option(
        "dataset.json whose labels name the classes (default: those in the references)",
        default=None,
        type=Path,
    )
    tolerance_mm: float = option(
        "distance in mm within which surfaces count as one", default=1.0, type=number(float, 0, 1e6)
    )
    lesion_iou: float = option(
        "intersection over union from which a lesion is detected; 0: by any voxel in common",
        default=0.0,
        type=number(float, 0, 1),
    )
    allow_missing: bool = option(
        "count references without a prediction as predicted empty (default: an error)",
        default=False,
    )
    predicted_only: bool = option(
        "leave references without a prediction out, as those of other folds (default: an error)",
        default=False,
    )

    def complaints(self) -> Iterable[str]:
        if self.allow_missing and self.predicted_only:
            yield "--allow_missing and --predicted_only: give one of them"


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """What evaluate.py goes by."""

    scoring: ScoringSettings


def parse_args(argv: list[str] | None = None) -> EvaluateSettings:
    return parse(EvaluateSettings, __doc__, argv)


if __name__ == "__main__":  # before the imports below take seconds
    SETTINGS = parse_args()

import json
import logging

from tqdm import tqdm

from dints import files
from dints.data.formats import read_class_names
from dints.errors import UserError, exit_on_user_error
from dints.evaluation.masks import Pair, classes_of, labels_in, pair_files
from dints.evaluation.scores import score_case
from dints.evaluation.summary import markdown, scores_table, summarise

log = logging.getLogger("evaluate")


def main(settings: EvaluateSettings) -> None:
    given = settings.scoring
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for folder in (given.prediction, given.reference):
        if given.output_root.resolve() == folder.resolve():
            raise UserError(
                f"--output_root {given.output_root} holds masks and perhaps their scores: give "
                "another folder"
            )
    if given.labels is not None and not given.labels.is_file():
        raise UserError(f"--labels {given.labels} is no file: give a dataset.json")
    names = None if given.labels is None else read_class_names(given.labels)
    pairs = pair_files(
        given.prediction,
        given.reference,
        allow_missing=given.allow_missing,
        predicted_only=given.predicted_only,
    )
    classes = check(pairs, names)
    files.check_folder(given.output_root, "--output_root")
    limits = {"tolerance_mm": given.tolerance_mm, "lesion_iou": given.lesion_iou}
    rows = []
    for pair in tqdm(pairs, desc="scoring", unit="case", disable=None):
        rows += score_case(pair.name, *pair.read(), classes, **limits)
    summary = summarise(rows)
    missing = [pair.name for pair in pairs if pair.prediction is None]
    facts = {
        "prediction": str(given.prediction),
        "reference": str(given.reference),
        "predicted_only": given.predicted_only,
        "num_cases": len(pairs),
        "num_missing": len(missing),
        "missing": missing,
        **limits,
    }
    files.write_atomically(given.output_root / "scores.csv", scores_table(rows))
    content = json.dumps({**facts, **summary}, indent=2, allow_nan=False)
    files.write_atomically(given.output_root / "summary.json", content + "\n")
    print(markdown(summary))
    if missing:
        print(f"\n{len(missing)} of {len(pairs)} cases have no prediction and count as empty")
    log.info("scores are in %s", given.output_root)


def check(pairs: list[Pair], names: tuple[str, ...] | None) -> dict[int, str]:
    """Read every mask, so that a bad one is named first; return the classes by label."""
    found = []
    for pair in tqdm(pairs, desc="checking", unit="case", disable=None, leave=False):
        reference, prediction, _ = pair.read()
        found.append((labels_in(reference), labels_in(prediction)))
    return classes_of(pairs, found, names)


if __name__ == "__main__":
    exit_on_user_error(main, SETTINGS)
