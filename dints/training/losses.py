"""The segmentation loss, and an epoch's losses, which stay on the device."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from monai.losses import DiceLoss
from torch import nn
from torch.nn import functional as F

from dints.errors import UserError, shown
from dints.running.processes import Processes

LOSS_VALUES = ("sum of the finite losses", "their number", "steps in a row, until now, that are not finite")
CHECK_EVERY = 20  # steps, after which those in a row are looked at; on a GPU a look waits for it
MAX_IN_A_ROW = 5
MAX_NUMBERS, MAX_DEPTH = 100, 4  # in the description of the loss


def _cross_entropy(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores, label[:, 0].long())


# What the segmentation loss adds up, with its weight: functions of class scores (batch, classes, *spatial), before
# softmax, and labels (batch, 1, *spatial).
TERMS = (
    # Of the foreground classes, over the whole batch.
    (
        1.0,
        DiceLoss(
            include_background=False,
            to_onehot_y=True,
            softmax=True,
            squared_pred=True,
            batch=True,
            smooth_nr=1e-5,
            smooth_dr=1e-5,
        ),
    ),
    (1.0, _cross_entropy),
)


def segmentation_loss(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Add up `TERMS`: soft Dice and cross-entropy.

    Args:
        scores: (batch, classes, *spatial), before softmax.
        label: (batch, 1, *spatial).
    """
    return sum(weight * term(scores, label) for weight, term in TERMS)


@functools.cache  # as they are before the first step: a module's attributes may change with its use
def describe() -> list[dict]:
    """Return `TERMS` as plain values, by which a run knows whether it still minimises the same.

    A class or function of PyTorch or MONAI is known by its name, any other one by its source too. What that calls in
    turn is not looked at.
    """
    return [{"weight": weight, **_described(term)} for weight, term in TERMS]


def _described(thing: Callable, depth: int = 0) -> dict[str, object]:
    """Return the name of a function or object, its settings, and the digest of its source."""
    if isinstance(thing, functools.partial):
        settings, kind = {"of": thing.func, "given": thing.args, **thing.keywords}, functools.partial
    elif inspect.isfunction(thing):
        variables, kind = inspect.getclosurevars(thing), thing
        settings = {name: value for name, value in variables.globals.items() if isinstance(value, (int, float, str))}
        settings |= variables.nonlocals
    else:
        settings, kind = {**getattr(thing, "__dict__", {})}, type(thing)
    if isinstance(thing, nn.Module):
        settings |= {**thing._parameters, **thing._buffers, **thing._modules}
    own = {name: value for name, value in sorted(settings.items()) if not name.startswith("_") and name != "training"}
    found = {"name": kind.__qualname__, "settings": {name: _plain(value, depth + 1) for name, value in own.items()}}
    return found | _source(kind)


def _plain(value: object, depth: int) -> object:
    for kind in (bool, int, float, str):  # also of what is derived from these, such as enumerations
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, torch.Tensor):
        return value.tolist() if value.numel() <= MAX_NUMBERS else {"source": _digest(repr(value.tolist()))}
    if value is None or depth > MAX_DEPTH:
        return None if value is None else type(value).__qualname__
    if isinstance(value, Mapping):
        return {str(name): _plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    return _described(value, depth) if callable(value) else type(value).__qualname__


def _source(kind: Callable) -> dict[str, str]:
    if kind.__module__.partition(".")[0] in ("functools", "monai", "torch"):
        return {}
    try:
        return {"source": _digest(inspect.getsource(kind))}
    except (OSError, TypeError):  # it was not read from a file
        return {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class EpochLoss:
    """Gathers the losses of an epoch's steps. They stay on the device, so that no step waits for another.

    A step whose loss is not finite changes no weight (see `step_if_finite`), and does not count. Many in a row are a
    training that diverged.

    Args:
        name: for messages.
    """

    def __init__(self, name: str, processes: Processes):
        self.name, self.processes = name, processes
        self.values = torch.zeros(len(LOSS_VALUES), device=processes.device)
        self.steps = 0
        self.recent: deque[tuple[int, Sequence[str]]] = deque(maxlen=2 * CHECK_EVERY)

    def start(self) -> None:
        """Forget the last epoch, but for the steps in a row that were not finite at its end."""
        self.values[:2] = 0

    def add(self, loss: torch.Tensor, iteration: int, cases: Sequence[str]) -> None:
        """Count a step.

        Args:
            iteration: how many the run had done before it.
            cases: what it was computed from.

        Raises:
            UserError: too many in a row were not finite; on every rank.
        """
        finite = loss.isfinite()
        total, count, in_a_row = self.values.unbind()
        total += torch.where(finite, loss, 0.0)
        count += finite
        in_a_row.copy_(torch.where(finite, 0.0, in_a_row + 1))
        self.recent.append((iteration + 1, cases))
        self.steps += 1
        if self.steps % CHECK_EVERY == 0:
            self._check()

    def mean(self) -> float:
        """Return the mean over the steps and all ranks.

        Raises:
            UserError: no step's loss was finite, or too many at the end were not.
        """
        self._check()
        total, count = self.processes.sum(self.values[:2].clone()).tolist()
        if count == 0:
            raise self._diverged()
        return total / count

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return every rank's values; every rank must call it."""
        ranks = torch.zeros(self.processes.world_size, len(LOSS_VALUES), device=self.values.device)
        ranks[self.processes.rank] = self.values
        return {"ranks": self.processes.sum(ranks).cpu()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state["ranks"].shape[1:] != (len(LOSS_VALUES),):
            raise ValueError(f"ranks have {shown(tuple(state['ranks'].shape))} values")
        if len(state["ranks"]) == self.processes.world_size:  # else the epoch begins anew
            self.values.copy_(state["ranks"][self.processes.rank])

    def _check(self) -> None:
        (longest,) = self.processes.largest(self.values[2:].tolist())
        if longest >= MAX_IN_A_ROW:
            raise self._diverged()

    def _diverged(self) -> UserError:
        """Make the error, with the iteration at which it began and the cases of the ranks that it began on."""
        own = int(self.values[2].item())
        began = list(self.recent)[-min(own, len(self.recent))] if own else None
        found = [(steps, *place) for steps, place in self.processes.gather((own, began)) if place is not None]
        first = min(iteration for _, iteration, _ in found)
        names = [name for _, iteration, cases in found if iteration == first for name in cases]
        return UserError(
            f"the {self.name} is not finite at iteration {first} (cases {', '.join(names)}), and in "
            f"{max(steps for steps, *_ in found)} steps in a row: the training diverged; lower --learning_rate, set "
            "--max_gradient_norm, or try --precision fp32. latest.pth is from before"
        )
