"""``--check``: every file of a dataset read and judged before a training relies on it."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

import numpy as np
from tqdm import tqdm

from dints.cases import Headers, Leniency, header_faults, read_headers, read_image, read_label
from dints.dataset import Case
from dints.errors import UserError
from dints.tasks import Task

log = logging.getLogger(__name__)


@dataclass
class Report:
    """What was found in one case.

    Attributes:
        errors, warnings: findings: what a training refuses or would do wrong with, and what is only unusual.
        spacing: mm, in the file's order; None where the case could not be read, as all that follows.
        volumes: cm^3 of each foreground class.
        digest: of the image's voxels.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    shape: tuple[int, int, int] | None = None
    spacing: np.ndarray | None = None
    volumes: np.ndarray | None = None
    digest: str | None = None


def check_dataset(
    cases: Sequence[Case], folds: Sequence[int], task: Task, leniency: Leniency, num_threads: int
) -> tuple[str, bool]:
    """Read every case, and tell what is wrong with which and what they are like.

    Args:
        folds: the fold that each case is validated in.

    Returns:
        the findings and the summary, for people; whether a training would go right.
    """
    with ThreadPool(num_threads) as pool:
        judged = pool.imap(lambda case: check_case(case, task, leniency), cases)
        reports = list(tqdm(judged, "checking", len(cases), unit="case", leave=False, disable=None))
    _find_duplicates(cases, folds, reports)
    return "\n".join([*_findings(cases, reports), *_summary(reports, task)]), not any(r.errors for r in reports)


def check_case(case: Case, task: Task, leniency: Leniency) -> Report:
    """All faults of one case that can be told from one another."""
    report = Report()

    def attempt(function: Callable, *args):
        try:
            return function(*args)
        except UserError as error:
            report.errors.append(str(error))
            return None

    headers = attempt(read_headers, case)
    if headers is None:
        return report
    report.errors += header_faults(headers, task, leniency)
    report.shape, report.spacing = headers.shape, headers.images[0].spacing
    image = attempt(read_image, headers, leniency)
    if image is not None:
        _judge_image(headers, *image, report)
    if headers.label.num_channels == 1:
        label = attempt(read_label, headers.label, task)
        if label is not None:
            _judge_label(headers, label, task, report)
    return report


def _judge_image(headers: Headers, voxels: np.ndarray, replaced: int, report: Report) -> None:
    report.digest = hashlib.blake2b(np.ascontiguousarray(voxels.T), digest_size=16).hexdigest()
    if replaced:
        report.warnings.append(f"{headers.images[0].path} has {replaced} NaN or infinite voxels, which are replaced")
    for number, channel in enumerate(voxels):
        if channel.min() == channel.max():
            report.warnings.append(f"{headers.images[0].path} has the same value everywhere in channel {number}")


def _judge_label(headers: Headers, label: np.ndarray, task: Task, report: Report) -> None:
    counts = np.bincount(label.ravel(order="K"), minlength=task.num_classes)[1:]
    report.volumes = counts * abs(np.linalg.det(headers.label.affine[:3, :3])) / 1000
    if not counts.any():
        report.warnings.append(f"{headers.label.path} has no foreground")


def _find_duplicates(cases: Sequence[Case], folds: Sequence[int], reports: Sequence[Report]) -> None:
    """Add an error to each case whose image another fold has too: it would be validated on what it is trained on."""
    same = defaultdict(list)
    for number, report in enumerate(reports):
        if report.digest is not None:
            same[report.digest].append(number)
    for numbers in same.values():
        first = numbers[0]
        for number in numbers[1:]:
            finding = f"{cases[number].images[0]} holds the same voxels as {cases[first].images[0]}"
            if folds[number] == folds[first]:
                reports[number].warnings.append(f"{finding}: remove one of the cases")
            else:
                reports[number].errors.append(
                    f"{finding}, which is validated in another fold ({folds[first]}, not {folds[number]}): remove one "
                    "of the cases"
                )


def _findings(cases: Sequence[Case], reports: Sequence[Report]) -> list[str]:
    rows = [
        (kind, case.name, finding)
        for kind, attribute in (("error", "errors"), ("warning", "warnings"))
        for case, report in zip(cases, reports, strict=True)
        for finding in getattr(report, attribute)
    ]
    if not rows:
        return []
    width = max(len("case"), *(len(name) for _, name, _ in rows))
    head = f"{'':<8} {'case':<{width}} finding"
    return [head, *(f"{kind:<8} {name:<{width}} {finding}" for kind, name, finding in rows), ""]


def _summary(reports: Sequence[Report], task: Task) -> list[str]:
    wrong, unusual = sum(bool(r.errors) for r in reports), sum(bool(r.warnings) for r in reports)
    lines = [f"{task.name}: {len(reports)} cases, {wrong} with errors, {unusual} with warnings"]
    channels = f"{task.num_channels} channel{'s' if task.num_channels > 1 else ''}"
    lines.append(f"{task.modality}, {channels}; classes: {', '.join(task.class_names)}")
    read = [report for report in reports if report.shape is not None]
    if read:
        lines.append(_range("voxels", [report.shape for report in read], "{:.0f}"))
        lines.append(_range("spacing, mm", [report.spacing for report in read], "{:.4g}"))
    labelled = [report.volumes for report in reports if report.volumes is not None]
    for value, name in enumerate(task.class_names[1:]):
        volumes = [volume[value] for volume in labelled if volume[value] > 0]
        found = f"{name}: in {len(volumes)} of {len(labelled)} cases"
        if volumes:
            found += f", {min(volumes):.3g} to {max(volumes):.3g} cm3, median {np.median(volumes):.3g}"
        lines.append(found)
    return lines


def _range(what: str, rows: Sequence[Sequence[float]], form: str) -> str:
    """Smallest, median and largest along x, y and z."""
    parts = []
    for name, of in (("smallest", np.min), ("median", np.median), ("largest", np.max)):
        parts.append(f"{name} {' x '.join(form.format(value) for value in of(np.array(rows, float), axis=0))}")
    return f"{what}: {', '.join(parts)}"
