"""Search, retraining and segmentation of datasets of every form, made from real cases (or from the phantom's)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import infer_dints
import search_dints
import train_dints
from dints.network import load_model

TINY = (
    "--num_workers 0 --num_folds 3 --overlap_ratio 0 --device cpu --precision fp32 --channel_mul 0.125 --num_epochs 2"
)
NUM_CASES = 6


def real_cases(task04: Path) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    entries = json.loads((task04 / "dataset.json").read_text())["training"][:NUM_CASES]
    return [tuple(nib.load(task04 / entry[key]) for key in ("image", "label")) for entry in entries]


def channels_of(image: nib.Nifti1Image, num_channels: int) -> np.ndarray:
    """(x, y, z, channels): the image, darker and darker, each with a contrast of its own."""
    voxels = image.get_fdata(dtype=np.float32)
    return np.stack([voxels ** (1 + channel / 4) for channel in range(num_channels)], -1)


def write_msd(root: Path, cases: list, num_channels: int) -> None:
    entries = []
    for number, (image, label) in enumerate(cases):
        entry = {"image": f"imagesTr/case_{number}.nii.gz", "label": f"labelsTr/case_{number}.nii.gz"}
        for path in entry.values():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(channels_of(image, num_channels), image.affine), root / entry["image"])
        nib.save(label, root / entry["label"])
        entries.append(entry)
    description = {
        "modality": {str(channel): f"MRI {channel}" for channel in range(num_channels)},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": entries,
    }
    (root / "dataset.json").write_text(json.dumps(description))


def write_nnunet(root: Path, cases: list, num_channels: int) -> None:
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for number, (image, label) in enumerate(cases):
        for channel, voxels in enumerate(np.moveaxis(channels_of(image, num_channels), -1, 0)):
            path = root / f"imagesTr/hippocampus_{number:03d}_{channel:04d}.nii.gz"
            nib.save(nib.Nifti1Image(voxels, image.affine), path)
        nib.save(label, root / f"labelsTr/hippocampus_{number:03d}.nii.gz")
    description = {
        "channel_names": {str(channel): f"MRI {channel}" for channel in range(num_channels)},
        "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))


# Folder, writer, channels, patch size (where the dataset itself is not to say), what the task must say of it.
FORMS = {
    "4 channels, as Task01": ("Task01_BrainTumour", write_msd, 4, (32, 32, 32), None),
    "2 channels, as Task05": ("Task05_Prostate", write_msd, 2, (32, 32, 16), (1.0, 1.0, 1.0)),
    "unknown": ("Dataset700_Mine", write_msd, 1, None, (1.0, 1.0, 1.0)),
    "nnU-Net v2": ("Dataset004_Hippocampus", write_nnunet, 1, None, (1.0, 1.0, 1.0)),
    "nnU-Net v2, 2 channels": ("Dataset701_Two", write_nnunet, 2, None, (1.0, 1.0, 1.0)),
}


@pytest.mark.parametrize("form", FORMS)
def test_search_retraining_and_segmentation(form, task04, tmp_path):
    name, write, num_channels, patch_size, spacing = FORMS[form]
    root = tmp_path / name
    write(root, real_cases(task04), num_channels)
    flags = [*TINY.split(), "--root", root] + (["--patch_size", *patch_size] if patch_size else [])

    def parsed(stage, folder, *more):
        return stage.parse_args([*map(str, [*flags, "--output_root", tmp_path / folder, *more])])

    search_dints.main(parsed(search_dints, "search", "--num_blocks", 2, "--num_depths", 3, "--num_epochs_warmup", 1))
    (code,) = (tmp_path / "search").glob("search_code_*.pth")
    train_dints.main(parsed(train_dints, "train", "--arch_ckpt", code, "--cache", "disk"))

    _, _, task, content = load_model(tmp_path / "train" / "best_metric_model.pth")
    assert (task.name, task.num_channels, task.spacing) == (name, num_channels, spacing)
    assert task.patch_size == (patch_size or (32, 32, 32)) and task.num_classes == 3
    assert task.channel_files == (write is write_nnunet) and content["dice"] >= 0
    assert json.loads((tmp_path / "train" / "task.json").read_text())["task"] == json.loads(json.dumps(task.to_dict()))

    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((root / "imagesTr").iterdir())[: num_channels if task.channel_files else 1]:
        os.link(path, images / path.name)
    infer_dints.main(
        infer_dints.parse_args(
            [
                *["--checkpoint", str(tmp_path / "train" / "best_metric_model.pth"), "--input", str(images)],
                *["--output_root", str(tmp_path / "segmentations"), "--device", "cpu", "--precision", "fp32"],
            ]
        )
    )
    (segmentation,) = (tmp_path / "segmentations").glob("*.nii.gz")
    label = nib.load(root / "labelsTr" / segmentation.name)  # a segmentation has its label's name
    assert nib.load(segmentation).shape == label.shape
    assert np.allclose(nib.load(segmentation).affine, label.affine)
