"""Let architectures compete in short trainings: a search by evolution and successive halving.

    python evolve_dints.py --root data_msd/Task09_Spleen --output_root runs/evolve
    python evolve_dints.py --root ... --output_root ... --arch_ckpt runs/search/search_code_*.pth
    torchrun --standalone --nproc_per_node=8 evolve_dints.py --root ... --output_root ...

U shapes, random architectures, those of --arch_ckpt and mutants of the best compete, each as wide
as fills the same memory. All are trained for a short time; the best of them are trained again, for
longer, until one is left. Three of four training cases train them, the fourth judges them. The
winner is written as OUTPUT_ROOT/search_code_winner.pth, which train_dints.py retrains at its width;
candidates.csv has all results. With several processes, each trains candidates of its own.
"""

from dints.options import course, parse
from dints.settings import EvolveSettings, RetrainingSettings


def parse_args(argv: list[str] | None = None) -> EvolveSettings:
    return parse(EvolveSettings, __doc__, argv)


if __name__ == "__main__":  # before the imports below take seconds
    SETTINGS = parse_args()

import dataclasses
import logging

from dints.data.cache import open_cache
from dints.data.dataset import Fold, open_fold
from dints.data.fingerprint import network_strides
from dints.data.loaders import choose_augmentation, training_loader
from dints.errors import exit_on_user_error
from dints.evolution.halving import Ledger, best, open_folder, rungs
from dints.evolution.proposals import CHANNEL_STEP, Limits, memory_of_share, mutants, proposed
from dints.evolution.trainings import ShortTrainings, divided
from dints.network.arch_file import write_architecture
from dints.network.architecture import Architecture, load_architecture
from dints.network.operations import operations_of
from dints.network.step_memory import check_memory
from dints.running.curves import draw_candidates
from dints.running.precision import choose_precision
from dints.running.progress import remark_on_dice
from dints.running.run import Run, open_run
from dints.running.stop_signal import StopSignal
from dints.training.losses import check_loss
from dints.training.validation import open_validation

log = logging.getLogger("evolve")


def evolve(settings: EvolveSettings, run: Run) -> None:
    """Let candidates compete, rung by rung, and write the winner."""
    fold, given, limits = run.on_main(prepare, settings)
    competition = settings.competition
    run.start_afresh([*competition.arch_ckpt])
    machine = open_competition(settings, fold, given, run)
    limits = dataclasses.replace(limits, channel_step=machine["channel_step"])
    ledger = Ledger(
        run.folder, run.processes, run.stop_signal, trainer(settings, fold, limits, run)
    )

    first, *others = rungs(competition.candidates, competition.num_iterations)
    count = -(-first.count // 2)
    kinds = competition.proposals
    members = run.on_main(proposed, count, kinds, limits, given, run.seed)
    results = ledger.results(members, first.iterations)
    parents = best(members, results, max(1, first.count // 4))
    count = first.count - count
    children = run.on_main(mutants, count, parents, members, limits, run.seed)
    members = [*members, *children]
    results |= ledger.results(children, first.iterations)
    for rung in others:
        members = best(members, results, rung.count)
        results = ledger.results(members, rung.iterations)
    (winner,) = best(members, results, 1)

    path, dice = run.folder / "search_code_winner.pth", results[winner.name].dice
    if run.is_main:
        facts = {"seed": run.seed, "memory_mib": limits.memory_mib}
        facts |= {"fold": settings.data.fold, "num_folds": settings.data.num_folds}
        write_architecture(path, winner.described(dice, **facts), fold.task, run.device)
        draw_candidates(run.folder)
    log.info("the winner is %s: %s; train_dints.py --arch_ckpt retrains it", winner.name, path)
    remark_on_dice(dice, competition.num_iterations, len(fold.validation))


def trainer(settings: EvolveSettings, fold: Fold, limits: Limits, run: Run) -> ShortTrainings:
    """Prepare all cases on each rank, since ranks train candidates of their own."""
    competition, patches, task = settings.competition, settings.patches, fold.task
    weights = RetrainingSettings(
        recipe=competition.recipe,
        learning_rate=competition.learning_rate,
        learning_rate_schedule="polynomial",
        average_decay=0.99,
        loss=competition.loss,
    )
    alone = run.within(run.folder)
    cache = open_cache(fold, run, on_every_rank=True)
    loader = training_loader(fold.training, cache, patches, alone, stream="candidates")
    iterations = competition.num_iterations
    choose_augmentation([loader], patches, task, alone, iterations, len(fold.training))
    validation = open_validation(fold.validation, cache, settings.window, alone)
    return ShortTrainings(task, loader, validation, weights, limits.input_shape, alone)


def open_competition(
    settings: EvolveSettings, fold: Fold, given: list[Architecture], run: Run
) -> dict[str, str | int]:
    """Find the trainings that the folder has of this very competition, or begin a new one.

    Returns:
        the precision and the multiple of channels that its trainings have.
    """
    run.stop_signal = StopSignal(settings.run.warning_signal)
    codes = [architecture.codes() for architecture in given]
    machine = {
        "precision": choose_precision(settings.machine.precision, run.processes).name,
        "channel_step": CHANNEL_STEP[run.device.type],
    }
    configuration = course(settings) | fold.to_dict() | {"given": codes}
    folder = run.folder / "candidates"
    known = run.on_main(open_folder, folder, configuration, machine, settings.run.resume)
    run.is_continued = known is not None
    machine = known or machine
    run.precision = choose_precision(machine["precision"], run.processes)
    return machine


def prepare(settings: EvolveSettings) -> tuple[Fold, list[Architecture], Limits]:
    """Open the fold, and refuse whatever can be refused before a voxel is read.

    Returns:
        the fold, of whose training cases some train and some judge, in the place of its validation
        cases; the architectures of ``--arch_ckpt``; the limits of every candidate.
    """
    space, competition = settings.space, settings.competition
    check_loss(competition.loss)
    given = [load_architecture(path) for path in competition.arch_ckpt]
    folders = [settings.run.output_root]
    fold = open_fold(settings.data, folders, 2, space.strides, space.num_depths)
    task, batch_size = fold.task, settings.patches.num_images_per_batch
    choices = space.strides, space.use_downsample, space.num_depths
    strides = network_strides(*choices, fold.cases, task)
    size = space.num_blocks, operations_of(space.operations, strides), strides
    shapes = (batch_size, task.num_channels, *task.patch_size), task.num_classes
    memory_mib = competition.memory_mib or memory_of_share(
        competition.factor_ram_cost, *size, space.channel_mul, *shapes
    )
    limits = Limits(memory_mib, *size, space.keep_finest, *shapes)
    check_memory(task, None, 1.0, settings, memory_mib=memory_mib)
    limits.check()
    steps = (
        f"{rung.count} candidates at {rung.iterations} iterations"
        for rung in rungs(competition.candidates, competition.num_iterations)
    )
    how = ", then ".join(steps)
    log.info("%s, each as wide as fills %.6g MiB in a training step", how, memory_mib)
    training, judging = divided(fold.training)
    return dataclasses.replace(fold, training=training, validation=judging), given, limits


def main(settings: EvolveSettings) -> None:
    if settings.run.check:
        from dints.data.check import check  # an extra, which the core does not need

        check(settings.data)
        prepare(settings)
        return
    with open_run(settings.run, settings.machine) as run:
        evolve(settings, run)


if __name__ == "__main__":
    exit_on_user_error(main, SETTINGS)
