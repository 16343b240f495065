"""Successive halving: many candidates are trained for a short time, the best of them for longer,
until one is left.

Karnin et al., Almost Optimal Exploration in Multi-Armed Bandits, ICML 2013; Jamieson and Talwalkar,
Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS 2016. Each training
starts afresh and has a schedule of its own length, for that tells more than a stage of a longer
one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dints import files
from dints.errors import Stopped, UserError
from dints.evolution.proposals import Candidate
from dints.evolution.trainings import Result
from dints.running.checkpoint import compare
from dints.running.processes import Processes
from dints.running.stop_signal import StopSignal
from dints.running.tables import CANDIDATES, write_rows

log = logging.getLogger(__name__)

FEWER = ((1, 4), (4, 2), (8, 1))  # of each rung: by which candidates and iterations are divided
SECONDS_BETWEEN_LOOKS = 0.5  # at what other ranks have done
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Rung:
    """How many candidates are trained for how many iterations."""

    count: int
    iterations: int


def rungs(count: int, iterations: int) -> list[Rung]:
    """Return the rungs for so many candidates, the last ones of which are trained for
    ``iterations``.

    A quarter of them reaches the second rung, an eighth the third; none decides between one and
    itself.
    """
    steps = [Rung(-(-count // fewer), max(1, iterations // shorter)) for fewer, shorter in FEWER]
    return [rung for rung in steps if rung.count > 1]


def best(
    candidates: Sequence[Candidate], results: Mapping[str, Result], count: int
) -> list[Candidate]:
    """Return the ``count`` candidates of the highest Dice, best first; of equal ones the first.

    Raises:
        UserError: all of them failed.
    """
    failures = {results[candidate.name].failure for candidate in candidates}
    if all(failures):
        raise UserError(
            f"none of {len(candidates)} candidates could be trained (candidates.csv: "
            f"{', '.join(sorted(failures))}): give a smaller --memory_mib or --num_sw_batch_size "
            "against a lack of memory, a smaller --learning_rate against weights that diverge, and "
            "another --output_root"
        )
    return _ranked(candidates, results)[:count]


def _ranked(candidates: Sequence[Candidate], results: Mapping[str, Result]) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: -results[candidate.name].dice)


def open_folder(
    folder: Path, configuration: dict, machine: Mapping[str, str | int], resume: str
) -> dict | None:
    """Find a competition of the same settings, or make the candidates' folder for a new one.

    Args:
        machine: values that depend on it, as new trainings have them.
        resume: ``must``: there must be one.

    Returns:
        The values of ``machine`` that its trainings have; None for a new one.

    Raises:
        UserError: its trainings had other settings; each that differs is named.
    """
    settings = folder / SETTINGS
    if not settings.exists():
        if resume == "must":
            raise UserError(f"--resume must, but there is no {settings}")
        files.write_atomically(
            settings, json.dumps({"configuration": configuration, **machine}, indent=2)
        )
        return None
    stored = _read(settings)
    known = {name: stored.get(name) for name in machine}
    kinds = [type(known[name]) is type(value) for name, value in machine.items()]
    if not isinstance(stored.get("configuration"), dict) or not all(kinds):
        raise _damaged(
            settings, f"it has no configuration, or of {', '.join(machine)} one that is none"
        )
    compare(settings, stored["configuration"], json.loads(json.dumps(configuration)))
    return known


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__} instead of names with values")
    return content


def _damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path} is damaged ({why}): remove it, and its training is done again")


def _network(candidate: Candidate) -> list:
    """Return what is equal for equal architectures of equal width, as JSON gives it back."""
    return json.loads(json.dumps([candidate.architecture.codes(), candidate.channel_mul]))


@dataclass(frozen=True)
class Ledger:
    """Has candidates trained by all ranks, and keeps every result in a file: what is done is never
    done again.

    A rank takes the next candidate when it has done with one. Which rank trains it makes no
    difference to its result.

    Attributes:
        folder: of the run.
        train: trains a candidate for so many iterations in a folder of its own.
        rows: of the table ``candidates.csv``, a line a training.
    """

    folder: Path
    processes: Processes
    stop_signal: StopSignal
    train: Callable[[Candidate, int, Path], Result]
    rows: list[dict] = field(default_factory=list)

    def results(self, candidates: Sequence[Candidate], iterations: int) -> dict[str, Result]:
        """Return each one's result by name, the same on every rank; every rank must call it.

        Raises:
            UserError: a result that is there is damaged, or of another architecture than its name
                now stands for.
        """
        known = self._done(candidates, iterations)
        known = {
            name: values
            for of_rank in self.processes.gather(known)
            for name, values in of_rank.items()
        }
        waiting = [candidate for candidate in candidates if candidate.name not in known]
        keys = {candidate.name: f"{iterations}/{candidate.name}" for candidate in waiting}
        for number in self._turns(f"{iterations}/{len(self.rows)}", len(waiting)):
            candidate = waiting[number]
            path = self._path(candidate, iterations)
            path.parent.mkdir(parents=True, exist_ok=True)
            result = self.train(candidate, iterations, path.parent)
            log.info(
                "candidate %d of %d at %d iterations: %s has Dice %.4f after %.0f s",
                *(
                    number + 1,
                    len(waiting),
                    iterations,
                    candidate.name,
                    result.dice,
                    result.seconds,
                ),
            )
            files.write_atomically(
                path, json.dumps({**result.to_dict(), "network": _network(candidate)})
            )
            self.processes.board.set(keys[candidate.name], json.dumps(result.to_dict()))
        self._wait_for(list(keys.values()))
        known |= {name: json.loads(self.processes.board.get(key)) for name, key in keys.items()}
        # the board goes with the process that holds it: let all have read it
        self.processes.gather(None)
        results = {candidate.name: Result(**known[candidate.name]) for candidate in candidates}
        self._write(candidates, results)
        return results

    def _path(self, candidate: Candidate, iterations: int) -> Path:
        return self.folder / "candidates" / candidate.name / f"{iterations}.json"

    def _done(self, candidates: Sequence[Candidate], iterations: int) -> dict[str, dict]:
        """Return the values of the results that this rank finds, by name."""
        done = {}
        for candidate in candidates:
            path = self._path(candidate, iterations)
            if not path.exists():
                continue
            values = _read(path)
            network = values.pop("network", None)
            try:
                done[candidate.name] = Result.from_dict(values, iterations).to_dict()
            except (ValueError, RecursionError) as error:
                raise _damaged(path, error) from error
            if not isinstance(network, list):
                raise _damaged(path, "it has no network")
            if network != _network(candidate):
                raise UserError(
                    f"{path} is of another architecture than {candidate.name} is in this version "
                    "of the scripts: use the version that wrote it, or start afresh with --resume "
                    "never"
                )
        return done

    def _turns(self, what: str, count: int) -> Iterator[int]:
        """Yield numbers below ``count`` that no other rank gets, until all are given."""
        while (number := self.processes.board.add(f"{what}/taken", 1) - 1) < count:
            self._stop_if_asked("before another candidate")
            yield number

    def _wait_for(self, keys: Sequence[str]) -> None:
        """Wait until all ranks' results are there; no collective, for trainings may take longer
        than its timeout.
        """
        while not self.processes.board.check(list(keys)):
            self._stop_if_asked("after its last candidate")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _stop_if_asked(self, when: str) -> None:
        if self.stop_signal.received is not None:
            raise Stopped(self.stop_signal.received, f"{when}, with its results in {self.folder}")

    def _write(self, candidates: Sequence[Candidate], results: Mapping[str, Result]) -> None:
        """Add these trainings to the table, best first."""
        for candidate in _ranked(candidates, results):
            result = results[candidate.name]
            self.rows.append(
                {
                    "candidate": candidate.name,
                    "kind": candidate.kind,
                    "parent": candidate.parent or "",
                    "channel_mul": candidate.channel_mul,
                    "blocks": candidate.architecture.num_blocks,
                    "paths": int(candidate.architecture.arch_code_a.sum()),
                    **result.to_dict(),
                }
            )
        if self.processes.is_main:
            write_rows(self.folder / CANDIDATES, self.rows)
