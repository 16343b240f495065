"""Retrain the network that a search found: stage 2 of DiNTS.

    python train_dints.py --arch_ckpt search_code_600.pth --root data_msd/Task09_Spleen --output_root runs/train
    torchrun --standalone --nproc_per_node=8 train_dints.py --arch_ckpt ... --root ... --output_root ...

Builds the architecture in ARCH_CKPT and trains it from scratch, or from the weights in --checkpoint, with as many
processes as torchrun starts. The task may be another than the one that was searched. OUTPUT_ROOT/best_metric_model.pth
is the network of the best validation; infer_dints.py needs nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from dints import __version__, data, network, options, running, training
from dints.errors import exit_on_user_error

if TYPE_CHECKING:  # PyTorch is imported with the first module that is used, after the command line is read
    from dints.data.cases import Case
    from dints.data.loaders import TrainingLoader, ValidationLoader
    from dints.data.opening import Dataset
    from dints.data.tasks import Task
    from dints.network.architecture import Architecture
    from dints.network.found import FoundNetwork
    from dints.running.precision import Precision
    from dints.running.processes import Processes
    from dints.training.progress import Progress
    from dints.training.steps import WeightsTraining
    from dints.training.validation import Scores

    Prepared = tuple[Architecture, Dataset, list[Case], list[Case]]

log = logging.getLogger("train")

# Options whose values a recipe gives.
OF_RECIPES = ("flip_axes", "learning_rate_schedule", "average_decay", "augmentation", "learning_rate_scaling")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.parser(__doc__)
    options.add_data(parser)
    options.add_preprocessing(parser)
    add_network(parser)
    add_training(parser)
    options.add_window(parser, overlap_ratio=0.5)
    options.add_machine(parser)
    options.add_run(parser)
    args = parser.parse_args(argv)
    complaints = options.training_complaints(args)
    if complaints:
        parser.error("; ".join(complaints))
    options.fill_from_recipe(args, *OF_RECIPES)
    return args


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add which network is trained, from which weights."""
    add = parser.add_argument_group("network").add_argument
    add(
        "--arch_ckpt", type=Path, required=True, help="architecture: search_code_*.pth of search_dints.py, or published"
    )
    add("--checkpoint", type=Path, help="weights to start from: a model file or a state dict of this architecture")
    add(
        "--use_downsample",
        choices=("yes", "no", "auto"),
        help="halve the image before the first node, as published; auto: unless volumes are small "
        "(default: as ARCH_CKPT was searched)",
    )
    add("--num_blocks", type=options.number(int, 1), help="blocks that ARCH_CKPT must have")
    add("--num_depths", type=options.number(int, 2), help="resolutions that ARCH_CKPT must have")
    add(
        "--channel_mul",
        type=options.number(float, 1 / 32),
        help="times 32, 64, ... channels (default: the width that ARCH_CKPT was judged at, else 1)",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add how it is trained: the published retraining's numbers, and what recipes choose."""
    add = options.add_training(
        parser,
        num_epochs=13500,
        num_epochs_per_validation=500,
        num_images_per_batch=2,
        learning_rate_milestones=(0.2, 0.4, 0.6, 0.8),
    ).add_argument
    add(
        "--learning_rate_schedule",
        choices=("halvings", "polynomial"),
        help=options.recipe_help(
            "learning_rate_schedule", "halvings: at the milestones; polynomial: to 0, as (1 - share done) to the 0.9"
        ),
    )
    add(
        "--average_decay",
        type=options.number(float, 0, 0.9999),
        help=options.recipe_help(
            "average_decay",
            "validate and keep a moving average of the weights, in which a step's weights count so much less after "
            "each further step; 0: the weights themselves",
        ),
    )


def main(args: argparse.Namespace) -> None:
    if args.check:
        data.check.check(**options.dataset(args), **options.folds(args))
        prepare(args)
        return
    with (
        running.processes.started(args.device, args.timeout_minutes) as processes,
        running.run_folder.opened(args.output_root, processes) as folder,
    ):
        prepared = processes.on_main(prepare, args)
        if args.resume == "never":
            running.run_folder.start_afresh(folder, processes, [args.arch_ckpt, args.checkpoint])
        train(args, prepared, processes, folder)


def train(args: argparse.Namespace, prepared: Prepared, processes: Processes, folder: Path) -> None:
    architecture, dataset, training_cases, validation_cases = prepared
    args = with_width(args, architecture)
    task, used = dataset.task, [*training_cases, *validation_cases]
    found_network = build(args, architecture, task)
    contents = {"task": task, "cases": data.opening.names(used), "architecture": architecture.codes()}
    configuration = training.checkpoint.configured(options.course(args), processes.world_size, **contents)
    found = processes.on_main(
        training.checkpoint.find_state, folder, configuration, args.resume, args.allow_other_num_processes
    )
    processes.on_main(data.identity.check, folder, used, found is not None, args.allow_changed_data)
    precision = running.precision.choose_precision(found.precision if found else args.precision, processes)

    processes.on_main(data.fingerprint.write_task, folder, task, dataset.measured)
    loader, volumes = read(args, dataset, training_cases, validation_cases, processes)
    args = options.scaled_to_iterations(args, loader.steps)
    flips = data.flips.choose(args.flip_axes, [loader], task, processes)
    iterations = args.num_epochs * loader.steps
    seen = iterations * args.num_images_per_batch * processes.world_size / len(training_cases)
    augmentation = data.augmentation.chosen(args.augmentation, iterations, seen)
    loader.augment_by(data.augmentation.chain(augmentation, flips.axes))
    waited = data.loaders.ShareOfWaiting(loader)
    window = training.windows.SlidingWindow(task.patch_size, **options.window(args))
    validation = training.validation.Validation(volumes, task.num_classes, window, precision, processes)

    weights = weights_training(args, found_network, task, precision, processes)
    kept_network = found_network if weights.average is None else weights.average.module  # validated and written
    losses = training.losses.EpochLoss("loss", processes)
    parts = {"network": found_network, **weights.parts, "loss": losses}
    checkpoint = training.checkpoint.Checkpoint(folder, configuration, parts, precision, processes)
    requests = training.stops.Requests(args.warning_signal)
    stops = training.stops.Stops(checkpoint, processes, requests, args.save_minutes)
    progress = checkpoint.restore(found)
    history = training.history.History(folder, task.class_names, progress.recorded_iteration, processes.is_main)
    log.info("%s", options.recipe_line(args, *OF_RECIPES))
    log.info("%s: %d training cases, %d validation cases", task.name, len(training_cases), len(validation_cases))
    parameters = network.found.count_parameters(found_network)
    log.info(
        "%s parameters, %d iterations an epoch on %s", f"{parameters:,}", loader.steps, precision.describe(processes)
    )

    facts = {"recipe": args.recipe, "flips": flips.to_dict(), "augmentation": augmentation}
    facts |= facts_of_data(args, training_cases, validation_cases, loader, task, processes)
    best = BestNetwork(
        folder / "best_metric_model.pth", kept_network, architecture, args.channel_mul, task, facts, processes
    )
    if found is not None:
        best.hold_against(progress, loader.steps)
    if best.is_lost(progress):
        best.replace(progress, validation.scores(kept_network))
        history.write_progress(progress)
        checkpoint.save()
    for epoch in range(progress.epoch, args.num_epochs):
        running.seeds.seed_everything(args.seed, epoch, processes.rank)
        start = args.learning_rate * options.learning_rate_factor(args, processes.world_size)
        learning_rate = training.steps.scheduled(
            args.learning_rate_schedule, start, epoch / args.num_epochs, args.learning_rate_milestones
        )
        weights.set_learning_rate(learning_rate)
        if progress.step == 0:
            losses.start()

        for batch in stops.steps(loader.epoch(epoch, progress.step)):
            losses.add(training.steps.weights_step(weights, batch), progress.iteration, batch["cases"])
            progress.step_done()
        waiting = waited.take(progress.seconds_in_epoch)
        history.add_epoch(progress, {"loss": losses.mean(), "learning_rate": learning_rate, "data_wait": waiting})

        validates = training.steps.is_validation_epoch(epoch, args.num_epochs, args.num_epochs_per_validation)
        if validates:
            scores = validation.scores(kept_network, stops.volumes)
        progress.epoch_done()
        if validates:
            best.keep(progress, scores)
            history.add_validation(progress, scores)
            checkpoint.save()
    history.close()
    log.info("the network is %s; infer_dints.py --checkpoint segments with it", progress.best_path)
    training.progress.remark_on_dice(progress.best_dice, progress.iteration, len(validation_cases))


def prepare(args: argparse.Namespace) -> Prepared:
    """Load the architecture, open the dataset and divide its cases into training and validation; no voxel is read.

    Whatever can be refused before that is refused here.
    """
    architecture = network.architecture.load_architecture(args.arch_ckpt, args.num_blocks, args.num_depths)
    measured_in = [args.output_root, args.arch_ckpt.parent]
    dataset = data.opening.open_dataset(**options.dataset(args), measured_in=measured_in)
    if args.use_downsample is not None:
        use_downsample = data.fingerprint.use_downsample(args.use_downsample, dataset.cases, dataset.task)
        architecture = dataclasses.replace(architecture, use_downsample=use_downsample)
    network.found.check_patch_size(dataset.task.patch_size, architecture.num_depths, architecture.use_downsample)
    training.cuda_graphs.check(args.cuda_graphs, options.step(args)["device"])
    network.step_memory.check(
        dataset.task, architecture, with_width(args, architecture).channel_mul, **options.step(args)
    )
    return architecture, dataset, *data.listing.split_fold(dataset.cases, **options.folds(args))


def with_width(args: argparse.Namespace, architecture: Architecture) -> argparse.Namespace:
    """Return the options with the width that the architecture was judged at, where none is given."""
    channel_mul = architecture.channel_mul if args.channel_mul is None else args.channel_mul
    return argparse.Namespace(**{**vars(args), "channel_mul": channel_mul})


def read(
    args: argparse.Namespace,
    dataset: Dataset,
    training_cases: list[Case],
    validation_cases: list[Case],
    processes: Processes,
) -> tuple[TrainingLoader, ValidationLoader]:
    """Prepare the cases: patches to train on, and whole volumes to validate on."""
    used = [*training_cases, *validation_cases]
    cache = data.cache.open_cache(
        used, dataset.task, options.cache_folder(args), processes, mode=args.cache, leniency=dataset.leniency
    )
    steps = data.loaders.steps_per_epoch(len(training_cases), args.num_images_per_batch, processes)
    patches = data.loaders.training_loader(training_cases, cache, processes, steps=steps, **options.batches(args))
    return patches, data.loaders.validation_loader(validation_cases, cache, processes)


def facts_of_data(
    args: argparse.Namespace,
    training_cases: list[Case],
    validation_cases: list[Case],
    loader: TrainingLoader,
    task: Task,
    processes: Processes,
) -> dict[str, object]:
    """Gather what infer_dints.py goes by: which cases are not new to the model, and what volumes are like."""
    ranges = data.plausibility.ranges_of(training_cases, loader.own_cases(), task)
    names = {"training_cases": training_cases, "validation_cases": validation_cases}
    return {
        **{key: [case.name for case in cases] for key, cases in names.items()},
        **options.folds(args),
        "data": data.formats.provenance(args.root, args.json),
        "overlap_ratio": args.overlap_ratio,
        "ranges": data.plausibility.joined(processes.gather(ranges)),
    }


def build(args: argparse.Namespace, architecture: Architecture, task: Task) -> FoundNetwork:
    """Build the found network, with the weights of ``--checkpoint`` where that is given."""
    running.seeds.seed_everything(args.seed, "initialisation")
    found_network = network.found.FoundNetwork(architecture, task.num_channels, task.num_classes, args.channel_mul)
    found_network.checkpoint_activations = args.checkpoint_activations
    if args.checkpoint is not None:
        network.weights.load_weights(found_network, args.checkpoint, found_network.unused_stems)
    return found_network


def weights_training(
    args: argparse.Namespace, found_network: FoundNetwork, task: Task, precision: Precision, processes: Processes
) -> WeightsTraining:
    """Move the network to its device, and make what trains it there."""
    found_network.to(processes.device)
    image_shape = args.num_images_per_batch, task.num_channels, *task.patch_size
    return training.steps.weights_training(
        training.steps.computing(found_network, image_shape, precision, **options.manner(args)),
        found_network.parameters(),
        precision,
        processes,
        learning_rate=args.learning_rate,
        max_gradient_norm=args.max_gradient_norm,
        average=training.steps.averaged(found_network, args.average_decay),
    )


@dataclasses.dataclass(frozen=True)
class BestNetwork:
    """Keeps the network of the best validation in a model file.

    Attributes:
        network: that is validated.
        facts: beside what every model file has.
    """

    path: Path
    network: FoundNetwork
    architecture: Architecture
    channel_mul: float
    task: Task
    facts: dict[str, object]
    processes: Processes

    def keep(self, progress: Progress, scores: Scores | None) -> None:
        """Write the network if its validation is the best so far."""
        if progress.note_validation(scores and scores.mean, self.path) and self.processes.is_main:
            found = {"dice": progress.best_dice, "iteration": progress.iteration, "version": __version__}
            found |= {"run": progress.run, "dice_of_classes": scores and scores.per_class}
            settings = self.network, self.architecture, self.channel_mul, self.task
            network.model_file.save_model(self.path, *settings, **found, **self.facts)

    def hold_against(self, progress: Progress, steps_per_epoch: int) -> None:
        """Count the file's network as the best so far where it is of after the last save: a kill came between the two.

        The validation that it was the best of is done again, and on a GPU not to the same result.
        """
        noted = self.processes.on_main(network.model_file.validation_of, self.path, progress.run)
        if noted is not None and noted["iteration"] > progress.iteration:
            progress.best_dice, progress.best_iteration = noted["dice"], noted["iteration"]
            progress.best_epoch, progress.best_path = noted["iteration"] // steps_per_epoch, str(self.path)
            log.info("%s is of iteration %d, after the last save: it is the best so far", self.path, noted["iteration"])

    def is_lost(self, progress: Progress) -> bool:
        """Tell whether the run wrote a model file that is no longer there."""
        return progress.best_path is not None and not self.processes.on_main(self.path.is_file)

    def replace(self, progress: Progress, scores: Scores | None) -> None:
        """Put the network as it is now, newly validated, in the place of the file that is lost."""
        lost, progress.best_dice = progress.best_iteration, None
        self.keep(progress, scores)
        log.warning(
            "%s was gone, with the network of iteration %d: it is written anew, with that of iteration %d%s",
            *(
                self.path,
                lost,
                progress.iteration,
                "" if scores is None else f", {scores.describe(self.task.class_names)}",
            ),
        )


if __name__ == "__main__":
    exit_on_user_error(main, parse_args())
