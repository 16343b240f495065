"""Search a network topology for a 3D segmentation task by gradient descent: stage 1 of DiNTS.

    python search_dints.py --root data_msd/Task09_Spleen --output_root runs/search
    torchrun --standalone --nproc_per_node=8 search_dints.py --root ... --output_root ...

A supernet holds every path between 4 resolutions in 12 blocks, and five operations on each path.
Half of the training cases train its weights; the other half trains the probabilities of paths and
operations, in turn, once the weights are warm. Three more terms push the probabilities towards a
decision, a connected topology and a memory budget. The most probable connected network is written
at every validation as OUTPUT_ROOT/search_code_<iteration>.pth: train_dints.py retrains it, and
evolve_dints.py lets it compete.

He et al., DiNTS: Differentiable Neural Network Topology Search for 3D Medical Image Segmentation,
CVPR 2021.
"""

from dints.options import course, parse
from dints.settings import ArchSettings, SearchSettings, recipe_line


def parse_args(argv: list[str] | None = None) -> SearchSettings:
    return parse(SearchSettings, __doc__, argv)


if __name__ == "__main__":  # before the imports below take seconds
    SETTINGS = parse_args()

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from monai.networks.nets.dints import DiNTS
from torch import nn

from dints.data.cache import open_cache
from dints.data.dataset import Fold, open_fold
from dints.data.fingerprint import network_strides
from dints.data.loaders import choose_augmentation, training_loader
from dints.data.tasks import Task
from dints.errors import exit_on_user_error
from dints.network.arch_file import write_architecture
from dints.network.architecture import DecodedCodes
from dints.network.discrete import check_patch_size
from dints.network.operations import operations_of
from dints.network.space import SearchSpace, check_ram_ratio, supernet_of
from dints.network.step_memory import check_memory, within_supernet
from dints.network.strides import Strides
from dints.network.weights import load_weights
from dints.running.progress import remark_on_dice
from dints.running.run import Run, open_run
from dints.running.seeds import seed_everything
from dints.training.cuda_graphs import check_cuda_graphs
from dints.training.losses import check_loss
from dints.training.steps import WeightsTrainer, adam, computing, frozen, step_if_finite, to_device
from dints.training.validation import open_validation

log = logging.getLogger("search")
LOSSES = "loss", "architecture_loss"  # columns of the history


def search(settings: SearchSettings, run: Run) -> None:
    """Train the supernet's weights and, after a warm-up, its architecture, in turn."""
    fold, strides = run.on_main(prepare, settings)
    task, patches = fold.task, settings.patches
    run.begin(course(settings) | fold.to_dict(), inputs=[settings.space.checkpoint])
    supernet = build_supernet(settings, task, strides, run)
    weights, arch = trainers(supernet, settings, task, run)

    cache = open_cache(fold, run)
    weights_cases, arch_cases = fold.halves(run.seed)
    weights_loader = training_loader(weights_cases, cache, patches, run, stream="weights")
    steps = len(weights_loader)
    arch_loader = training_loader(arch_cases, cache, patches, run, steps, stream="architecture")
    validation = open_validation(fold.validation, cache, settings.window, run)
    length = settings.length.scaled(steps)
    loaders, num_iterations = [weights_loader, arch_loader], length.num_epochs * steps
    choose_augmentation(loaders, patches, task, run, num_iterations, len(weights_cases))
    run.restore(LOSSES, task.class_names, network=supernet, **weights.parts, **arch.parts)
    log_sizes(settings, [*map(len, (weights_cases, arch_cases, fold.validation))], steps, run)

    for epoch in run.epochs(length.num_epochs):
        warmed_up, progress = length.past_warmup(epoch)  # progress: 0 to 1
        weights.schedule(progress)
        arch.start_epoch()
        for weights_batch, arch_batch in run.steps(
            weights_loader, arch_loader if warmed_up else None
        ):
            run.record("loss", weights.step(weights_batch), weights_batch)
            if warmed_up:
                run.record("architecture_loss", arch.step(arch_batch, progress), arch_batch)
        run.end_epoch(learning_rate=weights.learning_rate, **arch.statistics())

        if length.is_validation_epoch(epoch):
            scores = validation(supernet)
            path = run.folder / f"search_code_{run.progress.iteration}.pth"
            run.note_validation(scores, path)
            write_decoded(path, arch.space, settings, fold, run)
            run.end_validation(scores)
    end(settings, arch.space, fold, run)


@dataclass
class ArchTrainer:
    """Trains the probabilities of paths and operations by an Adam each, the weights being fixed."""

    space: SearchSpace
    network: nn.Module  # the supernet, as it computes in a step
    optimizers: dict[str, torch.optim.Optimizer]  # by the parameter that each updates
    scaler: torch.amp.GradScaler
    decoded: DecodedCodes  # before the epoch
    weights: WeightsTrainer  # both minimise one segmentation loss
    settings: ArchSettings
    input_shape: tuple[int, ...]  # (batch, channels, *patch_size)

    def step(self, batch: dict[str, torch.Tensor], progress: float) -> torch.Tensor:
        """Take one step on a batch; return the segmentation loss, which stays on the device.

        Minimises L_segmentation + progress * (H(paths) + H(operations) + |memory - target| +
        0.001 * L_topology), where progress is the share of the training after the warm-up that is
        done, and the weights of the terms are those of ``--loss_weights``.
        """
        run = self.weights.run
        image, label = to_device(batch, run.device)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        with frozen(self.weights.weights):
            with run.precision.autocast():
                scores = self.network(image)
            segmentation = self.weights.criterion(scores.float(), label)
            loss = segmentation + progress * self.loss()
            self.scaler.scale(loss).backward()
        # Of one process until here: a few hundred gradients to average, in one message.
        alphas = {name: getattr(self.space, name) for name in self.optimizers}
        run.processes.average_gradients(list(alphas.values()))
        for name, optimizer in self.optimizers.items():
            step_if_finite(optimizer, self.scaler, alphas[name].grad)
        self.scaler.update()
        return segmentation.detach()

    def loss(self) -> torch.Tensor:
        """Add up the terms that the architecture minimises beside the segmentation loss."""
        terms = regularisers(self.space, self.input_shape, self.settings.ram_budget)
        memory = (terms["ram_ratio"] - self.settings.factor_ram_cost).abs()
        values = terms["entropy_a"], terms["entropy_c"], memory, terms["topology"]
        return sum(w * value for w, value in zip(self.settings.loss_weights, values, strict=True))

    def statistics(self) -> dict[str, float]:
        """Return the terms of `loss`, and the changes of the decoded network in the epoch."""
        terms = regularisers(self.space, self.input_shape, self.settings.ram_budget)
        values = {name: float(value.detach()) for name, value in terms.items()}
        changes = self.decoded.changes(self.space.architecture())
        return {**values, "ram_target": self.settings.factor_ram_cost, **changes}

    def start_epoch(self) -> None:
        """Note the decoded network; set the learning rate, which a restored state may not have."""
        if self.weights.run.progress.step == 0:
            self.decoded.take(self.space.architecture())
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"]

    @property
    def parts(self) -> dict[str, object]:
        """All that has state, for a checkpoint."""
        optimizers = {f"optimizer_{name[-1]}": part for name, part in self.optimizers.items()}
        return {**optimizers, "arch_scaler": self.scaler, "decoded_before": self.decoded}


def regularisers(
    space: SearchSpace, input_shape: tuple[int, ...], ram_budget: str
) -> dict[str, torch.Tensor]:
    """Compute the entropies of paths, operations and topology, and the memory as a share.

    ``entropy_a`` and ``entropy_c`` fall as paths and operations are decided. ``topology``, the
    paper's topology loss, falls as the nodes that a block's paths reach become those that the next
    block's leave. ``ram_ratio`` is the expected memory of the paths' feature maps.
    """
    children, path_probs = space.get_prob_a(child=True)
    operations = space.log_alpha_c.log_softmax(-1)
    return {
        "entropy_a": -(children * (children + 1e-5).log()).mean(),
        "entropy_c": -(operations.exp() * operations).mean(),
        "topology": space.get_topology_entropy(children),
        "ram_ratio": space.ram_ratio(input_shape, ram_budget, path_probs),
    }


def build_supernet(settings: SearchSettings, task: Task, strides: Strides, run: Run) -> DiNTS:
    """Build MONAI's `DiNTS` around the search space, on the run's device."""
    given = settings.space
    seed_everything(run.seed, "initialisation")
    space = SearchSpace(
        given.channel_mul,
        given.num_blocks,
        given.num_depths,
        operations_of(given.operations, strides),
        strides,
        given.keep_finest,
    )
    space.checkpoint_activations = settings.machine.checkpoint_activations
    check_ram_ratio(space, settings.arch.max_ram_ratio)
    supernet = supernet_of(space, task.num_channels, task.num_classes)
    if given.checkpoint is not None:
        load_weights(supernet, given.checkpoint)
    return supernet.to(run.device)


def trainers(
    supernet: DiNTS, settings: SearchSettings, task: Task, run: Run
) -> tuple[WeightsTrainer, ArchTrainer]:
    """Make the trainers of weights and architecture: together they train every parameter once."""
    space: SearchSpace = supernet.dints_space
    is_arch = {id(space.log_alpha_a), id(space.log_alpha_c)}
    weights = [weight for weight in supernet.parameters() if id(weight) not in is_arch]
    input_shape = (settings.patches.num_images_per_batch, task.num_channels, *task.patch_size)
    trainer = WeightsTrainer(supernet, weights, settings.weights, run, input_shape)

    factor = settings.weights.factor(run.processes.world_size)
    rate = settings.arch.learning_rate_arch * factor
    optimizers = {
        name: adam([getattr(space, name)], rate) for name in ("log_alpha_a", "log_alpha_c")
    }
    with frozen(weights):
        network = computing(supernet, input_shape, run.precision, run.machine)
    scaler, decoded = run.precision.scaler(), DecodedCodes()
    arch = ArchTrainer(
        space, network, optimizers, scaler, decoded, trainer, settings.arch, input_shape
    )
    return trainer, arch


def log_sizes(settings: SearchSettings, sizes: list[int], steps: int, run: Run) -> None:
    log.info("%s", recipe_line(settings, settings.weights.recipe))
    log.info("cases %d + %d, validation %d", *sizes)
    log.info("%d iterations an epoch on %s", steps, run.precision.describe(run.processes))


def write_decoded(
    path: Path, space: SearchSpace, settings: SearchSettings, fold: Fold, run: Run
) -> None:
    """Write the most probable connected architecture, with what is to be known about it later."""
    if not run.is_main:
        return
    progress = run.progress
    found = space.architecture(
        settings.arch.max_ram_ratio,
        iter_num=progress.iteration,
        epochs=progress.current_epoch,
        best_dsc=progress.best_dice,
        best_path=progress.best_iteration,  # as published, whatever its name
        factor_ram_cost=settings.arch.factor_ram_cost,
        seed=run.seed,
        fold=settings.data.fold,
        num_folds=settings.data.num_folds,
    )
    write_architecture(path, found, fold.task, run.device)


def end(settings: SearchSettings, space: SearchSpace, fold: Fold, run: Run) -> None:
    """Name the architecture that was found, and write it again if it was deleted since."""
    path = run.folder / f"search_code_{run.progress.iteration}.pth"
    if run.is_main and not path.is_file():
        write_decoded(path, space, settings, fold, run)
        log.warning("%s was gone: it is written again, as it was", path)
    log.info("the architecture is %s; train_dints.py --arch_ckpt retrains it", path)
    remark_on_dice(run.progress.best_dice, run.progress.iteration, len(fold.validation))


def prepare(settings: SearchSettings) -> tuple[Fold, Strides]:
    """Open the fold, and refuse whatever can be refused before a voxel is read.

    Returns:
        the fold; the strides of the supernet's depths.
    """
    space = settings.space
    check_loss(settings.weights.loss)
    folders = [settings.run.output_root]
    fold = open_fold(settings.data, folders, 2, space.strides, space.num_depths)
    choices = space.strides, space.use_downsample, space.num_depths
    strides = network_strides(*choices, fold.cases, fold.task)
    check_patch_size(fold.task.patch_size, strides)
    operations = operations_of(space.operations, strides)
    check_cuda_graphs(settings)
    every_path = within_supernet(space.num_blocks, operations, strides)
    check_memory(fold.task, every_path, space.channel_mul, settings, num_loaders=2)
    return fold, strides


def main(settings: SearchSettings) -> None:
    if settings.run.check:
        from dints.data.check import check  # an extra, which the core does not need

        check(settings.data)
        prepare(settings)
        return
    with open_run(settings.run, settings.machine) as run:
        search(settings, run)


if __name__ == "__main__":
    exit_on_user_error(main, SETTINGS)
