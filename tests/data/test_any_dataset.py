"""Search, retraining and segmentation of a dataset that is measured, in nnU-Net's form."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import ON_CPU, SPACE, TINY, words
from toys import Volumes, voxels_of, write_dataset

import evolve_dints
import infer_dints
import search_dints
import train_dints
from dints.network.architecture import load_architecture
from dints.network.model_file import load_model

CLASSES = ("background", "Anterior", "Posterior")


def real_cases(task04: Path, num_channels: int) -> Iterator[Volumes]:
    """Yield three cases; the channels are the image, each with a contrast of its own."""
    for entry in json.loads((task04 / "dataset.json").read_text())["training"][:3]:
        image = nib.load(task04 / entry["image"])
        voxels = image.get_fdata(dtype=np.float32)
        channels = [voxels ** (1 + channel / 4) for channel in range(num_channels)]
        yield np.stack(channels, -1), voxels_of(task04 / entry["label"]), image.affine


def run(script, *flags: object) -> None:
    script.main(script.parse_args(words(*flags)))


@pytest.mark.slow
def test_search_retraining_and_segmentation_of_two_channels_in_files_of_their_own(task04, tmp_path):
    root, channels = tmp_path / "Dataset701_Two", ["MRI 0", "MRI 1"]
    write_dataset(root, real_cases(task04, 2), channels, CLASSES, nnunet=True)
    flags = ["--root", root, TINY.replace("--patch_size 16 16 16", "")]
    search, train, segmentations = (tmp_path / stage for stage in ("search", "train", "out"))
    length = "--num_epochs 2 --num_epochs_warmup 1"
    run(search_dints, *flags, SPACE, length, "--output_root", search)
    (code,) = search.glob("search_code_*.pth")
    more = "--cache disk --num_epochs 1 --output_root", train, "--arch_ckpt", code
    run(train_dints, *flags, *more)

    model = load_model(train / "best_metric_model.pth")
    task = model.task
    assert (task.name, task.num_channels, task.spacing) == (root.name, 2, (1.0, 1.0, 1.0))
    assert task.patch_size == (32, 48, 32) and task.class_names == CLASSES
    assert task.channel_files and model.info["dice"] >= 0
    kept = json.loads((train / "task.json").read_text())["task"]
    assert kept == json.loads(json.dumps(task.to_dict()))

    (tmp_path / "images").mkdir()
    for path in sorted((root / "imagesTr").iterdir())[:2]:
        os.link(path, tmp_path / "images" / path.name)
    places = ["--input", tmp_path / "images", "--output_root", segmentations, ON_CPU]
    run(infer_dints, "--checkpoint", train / "best_metric_model.pth", *places)
    (segmentation,) = segmentations.glob("*.nii.gz")
    label = nib.load(root / "labelsTr" / segmentation.name)  # a segmentation has its label's name
    assert nib.load(segmentation).shape == label.shape
    assert np.allclose(nib.load(segmentation).affine, label.affine)


@pytest.mark.slow
def test_anisotropic_volumes(tmp_path):
    """Slices of four times the voxels' width keep their number at the first two depths."""
    generator = np.random.default_rng(0)
    volumes = []
    for _ in range(6):
        label = np.zeros((24, 20, 6), np.uint8)
        label[4:12, 4:12, 1:4] = 1
        image = label * 100 + generator.normal(0, 20, label.shape).astype(np.float32)
        volumes.append((image[..., None], label, np.diag([1.5, 1.5, 6, 1])))
    root = write_dataset(tmp_path / "Dataset702_Flat", volumes, ["MRI"], ("background", "organ"))
    tiny = TINY.replace("--patch_size 16 16 16", "")
    flags = ["--root", root, tiny, "--recipe recommended --num_iterations 4"]
    folders = {name: tmp_path / name for name in ("search", "evolve", "train", "masks")}
    length = "--num_epochs 2 --num_epochs_per_validation 2"
    search = [*flags, length, SPACE, "--num_epochs_warmup 1 --output_root", folders["search"]]
    run(search_dints, *search)
    (code,) = folders["search"].glob("search_code_*.pth")
    planned = load_architecture(code)
    assert planned.strides == ((1, 1, 1), (2, 2, 1), (2, 2, 1))
    assert planned.operations[-1] == "plane_3x3x1"
    evolve = [*flags, SPACE, "--candidates 2 --arch_ckpt", code, "--output_root", folders["evolve"]]
    run(evolve_dints, *evolve)
    winner = folders["evolve"] / "search_code_winner.pth"
    train = [*flags, length, "--output_root", folders["train"], "--arch_ckpt", winner]
    run(train_dints, *train)
    model = load_model(folders["train"] / "best_metric_model.pth")
    assert model.architecture.strides == planned.strides and model.task.patch_size == (24, 16, 6)
    places = ["--input", root / "imagesTr", "--output_root", folders["masks"], ON_CPU]
    run(infer_dints, "--checkpoint", folders["train"] / "best_metric_model.pth", *places)
    assert len(list(folders["masks"].glob("*.nii.gz"))) == 6
