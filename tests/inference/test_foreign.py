"""Weights of MONAI's DiNTS alone segment as MONAI's own network does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import published
import pytest
import torch
from architectures import everything
from commands import infer
from monai.inferers import sliding_window_inference
from torch import nn

import infer_dints
from dints.errors import UserError
from dints.network.architecture import Architecture, from_codes

WINDOW = (-87.0, 199.0)  # Task07_Pancreas's


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    """Make one that does not use all stems: of three depths, the deepest has no path."""
    whole = everything(2, 3)
    codes = whole.arch_code_a.copy()
    codes[:, 4:] = 0
    return from_codes(codes, whole.arch_code_c)


@pytest.fixture(scope="module")
def folder(architecture, tmp_path_factory) -> Path:
    """Write MONAI's weights as DDP names them, the architecture as NumPy arrays, and a CT."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    network = published.network(architecture, 1, 3, 0.125)
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save(state, folder / "model.pt")
    arrays = {key: getattr(architecture, key) for key in ("node_a", "arch_code_a", "arch_code_c")}
    torch.save({**arrays, "iter_num": 3, "best_dsc": 0.5}, folder / "search_code_3.pth")
    image = np.random.default_rng(0).normal(50, 80, (40, 36, 33)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "ct.nii.gz")
    return folder


@pytest.fixture(scope="module")
def weights(folder) -> list[object]:
    """Name these weights on a command line."""
    files = ["--checkpoint", folder / "model.pt", "--arch_ckpt", folder / "search_code_3.pth"]
    return [*files, "--channel_mul 0.125 --patch_size 32 32 32 --overlap_ratio 0.25"]


@pytest.fixture(scope="module")
def expected(folder, architecture) -> np.ndarray:
    """Segment the CT by MONAI's network and windows."""
    network: nn.Module = published.network(architecture, 1, 3, 0.125).eval()
    state = torch.load(folder / "model.pt", weights_only=True)
    network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    image = np.asarray(nib.load(folder / "ct.nii.gz").dataobj)
    image = (image - WINDOW[0]) / (WINDOW[1] - WINDOW[0])
    image = torch.from_numpy(image.clip(0, 1).astype(np.float32))[None, None]
    with torch.no_grad():
        scores = sliding_window_inference(
            image, (32, 32, 32), 2, network, overlap=0.25, mode="gaussian"
        )
    return scores[0].argmax(0).numpy()


@pytest.mark.parametrize("named_by", ["task", "description"])
def test_it_segments_as_monais_network(folder, weights, expected, tmp_path, named_by):
    image, flags = folder / "ct.nii.gz", ["--msd_task Task07_Pancreas"]
    if named_by == "description":  # in nnU-Net's form, a file a channel
        labels = {"background": 0, "a": 1, "b": 2}
        described = {"channel_names": {"0": "CT"}, "labels": labels}
        (tmp_path / "dataset.json").write_text(json.dumps(described))
        flags = ["--json", tmp_path / "dataset.json", "--intensity_range {} {}".format(*WINDOW)]
        image = shutil.copy(image, tmp_path / "ct_0000.nii.gz")
    out = infer(tmp_path / "out", *weights, *flags, "--input", image)
    found = np.asarray(nib.load(out / "ct.nii.gz").dataobj)
    assert (found != expected).mean() < 1e-4 and len(np.unique(found)) == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--channel_mul 0.5", "--channel_mul: only with --arch_ckpt"),
        ("--arch_ckpt a.pth", "--arch_ckpt needs --msd_task, --json or --root"),
    ],
)
def test_flags_go_together(flags, expected, capsys):
    with pytest.raises(SystemExit):
        infer_dints.parse_args(["--checkpoint", "m.pt", "--input", "a.nii.gz", *flags.split()])
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--msd_task Task09_Spleen", "do not fit this network"),  # two classes
        ("--msd_task Task07_Pancreas --patch_size 30 32 32", "--patch_size"),
        ("--json {}/dataset.json", "window that the weights were trained with, --intensity_range"),
    ],
)
def test_flags_that_do_not_fit_are_refused(folder, weights, tmp_path, flags, expected):
    described = {"modality": {"0": "CT"}, "labels": {"0": "no", "1": "yes"}}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    flags = [*weights, flags.format(tmp_path), "--input", folder / "ct.nii.gz"]
    with pytest.raises(UserError, match=expected):
        infer(tmp_path / "out", *flags)


def test_it_is_described(weights, tmp_path, capsys, architecture):
    """Nothing is segmented."""
    infer(tmp_path / "out", *weights, "--msd_task Task07_Pancreas --describe")
    card = json.loads(capsys.readouterr().out)
    assert card["task"]["class_names"] == ["background", "pancreas", "cancer"]
    assert card["architecture"]["active_paths"] == architecture.arch_code_a.sum()
    assert card["cost"]["gmac"] > 0 and not (tmp_path / "out").exists()
