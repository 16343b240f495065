"""Train every fold, segment the cases that it did not train on, and score all of them: train_dints.sh with FOLD=each.

    FOLD=each NUM_FOLDS=5 bash train_dints.sh --num_epochs 400
    FOLD=each sbatch --array=0-4 launch/dints.sbatch train_dints.sh --num_epochs 400
    FOLD=each ARCH_CKPT='runs/search_fold{fold}/search_code_winner.pth' bash train_dints.sh

Fold k is trained into OUTPUT_ROOT/fold_k, and its validation cases are segmented into OUTPUT_ROOT/out_of_fold/fold_k;
fold_k/done.json then notes what was asked for, so that the same command passes over it. When all folds are done,
dints.evaluation.cross_validation chooses the post-processing and makes the table. What is left unfinished is continued,
or done again, by train_dints.py and infer_dints.py themselves.

An array task does its own fold. It notes that, and looks whether all folds are noted, while it holds a lock: so exactly
one task, whichever is last, finds all of them, and makes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # -P leaves it out
from dints import files, system
from dints.data.formats import list_cases
from dints.data.listing import check_names, split_fold
from dints.errors import UserError, exit_on_user_error

HERE = Path(__file__).resolve().parent
# What a training is given by the environment, or cannot have here; and the remedy.
REFUSED = {
    "--root": "set DATA_ROOT",
    "--output_root": "set OUTPUT_ROOT",
    "--arch_ckpt": "set ARCH_CKPT",
    "--num_folds": "set NUM_FOLDS",
    "--fold": "leave it out",
    "--check": "set FOLD=0, which checks all cases",
    "--resume": "leave it out, and set another OUTPUT_ROOT to start afresh",
}
# Options of a training, with their number of values, that are also those of segmenting its cases, and of scoring them.
OF_SCORES = {"--json": 1, "--json_key": 1, "--trust_shapes": 0}
OF_MASKS = {"--replace_nonfinite": 1, "--num_sw_batch_size": 1, "--device": 1, "--precision": 1}
OF_MASKS |= {"--timeout_minutes": 1, **OF_SCORES}
LAUNCH = 'set -euo pipefail; source "$1"; shift; launch "$@"'
PORT, NEXT_PORT = 29500, 500


class Child:
    """Runs one command after another, and passes on to it the signals that this process gets.

    A command has a session of its own, so that a terminal's Ctrl-C reaches it once.
    """

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.is_starting, self.stopped = False, 0  # the first signal
        for number in system.signals("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _frame: object) -> None:
        self.stopped = self.stopped or number
        if self.process is not None:
            self.process.send_signal(number)
        elif not self.is_starting:
            sys.exit(128 + number)

    def run(self, command: Sequence[object], **environment: object) -> None:
        """Run it to its end; one that fails or is stopped ends this process with its exit code."""
        variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        self.is_starting = True
        process = subprocess.Popen(list(map(str, command)), env=variables, start_new_session=True)  # noqa: S603
        self.process, self.is_starting = process, False
        if self.stopped:  # while it was started
            process.send_signal(self.stopped)
        code = process.wait()
        self.process = None
        if code or self.stopped:
            sys.exit(code if code > 0 else 128 + (-code or self.stopped))


@dataclass(frozen=True)
class Folds:
    """What is to be done.

    Attributes:
        arguments: of train_dints.py, beside those that the environment gives.
        arch_ckpt: the architecture's file; {fold} in it stands for a fold's number, so that each has its own.
        own: the folds that are this process's.
        node_rank: of this node, of those that train a fold together.
    """

    arguments: list[str]
    data_root: Path
    arch_ckpt: Path
    output_root: Path
    num_folds: int
    own: Sequence[int]
    node_rank: int
    master_port: int

    def folder(self, fold: int) -> Path:
        return self.output_root / f"fold_{fold}"

    def architecture(self, fold: int) -> Path:
        return Path(str(self.arch_ckpt).replace("{fold}", str(fold)))

    def masks(self, fold: int) -> Path:
        return self.output_root / "out_of_fold" / f"fold_{fold}"

    def given(self, flags: Mapping[str, int]) -> dict[str, str | bool]:
        """Return those of the arguments whose flags are named, with their values; True for one that has none."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for flag, count in flags.items():
            parser.add_argument(flag, **({"dest": flag} if count else {"dest": flag, "action": "store_true"}))
        found = vars(parser.parse_known_args(self.arguments)[0])
        return {flag: value for flag, value in found.items() if value}

    def words(self, flags: Mapping[str, int]) -> list[str]:
        """Return them as they stand on a command line."""
        return [word for flag, value in self.given(flags).items() for word in (flag, value) if word is not True]

    def cases(self) -> list[str]:
        """List the names of the dataset's cases.

        Raises:
            UserError: it is malformed, has two cases of one name, or fewer cases than folds.
        """
        given = self.given(OF_SCORES)
        listed = list_cases(self.data_root, given.get("--json"), given.get("--json_key", "training"))
        check_names(listed)
        split_fold(listed, self.num_folds, 0)
        return [case.name for case in listed]

    @cached_property
    def request(self) -> dict:
        """What is asked for of every fold, as plain values; files by their content."""
        description = files.digest(self.given(OF_SCORES).get("--json", self.data_root / "dataset.json"))
        facts = {"arguments": self.arguments, "num_folds": self.num_folds, "description": description}
        return {**facts, "cases": self.cases()}

    def request_of(self, fold: int) -> dict:
        """What is asked for of one fold."""
        return {**self.request, "architecture": files.digest(self.architecture(fold))}

    def check_architectures(self) -> None:
        """Raise `UserError` where folds of this process have no architecture, before any is trained."""
        missing = list(dict.fromkeys(str(path) for path in map(self.architecture, self.own) if not path.is_file()))
        if missing:
            raise UserError(
                f"ARCH_CKPT={self.arch_ckpt}, but there is no {', no '.join(missing)}: run search_dints.sh for it, or "
                "set ARCH_CKPT to an architecture file"
            )

    def is_done(self, fold: int) -> bool:
        """Tell whether a fold was trained as is asked for now, and its cases segmented."""
        if not self.architecture(fold).is_file():  # of another array task, whose search may not be done
            return False
        made = (self.folder(fold) / "best_metric_model.pth", self.masks(fold) / "run.json")
        return self.request_of(fold) == self._noted(fold) and all(path.is_file() for path in made)

    def _noted(self, fold: int) -> object:
        with suppress(OSError, ValueError):  # none: train_dints.py and infer_dints.py will see what is there
            return json.loads((self.folder(fold) / "done.json").read_text(encoding="utf-8"))
        return None

    def train(self, fold: int, child: Child) -> None:
        """Train a fold and segment its validation cases, on all devices of all nodes."""
        model = self.folder(fold) / "best_metric_model.pth"
        tell(f"fold {fold} of {self.num_folds}: training")
        own = {"FOLD": fold, "OUTPUT_ROOT": self.folder(fold), "ARCH_CKPT": self.architecture(fold)}
        child.run(["bash", HERE.parent / "train_dints.sh", *self.arguments], **own)
        tell(f"fold {fold} of {self.num_folds}: its validation cases")
        flags = ["--checkpoint", model, "--root", self.data_root, "--output_root", self.masks(fold)]
        command = ["bash", "-c", LAUNCH, "launch", HERE / "launch.sh", "infer_dints.py", *flags, *self.words(OF_MASKS)]
        # Another port, since node 0 may still be at the one of the training.
        child.run(command, MASTER_PORT=self.master_port + NEXT_PORT)

    def note_done(self, fold: int) -> None:
        files.write_atomically(self.folder(fold) / "done.json", json.dumps(self.request_of(fold), indent=2) + "\n")

    def make_table(self, child: Child) -> None:
        """Score all cases out of fold, and choose the post-processing."""
        tell("all folds: scores out of fold, and post-processing")
        module = [sys.executable, "-m", "dints.evaluation.cross_validation"]
        flags = ["--root", self.data_root, "--num_folds", self.num_folds, "--output_root", self.output_root]
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        child.run([*module, *flags, *self.words(OF_SCORES)], PYTHONPATH=os.pathsep.join(paths))


def tell(what: str) -> None:
    print(f"\n== {what}", flush=True)


def folds_of(arguments: Sequence[str], environment: Mapping[str, str]) -> Folds:
    """Read what is to be done from the variables that train_dints.sh sets or passes on.

    Raises:
        UserError: an argument that cannot be given here, or folds that there are not.
    """
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag in REFUSED:
            raise UserError(f"{flag} cannot be given with FOLD=each: {REFUSED[flag]}")
    text = environment.get("NUM_FOLDS", "5")
    if not text.isdecimal() or int(text) < 2:
        raise UserError(f"NUM_FOLDS is {text!r}: give a number of folds, 2 or more")
    own, task = range(int(text)), environment.get("SLURM_ARRAY_TASK_ID")
    if task is not None:
        if int(task) not in own:
            raise UserError(f"the array has a task {task}, and NUM_FOLDS={text}: give sbatch --array=0-{own[-1]}")
        own = [int(task)]
    paths = {name: Path(environment[name.upper()]) for name in ("data_root", "arch_ckpt", "output_root")}
    numbers = {"node_rank": int(environment.get("NODE_RANK", 0))}
    numbers["master_port"] = int(environment.get("MASTER_PORT", PORT))
    return Folds(list(arguments), **paths, num_folds=int(text), own=own, **numbers)


def main(folds: Folds, child: Child) -> None:
    folds.check_architectures()
    for fold in folds.own:
        if folds.is_done(fold):
            tell(f"fold {fold} of {folds.num_folds}: done before")
        else:
            folds.train(fold, child)
        if folds.node_rank > 0:  # node 0 notes it
            continue
        with files.locked(folds.output_root / ".lock"):
            folds.note_done(fold)
            missing = [other for other in range(folds.num_folds) if not folds.is_done(other)]
            if fold == folds.own[-1] and not missing:
                folds.make_table(child)
            elif fold == folds.own[-1]:
                tell(f"not done yet: folds {', '.join(map(str, missing))}; the last one makes the table")


if __name__ == "__main__":
    exit_on_user_error(lambda: main(folds_of(sys.argv[1:], os.environ), Child()))
