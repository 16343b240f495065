"""The command-line options that the stages share, and the checks that need nothing but the command line.

No heavy import here: ``-h`` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dints import launcher
from dints.data.leniency import Leniency
from dints.errors import tell
from dints.recipes import RECIPES

# What other programs call an option; a suggestion goes by similar letters otherwise.
OTHER_NAMES = {
    "batch_size": ("num_images_per_batch", "num_sw_batch_size"),
    "lr": ("learning_rate",),
    "model": ("checkpoint",),
    "gpu": ("device",),
}


def parser(description: str) -> Parser:
    """Make an empty parser in the house's form; ``description`` is the script's docstring."""
    return Parser(description=description, formatter_class=_HelpFormatter)


class Parser(argparse.ArgumentParser):
    """Parses a script's command line; what is wrong with it is one line on stderr, and exit code 2."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)
        self.register("type", Path, path)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e3 too, which argparse takes for an option

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        words = sys.argv[1:] if args is None else list(args)
        self._check_names(words)
        namespace, extra = self.parse_known_args(words, namespace)
        if extra:
            self.error(f"{shlex.join(extra)} belongs to no option: name it, and quote values that have spaces")
        return namespace

    def error(self, message: str, closing: str = " (-h lists all options)") -> NoReturn:
        if launcher.rank() == 0:  # all processes have the same command line
            tell(f"error: {message}{closing}")
        self.exit(2)

    def _check_names(self, words: Sequence[str]) -> None:
        """Refuse options that there are none of; argparse would first complain about the required one misspelt."""
        known = {name for action in self._actions for name in action.option_strings}
        given = [word.partition("=")[0] for word in words if re.match("--?[A-Za-z]", word)]
        unknown = dict.fromkeys(name for name in given if name not in known and " " not in name)
        if unknown and {"-h", "--help"}.isdisjoint(given):
            alike = {name: self._alike(name) for name in unknown}
            remarks = [f"{name}: did you mean {other}?" if other else f"{name}:" for name, other in alike.items()]
            self.error(f"unknown option {' '.join(remarks)} -h lists all", closing="")

    def _alike(self, name: str) -> str | None:
        """Return the option that is probably meant."""
        listed = [action for action in self._actions if action.help != argparse.SUPPRESS]
        shown = {option.lstrip("-"): option for action in listed for option in action.option_strings}
        name = name.lstrip("-")
        by_letters = difflib.get_close_matches(name, shown, 1) + [other for other in shown if other.startswith(name)]
        found = [other for other in (*OTHER_NAMES.get(name, ()), *by_letters) if other in shown]
        return shown[found[0]] if found else None


def path(text: str) -> Path:
    """Return a path, ``~`` expanded also where a shell leaves it (``--root=~/data``)."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path: is a variable in the command not set?")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: there is no such user") from error


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; adds to each flag its default, unless the help says what no value means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.required:
            return action.help
        return super()._get_help_string(action)


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Callable[[str], float]:
    """Make an argparse type: an ``int`` or ``float`` from ``low`` (or just above it) to ``high``."""

    def parse(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is no finite number")
        if not (low < value if above else low <= value) or value > high:
            limits = f"above {low}" if above else f"at least {low}"
            upper = "" if high == float("inf") else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}{upper}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


positive = number(float, 0, above=True)
finite = number(float, -1e30, 1e30)
MAX_BLOCKS, MAX_DEPTHS = 1000, 16  # those of `dints.network.architecture`, which -h need not import
XYZ = ("X", "Y", "Z")
AUGMENTATIONS = ("published", "nnunet", "auto")  # of `dints.data.augmentation`, which -h need not import


def fold(text: str) -> int | str:
    """Read ``--fold``."""
    if text != "all" and not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fold's number, from 0 on, nor all")
    return text if text == "all" else number(int, 0)(text)


def add_data(arguments: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add where the labelled cases are, and which of them to use."""
    group = arguments.add_argument_group("data")
    add = group.add_argument
    add("--root", type=Path, required=required, help="folder of the task, for example data_msd/Task09_Spleen")
    add("--json", type=Path, help="description of the dataset in MSD form (default: ROOT/dataset.json)")
    add("--json_key", default="training", help="list of labelled cases in that file")
    add("--fold", type=fold, default=0, help="fold to validate on; all: train on every case, validate on none")
    add("--num_folds", type=number(int, 2), default=5, help="folds that the cases are split into, in order")
    add(
        "--allow_outside_root",
        action="store_true",
        help="read files that lie outside ROOT, or that links lead to there",
    )
    add(
        "--trust_shapes", action="store_true", help="where a label has its image's shape, believe that it has its place"
    )
    add(
        "--replace_nonfinite",
        type=finite,
        metavar="VALUE",
        help="put this in place of NaN and infinite voxels of images (default: such a case is an error)",
    )


def add_preprocessing(arguments: argparse.ArgumentParser) -> None:
    """Add what overrides the task's own facts; model files remember it."""
    add = arguments.add_argument_group("preprocessing").add_argument
    add("--spacing", type=positive, nargs=3, metavar=XYZ, help="voxel size in mm to resample to (default: the task's)")
    add(
        "--intensity_range", type=finite, nargs=2, metavar=("A", "B"), help="what becomes 0 and 1 (default: the task's)"
    )
    add("--patch_size", type=number(int, 1), nargs=3, metavar=XYZ, help="of training and window (default: the task's)")


def recipe_help(name: str, text: str) -> str:
    """Return an option's help, with the values that the recipes give it."""
    values = {recipe: values[name] for recipe, values in RECIPES.items()}
    shown = {recipe: " ".join(value) if isinstance(value, list) else value for recipe, value in values.items()}
    return f"{text} (default: {shown['published']}; {shown['recommended']} in the recommended recipe)"


def add_training(
    arguments: argparse.ArgumentParser,
    *,
    num_epochs: int,
    num_epochs_per_validation: int,
    num_images_per_batch: int,
    learning_rate_milestones: tuple[float, ...],
) -> argparse._ArgumentGroup:
    """Add the numbers that both stages have, with a stage's own published values as defaults."""
    group = arguments.add_argument_group("training")
    add, count, share = group.add_argument, number(int, 1), number(float, 0, 1)
    add_recipe(group)
    add("--num_epochs", type=count, default=num_epochs, help="passes over the training cases")
    add(
        "--num_epochs_per_validation",
        type=count,
        default=num_epochs_per_validation,
        help="the last epoch also ends with one",
    )
    add("--num_images_per_batch", type=count, default=num_images_per_batch, help="patches per step and process")
    add(
        "--learning_rate",
        type=positive,
        default=0.025,
        help="of the weights at the start, for one process",
    )
    add(
        "--learning_rate_milestones",
        type=share,
        nargs="*",
        metavar="SHARE",
        default=list(learning_rate_milestones),
        help="shares of the training after which the learning rate halves",
    )
    add(
        "--learning_rate_scaling",
        choices=("processes", "none"),
        help=recipe_help(
            "learning_rate_scaling",
            "processes: multiply all learning rates, the architecture's too, by their number; published, but for the "
            "weights in a search, whose optimizer loses the factor in the first epoch",
        ),
    )
    add(
        "--num_iterations",
        type=count,
        help="length of the run in iterations, however many processes share it: all numbers of epochs are scaled to it",
    )
    add(
        "--max_gradient_norm",
        type=positive,
        help="scale the weights' gradients down to this norm where they exceed it (default: as they are)",
    )
    add_manner(group)
    return group


def add_manner(group: argparse._ArgumentGroup) -> None:
    """Add how a step is carried out, which makes no difference to what it comes to."""
    add = group.add_argument
    add(
        "--checkpoint_activations",
        action="store_true",
        help="keep for the backward pass only what goes from block to block, and compute the rest twice: a step takes "
        "less memory and more time, to the same result",
    )
    add(
        "--cuda_graphs",
        action="store_true",
        help="on a GPU, record a step's passes through the network at the start, and replay them: small kernels no "
        "longer wait for their launch, and what a step keeps stays allocated (not yet tried on a GPU)",
    )


def add_recipe(group: argparse._ArgumentGroup) -> None:
    """Add the choice of a recipe, and of its options those that both stages have."""
    add = group.add_argument
    add(
        "--recipe",
        choices=tuple(RECIPES),
        default="published",
        help="a set of options, each of which may also be given; recommended: what gave the best results here",
    )
    add(
        "--flip_axes",
        nargs="+",
        choices=("auto", "all", "none", *XYZ),
        metavar="AXIS",
        help=recipe_help(
            "flip_axes",
            "axes that patches are flipped along: X, Y and Z, all, none; auto: those along which no class keeps to one "
            "side of another one in the training cases",
        ),
    )
    add(
        "--augmentation",
        choices=AUGMENTATIONS,
        help="random changes of patches beside flips: the published chain, or nnU-Net's; auto: that in trainings of "
        "5000 iterations or more that see each case 60 times or more (default: published; in a retraining by the "
        "recommended recipe auto)",
    )


def add_window(arguments: argparse.ArgumentParser, *, overlap_ratio: float | None) -> None:
    """Add how whole images are segmented from patches; without an overlap, the model's own is the default."""
    add = arguments.add_argument_group("sliding window").add_argument
    text = "of neighbouring windows" + " (default: as the model was validated)" * (overlap_ratio is None)
    add("--overlap_ratio", type=number(float, 0, 0.99), default=overlap_ratio, help=text)
    add("--num_sw_batch_size", type=number(int, 1), default=6, help="windows per forward pass")


def add_machine(arguments: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what computes, and how precisely."""
    group = arguments.add_argument_group("machine")
    add = group.add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU where there is one")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: bf16, else fp16, on a GPU; on a CPU the faster of fp32 and bf16, measured at the start",
    )
    add(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile the network, which takes minutes at the start; auto: off",
    )
    add("--timeout_minutes", type=positive, default=30.0, help="longest that a process waits for another one")
    # What torchrun's predecessor passed to each process; the environment says the same.
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return group


def add_run(arguments: argparse.ArgumentParser) -> None:
    """Add how a training run is carried out: files, workers, seed."""
    add = arguments.add_argument_group("run").add_argument
    add("--output_root", type=Path, required=True, help="folder for everything that the run writes")
    add(
        "--resume",
        choices=("auto", "must", "never"),
        default="auto",
        help="auto: continue the run in OUTPUT_ROOT if there is one; must: only that; never: start afresh, and move "
        "what is there into before_1",
    )
    add("--save_minutes", type=number(float, 0), default=10.0, help="longest time between two saves of latest.pth")
    add(
        "--warning_signal",
        choices=("USR1", "USR2", "HUP", "TERM"),
        default="USR1",
        help="signal that, as TERM and INT do, stops the run after saving; schedulers send it ahead of a time limit",
    )
    add("--allow_other_num_processes", action="store_true", help="continue a run that had another number of processes")
    add(
        "--allow_changed_data",
        action="store_true",
        help="continue a run though files that it learns from were replaced; data.json lists them",
    )
    add("--seed", type=number(int, 0), default=0, help="of every random draw")
    add("--num_workers", type=number(int, 0), help="processes that prepare batches (default: free cores, at most 6)")
    add(
        "--cache",
        choices=("auto", "ram", "disk", "none"),
        default="auto",
        help="keep preprocessed cases in memory, in files, or read them anew; auto: ram if half of the free is enough",
    )
    add("--cache_dir", type=Path, help="folder of those files, for all runs (default: dints_cache beside OUTPUT_ROOT)")
    add("--check", action="store_true", help="read every case, tell what is wrong with the dataset, and stop")


def data_complaints(args: argparse.Namespace) -> list[str]:
    """List what is wrong with the options of `add_data` taken together."""
    if args.fold not in (None, "all") and args.fold >= args.num_folds:
        return [
            f"--fold {args.fold} is not one of --num_folds {args.num_folds}: give 0 to {args.num_folds - 1}, or all"
        ]
    return []


def training_complaints(args: argparse.Namespace) -> list[str]:
    """List what is wrong with the options of a training stage taken together."""
    found = data_complaints(args)
    if args.intensity_range is not None and args.intensity_range[0] >= args.intensity_range[1]:
        found.append("--intensity_range {:g} {:g}: the first must be below the second".format(*args.intensity_range))
    if args.flip_axes is not None and len(args.flip_axes) > 1 and not {*args.flip_axes} <= {*XYZ}:
        found.append(f"--flip_axes {' '.join(args.flip_axes)}: give axes, or one of auto, all and none")
    if args.cuda_graphs and args.compile == "on":
        found.append("--cuda_graphs and --compile on: give one of them, for a compiled network is replayed as it is")
    if args.learning_rate_milestones != sorted(args.learning_rate_milestones):
        found.append("--learning_rate_milestones must rise")
    return found


# What the parsed options mean. Only here is the command line's Namespace seen: all else takes what it needs by name.


def fill_from_recipe(args: argparse.Namespace, *names: str) -> None:
    """Give the named options their recipe's values, where they are not given."""
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, RECIPES[args.recipe][name])


def recipe_line(args: argparse.Namespace, *names: str) -> str:
    """Tell people which recipe a run has and, where it is the published one, what the other would change."""
    if args.recipe != "published":
        return f"recipe: {args.recipe}"
    other = RECIPES["recommended"]
    changes = [f"--{name} {' '.join(other[name]) if isinstance(other[name], list) else other[name]}" for name in names]
    return f"recipe: published, the paper's scripts' settings; --recipe recommended trains with {', '.join(changes)}"


def dataset(args: argparse.Namespace) -> dict:
    """Return what `dints.data.opening.open_dataset` and `dints.data.check.check` take of the options."""
    return {
        "root": args.root,
        "description": args.json,
        "key": args.json_key,
        "allow_outside_root": args.allow_outside_root,
        "leniency": leniency(args),
        "spacing": args.spacing,
        "intensity": args.intensity_range,
        "patch_size": args.patch_size,
    }


def leniency(args: argparse.Namespace) -> Leniency:
    """Return what the options let pass in files that would be refused."""
    return Leniency(args.trust_shapes, args.replace_nonfinite)


def folds(args: argparse.Namespace) -> dict:
    """Return what `dints.data.listing.split_fold` takes, beside the cases."""
    return {"fold": args.fold, "num_folds": args.num_folds}


def batches(args: argparse.Namespace) -> dict:
    """Return what `dints.data.loaders.training_loader` takes, beside the number of steps."""
    return {"batch_size": args.num_images_per_batch, "num_workers": args.num_workers, "seed": args.seed}


def step(args: argparse.Namespace) -> dict:
    """Return what `dints.network.step_memory.check` takes, beside the task and the network.

    What is only checked here may be trained on another machine: its device counts as a CPU if it is said to be one.
    """
    device = "cuda" if args.check and args.device == "auto" else args.device
    numbers = {"batch_size": args.num_images_per_batch, "num_workers": args.num_workers}
    return {
        **numbers,
        "device": device,
        "precision": args.precision,
        "checkpoint_activations": args.checkpoint_activations,
    }


def manner(args: argparse.Namespace) -> dict:
    """Return what `dints.training.steps.computing` takes, beside the network and what it computes on."""
    return {"compile": args.compile, "cuda_graphs": args.cuda_graphs}


def window(args: argparse.Namespace) -> dict:
    """Return what `dints.training.windows.SlidingWindow` takes, beside the patch size."""
    return {"overlap": args.overlap_ratio, "batch_size": args.num_sw_batch_size}


def cache_folder(args: argparse.Namespace) -> Path:
    """Return the folder of prepared cases: that of the option, or one beside the run's."""
    return args.cache_dir or args.output_root.parent / "dints_cache"


def course(args: argparse.Namespace) -> dict[str, object]:
    """Return the options that decide a run's course, as plain values.

    Left out are those that say where files are, and how the work is carried out. An option that is new has None as its
    default, so that runs that were stopped before go on.
    """
    places = {"output_root", "root", "json", "arch_ckpt", "allow_outside_root"}
    manner = {"resume", "save_minutes", "num_workers", "cache", "cache_dir", "check", "local_rank", "device"}
    manner |= {
        "checkpoint_activations",
        "cuda_graphs",
        "warning_signal",
        "timeout_minutes",
        "allow_other_num_processes",
        "allow_changed_data",
    }
    after = {"candidates", "proposals", "memory_mib"}  # the gradient search's end, so that they may follow any
    kept = {name: value for name, value in vars(args).items() if name not in places | manner | after}
    kept = {name: value for name, value in kept.items() if not name.startswith("candidate_")}
    # As None, so that the runs of before there were these options go on.
    published = {"recipe": "published", **RECIPES["published"]}
    published |= {"ram_loss": "distance", "loss_weights": [1.0, 1.0, 1.0, 0.001], "ramp": 1.0}
    kept |= {name: None for name, value in published.items() if kept.get(name) == value}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def learning_rate_factor(args: argparse.Namespace, num_processes: int) -> int:
    """Return what the learning rates of weights and architecture are multiplied by."""
    return num_processes if args.learning_rate_scaling == "processes" else 1


def scaled_to_iterations(args: argparse.Namespace, steps_per_epoch: int) -> argparse.Namespace:
    """Return the options with all numbers of epochs scaled, so that the run has ``--num_iterations``, if given."""
    if args.num_iterations is None:
        return args
    scale = args.num_iterations / (args.num_epochs * steps_per_epoch)
    numbers = {"num_epochs": 1, "num_epochs_per_validation": 1, "num_epochs_warmup": 0}
    scaled = {
        name: max(least, round(getattr(args, name) * scale)) for name, least in numbers.items() if hasattr(args, name)
    }
    if "num_epochs_warmup" in scaled:  # the architecture learns in one epoch at least
        scaled["num_epochs_warmup"] = min(scaled["num_epochs_warmup"], scaled["num_epochs"] - 1)
    return argparse.Namespace(**{**vars(args), **scaled})
