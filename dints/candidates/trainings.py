"""Short trainings, by which candidates are judged, each in one process, on cases that it does not train on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from dints.candidates.proposals import Candidate
from dints.data.loaders import TrainingLoader
from dints.data.tasks import Task
from dints.errors import UserError
from dints.network.found import FoundNetwork
from dints.running.seeds import seed_everything
from dints.training.checkpoint import Checkpoint, Diverged, configured, find_state, remove_states
from dints.training.steps import averaged, scheduled, weights_step, weights_training
from dints.training.stops import Requests, Stops
from dints.training.validation import Validation

log = logging.getLogger(__name__)

AVERAGE_DECAY = 0.99  # as in the recommended recipe
ONE_IN = 4  # training cases judge, the others train
Item = TypeVar("Item")


@dataclass(frozen=True)
class Result:
    """What came of a training.

    Attributes:
        dice: mean over the classes; 0 where the weights did not stay finite.
        iterations: steps that it had.
        seconds: that it took, its validation included.
    """

    dice: float
    iterations: int
    seconds: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


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
        """Train a candidate for so many iterations, or go on with what ``folder`` has of that; return its result."""
        alone, precision = self.validation.processes, self.validation.precision
        facts = {"name": candidate.name, "iterations": iterations, "channel_mul": candidate.channel_mul}
        configuration = configured(facts, 1, architecture=candidate.architecture.codes())
        found = find_state(folder, configuration)

        seed_everything(self.seed, "initialisation")
        size = self.task.num_channels, self.task.num_classes, candidate.channel_mul
        network = FoundNetwork(candidate.architecture, *size).to(alone.device)
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
        progress = checkpoint.restore(found)
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
            dice = 0.0
        remove_states(folder)
        return Result(dice, progress.iteration, round(progress.seconds, 3))

    def _dice(self, network: FoundNetwork, stops: Stops) -> float:
        mean = self.validation.scores(network, stops.volumes).mean
        if mean is None:
            raise UserError("the training cases that judge candidates have no foreground: give more labelled cases")
        return mean
