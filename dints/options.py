"""The command-line options that the stages share, and the checks that need nothing but the command line.

No heavy import here: ``-h`` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def parser(description: str) -> argparse.ArgumentParser:
    """An empty parser in the house's form; ``description`` is the script's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; adds to each flag its default, unless the help says what no value means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.required:
            return action.help
        return super()._get_help_string(action)


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: an ``int`` or ``float`` from ``low`` (or just above it) to ``high``."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low < value if above else low <= value) or value > high:
            limits = f"above {low}" if above else f"at least {low}"
            upper = "" if high == float("inf") else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}{upper}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


def fold(text: str) -> int | str:
    return text if text == "all" else number(int, 0)(text)


def add_data(arguments: argparse.ArgumentParser) -> None:
    """Where the data is, which of it to use, and what overrides the task's own facts."""
    group = arguments.add_argument_group("data")
    group.add_argument(
        "--root", type=Path, required=True, help="folder of the task, for example data_msd/Task09_Spleen"
    )
    group.add_argument("--json", type=Path, help="description of the dataset in MSD form (default: ROOT/dataset.json)")
    group.add_argument("--json_key", default="training", help="list of labelled cases in that file")
    group.add_argument("--fold", type=fold, default=0, help="fold to validate on, or 'all' to train on every case")
    group.add_argument(
        "--num_folds", type=number(int, 2), default=5, help="folds that the cases are split into, in order"
    )
    add_task(group)


def add_task(group: argparse._ArgumentGroup) -> None:
    """What overrides the task's preprocessing."""
    length = number(float, 0, above=True)
    group.add_argument(
        "--spacing",
        type=length,
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="voxel size in mm to resample to (default: the task's)",
    )
    group.add_argument(
        "--intensity_range",
        type=float,
        nargs=2,
        metavar=("A", "B"),
        help="intensities that become 0 and 1 (default: the task's window; MRI: z-score)",
    )


def add_training(
    arguments: argparse.ArgumentParser,
    *,
    num_epochs: int,
    num_epochs_per_validation: int,
    num_images_per_batch: int,
    learning_rate_milestones: tuple[float, ...],
    overlap_ratio: float,
) -> argparse._ArgumentGroup:
    """The numbers that both stages have, with a stage's own published values as defaults."""
    group = arguments.add_argument_group("training")
    group.add_argument("--num_epochs", type=number(int, 1), default=num_epochs, help="passes over the training cases")
    group.add_argument(
        "--num_epochs_per_validation",
        type=number(int, 1),
        default=num_epochs_per_validation,
        help="epochs from one validation to the next; the last epoch is always validated",
    )
    group.add_argument(
        "--num_images_per_batch", type=number(int, 1), default=num_images_per_batch, help="patches per step and process"
    )
    group.add_argument(
        "--patch_size",
        type=number(int, 1),
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="voxels of a training patch and of the sliding window (default: the task's, mostly 96 96 96)",
    )
    group.add_argument(
        "--learning_rate",
        type=number(float, 0, above=True),
        default=0.025,
        help="of the weights at the start, per process: multiplied by their number",
    )
    group.add_argument(
        "--learning_rate_milestones",
        type=number(float, 0, 1),
        nargs="*",
        default=list(learning_rate_milestones),
        metavar="P",
        help="shares of the training after which the learning rate is halved",
    )
    group.add_argument(
        "--overlap_ratio",
        type=number(float, 0, 0.99),
        default=overlap_ratio,
        help="overlap of neighbouring windows in validation",
    )
    group.add_argument(
        "--num_sw_batch_size", type=number(int, 1), default=6, help="windows per forward pass in validation"
    )
    return group


def add_machine(arguments: argparse.ArgumentParser) -> None:
    """How the work is carried out; results depend on these flags by rounding at most, but for ``--seed``."""
    group = arguments.add_argument_group("machine")
    group.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU where there is one"
    )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 or else fp16 on a GPU; on a CPU the faster of fp32 and bf16, measured",
    )
    group.add_argument(
        "--num_workers",
        type=number(int, 0),
        help="processes that prepare batches, per process (default: free cores, at most 6)",
    )
    group.add_argument(
        "--cache", choices=("ram", "none"), default="ram", help="keep preprocessed cases in memory, or read them anew"
    )
    group.add_argument("--seed", type=number(int, 0), default=0, help="seed of every random draw")
    # What torchrun's predecessor passed to each process; the environment says the same.
    group.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_run(arguments: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where a run writes, and what it does with a run that is already there."""
    group = arguments.add_argument_group("run")
    group.add_argument("--output_root", type=Path, required=True, help="folder for everything that the run writes")
    group.add_argument(
        "--resume",
        choices=("auto", "must", "never"),
        default="auto",
        help="auto: continue the run in OUTPUT_ROOT if there is one; never: start afresh and overwrite it",
    )
    group.add_argument(
        "--save_minutes",
        type=number(float, 0),
        default=10.0,
        help="longest time between two saves of latest.pth, which continues the run; each validation saves it too",
    )
    return group


def complaints(args: argparse.Namespace) -> list[str]:
    """What is wrong with the options of `add_data` and `add_training` taken together."""
    found = []
    if args.fold != "all" and args.fold >= args.num_folds:
        found.append(
            f"--fold {args.fold} must be below --num_folds {args.num_folds}: 0 to {args.num_folds - 1}, or all"
        )
    if args.intensity_range is not None and args.intensity_range[0] >= args.intensity_range[1]:
        found.append("--intensity_range: A must be below B, but they are {:g} and {:g}".format(*args.intensity_range))
    if args.learning_rate_milestones != sorted(args.learning_rate_milestones):
        found.append("--learning_rate_milestones must rise")
    return found
