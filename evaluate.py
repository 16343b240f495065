"""Score a folder of segmentations against a folder of references; any system's, so that two can be compared.

    python evaluate.py --prediction segmentations --reference data_msd/Task09_Spleen/labelsTr --output_root evaluation

Files of one name are a case, and lie on one grid. OUTPUT_ROOT/scores.csv has a row for each case and class: Dice, ours
and nnU-Net's for a class that the reference does not have; normalised surface Dice and 95% Hausdorff distance as
DeepMind's surface-distance defines them; volumes; lesions found and missed. OUTPUT_ROOT/summary.json, and a table that
is printed, have the means over the cases with bootstrap intervals. PyTorch is not needed.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dints import data, evaluation, files, options
from dints.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from dints.evaluation.masks import Pair

log = logging.getLogger("evaluate")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.parser(__doc__)
    add = parser.add_argument
    add("--prediction", type=Path, required=True, help="folder of the segmentations, .nii or .nii.gz")
    add("--reference", type=Path, required=True, help="folder of the references, of the same names")
    add("--output_root", type=Path, default=Path("evaluation"), help="folder for scores.csv and summary.json")
    add("--labels", type=Path, help="dataset.json whose labels name the classes (default: those in the references)")
    add(
        "--tolerance_mm",
        type=options.number(float, 0, 1e6),
        default=1.0,
        help="within which surfaces count as one, in mm",
    )
    add(
        "--lesion_iou",
        type=options.number(float, 0, 1),
        default=0.0,
        help="intersection over union from which a lesion is detected; 0: by any voxel in common",
    )
    add("--seed", type=options.number(int, 0), default=0, help="of the bootstrap's resampling")
    missing = parser.add_argument_group(
        "references without a prediction are an error, unless"
    ).add_mutually_exclusive_group()
    missing.add_argument("--allow_missing", action="store_true", help="they count as predicted empty")
    missing.add_argument("--predicted_only", action="store_true", help="they are left out, as those of other folds")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for folder in (args.prediction, args.reference):
        if args.output_root.resolve() == folder.resolve():
            raise UserError(
                f"--output_root {args.output_root} holds masks and perhaps their scores: give another folder"
            )
    if args.labels is not None and not args.labels.is_file():
        raise UserError(f"--labels {args.labels} is no file: give a dataset.json")
    names = None if args.labels is None else data.formats.read_class_names(args.labels)
    pairs = evaluation.masks.pair_files(
        args.prediction, args.reference, allow_missing=args.allow_missing, predicted_only=args.predicted_only
    )
    classes = check(pairs, names)
    files.check_folder(args.output_root, "--output_root")
    rows = []
    for pair in tqdm(pairs, desc="scoring", unit="case", disable=None):
        settings = {"tolerance_mm": args.tolerance_mm, "lesion_iou": args.lesion_iou}
        rows += evaluation.scores.score_case(pair.name, *pair.read(), classes, **settings)
    summary = evaluation.summary.summarise(rows, args.seed)
    missing = [pair.name for pair in pairs if pair.prediction is None]
    facts = {
        "prediction": str(args.prediction),
        "reference": str(args.reference),
        "predicted_only": args.predicted_only,
        "num_cases": len(pairs),
        "num_missing": len(missing),
        "missing": missing,
        **settings,
        "seed": args.seed,
    }
    files.write_atomically(args.output_root / "scores.csv", evaluation.summary.scores_table(rows))
    content = json.dumps({**facts, **summary}, indent=2, allow_nan=False)
    files.write_atomically(args.output_root / "summary.json", content + "\n")
    print(evaluation.summary.markdown(summary))
    if missing:
        print(f"\n{len(missing)} of {len(pairs)} cases have no prediction and count as empty")
    log.info("scores are in %s", args.output_root)


def check(pairs: list[Pair], names: tuple[str, ...] | None) -> dict[int, str]:
    """Read every mask, so that a bad one is told before the first is scored; return the classes by label."""
    found = []
    for pair in tqdm(pairs, desc="checking", unit="case", disable=None, leave=False):
        reference, prediction, _ = pair.read()
        found.append((evaluation.masks.labels_in(reference), evaluation.masks.labels_in(prediction)))
    return evaluation.masks.classes_of(pairs, found, names)


if __name__ == "__main__":
    exit_on_user_error(main, parse_args())
