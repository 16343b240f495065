"""Train every fold, segment the cases that it did not train on, and score all: train_dints.sh with
FOLD=each.

    FOLD=each NUM_FOLDS=5 bash train_dints.sh --num_epochs 400
    FOLD=each sbatch --array=0-4 launch/dints.sbatch train_dints.sh --num_epochs 400
    FOLD=each ARCH_CKPT='runs/search_fold{fold}/search_code_winner.pth' bash train_dints.sh

Fold k is trained into OUTPUT_ROOT/fold_k, its validation cases are segmented into
OUTPUT_ROOT/out_of_fold/fold_k, and fold_k/done.json notes the request, so that the same command
skips it. When all folds are done, dints.evaluation.cross_validation chooses the post-processing and
makes the table. What is unfinished is continued by train_dints.py and infer_dints.py themselves.

An array task does its own fold. It writes its note, and looks for those of the others, under a
lock: so exactly one task, the last, finds all of them, and makes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # -P leaves it out
from dints import files, system
from dints.data.formats import list_cases
from dints.data.listing import check_names, split_fold
from dints.errors import UserError, exit_on_user_error

CHECKOUT = Path(__file__).resolve().parents[1]
# Options that the environment sets, or that have no place here; and the remedy.
REFUSED = {
    "--root": "set DATA_ROOT",
    "--output_root": "set OUTPUT_ROOT",
    "--arch_ckpt": "set ARCH_CKPT",
    "--num_folds": "set NUM_FOLDS",
    "--fold": "leave it out",
    "--check": "set FOLD=0, which checks all cases",
    "--resume": "leave it out, and set another OUTPUT_ROOT to start afresh",
}
# Options of a training, with their number of values, that segmenting and scoring its cases have
# too.
OF_SCORES = {"--json": 1, "--json_key": 1, "--trust_shapes": 0}
OF_MASKS = {"--replace_nonfinite": 1, "--num_sw_batch_size": 1, "--device": 1, "--precision": 1}
OF_MASKS |= {"--timeout_minutes": 1, **OF_SCORES}
LAUNCH = f'set -euo pipefail; source "{CHECKOUT}/launch/launch.sh"; launch infer_dints.py "$@"'
PORT, NEXT_PORT = 29500, 500
SIGNALS = system.signals("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True)
class Folds:
    """The request.

    Attributes:
        arguments: of train_dints.py, beside those that the environment gives.
        arch_ckpt: the architecture's file; {fold} in it stands for a fold's number, so that each
            has its own.
        own: the folds that are this process's.
    """

    arguments: list[str]
    data_root: Path
    arch_ckpt: Path
    output_root: Path
    num_folds: int
    own: Sequence[int]

    def architecture(self, fold: int) -> Path:
        return Path(str(self.arch_ckpt).replace("{fold}", str(fold)))

    def model(self, fold: int) -> Path:
        return self.output_root / f"fold_{fold}" / "best_metric_model.pth"

    def masks(self, fold: int) -> Path:
        return self.output_root / "out_of_fold" / f"fold_{fold}"

    def note(self, fold: int) -> Path:
        return self.output_root / f"fold_{fold}" / "done.json"

    def given(self, flags: Mapping[str, int]) -> dict[str, str | bool]:
        """Return those of the arguments whose flags are named, with their values; True for one
        without.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for flag, count in flags.items():
            parser.add_argument(flag, dest=flag, **({} if count else {"action": "store_true"}))
        values = vars(parser.parse_known_args(self.arguments)[0])
        return {flag: value for flag, value in values.items() if value}

    def words(self, flags: Mapping[str, int]) -> list[str]:
        """Return them as they stand on a command line."""
        return [word for pair in self.given(flags).items() for word in pair if word is not True]

    def check(self) -> None:
        """Refuse, before any training, folds without an architecture, and cases that cannot be
        split or scored.
        """
        missing = {
            str(path): None for path in map(self.architecture, self.own) if not path.is_file()
        }
        if missing:
            raise UserError(
                f"ARCH_CKPT={self.arch_ckpt}, but there is no {', no '.join(missing)}: run "
                "search_dints.sh for it, or set ARCH_CKPT to an architecture file"
            )
        given = self.given(OF_SCORES)
        key = given.get("--json_key", "training")
        listed = list_cases(self.data_root, given.get("--json"), key)
        check_names(listed)
        split_fold(listed, self.num_folds, 0)

    def request(self, fold: int) -> str:
        """Return the request for one fold, with the content of files in place of their names."""
        description = self.given(OF_SCORES).get("--json", self.data_root / "dataset.json")
        contents = [files.digest(path) for path in (description, self.architecture(fold))]
        return json.dumps([self.arguments, self.num_folds, *contents])

    def is_done(self, fold: int) -> bool:
        """Tell whether a fold was trained for the same request, and its cases segmented."""
        made = (
            self.architecture(fold),
            self.model(fold),
            self.masks(fold) / "run.json",
            self.note(fold),
        )
        return all(path.is_file() for path in made) and self.note(fold).read_text() == self.request(
            fold
        )


def run(command: Sequence[object], **environment: object) -> None:
    """Run a command to its end, and forward signals to it; where it fails or was stopped, exit with
    its code.

    It has a session of its own, so that a terminal's Ctrl-C reaches it once.
    """
    started, stopped = [], []

    def forward(number: int, _frame: object) -> None:
        stopped.append(number)
        for process in started:
            process.send_signal(number)

    # as nohup's SIGHUP
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heeded}
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    process = subprocess.Popen(list(map(str, command)), env=variables, start_new_session=True)  # noqa: S603
    started.append(process)
    if stopped:  # while it was started
        process.send_signal(stopped[0])
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code or stopped:
        sys.exit(code if code > 0 else 128 + (-code or stopped[0]))


def train(folds: Folds, fold: int) -> None:
    """Train a fold and segment its validation cases, on all devices of all nodes."""
    say(f"fold {fold} of {folds.num_folds}: training")
    own = {
        "FOLD": fold,
        "OUTPUT_ROOT": folds.model(fold).parent,
        "ARCH_CKPT": folds.architecture(fold),
    }
    run(["bash", CHECKOUT / "train_dints.sh", *folds.arguments], **own)
    say(f"fold {fold} of {folds.num_folds}: its validation cases")
    flags = [
        "--checkpoint",
        folds.model(fold),
        "--root",
        folds.data_root,
        "--output_root",
        folds.masks(fold),
    ]
    # Another port, since node 0 may still be at the one of the training.
    port = int(os.environ.get("MASTER_PORT", PORT)) + NEXT_PORT
    run(["bash", "-c", LAUNCH, "launch", *flags, *folds.words(OF_MASKS)], MASTER_PORT=port)


def make_table(folds: Folds) -> None:
    """Score all cases out of fold, and choose the post-processing."""
    say("all folds: scores out of fold, and post-processing")
    flags = [
        "--root",
        folds.data_root,
        "--num_folds",
        folds.num_folds,
        "--output_root",
        folds.output_root,
    ]
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [
        sys.executable,
        "-m",
        "dints.evaluation.cross_validation",
        *flags,
        *folds.words(OF_SCORES),
    ]
    run(command, PYTHONPATH=os.pathsep.join(paths))


def say(what: str) -> None:
    print(f"\n== {what}", flush=True)


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Folds:
    """Read the request from the arguments, and the variables that train_dints.sh sets or passes on.

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
            raise UserError(
                f"the array has a task {task}, and NUM_FOLDS={text}: give sbatch "
                f"--array=0-{own[-1]}"
            )
        own = [int(task)]
    paths = {
        name: Path(environment[name.upper()]) for name in ("data_root", "arch_ckpt", "output_root")
    }
    return Folds(list(arguments), **paths, num_folds=int(text), own=own)


def main(folds: Folds) -> None:
    folds.check()
    for fold in folds.own:
        if folds.is_done(fold):
            say(f"fold {fold} of {folds.num_folds}: done before")
        else:
            train(folds, fold)
        if int(os.environ.get("NODE_RANK", 0)) > 0:  # node 0 notes it
            continue
        with files.locked(folds.output_root / ".lock"):
            files.write_atomically(folds.note(fold), folds.request(fold))
            missing = [other for other in range(folds.num_folds) if not folds.is_done(other)]
            if fold == folds.own[-1] and not missing:
                make_table(folds)
            elif fold == folds.own[-1]:
                say(
                    f"not done yet: folds {', '.join(map(str, missing))}; the last one makes the "
                    "table"
                )


if __name__ == "__main__":
    exit_on_user_error(lambda: main(parse(sys.argv[1:], os.environ)))
