"""What belongs to the data: channels, classes, spacing and intensity of a segmentation task.

The ten tasks of the Medical Segmentation Decathlon (MSD; Antonelli et al., Nature Communications 2022) and the built-in
phantom are a table; a task is also read from any ``dataset.json`` in the form of MSD or of nnU-Net v2.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dints.errors import UserError


@dataclass(frozen=True)
class Task:
    """A segmentation task.

    Attributes:
        name: for messages and files, for example ``Task07_Pancreas``.
        modality: ``CT`` (intensities are absolute) or ``MRI`` (they are not).
        num_channels: image channels.
        class_names: one per label value, background first.
        spacing: voxel size in mm that images are resampled to; None leaves them as they are.
        intensity: CT window in HU that is mapped to 0..1 and clipped; None: z-score of the non-zero voxels per channel.
        patch_size: voxels of a training patch.
        channel_files: each channel is a file of its own, ``<case>_0000``, ``<case>_0001``, ..., as in nnU-Net; else one
            file holds all.
    """

    name: str
    modality: str
    num_channels: int
    class_names: tuple[str, ...]
    spacing: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    intensity: tuple[float, float] | None = None
    patch_size: tuple[int, int, int] = (96, 96, 96)
    channel_files: bool = False

    @property
    def num_classes(self) -> int:
        """Label values, background included."""
        return len(self.class_names)

    def to_dict(self) -> dict:
        """Plain types only, for checkpoints that ``weights_only=True`` reads; `from_dict` is the inverse."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @staticmethod
    def from_dict(values: dict) -> Task:
        """The task of a checkpoint; an attribute that an older one lacks has its default."""
        return Task(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


@dataclass(frozen=True)
class Archive:
    """A task's archive on the MSD server, and how many cases a whole one holds."""

    num_training: int
    num_test: int
    md5: str


# Window, spacing and class facts: the published DiNTS configurations; counts: the Decathlon's dataset.json files.
TASKS = {
    task.name: task
    for task in (
        Task(
            "Task01_BrainTumour",
            "MRI",
            4,
            ("background", "edema", "non-enhancing tumor", "enhancing tumour"),
            spacing=None,
        ),
        Task("Task02_Heart", "MRI", 1, ("background", "left atrium")),
        Task("Task03_Liver", "CT", 1, ("background", "liver", "cancer"), intensity=(-21.0, 189.0)),
        Task(
            "Task04_Hippocampus",
            "MRI",
            1,
            ("background", "Anterior", "Posterior"),
            spacing=None,
            patch_size=(32, 32, 32),
        ),
        Task("Task05_Prostate", "MRI", 2, ("background", "PZ", "TZ"), patch_size=(96, 96, 32)),
        Task("Task06_Lung", "CT", 1, ("background", "cancer"), intensity=(-1000.0, 1000.0)),
        Task("Task07_Pancreas", "CT", 1, ("background", "pancreas", "cancer"), intensity=(-87.0, 199.0)),
        Task("Task08_HepaticVessel", "CT", 1, ("background", "Vessel", "Tumour"), intensity=(0.0, 230.0)),
        Task("Task09_Spleen", "CT", 1, ("background", "spleen"), intensity=(-125.0, 275.0)),
        Task("Task10_Colon", "CT", 1, ("background", "colon cancer primaries"), intensity=(-57.0, 175.0)),
        # Written by dints/phantom.py, not by the Decathlon.
        Task(
            "Task00_Phantom",
            "CT",
            1,
            ("background", "liver", "lesion"),
            spacing=(2.0, 2.0, 2.0),
            intensity=(-150.0, 250.0),
            patch_size=(32, 32, 32),
        ),
    )
}

ARCHIVE_URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/{task}.tar"
ARCHIVES = {
    "Task01_BrainTumour": Archive(484, 266, "240a19d752f0d9e9101544901065d872"),
    "Task02_Heart": Archive(20, 10, "06ee59366e1e5124267b774dbd654057"),
    "Task03_Liver": Archive(131, 70, "a90ec6c4aa7f6a3d087205e23d4e6397"),
    "Task04_Hippocampus": Archive(260, 130, "9d24dba78a72977dbd1d2e110310f31b"),
    "Task05_Prostate": Archive(32, 16, "35138f08b1efaef89d7424d2bcc928db"),
    "Task06_Lung": Archive(63, 32, "8afd997733c7fc0432f71255ba4e52dc"),
    "Task07_Pancreas": Archive(281, 139, "4f7080cfca169fa8066d17ce6eb061e4"),
    "Task08_HepaticVessel": Archive(303, 139, "641d79e80ec66453921d997fbf12a29c"),
    "Task09_Spleen": Archive(41, 20, "410d4a301da4e5b2f6f86ec3ddba524e"),
    "Task10_Colon": Archive(126, 64, "bad7a188931dc2f6acf72b08eb6202d0"),
}

NNUNET_KEYS = ("channel_names", "file_ending")  # of a dataset.json of nnU-Net v2, beside the cases' files
FORMS = {
    "modality": '{"0": "CT"}',
    "channel_names": '{"0": "CT"}',
    "labels": '{"0": "background", "1": "tumour"} or {"background": 0, "tumour": 1}',
}
MAX_CLASSES = 255  # label values 0 to 254: segmentations are uint8


def read_json(path: str | Path) -> dict:
    """The object in a JSON file; errors name the file, and the line and column where it is malformed."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist: give the dataset's description with --json, or its folder with --root"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; correct it there"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an endless number
        raise UserError(f"{path} cannot be read as a dataset description: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__} where a dataset description (a JSON object) is expected"
        )
    return content


def has_channel_files(description: dict, key: str = "training") -> bool:
    """Whether a ``dataset.json`` is of nnU-Net v2, a file a channel, and has no case list of MSD form under ``key``."""
    return key == "training" and key not in description and not description.keys().isdisjoint(NNUNET_KEYS)


def task_of_dataset(description: dict, source: str | Path, name: str, key: str = "training") -> Task:
    """The task that a ``dataset.json`` describes.

    Channels and classes are what the file says. Spacing, intensity and patch size are the table's where ``name`` is a
    task that it knows; otherwise they are None, None and 96x96x96, for the caller to measure, and the modality is CT
    only if every channel is.

    Args:
        description: content of the file: ``modality`` (MSD) or ``channel_names`` (nnU-Net v2) maps "0", "1", ... to
            names; ``labels`` maps either so, or names to 0, 1, ...
        source: the file's path, for messages.
        name: the dataset's folder name.
        key: where a case list of MSD form would be.
    """
    channels = channel_names(description, source)
    modality = "CT" if all(channel.upper() == "CT" for channel in channels) else "MRI"
    return replace(
        TASKS.get(name) or Task(name, modality, 1, (), spacing=None),
        num_channels=len(channels),
        class_names=_class_names(description, source),
        channel_files=has_channel_files(description, key),
    )


def channel_names(description: dict, source: str | Path) -> tuple[str, ...]:
    """The image channels of a ``dataset.json``, from ``channel_names`` (nnU-Net v2) or else ``modality`` (MSD)."""
    # nnU-Net lets people add keys of their own, so a "modality" beside "channel_names" may be anything.
    return _numbered(description, "channel_names" if "channel_names" in description else "modality", source)


def _class_names(description: dict, source: str | Path) -> tuple[str, ...]:
    """The class of each label value 0, 1, 2, ..."""
    labels = description.get("labels")
    kinds = {type(value) for value in labels.values()} if isinstance(labels, dict) else set()
    if list in kinds:
        regions = [name for name, value in labels.items() if isinstance(value, list)]
        raise UserError(
            f"{source}: 'labels' has regions, lists of numbers ({', '.join(regions)}), which are not supported: "
            f"give each class one number of its own, {FORMS['labels']}"
        )
    classes = _by_number(labels, source) if kinds & {int, float, bool} else _numbered(description, "labels", source)
    if len(set(classes)) < len(classes):
        raise UserError(f"{source}: 'labels' gives two classes one name ({', '.join(classes)}): rename one")
    if len(classes) < 2:
        raise UserError(f"{source}: 'labels' names only {classes[0]!r}; background and at least one more are needed")
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{source}: 'labels' has {len(classes)} values; at most {MAX_CLASSES}, background included, are supported: "
            "merge classes"
        )
    return classes


def _by_number(labels: dict, source: str | Path) -> tuple[str, ...]:
    """The names of ``{a: 0, b: 1, ...}`` in the order of their numbers, which must be 0, 1, 2, ..."""
    if "ignore" in labels:
        raise UserError(
            f"{source}: 'labels' has nnU-Net's 'ignore' label, which is not supported: every voxel needs a class, so "
            "label those voxels, or remove it and the cases that have them"
        )
    names = {number: name for name, number in labels.items() if type(number) is int}  # true and 1.0 equal 1
    if sorted(names) != list(range(len(labels))):
        raise UserError(
            f"{source}: the numbers of 'labels' must be 0 to {len(labels) - 1}, each once, not "
            f"{list(labels.values())}: write {FORMS['labels']}"
        )
    return tuple(names[number] for number in range(len(labels)))


def _numbered(description: dict, key: str, source: str | Path) -> tuple[str, ...]:
    """The values of ``{"0": a, "1": b, ...}`` in the order of their numbers, which must be 0, 1, 2, ..."""
    if key not in description:
        raise UserError(f"{source} has no '{key}': add an object such as {FORMS[key]}")
    values = description[key]
    if not isinstance(values, dict) or not values:
        raise UserError(f"{source}: '{key}' must be an object such as {FORMS[key]}, not {reprlib.repr(values)}")
    if values.keys() != {str(number) for number in range(len(values))}:
        raise UserError(
            f'{source}: the keys of \'{key}\' must be "0" to "{len(values) - 1}", not {sorted(values)}: '
            f"write {FORMS[key]}"
        )
    return tuple(str(values[str(number)]) for number in range(len(values)))
