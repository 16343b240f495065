"""From an MSD folder to batches: cases, folds, checks, transforms, caches and loaders, for every stage."""

from __future__ import annotations

import argparse
import logging
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from monai.data import Dataset as TransformedCases
from monai.data import NibabelReader
from monai.data.meta_tensor import MetaTensor
from monai.transforms import (
    CastToTyped,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImage,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandRotated,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandZoomd,
    ScaleIntensityRanged,
    SelectItemsd,
    Spacingd,
    SpatialPadd,
    Transform,
)
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from scipy.ndimage import distance_transform_cdt
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from dints.errors import UserError
from dints.runtime import Processes, cores_per_process, seed_from
from dints.tasks import Task, read_json, task_of_dataset

log = logging.getLogger(__name__)

Case = dict[str, str]  # paths of "image" and "label"

CROP_DILATION = 48  # steps by which a class's mask grows before crop centres are drawn from it


# Cases and folds


def open_dataset(args: argparse.Namespace) -> tuple[Task, list[Case]]:
    """The task of ``--root`` with the command line's overrides, and its labelled cases."""
    json_path = args.json or args.root / "dataset.json"
    description = read_json(json_path)
    task = task_of_dataset(description, json_path, args.root.resolve().name)
    given = {"spacing": args.spacing, "intensity": args.intensity_range, "patch_size": args.patch_size}
    task = replace(task, **{name: tuple(value) for name, value in given.items() if value is not None})
    return task, read_cases(description, json_path, args.root, args.json_key)


def read_cases(description: dict, source: str | Path, root: str | Path, key: str = "training") -> list[Case]:
    """The labelled cases that a ``dataset.json`` lists under ``key``, as absolute paths, all checked to exist.

    Raises:
        UserError: the list is missing or malformed, or files are missing (all counted, the first few named).
    """
    entries = description.get(key)
    if not isinstance(entries, list) or not entries:
        lists = [name for name, value in description.items() if isinstance(value, list)]
        raise UserError(
            f"{source} has no cases under '{key}': give --json_key (lists in the file: {', '.join(lists) or 'none'})"
        )
    cases = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("image", "label")):
            raise UserError(f"{source}: entry {index} of '{key}' needs the paths 'image' and 'label', and is {entry!r}")
        cases.append({name: str(Path(root) / entry[name]) for name in ("image", "label")})
    missing = [path for case in cases for path in case.values() if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {2 * len(cases)} files that {source} lists are not under --root {root}, "
            f"for example {', '.join(missing[:3])}: complete the dataset, or give its folder with --root"
        )
    return cases


def names(cases: Sequence[Case]) -> list[str]:
    """The image files' names: which cases they are, wherever the dataset lies."""
    return [Path(case["image"]).name for case in cases]


def split_fold(cases: Sequence[Case], num_folds: int, fold: int | str) -> tuple[list[Case], list[Case]]:
    """Training and validation cases of ``fold``; every case is validated in exactly one fold.

    Folds are contiguous and differ by at most one case; ``all`` trains on every case and validates on none.
    """
    if fold == "all":
        return list(cases), []
    if num_folds > len(cases):
        raise UserError(f"--num_folds {num_folds}, but there are only {len(cases)} cases: give at most {len(cases)}")
    first, last = len(cases) * fold // num_folds, len(cases) * (fold + 1) // num_folds
    return [*cases[:first], *cases[last:]], list(cases[first:last])


# Transforms


class ReadFilesd(MapTransform):
    """Reads NIfTI files with MONAI's `LoadImage`; one that cannot be read is a `UserError` that names it."""

    def __init__(self, keys: Sequence[str]):
        super().__init__(keys)
        self.load, self.reader = LoadImage(), NibabelReader()

    def __call__(self, case: Mapping[Hashable, str]) -> dict[Hashable, MetaTensor]:
        loaded = dict(case)
        for key in self.keys:
            try:
                loaded[key] = self.load(case[key], self.reader)
            except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error) as error:
                raise UserError(f"{case[key]} cannot be read: {error}; replace the file") from error
        return loaded


class CheckCased(Transform):
    """Refuses, by name, a case that the task's network cannot learn from; sees it as it was loaded."""

    def __init__(self, task: Task):
        self.task = task

    def __call__(self, case: Mapping[Hashable, MetaTensor]) -> Mapping[Hashable, MetaTensor]:
        image = case["image"]
        name, shape = image.meta["filename_or_obj"], tuple(image.shape[1:])
        if len(shape) != 3 or image.shape[0] != self.task.num_channels:
            raise UserError(
                f"{name} has {image.shape[0]} channels of shape {shape}; {self.task.name} has {self.task.num_channels} "
                "channels in three dimensions: mend or remove the case"
            )
        if not torch.isfinite(image.as_tensor()).all():
            raise UserError(f"{name} has NaN or infinite voxels: mend or remove the case")
        if "label" in case:
            self._check_label(case["label"], shape, name)
        return case

    def _check_label(self, label: MetaTensor, image_shape: tuple[int, ...], image_name: str) -> None:
        name = label.meta["filename_or_obj"]
        if tuple(label.shape) != (1, *image_shape):
            found = tuple(label.shape[1:]) if label.shape[0] == 1 else tuple(label.shape)
            raise UserError(
                f"{name} has shape {found}, but its image {image_name} has {image_shape}: mend or remove the case"
            )
        wrong = [v for v in torch.unique(label.as_tensor()).tolist() if v not in range(self.task.num_classes)]
        if wrong:
            raise UserError(
                f"{name} holds the label {wrong[0]:g}; {self.task.name} has the labels 0 to "
                f"{self.task.num_classes - 1}: mend or remove the case"
            )


class ClassMasksd(MapTransform):
    """Adds ``crop_mask`` (classes, *spatial), uint8: each class's mask, grown by 48 steps in the L1 metric.

    The published scripts crop around these masks, so that small structures are seen often but not always in the centre.
    One distance transform gives what 48 binary dilations give.
    """

    def __init__(self, num_classes: int):
        super().__init__(keys=["label"])
        self.num_classes = num_classes

    def __call__(self, case: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        label = np.asarray(case["label"][0])
        masks = np.zeros((self.num_classes, *label.shape), np.uint8)
        for value in range(self.num_classes):
            present = label == value
            if present.any():  # without any voxel the transform returns -1 everywhere
                masks[value] = distance_transform_cdt(~present, "taxicab") <= CROP_DILATION
        return {**case, "crop_mask": torch.from_numpy(masks)}


def reading(task: Task, keys: Sequence[str]) -> list[Callable]:
    """A case as its files hold it, channel first, checked."""
    return [ReadFilesd(keys), EnsureChannelFirstd(keys), CheckCased(task)]


def preprocessing(task: Task, keys: Sequence[str] = ("image", "label")) -> list[Callable]:
    """What every stage does to a case: read, to RAS, to the task's spacing and intensity."""
    modes = ["bilinear" if key == "image" else "nearest" for key in keys]
    resample = []
    if task.spacing is not None:
        # MONAI would compute in float64, in twice the memory, to move values by less than the cache rounds them.
        resample = [Spacingd(keys, task.spacing, mode=modes, align_corners=True, dtype=np.float32)]
    if task.intensity is not None:
        low, high = task.intensity
        intensity = ScaleIntensityRanged(["image"], low, high, 0.0, 1.0, clip=True)
    else:
        intensity = NormalizeIntensityd(["image"], nonzero=True, channel_wise=True)
    return [
        *reading(task, keys),
        Orientationd(keys, axcodes="RAS", labels=None),
        *resample,
        intensity,
    ]


def training_cache(task: Task) -> Compose:
    """`preprocessing` and all else that is the same at every epoch; what a training case is cached as."""
    keys = ["image", "label", "crop_mask"]
    reflectable = [size // 3 + 1 for size in task.patch_size]  # a smaller volume has too few voxels to reflect
    return Compose(
        [
            *preprocessing(task),
            ClassMasksd(task.num_classes),
            SpatialPadd(keys, reflectable, mode=["edge", "constant", "constant"]),
            SpatialPadd(keys, task.patch_size, mode=["reflect", "constant", "constant"]),
            CastToTyped(keys, dtype=[torch.float16, torch.uint8, torch.uint8]),
            EnsureTyped(keys, track_meta=False),
        ]
    )


def augmentation(task: Task) -> Compose:
    """The published random chain: crop around a class, rotate, zoom, smooth, scale, shift, noise, flip."""
    keys, modes = ["image", "label"], ["bilinear", "nearest"]
    return Compose(
        [
            RandCropByLabelClassesd(
                keys,
                label_key="crop_mask",
                spatial_size=task.patch_size,
                ratios=[1] * task.num_classes,
                num_classes=task.num_classes,
                num_samples=1,
                warn=False,  # a class may be absent from a case
            ),
            SelectItemsd(keys),
            CastToTyped(keys, dtype=[torch.float32, torch.uint8]),
            RandRotated(keys, range_x=0.3, range_y=0.3, range_z=0.3, mode=modes, keep_size=True, prob=0.2),
            RandZoomd(
                keys, min_zoom=0.8, max_zoom=1.2, mode=["trilinear", "nearest"], align_corners=[True, None], prob=0.16
            ),
            RandGaussianSmoothd(["image"], sigma_x=(0.5, 1.15), sigma_y=(0.5, 1.15), sigma_z=(0.5, 1.15), prob=0.15),
            RandScaleIntensityd(["image"], factors=0.3, prob=0.5),
            RandShiftIntensityd(["image"], offsets=0.1, prob=0.5),
            RandGaussianNoised(["image"], std=0.01, prob=0.15),
            *(RandFlipd(keys, spatial_axis=axis, prob=0.5) for axis in range(3)),
            EnsureTyped(keys, dtype=[torch.float32, torch.uint8], track_meta=False),
        ]
    )


# Caches and loaders


class TrainingSamples(Dataset):
    """One augmented patch per (epoch, turn, case), the same whichever worker or restart asks for it.

    Args:
        cases: what this process trains on.
        numbers: each case's number among the cases of all ranks, from which its random stream is seeded.
        stream: tells apart the draws of loaders that share a seed.
    """

    def __init__(
        self, cases: TransformedCases | list, numbers: Sequence[int], augment: Compose, seed: int, stream: str
    ):
        self.cases, self.numbers, self.augment, self.seed, self.stream = cases, numbers, augment, seed, stream

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, draw: tuple[int, int, int]) -> dict[str, torch.Tensor]:
        epoch, turn, index = draw
        self.augment.set_random_state(seed_from(self.seed, self.stream, epoch, turn, self.numbers[index]))
        (sample,) = self.augment(dict(self.cases[index]))  # the cropper makes a list of its one crop
        return sample


class EpochSampler(Sampler):
    """(epoch, turn, index) in an order that depends on seed, stream and epoch only.

    A turn is a pass over the cases; there are as many as ``length`` takes, the last one cut short. The epoch travels
    with the index, so workers that live on from epoch to epoch hold no state that a restart loses.
    """

    def __init__(self, num_cases: int, length: int, seed: int, stream: str):
        self.num_cases, self.length, self.seed, self.stream = num_cases, length, seed, stream
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for position in range(self.length):
            turn, place = divmod(position, self.num_cases)
            if place == 0:
                rng = np.random.default_rng(seed_from(self.seed, self.stream, self.epoch, turn))
                order = rng.permutation(self.num_cases)
            yield self.epoch, turn, int(order[place])


class TrainingLoader:
    """Batches of one rank; ``epoch(n)`` iterates over those of epoch ``n``, equally many on every rank."""

    def __init__(self, samples: TrainingSamples, sampler: EpochSampler, batch_size: int, num_workers: int, pin: bool):
        self.sampler = sampler
        self.loader = DataLoader(
            samples,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        self.sampler.epoch = epoch
        return iter(self.loader)


def steps_per_epoch(num_cases: int, batch_size: int, processes: Processes) -> int:
    """Steps in which all ranks together see every case at least once."""
    return max(1, -(-num_cases // (batch_size * processes.world_size)))


def training_loader(
    cases: Sequence[Case], stream: str, task: Task, steps: int, args: argparse.Namespace, processes: Processes
) -> TrainingLoader:
    """Read (and cache) this rank's share of ``cases``, and give batches of augmented patches.

    Rank r of N holds cases r, r + N, ...; with fewer cases than ranks some ranks hold the same one. An epoch has
    ``steps`` batches on every rank, with cases seen again where the shares are uneven.

    Args:
        stream: tells apart the random draws of loaders that share a seed.
        args: ``seed``, ``num_images_per_batch``, ``num_workers`` and ``cache`` of the command line.
    """
    numbers = list(range(processes.rank, len(cases), processes.world_size)) or [processes.rank % len(cases)]
    held = cached([cases[number] for number in numbers], training_cache(task), task, args, stream)
    samples = TrainingSamples(held, numbers, augmentation(task), args.seed, f"{stream}/{processes.rank}")
    sampler = EpochSampler(len(numbers), steps * args.num_images_per_batch, args.seed, f"{stream}/{processes.rank}")
    pin = processes.device.type == "cuda"
    return TrainingLoader(samples, sampler, args.num_images_per_batch, num_workers(args), pin)


def validation_loader(cases: Sequence[Case], task: Task, args: argparse.Namespace, processes: Processes) -> DataLoader:
    """This rank's share of the validation cases, whole, one at a time, each with its ``number`` in ``cases``."""
    types = EnsureTyped(["image", "label"], dtype=[torch.float32, torch.uint8], track_meta=False)
    transform = Compose([*preprocessing(task), types])
    numbered = [{**case, "number": number} for number, case in enumerate(cases)]
    held = cached(numbered[processes.rank :: processes.world_size], transform, task, args, "validation")
    return DataLoader(held, batch_size=1)


def cached(
    cases: Sequence[Case], transform: Compose, task: Task, args: argparse.Namespace, what: str
) -> TransformedCases | list:
    """The transformed cases: held in memory (``--cache ram``), or checked now and made anew each time (``none``).

    Raises:
        UserError: a case cannot be read or learned from; either way before any is used.
    """
    if not cases:
        return []
    log.info("reading %d cases (%s)", len(cases), what)
    threads, silent = max(1, num_workers(args)), None if log.isEnabledFor(logging.INFO) else True
    prepare = Compose(reading(task, ["image", "label"])) if args.cache == "none" else transform
    with user_errors(), ThreadPool(threads) as pool:
        ready = tqdm(pool.imap(prepare, cases), what, len(cases), unit="case", leave=False, disable=silent)
        if args.cache == "ram":
            return list(ready)
        for _ in ready:
            pass
    return TransformedCases(cases, transform)


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise a `UserError` that a transform raised as itself: `Compose` wraps it in a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def num_workers(args: argparse.Namespace) -> int:
    """``--num_workers``, or what is left of the process's share of cores when one computes the network, at most 6."""
    return min(6, cores_per_process() - 1) if args.num_workers is None else args.num_workers
