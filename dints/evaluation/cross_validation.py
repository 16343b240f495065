"""Score each case by the model of the fold that did not train on it; choose post-processing.

    python -m dints.evaluation.cross_validation --root data_msd/Task09_Spleen --num_folds 5
    --output_root runs/folds

`FOLD=each bash train_dints.sh` does this at its end. OUTPUT_ROOT/out_of_fold/fold_0, fold_1, ...
are infer_dints.py's folders of the folds' validation cases. Written to OUTPUT_ROOT are
postprocessing.json, which infer_dints.py --postprocessing applies; scores.csv and, where anything
is removed, scores_postprocessed.csv; and summary.json. PyTorch is not needed.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dints import files
from dints.data.formats import read_dataset
from dints.data.listing import ENDING, Case, check_names
from dints.errors import UserError, exit_on_user_error
from dints.evaluation.choice import (
    Choice,
    Parts,
    choose_checked,
    class_means,
    mean,
    none_for_nan,
    parts_of,
)
from dints.evaluation.masks import Pair, labels_in
from dints.evaluation.postprocessing import Postprocessing
from dints.evaluation.scores import Row, score_case
from dints.evaluation.summary import scores_table, summarise
from dints.options import Settings, number, option, parse, same_option
from dints.settings import DataSettings

log = logging.getLogger(__name__)

OUT_OF_FOLD = "out_of_fold"  # in OUTPUT_ROOT, with a folder a fold
AGAIN = "give the command with FOLD=each again, which segments what is missing"


@dataclass(frozen=True, kw_only=True)
class FoldsSettings(Settings):
    """Folds."""

    root: Path = same_option(DataSettings, "root")
    json: Path | None = same_option(DataSettings, "json")
    json_key: str = same_option(DataSettings, "json_key")
    trust_shapes: bool = same_option(DataSettings, "trust_shapes")
    num_folds: int = same_option(DataSettings, "num_folds")
    output_root: Path = option(
        "folder that holds out_of_fold/, and for what is written", common=True, type=Path
    )
    tolerance_mm: float = option("of the surface Dice", default=1.0, type=number(float, 0, 1e6))


@dataclass(frozen=True, kw_only=True)
class CrossValidationSettings(Settings):
    """What this module goes by as a program."""

    folds: FoldsSettings


def main(settings: CrossValidationSettings) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = dict(vars(settings.folds))
    description, key = given.pop("json"), given.pop("json_key")
    print(cross_validate(**given, description=description, key=key))


def cross_validate(
    root: Path,
    output_root: Path,
    num_folds: int,
    *,
    description: Path | None = None,
    key: str = "training",
    trust_shapes: bool = False,
    tolerance_mm: float = 1.0,
) -> str:
    """Score and choose as the module says, and return the table.

    Args:
        root, description, key: as `read_dataset` takes them.
        trust_shapes: as `Pair` does.

    Raises:
        UserError: a case has no segmentation, or two; or a mask cannot be scored.
    """
    task, listed = read_dataset(root, description, key)
    folds = pairs_of_folds(listed, output_root, num_folds, trust_shapes)
    searched = searched_folds(output_root, num_folds, task.name)
    rows, parts = score(folds, task.class_names, tolerance_mm)
    choice = choose_checked(parts, task.class_names)
    described = describe_choice(choice, parts)
    files.write_atomically(
        output_root / "postprocessing.json", json.dumps(described, indent=2) + "\n"
    )
    files.write_atomically(output_root / "scores.csv", scores_table(rows))
    summaries = {"as_segmented": summarise(rows)}
    postprocessed = output_root / "scores_postprocessed.csv"
    postprocessed.unlink(missing_ok=True)  # what an earlier call chose
    if choice.chosen.removes:
        rows = postprocessed_rows(rows, folds, choice.chosen, tolerance_mm)
        files.write_atomically(postprocessed, scores_table(rows))
        summaries["postprocessed"] = summarise(rows)
    names = [[pair.name for pair in pairs] for pairs in folds]
    facts = {"root": str(root), "num_cases": len(listed), "num_folds": num_folds, "folds": names}
    facts |= {"tolerance_mm": tolerance_mm, "searched_with_folds": searched}
    content = json.dumps({**facts, **summaries}, indent=2, allow_nan=False)
    files.write_atomically(output_root / "summary.json", content + "\n")
    lines = [*table(summaries), ""]
    lines += [
        f"architecture of fold {fold}: searched with cases that it validates on; Dice may be too "
        "high (docs/running.md#every-fold)"
        for fold in searched
    ]
    lines += lines_of_choice(choice, described["chosen_on"]["dice"], output_root)
    return "\n".join(lines)


def score(
    folds: Sequence[Sequence[Pair]], class_names: Sequence[str], tolerance_mm: float
) -> tuple[list[Row], list[list[Parts]]]:
    """Score the segmentations of all folds, and measure their components."""
    rows, parts, classes = [], [], dict(enumerate(class_names[1:], start=1))
    for pairs in folds:
        parts.append([])
        for pair in tqdm(pairs, desc="scoring", unit="case", disable=None):
            masks = read_masks(pair, class_names)
            rows += score_case(pair.name, *masks, classes, tolerance_mm=tolerance_mm)
            parts[-1].append(parts_of(*masks, len(class_names)))
    return rows, parts


def pairs_of_folds(
    listed: Sequence[Case], output_root: Path, num_folds: int, trust_shapes: bool
) -> list[list[Pair]]:
    """Find each fold's segmentations, as its ``run.json`` has them, and their references."""
    check_names(listed)
    references = {case.name: Path(case.label) for case in listed}
    found = [masks_of_fold(output_root / OUT_OF_FOLD / f"fold_{fold}") for fold in range(num_folds)]
    counts = Counter(name for masks in found for name in masks)
    missing = [name for name in references if name not in counts]
    if missing:
        raise UserError(
            f"{output_root / OUT_OF_FOLD} lacks {len(missing)} of the {len(references)} cases, for "
            f"example {missing[0]}: {AGAIN}"
        )
    wrong = [name for name, count in counts.items() if count > 1 or name not in references]
    if wrong:
        raise UserError(
            f"{output_root / OUT_OF_FOLD} has {wrong[0]} in {counts[wrong[0]]} folds of "
            f"{num_folds}, and the dataset {'once' if wrong[0] in references else 'not at all'}: "
            f"remove the folder, and {AGAIN}"
        )
    return [
        [Pair(name, references[name], masks[name], trust_shapes) for name in sorted(masks)]
        for masks in found
    ]


def masks_of_fold(folder: Path) -> dict[str, Path]:
    """List the segmentations of a fold by their case's name."""
    try:
        cases = json.loads((folder / "run.json").read_text(encoding="utf-8"))["cases"]
        done = [name for name, case in cases.items() if case["state"] == "done"]
    except OSError as error:
        raise UserError(
            f"{folder / 'run.json'} cannot be read ({error.strerror}): {AGAIN}"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'run.json'} is malformed: remove it, and {AGAIN}") from error
    return {ENDING.sub("", name): folder / name for name in done}


def searched_folds(output_root: Path, num_folds: int, task: str) -> list[int]:
    """List the folds whose architecture is of a search that saw cases that they validate on."""
    found = []
    for fold in range(num_folds):
        path = output_root / OUT_OF_FOLD / f"fold_{fold}" / "run.json"
        try:
            searches = json.loads(path.read_text(encoding="utf-8")).get("searched_on", [])
            held_out = {"task": task, "fold": fold, "num_folds": num_folds}
            of_task = [search for search in searches if search.get("task") == task]
            if any({key: search.get(key) for key in held_out} != held_out for search in of_task):
                found.append(fold)
        except (TypeError, AttributeError) as error:
            raise UserError(f"{path} is malformed: remove it, and {AGAIN}") from error
    return found


def read_masks(pair: Pair, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels of reference and prediction, each of a known class, and the spacing."""
    reference, prediction, spacing = pair.read()
    for path, mask in ((pair.reference, reference), (pair.prediction, prediction)):
        highest = max(labels_in(mask), default=0)
        if highest >= len(class_names):
            raise UserError(
                f"{path} has the label {highest}, and the dataset the classes "
                f"{', '.join(class_names)}: correct it"
            )
    return reference, prediction, spacing


def postprocessed_rows(
    rows: Sequence[Row],
    folds: Sequence[Sequence[Pair]],
    chosen: Postprocessing,
    tolerance_mm: float,
) -> list[Row]:
    """Score again the segmentations from which something is removed; keep the others' rows."""
    classes, by_case = dict(enumerate(chosen.class_names[1:], start=1)), {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    pairs = [pair for of_fold in folds for pair in of_fold]
    for pair in tqdm(pairs, desc="post-processing", unit="case", disable=None):
        reference, prediction, spacing = pair.read()
        after = chosen.apply(prediction, spacing)
        if not np.array_equal(after, prediction):
            by_case[pair.name] = score_case(
                pair.name, reference, after, spacing, classes, tolerance_mm=tolerance_mm
            )
    return [row for of_case in by_case.values() for row in of_case]


def describe_choice(choice: Choice, folds: Sequence[Sequence[Parts]]) -> dict:
    """Return the content of ``postprocessing.json``: removals, and the Dice that chose them."""
    chosen = choice.chosen
    cases = [case for of_fold in folds for case in of_fold]
    means = {
        "as_segmented": class_means(cases, Postprocessing.nothing(chosen.class_names)),
        "postprocessed": class_means(cases, chosen),
        "chosen_on_other_folds": choice.expected,
    }
    dice = {}
    for name, values in means.items():
        *of_classes, average = map(none_for_nan, (*values, mean(values)))
        classes = dict(zip(chosen.class_names[1:], of_classes, strict=True))
        dice[name] = {"classes": classes, "mean": average}
    facts = {"num_cases": len(cases), "num_folds": len(folds), "dice": dice}
    facts |= {"harms": choice.harms, "steps": [asdict(step) for step in choice.steps]}
    return {**chosen.to_dict(), "neighbours": 26, "chosen_on": facts}


def table(summaries: dict[str, dict]) -> list[str]:
    """Return the lines of a Markdown table of Dice, a row a class and one for all."""
    whats = {"as_segmented": "Dice", "postprocessed": "post-processed"}
    titles = [f" {whats[what]} | 95% interval | false positive cases |" for what in summaries]
    lines = [
        "| class | cases |" + "".join(titles),
        "| --- | ---: |" + " ---: | ---: | ---: |" * len(summaries),
    ]
    first = next(iter(summaries.values()))
    for name, scores in [*first["classes"].items(), ("all", first["all"])]:
        cells = [name.replace("|", "\\|"), str(scores["dice"]["n"])]
        for summary in summaries.values():
            found = summary["all"] if scores is first["all"] else summary["classes"][name]
            dice = found["dice"]
            mean_, low, high = (
                "-" if dice[key] is None else f"{dice[key]:.4f}" for key in ("mean", "low", "high")
            )
            cells += [mean_, f"{low} to {high}", str(found["false_positive_cases"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def lines_of_choice(choice: Choice, dice: dict[str, dict], output_root: Path) -> list[str]:
    """Describe for people the choice and the place of its file."""
    lines = [
        f"removed: {step.what} (Dice {step.before:.4f}, then {step.after:.4f})"
        for step in choice.steps
        if step.kept
    ]
    if not lines and not choice.harms:
        lines = ["nothing is removed from segmentations: no post-processing helps"]
    else:
        others, before = dice["chosen_on_other_folds"]["mean"], dice["as_segmented"]["mean"]
        change = f"{others:.4f} instead of {before:.4f}"
        says = f"to be expected of new cases, by what the other folds choose: {change}"
        if choice.harms:
            says = "nothing is removed from segmentations: what the other folds choose harms a "
            says += f"fold's cases (Dice {change})"
        lines.append(says)
    return [*lines, f"scores, summary.json and postprocessing.json are in {output_root}"]


if __name__ == "__main__":
    exit_on_user_error(main, parse(CrossValidationSettings, __doc__))
