"""One fold of a dataset, opened: its task and its cases, their headers read and checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dints.data.cases import check_cases, resampling_of
from dints.data.fingerprint import Fingerprint, fingerprint
from dints.data.formats import read_dataset
from dints.data.listing import Case, ReadOptions, split_fold
from dints.data.tasks import TASKS, Task
from dints.running.machine import cores_per_process
from dints.running.seeds import permutation
from dints.settings import DataSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fold:
    """The cases of a labelled dataset, divided into those that train and those that validate.

    Attributes:
        task: with the overrides of the settings.
        training, validation: in the order in which they are listed.
        measured: source of spacing, intensity and patch size where the task is not of the table.
    """

    task: Task
    training: list[Case]
    validation: list[Case]
    measured: Fingerprint | None

    @property
    def cases(self) -> list[Case]:
        return [*self.training, *self.validation]

    @property
    def names(self) -> list[str]:
        """The image files' names: which cases they are, wherever the dataset lies."""
        return [Path(image).name for case in self.cases for image in case.images]

    def to_dict(self) -> dict[str, object]:
        """Return task and cases as plain values, by which a run is known."""
        return {"task": self.task.to_dict(), "cases": self.names}

    def halves(self, seed: int) -> tuple[list[Case], list[Case]]:
        """Shuffle the training cases; return those for the weights and those for the architecture.

        An odd case trains the architecture, as published.
        """
        order = permutation(len(self.training), seed, "halves")
        middle = len(order) // 2
        shuffled = [self.training[number] for number in order]
        return shuffled[:middle], shuffled[middle:]


def open_fold(
    settings: DataSettings,
    measured_in: Sequence[Path] = (),
    least_training: int = 1,
    strides: str = "isotropic",
    num_depths: int = 4,
) -> Fold:
    """Read a dataset's description and the headers of its cases, and divide them; read no voxel.

    A task that is not in the table is measured, though: a CT's window is one of its voxels.

    Args:
        measured_in: run folders whose measurements of the same dataset are used again.
        least_training: cases that must train: a search needs two.
        strides, num_depths: of the network that patches are planned for; see `network_strides`.

    Raises:
        UserError: as `read_dataset` and `check_cases`, or too few cases are left to train on.
    """
    task, cases = read_dataset(settings.root, settings.json, settings.json_key)
    options = ReadOptions(settings.trust_shapes, settings.replace_nonfinite)
    cases, measured = [replace(case, options=options) for case in cases], None
    if task.name not in TASKS:
        check_cases(cases, task)
        measured = fingerprint(cases, task, measured_in, cores_per_process())
        task = measured.at(settings.spacing).applied_to(task, strides, num_depths)
    task = overridden(task, settings)
    check_cases(cases, task)
    log.info("%s: %s", task.name, describe(task))
    if remark := smaller_than_patch(cases, task):
        log.info("%s", remark)
    parts = split_fold(cases, settings.num_folds, settings.fold, least_training)
    return Fold(task, *parts, measured)


def overridden(task: Task, settings: DataSettings) -> Task:
    """Return the task with the spacing, intensity and patch size that are given in the settings."""
    given = {
        "spacing": settings.spacing,
        "intensity": settings.intensity_range,
        "patch_size": settings.patch_size,
    }
    return replace(task, **{name: value for name, value in given.items() if value is not None})


def describe(task: Task) -> str:
    """Describe for people the volumes that the network sees."""
    spacing = "as it is"
    if task.spacing is not None:
        spacing = "{:g} x {:g} x {:g} mm".format(*task.spacing)
    intensity = "z-score" if task.intensity is None else "{:g} to {:g}".format(*task.intensity)
    patch = " x ".join(map(str, task.patch_size))
    return f"spacing {spacing}, intensity {intensity}, patch {patch}"


def smaller_than_patch(cases: Sequence[Case], task: Task) -> str | None:
    """Say how many cases are smaller than a patch, and along which axes; None: none is."""
    lacks = np.array([resampling_of(case, task).shape for case in cases]) < task.patch_size
    if not lacks.any():
        return None
    counts = zip("XYZ", lacks.sum(0), strict=True)
    along = ", ".join(f"{axis} {count}" for axis, count in counts if count)
    return (
        f"{lacks.any(1).sum()} of {len(cases)} cases are smaller than the patch (along {along}): "
        "they are padded to it by reflection; --patch_size gives another"
    )
