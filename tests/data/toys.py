"""Small cases and datasets, written as files, for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from dints.data.cache import Cache
from dints.data.crops import CropMasks
from dints.data.dataset import Fold, open_fold
from dints.data.listing import Case
from dints.data.tasks import Task
from dints.running.processes import Processes
from dints.settings import DataSettings

ALONE = Processes(0, 1, torch.device("cpu"))
CLASSES = ("background", "organ", "lesion")
TASK = Task(
    *("Toy", "CT", 1, CLASSES), spacing=None, intensity=(-100.0, 300.0), patch_size=(16, 16, 16)
)


def touch(root: Path, *paths: str) -> None:
    """Make empty files: cases are listed and checked without being read."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return str(path)


def voxels_of(path: str | Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def make_case(
    folder: Path, shape: tuple[int, ...] = (20, 20, 20), num_channels: int = 1, seed: int = 0
) -> Case:
    """Write noise, with a block of either foreground class."""
    label = np.zeros(shape, np.uint8)
    label[: shape[0] // 2] = 1
    label[..., : shape[2] // 3] = 2
    channels = () if num_channels == 1 else (num_channels,)
    image = np.random.default_rng(seed).normal(100, 60, (*shape, *channels)).astype(np.float32)
    paths = save(folder / "image.nii.gz", image), save(folder / "label.nii.gz", label)
    return Case("case", paths[:1], paths[1])


def cache_of(mode: str = "ram", folder: Path = Path("unused"), task: Task = TASK) -> Cache:
    return Cache(mode, folder, task, num_threads=2)


def opened(root: Path, measured_in: Sequence[Path] = (), **settings: object) -> Fold:
    """Open all cases of a dataset, or a fold of it."""
    return open_fold(DataSettings(root=root, **{"fold": "all", **settings}), measured_in)


Volumes = tuple[np.ndarray, np.ndarray, np.ndarray]  # image (x, y, z, channels), label, affine


def write_dataset(
    root: Path,
    cases: Iterable[Volumes],
    channels: Sequence[str],
    classes: Sequence[str] = CLASSES,
    *,
    nnunet: bool = False,
) -> Path:
    """Write a dataset in the Decathlon's form, or in nnU-Net's with a file a channel."""
    entries = []
    for number, (image, label, affine) in enumerate(cases):
        name = f"case_{number}"
        entry = {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
        for channel, voxels in enumerate(np.moveaxis(image, -1, 0) if nnunet else []):
            save(root / f"imagesTr/{name}_{channel:04d}.nii.gz", voxels, affine)
        if not nnunet:
            save(root / entry["image"], image, affine)
        save(root / entry["label"], label, affine)
        entries.append(entry)
    numbered = {str(channel): name for channel, name in enumerate(channels)}
    if nnunet:
        labels = {name: number for number, name in enumerate(classes)}
        content = {"channel_names": numbered, "labels": labels, "file_ending": ".nii.gz"}
    else:
        labels = {str(number): name for number, name in enumerate(classes)}
        content = {"modality": numbered, "labels": labels, "training": entries}
    (root / "dataset.json").write_text(json.dumps(content, indent=1))
    return root


def measurable(shapes_and_spacings: Iterable[tuple]) -> Iterable[Volumes]:
    """Yield images of foreground 0, 1, 2, ... HU in a background of 5000 HU."""
    for number, (shape, spacing) in enumerate(shapes_and_spacings):
        label = np.zeros(shape, np.int16)
        label[2:12, 2:12, 2:12] = 1 + number % 2
        image = np.full(shape, 5000, np.int16)
        image[label > 0] = np.arange(1000)
        yield image[..., None], label, np.diag([*spacing, 1])


def stored_mask(masks: CropMasks, value: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return what box and bits say of every voxel."""
    mask = np.zeros(shape, bool)
    first, end = masks.boxes[value]
    voxels = np.stack(np.meshgrid(*map(np.arange, first, end), indexing="ij"), -1).reshape(-1, 3)
    mask[tuple(map(slice, first, end))] = masks.contains(value, voxels).reshape(end - first)
    return mask
