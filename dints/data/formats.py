"""Forms of datasets, a reader each: the Medical Segmentation Decathlon's and nnU-Net v2's.

Both have a ``dataset.json``. Of it, a reader makes the list of cases; `FORMS` has the readers, and
a further form is one more entry there.
"""

from __future__ import annotations

import difflib
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
        needs_labels: in a list of that form, an entry without a label is an error.
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
    task = _task_of(described)
    cases = _cases_of(described)
    return replace(task, channel_files=task.channel_files or len(cases[0].images) > 1), cases


def read_task(root: str | Path, description: str | Path | None = None) -> Task:
    """Read what a dataset is alone, as `read_dataset`; its files need not be there."""
    return _task_of(_described(root, description, "training"))


def provenance(
    root: str | Path, description: str | Path | None = None
) -> dict[str, str | list[str]]:
    """Return origin, licence and channels of a dataset, as its description says them."""
    described = _described(root, description, "training")
    keys = ("name", "description", "reference", "licence", "license", "release")
    said = {
        key: described.content[key] for key in keys if isinstance(described.content.get(key), str)
    }
    return said | {"channels": list(channel_names(described))}


def list_cases(
    root: str | Path, description: str | Path | None = None, key: str = "training"
) -> list[Case]:
    """Read a dataset's cases alone: the description need not say channels and classes.

    In the Decathlon's form they may lack labels, or be image paths alone, as those of its ``test``
    list are. Args and errors are those of `read_dataset`.
    """
    described = replace(_described(root, description, key), needs_labels=False)
    return _cases_of(described)


def described_classes(
    root: str | Path, description: str | Path | None = None
) -> tuple[str, ...] | None:
    """Return the class of each label value that a dataset's description names.

    None where it names none.

    Args and errors are those of `read_dataset`.
    """
    described = _described(root, description, "training")
    return _class_names(described) if "labels" in described.content else None


def read_class_names(description: str | Path) -> tuple[str, ...]:
    """Read the class of each label value, background first, from a ``dataset.json``.

    Raises:
        UserError: it is malformed, or its labels are.
    """
    return _class_names(Description(read_json(description), description, Path(description).parent))


def _task_of(described: Description) -> Task:
    name = described.root.resolve().name
    channels = channel_names(described)
    modality = "CT" if all(channel.upper() == "CT" for channel in channels) else "MRI"
    known = TASKS.get(name) or Task(name, modality, 1, (), spacing=None)
    class_names = _class_names(described)
    return replace(
        known,
        num_channels=len(channels),
        class_names=class_names,
        channel_files=described.names_channel_files,
    )


def _described(root: str | Path, description: str | Path | None, key: str) -> Description:
    source = Path(root, "dataset.json") if description is None else description
    if os.path.isfile(root) or not os.path.exists(source):
        raise UserError(
            _no_description(Path(root), None if description is None else Path(description))
        )
    return Description(read_json(source), source, Path(root).absolute(), key)


def _no_description(root: Path, description: Path | None) -> str:
    """Say why there is no dataset to read, and what was probably meant."""
    around = [
        folder
        for folder in (root.parent, root.parent.parent)
        if os.path.isfile(folder / "dataset.json")
    ]
    if os.path.isfile(root):
        given = f" --json {root}" if root.suffix == ".json" and root.name != "dataset.json" else ""
        folder = root.parent if given else [*around, root.parent][0]
        return f"--root {root} is a file: give the dataset's folder, --root {folder}{given}"
    if not os.path.isdir(root):
        alike = difflib.get_close_matches(root.name, _folders_in(root.parent), 1)
        meant = (
            f"did you mean --root {root.parent / alike[0]}?"
            if alike
            else "give the dataset's folder"
        )
        return f"--root {root} does not exist, or may not be looked into: {meant}"
    if description is not None:
        is_inside = os.path.isfile(root / description)
        meant = (
            f"did you mean --json {root / description}?"
            if is_inside
            else "give the dataset's description"
        )
        return f"--json {description} does not exist: {meant}"
    found = [*around, *(path.parent for path in sorted(root.glob("*/dataset.json")))]
    meant = [f"did you mean --root {folder}?" for folder in found]
    meant += [f"did you mean --json {path}?" for path in sorted(root.glob("*.json"))]
    if os.path.isdir(root / "labelsTr") and os.path.isdir(root / "imagesTr"):
        meant.append(f"write one, such as {EXAMPLE} (docs/data.md)")
    meant.append("give its folder with --root, or another description with --json")
    return f"{root / 'dataset.json'} does not exist: {meant[0]}"


def _folders_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []


def _cases_of(description: Description) -> list[Case]:
    (read_cases,) = [form.cases for form in FORMS if form.fits(description)][:1]
    cases = read_cases(description)
    check_files(cases, description.source, description.root)
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


def _cases_of_decathlon(description: Description) -> list[Case]:
    """Read a list of ``{"image": path or paths, "label": path}``."""
    content, source, key = description.content, description.source, description.key
    entries = content.get(key)
    if not isinstance(entries, list) or not entries:
        lists = [name for name, value in content.items() if isinstance(value, list)]
        lists += (
            ["training"]
            if Description(content, source, description.root).names_channel_files
            else []
        )
        raise UserError(
            f"{source} has no cases under '{key}': give --json_key (lists in the file: "
            f"{', '.join(lists) or 'none'})"
        )
    listed = []
    for number, entry in enumerate(entries):
        place = f"entry {number} of '{key}'"
        entry = (
            {"image": entry} if isinstance(entry, str) and not description.needs_labels else entry
        )
        images, label = _paths(entry, "image", source, place, description.needs_labels)
        if len(images) > 1:
            _check_count(images, description, place)
        name = ENDING.sub("", Path(images[0]).name)
        name = name.removesuffix("_0000") if len(images) > 1 else name
        listed.append(_case(name, images, label, description.root, place))
    return listed


def _cases_of_nnunet_object(description: Description) -> list[Case]:
    """Read ``"dataset": {case: {"images": paths, "label": path}}``."""
    entries, source = description.content["dataset"], description.source
    if not isinstance(entries, dict) or not entries:
        raise UserError(
            f"{source}: 'dataset' must be an object such as "
            f'{{"case": {{"images": ["..."], "label": "..."}}}}, not {entries!r}: without it '
            "imagesTr and labelsTr are "
            "read"
        )
    listed = []
    for name, entry in entries.items():
        place = f"case {name!r} of 'dataset'"
        if not _is_file_name(name):
            raise UserError(f"{source}: {place} has a name that no file can have: rename it")
        images, label = _paths(entry, "images", source, place)
        _check_count(images, description, place)
        listed.append(_case(name, images, label, description.root, place))
    return listed


def _cases_of_nnunet_folders(description: Description) -> list[Case]:
    """List each ``labelsTr/<case>.nii.gz``, with ``imagesTr/<case>_0000.nii.gz``, ``_0001``, ..."""
    source, root = description.source, description.root
    ending = description.content.get("file_ending", ".nii.gz")
    if ending not in (".nii", ".nii.gz"):
        raise UserError(
            f"{source}: 'file_ending' is {ending!r}: convert the dataset to .nii.gz, and say so "
            "there"
        )
    labels = _file_names(root / "labelsTr", ending, source)
    if not labels:
        raise UserError(
            f"{source} lists no cases, and {root / 'labelsTr'} has no {ending} file: complete the "
            "dataset, correct 'file_ending', or give its folder with --root"
        )
    num_channels = len(channel_names(description))
    listed = []
    for label in labels:
        name = label.removesuffix(ending)
        images = [f"imagesTr/{name}_{channel:04d}{ending}" for channel in range(num_channels)]
        listed.append(_case(name, images, f"labelsTr/{label}", root, f"case {name!r} of labelsTr"))
    expected = {Path(image).name for case in listed for image in case.images}
    extra = [
        image for image in _file_names(root / "imagesTr", ending, source) if image not in expected
    ]
    if extra:
        raise UserError(
            f"{source}: {len(extra)} files in {root / 'imagesTr'} are not <case>_0000 to "
            f"<case>_{num_channels - 1:04d} of a case in labelsTr, for example {extra[0]}: add its "
            "label, or remove it"
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
    """Read the object in a JSON file.

    Errors name the file, and the line and column where it is malformed.
    """
    try:
        # Windows' editors put a mark first
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist: give the dataset's description with --json, or its folder "
            "with --root"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; "
            "correct it there"
        ) from error
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: not UTF-8, or an endless number
        raise UserError(
            f"{path} cannot be read as a dataset description: {error}; give a dataset.json, a text "
            "in UTF-8"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__} where a dataset description (a JSON object) "
            "is expected"
        )
    return content


def channel_names(description: Description) -> tuple[str, ...]:
    """Return the channels, of ``channel_names`` (nnU-Net v2) or ``modality`` (Decathlon)."""
    # nnU-Net lets people add keys of their own, so a "modality" beside "channel_names" may be
    # anything.
    return _numbered(
        description, "channel_names" if "channel_names" in description.content else "modality"
    )


def _class_names(description: Description) -> tuple[str, ...]:
    """Return the class of each label value 0, 1, 2, ..."""
    source, labels = description.source, description.content.get("labels")
    kinds = {type(value) for value in labels.values()} if isinstance(labels, dict) else set()
    if list in kinds:
        regions = [name for name, value in labels.items() if isinstance(value, list)]
        raise UserError(
            f"{source}: 'labels' has regions, lists of numbers ({', '.join(regions)}), which are "
            f"not supported: give each class one number of its own, {EXAMPLES['labels']}"
        )
    classes = (
        _by_number(labels, source)
        if kinds & {int, float, bool}
        else _numbered(description, "labels")
    )
    if len(set(classes)) < len(classes):
        raise UserError(
            f"{source}: 'labels' gives two classes one name ({', '.join(classes)}): rename one"
        )
    if len(classes) < 2:
        raise UserError(
            f"{source}: 'labels' names only {classes[0]!r}; background and at least one more are "
            "needed"
        )
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{source}: 'labels' has {len(classes)} values; at most {MAX_CLASSES}, background "
            "included, are supported: merge classes"
        )
    return classes


def _by_number(labels: dict, source: str | Path) -> tuple[str, ...]:
    """Return the names of ``{a: 0, b: 1, ...}`` in the order of their numbers: 0, 1, 2, ..."""
    if "ignore" in labels:
        raise UserError(
            f"{source}: 'labels' has nnU-Net's 'ignore' label, which is not supported: every voxel "
            "needs a class, so label those voxels, or remove it and the cases that have them"
        )
    # True and 1.0 equal 1
    names = {number: name for name, number in labels.items() if type(number) is int}
    if sorted(names) != list(range(len(labels))):
        raise UserError(
            f"{source}: the numbers of 'labels' must be 0 to {len(labels) - 1}, each once, not "
            f"{list(labels.values())}: write {EXAMPLES['labels']}"
        )
    return tuple(names[number] for number in range(len(labels)))


def _numbered(description: Description, key: str) -> tuple[str, ...]:
    """Return the values of ``{"0": a, "1": b, ...}`` in the order of their keys: 0, 1, 2, ..."""
    source = description.source
    if key not in description.content:
        raise UserError(f"{source} has no '{key}': add an object such as {EXAMPLES[key]}")
    values = description.content[key]
    if not isinstance(values, dict) or not values:
        raise UserError(
            f"{source}: '{key}' must be an object such as {EXAMPLES[key]}, not "
            f"{reprlib.repr(values)}"
        )
    if values.keys() != {str(number) for number in range(len(values))}:
        raise UserError(
            f'{source}: the keys of \'{key}\' must be "0" to "{len(values) - 1}", not '
            f"{sorted(values)}: "
            f"write {EXAMPLES[key]}"
        )
    return tuple(str(values[str(number)]) for number in range(len(values)))


# The files of the cases.


def _case(name: str, images: Sequence[str], label: str | None, root: Path, place: str) -> Case:
    label = None if label is None else str(root / label)
    return Case(name, tuple(str(root / image) for image in images), label, place)


def _is_file_name(name: str) -> bool:
    """Tell whether a segmentation's file can have the name, and people can read it."""
    is_plain = Path(name).name == name and not name.startswith(".")
    return (
        bool(name) and is_plain and name.isprintable() and len(name.encode(errors="replace")) <= 200
    )


def _file_names(folder: Path, ending: str, source: str | Path) -> list[str]:
    """List the files with that ending, sorted, without hidden ones, as macOS leaves them."""
    try:
        found = os.listdir(folder)
    except OSError as error:
        raise UserError(
            f"{source} lists no cases, and {folder} cannot be read ({error.strerror}): complete "
            "the dataset, or give its folder with --root"
        ) from error
    return sorted(name for name in found if name.endswith(ending) and not name.startswith("."))


def _paths(
    entry: object, key: str, source: str | Path, place: str, needs_label: bool = True
) -> tuple[list[str], str | None]:
    """Return the image paths under ``key`` and the label path of an entry, as it says them."""
    images, label = (
        (entry.get(key), entry.get("label")) if isinstance(entry, dict) else (None, None)
    )
    images = [images] if isinstance(images, str) else images
    is_list = (
        isinstance(images, list) and images and all(isinstance(image, str) for image in images)
    )
    if not is_list or not (isinstance(label, str) or (label is None and not needs_label)):
        raise UserError(
            f"{source}: {place} needs the paths '{key}' and 'label', and is {reprlib.repr(entry)}: "
            "add them"
        )
    return images, label


def _check_count(images: Sequence[str], description: Description, place: str) -> None:
    channels = channel_names(description)
    if len(images) != len(channels):
        raise UserError(
            f"{description.source}: {place} has {len(images)} image files for {len(channels)} "
            f"channels ({', '.join(channels)}): list one a channel"
        )
