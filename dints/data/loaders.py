"""Loaders: batches of augmented patches without end, and whole volumes for validation."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from dints.data import augmentation
from dints.data.augmentation import Step
from dints.data.cache import Cache
from dints.data.cases import Prepared
from dints.data.crops import cut_patch
from dints.data.flips import choose_flips
from dints.data.listing import Case
from dints.data.tasks import Task
from dints.running.machine import cores_per_process
from dints.running.processes import STOP_SIGNALS, Processes
from dints.running.run import Run
from dints.running.seeds import permutation, seed_from
from dints.settings import PatchSettings

SECONDS_TO_HEAR_OF_A_DEATH = 2.0
AHEAD = 2  # batches that each worker prepares before they are asked for
Sample = tuple[torch.Tensor, torch.Tensor, dict[str, object], str]
Batch = dict[str, torch.Tensor | list[str]]


class TrainingSamples(Dataset):
    """One patch per (epoch, turn, case), the same whichever worker or restart asks for it.

    Args:
        cases: what this process trains on.
        numbers: each case's number among the cases of all ranks, from which its random stream is
            seeded.
        stream: tells apart the draws of loaders that share a seed.

    Attributes:
        steps: by which patches are augmented; the published chain, until another is set.

    A sample is the patch as it is cached, image and label, what `augmentation.draw` drew for it,
    and the case's name.
    """

    def __init__(
        self,
        cases: Sequence[Prepared],
        names: Sequence[str],
        numbers: Sequence[int],
        patch_size: tuple[int, int, int],
        seed: int,
        stream: str,
    ):
        self.cases, self.names, self.numbers = cases, names, numbers
        self.patch_size, self.seed, self.stream = patch_size, seed, stream
        self.steps = augmentation.chain()

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, place: tuple[int, int, int]) -> Sample:
        epoch, turn, index = place
        seed = seed_from(self.seed, self.stream, epoch, turn, self.numbers[index])
        rng = np.random.default_rng(seed)
        case = self.cases[index]
        centre = case.masks.draw_centre(rng)
        patch = cut_patch(case.image, case.label, centre, self.patch_size)
        drawn = augmentation.draw(seed, self.steps)
        return *map(torch.from_numpy, patch), drawn, self.names[index]

    def augmented_patches(self, samples: list[Sample]) -> Batch:
        """Make a batch of samples, on the CPU."""
        batch = augmented(_patches(samples), torch.device("cpu"), self.steps)
        _share([batch["image"], batch["label"]])
        return batch


class EpochSampler(Sampler):
    """(epoch, turn, index) without end, in an order of seed, stream and epoch only.

    A turn is a pass over the cases; there are as many as an epoch's ``length`` takes, the last one
    cut short. The epoch travels with the index, so workers that live on from epoch to epoch hold no
    state that a restart loses.
    """

    def __init__(self, num_cases: int, length: int, seed: int, stream: str):
        self.num_cases, self.length, self.seed, self.stream = num_cases, length, seed, stream
        self.start = 0, 0  # epoch, and position in it

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch, first = self.start
        while True:
            order = None
            for position in range(first, self.length):
                turn, place = divmod(position, self.num_cases)
                if place == 0 or order is None:
                    order = permutation(self.num_cases, self.seed, self.stream, epoch, turn)
                yield epoch, turn, order[place]
            epoch, first = epoch + 1, 0


class TrainingLoader:
    """Batches of one rank; ``epoch(n)`` gives those of epoch ``n``, as many as on every rank.

    Workers prepare the next epoch while the network validates. Patches are augmented by them, or
    on a GPU where the network is on one.

    Attributes:
        seconds_waited: for batches, so far.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        sampler: EpochSampler,
        batch_size: int,
        num_workers: int,
        device: torch.device,
    ):
        self.sampler, self.device, self.steps = sampler, device, sampler.length // batch_size
        self.on_gpu = device.type != "cpu"
        self.loader = DataLoader(
            samples,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            prefetch_factor=AHEAD if num_workers else None,
            worker_init_fn=_ignore_signals,
            collate_fn=_shared_patches if self.on_gpu else samples.augmented_patches,
            pin_memory=device.type == "cuda",
        )
        self.seconds_waited = 0.0
        self._batches, self._place = None, None  # iterator; epoch and step that it gives next

    def __len__(self) -> int:
        return self.steps

    def own_cases(self) -> Sequence[Prepared]:
        """Return this rank's cases."""
        return self.loader.dataset.cases

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from its step number ``first_step`` on.

        They have ``image`` (batch, channels, *patch), float32, ``label`` (batch, 1, *patch), uint8,
        and the names of their ``cases``.
        """
        if self._place != (epoch, first_step):
            self.sampler.start = epoch, first_step * self.loader.batch_size
            self._batches = iter(self.loader)
        for step in range(first_step, self.steps):
            start = time.perf_counter()
            self._place = None  # after an error the iterator is past this batch
            batch = self._next()
            self._place = (epoch, step + 1) if step + 1 < self.steps else (epoch + 1, 0)
            if self.on_gpu:
                batch = augmented(batch, self.device, self.loader.dataset.steps)
            self.seconds_waited += time.perf_counter() - start
            yield batch

    def _next(self) -> dict | Patches:
        try:
            return next(self._batches)
        except (ConnectionError, EOFError) as error:
            # A worker was killed while it handed over a batch. PyTorch's handler of the signal that
            # tells so raises its message wherever this process is by then: let that be here.
            time.sleep(SECONDS_TO_HEAR_OF_A_DEATH)
            raise RuntimeError(
                f"DataLoader worker (pid unknown) is gone: {str(error) or type(error).__name__}"
            ) from error


def _ignore_signals(_worker: int) -> None:
    """Leave it to the main process, which needs its workers until then, to stop when asked to."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


Patches = tuple[list[torch.Tensor], list[torch.Tensor], list[dict[str, object]], list[str]]


def _patches(samples: list[Sample]) -> Patches:
    images, labels, draws, names = zip(*samples, strict=True)
    return list(images), list(labels), list(draws), list(names)


def _shared_patches(samples: list[Sample]) -> Patches:
    patches = _patches(samples)
    _share([*patches[0], *patches[1]])
    return patches


def _share(tensors: Sequence[torch.Tensor]) -> None:
    """Put what a worker sends into shared memory.

    PyTorch would do that in a thread of the worker's which, where there is no room, prints that and
    drops the batch; the main process would wait for it for ever.
    """
    if get_worker_info() is not None:
        for tensor in tensors:
            tensor.share_memory_()


def augmented(patches: Patches, device: torch.device, steps: Sequence[Step]) -> Batch:
    """Make a batch of patches, each changed as was drawn for it of the steps, on ``device``."""
    *patches, names = patches
    samples = []
    for *volumes, drawn in zip(*patches, strict=True):
        image, label = (volume.to(device, non_blocking=True) for volume in volumes)
        samples.append(augmentation.augment(image, label, drawn, steps))
    images, labels = zip(*samples, strict=True)
    return {"image": torch.stack(images), "label": torch.stack(labels), "cases": names}


def steps_per_epoch(num_cases: int, batch_size: int, processes: Processes) -> int:
    """Return in how many steps all ranks together see every case at least once."""
    return max(1, -(-num_cases // (batch_size * processes.world_size)))


def workers(num_workers: int | None) -> int:
    """Return how many processes prepare batches; None: one a core that is left, at most 6."""
    return min(6, cores_per_process() - 1) if num_workers is None else num_workers


def bytes_ahead(task: Task, batch_size: int, num_workers: int | None, device_type: str) -> int:
    """Count the bytes of patches that a loader's workers, or without them one batch, hold ahead.

    For a GPU patches stay float16 until they are there.
    """
    voxel = (4 if device_type == "cpu" else 2) * task.num_channels + 1  # the label is uint8
    return max(1, AHEAD * workers(num_workers)) * batch_size * math.prod(task.patch_size) * voxel


def training_loader(
    cases: Sequence[Case],
    cache: Cache,
    settings: PatchSettings,
    run: Run,
    steps: int | None = None,
    *,
    stream: str = "weights",
) -> TrainingLoader:
    """Prepare this rank's share of ``cases``, and give batches of augmented patches.

    Rank r of N holds cases r, r + N, ...; with fewer cases than ranks some ranks hold the same one.

    Args:
        steps: batches of an epoch on every rank, with cases seen again where the shares are uneven;
            None: as many as all ranks together need to see every case.
        stream: tells apart the random draws of loaders that share a seed.
    """
    processes, batch_size, seed = run.processes, settings.num_images_per_batch, run.seed
    steps = steps or steps_per_epoch(len(cases), batch_size, processes)
    numbers = list(processes.share(len(cases))) or [processes.rank % len(cases)]
    own = [cases[number] for number in numbers]
    held = cache.hold(own, stream)
    stream, names = f"{stream}/{processes.rank}", [case.name for case in own]
    samples = TrainingSamples(held, names, numbers, cache.task.patch_size, seed, stream)
    sampler = EpochSampler(len(numbers), steps * batch_size, seed, stream)
    num_workers = workers(run.settings.num_workers)
    return TrainingLoader(samples, sampler, batch_size, num_workers, processes.device)


def choose_augmentation(
    loaders: Sequence[TrainingLoader],
    settings: PatchSettings,
    task: Task,
    run: Run,
    num_iterations: int,
    num_cases: int,
) -> dict[str, object]:
    """Choose the flips and the chain by which the loaders' patches are augmented.

    Args:
        loaders: of the training cases, which ``--flip_axes auto`` measures; every rank must call
            it.
        num_iterations: of the training, by all ranks.
        num_cases: that these iterations see.

    Returns:
        both, as plain values for the model file.
    """
    own = [case for loader in loaders for case in loader.own_cases()]
    flips = choose_flips(settings.flip_axes, own, task, run.processes)
    patches = num_iterations * settings.num_images_per_batch * run.processes.world_size
    name = augmentation.chosen(settings.augmentation, num_iterations, patches / num_cases)
    for loader in loaders:
        loader.loader.dataset.steps = augmentation.chain(name, flips.axes)
    return {"flips": flips.to_dict(), "augmentation": name}


class ValidationLoader:
    """A rank's share of the validation cases, whole, one at a time, with its ``number``."""

    def __init__(self, held: Sequence[Prepared], numbers: Sequence[int], num_cases: int):
        self.held, self.numbers, self.num_cases = held, numbers, num_cases

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor | int]]:
        for number, case in zip(self.numbers, self.held, strict=True):
            image, label = np.array(case.image, np.float32), np.array(case.label)
            yield {
                "image": torch.from_numpy(image)[None],
                "label": torch.from_numpy(label)[None, None],
                "number": number,
            }


def validation_loader(cases: Sequence[Case], cache: Cache, run: Run) -> ValidationLoader:
    """Prepare this rank's share of the validation cases."""
    numbers = run.processes.share(len(cases))
    held = cache.hold([cases[number] for number in numbers], "validation")
    return ValidationLoader(held, numbers, len(cases))
