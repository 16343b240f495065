"""Search, retraining and segmentation of datasets of every form, made from real cases."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from toys import Volumes, write_dataset

import infer_dints
import search_dints
import train_dints
from dints.network.model_file import load_model

CLASSES = ("background", "Anterior", "Posterior")
MACHINE = ["--device", "cpu", "--precision", "fp32"]
TINY = [*MACHINE, "--num_workers", 0, "--num_folds", 3, "--overlap_ratio", 0, "--channel_mul", 0.125]


def real_cases(task04: Path, num_channels: int) -> Iterator[Volumes]:
    """Yield three cases; the channels are the image, darker and darker, each with a contrast of its own."""
    for entry in json.loads((task04 / "dataset.json").read_text())["training"][:3]:
        image, label = (nib.load(task04 / entry[key]) for key in ("image", "label"))
        voxels = image.get_fdata(dtype=np.float32)
        channels = np.stack([voxels ** (1 + channel / 4) for channel in range(num_channels)], -1)
        yield channels, np.asarray(label.dataobj), image.affine


# Folder, whether it is nnU-Net's, channels, patch size (where the dataset itself is not to say), the task's spacing.
FORMS = {
    "4 channels, as Task01": ("Task01_BrainTumour", False, 4, (32, 32, 32), None),
    "2 channels, as Task05": ("Task05_Prostate", False, 2, (32, 32, 16), (1.0, 1.0, 1.0)),
    "unknown": ("Dataset700_Mine", False, 1, None, (1.0, 1.0, 1.0)),
    "nnU-Net v2": ("Dataset004_Hippocampus", True, 1, None, (1.0, 1.0, 1.0)),
    "nnU-Net v2, 2 channels": ("Dataset701_Two", True, 2, None, (1.0, 1.0, 1.0)),
}


def run(script, *flags: object) -> None:
    script.main(script.parse_args([*map(str, flags)]))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_search_retraining_and_segmentation(form, task04, tmp_path):
    name, nnunet, num_channels, patch_size, spacing = FORMS[form]
    channels = [f"MRI {channel}" for channel in range(num_channels)]
    root = write_dataset(tmp_path / name, real_cases(task04, num_channels), channels, CLASSES, nnunet=nnunet)
    flags = [*TINY, "--root", root] + (["--patch_size", *patch_size] if patch_size else [])
    search, train, model_file = tmp_path / "search", tmp_path / "train", tmp_path / "train" / "best_metric_model.pth"
    space = ["--num_blocks", 2, "--num_depths", 3, "--num_epochs", 2, "--num_epochs_warmup", 1]
    run(search_dints, *flags, *space, "--output_root", search)
    (code,) = search.glob("search_code_*.pth")
    run(train_dints, *flags, "--output_root", train, "--arch_ckpt", code, "--cache", "disk", "--num_epochs", 1)

    model = load_model(model_file)
    task = model.task
    assert (task.name, task.num_channels, task.spacing) == (name, num_channels, spacing)
    assert task.patch_size == (patch_size or (32, 32, 32)) and task.class_names == CLASSES
    assert task.channel_files == nnunet and model.info["dice"] >= 0
    assert json.loads((train / "task.json").read_text())["task"] == json.loads(json.dumps(task.to_dict()))

    (tmp_path / "images").mkdir()
    for path in sorted((root / "imagesTr").iterdir())[: num_channels if nnunet else 1]:
        os.link(path, tmp_path / "images" / path.name)
    inference = ["--input", tmp_path / "images", "--output_root", tmp_path / "segmentations"]
    run(infer_dints, "--checkpoint", model_file, *inference, *MACHINE)
    (segmentation,) = (tmp_path / "segmentations").glob("*.nii.gz")
    label = nib.load(root / "labelsTr" / segmentation.name)  # a segmentation has its label's name
    assert nib.load(segmentation).shape == label.shape
    assert np.allclose(nib.load(segmentation).affine, label.affine)
