"""The settings of search, evolution and training: each flag, its default and its help, once.

`dints.options` makes command lines of them. The tools' own settings stand in their scripts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from dints.options import (
    Settings,
    finite,
    fold,
    number,
    option,
    positive,
    same_option,
    with_defaults,
)
from dints.recipes import RECIPES

XYZ = ("X", "Y", "Z")
# `dints.data.augmentation`, which -h does not import
AUGMENTATIONS = ("published", "nnunet", "auto")
AUGMENTATION_HELP = (
    "random changes of patches beside flips: the published chain, or nnU-Net's; auto: that in "
    "trainings of 5000 iterations or more that see each case 60 times or more"
)
PROPOSALS = ("by_hand", "random")  # `dints.evolution.proposals`, likewise
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
    num_folds: int = option(
        "folds that the cases are split into, in order", default=5, type=number(int, 2)
    )
    trust_shapes: bool = option(
        "where a label has its image's shape, believe that it has its place", default=False
    )
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
                f"--fold {self.fold} is not one of --num_folds {self.num_folds}: give 0 to "
                f"{self.num_folds - 1}, or all"
            )
        window = self.intensity_range
        if window is not None and window[0] >= window[1]:
            yield (
                f"--intensity_range {window[0]:g} {window[1]:g}: the first must be below the second"
            )


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
    augmentation: str = option(AUGMENTATION_HELP, default="published", choices=AUGMENTATIONS)

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
        "length of the run in iterations, however many processes share it: all numbers of epochs "
        "are scaled to it",
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
        metavar="NAME",
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
class RetrainingSettings(WeightsSettings):
    """Training."""

    learning_rate_schedule: str = option(
        "halvings: at the milestones; polynomial: to 0, as (1 - share done) to the 0.9",
        from_recipe=True,
        choices=("halvings", "polynomial"),
    )
    average_decay: float = option(
        "validate and keep a moving average of the weights, in which a step's weights count so "
        "much less after each further step; 0: the weights themselves",
        from_recipe=True,
        type=number(float, 0, 0.9999),
    )


@dataclass(frozen=True, kw_only=True)
class WindowSettings(Settings):
    """Sliding window."""

    overlap_ratio: float = option(
        "of neighbouring windows", default=0.5, type=number(float, 0, 0.99)
    )
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
    timeout_minutes: float = option(
        "longest that a process waits for another one", default=30.0, decides=False, type=positive
    )
    # For torchrun's predecessor, which passed it to each process; the environment says the same.
    local_rank: int = option(None, default=0, decides=False, names=("--local-rank",), type=int)
    compile: ClassVar[str] = "off"
    checkpoint_activations: ClassVar[bool] = False
    cuda_graphs: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class CompilingMachineSettings(MachineSettings):
    """Machine."""

    compile: str = option(
        "torch.compile the network, which takes minutes at the start; auto: off",
        default="auto",
        choices=("auto", "on", "off"),
    )


@dataclass(frozen=True, kw_only=True)
class TrainingMachineSettings(CompilingMachineSettings):
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

    output_root: Path = option(
        "folder for everything that the run writes", common=True, decides=False, type=Path
    )
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
        "signal that, as TERM and INT do, stops the run after saving; schedulers send it ahead of "
        "a time limit",
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


@dataclass(frozen=True, kw_only=True)
class SpaceSettings(Settings):
    """Search space."""

    num_blocks: int = option(
        "blocks, one after another", default=12, type=number(int, 1, MAX_BLOCKS)
    )
    num_depths: int = option(
        "resolutions, each half of the last", default=4, type=number(int, 2, MAX_DEPTHS)
    )
    channel_mul: float = option(
        "times 32, 64, ... channels", common=True, default=0.5, type=number(float, 0.0625)
    )
    use_downsample: str = option(
        "halve the image before the first node, as published; auto: unless volumes are small",
        from_recipe=True,
        choices=("yes", "no", "auto"),
    )
    strides: str = option(
        "axes that a depth halves: auto: all but those with a coarser spacing, as nnU-Net does; "
        "isotropic: all, as published",
        from_recipe=True,
        choices=("auto", "isotropic"),
    )
    keep_finest: bool = option(
        "keep the path along the finest resolution active in every block (default: a path like any "
        "other)",
        default=False,
    )
    operations: tuple[str, ...] = option(
        "operations that a path may hold, of the table in dints/network/operations.py (default: "
        "the published five)",
        default=(),
        nargs="+",
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class SupernetSettings(SpaceSettings):
    """Search space."""

    checkpoint: Path | None = option(
        "weights to start from: latest.pth of a search in this space, or a state dict of MONAI's "
        "supernet",
        default=None,
        type=Path,
    )


@dataclass(frozen=True, kw_only=True)
class SearchLengthSettings(LengthSettings):
    """Length."""

    num_epochs_warmup: int = option(
        "epochs before the architecture learns", default=715, type=number(int, 0)
    )

    def complaints(self) -> Iterable[str]:
        if self.num_epochs_warmup >= self.num_epochs:
            yield (
                f"--num_epochs_warmup {self.num_epochs_warmup} must be below --num_epochs "
                f"{self.num_epochs}"
            )

    def scaled(self, steps_per_epoch: int) -> SearchLengthSettings:
        scaled = super().scaled(steps_per_epoch)
        if self.num_iterations is None:
            return scaled
        scale = self.num_iterations / (self.num_epochs * steps_per_epoch)
        warmup = round(self.num_epochs_warmup * scale)
        # The architecture learns in one epoch at least.
        return replace(scaled, num_epochs_warmup=min(warmup, scaled.num_epochs - 1))

    def past_warmup(self, epoch: int) -> tuple[bool, float]:
        """Tell whether the architecture learns in an epoch, and the share (0 to 1) that is done."""
        past = epoch - self.num_epochs_warmup
        return past >= 0, max(0.0, past / (self.num_epochs - self.num_epochs_warmup))


@dataclass(frozen=True, kw_only=True)
class ArchSettings(Settings):
    """Training of the architecture."""

    learning_rate_arch: float = option(
        "of the architecture, for one process", default=1e-3, type=positive
    )
    factor_ram_cost: float = option(
        "memory that the search aims at: feature maps, as a share of those with every path active",
        common=True,
        default=0.8,
        type=number(float, 0, 1),
    )
    ram_budget: str = option(
        "the whole of that share. published: the same operations on every path, so that only paths "
        "count; fixed: the dearest operation on every path, so that operations count too",
        default="published",
        choices=("published", "fixed"),
    )
    max_ram_ratio: float | None = option(
        "write the most probable architecture within this share of the fixed budget (default: the "
        "most probable)",
        default=None,
        type=number(float, 0, 1),
    )
    loss_weights: tuple[float, ...] = option(
        "of the terms that the architecture minimises beside the segmentation loss",
        default=(1.0, 1.0, 1.0, 0.001),
        type=number(float, 0, 1e6),
        nargs=4,
        metavar=("ENTROPY_A", "ENTROPY_C", "RAM", "TOPOLOGY"),
    )


@dataclass(frozen=True, kw_only=True)
class SearchSettings(Settings):
    """What search_dints.py goes by; its numbers are those of the published search."""

    data: DataSettings
    space: SupernetSettings
    length: with_defaults(SearchLengthSettings, num_epochs=1430, num_epochs_per_validation=100)
    patches: PatchSettings
    weights: with_defaults(WeightsSettings, learning_rate_milestones=(0.4, 0.8))
    arch: ArchSettings
    window: with_defaults(WindowSettings, overlap_ratio=0.625)
    run: RunSettings
    machine: TrainingMachineSettings


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Settings):
    """Network."""

    arch_ckpt: Path = option(
        "architecture: search_code_*.pth of search_dints.py or evolve_dints.py, or published",
        common=True,
        decides=False,
        type=Path,
    )
    checkpoint: Path | None = option(
        "weights to start from: a model file or a state dict of this architecture",
        default=None,
        type=Path,
    )
    use_downsample: str | None = option(
        "halve the image before the first node, as published; auto: unless volumes are small "
        "(default: as ARCH_CKPT was searched)",
        default=None,
        choices=("yes", "no", "auto"),
    )
    strides: str | None = option(
        "axes that a depth halves: auto: all but those with a coarser spacing; isotropic: all "
        "(default: as ARCH_CKPT was searched)",
        default=None,
        choices=("auto", "isotropic"),
    )
    channel_mul: float | None = option(
        "times 32, 64, ... channels (default: the width that ARCH_CKPT was judged at, else 1)",
        common=True,
        default=None,
        type=number(float, 1 / 32),
    )


@dataclass(frozen=True, kw_only=True)
class RetrainingPatchSettings(PatchSettings):
    """Patches."""

    augmentation: str = option(AUGMENTATION_HELP, from_recipe=True, choices=AUGMENTATIONS)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """What train_dints.py goes by; its numbers are those of the published retraining."""

    data: DataSettings
    network: NetworkSettings
    length: with_defaults(LengthSettings, num_epochs=13500, num_epochs_per_validation=500)
    patches: with_defaults(RetrainingPatchSettings, num_images_per_batch=2)
    weights: with_defaults(RetrainingSettings, learning_rate_milestones=(0.2, 0.4, 0.6, 0.8))
    window: WindowSettings
    run: RunSettings
    machine: TrainingMachineSettings


@dataclass(frozen=True, kw_only=True)
class CompetitionSettings(Settings):
    """Competition."""

    arch_ckpt: tuple[Path, ...] = option(
        "architectures that compete too: search_code_*.pth of search_dints.py, or published",
        common=True,
        decides=False,  # their content does, wherever the files lie
        default=(),
        nargs="+",
        type=Path,
        metavar="FILE",
    )
    candidates: int = option(
        "architectures that compete: half of them given or proposed, half mutants of the best of "
        "these; a quarter reaches the second rung, an eighth the third",
        common=True,
        default=24,
        type=number(int, 2),
    )
    proposals: tuple[str, ...] = option(
        "kinds of architectures that are proposed, in turn, beside those of --arch_ckpt",
        default=PROPOSALS,
        nargs="+",
        choices=PROPOSALS,
        metavar="KIND",
    )
    memory_mib: float | None = option(
        "memory that each candidate's width fills: activations of a training step, and 16 bytes a "
        "parameter, in fp32 (default: --factor_ram_cost of every path at --channel_mul)",
        common=True,
        default=None,
        type=positive,
    )
    factor_ram_cost: float = option(
        "share of the memory of a training step with every path, the dearest operation on each",
        default=0.8,
        type=number(float, 0, 1, above=True),
    )
    num_iterations: int = option(
        "length of a candidate's training in the last rung",
        common=True,
        default=4000,
        type=number(int, 4),
    )
    learning_rate: float = option(
        "at the start of a candidate's training; it falls to 0", default=0.05, type=positive
    )
    recipe: str = option(
        "a set of options, each of which may also be given",
        default="recommended",
        choices=tuple(RECIPES),
    )
    loss: str = same_option(WeightsSettings, "loss")

    def complaints(self) -> Iterable[str]:
        given, most = len(self.arch_ckpt), -(-self.candidates // 2)
        if given > most:
            yield f"--arch_ckpt gives {given} files: give --candidates {2 * given} or more"


@dataclass(frozen=True, kw_only=True)
class EvolveSettings(Settings):
    """What evolve_dints.py goes by."""

    data: DataSettings
    competition: CompetitionSettings
    space: SpaceSettings
    patches: with_defaults(PatchSettings, num_images_per_batch=2)
    window: with_defaults(WindowSettings, overlap_ratio=0.625)
    run: RunSettings
    machine: MachineSettings


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
    return (
        "recipe: published, the paper's scripts' settings; --recipe recommended trains with "
        f"{changes}"
    )
