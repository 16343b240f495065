"""Weights of MONAI's DiNTS, which say nothing of their network and data, segment as MONAI's own
network does.
"""

from __future__ import annotations

import json
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
FLAGS = "--channel_mul 0.125 --patch_size 32 32 32 --overlap_ratio 0.25"


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    """Make one that does not use all stems: two blocks of four depths, of which the deepest has no
    path.
    """
    whole = everything(2, 4)
    codes = whole.arch_code_a.copy()
    codes[:, 7:] = 0
    return from_codes(codes, whole.arch_code_c)


@pytest.fixture(scope="module")
def folder(architecture, tmp_path_factory) -> Path:
    """Write MONAI's weights, as DDP names them, the architecture as pickled NumPy arrays, and a CT
    at 1 mm.
    """
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    network = published.network(architecture, 1, 3, 0.125)
    torch.save(
        {f"module.{key}": value for key, value in network.state_dict().items()}, folder / "model.pt"
    )
    arrays = {key: getattr(architecture, key) for key in ("node_a", "arch_code_a", "arch_code_c")}
    torch.save({**arrays, "iter_num": 3, "best_dsc": 0.5}, folder / "search_code_3.pth")
    image = np.random.default_rng(0).normal(50, 80, (40, 36, 33)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "ct.nii.gz")
    return folder


@pytest.fixture(scope="module")
def expected(folder, architecture) -> np.ndarray:
    """Segment the CT by MONAI's network and windows."""
    network: nn.Module = published.network(architecture, 1, 3, 0.125).eval()
    state = torch.load(folder / "model.pt", weights_only=True)
    network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    image = (np.asarray(nib.load(folder / "ct.nii.gz").dataobj) - WINDOW[0]) / (
        WINDOW[1] - WINDOW[0]
    )
    image = torch.from_numpy(image.clip(0, 1).astype(np.float32))[None, None]
    with torch.no_grad():
        scores = sliding_window_inference(
            image, (32, 32, 32), 2, network, overlap=0.25, mode="gaussian"
        )
    return scores[0].argmax(0).numpy()


@pytest.mark.parametrize("named_by", ["task", "description"])
def test_it_segments_as_monais_network(folder, expected, tmp_path, named_by):
    described = tmp_path / "data/dataset.json"
    described.parent.mkdir()
    described.write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2}})
    )
    window = "--intensity_range {} {}".format(*WINDOW)
    flags = ["--msd_task Task07_Pancreas"] if named_by == "task" else ["--json", described, window]
    of_weights = [
        "--checkpoint",
        folder / "model.pt",
        "--arch_ckpt",
        folder / "search_code_3.pth",
        FLAGS,
        *flags,
    ]
    if named_by == "description":  # in nnU-Net's form, a file a channel
        (tmp_path / "ct_0000.nii.gz").write_bytes((folder / "ct.nii.gz").read_bytes())
        image = tmp_path / "ct_0000.nii.gz"
    else:
        image = folder / "ct.nii.gz"
    out = infer(tmp_path / "out", *of_weights, "--input", image)
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
        ("--msd_task Task07_Pancreas --patch_size 24 32 32", "--patch_size"),
        (
            "--json {folder}/dataset.json",
            "give the window that the weights were trained with, --intensity_range",
        ),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, flags, expected):
    (tmp_path / "dataset.json").write_text(
        json.dumps({"modality": {"0": "CT"}, "labels": {"0": "no", "1": "yes"}})
    )
    files = ["--checkpoint", folder / "model.pt", "--arch_ckpt", folder / "search_code_3.pth"]
    with pytest.raises(UserError, match=expected):
        infer(
            tmp_path / "out",
            *files,
            FLAGS,
            flags.format(folder=tmp_path),
            "--input",
            folder / "ct.nii.gz",
        )


def test_it_is_described(folder, tmp_path, capsys, architecture):
    """Nothing is segmented."""
    files = ["--checkpoint", folder / "model.pt", "--arch_ckpt", folder / "search_code_3.pth"]
    infer(tmp_path / "out", *files, FLAGS, "--msd_task Task07_Pancreas --describe")
    card = json.loads(capsys.readouterr().out)
    assert card["task"]["class_names"] == ["background", "pancreas", "cancer"]
    assert (
        card["architecture"]["active_paths"] == architecture.arch_code_a.sum()
        and card["cost"]["gmac"] > 0
    )
    assert not (tmp_path / "out").exists()
