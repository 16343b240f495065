"""Search a network topology for a 3D segmentation task: stage 1 of DiNTS.

    python search_dints.py --root data_msd/Task09_Spleen --output_root runs/search
    torchrun --standalone --nproc_per_node=8 search_dints.py --root data_msd/Task07_Pancreas --output_root runs/search

A supernet holds every path between 4 resolutions in 12 blocks, and five operations on each path. Half of the training
cases train its weights; the other half trains the probabilities of paths and operations, in turn, once the weights are
warm. Three more terms push the probabilities towards a decision, a connected topology and a memory budget. The most
probable connected network is written at every validation as OUTPUT_ROOT/search_code_<iteration>.pth, which
train_dints.py retrains.

With --candidates, what comes of that competes: with U shapes, random architectures and mutants of the best, each as
wide as fills the same memory. Short trainings judge them, on cases of the training folds. The winner is written as
OUTPUT_ROOT/search_code_winner.pth, and candidates.csv has all results.

He et al., DiNTS: Differentiable Neural Network Topology Search for 3D Medical Image Segmentation, CVPR 2021.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dints import __version__, candidates, data, network, options, running, training
from dints.errors import UserError, exit_on_user_error

if TYPE_CHECKING:  # PyTorch is imported with the first module that is used, after the command line is read
    import torch
    from torch import nn

    from dints.candidates.halving import Ledger
    from dints.candidates.proposals import Limits
    from dints.candidates.trainings import ShortTrainings
    from dints.data.cases import Case
    from dints.data.loaders import TrainingLoader, ValidationLoader
    from dints.data.opening import Dataset
    from dints.data.tasks import Task
    from dints.network.architecture import Architecture
    from dints.network.space import SearchSpace
    from dints.running.precision import Precision
    from dints.running.processes import Processes
    from dints.training.progress import Progress
    from dints.training.stops import Requests

log = logging.getLogger("search")

OF_RECIPES = ("use_downsample", "flip_axes", "learning_rate_scaling")  # options whose values a recipe gives
PROPOSALS = ("gradient", "by_hand", "random")  # `candidates.proposals.KINDS`, which -h need not import


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.parser(__doc__)
    options.add_data(parser)
    options.add_preprocessing(parser)
    add_search_space(parser)
    add_training(parser)
    add_candidates(parser)
    options.add_window(parser, overlap_ratio=0.625)
    options.add_machine(parser)
    options.add_run(parser)
    args = parser.parse_args(argv)
    complaints = options.training_complaints(args)
    if args.num_epochs_warmup >= args.num_epochs:
        complaints.append(f"--num_epochs_warmup {args.num_epochs_warmup} must be below --num_epochs {args.num_epochs}")
    complaints += candidates_complaints(args)
    if complaints:
        parser.error("; ".join(complaints))
    options.fill_from_recipe(args, *OF_RECIPES)
    args.augmentation = args.augmentation or "published"  # what recipes say of it was measured in retrainings
    return args


def add_search_space(parser: argparse.ArgumentParser) -> None:
    """Add what a search chooses from, and from which weights it starts."""
    add = parser.add_argument_group("search space").add_argument
    add("--num_blocks", type=options.number(int, 1, options.MAX_BLOCKS), default=12, help="blocks, one after another")
    add(
        "--num_depths",
        type=options.number(int, 2, options.MAX_DEPTHS),
        default=4,
        help="resolutions, each half of the last",
    )
    add("--channel_mul", type=options.number(float, 0.0625), default=0.5, help="times 32, 64, ... channels")
    add(
        "--use_downsample",
        choices=("yes", "no", "auto"),
        help=options.recipe_help(
            "use_downsample", "halve the image before the first node, as published; auto: unless volumes are small"
        ),
    )
    add(
        "--keep_finest",
        action="store_true",
        default=None,  # not False, so that runs from before it go on: see `options.course`
        help="keep the path along the finest resolution active in every block (default: a path like any other)",
    )
    add(
        "--operations",
        nargs="+",
        metavar="NAME",
        help="what a path may hold, of the table in dints/network/operations.py (default: the published five)",
    )
    add(
        "--checkpoint",
        type=Path,
        help="weights to start from: latest.pth of a search in this space, or a state dict of MONAI's supernet",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add how weights and architecture are trained: the published search's numbers, and the memory aimed at."""
    add = options.add_training(
        parser,
        num_epochs=1430,
        num_epochs_per_validation=100,
        num_images_per_batch=1,
        learning_rate_milestones=(0.4, 0.8),
    ).add_argument
    add("--num_epochs_warmup", type=options.number(int, 0), default=715, help="epochs before the architecture learns")
    add("--learning_rate_arch", type=options.positive, default=1e-3, help="of the architecture, for one process")
    add(
        "--factor_ram_cost",
        type=options.number(float, 0, 1),
        default=0.8,
        help="memory that the search aims at: feature maps, as a share of those with every path active",
    )
    add(
        "--ram_budget",
        choices=("published", "fixed"),
        default="published",
        help="what that share is of. published: the same operations on every path, so that only paths count; "
        "fixed: the dearest operation on every path, so that operations count too",
    )
    add(
        "--max_ram_ratio",
        type=options.number(float, 0, 1),
        help="write the most probable architecture within this share of the fixed budget (default: the most probable)",
    )
    add(
        "--ram_loss",
        choices=("distance", "excess"),
        default="distance",
        help="memory's term in the architecture's loss. distance: how far it is from the RAM factor, as published; "
        "excess: by how much it is above",
    )
    add(
        "--loss_weights",
        type=options.number(float, 0, 1e6),
        nargs=4,
        metavar=("ENTROPY_A", "ENTROPY_C", "RAM", "TOPOLOGY"),
        default=[1.0, 1.0, 1.0, 0.001],
        help="of the terms that the architecture minimises beside the segmentation loss",
    )
    add(
        "--ramp",
        type=options.number(float, 0, 1, above=True),
        default=1.0,
        help="share of the epochs after the warm-up in which these weights rise from 0; for the rest they stay",
    )


def add_candidates(parser: argparse.ArgumentParser) -> None:
    """Add what competes after the gradient search, and how it is judged."""
    add = parser.add_argument_group("candidates").add_argument
    add(
        "--candidates",
        type=options.number(int, 0),
        default=0,
        help="architectures that compete in short trainings: half of them proposed, half mutants of the best of these; "
        "a quarter reaches the second rung, an eighth the third; 0: none do, as published",
    )
    add(
        "--proposals",
        nargs="+",
        choices=PROPOSALS,
        default=list(PROPOSALS),
        help="what is proposed, in turn; without gradient there is no gradient search",
    )
    add(
        "--memory_mib",
        type=options.positive,
        help="memory that each candidate's width fills: what a training step keeps, activations and 16 bytes a "
        "parameter, in fp32 (default: --factor_ram_cost of what every path takes at --channel_mul)",
    )
    add("--candidate_iterations", type=options.number(int, 4), default=4000, help="of a training of the last rung")
    add("--candidate_learning_rate", type=options.positive, default=0.05, help="at the start of a candidate's training")
    add("--candidate_images_per_batch", type=options.number(int, 1), default=2, help="patches a step of a candidate")


def candidates_complaints(args: argparse.Namespace) -> list[str]:
    """List what is wrong with the options of `add_candidates` taken together."""
    found = []
    if args.candidates == 1:
        found.append("--candidates 1 has nothing to compete with: give 2 or more")
    if args.candidates and args.memory_mib is None and args.factor_ram_cost == 0:
        found.append("--candidates needs --memory_mib, which all of them fill, where --factor_ram_cost is 0")
    if not args.candidates and "gradient" not in args.proposals:
        found.append(f"--proposals {' '.join(args.proposals)} needs --candidates")
    return found


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
            running.run_folder.start_afresh(folder, processes, [args.checkpoint])
        space = search(args, prepared, processes, folder) if "gradient" in args.proposals else None
        if args.candidates:
            running.machine.free_memory()  # of the supernet and what trained it
            compete(args, prepared, space, processes, folder)


def search(args: argparse.Namespace, prepared: Prepared, processes: Processes, folder: Path) -> SearchSpace:
    """Search by gradient descent; return the space with the probabilities that were found, without its weights."""
    dataset, use_downsample, training_cases, validation_cases = prepared
    weights_cases, arch_cases = halves(training_cases, args.seed)
    task, used = dataset.task, [*weights_cases, *arch_cases, *validation_cases]
    contents = {"task": task, "cases": data.opening.names(used)}
    configuration = training.checkpoint.configured(options.course(args), processes.world_size, **contents)
    found = processes.on_main(
        training.checkpoint.find_state, folder, configuration, args.resume, args.allow_other_num_processes
    )
    precision = running.precision.choose_precision(found.precision if found else args.precision, processes)
    # First, so that a --checkpoint that does not fit costs no reading.
    supernet = Supernet(args, task, precision, processes, use_downsample)

    processes.on_main(data.identity.check, folder, used, found is not None, args.allow_changed_data)
    processes.on_main(data.fingerprint.write_task, folder, task, dataset.measured)
    weights_loader, arch_loader, volumes = read(args, dataset, weights_cases, arch_cases, validation_cases, processes)
    steps = weights_loader.steps
    args = options.scaled_to_iterations(args, steps)
    flips = data.flips.choose(args.flip_axes, [weights_loader, arch_loader], task, processes)
    iterations = args.num_epochs * steps
    seen = iterations * args.num_images_per_batch * processes.world_size / len(weights_cases)
    augmentation = data.augmentation.chosen(args.augmentation, iterations, seen)
    for loader in (weights_loader, arch_loader):
        loader.augment_by(data.augmentation.chain(augmentation, flips.axes))
    window = training.windows.SlidingWindow(task.patch_size, **options.window(args))
    validation = training.validation.Validation(volumes, task.num_classes, window, precision, processes)

    row = EpochRow(supernet, data.loaders.ShareOfWaiting(weights_loader, arch_loader))
    parts = {**supernet.parts, **row.parts}
    checkpoint = training.checkpoint.Checkpoint(folder, configuration, parts, precision, processes)
    requests = training.stops.Requests(args.warning_signal)
    stops = training.stops.Stops(checkpoint, processes, requests, args.save_minutes)
    progress = checkpoint.restore(found)
    history = training.history.History(folder, task.class_names, progress.recorded_iteration, processes.is_main)
    log.info("%s", options.recipe_line(args, *OF_RECIPES))
    log.info("%s: cases %d + %d, validation %d", task.name, *map(len, (weights_cases, arch_cases, validation_cases)))
    log.info("%d iterations an epoch on %s", steps, precision.describe(processes))

    for epoch in range(progress.epoch, args.num_epochs):
        running.seeds.seed_everything(args.seed, epoch, processes.rank)
        warmed_up, past = warm_up(epoch, args.num_epochs_warmup, args.num_epochs)
        learning_rate = training.steps.halved(supernet.learning_rate, past, args.learning_rate_milestones)
        supernet.set_learning_rates(learning_rate)
        row.start(progress)

        arch_batches = arch_loader.epoch(epoch, progress.step) if warmed_up else itertools.repeat(None)
        batches = zip(weights_loader.epoch(epoch, progress.step), arch_batches, strict=False)
        for weights_batch, arch_batch in stops.steps(batches):
            row.weights.add(weights_step(supernet, weights_batch), progress.iteration, weights_batch["cases"])
            if warmed_up:
                ramp = min(1.0, past / args.ramp)
                row.arch.add(architecture_step(supernet, arch_batch, ramp), progress.iteration, arch_batch["cases"])
            progress.step_done()
        history.add_epoch(progress, {"learning_rate": learning_rate, **row.values(progress, warmed_up)})

        validates = training.steps.is_validation_epoch(epoch, args.num_epochs, args.num_epochs_per_validation)
        if validates:
            scores = validation.scores(supernet.network, stops.volumes)
        progress.epoch_done()
        if validates:
            path = folder / f"search_code_{progress.iteration}.pth"
            progress.note_validation(scores and scores.mean, path)
            if processes.is_main:
                write_architecture(path, decode(supernet.space, progress, args, task), task, processes.device)
            history.add_validation(progress, scores)
            checkpoint.save()
    history.close()
    path = folder / f"search_code_{progress.iteration}.pth"
    if processes.is_main and not path.is_file():  # it was deleted after the search had ended
        write_architecture(path, decode(supernet.space, progress, args, task), task, processes.device)
        log.warning("%s was gone: it is written anew, as it was", path)
    log.info("found: %s; train_dints.py --arch_ckpt retrains it", path)
    training.progress.remark_on_dice(progress.best_dice, progress.iteration, len(validation_cases))
    return supernet.space.without_weights()


def weights_step(supernet: Supernet, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Take one step of the weights, the architecture being fixed; return the segmentation loss."""
    with frozen(supernet.arch_parameters):
        return training.steps.weights_step(supernet.weights, batch)


def architecture_step(supernet: Supernet, batch: dict[str, torch.Tensor], ramp: float) -> torch.Tensor:
    """Take one step of the path and operation probabilities, the weights being fixed; return the segmentation loss.

    It runs on the unwrapped network: the only gradients to average are a few hundred numbers, in one all-reduce.
    """
    image, label = training.steps.to_device(batch, supernet.processes.device)
    for optimizer in supernet.arch_optimizers:
        optimizer.zero_grad()
    with frozen(supernet.weights_parameters):
        with supernet.precision.autocast():
            scores = supernet.computing(image)
        segmentation = supernet.weights.criterion(scores.float(), label)
        terms = regularisers(supernet.space, supernet.input_shape, supernet.ram_budget)
        loss = segmentation + ramp * architecture_loss(terms, *supernet.loss_settings)
        supernet.arch_scaler.scale(loss).backward()
    supernet.processes.average_gradients(supernet.arch_parameters)
    for optimizer, alpha in zip(supernet.arch_optimizers, supernet.arch_parameters, strict=True):
        training.steps.step_if_finite(optimizer, supernet.arch_scaler, alpha.grad)
    supernet.arch_scaler.update()
    return segmentation.detach()


def architecture_loss(
    terms: dict[str, torch.Tensor], factor_ram_cost: float, ram_loss: str, weights: Sequence[float]
) -> torch.Tensor:
    """Add up what the architecture minimises beside the segmentation loss."""
    excess = terms["ram_ratio"] - factor_ram_cost
    ram = excess.abs() if ram_loss == "distance" else excess.relu()
    return sum(
        weight * term
        for weight, term in zip(weights, (terms["entropy_a"], terms["entropy_c"], ram, terms["topology"]), strict=True)
    )


def regularisers(space: SearchSpace, input_shape: tuple[int, ...], ram_budget: str) -> dict[str, torch.Tensor]:
    """Compute the entropies of paths, operations and topology, and the memory as a share of the budget."""
    children, path_probs = space.get_prob_a(child=True)
    operations = space.log_alpha_c.log_softmax(-1)
    return {
        "entropy_a": -(children * (children + 1e-5).log()).mean(),
        "entropy_c": -(operations.exp() * operations).mean(),
        "topology": space.get_topology_entropy(children),
        "ram_ratio": space.ram_ratio(input_shape, ram_budget, path_probs),
    }


def warm_up(epoch: int, num_epochs_warmup: int, num_epochs: int) -> tuple[bool, float]:
    """Tell whether the architecture learns in an epoch, and how far (0 to 1) the training is past the warm-up."""
    past = epoch - num_epochs_warmup
    return past >= 0, max(0.0, past / (num_epochs - num_epochs_warmup))


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


def compete(
    args: argparse.Namespace, prepared: Prepared, space: SearchSpace | None, processes: Processes, folder: Path
) -> None:
    """Let candidates compete in short trainings, rung by rung, and write the winner."""
    first, *others = candidates.halving.rungs(args.candidates, args.candidate_iterations)
    ledger, channel_step = open_ledger(args, prepared, processes, folder)
    limits = limits_of_candidates(args, prepared, channel_step)

    count = -(-first.count // 2)
    members = processes.on_main(candidates.proposals.proposed, count, args.proposals, limits, space, args.seed)
    results = ledger.results(members, first.iterations)
    parents = candidates.halving.best(members, results, max(1, first.count // 4))
    count = first.count - count
    mutants = processes.on_main(candidates.proposals.mutants, count, parents, members, limits, args.seed)
    members, results = [*members, *mutants], results | ledger.results(mutants, first.iterations)
    for rung in others:
        members = candidates.halving.best(members, results, rung.count)
        results = ledger.results(members, rung.iterations)
    (winner,) = candidates.halving.best(members, results, 1)

    path = folder / "search_code_winner.pth"
    if processes.is_main:
        task, dice = prepared.dataset.task, results[winner.name].dice
        facts = {"task": task.name, "seed": args.seed, "memory_mib": limits.memory_mib, "version": __version__}
        facts |= options.folds(args)
        write_architecture(path, winner.described(dice, **facts), task, processes.device)
        training.curves.draw_candidates(folder)
    log.info("the winner is %s: %s; train_dints.py --arch_ckpt retrains it", winner.name, path)
    judging_cases = candidates.trainings.divided(prepared.training_cases)[1]
    training.progress.remark_on_dice(results[winner.name].dice, args.candidate_iterations, len(judging_cases))


# Below: what is made before the loop, and what it writes.


class Prepared(NamedTuple):
    """The dataset, whether the supernet halves the image first, and the cases that train and that validate."""

    dataset: Dataset
    use_downsample: bool
    training_cases: list[Case]
    validation_cases: list[Case]


def prepare(args: argparse.Namespace) -> Prepared:
    """Open the dataset and divide its cases; no voxel is read.

    Whatever can be refused before that is refused here.
    """
    network.operations.check_names(args.operations or network.operations.PUBLISHED)
    dataset = data.opening.open_dataset(**options.dataset(args), measured_in=[args.output_root])
    use_downsample = data.fingerprint.use_downsample(args.use_downsample, dataset.cases, dataset.task)
    network.found.check_patch_size(dataset.task.patch_size, args.num_depths, use_downsample)
    training.cuda_graphs.check(args.cuda_graphs, options.step(args)["device"])
    check_memory_of_supernet(args, dataset.task, use_downsample)
    training_cases, validation_cases = data.listing.split_fold(dataset.cases, **options.folds(args), least_training=2)
    prepared = Prepared(dataset, use_downsample, training_cases, validation_cases)
    if args.candidates:
        check_candidates(args, prepared)
    return prepared


def check_memory_of_supernet(args: argparse.Namespace, task: Task, use_downsample: bool) -> None:
    """Refuse patches that this machine cannot hold, and a supernet whose steps it cannot."""
    if "gradient" in args.proposals:
        operations = args.operations or network.operations.PUBLISHED
        every_path = network.step_memory.within_supernet(args.num_blocks, args.num_depths, operations, use_downsample)
        network.step_memory.check(task, every_path, args.channel_mul, **options.step(args), num_loaders=2)


def check_candidates(args: argparse.Namespace, prepared: Prepared) -> None:
    """Say what will compete; refuse patches and a memory that this machine cannot hold, or that hold no network."""
    step = options.step(args) | {"batch_size": args.candidate_images_per_batch, "flag": "--candidate_images_per_batch"}
    limits = limits_of_candidates(args, prepared)
    network.step_memory.check(prepared.dataset.task, None, 1.0, **step, memory_mib=limits.memory_mib)
    limits.check()
    rungs = candidates.halving.rungs(args.candidates, args.candidate_iterations)
    told = ", then ".join(f"{rung.count} candidates at {rung.iterations} iterations" for rung in rungs)
    log.info("%s, each as wide as fills %.6g MiB in a training step", told, limits.memory_mib)


def limits_of_candidates(args: argparse.Namespace, prepared: Prepared, channel_step: int = 1) -> Limits:
    """Gather what every candidate keeps to."""
    task = prepared.dataset.task
    operations = tuple(args.operations or network.operations.PUBLISHED)
    space = args.num_blocks, args.num_depths, operations, prepared.use_downsample
    shapes = (args.candidate_images_per_batch, task.num_channels, *task.patch_size), task.num_classes
    memory_mib = args.memory_mib or candidates.proposals.memory_of_share(
        args.factor_ram_cost, *space, args.channel_mul, *shapes
    )
    return candidates.proposals.Limits(memory_mib, *space, bool(args.keep_finest), *shapes, channel_step)


def open_ledger(args: argparse.Namespace, prepared: Prepared, processes: Processes, folder: Path) -> tuple[Ledger, int]:
    """Find which trainings of candidates are done, and prepare the others; return also their channels' step."""
    competing = [name for name in vars(args) if name.startswith("candidate")] + ["proposals", "memory_mib"]
    settings = {**options.course(args), **{name: getattr(args, name) for name in competing}}
    contents = {"task": prepared.dataset.task, "cases": data.opening.names(prepared.training_cases)}
    configuration = training.checkpoint.configured(settings, 1, **contents)  # any number of processes finds the same
    precision = running.precision.choose_precision(args.precision, processes)
    manner = {
        "precision": precision.name,
        "channel_step": candidates.proposals.CHANNEL_STEP[processes.device.type],
    }
    place = folder / "candidates"
    is_continued = (place / candidates.halving.SETTINGS).exists()
    manner = processes.on_main(candidates.halving.open_folder, place, configuration, manner)
    processes.on_main(data.identity.check, place, prepared.training_cases, is_continued, args.allow_changed_data)
    requests = training.stops.Requests(args.warning_signal)
    precision = running.precision.choose_precision(manner["precision"], processes)
    train = short_trainings(args, prepared, precision, processes, requests)
    return candidates.halving.Ledger(folder, processes, requests, train, rows=[]), manner["channel_step"]


def short_trainings(
    args: argparse.Namespace, prepared: Prepared, precision: Precision, processes: Processes, requests: Requests
) -> ShortTrainings:
    """Prepare the training cases, all of them on each rank: ranks train other candidates."""
    task, alone = prepared.dataset.task, processes.alone()
    training_cases, judging_cases = candidates.trainings.divided(prepared.training_cases)
    kept = {"mode": args.cache, "leniency": prepared.dataset.leniency, "on_every_rank": True}
    cache = data.cache.open_cache(prepared.training_cases, task, options.cache_folder(args), processes, **kept)
    patches = {**options.batches(args), "batch_size": args.candidate_images_per_batch, "stream": "candidates"}
    patches["steps"] = data.loaders.steps_per_epoch(len(training_cases), patches["batch_size"], alone)
    loader = data.loaders.training_loader(training_cases, cache, alone, **patches)
    flips = data.flips.choose(args.flip_axes, [loader], task, alone)
    seen = args.candidate_iterations * patches["batch_size"] / len(training_cases)
    augmentation = data.augmentation.chosen(args.augmentation, args.candidate_iterations, seen)
    loader.augment_by(data.augmentation.chain(augmentation, flips.axes))
    window = training.windows.SlidingWindow(task.patch_size, **options.window(args))
    volumes = data.loaders.validation_loader(judging_cases, cache, alone)
    validation = training.validation.Validation(volumes, task.num_classes, window, precision, alone)
    settings = args.candidate_learning_rate, args.seed, args.save_minutes
    return candidates.trainings.ShortTrainings(task, loader, validation, requests, *settings)


def read(
    args: argparse.Namespace,
    dataset: Dataset,
    weights_cases: list[Case],
    arch_cases: list[Case],
    validation_cases: list[Case],
    processes: Processes,
) -> tuple[TrainingLoader, TrainingLoader, ValidationLoader]:
    """Prepare the cases: patches to train weights on, others for the architecture, and whole volumes to validate on."""
    used = [*weights_cases, *arch_cases, *validation_cases]
    cache = data.cache.open_cache(
        used, dataset.task, options.cache_folder(args), processes, mode=args.cache, leniency=dataset.leniency
    )
    steps = data.loaders.steps_per_epoch(len(weights_cases), args.num_images_per_batch, processes)
    patches = {"steps": steps, **options.batches(args)}
    weights_loader = data.loaders.training_loader(weights_cases, cache, processes, stream="weights", **patches)
    arch_loader = data.loaders.training_loader(arch_cases, cache, processes, stream="architecture", **patches)
    return weights_loader, arch_loader, data.loaders.validation_loader(validation_cases, cache, processes)


def halves(cases: list[Case], seed: int) -> tuple[list[Case], list[Case]]:
    """Shuffle two cases or more, and return those that train the weights and those that train the architecture.

    An odd case trains the architecture, as published.
    """
    order = running.seeds.permutation(len(cases), seed, "halves")
    middle = len(cases) // 2
    return [cases[number] for number in order[:middle]], [cases[number] for number in order[middle:]]


class Supernet:
    """The search space in MONAI's `DiNTS`, and what trains it: SGD for the weights, Adam for the architecture.

    Attributes:
        network: for saving and validating; ``computing`` computes the same in an architecture step.
        weights: what trains them, over all processes.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        task: Task,
        precision: Precision,
        processes: Processes,
        use_downsample: bool = True,
    ):
        self.precision, self.processes = precision, processes
        self.factor_ram_cost, self.ram_budget = args.factor_ram_cost, args.ram_budget
        self.loss_settings = args.factor_ram_cost, args.ram_loss, args.loss_weights
        factor = options.learning_rate_factor(args, processes.world_size)
        self.learning_rate, self.learning_rate_arch = args.learning_rate * factor, args.learning_rate_arch * factor
        self.max_ram_ratio = args.max_ram_ratio
        self.input_shape = (args.num_images_per_batch, task.num_channels, *task.patch_size)

        running.seeds.seed_everything(args.seed, "initialisation")
        operations = args.operations or network.operations.PUBLISHED
        size = args.channel_mul, args.num_blocks, args.num_depths
        self.space = network.space.SearchSpace(*size, operations, use_downsample, bool(args.keep_finest))
        self.space.checkpoint_activations = args.checkpoint_activations
        check_max_ram_ratio(args.max_ram_ratio, self.space)
        self.network = network.space.supernet(self.space, task.num_channels, task.num_classes)
        if args.checkpoint is not None:
            network.weights.load_weights(self.network, args.checkpoint)
        self.network.to(processes.device)

        self.arch_parameters = [self.space.log_alpha_a, self.space.log_alpha_c]
        is_arch = {id(alpha) for alpha in self.arch_parameters}
        self.weights_parameters = [weight for weight in self.network.parameters() if id(weight) not in is_arch]
        manner = self.input_shape, precision
        with frozen(self.weights_parameters):  # each kind of step has its own: a CUDA graph is of certain gradients
            self.computing = training.steps.computing(self.network, *manner, **options.manner(args))
        with frozen(self.arch_parameters):  # DDP averages the weights' gradients only; `architecture_step` the others
            self.weights = training.steps.weights_training(
                training.steps.computing(self.network, *manner, **options.manner(args)),
                self.weights_parameters,
                precision,
                processes,
                learning_rate=args.learning_rate,
                max_gradient_norm=args.max_gradient_norm,
            )
        self.arch_optimizers = [training.steps.adam([alpha], self.learning_rate_arch) for alpha in self.arch_parameters]
        self.arch_scaler = precision.scaler()

    def set_learning_rates(self, of_weights: float) -> None:
        """Set both rates: a state that is continued on another number of processes has that number's."""
        self.weights.set_learning_rate(of_weights)
        for optimizer in self.arch_optimizers:
            optimizer.param_groups[0]["lr"] = self.learning_rate_arch

    @property
    def parts(self) -> dict[str, object]:
        """All that has state, for the checkpoint."""
        return {
            "network": self.network,
            **self.weights.parts,
            "optimizer_a": self.arch_optimizers[0],
            "optimizer_c": self.arch_optimizers[1],
            "arch_scaler": self.arch_scaler,
        }


def check_max_ram_ratio(max_ram_ratio: float | None, space: SearchSpace) -> None:
    """Raise `UserError` where no architecture might keep the budget, before the search begins."""
    least = space.feasible_ram_ratio()
    if max_ram_ratio is not None and max_ram_ratio < least:
        raise UserError(
            f"--max_ram_ratio {max_ram_ratio:g} is too small for {space.num_blocks} blocks and {space.num_depths} "
            f"depths{' with --keep_finest' * space.keep_finest}: give at least {math.ceil(least * 1e4) / 1e4:g}"
        )


class EpochRow:
    """Gathers an epoch's row of the history: losses, regularisers, what changed in the decoded network, waiting."""

    def __init__(self, supernet: Supernet, waited: data.loaders.ShareOfWaiting):
        self.supernet, self.waited = supernet, waited
        self.weights = training.losses.EpochLoss("loss", supernet.processes)
        self.arch = training.losses.EpochLoss("architecture_loss", supernet.processes)
        self.decoded_before = network.architecture.DecodedCodes()

    @property
    def parts(self) -> dict[str, object]:
        """All that has state, for a checkpoint in the middle of an epoch."""
        return {"loss": self.weights, "architecture_loss": self.arch, "decoded_before": self.decoded_before}

    def start(self, progress: Progress) -> None:
        """Forget the last epoch, unless this one goes on where it was stopped."""
        if progress.step == 0:
            self.weights.start()
            self.arch.start()
            self.decoded_before.take(self.supernet.space.architecture())

    def values(self, progress: Progress, warmed_up: bool) -> dict[str, float | None]:
        """Return the values of the epoch whose steps are done."""
        supernet = self.supernet
        terms = regularisers(supernet.space, supernet.input_shape, supernet.ram_budget)
        return {
            "loss": self.weights.mean(),
            "architecture_loss": self.arch.mean() if warmed_up else None,
            **{name: float(value.detach()) for name, value in terms.items()},
            "ram_target": supernet.factor_ram_cost,
            **self.decoded_before.changes(supernet.space.architecture()),
            "data_wait": self.waited.take(progress.seconds_in_epoch),
        }


def decode(space: SearchSpace, progress: Progress, args: argparse.Namespace, task: Task) -> Architecture:
    """Decode the search's state, with what is to be known about it later."""
    return space.architecture(
        args.max_ram_ratio,
        iter_num=progress.iteration,
        epochs=progress.current_epoch,
        best_dsc=progress.best_dice,
        best_path=progress.best_iteration,  # as published, whatever its name
        factor_ram_cost=args.factor_ram_cost,
        task=task.name,
        seed=args.seed,
        version=__version__,
        **options.folds(args),
    )


def write_architecture(path: Path, found: Architecture, task: Task, device: torch.device) -> None:
    """Write a found architecture with what it costs by default in train_dints.py, say that, and draw it beside."""
    size = found, task.num_channels, task.num_classes, task.patch_size, found.channel_mul
    try:
        cost = network.cost.cost(*size, device=device)
    except UserError as error:  # beside a large supernet there may be no memory to measure it
        log.warning("the found network's time is not measured: %s", error)
        cost = network.cost.cost(*size)
    found.info["cost"] = cost.to_dict()
    network.architecture.save_architecture(path, found)
    caption = [f"{found.info['ram_ratio']:.3f} of the memory of every path with its dearest operation", *cost.lines()]
    for line in caption:
        log.info("decoded: %s", line)
    try:
        network.drawing.draw_architecture(found, path.stem, path.parent, caption=caption)
    except UserError as error:  # without Graphviz's dot the search goes on; the .gv source is there
        log.warning("%s", error)


if __name__ == "__main__":
    exit_on_user_error(main, parse_args())
