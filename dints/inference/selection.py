"""Which volumes a batch is of, and where their segmentations go."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from dints.data import dicom
from dints.data.cases import first_faults
from dints.data.formats import described_classes, list_cases
from dints.data.listing import ENDING, Case, split_fold
from dints.data.tasks import Task
from dints.errors import UserError
from dints.inference.decision import MAPS
from dints.inference.records import map_path

log = logging.getLogger(__name__)

CONVERTED = ".dicom"  # folder of the NIfTI files of DICOM series, while a batch runs


@dataclass(frozen=True)
class Selection:
    """The volumes of a batch.

    Attributes:
        cases: as listed; of a DICOM series, the NIfTI file that it becomes while the batch runs.
        series: the folder of the series for each such file, by its path.
    """

    cases: list[Case]
    series: dict[str, Path] = field(default_factory=dict)

    def faults(self, task: Task, channels: str) -> list[UserError | None]:
        """Convert the DICOM series, and read all headers; return the fault of each unusable case.

        Args:
            channels: that the model takes, for messages.
        """
        faults, bar = {}, {"desc": "reading DICOM", "unit": "series", "disable": None}
        for image, folder in tqdm(self.series.items(), leave=False, **bar):
            try:
                dicom.write_nifti(folder, Path(image))
            except UserError as error:
                faults[image] = error
        found = first_faults(self.cases, task, lambda case: _check_channels(case, task, channels))
        pairs = zip(self.cases, found, strict=True)
        return [faults.get(case.images[0], fault) for case, fault in pairs]

    def first_file(self) -> Case:
        """Return the first case that is a file, or raise `UserError`: all are DICOM series."""
        case = next((case for case in self.cases if case.images[0] not in self.series), None)
        if case is None:
            raise UserError("--export is checked on a file: give a .nii or .nii.gz with --input")
        return case


def given_images(paths: Sequence[Path], task: Task, channels: str, output_root: Path) -> Selection:
    """List the images of ``--input``: files, folders of files and of DICOM series; no outputs.

    Args:
        channels: that the model takes, for messages.
    """
    images, series = [], {}
    for path in paths:
        _check_given(path)
        found = images_in(path, output_root) if path.is_dir() else [path]
        folders = dicom.folders_with_dicom(path) if path.is_dir() else []
        if not folders and (not found or not ENDING.search(found[0].name)):
            raise UserError(
                f"--input {path} is no NIfTI file, nor a folder that holds any, or DICOM: give "
                ".nii or .nii.gz files, or folders of DICOM series"
            )
        images.extend(found)
        for folder in folders:
            name = "_".join(folder.relative_to(path).parts) or path.resolve().name
            image = str(output_root / CONVERTED / f"{name}.nii.gz")
            if image in series:
                raise UserError(
                    f"{series[image]} and {folder} would both be {name}: give each a run of its own"
                )
            series[image] = folder
    if series and task.num_channels > 1:
        raise UserError(
            f"--input {next(iter(series.values()))} is a DICOM series, which has one channel, and "
            f"the model takes {channels}: convert each to NIfTI and give {_form(task, '<case>')}"
        )
    if task.channel_files:
        cases = cases_of_channels(images, task, channels)
    else:
        cases = [Case(ENDING.sub("", image.name), (str(image),)) for image in images]
    return Selection(
        [*cases, *(Case(ENDING.sub("", Path(image).name), (image,)) for image in series)], series
    )


def _check_given(path: Path) -> None:
    """Raise `UserError` where a path is not there, a single DICOM file, or a labelled dataset."""
    if not path.exists():
        raise UserError(f"--input {path} does not exist: give .nii or .nii.gz files, or folders")
    if path.is_file() and dicom.is_dicom(path):
        raise UserError(f"--input {path} is a DICOM file: give the folder of its series")
    if (path / "dataset.json").is_file() and (path / "labelsTr").is_dir():
        raise UserError(
            f"--input {path} is a dataset, with labels: give --root {path} to score its cases, "
            f"or a folder of images, as --input {path / 'imagesTr'}"
        )


def remove_converted(output_root: Path) -> None:
    """Remove the NIfTI files that DICOM series became, of this batch or of one that was killed."""
    for path in (output_root / CONVERTED).glob("*"):
        path.unlink(missing_ok=True)


def images_in(folder: Path, output_root: Path) -> list[Path]:
    """List the NIfTI files in a folder and its folders, but for hidden ones, and for outputs.

    Outputs are files in ``output_root`` where that lies in the folder; else all files are inputs.
    """
    written = output_root.resolve()
    is_within = folder.resolve() in written.parents
    found = []
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        is_written = is_within and written in path.resolve().parents
        if ENDING.search(path.name) and path.is_file() and not is_hidden and not is_written:
            found.append(path)
    return found


def cases_of_channels(images: Sequence[Path], task: Task, channels: str) -> list[Case]:
    """List the cases that ``<case>_0000``, ``<case>_0001``, ... make together, a file a channel."""
    found = defaultdict(dict)
    for image in images:
        parts = re.fullmatch(r"(.+)_(\d{4})\.nii(\.gz)?", image.name, re.IGNORECASE)
        if parts is None:
            raise UserError(
                f"--input {image}: the model takes {channels}, and its name does not say of which "
                f"it is: give {_form(task, ENDING.sub('', image.name))}"
            )
        found[image.parent / parts[1]][int(parts[2])] = str(image)
    cases = []
    for case, files_of_case in found.items():
        numbers = sorted(files_of_case)
        if numbers != list(range(task.num_channels)):
            raise UserError(
                f"--input {case} has the files {', '.join(f'{number:04d}' for number in numbers)}, "
                f"and the model takes {channels}: give {_form(task, case.name)}"
            )
        cases.append(Case(case.name, tuple(files_of_case[channel] for channel in numbers)))
    return cases


def _form(task: Task, case: str) -> str:
    """Tell people which files the model takes for a case."""
    if not task.channel_files:
        is_one = task.num_channels == 1
        return f"one file with {'that channel' if is_one else 'them all in that order, 4D'}"
    last = f" to {case}_{task.num_channels - 1:04d}" if task.num_channels > 1 else ""
    return f"{'a file each, ' if last else ''}{case}_0000{last}, .nii or .nii.gz"


def _check_channels(case: Case, task: Task, channels: str) -> None:
    """Raise `UserError` where an image has other channels than the model takes."""
    if case.num_channels != task.num_channels:
        plural = "" if case.num_channels == 1 else "s"
        raise UserError(
            f"{case.images[0]} has {case.num_channels} channel{plural}, and the model takes "
            f"{channels}: give {_form(task, case.name)}"
        )


def check_classes(root: Path, description: Path | None, task: Task) -> None:
    """Raise `UserError` where a dataset names other classes than the model's."""
    classes = described_classes(root, description)
    if classes not in (None, task.class_names):
        raise UserError(
            f"--root {root} has the classes {', '.join(classes)}, and the model segments "
            f"{', '.join(task.class_names)}: give a dataset with the model's classes"
        )


def cases_to_score(
    root: Path,
    description: Path | None,
    key: str,
    *,
    fold: int | str | None,
    num_folds: int,
    trained_on: Collection[str],
    validated_on: Collection[str],
    allow_training_cases: bool,
) -> Selection:
    """List the model's validation cases, or those of ``fold``; of an unknown dataset all cases.

    Args:
        root, description, key: as for `dints.data.formats.list_cases`.
        trained_on, validated_on: names of the model's cases.

    Raises:
        UserError: the model was trained on some of them, or does not know what it was trained on.
    """
    listed = list_cases(root, description, key)
    known = {*trained_on, *validated_on}
    if fold is not None:
        training_cases, validation_cases = split_fold(listed, num_folds, fold)
        selected = validation_cases or training_cases
    elif all(case.label is None for case in listed):
        selected = listed
    elif not known:
        raise UserError(
            "the model does not say which cases it was trained on: give --fold and --num_folds of "
            "its training, or --fold all for a dataset that is new to it"
        )
    elif known.isdisjoint(case.name for case in listed):
        log.info("none of these cases took part in the model's training: all of them are scored")
        selected = listed
    else:
        selected = [case for case in listed if case.name in validated_on] or listed
    seen = {*trained_on} & {case.name for case in selected}
    if seen and not allow_training_cases:
        raise UserError(
            f"the model was trained on {len(seen)} of these {len(selected)} cases, for example "
            f"{', '.join(sorted(seen)[:3])}: leave --fold out to score its validation cases, if it "
            "has any, or give --allow_training_cases"
        )
    return Selection(selected)


def segmentation_paths(selected: Sequence[Case], folder: Path) -> list[Path]:
    """Return where each case's segmentation goes: never onto another case's, nor onto an input."""
    names = Counter(case.name + ENDING.search(case.images[0])[0] for case in selected)
    inputs = {Path(path).resolve() for case in selected for path in case.files}
    paths = [folder / name for name in names]
    for path, count in zip(paths, names.values(), strict=True):
        if count > 1:
            raise UserError(f"{count} images are called {path.name}: give each an --output_root")
        # a map too where none is wanted, since an earlier run's are removed
        for written in (path, *(map_path(path, name) for name in MAPS)):
            if written.resolve() in inputs:
                raise UserError(
                    f"{written} is an input and would be overwritten: give another --output_root"
                )
    return paths
