"""Cases as a dataset lists them: their files, which must be there, and their folds."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from dints.data.nifti import Header, read_header
from dints.errors import UserError

ENDING = re.compile(r"(?<=[^/])\.nii(\.gz)?\Z", re.IGNORECASE)


@dataclass(frozen=True)
class ReadOptions:
    """Faults of files that a user lets pass.

    Attributes:
        trust_shapes: a label's affine may differ from its image's; the image's is taken.
        replace_nonfinite: NaN and infinite voxels of images become this value.
    """

    trust_shapes: bool = False
    replace_nonfinite: float | None = None


@dataclass(frozen=True)
class Case:
    """A volume to learn from or to segment; its headers are read when first asked for.

    Attributes:
        name: of its segmentation's file, without ending; two cases share it where their image files
            share a name.
        images: absolute paths: one file that holds all channels, or one file a channel, in order.
        label: absolute path, if there is one.
        place: where it is listed, for messages.
        options: by which its files are read.
    """

    name: str
    images: tuple[str, ...]
    label: str | None = None
    place: str = ""
    options: ReadOptions = ReadOptions()

    @property
    def files(self) -> tuple[str, ...]:
        """The images, then the label where there is one."""
        return self.images if self.label is None else (*self.images, self.label)

    @cached_property
    def headers(self) -> tuple[Header, ...]:
        """Headers of the image files; it raises `UserError` where one cannot be read."""
        return tuple(read_header(path) for path in self.images)

    @cached_property
    def label_header(self) -> Header | None:
        return None if self.label is None else read_header(self.label)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y and z of the image files."""
        return self.headers[0].shape

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), of the image files."""
        return self.headers[0].affine

    @property
    def num_channels(self) -> int:
        return sum(header.num_channels for header in self.headers)


def split_fold(
    cases: Sequence, num_folds: int, fold: int | str, least_training: int = 0
) -> tuple[list, list]:
    """Divide cases into those that train and those that validate ``fold``.

    Folds are contiguous and differ by at most one case; each case is validated in exactly one.
    ``all`` trains on every case and validates on none.

    Args:
        least_training: cases that must train: a search needs two.

    Raises:
        UserError: there are too few cases.
    """
    count, given = len(cases), "--fold all"
    training, validation = list(cases), []
    if fold != "all":
        if num_folds > count:
            raise UserError(
                f"--num_folds {num_folds}, but there are only {count} cases: give fewer folds, or "
                "--fold all, which takes every case"
            )
        given = f"--fold {fold} of --num_folds {num_folds}"
        first, last = count * fold // num_folds, count * (fold + 1) // num_folds
        training, validation = [*cases[:first], *cases[last:]], list(cases[first:last])
    if len(training) < least_training:
        raise UserError(
            f"{given} leaves {len(training)} of {count} cases to train on, and {least_training} "
            "are needed: give --fold all, which takes every case, or add labelled cases"
        )
    return training, validation


def check_names(cases: Sequence[Case]) -> None:
    """Refuse two cases of one name, where the cases of all folds are known by their names."""
    ((name, count),) = Counter(case.name for case in cases).most_common(1)
    if count > 1:
        raise UserError(
            f"{count} cases are called {name}: rename all but one of them, so that each can be "
            "scored"
        )


def check_files(cases: Sequence[Case], source: str | Path, root: str | Path) -> None:
    """Refuse files that are no NIfTI files, are missing, or are listed twice."""
    files = [file for case in cases for file in case.files]
    wrong = [file for file in files if not ENDING.search(file)]
    if wrong:
        raise UserError(
            f"{len(wrong)} of the {len(files)} files that {source} lists do not end in .nii or "
            f".nii.gz, for example {wrong[0]}: convert them to NIfTI"
        )
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        remedy = "complete the dataset, or give its folder with --root"
        encoding = sys.getfilesystemencoding()
        if encoding != "utf-8" and not all(file.isascii() for file in missing):
            remedy = f"set PYTHONUTF8=1, since this Python takes all names for {encoding}"
        raise UserError(
            f"{len(missing)} of the {len(files)} files that {source} lists are not under --root "
            f"{root}, for example {', '.join(missing[:3])}: {remedy}"
        )
    _check_unique(cases, source, _real_paths(files))


def _real_paths(files: Sequence[str]) -> dict[str, str]:
    """Return each file's path without symlinks; folders, which are few, are looked up once."""

    @cache
    def real_folder(folder: str) -> str:
        try:
            return os.path.realpath(folder)
        except ValueError:  # a NUL or half a surrogate pair, which no file's name has
            return folder

    def real(file: str) -> str:
        folder, name = os.path.split(file)
        path = os.path.join(real_folder(folder), name)
        return os.path.realpath(path) if os.path.islink(path) else path

    return {file: real(file) for file in files}


def _check_unique(cases: Sequence[Case], source: str | Path, real: dict[str, str]) -> None:
    """Refuse a file that is listed twice: the case would be validated on what it was trained on."""
    first: dict[str, str] = {}  # where each file was first listed
    for case in cases:
        for position, file in enumerate(case.files):
            use = f"{'an image' if position < len(case.images) else 'the label'} of {case.place}"
            if real[file] in first:
                raise UserError(
                    f"{source}: {first[real[file]]} and {use} are one file, {real[file]}: list "
                    "every file once"
                )
            first[real[file]] = use
