r"""Segment volumes with a retrained network, and score those with labels: stage 3 of DiNTS.

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
from dints.options import Settings, fold, number, option, parse, with_defaults
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
class ScoredSettings(DataSettings):
    """Data.

    Which cases of a dataset are segmented and scored.
    """

    root: Path | None = option(
        "folder of the dataset, for example data_msd/Task09_Spleen",
        default=None,
        common=True,
        type=Path,
    )
    fold: int | str | None = option(
        "segment the validation cases of this fold; all: every case (default: those that the "
        "model was validated on)",
        default=None,
        common=True,
        type=fold,
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
    data: ScoredSettings
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

import json
import logging

from dints import __version__
from dints.data.dataset import overridden
from dints.data.formats import read_task
from dints.data.listing import ReadOptions
from dints.data.tasks import Task
from dints.errors import PartlyDone, UserError, exit_on_user_error
from dints.evaluation import postprocessing
from dints.evaluation.postprocessing import Postprocessing
from dints.inference import selection
from dints.inference.batch import Batch, write_scores
from dints.inference.card import card
from dints.inference.decision import MAPS
from dints.inference.predictor import Predictor
from dints.inference.records import Records, precision_of_earlier
from dints.inference.selection import Selection
from dints.network.architecture import load_architecture
from dints.network.model_file import Model, load_model, model_of_weights
from dints.running.precision import choose_precision
from dints.running.processes import Processes, started
from dints.running.run_folder import opened

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
        predictor = open_predictor(settings, processes, folder)
        selected = processes.on_main(select, settings, predictor)
        if settings.output.export:
            from dints.exports.checked import export  # with it ONNX

            case = selected.first_file()
            processes.on_main(export, settings.output.export, predictor, case, folder)
        else:
            infer(settings, predictor, selected, processes, folder)


def infer(
    settings: InferSettings,
    predictor: Predictor,
    selected: Selection,
    processes: Processes,
    folder: Path,
) -> None:
    """Segment the selected cases, and score those with a label."""
    task, models, output = predictor.task, predictor.models, settings.output
    paths = processes.on_main(selection.segmentation_paths, selected.cases, folder)
    removal = processes.on_main(read_postprocessing, settings.input.postprocessing, task)
    processes.on_main(selection.remove_converted, folder)
    facts = {"searched_on": [model.architecture.searched_on for model in models]}
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
            others = f"none of the {len(paths)} cases can be segmented, for example "
            raise UserError(others * (len(paths) > 1) + next(iter(failed.values())))
        if processes.is_main and any(case.label is not None for case in selected.cases):
            trained_on = predictor.training_cases & {case.name for case in selected.cases}
            marked = trained_on if settings.input.allow_training_cases else None
            write_scores(folder / "scores.csv", scores, paths, task, marked)
            remark = f", {len(trained_on)} training cases among them" * bool(marked)
            print(scores.describe(task.class_names) + remark)
        if processes.is_main and output.report:
            from dints.report import page  # with it matplotlib

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


def open_predictor(settings: InferSettings, processes: Processes, folder: Path) -> Predictor:
    """Make the predictor, in a precision that all ranks choose alike.

    ``auto`` is that of the folder's earlier batch by the same models, if there was one.
    """
    models, machine, window = load_models(settings), settings.machine, settings.window
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


if __name__ == "__main__":
    exit_on_user_error(main, SETTINGS)
