"""Weights in files, compared with the network that is to take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dints import torch_files
from dints.errors import UserError, cut

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_weights(network: nn.Module, path: str | Path, unused: Sequence[str] = ()) -> None:
    """Load a state dict, a model file or a search's ``latest.pth`` into ``network``.

    Args:
        unused: openings of keys that may be left over: MONAI's network has stems that an
            architecture does not use.

    Raises:
        UserError: as `fitting_state`.
    """
    network.load_state_dict(fitting_state(network, torch_files.load_safely(path), path, unused))


def fitting_state(
    network: nn.Module, content: object, source: str | Path, unused: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Return the weights in a file's content, with or without ``module.`` before their names, as
    ``network`` has them.

    Raises:
        UserError: the content is no state dict, does not fit the network, or holds NaN or infinite
            numbers.
    """
    state = _state_dict_in(content)
    if not _is_state_dict(state):
        kind = torch_files.kind(content)
        is_other = f" (it is {kind})" if kind == "an architecture" else ""
        raise UserError(
            f"{source} does not hold network weights{is_other}: give a state dict, or a model file "
            "of train_dints.py"
        )
    state = {key.removeprefix("module."): value for key, value in state.items()}
    own = network.state_dict()
    missing = [key for key in own if key not in state]
    foreign = [key for key in state if key not in own and not key.startswith(tuple(unused))]
    misshapen = [key for key in own if key in state and own[key].shape != state[key].shape]
    for keys, fault in (
        (missing, "lacks {} that the network has"),
        (foreign, "has {} that the network lacks"),
        (misshapen, "has {} of another shape"),
    ):
        if keys:
            key, shapes = keys[0], ""
            if keys is misshapen:
                shapes = f" {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
            raise UserError(
                f"the weights in {source} do not fit this network: the file "
                f"{fault.format(f'{len(keys)} tensors')}, for example {cut(key)}{shapes}; give "
                "the architecture, channel_mul and data of its training"
            )
    state = {key: state[key] for key in own}
    nonfinite = [key for key, value in state.items() if not value.isfinite().all()]
    if nonfinite:
        raise UserError(
            f"the weights in {source} are NaN or infinite in {len(nonfinite)} tensors, for example "
            f"{nonfinite[0]}: give weights saved before that training failed"
        )
    return state


def _state_dict_in(content: object) -> object:
    """Look where a model file and the checkpoint of a run have the weights."""
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("parts"), dict):
        return content["parts"].get("network")
    return content.get("state_dict", content)


def _is_state_dict(content: object) -> bool:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(key, str) and _is_dense(value) for key, value in content.items())


def _is_dense(value: object) -> bool:
    """Tell whether it is a tensor of floats that are all there, not meta, sparse or nested."""
    if not isinstance(value, torch.Tensor) or value.dtype not in _FLOATS or value.is_nested:
        return False
    return value.device.type == "cpu" and value.layout is torch.strided
