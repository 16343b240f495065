"""The two stages as a user runs them: real scripts on a small dataset, and the files that they leave."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import search_dints
import train_dints
from dints.architecture import load_architecture
from dints.cost import Cost, cost
from dints.errors import UserError
from dints.network import load_model
from dints.phantom import write_phantom

CHECKOUT = Path(__file__).resolve().parents[1]
TINY = ["--patch_size", "16", "16", "16", "--num_workers", "0", "--num_folds", "3", "--overlap_ratio", "0"]
TINY += ["--device", "cpu", "--precision", "fp32", "--channel_mul", "0.125"]
SEARCH = [*TINY, "--num_blocks", "2", "--num_depths", "3", "--num_epochs", "4", "--num_epochs_warmup", "2"]
SEARCH += ["--num_epochs_per_validation", "2", "--learning_rate_arch", "0.1"]
TRAIN = [*TINY, "--num_epochs", "3", "--num_epochs_per_validation", "2"]


def search(root: Path, output_root: Path, *flags: object) -> None:
    search_dints.main(
        search_dints.parse_args(["--root", str(root), "--output_root", str(output_root), *SEARCH, *map(str, flags)])
    )


def train(root: Path, output_root: Path, arch_ckpt: Path, *flags: object) -> None:
    arguments = ["--root", root, "--output_root", output_root, "--arch_ckpt", arch_ckpt, *TRAIN, *flags]
    train_dints.main(train_dints.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "Task00_Phantom"
    write_phantom(root, num_training=6, num_test=1)
    return root


@pytest.fixture(scope="module")
def searched(phantom, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    search(phantom, folder)
    return folder


@pytest.fixture(scope="module")
def code(searched) -> Path:
    return searched / "search_code_8.pth"


@pytest.fixture(scope="module")
def trained(phantom, code, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    train(phantom, folder, code)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


class TestSearch:
    def test_leaves_what_it_promises(self, searched):
        expected = ["search_code_4.pth", "search_code_4.gv", "search_code_8.pth", "search_code_8.gv", "latest.pth"]
        expected += ["accuracy_history.csv", "loss_history.csv", "progress.yaml", "Events", "training_loss.png"]
        assert not [name for name in [*expected, "validation_metric.png"] if not (searched / name).exists()]
        assert not list(searched.rglob("*.partial"))
        if shutil.which("dot"):
            assert (searched / "search_code_8.png").stat().st_size > 1000

    def test_the_found_architecture_says_where_it_came_from(self, code):
        found = load_architecture(code, num_blocks=2, num_depths=3)
        assert found.info["iter_num"] == 8 and found.info["epochs"] == 4
        assert found.info["factor_ram_cost"] == 0.8 and found.info["task"] == "Task00_Phantom"
        assert torch.load(code, weights_only=True)["node_a"].shape == (3, 3)

    def test_the_architecture_rests_during_the_warm_up_and_moves_after_it(self, searched):
        losses = rows(searched / "loss_history.csv")
        assert [row["iteration"] for row in losses] == ["2", "4", "6", "8"]
        assert [bool(row["architecture_loss"]) for row in losses] == [False, False, True, True]
        assert losses[0]["ram_ratio"] == losses[1]["ram_ratio"] != losses[3]["ram_ratio"]

    def test_weights_and_architecture_are_disjoint(self, searched):
        parts = torch.load(searched / "latest.pth", weights_only=True)["parts"]
        numbers = len(parts["optimizer"]["param_groups"][0]["params"])
        assert numbers == len(parts["network"]) - 2
        assert {name for name in parts["network"] if "alpha" in name} == {
            "dints_space.log_alpha_a",
            "dints_space.log_alpha_c",
        }

    def test_scalars_are_on_tensorboard(self, searched):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(searched / "Events"))
        events.Reload()
        names = {"train/loss", "train/architecture_loss", "train/entropy_a", "train/entropy_c", "train/ram_ratio"}
        names |= {"train/ram_target", "train/learning_rate", "train/seconds_per_iteration", "validation/dice_liver"}
        assert names <= set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]

    def test_progress_tells_the_best_validation(self, searched):
        progress = yaml.safe_load((searched / "progress.yaml").read_text())
        best = max(rows(searched / "accuracy_history.csv"), key=lambda row: float(row["dice"]))
        assert progress["best_avg_dice_score"] == pytest.approx(float(best["dice"]))
        assert progress["best_avg_dice_score_iteration"] == int(best["iteration"])

    def test_each_epoch_tells_how_the_decoded_architecture_changed(self, searched):
        losses = rows(searched / "loss_history.csv")
        changed = [int(row["changed_paths"]) + int(row["changed_operations"]) for row in losses]
        assert changed[:2] == [0, 0] and sum(changed) > 0

    def test_the_architecture_says_what_its_network_costs(self, code, caplog):
        found = load_architecture(code)
        counted = cost(found, 1, 3, (16, 16, 16)).to_dict()
        written = found.info["cost"]
        for key in ("parameters", "gmac", "activation_mib", "input_shape", "channel_mul"):
            assert written[key] == counted[key], key
        assert written["latency_ms"] > 0
        lines = Cost(**{**written, "input_shape": tuple(written["input_shape"])}).lines()
        source = code.with_suffix(".gv").read_text()
        assert all(line in source for line in lines)
        assert f"{found.info['ram_ratio']:.3f} of the memory" in source

    def test_it_keeps_a_memory_budget(self, phantom, searched, tmp_path, caplog):
        free = load_architecture(searched / "search_code_8.pth").info["ram_ratio"]
        flags = ["--max_ram_ratio", 0.5 * free, "--ram_budget", "fixed", "--num_epochs_warmup", 1, "--num_epochs", 2]
        with caplog.at_level("INFO"):
            search(phantom, tmp_path, *flags)
        found = load_architecture(tmp_path / "search_code_4.pth").info["ram_ratio"]
        assert 0 < found <= 0.5 * free
        assert f"decoded: {found:.3f} of the memory of every path with its dearest operation" in caplog.text
        with pytest.raises(UserError, match="--max_ram_ratio 0.0001 is too small for 2 blocks and 3 depths: give at"):
            search(phantom, tmp_path / "other", "--max_ram_ratio", 0.0001)

    def test_a_loss_that_is_not_finite_stops_it(self, phantom, tmp_path):
        message = (
            r"the loss is not finite at iteration 2 \(cases phantom_00.\), and in 3 steps in a row: the training div"
        )
        with pytest.raises(UserError, match=message):
            search(phantom, tmp_path, "--learning_rate", 1e30)
        state = torch.load(tmp_path / "latest.pth", weights_only=True)  # the one that every run begins with
        assert state["progress"]["iteration"] == 0


class TestTrain:
    def test_the_model_file_needs_nothing_beside(self, trained, code):
        network, architecture, task, content = load_model(trained / "best_metric_model.pth")
        assert architecture.same_network(load_architecture(code))
        assert task.name == "Task00_Phantom" and task.patch_size == (16, 16, 16)
        assert network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)
        assert not [key for key in content["state_dict"] if key.startswith("module.")]
        assert content["dice"] == pytest.approx(
            max(float(row["dice"]) for row in rows(trained / "accuracy_history.csv"))
        )

    def test_every_weight_trained(self, trained):
        state = torch.load(trained / "latest.pth", weights_only=True)["parts"]["optimizer"]["state"]
        assert all(values["momentum_buffer"].abs().max() > 0 for values in state.values())

    def test_fine_tunes_from_a_checkpoint(self, phantom, trained, code, tmp_path):
        """Without a step to speak of, the fine-tuned network is the one that it started from."""
        train(phantom, tmp_path, code, "--checkpoint", trained / "best_metric_model.pth", "--learning_rate", 1e-12)
        start, end = (load_model(folder / "best_metric_model.pth")[0].state_dict() for folder in (trained, tmp_path))
        assert all(torch.allclose(start[key], end[key], atol=1e-6) for key in start)

    def test_all_cases_without_validation(self, phantom, code, tmp_path):
        train(phantom, tmp_path, code, "--fold", "all", "--num_epochs", 1)
        assert load_model(tmp_path / "best_metric_model.pth")[3]["dice"] is None
        assert not (tmp_path / "accuracy_history.csv").exists()


# Flags after a valid command line of train_dints.py, and what the refusal must name.
REFUSALS = {
    "fold": ("--fold 3", "--fold 3 is not one of --num_folds 3"),
    "negative fold": ("--fold -1", "argument --fold: -1"),
    "more folds than cases": ("--num_folds 9", "--num_folds 9, but there are only 6 cases"),
    "no description": ("--json {tmp}/none.json", "none.json does not exist"),
    "malformed description": ("--json {tmp}/malformed.json", "malformed.json is not valid JSON at line 1, column"),
    "list of cases": ("--json_key validation", "--json_key"),
    "missing files": ("--root {tmp} --json {phantom}/dataset.json", "12 of the 12 files"),
    "window": ("--intensity_range 5 5", "--intensity_range 5 5"),
    "patch size": ("--patch_size 20 16 16", "--patch_size 20 16 16 does not fit 3 depths"),
    "no architecture": ("--arch_ckpt {tmp}/none.pth", "none.pth does not exist"),
    "foreign architecture": ("--arch_ckpt {tmp}/text.pth", "text.pth"),
    "weights as architecture": ("--arch_ckpt {trained}/latest.pth", "latest.pth"),
    "blocks": ("--num_blocks 12", "--num_blocks is 12"),
    "depths": ("--num_depths 4", "--num_depths is 4"),
    "no checkpoint": ("--checkpoint {tmp}/none.pth", "none.pth does not exist"),
    "foreign checkpoint": ("--checkpoint {tmp}/other.pth", "other.pth do not fit"),
    "other width": ("--checkpoint {trained}/best_metric_model.pth --channel_mul 0.25", "of another shape"),
    "nothing to continue": ("--resume must", "--resume must"),
    "fp16 on a CPU": ("--precision fp16", "--precision fp16 needs a GPU"),
    "epochs": ("--num_epochs 0", "argument --num_epochs: 0 is not at least 1"),
    "milestones": ("--learning_rate_milestones 0.8 0.2", "--learning_rate_milestones must rise"),
    "unknown flag": ("--epochs 3", "--epochs"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_before_training(name, phantom, code, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dints.cache.Cache.hold", lambda *_: pytest.fail("data was read"))
    (tmp_path / "text.pth").write_text("not a network")
    (tmp_path / "malformed.json").write_text('{"training": [}')
    torch.save({"module.weight": torch.zeros(2)}, tmp_path / "other.pth")
    flags, message = REFUSALS[name]
    flags = flags.format(tmp=tmp_path, phantom=phantom, trained=trained).split()
    with pytest.raises((UserError, SystemExit)) as refusal:
        train(phantom, tmp_path / "run", code, *flags)
    said = str(refusal.value) if refusal.type is UserError else capsys.readouterr().err
    assert message in said


def test_a_search_needs_two_training_cases_and_a_warm_up_shorter_than_itself(phantom, tmp_path, capsys):
    with pytest.raises(SystemExit):
        search(phantom, tmp_path, "--num_epochs_warmup", 4)
    assert "--num_epochs_warmup 4 must be below --num_epochs 4" in capsys.readouterr().err
    with pytest.raises(UserError, match="1 training case cannot be halved"):
        search_dints.halves([{}])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", None),
        ("--patch_size 20 16 16", "--patch_size 20 16 16 does not fit 3 depths"),
        ("--num_folds 9", "--num_folds 9, but there are only 6 cases"),
        ("--spacing 0.001 0.001 0.001", "is not fit for training"),
    ],
)
@pytest.mark.parametrize("stage", ["search", "train"])
def test_check_judges_the_whole_command_and_writes_nothing(stage, flags, message, phantom, code, tmp_path, capsys):
    def check():
        flags_and_check = [*flags.split(), "--check"]
        if stage == "search":
            search(phantom, tmp_path / "run", *flags_and_check)
        else:
            train(phantom, tmp_path / "run", code, *flags_and_check)

    if message is None:
        check()
    else:
        with pytest.raises(UserError, match=message):
            check()
    assert "Task00_Phantom: 6 cases" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_another_run_is_not_overwritten(phantom, trained, code):
    with pytest.raises(UserError, match="num_epochs was 3 and is 5"):
        train(phantom, trained, code, "--num_epochs", 5)


@pytest.mark.parametrize(
    "script", ["search_dints.py", "train_dints.py", "infer_dints.py", "decode_plot.py", "download_msd_datasets.py"]
)
def test_help_is_complete_and_quick(script):
    """Without torch, which alone takes seconds to import."""
    program = f"""if True:
        import runpy, sys
        sys.argv, sys.path[0] = ["{script}", "-h"], "."
        try:
            runpy.run_path("{script}", run_name="__main__")
        except SystemExit:
            print("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("False\n"), done.stderr
    assert "usage:" in done.stdout and "None" not in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("search_dints.py", ["--root", "none", "--output_root", "{tmp}/run"]),
        ("train_dints.py", ["--root", "none", "--output_root", "{tmp}/run", "--arch_ckpt", "none.pth"]),
        ("infer_dints.py", ["--checkpoint", "none.pth", "--input", "none.nii.gz", "--output_root", "{tmp}/run"]),
    ],
)
def test_an_error_is_one_line_and_no_traceback(script, arguments, tmp_path):
    command = [sys.executable, script, *(argument.format(tmp=tmp_path) for argument in arguments)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and "none" in errors[0]
    assert "Traceback" not in done.stderr
