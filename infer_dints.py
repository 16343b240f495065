r"""Segment volumes with a retrained network, and score the segmentations where labels are known:
stage 3 of DiNTS.

    python infer_dints.py --checkpoint runs/train/best_metric_model.pth \
        --input data_msd/Task09_Spleen/imagesTs
    python infer_dints.py --checkpoint runs/train/best_metric_model.pth \
        --root data_msd/Task09_Spleen

The model file holds the network and its preprocessing. With --input, every given NIfTI file (or
every one in a given folder) is segmented. With --root, the model's validation cases are, or those
of another --fold, and OUTPUT_ROOT/scores.csv tells each case's Dice on the grid of its own label,
as a challenge would compute it. Cases that the model was trained on are refused. Segmentations have
the grid of their image.
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
        "do not segment, but write the network to OUTPUT_ROOT as onnx, exported_program "
        "(PyTorch's) or bundle (MONAI's), or several; each is checked on the first image, on the "
        "CPU in fp32",
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
from dints.data.cases import read_image, read_label
from dints.data.dataset import overridden
from dints.data.formats import read_task
from dints.data.listing import ENDING, Case, ReadOptions
from dints.data.nifti import Header, read_header, save_map, save_segmentation
from dints.data.plausibility import unusual
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


def main(settings: InferSettings) -> None:
    if settings.output.describe:
        cards = [card(model) for model in load_models(settings)]
        print(json.dumps(cards if len(cards) > 1 else cards[0], indent=2))
    if not settings.input.input and settings.data.root is None:
        return
    machine = settings.machine
    with (
        started(machine.device, machine.timeout_minutes) as processes,
        opened(settings.output.output_root, processes) as folder,
    ):
        infer(settings, processes, folder)


def infer(settings: InferSettings, processes: Processes, folder: Path) -> None:
    """Segment the cases that the settings select, and score those with a label."""
    models = load_models(settings)
    predictor = open_predictor(settings, models, processes, folder)
    task, output = predictor.task, settings.output
    selected = processes.on_main(select, settings, predictor)
    if output.export:
        processes.on_main(export, output.export, predictor, selected.first_file(), folder)
        return
    paths = processes.on_main(selection.segmentation_paths, selected.cases, folder)
    removal = processes.on_main(read_postprocessing, settings.input.postprocessing, task)
    processes.on_main(selection.remove_converted, folder)
    facts = {"searched_on": [model.architecture.searched_on for model in predictor.models]}
    records = Records(folder, facts_of_segmentation(settings, predictor, removal), facts)
    maps = [name for name in MAPS if getattr(output, f"save_{name}")]
    batch = Batch(predictor, removal, records, maps)
    try:
        faults = processes.on_main(selected.faults, task, models[0].channels)
        name = predictor.precision.name
        log.info("%d volumes, %s in %s", len(faults), processes.device.type, name)
        processes.on_main(records.start, paths)
        scores, failed = batch.segment_all(selected.cases, faults, paths, processes)
        if processes.is_main:
            records.write_run(paths)
        if len(failed) == len(paths):
            others = ""
            if len(paths) > 1:
                others = f"none of the {len(paths)} cases can be segmented, for example "
            raise UserError(others + next(iter(failed.values())))
        if processes.is_main:
            report_scores(settings, selected.cases, scores, paths, predictor)
        if processes.is_main and output.report:
            cases = [fault or case for case, fault in zip(selected.cases, faults, strict=True)]
            written = page.write(folder, cases, paths, models, settings.input.checkpoint)
            log.info("the report is %s", written)
    finally:
        if processes.is_main:
            selection.remove_converted(folder)
    log.info("segmentations are in %s", folder)
    if failed:
        name, fault = next(iter(failed.items()))
        raise PartlyDone(
            f"{len(failed)} of {len(paths)} cases are not segmented ({folder / 'run.json'} lists "
            f"them), for example {name}: {fault}"
        )


@dataclass(frozen=True)
class Batch:
    """Segments one case after another, and writes the masks and maps.

    Attributes:
        maps: that are written beside a segmentation, of `dints.inference.decision.MAPS`.
    """

    predictor: Predictor
    postprocessing: Postprocessing
    records: Records
    maps: list[str]

    def segment_all(
        self,
        cases: list[Case],
        faults: list[UserError | None],
        outputs: list[Path],
        processes: Processes,
    ) -> tuple[Scores, dict[str, str]]:
        """Segment this rank's share of the cases.

        Returns:
            the scores of all ranks' cases; the reasons of those that failed.
        """
        task, failed = self.predictor.task, {}
        overlaps = Overlaps(len(cases), task.num_classes, processes)
        silent = None if processes.is_main else True
        share = processes.share(len(cases))
        for index in tqdm(share, desc="segmenting", unit="volume", disable=silent):
            case, output = cases[index], outputs[index]
            paths = [output, *(map_path(output, name) for name in self.maps)]
            try:
                labels, reference = self.segment_case(case, faults[index], paths)
            except UserError as error:
                failed[output.name] = str(error)
                self.records.note_failed(case, paths, str(error))
                log.warning("%s is left out: %s", output.name, error)
                continue
            if reference is not None:
                overlaps.add(index, labels, reference)
        processes.wait_for_all("segmented")  # shares take unequal times
        of_ranks = processes.gather(failed)
        failed = {name: fault for of_rank in of_ranks for name, fault in of_rank.items()}
        return overlaps.scores(), failed

    def segment_case(
        self, case: Case, fault: UserError | None, paths: list[Path]
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Segment a case, unless that is done, and write its segmentation and maps.

        Args:
            paths: of its segmentation, and of the maps that are written beside it.

        Returns:
            Its labels and those of its reference, (x, y, z); neither where there is no reference.

        Raises:
            UserError: it cannot be segmented, or not scored.
        """
        check_name(paths[0])
        if fault is not None:
            raise fault
        task, label = self.predictor.task, case.label_header
        # First, so that a bad one costs no segmentation.
        reference = None if label is None else read_label(label, task)
        for remark in unusual(case, self.predictor.ranges):
            log.warning("%s is unusual: %s", paths[0].name, remark)
        start = time.monotonic()
        if self.records.is_done(case, paths):
            if reference is None:
                return None, None
            return read_label(read_header(str(paths[0])), task), reference
        decision = self.decide(case)
        labels = self.postprocessing.apply(decision.labels, case.headers[0].spacing)
        decision = replace(decision, labels=labels)
        self.records.forget(paths[0])  # not before there is something to take its place
        self.save(decision, case.headers[0], paths)
        self.records.note_done(case, paths, time.monotonic() - start)
        return labels, reference

    def decide(self, case: Case) -> Decision:
        """Segment a case's image on its file's own grid."""

        def read() -> np.ndarray:
            voxels, replaced = read_image(case)
            if replaced:
                log.warning("%s: %d NaN or infinite voxels are replaced", case.images[0], replaced)
            return voxels

        return self.predictor.segment(read, case.affine, case.name, self.maps)

    def save(self, decision: Decision, image: Header, paths: list[Path]) -> None:
        """Write a segmentation, and after it the maps beside it."""
        save_segmentation(decision.labels, image, paths[0])
        for path, name in zip(paths[1:], self.maps, strict=True):
            values = getattr(decision, name)
            values = values if values.ndim == 3 else np.moveaxis(values, 0, -1)
            save_map(values, image, path, UNITS)


def load_models(settings: InferSettings) -> list[Model]:
    """Read the model files; or weights alone, with the settings that say what they are of."""
    paths, foreign = settings.input.checkpoint, settings.foreign
    if foreign.arch_ckpt is None:
        return [load_model(path) for path in paths]
    architecture = load_architecture(foreign.arch_ckpt)
    if foreign.use_downsample is not None:
        is_halved = foreign.use_downsample == "yes"
        architecture = replace(architecture, use_downsample=is_halved)
    width = foreign.channel_mul or architecture.channel_mul
    task = foreign_task(settings)
    return [model_of_weights(path, architecture, width, task) for path in paths]


def foreign_task(settings: InferSettings) -> Task:
    """Return the task of weights that come without one."""
    data, name = settings.data, settings.foreign.msd_task
    if name is not None:
        task = TASKS[name]
    else:
        task = read_task(data.json.parent if data.root is None else data.root, data.json)
        if task.name not in TASKS:
            task = replace(task, spacing=(1.0, 1.0, 1.0))  # as in the published experiments
    task = overridden(task, data)
    if task.modality == "CT" and task.intensity is None:
        raise UserError(
            f"{task.name} is CT: give the window that the weights were trained with, "
            "--intensity_range"
        )
    return task


def open_predictor(
    settings: InferSettings, models: list[Model], processes: Processes, folder: Path
) -> Predictor:
    """Make the predictor, in a precision that all ranks choose alike.

    ``auto`` is that of the folder's earlier batch by the same models, if there was one.
    """
    machine, window = settings.machine, settings.window
    name = machine.precision
    if name == "auto" and processes.device.type == "cpu":
        digests = [model.digest for model in models]
        name = processes.on_main(precision_of_earlier, folder, digests) or name
    return Predictor(
        models,
        machine.device,
        choose_precision(name, processes).name,
        overlap=window.overlap_ratio,
        batch_size=window.num_sw_batch_size,
        mirrored=settings.input.tta,
        compile=machine.compile,
    )


def read_postprocessing(path: Path | None, task: Task) -> Postprocessing:
    """Read which components are removed from segmentations: none, where no file is given."""
    if path is None:
        return Postprocessing.nothing(task.class_names)
    return postprocessing.read(path, task.class_names)


def facts_of_segmentation(
    settings: InferSettings, predictor: Predictor, removal: Postprocessing
) -> dict[str, object]:
    """Gather all that segmentations depend on beside their images; models by their content."""
    facts = {
        "models": [model.digest for model in predictor.models],
        "version": __version__,
        "precision": predictor.precision.name,
        "overlap": predictor.window.overlap,
        "mirrored_axes": list(predictor.axes),
        "replace_nonfinite": settings.data.replace_nonfinite,
    }
    return facts | ({"postprocessing": removal.to_dict()} if removal.removes else {})


def select(settings: InferSettings, predictor: Predictor) -> Selection:
    """List the cases under ``--root`` to score, or the images of ``--input``."""
    data, task = settings.data, predictor.task
    if settings.input.input:
        images, channels = settings.input.input, predictor.models[0].channels
        output_root = settings.output.output_root
        selected = selection.given_images(images, task, channels, output_root)
    else:
        selection.check_classes(data.root, data.json, task)
        selected = selection.cases_to_score(
            data.root,
            data.json,
            data.json_key,
            fold=data.fold,
            num_folds=data.num_folds,
            trained_on=predictor.training_cases,
            validated_on=predictor.validation_cases,
            allow_training_cases=settings.input.allow_training_cases,
        )
    options = ReadOptions(data.trust_shapes, data.replace_nonfinite)
    return replace(selected, cases=[replace(case, options=options) for case in selected.cases])


def report_scores(
    settings: InferSettings,
    cases: list[Case],
    scores: Scores,
    outputs: list[Path],
    predictor: Predictor,
) -> None:
    """Write scores.csv and print the mean, if any of the cases has a label."""
    if all(case.label is None for case in cases):
        return
    trained_on = predictor.training_cases & {case.name for case in cases}
    marked = trained_on if settings.input.allow_training_cases else None
    path = settings.output.output_root / "scores.csv"
    write_scores(path, scores, outputs, predictor.task, marked)
    remark = f", {len(trained_on)} training cases among them" * bool(marked)
    print(scores.describe(predictor.task.class_names) + remark)


def write_scores(
    path: Path, scores: Scores, outputs: list[Path], task: Task, trained_on: set[str] | None
) -> None:
    """Write a row per case: Dice of each class, empty where the case does not have the class.

    Args:
        trained_on: cases that the model was trained on; None where there is no need to mark them.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text)
    marks = ["trained_on"] if trained_on is not None else []
    table.writerow(["case", *task.class_names[1:], *marks])
    for output, dice in zip(outputs, scores.dice.tolist(), strict=True):
        name = ENDING.sub("", output.name)
        marks = [] if trained_on is None else ["yes" if name in trained_on else "no"]
        values = ("" if value != value else f"{value:.6f}" for value in dice)
        table.writerow([output.name, *values, *marks])
    files.write_atomically(path, text.getvalue())


if __name__ == "__main__":
    exit_on_user_error(main, SETTINGS)
