"""Both stages run on a small dataset, and leave their files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from commands import SPACE, TINY, infer, search, train, words
from monai.networks.nets import DiNTS, TopologySearch
from small_run import begun
from states import progress_of, rows

import decode_plot
import search_dints
import train_dints
from dints.data.dataset import Fold
from dints.data.listing import Case
from dints.data.tasks import TASKS
from dints.errors import UserError
from dints.inference.card import card
from dints.network.architecture import load_architecture, save_architecture
from dints.network.cost import Cost, cost
from dints.network.model_file import load_model
from dints.network.operations import OPERATIONS
from dints.network.strides import isotropic

SEARCH = "--num_epochs 4 --num_epochs_warmup 2 --num_epochs_per_validation 2"
SEARCH += " --learning_rate_arch 0.1"
TRAIN = "--num_epochs 3 --num_epochs_per_validation 2"
SHORT = "--num_epochs 1 --num_epochs_warmup 0"
BARE = f"--root none --output_root none {TINY} {SPACE}"
TASK = TASKS["Task00_Phantom"]
STILL = "--learning_rate 1e-12 --learning_rate_arch 1e-12"


@pytest.fixture(scope="module")
def searched(phantom, tmp_path_factory) -> Path:
    """Search once, and return the run's folder."""
    return search(phantom, tmp_path_factory.mktemp("search"), SEARCH)


@pytest.fixture(scope="module")
def code(searched) -> Path:
    """Take the architecture that was found last."""
    return searched / "search_code_12.pth"


@pytest.fixture(scope="module")
def trained(phantom, code, tmp_path_factory) -> Path:
    """Retrain it once, and give the run's folder."""
    return train(phantom, tmp_path_factory.mktemp("train"), code, TRAIN)


def supernet_of(flags: list[str]) -> tuple:
    """Build the supernet and the trainers of a search with these flags."""
    settings, run = search_dints.parse_args(flags), begun()
    supernet = search_dints.build_supernet(
        settings, TASK, isotropic(settings.space.num_depths), run
    )
    return supernet, *search_dints.trainers(supernet, settings, TASK, run)


def parts(path: Path) -> dict:
    """Read what a checkpoint has the state of."""
    return torch.load(path, weights_only=True)["parts"]


class TestSearch:
    def test_leaves_its_files(self, searched):
        expected = {f"search_code_{number}.{kind}" for number in (6, 12) for kind in ("pth", "gv")}
        others = "latest.pth accuracy_history.csv loss_history.csv progress.yaml Events"
        others += " training_loss.png validation_metric.png search.png"
        expected |= {*others.split()}
        assert expected <= {path.name for path in searched.iterdir()}
        assert not list(searched.rglob("*.partial"))
        if shutil.which("dot"):
            assert (searched / "search_code_12.png").stat().st_size > 1000

    def test_the_found_architecture_says_where_it_came_from(self, code):
        found = load_architecture(code)
        assert found.info["iter_num"] == 12 and found.info["epochs"] == 4
        assert found.info["factor_ram_cost"] == 0.8 and found.info["task"] == "Task00_Phantom"
        assert found.searched_on == {"task": "Task00_Phantom", "fold": 0, "num_folds": 3}
        best = max(rows(code.parent / "accuracy_history.csv"), key=lambda row: float(row["dice"]))
        assert found.info["best_path"] == int(best["iteration"])  # as published
        assert torch.load(code, weights_only=True)["node_a"].shape == (3, 3)

    def test_the_architecture_rests_during_the_warm_up_and_moves_after_it(self, searched):
        losses = rows(searched / "loss_history.csv")
        assert [row["iteration"] for row in losses] == ["3", "6", "9", "12"]
        assert [bool(row["architecture_loss"]) for row in losses] == [False, False, True, True]
        assert losses[0]["ram_ratio"] == losses[1]["ram_ratio"] != losses[3]["ram_ratio"]
        changed = [int(row["changed_paths"]) + int(row["changed_operations"]) for row in losses]
        assert changed[:2] == [0, 0] and sum(changed) > 0

    def test_weights_and_architecture_are_disjoint(self, searched):
        of_run = parts(searched / "latest.pth")
        assert len(of_run["optimizer"]["param_groups"][0]["params"]) == len(of_run["network"]) - 2
        alphas = {name for name in of_run["network"] if "alpha" in name}
        assert alphas == {"dints_space.log_alpha_a", "dints_space.log_alpha_c"}

    def test_the_architecture_says_what_its_network_costs(self, code):
        found = load_architecture(code)
        counted, written = cost(found, 1, 3, (16, 16, 16)).to_dict(), found.info["cost"]
        for key in ("parameters", "gmac", "activation_mib", "input_shape", "channel_mul"):
            assert written[key] == counted[key], key
        assert written["latency_ms"] > 0
        source = code.with_suffix(".gv").read_text()
        lines = Cost(**{**written, "input_shape": (1, 1, 16, 16, 16)}).lines()
        assert all(line in source for line in lines)
        assert f"{found.info['ram_ratio']:.3f} of the memory" in source

    def test_halves_are_shuffled_by_the_seed_and_an_odd_case_is_the_architectures(self):
        names = [f"{number // 2} {'left' if number % 2 else 'right'}" for number in range(41)]
        fold = Fold(TASK, [Case(name, ()) for name in names], [], None)
        drawn = {seed: fold.halves(seed) for seed in (0, 1)}
        for weights, arch in drawn.values():
            assert (len(weights), len(arch)) == (20, 21)
            assert {case.name for case in (*weights, *arch)} == {*names}
            assert 5 < sum("left" in case.name for case in weights) < 15
        assert drawn[0] == fold.halves(0) and drawn[0] != drawn[1]

    @pytest.mark.slow
    def test_it_keeps_a_memory_budget(self, phantom, code, tmp_path, caplog):
        free = load_architecture(code).info["ram_ratio"]
        with caplog.at_level("INFO"):
            search(phantom, tmp_path, SHORT, "--ram_budget fixed --max_ram_ratio", 0.5 * free)
        found = load_architecture(tmp_path / "search_code_3.pth").info["ram_ratio"]
        assert 0 < found <= 0.5 * free
        assert f"decoded: {found:.3f} of the memory of every path" in caplog.text

    @pytest.mark.slow
    def test_it_keeps_the_finest_path(self, phantom, searched, tmp_path):
        """With so large steps towards no memory that this path, which needs most, is dropped."""
        flags = "--num_epochs 2 --num_epochs_warmup 0 --num_epochs_per_validation 2"
        flags += " --factor_ram_cost 0 --learning_rate_arch 3"
        found = {}
        for name, more in (("free", ""), ("kept", "--keep_finest")):
            codes = sorted(search(phantom, tmp_path / name, flags, more).glob("search_code_*.pth"))
            found[name] = [load_architecture(code) for code in codes]
        (free,), (kept,) = found["free"], found["kept"]
        assert kept.arch_code_a[:, 0].all() and not free.arch_code_a[:, 0].all()
        assert kept.info["keep_finest"] is True
        state = parts(tmp_path / "kept" / "latest.pth")
        momentum = state["optimizer_a"]["state"][0]["exp_avg"]
        assert (momentum[:, 0] == 0).all() and (momentum[:, 1:] != 0).all()
        with pytest.raises(UserError, match="keep_finest was False and is True"):
            search(phantom, searched, SEARCH, "--keep_finest")

    @pytest.mark.parametrize(
        ("ratio", "weights", "expected"),
        [
            (0.5, (1, 1, 1, 0.001), 2 + 3 + 0.3 + 0.004),
            (0.9, (1, 1, 1, 0.001), 2 + 3 + 0.1 + 0.004),
            (0.9, (10, 0, 2, 1), 20 + 0.2 + 4),
        ],
    )
    def test_the_architecture_minimises_a_weighted_sum(self, monkeypatch, ratio, weights, expected):
        terms = {"entropy_a": 2.0, "entropy_c": 3.0, "ram_ratio": ratio, "topology": 4.0}
        terms = {name: torch.tensor(value) for name, value in terms.items()}
        monkeypatch.setattr(search_dints, "regularisers", lambda *_: terms)
        flags = words(BARE, "--loss_weights", *weights)
        *_, arch = supernet_of(flags)
        assert arch.loss().item() == pytest.approx(expected)

    @pytest.mark.fault("non-finite loss")
    def test_a_loss_that_is_not_finite_stops_it(self, phantom, tmp_path):
        message = (
            r"loss is not finite at iteration 2 \(cases phantom_00.\), and in 5 steps in a row"
        )
        with pytest.raises(UserError, match=message):
            search(phantom, tmp_path, SEARCH, "--learning_rate", 1e30)
        assert progress_of(tmp_path)["iteration"] == 0  # every run begins with a state


class TestSearchFromWeights:
    """``--checkpoint`` of the search; a run's first state becomes previous.pth."""

    @pytest.mark.slow
    def test_a_searchs_own_checkpoint(self, phantom, searched, tmp_path):
        search(phantom, tmp_path, SHORT, STILL, "--checkpoint", searched / "latest.pth")
        stages = searched / "latest.pth", tmp_path / "previous.pth", tmp_path / "latest.pth"
        given, start, end = (parts(path)["network"] for path in stages)
        assert given.keys() == start.keys()
        assert all(torch.equal(given[key], start[key]) for key in given)
        assert all(torch.allclose(given[key], end[key], atol=1e-6) for key in given)

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_a_state_dict_of_monais_supernet(self, tmp_path, prefix):
        torch.manual_seed(1)
        space = TopologySearch(channel_mul=0.125, num_blocks=2, num_depths=3)
        monais = DiNTS(space, 1, 3).state_dict()
        torch.save({prefix + key: value for key, value in monais.items()}, tmp_path / "monai.pth")
        supernet, *_ = supernet_of(words(BARE, "--checkpoint", tmp_path / "monai.pth"))
        own = supernet.state_dict()
        assert own.keys() == monais.keys()
        assert all(torch.equal(own[key], monais[key]) for key in monais)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--checkpoint {none}", "none.pth does not exist"),
            ("--checkpoint {code}", "search_code_12.pth does not hold network weights"),
            (
                "--checkpoint {latest} --channel_mul 0.25",
                "latest.pth do not fit this network: .* of another shape",
            ),
            ("--checkpoint {model}", "model.pth do not fit this network: .* that the network has"),
        ],
    )
    @pytest.mark.fault("weights of another architecture")
    def test_weights_that_do_not_fit_are_refused_before_a_case_is_read(
        self, phantom, searched, trained, code, tmp_path, monkeypatch, flags, message
    ):
        monkeypatch.setattr("dints.data.cache.Cache.hold", lambda *_: pytest.fail("data was read"))
        files = {"none": tmp_path / "none.pth", "latest": searched / "latest.pth", "code": code}
        flags = flags.format(**files, model=trained / "best_metric_model.pth")
        with pytest.raises(UserError, match=message) as refused:
            search(phantom, tmp_path / "run", SHORT, flags)
        assert "\n" not in str(refused.value)

    def test_an_arch_file_that_is_gone_is_written_again(self, phantom, searched, tmp_path, caplog):
        run = shutil.copytree(searched, tmp_path / "run")
        path = run / "search_code_12.pth"
        lost = load_architecture(path)
        path.unlink()
        search(phantom, run, SEARCH)
        assert f"{path} was gone" in caplog.text and load_architecture(path).codes() == lost.codes()


class TestTrain:
    def test_the_model_file_needs_nothing_beside(self, trained, code):
        model = load_model(trained / "best_metric_model.pth")
        assert model.architecture.codes() == load_architecture(code).codes()
        assert model.task.name == "Task00_Phantom" and model.task.patch_size == (16, 16, 16)
        assert model.info["loss"] == "dice_ce"
        assert model.network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)
        assert not [key for key in model.network.state_dict() if key.startswith("module.")]
        best = max(float(row["dice"]) for row in rows(trained / "accuracy_history.csv"))
        assert model.info["dice"] == pytest.approx(best)
        names = model.info["training_cases"], model.info["validation_cases"]
        assert tuple(map(len, names)) == (6, 2) and len({*names[0], *names[1]}) == 8
        expected = {"fold": 0, "num_folds": 3, "overlap_ratio": 0.0}
        assert {name: model.info[name] for name in expected} == expected
        described = card(model)
        data = described["data"]
        assert (data["name"], data["licence"]) == ("Phantom", "CC0")
        assert sum(described["dice_of_classes"]) / 2 == pytest.approx(best)

    def test_the_width_is_that_of_the_file_where_it_has_one_and_none_is_given(
        self, phantom, code, tmp_path
    ):
        found, path = load_architecture(code), tmp_path / "judged.pth"
        save_architecture(path, replace(found, info={"channel_mul": 0.25}))
        flags = words("--root", phantom, "--output_root", tmp_path, "--arch_ckpt", path)
        flags += words("--patch_size 16 16 16")
        for given, expected in (([], 0.25), (["--channel_mul", "0.5"], 0.5)):
            _, width, _ = train_dints.prepare(train_dints.parse_args([*flags, *given]))
            assert width == expected
        for wrong in ("wide", 0, float("nan"), True):
            with pytest.raises(UserError, match=r"'channel_mul' is .*, not a number from 1/32 to"):
                print(replace(found, info={"channel_mul": wrong}).channel_mul)

    def test_a_model_file_that_is_gone_is_written_again(self, phantom, code, tmp_path, caplog):
        """By the newest network: with one validation at the end, that is the lost one."""
        flags = "--num_epochs 2 --num_epochs_per_validation 2 --average_decay 0.5"
        path = train(phantom, tmp_path, code, flags) / "best_metric_model.pth"
        lost = load_model(path)
        path.unlink()
        train(phantom, tmp_path, code, flags)
        found = load_model(path)
        iteration = lost.info["iteration"]
        assert f"{path} was gone, with the network of iteration {iteration}" in caplog.text
        assert found.info == lost.info
        states = found.network.state_dict(), lost.network.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert str(found.info["iteration"]) in (tmp_path / "progress.yaml").read_text()

    @pytest.mark.slow
    def test_a_model_file_of_after_the_last_save_counts_as_the_best(
        self, phantom, code, tmp_path, caplog
    ):
        """A kill came between the two, and on a GPU the repeated validation comes out worse."""
        caplog.set_level("INFO")
        flags = "--num_epochs 2 --num_epochs_per_validation 1"
        path = train(phantom, tmp_path, code, flags) / "best_metric_model.pth"
        (tmp_path / "previous.pth").replace(tmp_path / "latest.pth")
        content = torch.load(path, weights_only=True)
        iteration = progress_of(tmp_path)["iteration"] * 2
        torch.save({**content, "iteration": iteration, "dice": 0.9}, path)
        train(phantom, tmp_path, code, flags)
        assert f"is of iteration {iteration}, after the last save" in caplog.text
        written = yaml.safe_load((tmp_path / "progress.yaml").read_text())
        assert 0.9 in written.values() and load_model(path).info["dice"] == 0.9
        best = progress_of(tmp_path)
        assert (best["best_dice"], best["best_iteration"]) == (0.9, iteration)
        torch.save({**content, "iteration": "9"}, path)
        with pytest.raises(UserError, match=f"{path} is not of this run: move it away"):
            train(phantom, tmp_path, code, flags)

    def test_a_label_that_was_replaced_is_refused(self, phantom, trained, code, tmp_path):
        root = shutil.copytree(phantom, tmp_path / phantom.name)
        run = shutil.copytree(trained, tmp_path / "run")
        label = root / "labelsTr/phantom_001.nii.gz"
        image = nib.load(label)
        voxels = np.minimum(np.asarray(image.dataobj), 1)
        nib.save(nib.Nifti1Image(voxels, image.affine, image.header), label)
        with pytest.raises(UserError, match="the label of phantom_001 .*--allow_changed_data"):
            train(root, run, code, TRAIN)

    def test_every_weight_trained(self, trained):
        state = parts(trained / "latest.pth")["optimizer"]["state"]
        assert all(values["momentum_buffer"].abs().max() > 0 for values in state.values())

    @pytest.mark.slow
    def test_fine_tunes_from_a_checkpoint(self, phantom, trained, code, tmp_path):
        """By tiny steps, the network stays the one that it started from."""
        model = trained / "best_metric_model.pth"
        train(phantom, tmp_path, code, "--num_epochs 1 --learning_rate 1e-12 --checkpoint", model)
        start, end = (
            load_model(folder / model.name).network.state_dict() for folder in (trained, tmp_path)
        )
        assert all(torch.allclose(start[key], end[key], atol=1e-6) for key in start)

    def test_all_cases_without_validation(self, phantom, code, tmp_path):
        train(phantom, tmp_path, code, "--fold", "all", "--num_epochs", 1)
        assert load_model(tmp_path / "best_metric_model.pth").info["dice"] is None
        assert not (tmp_path / "accuracy_history.csv").exists()

    @pytest.mark.fault("non-empty output folder of another run")
    def test_another_run_is_not_overwritten(self, phantom, trained, code):
        with pytest.raises(UserError, match="num_epochs was 3 and is 5"):
            train(phantom, trained, code, TRAIN, "--num_epochs", 5)


@pytest.mark.parametrize("stage", ["search", "train"])
def test_a_run_without_any_dice_says_so_in_the_end(stage, phantom, code, tmp_path, caplog):
    caplog.set_level("INFO")
    root = shutil.copytree(phantom, tmp_path / phantom.name)
    for number in range(2):  # of which --fold 0 validates
        path = root / f"labelsTr/phantom_{number:03d}.nii.gz"
        label = nib.load(path)
        nib.save(nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine, label.header), path)
    if stage == "search":
        search(root, tmp_path / "run", SHORT, "--num_iterations 1")
    else:
        train(root, tmp_path / "run", code, "--num_epochs 1 --num_iterations 1")
    assert caplog.messages[-1].startswith("there is no Dice: none of the 2 validation cases")


@pytest.mark.slow
def test_a_subset_of_operations_is_searched_drawn_retrained_and_segmented_with(phantom, tmp_path):
    chosen = ("conv_1x3x3", "skip_connect")  # in an order that is not the table's
    search(phantom, tmp_path / "search", SHORT, "--operations", *chosen)
    (code,) = (tmp_path / "search").glob("search_code_*.pth")
    found = load_architecture(code)
    assert found.operations == chosen
    assert torch.load(code, weights_only=True)["operations"] == list(chosen)
    assert {0, 1} == set(found.arch_code_c[found.arch_code_a == 1].tolist())
    source = decode_plot.plot_graph(code, directory=tmp_path).source
    for name, operation in OPERATIONS.items():
        assert (operation.meaning in source) == (name in chosen)

    trained = train(phantom, tmp_path / "train", code, "--num_epochs 1")
    model_file = trained / "best_metric_model.pth"
    assert load_model(model_file).architecture.operations == chosen
    out = infer(tmp_path / "out", "--checkpoint", model_file, "--input", phantom / "imagesTs")
    assert len(list(out.glob("*.nii.gz"))) == 2
    (searched_on,) = json.loads((out / "run.json").read_text())["searched_on"]
    assert searched_on == {"task": "Task00_Phantom", "fold": 0, "num_folds": 3}
