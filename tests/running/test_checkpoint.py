"""The state that a run resumes from: kept twice, checked, never half; and what is refused."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_run import ALONE, CPU
from states import progress_of

import search_dints
from dints import torch_files
from dints.data.tasks import TASKS
from dints.errors import UserError
from dints.options import course
from dints.running import checkpoint as module
from dints.running.checkpoint import Checkpoint, find_state
from dints.running.precision import Precision
from dints.running.progress import Progress

CONFIGURATION = {"num_epochs": 3, "seed": 0, "processes": 1}
KILL = pytest.mark.fault("SIGKILL while saving")


def layer(value: float, size: int = 4) -> torch.nn.Linear:
    network = torch.nn.Linear(size, size)
    torch.nn.init.constant_(network.weight, value)
    return network


def begun(folder: Path, network: torch.nn.Module, precision: str = "fp32", resume: str = "auto") -> Checkpoint:
    """Begin a run as a script does: resume what is in the folder, or save a new run's state."""
    return begun_with(folder, CONFIGURATION, {"network": network}, precision, resume)


def begun_with(
    folder: Path, configuration: dict, parts: dict, precision: str = "fp32", resume: str = "auto"
) -> Checkpoint:
    found = find_state(folder, configuration, resume)
    checkpoint = Checkpoint(folder, configuration, parts, Precision(precision, CPU), ALONE)
    checkpoint.restore(found)
    return checkpoint


def save(folder: Path, *values: float, size: int = 4, **more: str) -> Checkpoint:
    """Save a run's state with each of these values, after one step each."""
    network = layer(0.0, size)
    checkpoint = begun(folder, network, **more)
    for value in values:
        torch.nn.init.constant_(network.weight, value)
        checkpoint.progress.step_done()
        checkpoint.save()
    return checkpoint


def restored(folder: Path, size: int = 4, **more: str) -> tuple[float, Progress]:
    network = layer(-1.0, size)
    progress = begun(folder, network, **more).progress
    (value,) = network.weight.unique().tolist()
    return value, progress


# Saving and continuing


def test_a_run_saves_before_it_begins(tmp_path):
    assert restored(tmp_path) == (-1.0, Progress())
    state = torch.load(tmp_path / "latest.pth", weights_only=True)
    assert state["format"] == module.FORMAT and state["precision"] == "fp32" and state["configuration"] == CONFIGURATION


def test_what_was_saved_is_restored(tmp_path):
    save(tmp_path, 1.0, 2.0, precision="bf16")
    value, progress = restored(tmp_path, resume="must")
    assert (value, progress.step, progress.iteration) == (2.0, 2, 2)
    assert find_state(tmp_path, CONFIGURATION).precision == "bf16"


@KILL
def test_the_two_newest_are_kept(tmp_path):
    save(tmp_path, 1.0, 2.0, 3.0)
    assert {path.name: progress_of(tmp_path, path.name)["iteration"] for path in tmp_path.iterdir()} == {
        "latest.pth": 3,
        "previous.pth": 2,
    }


def flip_a_bit(path: Path) -> None:
    """Flip one in the middle of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 8
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit": flip_a_bit,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_text("not a checkpoint"),
    "missing": lambda path: path.unlink(),  # killed between the two renames
}


@KILL
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, damage, caplog):
    save(tmp_path, 1.0, 2.0, size=200)
    DAMAGES[damage](tmp_path / "latest.pth")
    value, progress = restored(tmp_path, size=200)
    assert (value, progress.iteration) == (1.0, 1)
    assert ("previous.pth, the one before" in caplog.text) == (damage != "missing")
    # And the good one is not thrown away for the damaged one by the next save.
    begun(tmp_path, layer(5.0, 200)).save()
    for path in tmp_path.iterdir():
        module._load(path)


@KILL
@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_two_damaged_ones_are_refused(tmp_path, damage):
    save(tmp_path, 1.0, 2.0, size=200)
    for name in ("latest.pth", "previous.pth"):
        DAMAGES[damage](tmp_path / name)
    with pytest.raises(UserError, match="previous.pth"):
        find_state(tmp_path, CONFIGURATION)


@pytest.mark.fault("one-bit damage in tensor data")
def test_every_flipped_bit_of_a_tensor_is_noticed(tmp_path):
    save(tmp_path, 1.0, size=64)
    path = tmp_path / "latest.pth"
    whole = path.read_bytes()
    start = whole.index(torch.ones(64 * 64).numpy().tobytes())
    for place in range(start, start + 64 * 64 * 4, 511):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            module._load(path)


@pytest.mark.fault("disk full while saving")
def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    checkpoint = save(tmp_path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(UserError, match=r"latest.pth needs 0.0 MiB, and 0.0 are free on its disk: free some space"):
            checkpoint.save()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="latest.pth cannot be written: No space left on device"):
            checkpoint.save()
    assert restored(tmp_path)[0] == 1.0 and not list(tmp_path.glob(".*"))


@pytest.mark.fault("non-finite loss on one rank")
def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    save(tmp_path, 1.0)
    network = layer(0.0)
    checkpoint = begun(tmp_path, network)
    network.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match="the training diverged: weights are not finite, and are not saved; lower"):
        checkpoint.save()
    assert restored(tmp_path)[0] == 1.0


# Refusals


@pytest.mark.fault("resume with other data or other flags")
def test_every_setting_that_differs_is_named(tmp_path):
    save(tmp_path, 1.0)
    with pytest.raises(UserError, match="num_epochs was 3 and is 4, seed was 0 and is 1"):
        find_state(tmp_path, {**CONFIGURATION, "num_epochs": 4, "seed": 1})
    with pytest.raises(UserError, match="loss was None and is 'dice'"):
        find_state(tmp_path, {**CONFIGURATION, "loss": "dice"})


@pytest.mark.fault("world size changes between stop and resume")
def test_another_number_of_processes_needs_a_flag(tmp_path, caplog):
    save(tmp_path, 1.0)
    other = {**CONFIGURATION, "processes": 2}
    with pytest.raises(UserError, match="processes was 1 and is 2.*--allow_other_num_processes"):
        find_state(tmp_path, other)
    assert find_state(tmp_path, other, allow_other_num_processes=True).path == tmp_path / "latest.pth"
    assert "had 1 processes and has 2: it continues, but not to the result that it would have had" in caplog.text
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        find_state(tmp_path, {**other, "seed": 1}, allow_other_num_processes=True)


def test_must_needs_something_to_continue(tmp_path):
    with pytest.raises(UserError, match="--resume must, but there is no .*latest.pth"):
        find_state(tmp_path, CONFIGURATION, resume="must")


@pytest.mark.fault("non-empty output folder of another run")
@pytest.mark.parametrize("name", ["Events", "search_code_600.pth"])
def test_results_without_a_state_are_not_overwritten(tmp_path, name):
    (tmp_path / name).mkdir() if name == "Events" else (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"holds results .{name}. but no latest.pth to continue from: .*--resume never"):
        find_state(tmp_path, CONFIGURATION)


@pytest.mark.parametrize("content", [[1, 2], {"configuration": {}}])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "latest.pth")
    with pytest.raises(UserError, match="latest.pth is not a run's checkpoint"):
        find_state(tmp_path, CONFIGURATION)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    save(tmp_path, 1.0)
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(UserError, match="has the format 1, and this version writes 2: .*--resume never"):
        find_state(tmp_path, CONFIGURATION)


CASES = [f"case_{number}.nii.gz" for number in range(6)]
SPLEEN = TASKS["Task09_Spleen"]


def contents(**changed: object) -> dict:
    """Return a configuration as the scripts make it."""
    content = {"task": SPLEEN.to_dict(), "cases": CASES, "architecture": ([[0]],)}
    return {"seed": 0, "processes": 1, **content, **changed}


def saved(folder: Path, configuration: dict, **more: object) -> None:
    """Save a state with this configuration, as a run does."""
    state = {"format": module.FORMAT, "configuration": configuration, "precision": "fp32", "parts": {}}
    torch.save({**state, "progress": {"epoch": 1, "iteration": 3}, **more}, folder / "latest.pth")


@pytest.mark.fault("resume with other data or other flags")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"task": replace(SPLEEN, spacing=(2.0, 2.0, 2.0), intensity=None).to_dict()},
            "task intensity was [-125.0, 275.0] and is None, task spacing was [1.0, 1.0, 1.0] and is [2.0, 2.0, 2.0]",
        ),
        (
            {"cases": [*CASES[:5], "new_1", "new_2", "new_3", "new_4"]},
            "of the cases 4 came (new_1, new_2, new_3, ...) and 1 went (case_5.nii.gz)",
        ),
        ({"cases": CASES[:4]}, "of the cases 2 went (case_4.nii.gz, case_5.nii.gz)"),
        ({"cases": CASES[::-1]}, "the cases are in another order"),
        ({"architecture": ([[1]],)}, "architecture changed"),
    ],
)
def test_what_differs_in_the_contents_is_said_without_digests(tmp_path, changed, said):
    saved(tmp_path, contents())
    with pytest.raises(UserError, match=re.escape(f"belongs to a run with other settings ({said}): use those again")):
        find_state(tmp_path, contents(**changed))


def test_a_long_list_of_differences_is_cut(tmp_path):
    saved(tmp_path, {**contents(), **{f"{number}" * 50_000: "x" * 50_000 for number in range(99)}})
    with pytest.raises(UserError, match="and 69 more") as refused:
        find_state(tmp_path, contents())
    assert len(str(refused.value)) < 10_000


def test_a_run_has_an_identity_which_it_keeps(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    first, again, other = (begun_with(tmp_path / name, contents(), {}).progress.run for name in "aab")
    assert len(first) == 32 and again == first and other != first


# Hostile files


def endless() -> list:
    value = ["x"] * 50
    for _ in range(50):
        value = [value] * 50
    return value


def deep() -> list:
    """Return a list that is as deep as `torch.save` can write without that its recursion ends."""
    value = []
    for _ in range(300):
        value = [value]
    return value


HOSTILE = {
    "configuration, a list": {"configuration": [1]},
    "configuration, endless": {"configuration": {"processes": 1, "seed": endless()}},
    "configuration, deep": {"configuration": {"processes": 1, "seed": deep()}},
    "configuration, tensor": {"configuration": {"processes": 1, "seed": torch.zeros(3)}},
    "configuration, numbers for keys": {"configuration": {"processes": 1, 5: 1}},
    "configuration, processes": {"configuration": {"processes": "many"}},
    "precision": {"precision": "fp64"},
    "progress, unknown": {"progress": {"epoch": 1, "colour": "red"}},
    "progress, text": {"progress": {"epoch": "one"}},
    "progress, negative": {"progress": {"epoch": -1}},
    "progress, NaN": {"progress": {"seconds": float("nan")}},
    "parts, a tensor": {"parts": torch.zeros(3)},
    "parts, missing": {"parts": {"optimizer": {}}},
    "network, endless": {"parts": {"network": endless()}},
    "network, other shape": {"parts": {"network": {"weight": torch.zeros(9, 4), "bias": torch.zeros(4)}}},
    "network, long name": {"parts": {"network": {"weight": torch.zeros(4, 4), "x" * 10**6: torch.zeros(4)}}},
    "network, NaN": {"parts": {"network": {"weight": torch.full((4, 4), torch.nan), "bias": torch.zeros(4)}}},
    "network, repeated": {"parts": {"network": {"weight": torch.zeros(1).expand(10**12)}}},
    "network, sparse": {"parts": {"network": {"weight": torch.eye(4).to_sparse(), "bias": torch.zeros(4)}}},
    "format": {"format": endless()},
}


def network_and_optimizer() -> dict:
    network = layer(0.0)
    return {"network": network, "optimizer": torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)}


@pytest.mark.fault("missing key, codes, rows, paths, nodes")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_one_short_line(tmp_path, name):
    saved(tmp_path, **{"configuration": contents(), **HOSTILE[name]})
    with pytest.raises(UserError, match="latest.pth") as refused:
        begun_with(tmp_path, contents(), network_and_optimizer())
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["state"][0].update(momentum_buffer=torch.zeros(9, 9)),
        lambda state: state["state"][0].update(momentum_buffer="x"),
        lambda state: state["param_groups"][0].update(momentum="x"),
        lambda state: state["param_groups"][0].update(params=[0]),
        lambda state: state.update(param_groups=5),
    ],
    ids=["shape", "text", "setting", "fewer", "groups"],
)
def test_a_hostile_optimizer_is_refused_in_one_short_line(tmp_path, change):
    parts = network_and_optimizer()
    parts["network"](torch.zeros(1, 4)).sum().backward()
    parts["optimizer"].step()
    states = {name: part.state_dict() for name, part in parts.items()}
    change(states["optimizer"])
    saved(tmp_path, contents(), parts=states)
    with pytest.raises(UserError, match="latest.pth does not fit this run: its optimizer cannot be loaded") as refused:
        begun_with(tmp_path, contents(), network_and_optimizer())
    assert len(str(refused.value)) < 1000


@pytest.mark.fault("resume with other data or other flags")
def test_the_configuration_knows_what_is_computed_but_not_places():
    def configuration(root: str, *more: str) -> dict:
        return course(search_dints.parse_args(["--root", root, "--output_root", f"runs/{root}", *more]))

    first = configuration("here")
    others = "--timeout_minutes 3 --warning_signal USR2 --cache disk --num_workers 3 --cuda_graphs"
    assert first == configuration("there", *others.split())
    assert torch_files.is_plain(first)
    for flags in ("--seed 1", "--loss other", "--spacing 1 1 2", "--checkpoint other.pth"):
        assert first != configuration("here", *flags.split())
