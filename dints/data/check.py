"""``--check``: every file of a dataset read and judged before a training relies on it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import nibabel as nib
import numpy as np
from tqdm import tqdm

from dints.data.cases import case_faults, read_image_file, read_label
from dints.data.dataset import overridden
from dints.data.formats import read_dataset
from dints.data.grid import Resampling
from dints.data.listing import Case, ReadOptions, split_fold
from dints.data.nifti import Header, read_header
from dints.data.tasks import TASKS, Task
from dints.errors import UserError
from dints.running.machine import cores_per_process, threads
from dints.running.processes import start_logging
from dints.settings import DataSettings

AT_ONCE = 4  # cases in memory, however many cores there are
FAR = 5  # times the median, or a fifth of it, is unusual


@dataclass
class Report:
    """What was found in one case.

    Attributes:
        errors, warnings: findings: what a training refuses or would do wrong with, and what is only
            unusual.
        case: None where a header could not be read.
        volumes: cm^3 of each foreground class; None where the label could not be read.
        digest: of the images' voxels, the same in whatever orientation and type they are kept; None
            where they could not be read.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    case: Case | None = None
    volumes: np.ndarray | None = None
    digest: str | None = None

    def attempt(self, function: Callable, *args):
        """Return the function's result, or None where it is a `UserError`, which is noted."""
        try:
            return function(*args)
        except UserError as error:
            self.errors.append(str(error))
            return None


def check(settings: DataSettings) -> None:
    """Print what is in a dataset and what is wrong with it.

    Raises:
        UserError: a training on it would be refused or wrong.
    """
    start_logging()
    task, cases = read_dataset(settings.root, settings.json, settings.json_key)
    options = ReadOptions(settings.trust_shapes, settings.replace_nonfinite)
    cases = [replace(case, options=options) for case in cases]
    num_folds = min(settings.num_folds, len(cases)) if settings.fold != "all" else 1
    folds = [number for number in range(num_folds) for _ in split_fold(cases, num_folds, number)[1]]
    text, is_good = check_dataset(cases, folds, overridden(task, settings), cores_per_process())
    print(text, flush=True)
    if not is_good:
        raise UserError(
            f"{settings.root} is not fit for training: correct the faults that are listed above"
        )


def check_dataset(
    cases: Sequence[Case], folds: Sequence[int], task: Task, num_threads: int
) -> tuple[str, bool]:
    """Read every case, and tell what is wrong with which and what they are like.

    Args:
        folds: the fold that each case is validated in.

    Returns:
        the findings and the summary, for people; whether a training would go right.
    """
    with threads(min(num_threads, AT_ONCE)) as pool:
        judged = pool.imap(lambda case: judge_case(case, task), cases)
        reports = list(tqdm(judged, "checking", len(cases), unit="case", leave=False, disable=None))
    _compare_voxels(cases, folds, reports)
    whole = _judge_whole(reports, task)
    _compare_grids(reports, task)
    text = "\n".join([*_findings(cases, reports, whole), *_summary(reports, task)])
    return text, not (whole.errors or any(report.errors for report in reports))


def judge_case(case: Case, task: Task) -> Report:
    """Find all faults of one case: a file is judged though another one of the case is damaged."""
    report = Report()
    images = [report.attempt(read_header, path) for path in case.images]
    label = report.attempt(read_header, case.label)
    if label is not None and None not in images:
        _judge_headers(case, task, report)
    digests = [_judge_image(image, case.options, report) for image in images if image is not None]
    if label is not None and label.num_channels == 1:
        _judge_label(label, task, report)
    if len(digests) == len(images) and None not in digests:
        report.digest = " ".join(digests)
    return report


def _judge_headers(case: Case, task: Task, report: Report) -> None:
    report.case = case
    report.errors += case_faults(case, task)
    strict = case_faults(case, task, trust_shapes=False)
    report.warnings += [fault for fault in strict if fault not in report.errors]


def _judge_image(header: Header, options: ReadOptions, report: Report) -> str | None:
    """Read and judge one file's voxels; return their digest."""
    image = report.attempt(read_image_file, header, options)
    if image is None:
        return None
    voxels, replaced = image
    if replaced:
        report.warnings.append(
            f"{header.path} has {replaced} NaN or infinite voxels, which are replaced"
        )
    for number, channel in enumerate(voxels):
        if channel.min() == channel.max():
            place = f" in channel {number}" if len(voxels) > 1 else ""
            report.warnings.append(
                f"{header.path} has the value {channel.flat[0]:g} everywhere{place}: look at the "
                "image"
            )
    turned = Resampling(header.shape, header.affine, None).apply(voxels, nearest=True)
    digest = hashlib.blake2b(repr(turned.shape).encode(), digest_size=16)
    for plane in turned.T:  # one at a time: a copy of a large CT takes a GB
        digest.update(np.ascontiguousarray(plane, np.float32))
    return digest.hexdigest()


def _judge_label(header: Header, task: Task, report: Report) -> None:
    label = report.attempt(read_label, header, task)
    if label is None:
        return
    counts = np.bincount(label.ravel(order="K"), minlength=task.num_classes)[1:]
    report.volumes = counts * abs(np.linalg.det(header.affine[:3, :3])) / 1000
    if not counts.any():
        report.warnings.append(f"{header.path} has no foreground: look at the label")


def _compare_voxels(cases: Sequence[Case], folds: Sequence[int], reports: Sequence[Report]) -> None:
    """Report cases with the same voxels: an error where they are in different folds."""
    first: dict[str, int] = {}
    for number, report in enumerate(reports):
        other = number if report.digest is None else first.setdefault(report.digest, number)
        if other == number:
            continue
        finding = f"{cases[number].images[0]} holds the same voxels as {cases[other].images[0]}"
        if folds[number] == folds[other]:
            report.warnings.append(f"{finding}: remove one of the cases")
        else:
            report.errors.append(
                f"{finding}, but they are in the folds {folds[number]} and {folds[other]}, so that "
                "one is trained on where the other is validated: remove one of the cases"
            )


def _compare_grids(reports: Sequence[Report], task: Task) -> None:
    """Report cases that are far from the median, or impossible at its spacing."""
    read = [report for report in reports if report.case is not None]
    if not read:
        return
    shapes, spacings = (np.array(values, float) for values in _grids(read))
    if task.name not in TASKS and task.spacing is None:  # as a training would choose it
        task = replace(task, spacing=tuple(np.median(spacings, axis=0)))
    grids = ("spacing, mm", spacings, ".4g"), ("number of voxels", shapes, ".0f")
    for what, values, form in grids:
        median = np.median(values, axis=0)
        for report, value in zip(read, values, strict=True):
            if (np.maximum(value / median, median / value) > FAR).any():
                report.warnings.append(
                    f"{report.case.images[0]} is far from the others in {what}: "
                    f"{_times(value, form)}, where the median is {_times(median, form)}: look at "
                    "its header"
                )
    for report in read:
        faults = case_faults(report.case, task)
        report.errors += [fault for fault in faults if fault not in report.errors]


def _grids(reports: Sequence[Report]) -> tuple[list[Sequence[int]], list[np.ndarray]]:
    """Return voxels, and mm between them, along x, y and z of the patient (RAS)."""
    images = [report.case.headers[0] for report in reports]
    turned = [Resampling(image.shape, image.affine, None) for image in images]
    spacings = [np.linalg.norm(grid.affine[:3, :3], axis=0) for grid in turned]
    return [grid.shape for grid in turned], spacings


def _judge_whole(reports: Sequence[Report], task: Task) -> Report:
    """Find what is wrong with all cases together, if their labels could be read."""
    whole = Report()
    labelled = [report.volumes > 0 for report in reports if report.volumes is not None]
    if len(labelled) < len(reports):
        return whole
    found = np.any(labelled, axis=0)
    if not found.any():
        whole.errors.append(
            "no case has any foreground, so that there is nothing to learn: look at the labels"
        )
    elif not found.all():
        absent = ", ".join(np.array(task.class_names[1:])[~found])
        whole.warnings.append(f"no case has the class {absent}: look at the labels in dataset.json")
    return whole


def _findings(cases: Sequence[Case], reports: Sequence[Report], whole: Report) -> Iterator[str]:
    """Yield a table, errors first; paths are relative to the folder that all files are in."""
    folder = os.path.commonpath([os.path.dirname(path) for case in cases for path in case.files])
    named = [("all", whole), *zip([case.name for case in cases], reports, strict=True)]
    rows = [("error", name, finding) for name, report in named for finding in report.errors]
    rows += [("warning", name, finding) for name, report in named for finding in report.warnings]
    if not rows:
        return
    width = max(len(name) for _, name, _ in [("", "case", ""), *rows])
    yield f"{'kind':<8} {'case':<{width}}  finding; files are in {folder}"
    for kind, name, finding in rows:
        text = " ".join(finding.replace(os.path.join(folder, ""), "").split())
        yield f"{kind:<8} {name:<{width}}  {text}"
    yield ""


def _summary(reports: Sequence[Report], task: Task) -> Iterator[str]:
    wrong, unusual = sum(bool(r.errors) for r in reports), sum(bool(r.warnings) for r in reports)
    cases, channels = _count(len(reports), "case"), _count(task.num_channels, "channel")
    yield f"{task.name}: {cases}, {wrong} with errors, {unusual} with warnings"
    yield f"{task.modality}, {channels}; classes: {', '.join(task.class_names)}"
    read = [report for report in reports if report.case is not None]
    rows = [("", "cases", "smallest", "median", "largest")]
    if read:
        images, labels = [r.case.headers[0] for r in read], [r.case.label_header for r in read]
        yield f"orientation: {_tally(''.join(nib.aff2axcodes(image.affine)) for image in images)}"
        yield f"images: {_tally(map(_type, images))}; labels: {_tally(map(_type, labels))}"
        shapes, spacings = _grids(read)
        rows += [("voxels", *_range(shapes, ".0f")), ("spacing, mm", *_range(spacings, ".3g"))]
    labelled = [report.volumes for report in reports if report.volumes is not None]
    for number, name in enumerate(task.class_names[1:]):
        volumes = [volume[number:][:1] for volume in labelled if volume[number] > 0]
        rows.append((f"{name}, cm3", *(_range(volumes, ".3g") if volumes else ("0", "", "", ""))))
    yield from _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, count, *values in rows:
        cells = (f"{value:<{width}}" for value, width in zip(values, widths[2:], strict=True))
        yield "  ".join([f"{name:<{widths[0]}}", f"{count:>{widths[1]}}", *cells]).rstrip()


def _type(header: Header) -> str:
    return str(header.nifti.get_data_dtype().newbyteorder("="))


def _range(rows: Sequence[Sequence[float]], form: str) -> tuple[str, str, str, str]:
    """Write how many there are, and the smallest, median and largest along each axis."""
    return str(len(rows)), *(
        _times(of(np.array(rows, float), axis=0), form) for of in (np.min, np.median, np.max)
    )


def _times(values: Sequence[float], form: str = "") -> str:
    return " x ".join(format(value, form) for value in values)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _tally(values: Iterator[str]) -> str:
    """Write each value with its number, the most frequent first."""
    return ", ".join(f"{value} {count}" for value, count in Counter(values).most_common())
