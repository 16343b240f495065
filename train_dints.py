"""Retrain the network that a search found: stage 2 of DiNTS.

    python train_dints.py --arch_ckpt search_code_600.pth --root data_msd/Task09_Spleen \
        --output_root runs/train
    torchrun --standalone --nproc_per_node=8 train_dints.py --arch_ckpt ... --root ...

Builds the architecture in ARCH_CKPT and trains it from scratch, or from the weights in
--checkpoint, with as many processes as torchrun starts. The task may be another than the one that
was searched. OUTPUT_ROOT/best_metric_model.pth is the network of the best validation;
infer_dints.py needs nothing else.
"""

from dints.options import course, parse
from dints.settings import TrainSettings, recipe_line


def parse_args(argv: list[str] | None = None) -> TrainSettings:
    return parse(TrainSettings, __doc__, argv)


if __name__ == "__main__":  # before the imports below take seconds
    SETTINGS = parse_args()

import dataclasses
import logging

from dints import __version__
from dints.data.cache import open_cache
from dints.data.dataset import Fold, open_fold
from dints.data.fingerprint import halves_first, network_strides
from dints.data.formats import provenance
from dints.data.loaders import TrainingLoader, choose_augmentation, training_loader
from dints.data.plausibility import joined, ranges_of
from dints.data.tasks import Task
from dints.errors import exit_on_user_error
from dints.network.architecture import Architecture, load_architecture
from dints.network.discrete import DiscreteNetwork, check_patch_size, count_parameters
from dints.network.model_file import save_model, validation_of
from dints.network.step_memory import check_memory
from dints.network.strides import Strides, halved_first
from dints.network.weights import load_weights
from dints.running.progress import remark_on_dice
from dints.running.run import Run, open_run
from dints.running.seeds import seed_everything
from dints.training.cuda_graphs import check_cuda_graphs
from dints.training.losses import check_loss
from dints.training.steps import WeightsTrainer
from dints.training.validation import Scores, Validation, open_validation

log = logging.getLogger("train")


def train(settings: TrainSettings, run: Run) -> None:
    """Retrain an architecture, and keep the network of the best validation."""
    architecture, width, fold = run.on_main(prepare, settings)
    task, patches = fold.task, settings.patches
    inputs = [settings.network.arch_ckpt, settings.network.checkpoint]
    run.begin(course(settings) | fold.to_dict() | {"codes": architecture.codes()}, inputs)
    network = build(architecture, width, settings, task, run)
    input_shape = (patches.num_images_per_batch, task.num_channels, *task.patch_size)
    weights = WeightsTrainer(network, network.parameters(), settings.weights, run, input_shape)

    cache = open_cache(fold, run)
    loader = training_loader(fold.training, cache, patches, run)
    validation = open_validation(fold.validation, cache, settings.window, run)
    length = settings.length.scaled(len(loader))
    iterations = length.num_epochs * len(loader)
    augmented = choose_augmentation([loader], patches, task, run, iterations, len(fold.training))

    facts = facts_of_training(settings, fold, loader, run) | augmented
    best = BestModel(weights.averaged, architecture, width, task, facts, run)
    run.restore(("loss",), task.class_names, network=network, **weights.parts)
    best.restore(validation, len(loader))
    log.info("%s", recipe_line(settings, settings.weights.recipe))
    sizes = len(fold.training), len(fold.validation)
    log.info("%s: %d training cases, %d validation cases", task.name, *sizes)
    size, machine = f"{count_parameters(network):,}", run.precision.describe(run.processes)
    log.info("%s parameters, %d iterations an epoch on %s", size, len(loader), machine)

    for epoch in run.epochs(length.num_epochs):
        weights.schedule(epoch / length.num_epochs)
        for batch in run.steps(loader):
            run.record("loss", weights.step(batch), batch)
        run.end_epoch(learning_rate=weights.learning_rate)

        if length.is_validation_epoch(epoch):
            scores = validation(weights.averaged)
            best.update(scores)
            run.end_validation(scores)
    log.info("the network is %s; infer_dints.py --checkpoint segments with it", best.path)
    remark_on_dice(run.progress.best_dice, run.progress.iteration, len(fold.validation))


class BestModel:
    """Keeps the network of the best validation in a model file.

    Args:
        network: that is validated.
        facts: of its training, beside those that every model file has.
    """

    def __init__(
        self,
        network: DiscreteNetwork,
        architecture: Architecture,
        channel_mul: float,
        task: Task,
        facts: dict[str, object],
        run: Run,
    ):
        self.path = run.folder / "best_metric_model.pth"
        self.network, self.task, self.facts, self.run = network, task, facts, run
        self.settings = network, architecture, channel_mul, task

    def update(self, scores: Scores | None) -> None:
        """Write the network if its validation is the best so far."""
        if not self.run.note_validation(scores, self.path) or not self.run.is_main:
            return
        progress = self.run.progress
        facts = {
            "dice": progress.best_dice,
            "iteration": progress.iteration,
            "version": __version__,
            "run": progress.run,
            "dice_of_classes": scores and scores.per_class,
            **self.facts,
        }
        save_model(self.path, *self.settings, **facts)

    def restore(self, validation: Validation, steps_per_epoch: int) -> None:
        """Bring the run's best validation and the model file together, of a run that is resumed."""
        run, progress = self.run, self.run.progress
        if not run.is_continued:
            return
        written = run.on_main(validation_of, self.path, progress.run)
        if written is not None and written["iteration"] > progress.iteration:
            # A kill came between the file and the last save. That validation is done again, and on
            # a GPU not to the same result: the file's network counts as the best so far.
            iteration = written["iteration"]
            progress.best_dice, progress.best_iteration = written["dice"], iteration
            progress.best_epoch, progress.best_path = iteration // steps_per_epoch, str(self.path)
            log.info("%s is of iteration %d, after the last save", self.path, iteration)
        if progress.best_path is not None and written is None:
            self._replace(validation(self.network))

    def _replace(self, scores: Scores | None) -> None:
        """Write the network as it is now, in the place of a file that was deleted."""
        run, progress = self.run, self.run.progress
        lost, progress.best_dice = progress.best_iteration, None
        self.update(scores)
        now = "" if scores is None else f", {scores.describe(self.task.class_names)}"
        log.warning(
            "%s was gone, with the network of iteration %d: it is written with that of iteration "
            "%d%s",
            *(self.path, lost, progress.iteration, now),
        )
        run.history.write_progress(progress)
        run.checkpoint.save()


def build(
    architecture: Architecture, channel_mul: float, settings: TrainSettings, task: Task, run: Run
) -> DiscreteNetwork:
    """Build the network on the run's device, with the weights of ``--checkpoint`` if given."""
    seed_everything(run.seed, "initialisation")
    network = DiscreteNetwork(architecture, task.num_channels, task.num_classes, channel_mul)
    network.checkpoint_activations = settings.machine.checkpoint_activations
    if settings.network.checkpoint is not None:
        load_weights(network, settings.network.checkpoint, network.unused_stems)
    return network.to(run.device)


def facts_of_training(
    settings: TrainSettings, fold: Fold, loader: TrainingLoader, run: Run
) -> dict[str, object]:
    """Gather what the model file tells later, as infer_dints.py needs it."""
    ranges = ranges_of(fold.training, loader.own_cases(), fold.task)
    return {
        "recipe": settings.weights.recipe,
        "loss": settings.weights.loss,
        "training_cases": [case.name for case in fold.training],
        "validation_cases": [case.name for case in fold.validation],
        "fold": settings.data.fold,
        "num_folds": settings.data.num_folds,
        "data": provenance(settings.data.root, settings.data.json),
        "overlap_ratio": settings.window.overlap_ratio,
        "ranges": joined(run.processes.gather(ranges)),
    }


def prepare(settings: TrainSettings) -> tuple[Architecture, float, Fold]:
    """Load the architecture with its width, and open the fold.

    Whatever can be refused before a voxel is read is refused here.
    """
    path = settings.network.arch_ckpt
    architecture = load_architecture(path)
    check_loss(settings.weights.loss)
    choice = settings.network.strides or ("isotropic" if architecture.is_isotropic else "auto")
    folders, depths = [settings.run.output_root, path.parent], architecture.num_depths
    fold = open_fold(settings.data, folders, strides=choice, num_depths=depths)
    architecture = dataclasses.replace(
        architecture, strides=strides_of(architecture, settings, fold)
    )
    check_patch_size(fold.task.patch_size, architecture.strides)
    check_cuda_graphs(settings)
    # Without --channel_mul, the width that the architecture was judged at.
    width = settings.network.channel_mul or architecture.channel_mul
    check_memory(fold.task, architecture, width, settings)
    return architecture, width, fold


def strides_of(architecture: Architecture, settings: TrainSettings, fold: Fold) -> Strides:
    """Return the architecture's strides, or others where settings ask for them."""
    network = settings.network
    stem = network.use_downsample or ("yes" if architecture.use_downsample else "no")
    if network.strides is not None:
        choices = network.strides, stem, architecture.num_depths
        return network_strides(*choices, fold.cases, fold.task)
    return halved_first(architecture.strides, halves_first(stem, fold.cases, fold.task))


def main(settings: TrainSettings) -> None:
    if settings.run.check:
        from dints.data.check import check  # an extra, which the core does not need

        check(settings.data)
        prepare(settings)
        return
    with open_run(settings.run, settings.machine) as run:
        train(settings, run)


if __name__ == "__main__":
    exit_on_user_error(main, SETTINGS)
