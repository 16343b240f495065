"""PyTorch's files, written whole or not at all, and read without running anything in them."""

from __future__ import annotations

import difflib
import pickle
import warnings
from pathlib import Path

import numpy as np
import torch

from dints.errors import UserError
from dints.files import replacing


def save_atomically(content: object, path: str | Path) -> None:
    """Save as ``torch.save``, and leave either the old or the new file, whatever interrupts it."""
    with replacing(path) as file:
        torch.save(content, file)


MAX_VALUES, MAX_DEPTH, MAX_TEXT = 1_000_000, 16, 100_000  # of what counts as plain

# What PyTorch raises for damaged files, beside pickle's own errors.
_DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
)


def load_safely(path: str | Path) -> object:
    """Load plain values, tensors and NumPy arrays onto the CPU; nothing else in the file is ever
    called.

    Raises:
        UserError: the file is missing, empty, truncated, foreign, or names a type beyond those.
    """
    try:
        with torch.serialization.safe_globals(_numpy_globals()), warnings.catch_warnings():
            # about unusual pickles: what is wrong with one is said below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251  the one place
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {_meant_beside(Path(path))}") from error
    except IsADirectoryError as error:
        inside = ", ".join(sorted(file.name for file in Path(path).glob("*.pth"))[-3:])
        raise UserError(
            f"{path} is a folder, not a file: give "
            f"one{f' of those in it, as {inside}' if inside else ''}"
        ) from error
    except pickle.UnpicklingError as error:
        wanted = _refused_global(str(error))
        if wanted:
            raise UserError(
                f"{path} asks for {wanted} while loading; only tensors and NumPy arrays are "
                "accepted: do not trust it"
            ) from error
        raise UserError(f"{path} is damaged or not a PyTorch file: give another") from error
    except _DAMAGE as error:
        raise UserError(
            f"{path} is damaged or not a PyTorch file ({type(error).__name__}): give another"
        ) from error


def is_plain(content: object) -> bool:
    """Tell whether it is text, numbers, None, and lists and dicts of them, neither nested nor long
    without reason.
    """
    left, waiting = MAX_VALUES, [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            return False
        if isinstance(value, (list, tuple)):
            waiting.extend((item, depth + 1) for item in value[:MAX_VALUES])
        elif isinstance(value, dict):
            if len(value) > MAX_VALUES or not all(isinstance(key, str) for key in value):
                return False
            waiting.extend((item, depth + 1) for item in (*value, *value.values()))
        elif isinstance(value, str):
            if len(value) > MAX_TEXT:
                return False
        elif isinstance(value, int):
            if abs(value) >= 2**64:
                return False
        elif not isinstance(value, (float, type(None))):
            return False
    return True


def is_whole(tensor: torch.Tensor) -> bool:
    """Tell whether its numbers are all in the file; some are meta or sparse, or repeat one
    number.
    """
    if (
        tensor.device.type != "cpu"
        or tensor.is_nested
        or tensor.layout is not torch.strided
        or tensor.is_quantized
    ):
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _meant_beside(path: Path) -> str:
    """Name the file that was probably meant instead of one that does not exist."""
    beside = sorted(file.name for file in path.parent.glob("*")) if path.parent.is_dir() else []
    alike = difflib.get_close_matches(path.name, beside, 1)
    return f"did you mean {path.parent / alike[0]}?" if alike else "check its path"


def kind(content: object) -> str | None:
    """Name the kind of file that a content is of, so that one in place of another is recognised."""
    keys = content.keys() if isinstance(content, dict) else set()
    if {"state_dict", "architecture"} <= keys:
        return "a model file of train_dints.py"
    if {"parts", "progress"} <= keys:
        return "the saved state of a run"
    return "an architecture" if keys & {"arch_code_a", "code_a"} else None


def _numpy_globals() -> list:
    """List what a pickled NumPy array or scalar needs, under the module names of NumPy 1 and 2."""
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    rebuild = [
        (getattr(multiarray, name), f"numpy.{module}.multiarray.{name}")
        for module in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ]
    kinds = "?bhilBHILefd"  # NumPy's characters for booleans, integers and floats
    return [*rebuild, np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in kinds}]


def _refused_global(message: str) -> str | None:
    """Return the name of the refused type or function in torch's message, if it is about one."""
    for opening in ("Unsupported global: GLOBAL ", "Trying to load unsupported GLOBAL "):
        if opening in message:
            return message.split(opening, 1)[1].split()[0]
    return None
