"""An epoch's losses, which stay on the device, and the end of a training that diverged."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from dints.errors import UserError, shown
from dints.running.processes import Processes

VALUES = ("sum of the finite losses", "their number", "latest steps in a row that are not finite")
CHECK_EVERY = 20  # steps between two looks at those in a row; on a GPU a look waits for it
MAX_IN_A_ROW = 5


class EpochLoss:
    """Gathers the losses of an epoch's steps. They stay on the device, so that no step waits.

    A step whose loss is not finite changes no weight (see `step_if_finite`), and does not count.
    Many in a row are a training that diverged.

    Args:
        name: for messages.
    """

    def __init__(self, name: str, processes: Processes):
        self.name, self.processes = name, processes
        self.values = torch.zeros(len(VALUES), device=processes.device)
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

    def mean(self) -> float | None:
        """Return the mean over the steps and all ranks; None where the epoch had no step.

        Raises:
            UserError: no step's loss was finite, or too many at the end were not.
        """
        longest = self._check()
        total, count = self.processes.sum(self.values[:2].clone()).tolist()
        if count == 0 and longest > 0:
            raise self._diverged()
        return total / count if count else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return every rank's values; every rank must call it."""
        ranks = torch.zeros(self.processes.world_size, len(VALUES), device=self.values.device)
        ranks[self.processes.rank] = self.values
        return {"ranks": self.processes.sum(ranks).cpu()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state["ranks"].shape[1:] != (len(VALUES),):
            raise ValueError(f"ranks have {shown(tuple(state['ranks'].shape))} values")
        if len(state["ranks"]) == self.processes.world_size:  # else the epoch begins again
            self.values.copy_(state["ranks"][self.processes.rank])

    def _check(self) -> float:
        (longest,) = self.processes.largest(self.values[2:].tolist())
        if longest >= MAX_IN_A_ROW:
            raise self._diverged()
        return longest

    def _diverged(self) -> UserError:
        """Make the error, with the iteration and the cases at which it began."""
        own = int(self.values[2].item())
        began = list(self.recent)[-min(own, len(self.recent))] if own else None
        of_ranks = self.processes.gather((own, began))
        found = [(steps, *place) for steps, place in of_ranks if place is not None]
        first = min(iteration for _, iteration, _ in found)
        names = [name for _, iteration, cases in found if iteration == first for name in cases]
        return UserError(
            f"the {self.name} is not finite at iteration {first} (cases {', '.join(names)}), and "
            f"in {max(steps for steps, *_ in found)} steps in a row: the training diverged; lower "
            "--learning_rate, set --max_gradient_norm, or try --precision fp32. latest.pth is from "
            "before"
        )
