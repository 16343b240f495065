"""Retrain the network that a search found: stage 2 of DiNTS.

    python train_dints.py --arch_ckpt search_code_600.pth --root data_msd/Task09_Spleen --output_root runs/train
    torchrun --standalone --nproc_per_node=8 train_dints.py --arch_ckpt ... --root ... --output_root ...

Builds the architecture in ARCH_CKPT and trains it from scratch, or from the weights in --checkpoint, with as many
processes as torchrun starts. The task may be another than the one that was searched. OUTPUT_ROOT/best_metric_model.pth
is the network of the best validation; infer_dints.py needs nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dints import options
from dints.errors import exit_on_user_error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.parser(__doc__)
    options.add_data(parser)
    options.add_preprocessing(parser)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--arch_ckpt", type=Path, required=True, help="architecture: search_code_*.pth of search_dints.py, or published"
    )
    network.add_argument(
        "--checkpoint", type=Path, help="weights to start from: a model file or a state dict of this architecture"
    )
    network.add_argument("--num_blocks", type=options.number(int, 1), help="blocks that ARCH_CKPT must have")
    network.add_argument("--num_depths", type=options.number(int, 2), help="resolutions that ARCH_CKPT must have")
    network.add_argument(
        "--channel_mul", type=options.number(float, 0.0625), default=1.0, help="times 32, 64, ... channels"
    )
    options.add_training(
        parser,
        num_epochs=13500,
        num_epochs_per_validation=500,
        num_images_per_batch=2,
        learning_rate_milestones=(0.2, 0.4, 0.6, 0.8),
    )
    options.add_window(parser, overlap_ratio=0.5)
    options.add_machine(parser)
    options.add_run(parser)
    args = parser.parse_args(argv)
    complaints = options.training_complaints(args)
    if complaints:
        parser.error("; ".join(complaints))
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports of torch and MONAI, which take seconds, so that -h answers at once

import logging

from dints import __version__, data, dataset, engine, files, runtime
from dints.architecture import Architecture, load_architecture
from dints.cache import open_cache
from dints.checkpoint import Checkpoint, configuration
from dints.dataset import Case
from dints.fingerprint import write_task
from dints.history import History
from dints.network import FoundNetwork, check_patch_size, count_parameters, load_weights, save_model

log = logging.getLogger("train")


def main(args: argparse.Namespace) -> None:
    if args.check:
        return data.check(args, prepare)
    with (
        runtime.started(args.device, args.timeout_minutes) as processes,
        runtime.run_folder(args.output_root, processes) as folder,
    ):
        train(args, processes, folder)


def train(args: argparse.Namespace, processes: runtime.Processes, folder: Path) -> None:
    architecture, opened, training, validation = processes.on_main(prepare, args)
    task, used = opened.task, [*training, *validation]
    runtime.seed_everything(args.seed, "initialisation")
    network = FoundNetwork(architecture, task.num_channels, task.num_classes, args.channel_mul)
    if args.checkpoint is not None:
        load_weights(network, files.load_safely(args.checkpoint), args.checkpoint)
    contents = {"task": task, "cases": dataset.names(used), "architecture": architecture.codes()}
    checkpoint = Checkpoint(folder, args, configuration(args, processes, **contents), processes)
    precision = runtime.choose_precision(checkpoint.precision or args.precision, processes)

    processes.on_main(write_task, folder, task, opened.measured)
    cache = open_cache(used, task, args, processes)
    steps = data.steps_per_epoch(len(training), args.num_images_per_batch, processes)
    args = options.scaled_to_iterations(args, steps)
    loader = data.training_loader(training, "weights", steps, cache, args, processes)
    validation_loader = data.validation_loader(validation, cache, processes)
    window = engine.SlidingWindow(task.patch_size, args.overlap_ratio, args.num_sw_batch_size)

    network.to(processes.device)
    model = runtime.distributed(engine.compiled(network, args.compile, processes.device), processes)
    optimizer = engine.sgd(network.parameters(), args.learning_rate)
    scaler = precision.scaler()
    criterion = engine.segmentation_loss()
    loss = engine.EpochLoss("loss", processes)
    parts = {"network": network, "optimizer": optimizer, "scaler": scaler, "loss": loss}
    progress = checkpoint.restore(parts, precision)
    history = History(folder, task.class_names, progress.recorded_iteration, processes.is_main)
    waited = data.ShareOfWaiting(loader)
    log.info("%s: %d training cases, %d validation cases", task.name, len(training), len(validation))
    log.info(
        "%.2f million parameters, %s", count_parameters(network) / 1e6, engine.describe(steps, processes, precision)
    )

    for epoch in range(progress.epoch, args.num_epochs):
        runtime.seed_everything(args.seed, epoch, processes.rank)
        learning_rate = engine.learning_rate(args, epoch / args.num_epochs, processes)
        engine.set_learning_rate(optimizer, learning_rate)
        if progress.step == 0:
            loss.start()

        with checkpoint.saved_when_stopped():
            with progress.timed():
                for batch in checkpoint.steps(loader.epoch(epoch, progress.step)):
                    step = engine.weights_step(
                        model, batch, criterion, optimizer, scaler, precision, args.max_gradient_norm
                    )
                    loss.add(step, progress.iteration + 1, batch["cases"])
            waiting = {"data_wait": waited.take(progress.seconds_in_epoch)}
            history.add_epoch(progress, {"loss": loss.mean(), "learning_rate": learning_rate, **waiting})

            validates = engine.is_validation_epoch(epoch, args)
            if validates:
                with progress.timed():
                    volumes = checkpoint.unless_stopped(validation_loader)
                    scores = engine.validate(network, volumes, len(validation), task, window, precision, processes)
                checkpoint.stop_if_asked()
        if validates:
            path = folder / "best_metric_model.pth"
            if progress.note_validation(scores and scores.mean, path) and processes.is_main:
                facts = {"dice": progress.best_dice, "iteration": progress.iteration, "version": __version__}
                save_model(path, network, architecture, args.channel_mul, task, **facts)
            history.add_validation(progress, scores)
        progress.epoch_done()
        if validates:
            checkpoint.save()
    history.close()
    log.info("the network is %s; infer_dints.py --checkpoint segments with it", progress.best_path)


def prepare(args: argparse.Namespace) -> tuple[Architecture, data.LabelledDataset, list[Case], list[Case]]:
    """Architecture, dataset, training and validation cases, with all checks that need no computing."""
    architecture = load_architecture(args.arch_ckpt, args.num_blocks, args.num_depths)
    opened = data.open_dataset(args, args.arch_ckpt.parent)
    check_patch_size(opened.task.patch_size, architecture.num_depths)
    return architecture, opened, *dataset.split_fold(opened.cases, args.num_folds, args.fold)


if __name__ == "__main__":
    exit_on_user_error(main, ARGS)
