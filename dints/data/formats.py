"""Forms of datasets, a reader each: the Medical Segmentation Decathlon's and nnU-Net v2's.

A reader makes the list of cases of a ``dataset.json``; a further form is one more entry of `FORMS`.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dints.data.listing import ENDING, Case, check_files
from dints.data.tasks import MAX_CLASSES, TASKS, Task
from dints.errors import UserError


@dataclass(frozen=True)
class Description:
    """A ``dataset.json`` with what is needed to read it.

    Attributes:
        content: what the file holds.
        source: its path, for messages.
        root: the folder that the paths in it are relative to.
        key: where a case list of the Decathlon's form is.
        needs_labels: an entry without a label is an error.
    """

    content: dict
    source: str | Path
    root: Path
    key: str = "training"
    needs_labels: bool = True

    @property
    def names_channel_files(self) -> bool:
        """Whether it is of nnU-Net v2, and has no case list of the Decathlon's form."""
        is_default = self.key == "training" and self.key not in self.content
        return is_default and not self.content.keys().isdisjoint(("channel_names", "file_ending"))

    @property
    def channels(self) -> tuple[str, ...]:
        """Of ``channel_names`` (nnU-Net v2), beside which ``modality`` (Decathlon) is anything."""
        return _numbered(self, "channel_names" if "channel_names" in self.content else "modality")

    @property
    def classes(self) -> tuple[str, ...]:
        """The class of each label value 0, 1, 2, ..."""
        labels = self.content.get("labels")
        kinds = {type(value) for value in labels.values()} if isinstance(labels, dict) else set()
        if list in kinds:
            regions = ", ".join(name for name, value in labels.items() if isinstance(value, list))
            raise self.fault(
                f"'labels' has regions, lists of numbers ({regions}), which are not supported: "
                f"give each class one number of its own, {EXAMPLES['labels']}"
            )
        is_by_name = not kinds.isdisjoint((int, float, bool))
        classes = _by_number(self) if is_by_name else _numbered(self, "labels")
        if len(set(classes)) < len(classes):
            names = ", ".join(classes)
            raise self.fault(f"'labels' gives two classes one name ({names}): rename one")
        if len(classes) < 2:
            raise self.fault(
                f"'labels' names only {classes[0]!r}; background and at least one more are needed"
            )
        if len(classes) > MAX_CLASSES:
            most = f"at most {MAX_CLASSES}, background included, are supported"
            raise self.fault(f"'labels' has {len(classes)} values; {most}: merge classes")
        return classes

    def fault(self, text: str) -> UserError:
        return UserError(f"{self.source}: {text}")


def read_dataset(
    root: str | Path, description: str | Path | None = None, key: str = "training"
) -> tuple[Task, list[Case]]:
    """Read what a dataset is and which labelled cases it has; all their files are checked to exist.

    Channels and classes are what the description says. Spacing, intensity and patch size are the
    table's where the folder has the name of a task that it knows; otherwise they are None, None and
    96x96x96, for the caller to measure, and the modality is CT only if every channel is.

    Args:
        root: the dataset's folder.
        description: ``<root>/dataset.json`` unless another file is named.
        key: name of the list of labelled cases in it, in the Decathlon's form.

    Raises:
        UserError: the description is malformed; files are missing or no NIfTI files (all counted,
            the first named); or one file is listed twice.
    """
    described = _described(root, description, key)
    task, cases = _task_of(described), _cases_of(described)
    return replace(task, channel_files=task.channel_files or len(cases[0].images) > 1), cases


def read_task(root: str | Path, description: str | Path | None = None) -> Task:
    """Read what a dataset is alone, as `read_dataset`; its files need not be there."""
    return _task_of(_described(root, description))


def provenance(root: str | Path, description: str | Path | None = None) -> dict[str, object]:
    """Return origin, licence and channels of a dataset, as its description says them."""
    described = _described(root, description)
    keys = ("name", "description", "reference", "licence", "license", "release")
    said = {key: described.content.get(key) for key in keys}
    said = {key: value for key, value in said.items() if isinstance(value, str)}
    return said | {"channels": list(described.channels)}


def list_cases(
    root: str | Path, description: str | Path | None = None, key: str = "training"
) -> list[Case]:
    """Read a dataset's cases alone, as `read_dataset`: channels and classes need not be said.

    In the Decathlon's form they may lack labels, or be image paths alone, as those of its ``test``
    list are.
    """
    return _cases_of(replace(_described(root, description, key), needs_labels=False))


def described_classes(
    root: str | Path, description: str | Path | None = None
) -> tuple[str, ...] | None:
    """Return the class of each label value of a dataset; None where its description names none."""
    described = _described(root, description)
    return described.classes if "labels" in described.content else None


def read_class_names(description: str | Path) -> tuple[str, ...]:
    """Read the class of each label value, background first, from a ``dataset.json``."""
    return Description(read_json(description), description, Path(description).parent).classes


def _task_of(described: Description) -> Task:
    name, channels = described.root.resolve().name, described.channels
    modality = "CT" if all(channel.upper() == "CT" for channel in channels) else "MRI"
    return replace(
        TASKS.get(name) or Task(name, modality, 1, (), spacing=None),
        num_channels=len(channels),
        class_names=described.classes,
        channel_files=described.names_channel_files,
    )


def _described(
    root: str | Path, description: str | Path | None, key: str = "training"
) -> Description:
    source = Path(root, "dataset.json") if description is None else description
    if os.path.isfile(root):
        raise UserError(f"--root {root} is a file: give the dataset's folder")
    if not os.path.isdir(root):
        raise UserError(
            f"--root {root} does not exist, or may not be looked into: give the dataset's folder"
        )
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist: {_remedy(Path(root), description)}")
    return Description(read_json(source), source, Path(root).absolute(), key)


def _remedy(root: Path, description: str | Path | None) -> str:
    """Guess what is to be done where a description is missing."""
    nested = sorted(root.glob("*/dataset.json"))
    if description is None and nested:
        return f"did you mean --root {nested[0].parent}?"
    if description is None and (root / "labelsTr").is_dir() and (root / "imagesTr").is_dir():
        return f"write one, such as {EXAMPLE} (docs/data.md)"
    return "give its folder with --root, or another description with --json"


def _cases_of(described: Description) -> list[Case]:
    cases = next(form for form in FORMS if form.fits(described)).cases(described)
    check_files(cases, described.source, described.root)
    return cases


@dataclass(frozen=True)
class Form:
    """A way in which datasets list their cases.

    Attributes:
        fits: whether a description is of this form.
        cases: reads its cases; raises `UserError` where it is malformed.
    """

    fits: Callable[[Description], bool]
    cases: Callable[[Description], list[Case]]


def _cases_of_decathlon(described: Description) -> list[Case]:
    """Read a list of ``{"image": path or paths, "label": path}``."""
    content, key = described.content, described.key
    entries = content.get(key)
    if not isinstance(entries, list) or not entries:
        lists = [name for name, value in content.items() if isinstance(value, list)]
        lists += ["training"] * replace(described, key="training").names_channel_files
        raise described.fault(
            f"no cases under '{key}': give --json_key (lists in the file: "
            f"{', '.join(lists) or 'none'})"
        )
    listed = []
    for number, entry in enumerate(entries):
        place = f"entry {number} of '{key}'"
        if isinstance(entry, str) and not described.needs_labels:
            entry = {"image": entry}
        images, label = _paths(entry, "image", described, place)
        name = ENDING.sub("", Path(images[0]).name)
        if len(images) > 1:
            _check_count(images, described, place)
            name = name.removesuffix("_0000")
        listed.append(_case(name, images, label, described.root, place))
    return listed


def _cases_of_nnunet_object(described: Description) -> list[Case]:
    """Read ``"dataset": {case: {"images": paths, "label": path}}``."""
    entries = described.content["dataset"]
    if not isinstance(entries, dict) or not entries:
        example = '{"case": {"images": ["..."], "label": "..."}}'
        raise described.fault(
            f"'dataset' must be an object such as {example}, not {entries!r}: without it imagesTr "
            "and labelsTr are read"
        )
    listed = []
    for name, entry in entries.items():
        place = f"case {name!r} of 'dataset'"
        if not _is_file_name(name):
            raise described.fault(f"{place} has a name that no file can have: rename it")
        images, label = _paths(entry, "images", described, place)
        _check_count(images, described, place)
        listed.append(_case(name, images, label, described.root, place))
    return listed


def _cases_of_nnunet_folders(described: Description) -> list[Case]:
    """List each ``labelsTr/<case>.nii.gz``, with ``imagesTr/<case>_0000.nii.gz``, ``_0001``, ..."""
    root, last = described.root, len(described.channels) - 1
    ending = described.content.get("file_ending", ".nii.gz")
    if ending not in (".nii", ".nii.gz"):
        raise described.fault(
            f"'file_ending' is {ending!r}: convert the dataset to .nii.gz, and say so there"
        )
    labels = _file_names(root / "labelsTr", ending, described)
    if not labels:
        raise described.fault(
            f"no cases are listed, and {root / 'labelsTr'} has no {ending} file: complete the "
            "dataset, correct 'file_ending', or give its folder with --root"
        )
    listed = []
    for label in labels:
        name = label.removesuffix(ending)
        images = [f"imagesTr/{name}_{channel:04d}{ending}" for channel in range(last + 1)]
        listed.append(_case(name, images, f"labelsTr/{label}", root, f"case {name!r} of labelsTr"))
    expected = {Path(image).name for case in listed for image in case.images}
    found = _file_names(root / "imagesTr", ending, described)
    extra = [image for image in found if image not in expected]
    if extra:
        raise described.fault(
            f"{len(extra)} files in {root / 'imagesTr'} are not <case>_0000 to <case>_{last:04d} "
            f"of a case in labelsTr, for example {extra[0]}: add its label, or remove it"
        )
    return listed


# The first that fits is taken.
FORMS = (
    Form(
        lambda described: described.names_channel_files and "dataset" in described.content,
        _cases_of_nnunet_object,
    ),
    Form(lambda described: described.names_channel_files, _cases_of_nnunet_folders),
    Form(lambda described: True, _cases_of_decathlon),
)


# What the description says of channels and classes.

EXAMPLE = (
    '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "tumour": 1}, '
    '"file_ending": ".nii.gz"} for images imagesTr/<case>_0000.nii.gz and labels '
    "labelsTr/<case>.nii.gz"
)
EXAMPLES = {
    "modality": '{"0": "CT"}',
    "channel_names": '{"0": "CT"}',
    "labels": '{"0": "background", "1": "tumour"} or {"background": 0, "tumour": 1}',
}


def read_json(path: str | Path) -> dict:
    """Read the object in a JSON file; errors name the line and column where it is malformed."""
    try:
        # Windows' editors put a mark first
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist: give the dataset's description with --json, or its folder "
            "with --root"
        ) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(
            f"{path} is not valid JSON at {place}: {error.msg}; correct it there"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, or an endless number
        raise UserError(
            f"{path} cannot be read as a dataset description: {error}; give a dataset.json, a text "
            "in UTF-8"
        ) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path} holds a {kind} where a dataset description is expected")
    return content


def _by_number(described: Description) -> tuple[str, ...]:
    """Return the names of labels ``{a: 0, b: 1, ...}`` in the order of their numbers."""
    labels = described.content["labels"]
    if "ignore" in labels:
        raise described.fault(
            "'labels' has nnU-Net's 'ignore' label, which is not supported: label those voxels, "
            "or remove it and the cases that have them"
        )
    # True and 1.0 equal 1
    names = {number: name for name, number in labels.items() if type(number) is int}
    if sorted(names) != list(range(len(labels))):
        raise described.fault(
            f"the numbers of 'labels' must be 0 to {len(labels) - 1}, each once, not "
            f"{list(labels.values())}: write {EXAMPLES['labels']}"
        )
    return tuple(names[number] for number in range(len(labels)))


def _numbered(described: Description, key: str) -> tuple[str, ...]:
    """Return the values of ``{"0": a, "1": b, ...}`` in the order of their keys: 0, 1, 2, ..."""
    values, example = described.content.get(key), EXAMPLES[key]
    if key not in described.content:
        raise UserError(f"{described.source} has no '{key}': add an object such as {example}")
    if not isinstance(values, dict) or not values:
        raise described.fault(
            f"'{key}' must be an object such as {example}, not {reprlib.repr(values)}"
        )
    if values.keys() != {str(number) for number in range(len(values))}:
        raise described.fault(
            f'the keys of \'{key}\' must be "0" to "{len(values) - 1}", not {sorted(values)}: '
            f"write {example}"
        )
    return tuple(str(values[str(number)]) for number in range(len(values)))


# The files of the cases.


def _case(name: str, images: Sequence[str], label: str | None, root: Path, place: str) -> Case:
    label = None if label is None else str(root / label)
    return Case(name, tuple(str(root / image) for image in images), label, place)


def _is_file_name(name: str) -> bool:
    """Tell whether a segmentation's file can have the name, and people can read it."""
    is_plain = bool(name) and Path(name).name == name and not name.startswith(".")
    return is_plain and name.isprintable() and len(name.encode(errors="replace")) <= 200


def _file_names(folder: Path, ending: str, described: Description) -> list[str]:
    """List the files with that ending, sorted, without hidden ones, as macOS leaves them."""
    try:
        found = os.listdir(folder)
    except OSError as error:
        raise described.fault(
            f"no cases are listed, and {folder} cannot be read ({error.strerror}): complete the "
            "dataset, or give its folder with --root"
        ) from error
    return sorted(name for name in found if name.endswith(ending) and not name.startswith("."))


def _paths(
    entry: object, key: str, described: Description, place: str
) -> tuple[list[str], str | None]:
    """Return the image paths under ``key`` and the label path of an entry, as it says them."""
    said = entry if isinstance(entry, dict) else {}
    images, label = said.get(key), said.get("label")
    images = [images] if isinstance(images, str) else images
    is_list = isinstance(images, list) and all(isinstance(image, str) for image in images)
    has_label = isinstance(label, str) or (label is None and not described.needs_labels)
    if not (is_list and images and has_label):
        raise described.fault(
            f"{place} needs the paths '{key}' and 'label', and is {reprlib.repr(entry)}: add them"
        )
    return images, label


def _check_count(images: Sequence[str], described: Description, place: str) -> None:
    channels = described.channels
    if len(images) != len(channels):
        raise described.fault(
            f"{place} has {len(images)} image files for {len(channels)} channels "
            f"({', '.join(channels)}): list one a channel"
        )
