"""Short trainings, by which candidates are judged, each in one process, on cases that it does not
train on.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import torch

from dints.data.loaders import TrainingLoader
from dints.data.tasks import Task
from dints.errors import UserError
from dints.evolution.proposals import Candidate
from dints.network.discrete import DiscreteNetwork
from dints.running.checkpoint import Diverged, remove_states
from dints.running.failures import lacks_memory
from dints.running.machine import free_memory
from dints.running.run import Run
from dints.running.seeds import seed_everything
from dints.settings import WeightsSettings
from dints.training.steps import WeightsTrainer
from dints.training.validation import Validation

log = logging.getLogger(__name__)

ONE_IN = 4  # training cases judge, the others train
DIVERGED, MEMORY = "diverged", "memory"  # why a candidate has no Dice
Item = TypeVar("Item")


@dataclass(frozen=True)
class Result:
    """What came of a training.

    Attributes:
        dice: mean over the classes; 0 where it failed.
        iterations: steps that it was to have, which is how its rung is named.
        seconds: that it took, its validation included.
        failure: empty; or `DIVERGED`, where the weights did not stay finite; or `MEMORY`, where
            that did not suffice.
    """

    dice: float
    iterations: int
    seconds: float
    failure: str = ""

    def to_dict(self) -> dict[str, float | str]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], iterations: int) -> Result:
        """Take a result of a training of so many iterations from `to_dict`, as JSON gives it back.

        Raises:
            ValueError: it is none; the message says what is wrong.
        """
        names = [field.name for field in fields(cls)]
        values = {"failure": "", **values}
        if {*values} != {*names}:
            raise ValueError(f"it has {_short([*values])} instead of {', '.join(names)}")
        for name, most in (("dice", 1), ("seconds", sys.float_info.max)):
            number = values[name]
            # of NaN nothing is true
            if type(number) not in (int, float) or not 0 <= number <= most:
                raise ValueError(f"{name} is {_short(number)}")
        if type(values["iterations"]) is not int or values["iterations"] != iterations:
            raise ValueError(
                f"iterations is {_short(values['iterations'])} instead of {iterations}"
            )
        if values["failure"] not in ("", DIVERGED, MEMORY):
            raise ValueError(f"failure is {_short(values['failure'])}")
        return cls(**values)


def _short(value: object) -> str:
    return f"{value!r:.60}"


def divided(cases: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Divide training cases into those that train candidates and those that judge them."""
    if len(cases) < 2:
        raise UserError(
            f"{len(cases)} training case cannot be divided into some that train and some that judge"
        )
    return [case for number, case in enumerate(cases) if number % ONE_IN], list(cases[::ONE_IN])


@dataclass(frozen=True)
class ShortTrainings:
    """Trains candidates, one after another: SGD, its learning rate falling to 0, and an average of
    the weights.

    All see the same patches and start from the same random numbers.

    Attributes:
        task: of the cases.
        loader: of the cases that train; it and what scores are of this process alone.
        validation: on those that judge.
        settings: of the weights' training.
        input_shape: (batch, channels, *patch_size) of a step.
        run: of this process alone, whose machine and stops every training has.
    """

    task: Task
    loader: TrainingLoader
    validation: Validation
    settings: WeightsSettings
    input_shape: tuple[int, ...]
    run: Run

    def __call__(self, candidate: Candidate, iterations: int, folder: Path) -> Result:
        """Train a candidate for so many iterations, or resume what ``folder`` has of that; return
        its result.

        Where memory does not suffice, it is resumed once from the last save, and computes
        activations twice.
        """
        start = time.monotonic()
        with _cudnn_chooses_at_once():
            for is_last in (False, True):
                try:
                    return self._result(
                        candidate, iterations, folder, checkpoint_activations=is_last
                    )
                except (MemoryError, RuntimeError) as error:
                    if not lacks_memory(error):
                        raise
                    why = str(error).split("\n")[0] or type(error).__name__
                    then = (
                        "counts as Dice 0"
                        if is_last
                        else ("is trained once more, with --checkpoint_activations")
                    )
                    log.warning("%s lacks memory (%s): it %s", candidate.name, why, then)
                free_memory()  # here, where the error and the frames that it holds are gone
        remove_states(folder)
        return Result(0.0, iterations, round(time.monotonic() - start, 3), MEMORY)

    def _result(
        self, candidate: Candidate, iterations: int, folder: Path, checkpoint_activations: bool
    ) -> Result:
        run = self.run.within(folder)
        facts = {
            "name": candidate.name,
            "iterations": iterations,
            "channel_mul": candidate.channel_mul,
        }
        run.begin({**facts, "architecture": candidate.architecture.codes()})
        seed_everything(run.seed, "initialisation")
        size = self.task.num_channels, self.task.num_classes, candidate.channel_mul
        network = DiscreteNetwork(candidate.architecture, *size).to(run.device)
        network.checkpoint_activations = checkpoint_activations
        weights = WeightsTrainer(
            network, network.parameters(), self.settings, run, self.input_shape
        )
        failure = ""
        try:
            run.restore(network=network, **weights.parts)
            for _ in run.epochs(math.ceil(iterations / len(self.loader))):
                for batch in run.steps(self.loader, until=iterations):
                    weights.schedule(run.progress.iteration / iterations)
                    weights.step(batch)
            dice = self._dice(weights.averaged, run)
        except Diverged:
            log.warning("%s diverged", candidate.name)
            dice, failure = 0.0, DIVERGED
        remove_states(folder)
        return Result(dice, iterations, round(run.progress.seconds, 3), failure)

    def _dice(self, network: DiscreteNetwork, run: Run) -> float:
        mean = replace(self.validation, run=run)(network).mean
        if mean is None:
            raise UserError(
                "the training cases that judge candidates have no foreground: give "
                "more labelled cases"
            )
        return mean


@contextmanager
def _cudnn_chooses_at_once() -> Iterator[None]:
    """Keep cuDNN from timing its algorithms for each new shape: short trainings, each of new
    shapes, lose by that.
    """
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
