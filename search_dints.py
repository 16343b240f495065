"""Search a network topology for a 3D segmentation task: stage 1 of DiNTS.

    python search_dints.py --root data_msd/Task09_Spleen --output_root runs/search
    torchrun --standalone --nproc_per_node=8 search_dints.py --root data_msd/Task07_Pancreas --output_root runs/search

A supernet holds every path between 4 resolutions in 12 blocks, and five operations on each path. Half of the training
cases train its weights; the other half trains the probabilities of paths and operations, in turn, once the weights are
warm. Three more terms push the probabilities towards a decision, a connected topology and a memory budget. The most
probable connected network is written at every validation as OUTPUT_ROOT/search_code_<iteration>.pth, which
train_dints.py retrains.

He et al., DiNTS: Differentiable Neural Network Topology Search for 3D Medical Image Segmentation, CVPR 2021.
"""

from __future__ import annotations

import argparse

from dints import options
from dints.errors import UserError, exit_on_user_error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.parser(__doc__)
    options.add_data(parser)
    options.add_preprocessing(parser)
    space = parser.add_argument_group("search space")
    space.add_argument("--num_blocks", type=options.number(int, 1), default=12, help="blocks, one after another")
    space.add_argument(
        "--num_depths", type=options.number(int, 2), default=4, help="resolutions, each half of the last"
    )
    space.add_argument(
        "--channel_mul", type=options.number(float, 0.0625), default=0.5, help="times 32, 64, ... channels"
    )
    training = options.add_training(
        parser,
        num_epochs=1430,
        num_epochs_per_validation=100,
        num_images_per_batch=1,
        learning_rate_milestones=(0.4, 0.8),
    )
    training.add_argument(
        "--num_epochs_warmup", type=options.number(int, 0), default=715, help="epochs before the architecture learns"
    )
    training.add_argument(
        "--learning_rate_arch", type=options.number(float, 0, above=True), default=1e-3, help="of the architecture"
    )
    training.add_argument(
        "--factor_ram_cost",
        type=options.number(float, 0, 1),
        default=0.8,
        help="memory that the search aims at: feature maps, as a share of those with every path active",
    )
    training.add_argument(
        "--ram_budget",
        choices=("published", "fixed"),
        default="published",
        help="what that share is of. published: the same operations on every path, so that only paths count; "
        "fixed: the dearest operation on every path, so that operations count too",
    )
    training.add_argument(
        "--max_ram_ratio",
        type=options.number(float, 0, 1),
        help="write the most probable architecture within this share of the fixed budget (default: the most probable)",
    )
    options.add_window(parser, overlap_ratio=0.625)
    options.add_machine(parser)
    options.add_run(parser)
    args = parser.parse_args(argv)
    complaints = options.training_complaints(args)
    if args.num_epochs_warmup >= args.num_epochs:
        complaints.append(f"--num_epochs_warmup {args.num_epochs_warmup} must be below --num_epochs {args.num_epochs}")
    if complaints:
        parser.error("; ".join(complaints))
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports of torch and MONAI, which take seconds, so that -h answers at once

import itertools
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.networks.nets.dints import DiNTS
from torch import nn

from dints import __version__, data, dataset, engine, files, runtime
from dints.acceleration import accelerated
from dints.architecture import Architecture, save_architecture
from dints.cache import open_cache
from dints.checkpoint import Checkpoint, Progress, configuration
from dints.cost import Cost, cost
from dints.dataset import Case
from dints.drawing import draw_architecture
from dints.fingerprint import write_task
from dints.history import LOSSES, History, read_rows
from dints.network import check_patch_size
from dints.space import SearchSpace
from dints.tasks import Task

log = logging.getLogger("search")


def main(args: argparse.Namespace) -> None:
    if args.check:
        return data.check(args, prepare)
    with (
        runtime.started(args.device, args.timeout_minutes) as processes,
        runtime.run_folder(args.output_root, processes) as folder,
    ):
        search(args, processes, folder)


def search(args: argparse.Namespace, processes: runtime.Processes, folder: Path) -> None:
    opened, weights_cases, arch_cases, validation = processes.on_main(prepare, args)
    task, used = opened.task, [*weights_cases, *arch_cases, *validation]
    contents = {"task": task, "cases": dataset.names(used)}
    checkpoint = Checkpoint(folder, args, configuration(args, processes, **contents), processes)
    precision = runtime.choose_precision(checkpoint.precision or args.precision, processes)

    processes.on_main(write_task, folder, task, opened.measured)
    cache = open_cache(used, task, args, processes)
    steps = data.steps_per_epoch(len(weights_cases), args.num_images_per_batch, processes)
    args = options.scaled_to_iterations(args, steps)
    weights_loader = data.training_loader(weights_cases, "weights", steps, cache, args, processes)
    arch_loader = data.training_loader(arch_cases, "architecture", steps, cache, args, processes)
    validation_loader = data.validation_loader(validation, cache, processes)
    window = engine.SlidingWindow(task.patch_size, args.overlap_ratio, args.num_sw_batch_size)
    supernet = Supernet(args, task, precision, processes)
    check_max_ram_ratio(args.max_ram_ratio, supernet.space)
    losses = EpochLosses(processes)
    progress = checkpoint.restore({**supernet.parts, **losses.parts}, precision)
    history = History(folder, task.class_names, progress.recorded_iteration, processes.is_main)
    waited = data.ShareOfWaiting(weights_loader, arch_loader)
    log.info("%s: cases %d + %d, validation %d", task.name, len(weights_cases), len(arch_cases), len(validation))
    log.info("%s", engine.describe(steps, processes, precision))

    for epoch in range(progress.epoch, args.num_epochs):
        runtime.seed_everything(args.seed, epoch, processes.rank)
        warmed_up = epoch >= args.num_epochs_warmup
        ramp = max(0.0, (epoch - args.num_epochs_warmup) / (args.num_epochs - args.num_epochs_warmup))
        learning_rate = engine.learning_rate(args, ramp, processes)
        engine.set_learning_rate(supernet.optimizer, learning_rate)
        if progress.step == 0:
            losses.start(supernet.space.architecture())

        with checkpoint.saved_when_stopped():
            with progress.timed():
                arch_batches = arch_loader.epoch(epoch, progress.step) if warmed_up else itertools.repeat(None)
                batches = zip(weights_loader.epoch(epoch, progress.step), arch_batches, strict=False)
                train_epoch(supernet, checkpoint.steps(batches), ramp, losses, progress)
            state = {**losses.means(warmed_up), **supernet.describe(), **losses.changes(supernet.space.architecture())}
            waiting = {"data_wait": waited.take(progress.seconds_in_epoch)}
            history.add_epoch(progress, {"learning_rate": learning_rate, **state, **waiting})

            validates = engine.is_validation_epoch(epoch, args)
            if validates:
                with progress.timed():
                    volumes = checkpoint.unless_stopped(validation_loader)
                    scores = engine.validate(
                        supernet.network, volumes, len(validation), task, window, precision, processes
                    )
                checkpoint.stop_if_asked()
        if validates:
            progress.note_validation(scores and scores.mean, folder / f"search_code_{progress.iteration}.pth")
            if processes.is_main:
                write_architecture(supernet.space, progress, args, task, folder, processes.device)
            history.add_validation(progress, scores)
            if processes.is_main:
                draw_search(folder, f"{task.name}, RAM factor {args.factor_ram_cost:g}")
        progress.epoch_done()
        if validates:
            checkpoint.save()
    history.close()
    log.info("found: %s; train_dints.py --arch_ckpt retrains it", folder / f"search_code_{progress.iteration}.pth")


def prepare(args: argparse.Namespace) -> tuple[data.LabelledDataset, list[Case], list[Case], list[Case]]:
    """The dataset, and its cases for weights, architecture and validation, with all checks that need no computing."""
    opened = data.open_dataset(args)
    check_patch_size(opened.task.patch_size, args.num_depths)
    training, validation = dataset.split_fold(opened.cases, args.num_folds, args.fold)
    return opened, *halves(training), validation


def halves(cases: list[Case]) -> tuple[list[Case], list[Case]]:
    """The cases that train the weights, and those that train the architecture: every other one each."""
    if len(cases) < 2:
        raise UserError(f"{len(cases)} training case cannot be halved into weights and architecture sets: 2 are needed")
    return cases[::2], cases[1::2]


class Supernet:
    """The search space in MONAI's `DiNTS`, and what trains it: SGD for the weights, Adam for the architecture."""

    def __init__(
        self, args: argparse.Namespace, task: Task, precision: runtime.Precision, processes: runtime.Processes
    ):
        self.precision, self.processes = precision, processes
        self.factor_ram_cost, self.ram_budget = args.factor_ram_cost, args.ram_budget
        self.max_gradient_norm = args.max_gradient_norm
        self.input_shape = (args.num_images_per_batch, task.num_channels, *task.patch_size)
        runtime.seed_everything(args.seed, "initialisation")
        self.space = SearchSpace(channel_mul=args.channel_mul, num_blocks=args.num_blocks, num_depths=args.num_depths)
        self.network = accelerated(DiNTS(self.space, task.num_channels, task.num_classes)).to(processes.device)
        self.compiled = engine.compiled(self.network, args.compile, processes.device)
        self.arch = [self.space.log_alpha_a, self.space.log_alpha_c]
        self.weights = [p for p in self.network.parameters() if all(p is not alpha for alpha in self.arch)]
        with frozen(self.arch):  # DDP averages the gradients of the weights only; `architecture_step` those of arch
            self.distributed = runtime.distributed(self.compiled, processes)
        self.optimizer = engine.sgd(self.weights, args.learning_rate)
        self.arch_optimizers = [
            torch.optim.Adam([alpha], args.learning_rate_arch, betas=(0.5, 0.999), fused=True) for alpha in self.arch
        ]
        self.scaler, self.arch_scaler = precision.scaler(), precision.scaler()
        self.criterion = engine.segmentation_loss()

    @property
    def parts(self) -> dict[str, object]:
        """All that has state, for the checkpoint."""
        return {
            "network": self.network,
            "optimizer": self.optimizer,
            "optimizer_a": self.arch_optimizers[0],
            "optimizer_c": self.arch_optimizers[1],
            "scaler": self.scaler,
            "arch_scaler": self.arch_scaler,
        }

    @torch.no_grad()
    def describe(self) -> dict[str, float]:
        """The regularisers' values now, and the memory budget that they are held against."""
        terms = regularisers(self.space, self.input_shape, self.ram_budget)
        return {**{name: float(value) for name, value in terms.items()}, "ram_target": self.factor_ram_cost}


class EpochLosses:
    """What an epoch's line of the history is made of: the losses of both steps, and the decoded architecture before."""

    def __init__(self, processes: runtime.Processes):
        self.weights = engine.EpochLoss("loss", processes)
        self.arch = engine.EpochLoss("architecture_loss", processes)
        self.before = DecodedCodes()

    @property
    def parts(self) -> dict[str, object]:
        """All that has state, for a checkpoint in the middle of an epoch."""
        return {"loss": self.weights, "architecture_loss": self.arch, "decoded_before": self.before}

    def start(self, decoded: Architecture) -> None:
        self.weights.start()
        self.arch.start()
        self.before.codes = torch.from_numpy(np.stack([decoded.arch_code_a, decoded.arch_code_c]))

    def means(self, warmed_up: bool) -> dict[str, float | None]:
        return {"loss": self.weights.mean(), "architecture_loss": self.arch.mean() if warmed_up else None}

    def changes(self, decoded: Architecture) -> dict[str, int]:
        """Paths of the decoded architecture that were switched; operations exchanged on paths active in both."""
        before_a, before_c = self.before.codes.numpy()
        in_both = (before_a == 1) & (decoded.arch_code_a == 1)
        return {
            "changed_paths": int((before_a != decoded.arch_code_a).sum()),
            "changed_operations": int((before_c != decoded.arch_code_c)[in_both].sum()),
        }


class DecodedCodes:
    """``arch_code_a`` and ``arch_code_c`` of an architecture: (2, blocks, paths)."""

    codes = torch.zeros(0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"codes": self.codes}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.codes = state["codes"]


def train_epoch(
    supernet: Supernet,
    batches: Iterable[tuple[dict, dict | None]],
    ramp: float,
    losses: EpochLosses,
    progress: Progress,
) -> None:
    """For each pair of batches a step of the weights and, if there is a second batch, one of the architecture."""
    for weights_batch, arch_batch in batches:
        iteration = progress.iteration + 1
        losses.weights.add(weights_step(supernet, weights_batch), iteration, weights_batch["cases"])
        if arch_batch is not None:
            losses.arch.add(architecture_step(supernet, arch_batch, ramp), iteration, arch_batch["cases"])


def weights_step(supernet: Supernet, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One step of the weights, the architecture being fixed; returns the segmentation loss."""
    with frozen(supernet.arch):
        return engine.weights_step(
            supernet.distributed,
            batch,
            supernet.criterion,
            supernet.optimizer,
            supernet.scaler,
            supernet.precision,
            supernet.max_gradient_norm,
        )


def architecture_step(supernet: Supernet, batch: dict[str, torch.Tensor], ramp: float) -> torch.Tensor:
    """One step of the path and operation probabilities, the weights being fixed; returns the segmentation loss.

    It runs on the unwrapped network: the only gradients to average are a few hundred numbers, in one all-reduce.
    """
    image, label = engine.to_device(batch, supernet.processes.device)
    for optimizer in supernet.arch_optimizers:
        optimizer.zero_grad()
    with frozen(supernet.weights):
        with supernet.precision.autocast():
            scores = supernet.compiled(image)
        segmentation = supernet.criterion(scores.float(), label)
        terms = regularisers(supernet.space, supernet.input_shape, supernet.ram_budget)
        loss = segmentation + ramp * architecture_loss(terms, supernet.factor_ram_cost)
        supernet.arch_scaler.scale(loss).backward()
    average_gradients(supernet.arch, supernet.processes)
    for optimizer, alpha in zip(supernet.arch_optimizers, supernet.arch, strict=True):
        engine.step_if_finite(optimizer, supernet.arch_scaler, alpha.grad)
    supernet.arch_scaler.update()
    return segmentation.detach()


def regularisers(space: SearchSpace, input_shape: tuple[int, ...], ram_budget: str) -> dict[str, torch.Tensor]:
    """Entropy of the paths and of the operations, topology entropy, and memory as a share of the budget."""
    children, path_probs = space.get_prob_a(child=True)
    operations = F.log_softmax(space.log_alpha_c, -1)
    return {
        "entropy_a": -(children * torch.log(children + 1e-5)).mean(),
        "entropy_c": -(operations.exp() * operations).mean(),
        "topology": space.get_topology_entropy(children),
        "ram_ratio": space.ram_ratio(input_shape, ram_budget, path_probs),
    }


def architecture_loss(terms: dict[str, torch.Tensor], factor_ram_cost: float) -> torch.Tensor:
    """What the architecture minimises beside the segmentation loss."""
    ram = torch.abs(factor_ram_cost - terms["ram_ratio"])
    return terms["entropy_a"] + terms["entropy_c"] + ram + 0.001 * terms["topology"]


def average_gradients(parameters: list[nn.Parameter], processes: runtime.Processes) -> None:
    """Replace each parameter's gradient by its mean over the ranks, all in one message."""
    flat = processes.sum(torch.cat([parameter.grad.flatten() for parameter in parameters])) / processes.world_size
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(mean.view_as(parameter))


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let no gradient be computed for ``parameters``."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def check_max_ram_ratio(max_ram_ratio: float | None, space: SearchSpace) -> None:
    """Raise `UserError` where no architecture might keep the budget, before the search begins."""
    least = space.feasible_ram_ratio()
    if max_ram_ratio is not None and max_ram_ratio < least:
        raise UserError(
            f"--max_ram_ratio {max_ram_ratio:g} is too small for {space.num_blocks} blocks and "
            f"{space.num_depths} depths: give at least {math.ceil(least * 1e4) / 1e4:g}"
        )


def write_architecture(
    space: SearchSpace,
    progress: Progress,
    args: argparse.Namespace,
    task: Task,
    folder: Path,
    device: torch.device,
) -> None:
    """Decode the search's state into ``search_code_<iteration>.pth``, say what it costs, draw it beside the file."""
    found = space.architecture(
        args.max_ram_ratio,
        iter_num=progress.iteration,
        epochs=progress.current_epoch,
        best_dsc=progress.best_dice,
        best_path=progress.best_path,
        factor_ram_cost=args.factor_ram_cost,
        task=task.name,
        seed=args.seed,
        version=__version__,
    )
    found_cost = cost_of(found, task, device)
    found.info["cost"] = found_cost.to_dict()
    name = f"search_code_{progress.iteration}"
    save_architecture(folder / f"{name}.pth", found)
    caption = [f"{found.info['ram_ratio']:.3f} of the memory of every path with its dearest operation"]
    caption += found_cost.lines()
    for line in caption:
        log.info("decoded: %s", line)
    try:
        draw_architecture(found, name, folder, caption=caption)
    except UserError as error:  # without Graphviz's dot the search goes on; the .gv source is there
        log.warning("%s", error)


def cost_of(found: Architecture, task: Task, device: torch.device) -> Cost:
    """What the network costs that train_dints.py builds of it by default; beside a large supernet, only counted."""
    size = found, task.num_channels, task.num_classes, task.patch_size
    try:
        return cost(*size, device=device)
    except UserError as error:
        log.warning("the found network's time is not measured: %s", error)
        return cost(*size)


def draw_search(folder: Path, title: str) -> None:
    """``search.png``: how the losses, the memory and the entropies went, over iterations."""
    rows = read_rows(folder / LOSSES)
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    figure.suptitle(title)
    losses, memory, entropies = figure.subplots(1, 3)

    def plot(axes: Axes, column: str, label: str, style: str = "-", scale: float = 1.0) -> None:
        points = [(int(row["iteration"]), float(row[column]) / scale) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)

    plot(losses, "loss", "weights")
    plot(losses, "architecture_loss", "architecture")
    losses.set_ylabel("loss (Dice + cross-entropy)")
    plot(memory, "ram_ratio", "expected network")
    plot(memory, "ram_target", "RAM factor", "--")
    memory.set_ylabel("share of the memory of all paths")
    for column, label in (("entropy_a", "paths"), ("entropy_c", "operations"), ("topology", "topology")):
        plot(entropies, column, label, scale=float(rows[0][column]) or 1.0)  # one block has no topology: 0
    entropies.set_ylabel("entropy, share of its start")
    for axes in (losses, memory, entropies):
        axes.set_xlabel("iterations")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with files.replacing(folder / "search.png") as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    exit_on_user_error(main, ARGS)
