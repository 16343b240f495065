"""Short trainings, by which candidates are judged, each in one process, on cases that it does not train on."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch

from dints.candidates.proposals import Candidate
from dints.data.loaders import TrainingLoader
from dints.data.tasks import Task
from dints.errors import UserError
from dints.network.found import FoundNetwork
from dints.running.failures import lacks_memory
from dints.running.machine import free_memory
from dints.running.seeds import seed_everything
from dints.training.checkpoint import Checkpoint, Diverged, configured, find_state, remove_states
from dints.training.steps import averaged, scheduled, weights_step, weights_training
from dints.training.stops import Requests, Stops
from dints.training.validation import Validation

log = logging.getLogger(__name__)

AVERAGE_DECAY = 0.99  # as in the recommended recipe
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
        failure: empty; or `DIVERGED`, where the weights did not stay finite; or `MEMORY`, where that did not suffice.
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
            if type(number) not in (int, float) or not 0 <= number <= most:  # of NaN nothing is true
                raise ValueError(f"{name} is {_short(number)}")
        if type(values["iterations"]) is not int or values["iterations"] != iterations:
            raise ValueError(f"iterations is {_short(values['iterations'])} instead of {iterations}")
        if values["failure"] not in ("", DIVERGED, MEMORY):
            raise ValueError(f"failure is {_short(values['failure'])}")
        return cls(**values)


def _short(value: object) -> str:
    return f"{value!r:.60}"


def divided(cases: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Divide training cases into those that train candidates and those that judge them."""
    if len(cases) < 2:
        raise UserError(f"{len(cases)} training case cannot be divided into some that train and some that judge")
    return [case for number, case in enumerate(cases) if number % ONE_IN], list(cases[::ONE_IN])


@dataclass(frozen=True)
class ShortTrainings:
    """Trains candidates, one after another: SGD, its learning rate falling to 0, and an average of the weights.

    All see the same patches and start from the same random numbers.

    Attributes:
        loader: of the cases that train; it and what scores are of this process alone.
        validation: on those that judge.
        requests: to stop; a training that stops is saved.
        save_minutes: longest time between two saves.
    """

    task: Task
    loader: TrainingLoader
    validation: Validation
    requests: Requests
    learning_rate: float
    seed: int
    save_minutes: float

    def __call__(self, candidate: Candidate, iterations: int, folder: Path) -> Result:
        """Train a candidate for so many iterations, or go on with what ``folder`` has of that; return its result.

        Where memory does not suffice, it goes on once more from the last save, and computes activations twice.
        """
        start = time.monotonic()
        with _cudnn_chooses_at_once():
            for is_last in (False, True):
                try:
                    return self._result(candidate, iterations, folder, checkpoint_activations=is_last)
                except (MemoryError, RuntimeError) as error:
                    if not lacks_memory(error):
                        raise
                    why = str(error).split("\n")[0] or type(error).__name__
                    then = "counts as Dice 0" if is_last else "is trained once more, with --checkpoint_activations"
                    log.warning("%s lacks memory (%s): it %s", candidate.name, why, then)
                free_memory()  # here, where the error and the frames that it holds are gone
        remove_states(folder)
        return Result(0.0, iterations, round(time.monotonic() - start, 3), MEMORY)

    def _result(self, candidate: Candidate, iterations: int, folder: Path, checkpoint_activations: bool) -> Result:
        alone, precision = self.validation.processes, self.validation.precision
        facts = {"name": candidate.name, "iterations": iterations, "channel_mul": candidate.channel_mul}
        configuration = configured(facts, 1, architecture=candidate.architecture.codes())
        found = find_state(folder, configuration)

        seed_everything(self.seed, "initialisation")
        size = self.task.num_channels, self.task.num_classes, candidate.channel_mul
        network = FoundNetwork(candidate.architecture, *size).to(alone.device)
        network.checkpoint_activations = checkpoint_activations
        weights = weights_training(
            network,
            network.parameters(),
            precision,
            alone,
            learning_rate=self.learning_rate,
            average=averaged(network, AVERAGE_DECAY),
        )
        checkpoint = Checkpoint(folder, configuration, {"network": network, **weights.parts}, precision, alone)
        stops = Stops(checkpoint, alone, self.requests, self.save_minutes)
        progress, failure = checkpoint.restore(found), ""
        try:
            while progress.iteration < iterations:
                seed_everything(self.seed, progress.epoch, 0)
                batches = self.loader.epoch(progress.epoch, progress.step)
                for batch in stops.steps(islice(batches, iterations - progress.iteration)):
                    done = progress.iteration / iterations
                    weights.set_learning_rate(scheduled("polynomial", self.learning_rate, done, ()))
                    weights_step(weights, batch)
                    progress.step_done()
                progress.epoch_done()
            dice = self._dice(weights.average.module, stops)
        except Diverged:
            log.warning("%s diverged", candidate.name)
            dice, failure = 0.0, DIVERGED
        remove_states(folder)
        return Result(dice, iterations, round(progress.seconds, 3), failure)

    def _dice(self, network: FoundNetwork, stops: Stops) -> float:
        mean = self.validation.scores(network, stops.volumes).mean
        if mean is None:
            raise UserError("the training cases that judge candidates have no foreground: give more labelled cases")
        return mean


@contextmanager
def _cudnn_chooses_at_once() -> Iterator[None]:
    """Keep cuDNN from timing its algorithms for each new shape: short trainings, each of new shapes, lose by that."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
