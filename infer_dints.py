"""Segment volumes with a retrained network, and score the segmentations where labels are known: stage 3 of DiNTS.

    python infer_dints.py --checkpoint runs/train/best_metric_model.pth --input data_msd/Task09_Spleen/imagesTs
    python infer_dints.py --checkpoint runs/train/best_metric_model.pth --root data_msd/Task09_Spleen

The model file holds the network and its preprocessing. With --input, every given NIfTI file (or every one in a given
folder) is segmented. With --root, the model's validation cases are, or those of another --fold, and
OUTPUT_ROOT/scores.csv tells each case's Dice on the grid of its own label, as a challenge would compute it. Cases that
the model was trained on are refused. Segmentations have the grid of their image.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dints.data.tasks import TASKS
from dints.options import Settings, number, option, parse, with_defaults
from dints.settings import CompilingMachineSettings, DataSettings, WindowSettings


@dataclass(frozen=True, kw_only=True)
class InputSettings(Settings):
    """Input."""

    checkpoint: tuple[Path, ...] = option(
        "best_metric_model.pth of train_dints.py; of several, as of all folds, class probabilities "
        "are averaged",
        common=True,
        type=Path,
        nargs="+",
    )
    input: tuple[Path, ...] = option(
        "images, or folders of images or DICOM series, to segment",
        common=True,
        default=(),
        type=Path,
        nargs="+",
    )
    allow_training_cases: bool = option(
        "segment and score also cases that the model was trained on, and mark them in scores.csv",
        default=False,
    )
    tta: bool = option(
        "average over flips of the volume along the axes that the model was trained to flip: 2 to "
        "8 times as long",
        default=False,
    )
    postprocessing: Path | None = option(
        "postprocessing.json that FOLD=each train_dints.sh writes: which components are removed "
        "(default: none)",
        default=None,
        type=Path,
    )


@dataclass(frozen=True, kw_only=True)
class OutputSettings(Settings):
    """Output."""

    output_root: Path = option(
        "folder for everything that is written",
        common=True,
        default=Path("segmentations"),
        type=Path,
    )
    save_probabilities: bool = option(
        "write each class's probability too, OUTPUT_ROOT/probabilities/<case>, in steps of 1/255",
        default=False,
    )
    save_uncertainty: bool = option(
        "write where the network is in doubt, OUTPUT_ROOT/uncertainty/<case>: entropy, 1 where all "
        "classes are equally probable",
        default=False,
    )
    report: bool = option(
        "write OUTPUT_ROOT/report.html: scores, volumes, pictures of cases, the model; it needs "
        "nothing beside it",
        common=True,
        default=False,
    )
    describe: bool = option(
        "print what the model is as JSON, and segment nothing unless asked to", default=False
    )
    export: tuple[str, ...] = option(
        "do not segment, but write the network to OUTPUT_ROOT as onnx, exported_program (PyTorch's) "
        "or bundle (MONAI's), or several; each is checked on the first image, on the CPU in fp32",
        default=(),
        nargs="+",
        choices=("onnx", "exported_program", "bundle"),
        metavar="KIND",
    )


@dataclass(frozen=True, kw_only=True)
class ForeignSettings(Settings):
    """Weights of MONAI's DiNTS.

    --checkpoint is a state dict; these, --spacing, --intensity_range, --patch_size, and --json or
    --root say what it is of.
    """

    arch_ckpt: Path | None = option(
        "architecture of weights that come alone: an arch file, NumPy arrays too",
        default=None,
        type=Path,
    )
    msd_task: str | None = option(
        "their task, of the Decathlon, in place of --json",
        default=None,
        choices=tuple(TASKS),
        metavar="TASK",
    )
    channel_mul: float | None = option(
        "times 32, 64, ... channels (default: 1)", default=None, type=number(float, 1 / 32)
    )
    use_downsample: str | None = option(
        "they halve the image first (default: as ARCH_CKPT says, else yes)",
        default=None,
        choices=("yes", "no"),
    )


@dataclass(frozen=True, kw_only=True)
class InferSettings(Settings):
    """What infer_dints.py goes by."""

    input: InputSettings
    data: with_defaults(DataSettings, root=None, fold=None)
    output: OutputSettings
    foreign: ForeignSettings
    window: with_defaults(WindowSettings, overlap_ratio=None)
    machine: CompilingMachineSettings

    def complaints(self) -> Iterable[str]:
        data, foreign, has_input = self.data, self.foreign, bool(self.input.input)
        if (has_input and data.root) or not (has_input or data.root or self.output.describe):
            yield (
                "give either --input (images to segment) or --root (a dataset whose fold is "
                "segmented and scored)"
            )
        names = {"msd_task": foreign, "channel_mul": foreign, "use_downsample": foreign}
        names |= {"spacing": data, "intensity_range": data, "patch_size": data}
        given = [f"--{name}" for name, group in names.items() if getattr(group, name) is not None]
        if foreign.arch_ckpt is None and given:
            yield f"{', '.join(given)}: only with --arch_ckpt, a model file has its own"
        if foreign.arch_ckpt is not None and not (foreign.msd_task or data.json or data.root):
            yield "--arch_ckpt needs --msd_task, --json or --root, which name channels and classes"
        if self.output.export and (len(self.input.checkpoint) > 1 or self.input.tta):
            yield "--export writes one network as it is: give one --checkpoint, and no --tta"


def parse_args(argv: list[str] | None = None) -> InferSettings:
    settings = parse(InferSettings, __doc__, argv)
    if not settings.output.export:
        return settings
    machine = replace(settings.machine, device="cpu", precision="fp32", compile="off")
    return replace(settings, machine=machine)


if __name__ == "__main__":  # before the imports below take seconds
    SETTINGS = parse_args()

import csv
import io
import json
import logging
import time

import numpy as np
from tqdm import tqdm

from dints import __version__, files
from dints.data.cases import Case, read_image, read_label
from dints.data.fingerprint import overridden
from dints.data.formats import read_task
from dints.data.leniency import Leniency
from dints.data.listing import ENDING, ListedCase
from dints.data.nifti import Header, read_header, save_map, save_segmentation
from dints.data.plausibility import doubts
from dints.data.tasks import Task
from dints.errors import PartlyDone, UserError, exit_on_user_error
from dints.evaluation import postprocessing
from dints.evaluation.postprocessing import Postprocessing
from dints.exports.checked import export
from dints.inference import selection
from dints.inference.card import card
from dints.inference.decision import MAPS, UNITS, Decision
from dints.inference.predictor import Predictor
from dints.inference.records import Records, check_name, map_path, precision_of_earlier
from dints.inference.selection import Selection
from dints.network.architecture import load_architecture
from dints.network.model_file import Model, load_model, model_of_weights
from dints.report import page
from dints.running.precision import choose_precision
from dints.running.processes import Processes, started
from dints.running.run_folder import opened
from dints.training.validation import Overlaps, Scores

log = logging.getLogger("infer")


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
