"""The groups of settings that more than one script has: each flag, its default and its help, once.

A script's own groups stand in the script. See `dints.options` for how a command line is made of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from dints.options import Settings, finite, fold, number, option, positive
from dints.recipes import RECIPES

XYZ = ("X", "Y", "Z")
AUGMENTATIONS = ("published", "nnunet", "auto")  # `dints.data.augmentation`, which -h does not import
LOSSES = ("dice_ce",)  # `dints.training.losses`, likewise
MAX_BLOCKS, MAX_DEPTHS = 1000, 16  # `dints.network.architecture`, likewise
count = number(int, 1)


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Data.

    Which labelled cases there are, which of them validate, and what overrides the task's facts.
    """

    root: Path = option(
        "folder of the task, for example data_msd/Task09_Spleen",
        common=True,
        decides=False,
        type=Path,
    )
    json: Path | None = option(
        "description of the dataset in MSD form (default: ROOT/dataset.json)",
        default=None,
        decides=False,
        type=Path,
    )
    json_key: str = option("list of labelled cases in that file", default="training")
    fold: int | str = option(
        "fold to validate on; all: train on every case, validate on none",
        default=0,
        common=True,
        type=fold,
    )
    num_folds: int = option("folds that the cases are split into, in order", default=5, type=number(int, 2))
    trust_shapes: bool = option("where a label has its image's shape, believe that it has its place", default=False)
    replace_nonfinite: float | None = option(
        "put this in place of NaN and infinite voxels of images (default: such a case is an error)",
        default=None,
        type=finite,
        metavar="VALUE",
    )
    spacing: tuple[float, ...] | None = option(
        "voxel size in mm to resample to (default: the task's)",
        default=None,
        type=positive,
        nargs=3,
        metavar=XYZ,
    )
    intensity_range: tuple[float, ...] | None = option(
        "intensities that become 0 and 1 (default: the task's)",
        default=None,
        type=finite,
        nargs=2,
        metavar=("A", "B"),
    )
    patch_size: tuple[int, ...] | None = option(
        "voxels of a patch, of training and of the sliding window (default: the task's)",
        default=None,
        common=True,
        type=count,
        nargs=3,
        metavar=XYZ,
    )

    def complaints(self) -> Iterable[str]:
        if self.fold not in (None, "all") and self.fold >= self.num_folds:
            yield (
                f"--fold {self.fold} is not one of --num_folds {self.num_folds}: give 0 to {self.num_folds - 1}, or all"
            )
        window = self.intensity_range
        if window is not None and window[0] >= window[1]:
            yield (f"--intensity_range {window[0]:g} {window[1]:g}: the first must be below the second")


@dataclass(frozen=True, kw_only=True)
class PatchSettings(Settings):
    """Patches."""

    num_images_per_batch: int = option("patches per step and process", default=1, type=count)
    flip_axes: tuple[str, ...] = option(
        "axes that patches are flipped along: X, Y and Z, all, none; auto: those along which no "
        "class keeps to one side of another one in the training cases",
        from_recipe=True,
        nargs="+",
        choices=("auto", "all", "none", *XYZ),
        metavar="AXIS",
    )
    augmentation: str = option(
        "random changes of patches beside flips: the published chain, or nnU-Net's; auto: that in "
        "trainings of 5000 iterations or more that see each case 60 times or more",
        default="published",
        choices=AUGMENTATIONS,
    )

    def complaints(self) -> Iterable[str]:
        if len(self.flip_axes) > 1 and not {*self.flip_axes} <= {*XYZ}:
            yield f"--flip_axes {' '.join(self.flip_axes)}: give axes, or one of auto, all and none"


@dataclass(frozen=True, kw_only=True)
class LengthSettings(Settings):
    """Length."""

    num_epochs: int = option("passes over the training cases", common=True, default=1, type=count)
    num_epochs_per_validation: int = option(
        "epochs between two validations; the last epoch also ends with one", default=1, type=count
    )
    num_iterations: int | None = option(
        "length of the run in iterations, however many processes share it: all numbers of epochs are scaled to it",
        common=True,
        default=None,
        type=count,
    )

    def scaled(self, steps_per_epoch: int) -> LengthSettings:
        """Return the numbers of epochs of a run of ``num_iterations``, if that is given."""
        if self.num_iterations is None:
            return self
        scale = self.num_iterations / (self.num_epochs * steps_per_epoch)
        names = ("num_epochs", "num_epochs_per_validation")
        return replace(self, **{n: max(1, round(getattr(self, n) * scale)) for n in names})

    def is_validation_epoch(self, epoch: int) -> bool:
        """Tell whether epoch number ``epoch`` (from 0) ends with a validation."""
        done = epoch + 1
        return done % self.num_epochs_per_validation == 0 or done == self.num_epochs


@dataclass(frozen=True, kw_only=True)
class WeightsSettings(Settings):
    """Training."""

    recipe: str = option(
        "a set of options, each of which may also be given; recommended: the best results here",
        default="published",
        common=True,
        choices=tuple(RECIPES),
    )
    learning_rate: float = option(
        "of the weights at the start; in the published recipe times the number of processes",
        default=0.025,
        common=True,
        type=positive,
    )
    learning_rate_milestones: tuple[float, ...] = option(
        "shares of the training after which the learning rate halves",
        default=(),
        type=number(float, 0, 1),
        nargs="*",
        metavar="SHARE",
    )
    max_gradient_norm: float | None = option(
        "scale the weights' gradients down to this norm where they exceed it (default: never)",
        default=None,
        type=positive,
    )
    loss: str = option(
        "segmentation loss, of the table in dints/training/losses.py",
        default="dice_ce",
        choices=LOSSES,
    )
    learning_rate_schedule: ClassVar[str] = "halvings"
    average_decay: ClassVar[float] = 0.0

    def complaints(self) -> Iterable[str]:
        if list(self.learning_rate_milestones) != sorted(self.learning_rate_milestones):
            yield "--learning_rate_milestones must rise"

    def factor(self, num_processes: int) -> int:
        """Return the factor of all learning rates."""
        scales = RECIPES[self.recipe]["learning_rate_scaling"] == "processes"
        return num_processes if scales else 1


@dataclass(frozen=True, kw_only=True)
class WindowSettings(Settings):
    """Sliding window."""

    overlap_ratio: float = option("of neighbouring windows", default=0.5, type=number(float, 0, 0.99))
    num_sw_batch_size: int = option("windows per forward pass", default=6, type=count)


@dataclass(frozen=True, kw_only=True)
class MachineSettings(Settings):
    """Machine."""

    device: str = option(
        "auto: a GPU where there is one",
        default="auto",
        common=True,
        decides=False,
        choices=("auto", "cuda", "cpu"),
    )
    precision: str = option(
        "auto: bf16, else fp16, on a GPU; on a CPU the faster of fp32 and bf16, measured first",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: str = option(
        "torch.compile the network, which takes minutes at the start; auto: off",
        default="auto",
        choices=("auto", "on", "off"),
    )
    timeout_minutes: float = option(
        "longest that a process waits for another one", default=30.0, decides=False, type=positive
    )
    # For torchrun's predecessor, which passed it to each process; the environment says the same.
    local_rank: int = option(None, default=0, decides=False, names=("--local-rank",), type=int)


@dataclass(frozen=True, kw_only=True)
class TrainingMachineSettings(MachineSettings):
    """Machine."""

    checkpoint_activations: bool = option(
        "keep for the backward pass only the blocks' inputs, and compute the rest twice: a step "
        "takes less memory and more time, to the same result",
        default=False,
        decides=False,
    )
    cuda_graphs: bool = option(
        "on a GPU, record a step's passes through the network at the start, and replay them: small "
        "kernels no longer wait for their launch, and the memory of a step stays allocated (not "
        "yet tried on a GPU)",
        default=False,
        decides=False,
    )

    def complaints(self) -> Iterable[str]:
        if self.cuda_graphs and self.compile == "on":
            yield "--cuda_graphs and --compile on: give one of them"


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Run."""

    output_root: Path = option("folder for everything that the run writes", common=True, decides=False, type=Path)
    check: bool = option(
        "read every case, report what is wrong with the dataset, and stop",
        default=False,
        common=True,
        decides=False,
    )
    resume: str = option(
        "auto: continue the run in OUTPUT_ROOT if there is one; must: only that; never: start "
        "afresh, and move what is there into before_1",
        default="auto",
        common=True,
        decides=False,
        choices=("auto", "must", "never"),
    )
    save_minutes: float = option(
        "longest time between two saves of latest.pth",
        default=10.0,
        decides=False,
        type=number(float, 0),
    )
    warning_signal: str = option(
        "signal that, as TERM and INT do, stops the run after saving; schedulers send it ahead of a time limit",
        default="USR1",
        decides=False,
        choices=("USR1", "USR2", "HUP", "TERM"),
    )
    allow_other_num_processes: bool = option(
        "continue a run that had another number of processes", default=False, decides=False
    )
    allow_changed_data: bool = option(
        "continue a run though files that it learns from were replaced; data.json lists them",
        default=False,
        decides=False,
    )
    seed: int = option("of every random draw", default=0, type=number(int, 0))
    num_workers: int | None = option(
        "processes that prepare batches (default: free cores, at most 6)",
        default=None,
        decides=False,
        type=number(int, 0),
    )
    cache: str = option(
        "keep preprocessed cases in memory, in files, or read them each time; auto: ram if half of "
        "the free memory is enough",
        default="auto",
        decides=False,
        choices=("auto", "ram", "disk", "none"),
    )
    cache_dir: Path | None = option(
        "folder of those files, for all runs (default: dints_cache beside OUTPUT_ROOT)",
        default=None,
        decides=False,
        type=Path,
    )

    @property
    def cache_folder(self) -> Path:
        return self.cache_dir or self.output_root.parent / "dints_cache"


def recipe_line(settings: object, recipe: str) -> str:
    """Name a run's recipe for people and, of the published one, what the other would change."""
    if recipe != "published":
        return f"recipe: {recipe}"
    fields = [
        name
        for group in vars(settings).values()
        for name, field in group.__dataclass_fields__.items()
        if field.metadata.get("from_recipe")
    ]
    other = {name: RECIPES["recommended"][name] for name in fields}
    words = {k: " ".join(v) if isinstance(v, (list, tuple)) else v for k, v in other.items()}
    changes = ", ".join(f"--{name} {word}" for name, word in words.items())
    return f"recipe: published, the paper's scripts' settings; --recipe recommended trains with {changes}"
