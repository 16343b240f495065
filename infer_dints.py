"""Segment volumes with a retrained network, and score the segmentations where labels are known: stage 3 of DiNTS.

    python infer_dints.py --checkpoint runs/train/best_metric_model.pth --input data_msd/Task09_Spleen/imagesTs
    python infer_dints.py --checkpoint runs/train/best_metric_model.pth --root data_msd/Task09_Spleen

The model file holds the network and its preprocessing. With --input, every given NIfTI file (or every one in a given
folder) is segmented. With --root, the model's validation cases are, or those of another --fold, and
OUTPUT_ROOT/scores.csv tells each case's Dice on the grid of its own label, as a challenge would compute it. Cases that
the model was trained on are refused. Segmentations have the grid of their image.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from dints import __version__, data, evaluation, exports, files, inference, network, options, report, running, training
from dints.data.tasks import TASKS
from dints.errors import PartlyDone, UserError, exit_on_user_error

if TYPE_CHECKING:  # PyTorch is imported with the first module that is used, after the command line is read
    from dints.data.cases import Case
    from dints.data.leniency import Leniency
    from dints.data.listing import ListedCase
    from dints.data.nifti import Header
    from dints.data.tasks import Task
    from dints.evaluation.postprocessing import Postprocessing
    from dints.inference.decision import Decision
    from dints.inference.predictor import Predictor
    from dints.inference.records import Records
    from dints.inference.selection import Selection
    from dints.network.model_file import Model
    from dints.running.processes import Processes
    from dints.training.validation import Scores

log = logging.getLogger("infer")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        required=True,
        help="best_metric_model.pth of train_dints.py; of several, as of all folds, class probabilities are averaged",
    )
    parser.add_argument("--input", type=Path, nargs="+", help="images, or folders of images, to segment")
    options.add_data(parser, required=False)
    parser.set_defaults(fold=None)
    add_foreign(parser)
    parser.add_argument(
        "--allow_training_cases",
        action="store_true",
        help="segment and score also cases that the model was trained on, and mark them in scores.csv",
    )
    options.add_window(parser, overlap_ratio=None)
    parser.add_argument(
        "--tta",
        action="store_true",
        help="average over flips of the volume along the axes that the model was trained to flip: 2 to 8 times as long",
    )
    parser.add_argument(
        "--postprocessing",
        type=Path,
        help="postprocessing.json that FOLD=each train_dints.sh writes: which components are removed (default: none)",
    )
    add_written(parser)
    options.add_machine(parser)
    args = parser.parse_args(argv)
    complaints = [*options.data_complaints(args), *complaints_of(args)]
    if complaints:
        parser.error("; ".join(complaints))
    if args.export:
        args.device, args.precision, args.compile = "cpu", "fp32", "off"
    return args


def add_written(parser: argparse.ArgumentParser) -> None:
    """Add what is written and printed."""
    add = parser.add_argument_group("what is written").add_argument
    add("--output_root", type=Path, default=Path("segmentations"), help="folder for what is written")
    add(
        "--save_probabilities",
        action="store_true",
        help="write each class's probability too, OUTPUT_ROOT/probabilities/<case>, in steps of 1/255",
    )
    add(
        "--save_uncertainty",
        action="store_true",
        help="write where the network is in doubt, OUTPUT_ROOT/uncertainty/<case>: entropy, 1 where all classes are "
        "equally probable",
    )
    add(
        "--report",
        action="store_true",
        help="write OUTPUT_ROOT/report.html: scores, volumes, pictures of cases, the model; it needs nothing beside it",
    )
    add("--describe", action="store_true", help="print what the model is as JSON, and segment nothing unless asked to")
    add(
        "--export",
        nargs="+",
        choices=("onnx", "exported_program", "bundle"),
        metavar="KIND",
        help="do not segment, but write the network to OUTPUT_ROOT as onnx, exported_program (PyTorch's) or bundle "
        "(MONAI's), or several; each is checked on the first image, on the CPU in fp32",
    )


def add_foreign(parser: argparse.ArgumentParser) -> None:
    """Add what a model file knows, for weights that come without one."""
    group = parser.add_argument_group(
        "weights of MONAI's DiNTS, as the tutorial and the model zoo have them",
        "--checkpoint is a state dict; these, the options of preprocessing, and --json or --root say what it is of",
    )
    add = group.add_argument
    add("--arch_ckpt", type=Path, help="its architecture: an arch file, NumPy arrays too")
    add("--msd_task", choices=tuple(TASKS), metavar="TASK", help="its task, of the Decathlon, in place of --json")
    add("--channel_mul", type=options.number(float, 1 / 32), help="times 32, 64, ... channels (default: 1)")
    add(
        "--use_downsample",
        choices=("yes", "no"),
        help="it halves the image first (default: as ARCH_CKPT says, else yes)",
    )
    options.add_preprocessing(parser)


def complaints_of(args: argparse.Namespace) -> list[str]:
    """List what is wrong with the options taken together."""
    found = []
    count = sum(given is not None for given in (args.input, args.root))
    if count > 1 or (count == 0 and not args.describe):
        found.append("give either --input (images to segment) or --root (a dataset whose fold is segmented and scored)")
    names = ("msd_task", "channel_mul", "use_downsample", "spacing", "intensity_range", "patch_size")
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    if args.arch_ckpt is None and given:
        found.append(f"{', '.join(given)}: only with --arch_ckpt, a model file has its own")
    if args.arch_ckpt is not None and not (args.msd_task or args.json or args.root):
        found.append("--arch_ckpt needs --msd_task, --json or --root, which name channels and classes")
    if args.export and (len(args.checkpoint) > 1 or args.tta):
        found.append("--export writes one network as it is: give one --checkpoint, and no --tta")
    return found


def main(args: argparse.Namespace) -> None:
    if args.describe:
        cards = [inference.card.card(model) for model in load_models(args)]
        print(json.dumps(cards if len(cards) > 1 else cards[0], indent=2))
    if args.input is None and args.root is None:
        return
    with (
        running.processes.started(args.device, args.timeout_minutes) as processes,
        running.run_folder.opened(args.output_root, processes) as folder,
    ):
        infer(args, processes, folder)


def infer(args: argparse.Namespace, processes: Processes, folder: Path) -> None:
    models = load_models(args)
    precision = chosen_precision(args.precision, models, processes, folder)
    settings = {**options.window(args), "mirrored": args.tta, "compile": args.compile}
    predictor = inference.predictor.Predictor(models, args.device, precision, **settings)
    task, leniency = predictor.task, options.leniency(args)
    selection = processes.on_main(volumes_to_segment, args, predictor)
    if args.export:
        processes.on_main(exports.checked.export, args.export, predictor, selection.first_file(), folder)
        return
    outputs = processes.on_main(inference.selection.segmentation_paths, selection.cases, folder)
    postprocessing = processes.on_main(chosen_postprocessing, args.postprocessing, task)
    processes.on_main(inference.selection.remove_converted, folder)
    facts = {"searched_on": [model.architecture.searched_on for model in predictor.models]}
    records = inference.records.Records(folder, settings_of(args, predictor, postprocessing), facts)
    maps = [name for name in inference.decision.MAPS if getattr(args, f"save_{name}")]
    manner = Manner(predictor, postprocessing, records, leniency, maps)
    try:
        cases = processes.on_main(selection.opened, task, models[0].channels, leniency)
        log.info("%d volumes, %s in %s", len(cases), processes.device.type, precision)
        processes.on_main(records.start, outputs)
        scores, faults = segment_cases(selection, cases, outputs, manner, processes)
        if processes.is_main:
            records.write_run(outputs)
        if len(faults) == len(cases):
            others = "" if len(cases) == 1 else f"none of the {len(cases)} cases can be segmented, for example "
            raise UserError(others + next(iter(faults.values())))
        if processes.is_main and any(case.label is not None for case in selection.cases):
            trained_on = predictor.training_cases & {case.name for case in selection.cases}
            marked = trained_on if args.allow_training_cases else None
            write_scores(folder / "scores.csv", scores, outputs, task, marked)
            print(scores.describe(task.class_names) + f", {len(trained_on)} training cases among them" * bool(marked))
        if processes.is_main and args.report:
            page = report.page.write(folder, cases, outputs, predictor.models, args.checkpoint, leniency)
            log.info("the report is %s", page)
    finally:
        if processes.is_main:
            inference.selection.remove_converted(folder)
    log.info("segmentations are in %s", folder)
    if faults:
        name, fault = next(iter(faults.items()))
        raise PartlyDone(
            f"{len(faults)} of {len(cases)} cases are not segmented ({folder / 'run.json'} lists them), for example "
            f"{name}: {fault}"
        )


@dataclasses.dataclass(frozen=True)
class Manner:
    """How each case of a batch is segmented, and what is written of it.

    Attributes:
        records: of what is done.
        maps: that are written beside a segmentation, of `dints.inference.decision.MAPS`.
    """

    predictor: Predictor
    postprocessing: Postprocessing
    records: Records
    leniency: Leniency
    maps: list[str]


def segment_cases(
    selection: Selection, cases: list[Case | UserError], outputs: list[Path], manner: Manner, processes: Processes
) -> tuple[Scores, dict[str, str]]:
    """Segment this rank's share of the cases; return the scores of all ranks' cases, and why some have none."""
    overlaps, faults = training.validation.Overlaps(len(cases), manner.predictor.task.num_classes, processes), {}
    share = processes.share(len(cases))
    for number in tqdm(share, desc="segmenting", unit="volume", disable=None if processes.is_main else True):
        listed, output = selection.cases[number], outputs[number]
        paths = [output, *(inference.records.map_path(output, name) for name in manner.maps)]
        try:
            labels, reference = segmented(listed, cases[number], paths, manner)
        except UserError as error:
            faults[output.name] = str(error)
            manner.records.note_failed(listed, paths, str(error))
            log.warning("%s is left out: %s", output.name, error)
            continue
        if reference is not None:
            overlaps.add(number, labels, reference)
    processes.wait_for_all("segmented")  # shares take unequal times
    faults = {name: fault for of_rank in processes.gather(faults) for name, fault in of_rank.items()}
    return overlaps.scores(), faults


def segmented(
    listed: ListedCase, case: Case | UserError, paths: list[Path], manner: Manner
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Segment a case, unless that is done, and write what was wanted of it.

    Args:
        paths: of its segmentation, and of the maps that are wanted beside it.

    Returns:
        Its labels and those of its reference, (x, y, z); neither where there is no reference.

    Raises:
        UserError: it cannot be segmented, or not scored.
    """
    inference.records.check_name(paths[0])
    if isinstance(case, UserError):
        raise case
    predictor, records, maps = manner.predictor, manner.records, manner.maps
    # First, so that a bad one costs no segmentation.
    reference = None if case.label is None else data.cases.read_label(case.label, predictor.task)
    for doubt in data.plausibility.doubts(case, predictor.ranges):
        log.warning("%s is unusual: %s", paths[0].name, doubt)
    start = time.monotonic()
    if records.is_done(listed, paths):
        if reference is None:
            return None, None
        return data.cases.read_label(data.nifti.read_header(str(paths[0])), predictor.task), reference
    decision = segment(case, predictor, manner.leniency, maps)
    labels = manner.postprocessing.apply(decision.labels, case.images[0].spacing)
    decision = dataclasses.replace(decision, labels=labels)
    records.forget(paths[0])  # not before there is something to take its place
    save(decision, case.images[0], paths, maps)
    records.note_done(listed, paths, time.monotonic() - start)
    return labels, reference


def load_models(args: argparse.Namespace) -> list[Model]:
    """Read the model files; or weights alone, as of what the options say."""
    if args.arch_ckpt is None:
        return [network.model_file.load_model(path) for path in args.checkpoint]
    architecture = network.architecture.load_architecture(args.arch_ckpt)
    if args.use_downsample is not None:
        architecture = dataclasses.replace(architecture, use_downsample=args.use_downsample == "yes")
    width = architecture.channel_mul if args.channel_mul is None else args.channel_mul
    task = foreign_task(args)
    return [network.model_file.model_of_weights(path, architecture, width, task) for path in args.checkpoint]


def foreign_task(args: argparse.Namespace) -> Task:
    """Return the task of weights that come without one."""
    if args.msd_task is not None:
        task = TASKS[args.msd_task]
    else:
        task = data.formats.read_task(args.json.parent if args.root is None else args.root, args.json)
        if task.name not in TASKS:
            task = dataclasses.replace(task, spacing=(1.0, 1.0, 1.0))  # as in the published experiments
    changes = {"spacing": args.spacing, "intensity": args.intensity_range, "patch_size": args.patch_size}
    task = data.opening.overridden(task, **changes)
    if task.modality == "CT" and task.intensity is None:
        raise UserError(f"{task.name} is CT: give the window that the weights were trained with, --intensity_range")
    return task


def chosen_precision(name: str, models: list[Model], processes: Processes, folder: Path) -> str:
    """Choose the precision, of all ranks alike; ``auto`` is that of the folder's earlier batch by the same models."""
    if name == "auto" and processes.device.type == "cpu":
        digests = [model.digest for model in models]
        name = processes.on_main(inference.records.precision_of_earlier, folder, digests) or name
    return running.precision.choose_precision(name, processes).name


def chosen_postprocessing(path: Path | None, task: Task) -> Postprocessing:
    """Read what is removed from segmentations: nothing, where no file is given."""
    if path is None:
        return evaluation.postprocessing.Postprocessing.nothing(task.class_names)
    return evaluation.postprocessing.read(path, task.class_names)


def settings_of(args: argparse.Namespace, predictor: Predictor, postprocessing: Postprocessing) -> dict[str, object]:
    """Gather what segmentations depend on beside their images; of models the content, wherever their files lie."""
    settings = {
        "models": [model.digest for model in predictor.models],
        "version": __version__,
        "precision": predictor.precision.name,
        "overlap": predictor.window.overlap,
        "mirrored_axes": list(predictor.axes),
        "replace_nonfinite": args.replace_nonfinite,
    }
    return settings | ({"postprocessing": postprocessing.to_dict()} if postprocessing.removes else {})


def segment(case: Case, predictor: Predictor, leniency: Leniency, maps: list[str]) -> Decision:
    """Segment a case's image on its file's own grid."""

    def read() -> np.ndarray:
        voxels, replaced = data.cases.read_image(case.images, leniency)
        if replaced:
            log.warning("%s: %d NaN or infinite voxels are replaced", case.images[0].path, replaced)
        return voxels

    return predictor.segment(read, case.images[0].affine, case.name, maps)


def save(decision: Decision, image: Header, paths: list[Path], maps: list[str]) -> None:
    """Write a segmentation, and after it the maps that are wanted beside it."""
    data.nifti.save_segmentation(decision.labels, image, paths[0])
    for path, name in zip(paths[1:], maps, strict=True):
        values = getattr(decision, name)
        values = values if values.ndim == 3 else np.moveaxis(values, 0, -1)
        data.nifti.save_map(values, image, path, inference.decision.UNITS)


def volumes_to_segment(args: argparse.Namespace, predictor: Predictor) -> Selection:
    """List the cases under ``--root`` to score, or the images of ``--input``."""
    if args.input is not None:
        channels = predictor.models[0].channels
        return inference.selection.given_images(args.input, predictor.task, channels, args.output_root)
    inference.selection.check_classes(args.root, args.json, predictor.task)
    return inference.selection.cases_to_score(
        args.root,
        args.json,
        args.json_key,
        args.allow_outside_root,
        **options.folds(args),
        trained_on=predictor.training_cases,
        validated_on=predictor.validation_cases,
        allow_training_cases=args.allow_training_cases,
    )


def write_scores(path: Path, scores: Scores, outputs: list[Path], task: Task, trained_on: set[str] | None) -> None:
    """Write a row per case: Dice of each class, empty where the case does not have the class.

    Args:
        trained_on: names of cases that the model was trained on; None where there is no need to mark them.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["case", *task.class_names[1:], *(["trained_on"] if trained_on is not None else [])])
    for output, dice in zip(outputs, scores.dice.tolist(), strict=True):
        name = data.listing.ENDING.sub("", output.name)
        marks = [] if trained_on is None else ["yes" if name in trained_on else "no"]
        table.writerow([output.name, *("" if value != value else f"{value:.6f}" for value in dice), *marks])
    files.write_atomically(path, text.getvalue())


if __name__ == "__main__":
    exit_on_user_error(main, parse_args())
