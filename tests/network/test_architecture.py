"""Architecture files load, ours and published ones, and of those that do not one line says why."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import chain, random_architecture
from monai.networks.nets.dints import DiNTS, TopologyInstance
from published import network

from dints.errors import UserError
from dints.network.architecture import (
    Architecture,
    DecodedCodes,
    load_architecture,
    paths,
    save_architecture,
)
from dints.network.operations import PUBLISHED

ARRAYS = ("node_a", "arch_code_a", "arch_code_c", "arch_code_a_max")
INFO = {"iter_num": 600, "best_dsc": 0.81, "best_path": None, "factor_ram_cost": 0.8}


def assert_same(one: Architecture, other: Architecture) -> None:
    for key in ARRAYS:
        np.testing.assert_array_equal(getattr(one, key), getattr(other, key))
        assert getattr(one, key) is None or getattr(one, key).dtype == np.int64


def with_max(drawn: Architecture, **info) -> Architecture:
    """Add the most probable paths regardless of neighbours; here all that are not active."""
    return Architecture(
        drawn.node_a, drawn.arch_code_a, drawn.arch_code_c, 1 - drawn.arch_code_a, **info
    )


def message_of(path: Path) -> str:
    """Return what loading the file says: one line that names it."""
    with pytest.raises(UserError) as caught:
        load_architecture(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("num_depths", [2, 5])
def test_paths_are_those_of_monai(num_depths):
    one_block = torch.zeros(1, 3 * num_depths - 2).numpy()
    space = TopologyInstance([one_block, one_block], num_blocks=1, num_depths=num_depths)
    assert paths(num_depths) == list(zip(space.arch_code2in, space.arch_code2out, strict=True))


@pytest.mark.parametrize("size", [(1, 2), (12, 4)], ids=str)
def test_what_is_saved_is_loaded(tmp_path, size):
    saved = with_max(random_architecture(1, *size), info=INFO)
    save_architecture(tmp_path / "code.pth", saved)
    loaded = load_architecture(tmp_path / "code.pth")
    assert_same(loaded, saved)
    assert (loaded.num_blocks, loaded.num_depths, loaded.info) == (*size, INFO)

    content = torch.load(tmp_path / "code.pth", weights_only=True)
    assert content.keys() == {*ARRAYS, *INFO, "operations", "use_downsample"}
    assert content["operations"] == list(PUBLISHED) and content["use_downsample"] is True
    assert all(isinstance(content[key], torch.Tensor) for key in ARRAYS)
    full = replace(saved, use_downsample=False)
    assert full.codes() != saved.codes()  # another network, whose runs are other runs
    save_architecture(tmp_path / "full.pth", full)
    assert load_architecture(tmp_path / "full.pth").use_downsample is False


def published(architecture: Architecture, dtype: type = np.float64) -> dict:
    """Return the content of a file as the published search wrote it."""
    return {
        "node_a": architecture.node_a,
        "code_a": architecture.arch_code_a.astype(dtype),
        "code_c": architecture.arch_code_c,
        "code_a_max": architecture.arch_code_a_max.astype(dtype),
        "iter_num": np.int64(1430),
        "best_dsc": np.float32(0.625),
        "losses": np.array([0.5, 0.25]),
        "best_path": 1400,
    }


def save_as_numpy_1(content: object, path: Path) -> None:
    """Save under the old module names: in pickle protocol 2 one ends at its newline."""
    torch.save(content, path)
    names = b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, data.replace(*names) if name.endswith("/data.pkl") else data)


def save_as_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def test_monais_own_instance_reads_a_file_of_ours_as_the_page_says(tmp_path):
    saved = random_architecture(3, 3, 3)
    save_architecture(tmp_path / "search_code_600.pth", saved)
    text = (Path(__file__).parents[2] / "docs/published.md").read_text()
    (line,) = re.findall(r"```python\n([^`]*arch_code = [^`]*)```", text)
    names = {}
    exec(line.replace('"search_code_600.pth"', f'r"{tmp_path}/search_code_600.pth"'), names)  # noqa: S102
    size = {"channel_mul": 0.125, "num_blocks": 3, "num_depths": 3}
    with pytest.raises(TypeError, match="expected np.ndarray"):
        TopologyInstance([names["code"]["arch_code_a"], names["code"]["arch_code_c"]], **size)
    instance = TopologyInstance(names["arch_code"], **size)
    theirs = DiNTS(instance, 1, 3, node_a=names["code"]["node_a"])
    assert theirs.state_dict().keys() == network(saved, 1, 3, 0.125).state_dict().keys()
    assert theirs(torch.zeros(1, 1, 32, 32, 32)).shape[1] == 3


@pytest.mark.fault("legacy NumPy files")
@pytest.mark.parametrize("dtype", [np.float64, np.uint8, ">i8"], ids=str)
@pytest.mark.parametrize("save", [save_as_numpy_1, save_as_legacy])
def test_published_files_load_and_what_we_make_of_them_needs_no_allow_list(tmp_path, save, dtype):
    architecture = with_max(random_architecture(2, 12, 4))
    save(published(architecture, dtype), tmp_path / "published.pth")
    loaded = load_architecture(tmp_path / "published.pth")
    assert_same(loaded, architecture)
    kept = {"iter_num": 1430, "best_dsc": 0.625, "losses": [0.5, 0.25], "best_path": 1400}
    assert loaded.info == kept

    save_architecture(tmp_path / "ours.pth", loaded)
    assert kept.items() <= torch.load(tmp_path / "ours.pth", weights_only=True).items()
    assert_same(load_architecture(tmp_path / "ours.pth"), architecture)


class Payload:
    """Runs a shell command when it is unpickled without care."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.fault("malicious pickle")
@pytest.mark.parametrize(
    "form", ["zip", "legacy", "plain pickle", "inside an array", "beside good arrays"]
)
def test_a_malicious_file_runs_nothing(tmp_path, form):
    file, marker = tmp_path / "code.pth", tmp_path / "it_ran"
    malicious = Payload(marker)
    fault = "asks for posix.system while loading; only tensors and NumPy arrays"
    if form == "plain pickle":
        file.write_bytes(pickle.dumps({"node_a": malicious}, protocol=2))
    elif form == "inside an array":
        torch.save({"node_a": np.array([malicious], dtype=object)}, file)
        fault = "is damaged or not a PyTorch file"
    elif form == "beside good arrays":
        torch.save({**GOOD, "note": malicious}, file)
    else:
        torch.save(malicious, file, _use_new_zipfile_serialization=form == "zip")
    assert fault in message_of(file)
    assert not marker.exists()

    # The trap does work: loaded without care, the file runs its payload.
    if form == "plain pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert marker.exists()


@pytest.mark.fault("truncated, empty or foreign file")
@pytest.mark.parametrize("save", [torch.save, save_as_legacy])
def test_a_truncated_file_is_refused(tmp_path, save):
    file = tmp_path / "code.pth"
    save(random_architecture(0, 12, 4).to_dict(), file)
    whole = file.read_bytes()
    for keep in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:keep])
        assert "is damaged or not a PyTorch file" in message_of(file)


@pytest.mark.fault("truncated, empty or foreign file")
@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda path: None, "does not exist"),
        (Path.mkdir, "is a folder"),
        (lambda path: path.write_text("node_a: [[1, 0]]"), "is damaged or not a PyTorch file"),
        (lambda path: torch.save([1, 2], path), "holds a list where a dictionary is expected"),
        (lambda path: torch.save(torch.nn.Linear(1, 1).state_dict(), path), "has no 'node_a'"),
        (lambda path: np.savez(path.open("wb"), node_a=np.ones(2)), "not a PyTorch file"),
    ],
    ids=["missing", "folder", "text", "list", "state dict", "npz"],
)
def test_a_foreign_file_is_refused(tmp_path, make, fault):
    make(tmp_path / "code.pth")
    assert fault in message_of(tmp_path / "code.pth")


def entry(key: str, index: tuple[int, int], value: float) -> dict:
    """Return the content of ``GOOD`` with one other number."""
    array = GOOD[key].double()
    array[index] = value
    return {**GOOD, key: array}


GOOD = {**chain(0, 1, 1, 0, num_depths=3).to_dict(), "arch_code_a_max": torch.zeros(3, 7)}
META = torch.ones(4, 3, device="meta")
NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
LEVEL_1 = 3  # the path of depth 1 to itself


@pytest.mark.fault("missing key, codes, rows, paths, nodes")
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({key: GOOD[key] for key in GOOD if key != "node_a"}, "has no 'node_a'"),
        (entry("arch_code_c", (0, 0), 9), "'arch_code_c' holds 9; values are 0 to 4"),
        (entry("arch_code_c", (2, 6), -1), "'arch_code_c' holds -1; values are 0 to 4"),
        (entry("arch_code_c", (1, 3), 1.7), "'arch_code_c' holds 1.7 where only whole numbers"),
        (entry("arch_code_a", (1, 3), 0.5), "'arch_code_a' holds 0.5 where only whole numbers"),
        ({**GOOD, "use_downsample": 2}, "'use_downsample' is not True or False"),
        (entry("node_a", (0, 0), np.nan), "'node_a' holds nan where only whole numbers"),
        (entry("arch_code_a", (1, LEVEL_1), 0), "block 1 has no active path"),
        (entry("arch_code_a", (2, 0), 1), "ends at depths [1], but block 2 starts from [0, 1]"),
        (entry("node_a", (0, 1), 1), "'node_a' activates depths [0, 1], but the paths use [0]"),
        ({**GOOD, "node_a": GOOD["node_a"][1:]}, "'node_a' has shape (3, 3), but"),
        ({**GOOD, "arch_code_c": torch.ones(3, 7, 5)}, "'arch_code_c' has shape (3, 7, 5), but"),
        ({**GOOD, "arch_code_a": torch.ones(3, 8)}, "'arch_code_a' has shape (3, 8), not (blocks"),
        # One number in the file, and 8 GB in memory were it taken as it is
        ({**GOOD, "arch_code_a": torch.zeros(1).expand(10**9, 7)}, "too large for an architecture"),
        ({**GOOD, "arch_code_a": torch.ones(1, 49)}, "1 blocks and 17 depths, more than the 1000"),
        *(
            ({**GOOD, "node_a": value}, "'node_a' is not an array of numbers")
            for value in ("four", [[1], [1, 0]], torch.ones(4, 3).to_sparse(), META, NESTED)
        ),
    ],
)
def test_what_is_no_network_is_refused(tmp_path, content, fault):
    torch.save(content, tmp_path / "code.pth")
    message = message_of(tmp_path / "code.pth")
    assert fault in message and "give an arch file as search_dints.py writes it" in message


# What NumPy says when it frees an array of a damaged dtype
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("save", [torch.save, save_as_legacy])
@pytest.mark.parametrize("content_of", [Architecture.to_dict, published])
def test_a_file_with_any_bytes_changed_loads_or_is_refused(tmp_path, content_of, save):
    """Whatever the damage, there is at most a `UserError` of one line."""
    file, rng = tmp_path / "code.pth", np.random.default_rng(0)
    save(content_of(with_max(random_architecture(0, 3, 3))), file)
    whole, refused = file.read_bytes(), 0
    for _ in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=rng.integers(1, 4)):
            damaged[place] = rng.choice([0, 255, rng.integers(256)])
        file.write_bytes(damaged)
        try:
            load_architecture(file)
        except UserError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
    assert 12 < refused < 40


def test_changes_of_what_is_decoded_are_counted_and_outlive_a_checkpoint():
    before, changed = DecodedCodes(), DecodedCodes()
    before.take(chain(0, 0, 0, num_depths=2, operation=1))
    changed.load_state_dict(before.state_dict())
    for depths, operation, paths_and_operations in (
        ((0, 0, 0), 1, [0, 0]),
        ((0, 1, 1), 2, [4, 0]),  # of no path that was active before
        ((0, 0, 0), 2, [0, 2]),
    ):
        counted = changed.changes(chain(*depths, num_depths=2, operation=operation))
        assert list(counted.values()) == paths_and_operations
