"""Architecture files: what a search found, checked, loaded and saved.

An architecture of B blocks and D depths (resolutions) is three arrays in MONAI's convention:

    node_a       (B + 1, D)   1 where a feature node is active; row 0 holds the network's inputs
    arch_code_a  (B, 3D - 2)  1 where a path between two nodes of neighbouring rows is active
    arch_code_c  (B, 3D - 2)  the operation of each path, an index into the architecture's own list
    of operations

Path p of a block leads from depth ``sources[p]`` to depth ``targets[p]``, at most one level up or
down; see `paths`. This module needs torch and NumPy only, so that drawing a file does not wait for
MONAI's import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from dints import torch_files
from dints.errors import UserError, shown
from dints.network.operations import PUBLISHED, check_names
from dints.network.strides import WHOLE, Strides, halved_first, isotropic, reductions

_ARRAYS = ("node_a", "arch_code_a", "arch_code_c")
# Far above any network that fits a machine, and low enough that checking a file costs nothing.
_MAX_BLOCKS, _MAX_DEPTHS = 1000, 16
_MAX_CHANNEL_MUL = 64

_LEGACY_KEYS = {"arch_code_a": "code_a", "arch_code_c": "code_c", "arch_code_a_max": "code_a_max"}


def paths(num_depths: int) -> list[tuple[int, int]]:
    """List (source depth, target depth) of each of a block's paths, in MONAI's order."""
    return [
        (source, target)
        for target in range(num_depths)
        for source in range(num_depths)
        if abs(source - target) <= 1
    ]


def depth_sizes(channels: Sequence[int], strides: Strides) -> list[float]:
    """Return the relative sizes of the depths' feature maps."""
    voxels = reductions(strides).prod(-1)
    return [count / int(less) for count, less in zip(channels, voxels, strict=True)]


def nodes_of(arch_code_a: np.ndarray) -> np.ndarray:
    """Return ``node_a``, (blocks + 1, depths), of these paths, (blocks, paths)."""
    num_blocks, num_depths = len(arch_code_a), (arch_code_a.shape[1] + 2) // 3
    node_a = np.zeros((num_blocks + 1, num_depths), dtype=np.int64)
    sources, targets = np.array(paths(num_depths)).T
    blocks, active = arch_code_a.nonzero()
    node_a[blocks, sources[active]] = node_a[blocks + 1, targets[active]] = 1
    return node_a


@dataclass(frozen=True, eq=False)
class Architecture:
    """A decoded architecture; it is checked when it is made, and raises `UserError` where it is not
    a network.

    Attributes:
        node_a, arch_code_a, arch_code_c: integer arrays, see the module's text.
        operations: their names, which ``arch_code_c`` indexes.
        strides: of the depths, see `dints.network.strides`; None: MONAI's, all 2.
        arch_code_a_max: (B, 3D - 2), each block's most probable paths regardless of its neighbours;
            None if unknown.
        info: plain values that help to judge the file later: ``iter_num``, ``epochs``,
            ``best_dsc``, ``best_path`` (published name: the iteration of the best validation),
            ``factor_ram_cost``, ``task``, ``seed``, ``version``, ``fold`` and ``num_folds``.
        source: where it came from, for messages.
    """

    node_a: np.ndarray
    arch_code_a: np.ndarray
    arch_code_c: np.ndarray
    arch_code_a_max: np.ndarray | None = None
    operations: tuple[str, ...] = PUBLISHED
    strides: Strides | None = None
    info: dict = field(default_factory=dict)
    source: str = "architecture"

    def __post_init__(self):
        for key in (*_ARRAYS, "arch_code_a_max"):
            value = getattr(self, key)
            if value is not None or key in _ARRAYS:
                object.__setattr__(self, key, _whole_numbers(value, key, self.source))
        object.__setattr__(self, "operations", check_names(self.operations, self.source))
        _check_shapes(self)
        object.__setattr__(self, "strides", _checked_strides(self))
        _check_values(self)
        _check_connections(self)

    @property
    def num_blocks(self) -> int:
        return self.arch_code_a.shape[0]

    @property
    def num_depths(self) -> int:
        return self.node_a.shape[1]

    @property
    def use_downsample(self) -> bool:
        """Whether the image is halved before its first node, as published."""
        return self.strides[0] != WHOLE

    @property
    def is_isotropic(self) -> bool:
        """Whether MONAI has the network: each stride halves every axis or none."""
        return self.strides == isotropic(self.num_depths, self.use_downsample)

    @property
    def channel_mul(self) -> float:
        """The width that it was judged at, if it was, else 1."""
        value = self.info.get("channel_mul", 1.0)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 1 / 32 <= value <= _MAX_CHANNEL_MUL:
            fault = f"'channel_mul' is {value!r}, not a number from 1/32 to {_MAX_CHANNEL_MUL}"
            raise _unusable(self.source, fault)
        return float(value)

    @property
    def searched_on(self) -> dict[str, str | int]:
        """The ``task`` of its search, and the ``fold`` of ``num_folds`` left out, where known."""
        known = {key: self.info.get(key) for key in ("task", "fold", "num_folds")}
        return {key: value for key, value in known.items() if isinstance(value, (str, int))}

    def codes(self) -> tuple:
        """Return nested lists that are equal for equal networks of one list of operations."""
        codes = self.arch_code_a.tolist(), self.arch_code_c.tolist()
        return codes if self.strides == isotropic(self.num_depths) else (*codes, self.strides)

    def to_dict(self) -> dict:
        """Return tensors and plain values: what an arch file and a model file hold."""
        arrays = {key: getattr(self, key) for key in (*_ARRAYS, "arch_code_a_max")}
        tensors = {
            key: torch.from_numpy(array) for key, array in arrays.items() if array is not None
        }
        settings = {"operations": list(self.operations), "use_downsample": self.use_downsample}
        if not self.is_isotropic:
            settings["strides"] = [list(stride) for stride in self.strides]
        return {**tensors, **self.info, **settings}


def from_codes(
    arch_code_a: np.ndarray,
    arch_code_c: np.ndarray,
    operations: Sequence[str] = PUBLISHED,
    strides: Strides | None = None,
    info: dict | None = None,
) -> Architecture:
    """Make the architecture of these paths and operations, with the nodes that the paths use."""
    node_a, info = nodes_of(arch_code_a), {} if info is None else info
    return Architecture(node_a, arch_code_a, arch_code_c, None, tuple(operations), strides, info)


class DecodedCodes:
    """Remembers a decoded architecture, to count changes since; a part of checkpoints."""

    def __init__(self):
        self.codes = torch.zeros(0)  # arch_code_a and arch_code_c: (2, blocks, paths)

    def take(self, decoded: Architecture) -> None:
        self.codes = torch.from_numpy(np.stack([decoded.arch_code_a, decoded.arch_code_c]))

    def changes(self, decoded: Architecture) -> dict[str, int]:
        """Count switched paths, and exchanged operations on paths active before and now."""
        before_a, before_c = self.codes.numpy()
        in_both = (before_a == 1) & (decoded.arch_code_a == 1)
        return {
            "changed_paths": int((before_a != decoded.arch_code_a).sum()),
            "changed_operations": int((before_c != decoded.arch_code_c)[in_both].sum()),
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"codes": self.codes}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        codes = state["codes"]
        if codes.shape != (0,) and (codes.ndim != 3 or len(codes) != 2):
            raise ValueError(f"codes have shape {tuple(codes.shape)}")
        self.codes = codes


def load_architecture(path: str | Path) -> Architecture:
    """Load an arch file, ours or a published one (pickled NumPy arrays, ``code_a``/``code_c``
    spelling included).

    Raises:
        UserError: the file is missing, damaged, not an architecture, or wants more than NumPy
            arrays unpickled.
    """
    return architecture_from_dict(torch_files.load_safely(path), str(path))


def architecture_from_dict(content: object, source: str) -> Architecture:
    """Make the architecture of a loaded arch or model file; inverse of `Architecture.to_dict`."""
    if not isinstance(content, dict):
        raise _unusable(source, f"holds a {type(content).__name__} where a dictionary is expected")
    arrays = {
        key: content.get(key, content.get(_LEGACY_KEYS.get(key)))
        for key in (*_ARRAYS, "arch_code_a_max")
    }
    for key in _ARRAYS:
        if arrays[key] is None:
            kind = torch_files.kind(content)
            is_other = kind not in (None, "an architecture")
            fault = f"it is {kind}, not an architecture" if is_other else f"has no '{key}'"
            raise _unusable(source, fault)
    # published files have none
    operations = content.get("operations", PUBLISHED)
    if not isinstance(operations, (list, tuple)) or not all(
        isinstance(name, str) for name in operations
    ):
        raise _unusable(source, "'operations' is not a list of names")
    use_downsample = content.get("use_downsample", True)
    if not isinstance(use_downsample, bool):
        raise _unusable(source, "'use_downsample' is not True or False")
    known = (*arrays, *_LEGACY_KEYS.values(), "operations", "use_downsample", "strides")
    info = {key: _plain(value) for key, value in content.items() if key not in known}
    for key, value in info.items():  # which is written into model files, and shown
        if not isinstance(key, str) or not torch_files.is_plain(value):
            raise _unusable(source, f"{shown(key)} is {shown(value)}, not a plain value")
    strides = content.get("strides")  # files of MONAI's networks have none
    facts = {"operations": tuple(operations), "info": info, "source": source}
    architecture = Architecture(**arrays, strides=strides, **facts)
    if strides is not None:
        return architecture
    return replace(architecture, strides=halved_first(architecture.strides, use_downsample))


def save_architecture(path: str | Path, architecture: Architecture) -> None:
    """Write an arch file atomically, readable with ``torch.load(path, weights_only=True)``."""
    torch_files.save_atomically(architecture.to_dict(), path)


def _unusable(source: str, fault: str) -> UserError:
    return UserError(
        f"{source}: {fault}; give an arch file as search_dints.py writes it (search_code_*.pth)"
    )


def _plain(value: object) -> object:
    """Return ``value`` without NumPy's types, which ``weights_only=True`` refuses to read."""
    is_array = isinstance(value, (np.ndarray, np.generic)) or (
        isinstance(value, torch.Tensor) and torch_files.is_whole(value)
    )
    return value.tolist() if is_array and value.nbytes < 2**20 else value


def _whole_numbers(value: object, key: str, source: str) -> np.ndarray:
    not_numbers = _unusable(source, f"'{key}' is not an array of numbers")
    if isinstance(value, torch.Tensor):
        if value.numel() > _MAX_BLOCKS * 3 * _MAX_DEPTHS:  # in the file, perhaps 1 number
            shape = tuple(value.shape)
            raise _unusable(source, f"'{key}' has shape {shape}, too large for an architecture")
    elif not isinstance(value, np.ndarray) and not torch_files.is_plain(value):
        raise not_numbers  # lists without end
    try:
        array = value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:  # RuntimeError: a tensor without values
        raise not_numbers from error
    if array.dtype.kind not in "biuf":  # booleans, integers and floats
        raise not_numbers
    exact = np.isfinite(array) & (array == np.round(array)) & (array < 2**53)
    if not exact.all():
        wrong = array[~exact].flat[0]
        raise _unusable(source, f"'{key}' holds {wrong:g} where only whole numbers make sense")
    return array.astype(np.int64)


def _check_shapes(architecture: Architecture) -> None:
    source, shape = architecture.source, architecture.arch_code_a.shape
    if len(shape) != 2 or shape[0] < 1 or (shape[1] + 2) % 3 or shape[1] < 4:
        fault = (
            f"'arch_code_a' has shape {shape}, not (blocks, 3 * depths - 2), of 2 depths or more"
        )
        raise _unusable(source, fault)
    num_blocks, num_depths = shape[0], (shape[1] + 2) // 3
    size = f"{num_blocks} blocks and {num_depths} depths"
    if num_blocks > _MAX_BLOCKS or num_depths > _MAX_DEPTHS:
        limits = f"the {_MAX_BLOCKS} and {_MAX_DEPTHS} that are supported"
        raise _unusable(source, f"it has {size}, more than {limits}")
    for key, expected in (
        ("node_a", (num_blocks + 1, num_depths)),
        ("arch_code_c", shape),
        ("arch_code_a_max", shape),
    ):
        array = getattr(architecture, key)
        if array is not None and array.shape != expected:
            fault = f"'{key}' has shape {array.shape}, but {size} ask for {expected}"
            raise _unusable(source, fault)


def _checked_strides(architecture: Architecture) -> Strides:
    """Return the strides as tuples of plain numbers; those of MONAI's network where none are."""
    strides, num_depths = architecture.strides, architecture.num_depths
    if strides is None:
        return isotropic(num_depths)
    factors = _whole_numbers(strides, "strides", architecture.source)
    is_whole = factors.shape == (num_depths, 3) and np.isin(factors, (1, 2)).all()
    if not is_whole or (factors[1:] == 1).all(-1).any():
        fault = f"'strides' is {shown(strides)}, not 1 or 2 along 3 axes of {num_depths} depths"
        raise _unusable(architecture.source, fault)
    return tuple(tuple(stride) for stride in factors.tolist())


def _check_values(architecture: Architecture) -> None:
    for key, highest in (
        ("node_a", 1),
        ("arch_code_a", 1),
        ("arch_code_a_max", 1),
        ("arch_code_c", len(architecture.operations) - 1),
    ):
        array = getattr(architecture, key)
        if array is not None and (array.min() < 0 or array.max() > highest):
            wrong = array[(array < 0) | (array > highest)][0]
            fault = f"'{key}' holds {wrong}; values are 0 to {highest}"
            raise _unusable(architecture.source, fault)


def _check_connections(architecture: Architecture) -> None:
    """Check that each block leaves from the depths that the one before reaches; ``node_a`` too."""
    source = architecture.source
    sources, targets = np.array(paths(architecture.num_depths)).T
    active = architecture.arch_code_a == 1
    left = [np.unique(sources[block]).tolist() for block in active]
    reached = [np.unique(targets[block]).tolist() for block in active]
    for block, depths in enumerate(left):
        if not depths:
            raise _unusable(source, f"block {block} has no active path")
        if block > 0 and depths != reached[block - 1]:
            ends = f"block {block - 1} ends at depths {reached[block - 1]}"
            raise _unusable(source, f"{ends}, but block {block} starts from {depths}")
    for row, used in enumerate([left[0], *reached]):
        stated = np.flatnonzero(architecture.node_a[row]).tolist()
        if stated != used:
            fault = f"row {row} of 'node_a' activates depths {stated}, but the paths use {used}"
            raise _unusable(source, fault)
