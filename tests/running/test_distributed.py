"""Two gloo ranks: identical states, every case counted once, and the same scores as one process."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dints.phantom import write_phantom

CHECKOUT = Path(__file__).resolve().parents[1]
TINY = ["--patch_size", "16", "16", "16", "--num_workers", "0", "--num_folds", "2", "--overlap_ratio", "0"]
TINY += ["--device", "cpu", "--precision", "fp32"]


def torchrun(num_processes: int, script: str, *arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command += [str(CHECKOUT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_equal(first: object, second: object, where: str = "state") -> int:
    """Every tensor and value of two nested states is equal, to the bit; returns the number of tensors."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
        return 1
    if isinstance(first, dict):
        assert list(first) == list(second), where
        return sum(assert_equal(first[key], second[key], f"{where}.{key}") for key in first)
    if isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        return sum(assert_equal(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(first, second, strict=True)))
    assert first == second, where
    return 0


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    """Seven cases, so that neither halves, folds nor ranks divide evenly."""
    root = tmp_path_factory.mktemp("data") / "Task00_Phantom"
    write_phantom(root, num_training=7, num_test=1)
    return root


@pytest.fixture(scope="module")
def searched(phantom, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    space = ["--num_blocks", 2, "--num_depths", 3, "--channel_mul", 0.125]
    epochs = ["--num_epochs", 4, "--num_epochs_warmup", 2, "--num_epochs_per_validation", 4]
    torchrun(2, "tests/ranks.py", "search_dints", "--root", phantom, "--output_root", folder, *space, *epochs, *TINY)
    return folder


@pytest.fixture(scope="module")
def trained(phantom, searched, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    code = next(searched.glob("search_code_*.pth"))
    flags = ["--arch_ckpt", code, "--channel_mul", 0.125, "--num_epochs", 2, "--num_images_per_batch", 1, *TINY]
    torchrun(2, "tests/ranks.py", "train_dints", "--root", phantom, "--output_root", folder, *flags)
    return folder


@pytest.mark.parametrize("stage", ["searched", "trained"])
def test_ranks_hold_identical_states(stage, request):
    folder = request.getfixturevalue(stage)
    first, second = (torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    assert assert_equal(first, second) > 50


def test_the_architecture_learned(searched):
    state = torch.load(searched / "rank0.pth", weights_only=True)["parts"]
    for optimizer in ("optimizer_a", "optimizer_c"):
        (alpha,) = state[optimizer]["state"].values()
        assert alpha["step"] == 2 * 1  # two epochs after the warm-up, of ceil(2 cases / 2 ranks) steps
        assert alpha["exp_avg"].abs().max() > 0


def dice_of_history(folder: Path) -> float:
    *_, last = csv.DictReader((folder / "accuracy_history.csv").open())
    return float(last["dice"])


def test_one_process_and_two_agree_on_validation(phantom, trained, tmp_path):
    model = trained / "best_metric_model.pth"
    tables = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        torchrun(
            processes,
            "infer_dints.py",
            "--checkpoint",
            model,
            "--root",
            phantom,
            "--num_folds",
            2,
            "--output_root",
            folder,
            "--device",
            "cpu",
            "--precision",
            "fp32",
        )
        tables.append(list(csv.reader((folder / "scores.csv").open())))
    assert len(tables[0]) == 1 + 3  # fold 0 of 2 of seven cases
    for one, two in zip(*tables, strict=True):
        assert one[0] == two[0]
        if one[0] != "case":
            assert [float(v or "nan") for v in one[1:]] == pytest.approx(
                [float(v or "nan") for v in two[1:]], abs=1e-4, nan_ok=True
            )


def test_validation_in_training_agrees_with_one_process(phantom, trained, tmp_path):
    """The Dice that two ranks found in training is what one process finds for the weights that were saved."""
    import train_dints
    from dints import data, engine, runtime
    from dints.cache import open_cache
    from dints.dataset import split_fold
    from dints.network import load_model

    network, _, task, content = load_model(trained / "best_metric_model.pth")
    flags = ["--arch_ckpt", "x", "--root", str(phantom), "--output_root", str(tmp_path), *TINY]
    args = train_dints.parse_args(flags)
    _, validation = split_fold(data.open_dataset(args).cases, 2, 0)
    alone = runtime.Processes(0, 1, torch.device("cpu"))
    precision = runtime.Precision("fp32", alone.device)
    window = engine.SlidingWindow(task.patch_size, 0.0, 6)
    loader = data.validation_loader(validation, open_cache(validation, task, args, alone), alone)
    scores = engine.validate(network, loader, len(validation), task, window, precision, alone)
    assert scores.mean == pytest.approx(content["dice"], abs=1e-4)


def test_fewer_validation_cases_than_ranks(phantom, searched, tmp_path):
    code = next(searched.glob("search_code_*.pth"))
    flags = [
        "--arch_ckpt",
        code,
        "--channel_mul",
        0.125,
        "--num_epochs",
        1,
        "--num_images_per_batch",
        1,
        *TINY,
        "--num_folds",
        7,
    ]
    torchrun(2, "train_dints.py", "--root", phantom, "--output_root", tmp_path, *flags)
    assert dice_of_history(tmp_path) >= 0


def test_two_nodes_through_the_launcher(phantom, tmp_path):
    """Two agents on the loopback, each with one process, meet and run one search."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    environment |= {"TASK": "Task00_Phantom", "DATA_ROOT": str(phantom), "OUTPUT_ROOT": str(tmp_path / "run")}
    environment |= {"NUM_NODES": "2", "NUM_GPUS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "FOLD": "0"}
    command = ["bash", str(CHECKOUT / "search_dints.sh"), "--num_blocks", "1", "--num_depths", "3"]
    command += ["--channel_mul", "0.125", "--num_epochs", "2", "--num_epochs_warmup", "1", *TINY]
    nodes = [
        subprocess.Popen(
            command, env={**environment, "NODE_RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in "01"
    ]
    said = "".join(node.communicate(timeout=200)[0].decode() for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "on 2 x cpu" in said and dice_of_history(tmp_path / "run") >= 0
