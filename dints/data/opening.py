"""A dataset opened: its task, measured where the table does not know it, and its cases, their headers read once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dints.data.cases import Case, check_cases, open_cases
from dints.data.fingerprint import Fingerprint, fingerprint
from dints.data.formats import read_dataset
from dints.data.leniency import Leniency
from dints.data.tasks import TASKS, Task
from dints.running.machine import cores_per_process

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A labelled dataset, all its headers read and held against each other.

    Attributes:
        task: with the caller's overrides.
        cases: in the order in which they are listed.
        measured: what spacing, intensity and patch size were taken from where the task is not of the table.
        leniency: what was let pass in their files, and is when their voxels are read.
    """

    task: Task
    cases: list[Case]
    measured: Fingerprint | None
    leniency: Leniency


def open_dataset(
    root: str | Path,
    description: str | Path | None = None,
    key: str = "training",
    *,
    allow_outside_root: bool = False,
    leniency: Leniency = Leniency(),
    measured_in: Sequence[Path] = (),
    **overrides: Sequence[float] | None,
) -> Dataset:
    """Read what a dataset is and the headers of its cases.

    Args:
        root, description, key, allow_outside_root: as for `read_dataset`.
        measured_in: run folders whose measurements of the same dataset are used again.
        overrides: ``spacing``, ``intensity`` and ``patch_size`` in place of the task's; None keeps that.

    Raises:
        UserError: as `read_dataset`, or a case's headers say that it cannot be trained on.
    """
    task, listed = read_dataset(root, description, key, allow_outside_root)
    measured = None
    if task.name not in TASKS:
        cases = open_cases(listed, task, leniency)
        measured = fingerprint(cases, task, leniency, measured_in, cores_per_process())
        task = overridden(measured.applied_to(task), **overrides)
        check_cases(cases, task, leniency)
    else:
        task = overridden(task, **overrides)
        cases = open_cases(listed, task, leniency)
    log.info("%s: %s", task.name, describe(task))
    if remark := smaller_than_patch(cases, task):
        log.info("%s", remark)
    return Dataset(task, cases, measured, leniency)


def overridden(task: Task, **overrides: Sequence[float] | None) -> Task:
    """Return the task with the given values in place of its own; None keeps that."""
    return replace(task, **{name: tuple(value) for name, value in overrides.items() if value is not None})


def describe(task: Task) -> str:
    """Tell people what a task's volumes are made."""
    spacing = "as it is" if task.spacing is None else "{:g} x {:g} x {:g} mm".format(*task.spacing)
    intensity = "z-score" if task.intensity is None else "{:g} to {:g}".format(*task.intensity)
    return f"spacing {spacing}, intensity {intensity}, patch {' x '.join(map(str, task.patch_size))}"


def smaller_than_patch(cases: Sequence[Case], task: Task) -> str | None:
    """Say how many cases are smaller than a patch, along which axes, and what is done with them; None: none is."""
    lacks = np.array([case.resampling(task).shape for case in cases]) < task.patch_size
    if not lacks.any():
        return None
    along = ", ".join(f"{axis} {count}" for axis, count in zip("XYZ", lacks.sum(0), strict=True) if count)
    return (
        f"{lacks.any(1).sum()} of {len(cases)} cases are smaller than the patch (along {along}): they are padded to it "
        "by reflection, and below a third of it by their border voxels first; --patch_size gives another"
    )


def names(cases: Sequence[Case]) -> list[str]:
    """Return the image files' names: which cases they are, wherever the dataset lies."""
    return [Path(image.path).name for case in cases for image in case.images]
