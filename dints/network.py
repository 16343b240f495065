"""The found network: built from an architecture, its weights loaded, saved and counted."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path

import torch
from monai.networks.nets.dints import DiNTS, TopologyInstance
from torch import nn

from dints import files
from dints.acceleration import accelerated
from dints.architecture import Architecture, architecture_from_dict, paths
from dints.errors import UserError
from dints.tasks import MAX_CLASSES, Task

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FoundNetwork(DiNTS):
    """MONAI's `DiNTS` over a `TopologyInstance`, with the architecture as Python ints and nothing that never trains.

    State dicts of MONAI's network fit, but for the stems that this architecture does not use; see `load_weights`.

    Args:
        architecture: what to build.
        in_channels: image channels.
        num_classes: output channels, background included.
        channel_mul: times 32, 64, 128, ... channels from the full resolution down.
    """

    def __init__(self, architecture: Architecture, in_channels: int, num_classes: int, channel_mul: float = 1.0):
        with contextlib.redirect_stdout(io.StringIO()):  # MONAI prints its advice about patch sizes
            space = TopologyInstance(
                arch_code=[architecture.arch_code_a, architecture.arch_code_c],
                channel_mul=channel_mul,
                num_blocks=architecture.num_blocks,
                num_depths=architecture.num_depths,
            )
        super().__init__(space, in_channels, num_classes, node_a=torch.from_numpy(architecture.node_a))
        ends = paths(architecture.num_depths)
        self.inputs = [int(depth) for depth in architecture.node_a[0].nonzero()[0]]
        self.blocks = [
            [(str((block, int(path))), *ends[path]) for path in active.nonzero()[0]]
            for block, active in enumerate(architecture.arch_code_a)
        ]
        self.deepest_output = int(architecture.node_a[-1].nonzero()[0].max())
        unused = [("stem_down", depth) for depth in range(self.num_depths) if depth not in self.inputs]
        unused += [("stem_up", depth) for depth in range(self.deepest_output + 1, self.num_depths)]
        for stems, depth in unused:
            del getattr(self, stems)[str(depth)]
        accelerated(self)
        self.unused_stems = tuple(f"{stems}.{depth}." for stems, depth in unused)  # openings of MONAI's keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores (batch, classes, *spatial) of images (batch, channels, *spatial)."""
        features = {depth: self.stem_down[str(depth)](x) for depth in self.inputs}
        for block in self.blocks:
            outputs = {}
            for name, source, target in block:
                output = self.dints_space.cell_tree[name](features[source], None)
                outputs[target] = outputs[target] + output if target in outputs else output
            features = outputs
        up = None
        for depth in range(self.deepest_output, -1, -1):
            terms = [term for term in (features.get(depth), up) if term is not None]
            up = self.stem_up[str(depth)](sum(terms[1:], terms[0]))
        return self.stem_finals(up)


def check_patch_size(patch_size: tuple[int, int, int], num_depths: int, flag: str = "--patch_size") -> None:
    """Raise `UserError` unless a network of ``num_depths`` can halve ``patch_size`` down to its deepest level."""
    step = 2**num_depths
    if any(size <= 0 or size % step for size in patch_size) or all(size <= step for size in patch_size):
        nearest = [max(step, round(size / step) * step) for size in patch_size]
        if all(size <= step for size in nearest):  # InstanceNorm needs more than one voxel at the deepest level
            nearest = [2 * step] * 3
        raise UserError(
            f"{flag} {' '.join(map(str, patch_size))} does not fit {num_depths} depths, which need multiples of {step} "
            f"and more than {step} in one direction: for example {' '.join(map(str, nearest))}"
        )


def count_parameters(network: nn.Module) -> int:
    """Trainable numbers in the network."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def load_weights(network: FoundNetwork, content: object, source: str | Path) -> None:
    """Load a state dict, with or without ``module.`` before its keys, or a model file's content into ``network``.

    Weights of MONAI's network for stems that this architecture does not use may be left over; nothing else may, and
    nothing may be missing.

    Raises:
        UserError: the content is no state dict, does not fit the network, or holds NaN or infinite numbers.
    """
    network.load_state_dict(_fitting_state(network, content, source))


def _fitting_state(network: FoundNetwork, content: object, source: str | Path) -> dict[str, torch.Tensor]:
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not _is_state_dict(state):
        raise UserError(f"{source} does not hold network weights: give a state dict, or a model file of train_dints.py")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    own = network.state_dict()
    missing = [key for key in own if key not in state]
    foreign = [key for key in state if key not in own and not key.startswith(network.unused_stems)]
    misshapen = [key for key in own if key in state and own[key].shape != state[key].shape]
    for keys, fault in (
        (missing, "lacks {} that the network has"),
        (foreign, "has {} that the network lacks"),
        (misshapen, "has {} of another shape"),
    ):
        if keys:
            shapes = f" {tuple(state[keys[0]].shape)}, not {tuple(own[keys[0]].shape)}" if keys is misshapen else ""
            raise UserError(
                f"the weights in {source} do not fit this network: the file {fault.format(f'{len(keys)} tensors')}, "
                f"for example {keys[0]}{shapes}; give the architecture, channel_mul and data of its training"
            )
    state = {key: state[key] for key in own}
    nonfinite = [key for key, value in state.items() if not value.isfinite().all()]
    if nonfinite:
        raise UserError(
            f"the weights in {source} are NaN or infinite in {len(nonfinite)} tensors, for example {nonfinite[0]}: "
            "give weights saved before that training failed"
        )
    return state


def _is_state_dict(content: object) -> bool:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(key, str) and _is_dense(value) for key, value in content.items())


def _is_dense(value: object) -> bool:
    """Whether it is a tensor of floats that are all there; a file may hold meta, sparse, nested and quantized ones."""
    is_tensor = isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_nested
    return is_tensor and value.layout is torch.strided and value.dtype in _FLOATS


def save_model(
    path: str | Path, network: FoundNetwork, architecture: Architecture, channel_mul: float, task: Task, **info
) -> None:
    """Write a model file, all that inference needs: weights, architecture, network settings, preprocessing."""
    content = {
        "state_dict": network.state_dict(),
        "architecture": architecture.to_dict(),
        "channel_mul": channel_mul,
        "task": task.to_dict(),
        **info,
    }
    files.save_atomically(content, path)


def load_model(path: str | Path) -> tuple[FoundNetwork, Architecture, Task, dict]:
    """The network in a model file with its weights, its architecture, its task, and all that the file holds."""
    content = files.load_safely(path)
    if not isinstance(content, dict) or not {"state_dict", "architecture", "channel_mul", "task"} <= content.keys():
        raise UserError(f"{path} is not a model file: give best_metric_model.pth, which train_dints.py writes")
    architecture = architecture_from_dict(content["architecture"], f"the architecture in {path}")
    try:
        task = Task.from_dict(content["task"])
        _check_task(task, architecture)
        settings = architecture, task.num_channels, task.num_classes, content["channel_mul"]
        with torch.device("meta"):  # first without memory, which a damaged channel_mul would ask too much of
            outline = FoundNetwork(*settings)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, UserError) as error:
        reason = str(error).partition("\n")[0]  # PyTorch adds its C++ stack
        raise UserError(
            f"{path} is damaged: its task and channel_mul {content['channel_mul']!r} describe no network ({reason}); "
            "give another model file of train_dints.py"
        ) from error
    state = _fitting_state(outline, content, path)
    network = FoundNetwork(*settings)
    network.load_state_dict(state)
    return network, architecture, task, content


def _check_task(task: Task, architecture: Architecture) -> None:
    """Raise unless the attributes are what `Task` says of them, and its patches fit the architecture."""
    numbers = (int, float)
    for key, is_sound in (
        ("name", isinstance(task.name, str)),
        ("modality", task.modality in ("CT", "MRI")),
        ("num_channels", type(task.num_channels) is int and task.num_channels > 0),
        ("class_names", _are(task.class_names, str) and 2 <= len(task.class_names) <= MAX_CLASSES),
        ("spacing", task.spacing is None or (_are(task.spacing, numbers, 3) and min(task.spacing) > 0)),
        (
            "intensity",
            task.intensity is None or (_are(task.intensity, numbers, 2) and task.intensity[0] < task.intensity[1]),
        ),
        ("patch_size", _are(task.patch_size, int, 3)),
        ("channel_files", isinstance(task.channel_files, bool)),
    ):
        if not is_sound:
            raise ValueError(f"{key} {getattr(task, key)!r}")
    check_patch_size(task.patch_size, architecture.num_depths, "patch_size")


def _are(values: object, kinds: type | tuple[type, ...], count: int | None = None) -> bool:
    """Whether they are a tuple of so many, all of the kinds and, if numbers, finite."""
    if not isinstance(values, tuple) or (count is not None and len(values) != count):
        return False
    return all(isinstance(value, kinds) and (isinstance(value, str) or math.isfinite(value)) for value in values)
