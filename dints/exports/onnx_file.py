"""The network as an ONNX file, which other runtimes than PyTorch execute."""

from __future__ import annotations

import json
from importlib.util import find_spec

import torch
from torch.export import ExportedProgram

from dints.errors import UserError
from dints.exports.program import FACTS, quietly

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_BYTES = 2**31 - 2**24  # of weights: a file that holds them has less than 2 GiB


def check_packages() -> None:
    """Raise `UserError` unless what writes and runs such a file is installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--export onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def as_bytes(program: ExportedProgram, facts: dict[str, object]) -> bytes:
    """Return a program as ONNX: input ``image``, output ``scores``, the facts in its metadata.

    Raises:
        UserError: the weights are larger than a file can be.
    """
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    if size > MAX_BYTES:
        raise UserError(
            f"--export onnx: {size / 2**30:.1f} GiB of weights, and a file holds 2: "
            "use exported_program"
        )
    with quietly():
        found = torch.onnx.export(
            program, dynamo=True, input_names=["image"], output_names=["scores"], verbose=False
        )
        found.model.metadata_props[FACTS] = json.dumps(facts)
        return found.model_proto.SerializeToString()
