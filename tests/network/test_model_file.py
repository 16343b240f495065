"""Model files hold all that inference needs; damaged ones, and those of before, are told apart."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import chain, random_architecture

from dints.data.tasks import TASKS
from dints.errors import UserError
from dints.network.architecture import architecture_from_dict, load_architecture
from dints.network.found import FoundNetwork
from dints.network.model_file import load_model, save_model
from dints.network.operations import PUBLISHED

FIXTURES = Path(__file__).parents[1] / "fixtures"
TASK = TASKS["Task05_Prostate"]  # 2 channels, 3 classes
SMALL = 1 / 16  # channel_mul: 2, 4, 8, ... channels


def test_what_is_saved_is_loaded(tmp_path):
    # As loaded from a published file, whose best_dsc is a NumPy scalar.
    content = {**random_architecture(1, 3, 3).to_dict(), "best_dsc": np.float64(0.5), "task": "Task07_Pancreas"}
    architecture = architecture_from_dict(content, "published.pth")
    network = FoundNetwork(architecture, 2, 3, SMALL)
    save_model(tmp_path / "model.pth", network, architecture, SMALL, TASK, dice=0.75)
    model = load_model(tmp_path / "model.pth")
    assert model.task == TASK and model.info == {"channel_mul": SMALL, "dice": 0.75}
    assert model.architecture.info == architecture.info and model.architecture.codes() == architecture.codes()
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
    save_model(tmp_path / "m.pth", FoundNetwork(architecture, 2, 3, SMALL), architecture, SMALL, TASK)
    return torch.load(tmp_path / "m.pth", weights_only=True)


@pytest.mark.fault("missing key, codes, rows, paths, nodes")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        *((lambda c, key=key: c.pop(key), "is not a model file") for key in ("state_dict", "architecture", "task")),
        (lambda c: c["architecture"].pop("arch_code_c"), "has no 'arch_code_c'"),
        (lambda c: c.update(architecture=None), "holds a NoneType where a dictionary"),
        (lambda c: c["architecture"]["arch_code_a"].zero_(), "block 0 has no active path"),
        (lambda c: c["state_dict"].pop("stem_finals.1.bias"), "lacks 1 tensors"),
        (lambda c: c.update(state_dict=3), "does not hold network weights"),
        (lambda c: c["architecture"].update(operations=["conv_9x9x9"]), "names the operation 'conv_9x9x9'"),
        (lambda c: c["task"].pop("class_names"), "is damaged: its task and channel_mul 0.0625 .*class_names"),
        (lambda c: c["task"].update(colour="red"), "is damaged: .*colour"),
        *(
            (lambda c, key=key, value=value: c["task"].update({key: value}), rf"is damaged: .*\({key} .*; give another")
            for key, value in (
                *(("name", value) for value in (None, 5)),
                *(("modality", value) for value in ("US", None)),
                *(("num_channels", value) for value in ("two", -1, 0, 1.5, True)),
                *(("class_names", value) for value in (None, [], ["background"], ["a", 5], "abc", ["a"] * 256)),
                *(("spacing", value) for value in (1, [1.0, 1.0], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], "111")),
                *(("spacing", value) for value in ([1.0, math.nan, 1.0], [1.0, math.inf, 1.0], [1.0, "1", 1.0])),
                *(("intensity", value) for value in (0, [1.0], [1.0, 1.0], [2.0, 1.0], [0.0, math.inf], [None, 1.0])),
                *(("patch_size", value) for value in (None, 96, [32, 32], [32.0, 32.0, 32.0], ["a", "b", "c"])),
                ("channel_files", "no"),
            )
        ),
        (
            lambda c: c["task"].update(patch_size=[30, 32, 32]),
            "is damaged: .*patch_size 30 32 32 does not fit 4 depths",
        ),
        (lambda c: c["task"].update(patch_size=[-32, 0, 32]), "is damaged: .*patch_size -32 0 32 does not fit 4"),
        (lambda c: c.update(task=[]), "is damaged: .*list"),
        (lambda c: c.update(task=None), "is damaged: .*NoneType"),
        *(
            (lambda c, value=value: c.update(channel_mul=value), rf"is damaged: its .*{re.escape(repr(value))}")
            for value in ("x", None, [1], 0.0, -1.0, math.nan, math.inf, 1e300)
        ),
        *(
            (lambda c, key=key: c.update({key: endless()}), rf"is damaged: its {key} .*\[\[")
            for key in ("dice", "iteration", "fold", "data", "ranges", "training_cases")
        ),
        *(
            (lambda c, axes=axes: c.update(flips={"axes": axes}), "is damaged: its flips are {'axes': ")
            for axes in ([[1]], 5, [3], None, ["0"])
        ),
        (lambda c: c.update(flips=5), "is damaged: its flips are 5"),
        (lambda c: c.update(flips={"axes": endless()}), "is damaged: its flips is"),
        (lambda c: c.update(overlap_ratio="x" * 10**5), "is damaged: its overlap_ratio is"),
        (lambda c: c.update(version=torch.zeros(3)), "is damaged: its version is tensor"),
        (lambda c: c["task"].update(name=endless()), "is damaged: .*name"),
        (lambda c: c["task"].update({"x" * 10**6: 1}), "is damaged: .*xxx"),
        (lambda c: c["task"].update(class_names=["x" * 10**6, 5]), "is damaged: .*class_names"),
        (lambda c: c["task"].update(spacing=endless()), "is damaged: .*spacing"),
        # Before memory for such a network is asked for
        *(
            (lambda c, value=value: c.update(channel_mul=value), "has [0-9]+ tensors of another shape")
            for value in (1.0, 100.0)
        ),
    ],
)
def test_what_describes_no_network_is_refused(tmp_path, change, fault):
    content = model_content(tmp_path)
    change(content)
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(UserError, match=f"{tmp_path}/model.pth.*{fault}") as caught:
        load_model(tmp_path / "model.pth")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.fault("truncated, empty or foreign file")
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_no_model(tmp_path, keep):
    torch.save(model_content(tmp_path), tmp_path / "model.pth")
    whole = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="model.pth is damaged or not a PyTorch file"):
        load_model(tmp_path / "model.pth")


def test_files_of_before_operations_had_names_give_the_scores_that_they_gave():
    """An earlier version wrote files and scores; `tests/fixtures/README.md` says how."""
    model = load_model(FIXTURES / "model_before_operations.pth")
    alone = load_architecture(FIXTURES / "search_code_before_operations.pth", num_blocks=1, num_depths=2)
    assert alone.operations == model.architecture.operations == PUBLISHED
    assert alone.codes() == model.architecture.codes() == ([[1, 1, 1, 1]], [[1, 2, 3, 4]])
    assert model.task == TASK and model.info == {"channel_mul": SMALL, "dice": 0.8, "version": "0.1.0"}
    image = torch.linspace(-20, 20, 2 * 8**3, dtype=torch.float64).sin().reshape(1, 2, 8, 8, 8)
    with torch.no_grad():
        scores = model.network.double()(image)
    recorded = torch.from_numpy(np.load(FIXTURES / "scores_before_operations.npy"))
    # Equal here to the last bit; another processor may add up in another order.
    torch.testing.assert_close(scores, recorded, rtol=0, atol=1e-12)
    assert recorded.std() > 0.1
