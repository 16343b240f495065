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
import io
import logging
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from dints import __version__, data, exports, files, inference, network, options, running, training
from dints.errors import PartlyDone, UserError, exit_on_user_error

if TYPE_CHECKING:  # PyTorch is imported with the first module that is used, after the command line is read
    from dints.data.cases import Case
    from dints.data.leniency import Leniency
    from dints.data.listing import ListedCase
    from dints.data.tasks import Task
    from dints.inference.predictor import Predictor
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
    parser.add_argument("--output_root", type=Path, default=Path("segmentations"), help="folder for what is written")
    options.add_data(parser, required=False)
    parser.set_defaults(fold=None)
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
        "--export",
        nargs="+",
        choices=("onnx", "exported_program", "bundle"),
        metavar="KIND",
        help="do not segment, but write the network to OUTPUT_ROOT as onnx, exported_program (PyTorch's) or bundle "
        "(MONAI's), or several; each is checked on the first image, on the CPU in fp32",
    )
    options.add_machine(parser)
    args = parser.parse_args(argv)
    if (args.input is None) == (args.root is None):
        parser.error("give either --input (images to segment) or --root (a dataset whose fold is segmented and scored)")
    complaints = options.data_complaints(args)
    if args.export and (len(args.checkpoint) > 1 or args.tta):
        complaints.append("--export writes one network as it is: give one --checkpoint, and no --tta")
    if complaints:
        parser.error("; ".join(complaints))
    if args.export:
        args.device, args.precision, args.compile = "cpu", "fp32", "off"
    return args


def main(args: argparse.Namespace) -> None:
    with (
        running.processes.started(args.device, args.timeout_minutes) as processes,
        running.run_folder.opened(args.output_root, processes) as folder,
    ):
        infer(args, processes, folder)


def infer(args: argparse.Namespace, processes: Processes, folder: Path) -> None:
    models = [network.model_file.load_model(path) for path in args.checkpoint]
    precision = running.precision.choose_precision(args.precision, processes).name  # of all ranks alike
    settings = {**options.window(args), "mirrored": args.tta, "compile": args.compile}
    predictor = inference.predictor.Predictor(models, args.device, precision, **settings)
    task, leniency = predictor.task, options.leniency(args)
    selected = processes.on_main(cases_to_segment, args, predictor)
    if args.export:
        processes.on_main(exports.checked.export, args.export, predictor, selected[0], folder)
        return
    outputs = processes.on_main(segmentation_paths, selected, folder)
    cases = processes.on_main(data.cases.try_to_open, selected, task, leniency)
    records = inference.records.Records(folder, settings_of(args, predictor))
    log.info("%d volumes, %s in %s", len(cases), processes.device.type, precision)

    overlaps, faults = training.validation.Overlaps(len(cases), task.num_classes, processes), {}
    share = processes.share(len(cases))
    for number in tqdm(share, desc="segmenting", unit="volume", disable=None if processes.is_main else True):
        output, start = outputs[number], time.monotonic()
        try:
            if isinstance(cases[number], UserError):
                raise cases[number]
            # First, so that a bad one costs no segmentation.
            label = None if cases[number].label is None else data.cases.read_label(cases[number].label, task)
            for doubt in data.plausibility.doubts(cases[number], predictor.ranges):
                log.warning("%s is unusual: %s", output.name, doubt)
            done = records.is_done(selected[number], output)
            segmentation = None if done else segment(cases[number], predictor, leniency)
        except UserError as error:
            faults[output.name] = str(error)
            records.note_failed(output, str(error))
            log.warning("%s is left out: %s", output.name, error)
            continue
        if not done:
            data.nifti.save_segmentation(segmentation, cases[number].images[0], output)
            records.note_done(selected[number], output, time.monotonic() - start)
        if label is not None:
            written = data.cases.read_label(data.nifti.read_header(str(output)), task) if done else segmentation
            overlaps.add(number, written, label)
    scores = overlaps.scores()
    faults = {name: fault for of_rank in processes.gather(faults) for name, fault in of_rank.items()}
    if processes.is_main:
        records.write_run(outputs)
    if len(faults) == len(cases):
        others = "" if len(cases) == 1 else f"none of the {len(cases)} cases can be segmented, for example "
        raise UserError(others + next(iter(faults.values())))
    if processes.is_main and any(case.label is not None for case in selected):
        trained_on = predictor.training_cases & {case.name for case in selected}
        write_scores(folder / "scores.csv", scores, outputs, task, trained_on if args.allow_training_cases else None)
        print(scores.describe(task.class_names) + f", {len(trained_on)} training cases among them" * bool(trained_on))
    log.info("segmentations are in %s", folder)
    if faults:
        name, fault = next(iter(faults.items()))
        raise PartlyDone(
            f"{len(faults)} of {len(cases)} cases are not segmented ({folder / 'run.json'} lists them), for example "
            f"{name}: {fault}"
        )


def settings_of(args: argparse.Namespace, predictor: Predictor) -> dict[str, object]:
    """Gather what segmentations depend on beside their images; of models the content, wherever their files lie."""
    return {
        "models": [model.digest for model in predictor.models],
        "version": __version__,
        "precision": predictor.precision.name,
        "overlap": predictor.window.overlap,
        "mirrored_axes": list(predictor.axes),
        "replace_nonfinite": args.replace_nonfinite,
    }


def segment(case: Case, predictor: Predictor, leniency: Leniency) -> np.ndarray:
    """Return the label of each voxel of a case's image, on its file's own grid."""

    def read() -> np.ndarray:
        voxels, replaced = data.cases.read_image(case.images, leniency)
        if replaced:
            log.warning("%s: %d NaN or infinite voxels are replaced", case.images[0].path, replaced)
        return voxels

    return predictor.segment(read, case.images[0].affine, case.name)


def cases_to_segment(args: argparse.Namespace, predictor: Predictor) -> list[ListedCase]:
    """List the cases under ``--root`` to score, or the images of ``--input``."""
    task = predictor.task
    if args.root is not None:
        classes = data.formats.described_classes(args.root, args.json)
        if classes not in (None, task.class_names):
            raise UserError(
                f"--root {args.root} has the classes {', '.join(classes)}, and {args.checkpoint[0]} segments "
                f"{', '.join(task.class_names)}: give a dataset with the model's classes"
            )
        return cases_to_score(args, predictor)
    images = []
    for path in args.input:
        if not path.exists():
            raise UserError(f"--input {path} does not exist: give images (.nii or .nii.gz), or folders of images")
        found = images_in(path, args.output_root) if path.is_dir() else [path]
        if not found or not data.listing.ENDING.search(found[0].name):
            raise UserError(f"--input {path} is no NIfTI file, nor a folder that holds any: give .nii or .nii.gz files")
        images.extend(found)
    if task.channel_files:
        return cases_of_channels(images, task.num_channels)
    return [data.listing.ListedCase(data.listing.ENDING.sub("", image.name), (str(image),)) for image in images]


def images_in(folder: Path, output_root: Path) -> list[Path]:
    """List the NIfTI files in a folder and its folders, but for hidden ones, and for what this script writes."""
    written = output_root.resolve()
    return [
        path
        for path in sorted(folder.rglob("*"))
        if data.listing.ENDING.search(path.name)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
        and (written == folder.resolve() or written not in path.resolve().parents)
    ]


def cases_to_score(args: argparse.Namespace, predictor: Predictor) -> list[ListedCase]:
    """List the model's validation cases, or those of ``--fold``; of a dataset that it knows nothing of, all cases."""
    listed = data.formats.list_cases(args.root, args.json, args.json_key, args.allow_outside_root)
    known = predictor.training_cases | predictor.validation_cases
    if args.fold is not None:
        training_cases, validation_cases = data.listing.split_fold(listed, **options.folds(args))
        selected = validation_cases or training_cases
    elif all(case.label is None for case in listed):
        selected = listed
    elif not known:
        raise UserError(
            f"{args.checkpoint[0]} does not say which cases it was trained on: give --fold and --num_folds of its "
            "training, or --fold all for a dataset that is new to it"
        )
    elif known.isdisjoint(case.name for case in listed):
        log.info("none of these cases took part in the model's training: all of them are scored")
        selected = listed
    else:
        selected = [case for case in listed if case.name in predictor.validation_cases] or listed
    trained_on = predictor.training_cases & {case.name for case in selected}
    if trained_on and not args.allow_training_cases:
        raise UserError(
            f"the model was trained on {len(trained_on)} of these {len(selected)} cases, for example "
            f"{', '.join(sorted(trained_on)[:3])}: leave --fold out to score its validation cases, if it has any, or "
            "give --allow_training_cases"
        )
    return selected


def cases_of_channels(images: list[Path], num_channels: int) -> list[ListedCase]:
    """List the cases that ``<case>_0000``, ``<case>_0001``, ... make together, a file a channel."""
    channels = defaultdict(dict)
    for image in images:
        parts = re.fullmatch(r"(.+)_(\d{4})\.nii(\.gz)?", image.name, re.IGNORECASE)
        if parts is None:
            raise UserError(
                f"--input {image}: this model takes a file a channel, <case>_0000, <case>_0001, ...: rename"
            )
        channels[image.parent / parts[1]][int(parts[2])] = str(image)
    for case, files_of_case in channels.items():
        if sorted(files_of_case) != list(range(num_channels)):
            raise UserError(
                f"--input {case} has the channels {sorted(files_of_case)}; this model takes 0 to {num_channels - 1}: "
                "add or remove files"
            )
    return [
        data.listing.ListedCase(case.name, tuple(files_of_case[channel] for channel in range(num_channels)))
        for case, files_of_case in channels.items()
    ]


def segmentation_paths(selected: list[ListedCase], folder: Path) -> list[Path]:
    """Return where each case's segmentation goes: under its name; never onto another case's, nor onto an input."""
    ending = data.listing.ENDING
    names = Counter(case.name + ending.search(case.images[0])[0] for case in selected)
    inputs = {Path(path).resolve() for case in selected for path in case.files}
    for name, count in names.items():
        if count > 1:
            raise UserError(f"{count} images are called {name}: give each a run with its own --output_root")
        if (folder / name).resolve() in inputs:
            raise UserError(f"{folder / name} is an input and would be overwritten: give another --output_root")
    return [folder / name for name in names]


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
