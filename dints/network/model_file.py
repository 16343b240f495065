"""Model files: all that inference needs, saved and loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dints import files, torch_files
from dints.data.tasks import MAX_CLASSES, Task
from dints.errors import UserError, cut, shown
from dints.network.architecture import Architecture, architecture_from_dict
from dints.network.discrete import DiscreteNetwork, check_patch_size
from dints.network.weights import fitting_state, load_weights

# of what `dints.data.plausibility` measures
SIZES_OF_RANGES = {"spacing": 3, "extent": 3, "intensity": 2}


def save_model(
    path: str | Path,
    network: DiscreteNetwork,
    architecture: Architecture,
    channel_mul: float,
    task: Task,
    **info,
) -> None:
    """Write all that inference needs: weights, architecture, network settings, preprocessing."""
    content = {
        "state_dict": network.state_dict(),
        "architecture": architecture.to_dict(),
        "channel_mul": channel_mul,
        "task": task.to_dict(),
        **info,
    }
    torch_files.save_atomically(content, path)


@dataclass(frozen=True)
class Model:
    """What a model file holds.

    Attributes:
        network: with its weights.
        info: whatever else: ``channel_mul``, the ``dice`` and ``iteration`` of its validation, the
            ``version``, its ``run`` (an identity); of its training ``training_cases``,
            ``validation_cases``, ``fold``, ``num_folds``, ``overlap_ratio``, and the ``ranges`` of
            `dints.data.plausibility`.
        digest: of the file.
    """

    network: DiscreteNetwork
    architecture: Architecture
    task: Task
    info: dict
    digest: str = ""

    @property
    def channels(self) -> str:
        """How many image channels the network takes, and which, where the file says it."""
        data = self.info.get("data")
        names = data.get("channels") if isinstance(data, dict) else None
        is_known = isinstance(names, list) and len(names) == self.task.num_channels
        named = f" ({', '.join(str(name)[:40] for name in names)})" if is_known else ""
        return (
            f"{self.task.num_channels} channel{'' if self.task.num_channels == 1 else 's'}{named}"
        )


def load_model(path: str | Path) -> Model:
    """Read a model file, and build its network.

    Raises:
        UserError: it is missing, damaged or none.
    """
    content = torch_files.load_safely(path)
    if (
        not isinstance(content, dict)
        or not {"state_dict", "architecture", "channel_mul", "task"} <= content.keys()
    ):
        kind = torch_files.kind(content)
        is_other = "" if kind in (None, "a model file of train_dints.py") else f" (it is {kind})"
        raise UserError(
            f"{path} is not a model file{is_other}: give best_metric_model.pth, which "
            "train_dints.py writes"
        )
    architecture = architecture_from_dict(content["architecture"], f"the architecture in {path}")
    try:
        task = Task.from_dict(content["task"])
        _check_task(task, architecture)
        settings = architecture, task.num_channels, task.num_classes, content["channel_mul"]
        # first without memory, which a damaged channel_mul would ask too much of
        with torch.device("meta"):
            outline = DiscreteNetwork(*settings)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        UserError,
    ) as error:
        reason = cut(str(error).partition("\n")[0], 200)  # PyTorch adds its C++ stack
        raise UserError(
            f"{path} is damaged: its task and channel_mul {shown(content['channel_mul'])} describe "
            f"no network ({reason}); give another model file of train_dints.py"
        ) from error
    state = fitting_state(outline, content, path, outline.unused_stems)
    network = DiscreteNetwork(*settings)
    network.load_state_dict(state)
    info = {
        key: value
        for key, value in content.items()
        if key not in ("state_dict", "architecture", "task")
    }
    _check_info(info, path)
    return Model(network, architecture, task, info, files.digest(path))


def validation_of(path: Path, run: str) -> dict[str, float | int | None] | None:
    """Read of which ``iteration`` a file's network is, and the ``dice`` of its validation; None
    where there is no file.

    Args:
        run: identity of the run whose file it has to be; empty for one that has
            none.

    Raises:
        UserError: it is damaged, of another run, or does not say so.
    """
    if not path.is_file():
        return None
    content = torch_files.load_safely(path)
    noted = (
        {key: content.get(key) for key in ("iteration", "dice")}
        if isinstance(content, dict)
        else {}
    )
    is_sound = type(noted.get("iteration")) is int and isinstance(
        noted["dice"], (float, type(None))
    )
    if not is_sound or content.get("run", "") != run:
        raise UserError(
            f"{path} is not of this run: move it away, and the same command writes it again"
        )
    return noted


def model_of_weights(
    path: str | Path, architecture: Architecture, channel_mul: float, task: Task
) -> Model:
    """Make a model of weights alone, as MONAI's DiNTS saves them, which say nothing of their
    network and data.

    Raises:
        UserError: they do not fit the architecture, or the architecture does not fit the task.
    """
    check_patch_size(task.patch_size, architecture.strides)
    network = DiscreteNetwork(architecture, task.num_channels, task.num_classes, channel_mul)
    load_weights(network, path, network.unused_stems)
    return Model(network, architecture, task, {"channel_mul": channel_mul}, files.digest(path))


def _check_info(info: dict, path: str | Path) -> None:
    for key, value in info.items():
        if not isinstance(key, str) or not torch_files.is_plain(value) or not _is_sound(key, value):
            raise UserError(
                f"{path} is damaged: its {cut(str(key))} is {shown(value)}; give another model file"
            )


def _is_sound(key: str, value: object) -> bool:
    """Tell whether an entry is what its readers take it for; others may be anything."""
    if key in ("training_cases", "validation_cases"):
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if key == "ranges":
        return isinstance(value, dict) and all(
            _is_range(name, ends) for name, ends in value.items()
        )
    if key == "flips":
        axes = value.get("axes") if isinstance(value, dict) else None
        return isinstance(axes, (list, tuple)) and all(
            type(axis) is int and axis in (0, 1, 2) for axis in axes
        )
    return key != "overlap_ratio" or (isinstance(value, float) and 0 <= value < 1)


def _is_range(name: object, ends: object) -> bool:
    """Tell whether they are the least and largest values of a quantity in `SIZES_OF_RANGES`."""
    if name not in SIZES_OF_RANGES or not isinstance(ends, (list, tuple)) or len(ends) != 2:
        return False
    count = SIZES_OF_RANGES[name]
    return all(
        isinstance(end, (list, tuple)) and _are(tuple(end), (int, float), count) for end in ends
    )


def _check_task(task: Task, architecture: Architecture) -> None:
    """Raise unless the attributes are what `Task` says, and patches fit the architecture."""
    numbers = (int, float)
    for key, is_sound in (
        ("name", isinstance(task.name, str)),
        ("modality", task.modality in ("CT", "MRI")),
        ("num_channels", type(task.num_channels) is int and task.num_channels > 0),
        ("class_names", _are(task.class_names, str) and 2 <= len(task.class_names) <= MAX_CLASSES),
        (
            "spacing",
            task.spacing is None or (_are(task.spacing, numbers, 3) and min(task.spacing) > 0),
        ),
        (
            "intensity",
            task.intensity is None
            or (_are(task.intensity, numbers, 2) and task.intensity[0] < task.intensity[1]),
        ),
        ("patch_size", _are(task.patch_size, int, 3)),
        ("channel_files", isinstance(task.channel_files, bool)),
    ):
        if not is_sound:
            raise ValueError(f"{key} {shown(getattr(task, key))}")
    check_patch_size(task.patch_size, architecture.strides, "patch_size")


def _are(values: object, kinds: type | tuple[type, ...], count: int | None = None) -> bool:
    """Tell whether they are a tuple of so many, all of the kinds and, if numbers, finite."""
    if not isinstance(values, tuple) or (count is not None and len(values) != count):
        return False
    return all(
        isinstance(value, kinds) and (isinstance(value, str) or math.isfinite(value))
        for value in values
    )
