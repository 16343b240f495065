"""Model files hold all that inference needs; damaged ones are refused in one line."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import chain, random_architecture

from dints.data.tasks import TASKS
from dints.errors import UserError
from dints.network.architecture import architecture_from_dict
from dints.network.discrete import DiscreteNetwork
from dints.network.model_file import load_model, save_model

TASK = TASKS["Task05_Prostate"]  # 2 channels, 3 classes
SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels


def test_what_is_saved_is_loaded(tmp_path):
    # As loaded from a published file, whose best_dsc is a NumPy scalar.
    content = {**random_architecture(1, 3, 3).to_dict(), "best_dsc": np.float64(0.5)}
    architecture = architecture_from_dict(content, "published.pth")
    network = DiscreteNetwork(architecture, 2, 3, SMALL)
    save_model(tmp_path / "model.pth", network, architecture, SMALL, TASK, dice=0.75)
    model = load_model(tmp_path / "model.pth")
    assert model.task == TASK and model.info == {"channel_mul": SMALL, "dice": 0.75}
    assert model.architecture.info == {"best_dsc": 0.5}
    assert model.architecture.codes() == architecture.codes()
    image = torch.randn(1, 2, 16, 16, 16)
    assert torch.equal(model.network(image), network(image))


def endless() -> list:
    """Return lists in lists that would take for ever to write out, and no memory."""
    value = ["x"] * 50
    for _ in range(50):
        value = [value] * 50
    return value


def model_content(tmp_path: Path) -> dict:
    architecture = chain(2, 1, 0, num_depths=4, operation=0)
    network = DiscreteNetwork(architecture, 2, 3, SMALL)
    save_model(tmp_path / "m.pth", network, architecture, SMALL, TASK)
    return torch.load(tmp_path / "m.pth", weights_only=True)


def of_task(key: str, *values: object) -> list[tuple]:
    """Return changes of an entry of the task, each with the fault that is reported."""
    fault = rf"is damaged: .*\({key} .*; give another"
    return [(lambda c, value=value: c["task"].update({key: value}), fault) for value in values]


def of_file(fault: str, **changes: object) -> tuple:
    return lambda c: c.update(changes), fault


@pytest.mark.fault("missing key, codes, rows, paths, nodes")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c: c.pop("state_dict"), "is not a model file"),
        (lambda c: c["architecture"].pop("arch_code_c"), "has no 'arch_code_c'"),
        (lambda c: c["state_dict"].pop("stem_finals.1.bias"), "lacks 1 tensors"),
        (lambda c: c["task"].pop("class_names"), "is damaged: its task .*class_names"),
        (lambda c: c["task"].update({"x" * 10**6: 1}), "is damaged: .*xxx"),
        *of_task("name", endless()),
        *of_task("modality", "US"),
        *of_task("num_channels", 0, True),
        *of_task("class_names", ["background"], ["a", 5], ["a"] * 256),
        *of_task("spacing", [1.0, 0.0, 1.0], [1.0, math.nan, 1.0], [1.0, "1", 1.0]),
        *of_task("intensity", [1.0], [2.0, 1.0]),
        *of_task("patch_size", 96, [32.0, 32.0, 32.0]),
        *of_task("channel_files", "no"),
        (lambda c: c["task"].update(patch_size=[30] * 3), "is damaged: .*30 30 30 does not fit 4"),
        of_file("is damaged: .*list", task=[]),
        of_file("is damaged: its .*'x'", channel_mul="x"),
        of_file("is damaged: its .*nan", channel_mul=math.nan),
        # before memory for it is asked for
        of_file("has [0-9]+ tensors of another shape", channel_mul=100.0),
        of_file(r"is damaged: its dice .*\[\[", dice=endless()),
        of_file("its ranges is", ranges={"spacing": ([1.0, 1.0, 1.0], [1.0, math.nan, 1.0])}),
        of_file("is damaged: its training_cases is", training_cases=[5]),
        of_file("is damaged: its flips is {'axes': ", flips={"axes": [3]}),
        of_file("is damaged: its overlap_ratio is", overlap_ratio="x" * 10**5),
        of_file("is damaged: its version is tensor", version=torch.zeros(3)),
    ],
)
def test_what_describes_no_network_is_refused(tmp_path, change, fault):
    content = model_content(tmp_path)
    change(content)
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(UserError, match=f"{tmp_path}/model.pth.*{fault}") as caught:
        load_model(tmp_path / "model.pth")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_a_truncated_file_is_no_model(tmp_path):
    torch.save(model_content(tmp_path), tmp_path / "model.pth")
    whole = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="model.pth is damaged or not a PyTorch file"):
        load_model(tmp_path / "model.pth")
