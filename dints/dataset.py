"""The cases that a ``dataset.json`` lists: paths, checks that need no reading of voxels, folds."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dints.errors import UserError
from dints.tasks import channel_names, has_channel_files

ENDING = re.compile(r"(?<=[^/])\.nii(\.gz)?\Z")


@dataclass(frozen=True)
class Case:
    """A volume to learn from or to segment.

    Attributes:
        name: of its segmentation's file, without ending; two cases share it where their image files share a name.
        images: absolute paths: one file that holds all channels, or one file a channel, in order.
        label: absolute path, if there is one.
    """

    name: str
    images: tuple[str, ...]
    label: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The images, then the label where there is one."""
        return self.images if self.label is None else (*self.images, self.label)


Listed = list[tuple[str, Case]]  # each case with where it is listed, for messages


def read_cases(
    description: dict, source: str | Path, root: str | Path, key: str = "training", allow_outside_root: bool = False
) -> list[Case]:
    """The labelled cases of a dataset, all their files checked to exist.

    They are what a ``dataset.json`` lists under ``key`` (MSD); in nnU-Net v2's form, what its ``dataset`` lists, or
    what is in the folders imagesTr and labelsTr.

    Args:
        description: content of the file.
        source: the file's path, for messages.
        root: the folder that the paths are relative to, and that they may not leave.
        allow_outside_root: let them leave it.

    Raises:
        UserError: the list is missing or malformed; files are missing, outside ``root`` or no NIfTI files (all counted,
            the first named); or one file is listed twice.
    """
    root = Path(root).absolute()
    if not has_channel_files(description, key):
        listed = _cases_of_list(description, source, root, key)
    elif "dataset" in description:
        listed = _cases_of_object(description, source, root)
    else:
        listed = _cases_of_folders(description, source, root)
    _check_files(listed, source, root, allow_outside_root)
    return [case for _, case in listed]


def names(cases: Sequence[Case]) -> list[str]:
    """The image files' names: which cases they are, wherever the dataset lies."""
    return [Path(image).name for case in cases for image in case.images]


def split_fold(cases: Sequence[Case], num_folds: int, fold: int | str) -> tuple[list[Case], list[Case]]:
    """Training and validation cases of ``fold``; every case is validated in exactly one fold.

    Folds are contiguous and differ by at most one case; ``all`` trains on every case and validates on none.
    """
    if fold == "all":
        return list(cases), []
    if num_folds > len(cases):
        raise UserError(f"--num_folds {num_folds}, but there are only {len(cases)} cases: give at most {len(cases)}")
    first, last = len(cases) * fold // num_folds, len(cases) * (fold + 1) // num_folds
    return [*cases[:first], *cases[last:]], list(cases[first:last])


def _cases_of_list(description: dict, source: str | Path, root: Path, key: str) -> Listed:
    """MSD: a list of ``{"image": path or paths, "label": path}``."""
    entries = description.get(key)
    if not isinstance(entries, list) or not entries:
        lists = [name for name, value in description.items() if isinstance(value, list)]
        lists += ["training"] if has_channel_files(description) else []
        raise UserError(
            f"{source} has no cases under '{key}': give --json_key (lists in the file: {', '.join(lists) or 'none'})"
        )
    listed = []
    for number, entry in enumerate(entries):
        place = f"entry {number} of '{key}'"
        images, label = _paths(entry, "image", source, place)
        if len(images) > 1:
            _check_count(images, description, source, place)
        name = ENDING.sub("", Path(images[0]).name)
        name = name.removesuffix("_0000") if len(images) > 1 else name
        listed.append((place, _case(name, images, label, root)))
    return listed


def _cases_of_object(description: dict, source: str | Path, root: Path) -> Listed:
    """nnU-Net v2: ``"dataset": {case: {"images": paths, "label": path}}``."""
    entries = description["dataset"]
    if not isinstance(entries, dict) or not entries:
        raise UserError(
            f"{source}: 'dataset' must be an object such as "
            f'{{"case": {{"images": ["..."], "label": "..."}}}}, not {entries!r}: without it imagesTr and labelsTr are '
            "read"
        )
    listed = []
    for name, entry in entries.items():
        place = f"case {name!r} of 'dataset'"
        if not _is_file_name(name):
            raise UserError(f"{source}: {place} has a name that no file can have: rename it")
        images, label = _paths(entry, "images", source, place)
        _check_count(images, description, source, place)
        listed.append((place, _case(name, images, label, root)))
    return listed


def _is_file_name(name: str) -> bool:
    """Whether a segmentation's file can have it, with an ending, and people can read it."""
    is_plain = Path(name).name == name and not name.startswith(".")
    return bool(name) and is_plain and name.isprintable() and len(name.encode(errors="replace")) <= 200


def _cases_of_folders(description: dict, source: str | Path, root: Path) -> Listed:
    """nnU-Net v2: every ``labelsTr/<case>.nii.gz``, with ``imagesTr/<case>_0000.nii.gz`` and so on for each channel."""
    ending = description.get("file_ending", ".nii.gz")
    if ending not in (".nii", ".nii.gz"):
        raise UserError(f"{source}: 'file_ending' is {ending!r}: convert the dataset to .nii.gz, and say so there")
    labels = _file_names(root / "labelsTr", ending, source)
    if not labels:
        raise UserError(
            f"{source} lists no cases, and {root / 'labelsTr'} has no {ending} file: complete the dataset, correct "
            "'file_ending', or give its folder with --root"
        )
    num_channels = len(channel_names(description, source))
    listed = []
    for label in labels:
        name = label.removesuffix(ending)
        images = [f"imagesTr/{name}_{channel:04d}{ending}" for channel in range(num_channels)]
        listed.append((f"case {name!r} of labelsTr", _case(name, images, f"labelsTr/{label}", root)))
    expected = set(names([case for _, case in listed]))
    extra = [image for image in _file_names(root / "imagesTr", ending, source) if image not in expected]
    if extra:
        raise UserError(
            f"{source}: {len(extra)} files in {root / 'imagesTr'} are not <case>_0000 to "
            f"<case>_{num_channels - 1:04d} of a case in labelsTr, for example {extra[0]}: add its label, or remove it"
        )
    return listed


def _file_names(folder: Path, ending: str, source: str | Path) -> list[str]:
    """The files with that ending, sorted, without hidden ones (macOS leaves a ``._<name>`` beside a file)."""
    try:
        found = os.listdir(folder)
    except OSError as error:
        raise UserError(
            f"{source} lists no cases, and {folder} cannot be read ({error.strerror}): complete the dataset, or give "
            "its folder with --root"
        ) from error
    return sorted(name for name in found if name.endswith(ending) and not name.startswith("."))


def _paths(entry: object, key: str, source: str | Path, place: str) -> tuple[list[str], str]:
    """The image paths under ``key`` and the label path of an entry, as it says them."""
    images, label = (entry.get(key), entry.get("label")) if isinstance(entry, dict) else (None, None)
    images = [images] if isinstance(images, str) else images
    is_list = isinstance(images, list) and images and all(isinstance(image, str) for image in images)
    if not is_list or not isinstance(label, str):
        raise UserError(
            f"{source}: {place} needs the paths '{key}' and 'label', and is {reprlib.repr(entry)}: add them"
        )
    return images, label


def _check_count(images: Sequence[str], description: dict, source: str | Path, place: str) -> None:
    channels = channel_names(description, source)
    if len(images) != len(channels):
        raise UserError(
            f"{source}: {place} has {len(images)} image files for {len(channels)} channels ({', '.join(channels)}): "
            "list one a channel"
        )


def _case(name: str, images: Sequence[str], label: str, root: Path) -> Case:
    return Case(name, tuple(str(root / image) for image in images), str(root / label))


def _check_files(listed: Listed, source: str | Path, root: Path, allow_outside_root: bool) -> None:
    """Refuse files that are no NIfTI files, leave ``root``, are missing, or are listed twice."""
    files = [file for _, case in listed for file in case.files]
    wrong = [file for file in files if not ENDING.search(file)]
    if wrong:
        raise UserError(
            f"{len(wrong)} of the {len(files)} files that {source} lists do not end in .nii or .nii.gz, for example "
            f"{wrong[0]}: convert them to NIfTI"
        )
    real = _real_paths(files)
    inside = os.path.join(os.path.realpath(root), "")
    outside = [file for file in files if not real[file].startswith(inside)]
    if outside and not allow_outside_root:
        raise UserError(
            f"{len(outside)} of the {len(files)} files that {source} lists are outside --root {root}, for example "
            f"{outside[0]} (really {real[outside[0]]}): move them there, or allow this with --allow_outside_root"
        )
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(files)} files that {source} lists are not under --root {root}, "
            f"for example {', '.join(missing[:3])}: complete the dataset, or give its folder with --root"
        )
    _check_unique(listed, source, real)


def _real_paths(files: Sequence[str]) -> dict[str, str]:
    """Each file's path without symlinks; their folders, which are few, are looked up once."""

    @cache
    def real_folder(folder: str) -> str:
        try:
            return os.path.realpath(folder)
        except ValueError:  # a NUL or half a surrogate pair, which no file's name has: it will count as missing
            return folder

    def real(file: str) -> str:
        folder, name = os.path.split(file)
        path = os.path.join(real_folder(folder), name)
        return os.path.realpath(path) if os.path.islink(path) else path

    return {file: real(file) for file in files}


def _check_unique(listed: Listed, source: str | Path, real: dict[str, str]) -> None:
    """A case listed twice would be validated on what it was trained on."""
    first: dict[str, str] = {}  # where each file was first listed
    for place, case in listed:
        for position, file in enumerate(case.files):
            use = f"{'an image' if position < len(case.images) else 'the label'} of {place}"
            if real[file] in first:
                raise UserError(
                    f"{source}: {first[real[file]]} and {use} are one file, {real[file]}: list every file once"
                )
            first[real[file]] = use
