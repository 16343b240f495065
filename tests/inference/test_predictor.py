"""A model file is a function of an array: the same as infer_dints.py, without reading it twice."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from architectures import chain
from commands import infer

from dints.data.tasks import Task
from dints.errors import UserError
from dints.inference.predictor import Predictor
from dints.network import model_file
from dints.network.discrete import DiscreteNetwork
from dints.network.model_file import save_model
from dints.running import machine

TASK = Task("Toy", "CT", 1, ("background", "a", "b"), (2.0,) * 3, (0.0, 1.0), (16,) * 3)
AFFINE = np.array([[0, -1.5, 0, 9], [1.7, 0, 0, -4], [0, 0, 2.5, 3], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Write a model file with random weights."""
    architecture = chain(0, 1, 0, num_depths=2)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "best_metric_model.pth"
    facts = {"overlap_ratio": 0.25, "ranges": {"intensity": [[0.4, 0.2], [0.6, 0.4]]}}
    save_model(path, DiscreteNetwork(architecture, 1, 3, 0.125), architecture, 0.125, TASK, **facts)
    return path


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).random((20, 24, 18)).astype(np.float32)


def test_the_readmes_lines_give_what_the_script_writes(model, image, tmp_path):
    nib.save(nib.Nifti1Image(image, AFFINE), tmp_path / "scan.nii.gz")
    infer(tmp_path / "out", "--checkpoint", model, "--input", tmp_path / "scan.nii.gz")
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    code = readme[readme.index("from dints.inference.predictor") :].partition("```")[0]
    code = code.replace('"best_metric_model.pth"', f'"{model}", precision="fp32"').replace(
        "scan.nii.gz", f"{tmp_path}/scan.nii.gz"
    )
    found = {}
    exec(code, found)  # noqa: S102  our own README
    labels = found["labels"]
    assert labels.dtype == np.uint8 and len(np.unique(labels)) > 1
    assert np.array_equal(labels, np.asarray(nib.load(tmp_path / "out/scan.nii.gz").dataobj))


@pytest.fixture(scope="module")
def others(model, tmp_path_factory) -> list[Path]:
    """Write two more model files with other weights."""
    folder, first = tmp_path_factory.mktemp("others"), model_file.load_model(model)
    paths = [folder / f"{seed}.pth" for seed in (1, 2)]
    for seed, path in enumerate(paths, start=1):
        torch.manual_seed(seed)
        network = DiscreteNetwork(first.architecture, 1, 3, 0.125)
        save_model(path, network, first.architecture, 0.125, TASK, flips={"axes": [0, seed]})
    return paths


def probabilities(models: object, image: np.ndarray, **settings) -> np.ndarray:
    return Predictor(models, device="cpu", precision="fp32", **settings)._probabilities(image[None])


class TestAverages:
    def test_of_several_models_it_is_the_mean(self, model, others, image):
        single = [probabilities(path, image, overlap=0.25) for path in (model, *others)]
        together = probabilities([model, *others], image)
        assert np.allclose(together, np.mean(single, axis=0), atol=1e-6)
        assert np.abs(single[0] - single[1]).max() > 0.01

    def test_a_flipped_volume_gives_flipped_probabilities(self, others, image, axis=1):
        plain = probabilities(others[0], image)
        mirrored = probabilities(others[0], image, mirrored=True)
        flipped = probabilities(others[0], np.flip(image, axis), mirrored=True)
        assert np.allclose(np.flip(flipped, 1 + axis), mirrored, atol=1e-5)
        assert np.abs(plain - mirrored).max() > 0.01

    def test_only_axes_that_all_models_were_trained_to_flip_are_flipped(self, model, others):
        assert Predictor(others, "cpu", "fp32", mirrored=True).axes == (0,)
        assert Predictor(others[1], "cpu", "fp32", mirrored=True).axes == (0, 2)
        assert Predictor(others, "cpu", "fp32").axes == ()
        unflipped = model_file.load_model(model)
        unflipped.info["flips"] = {"axes": []}
        with pytest.raises(UserError, match="were not trained with flips"):
            Predictor(unflipped, "cpu", "fp32", mirrored=True)

    def test_models_of_other_tasks_are_refused(self, model):
        names = ("background", "a", "c")
        other = replace(model_file.load_model(model), task=replace(TASK, class_names=names))
        says = r"model 2 has class_names \('background', 'a', 'c'\), and the first one"
        with pytest.raises(UserError, match=says):
            Predictor([model, other], "cpu", "fp32")

    def test_the_cases_of_all_models_count(self, model):
        models = [model_file.load_model(model) for _ in range(2)]
        models[0].info.update(training_cases=["a", "b"], validation_cases=["c", "d"])
        models[1].info.update(training_cases=["a", "c"], validation_cases=["b", "d"])
        predictor = Predictor(models, "cpu", "fp32")
        assert predictor.training_cases == {"a", "b", "c"} and predictor.validation_cases == {"d"}


def test_any_number_of_windows_is_one_shape_to_compile(model, monkeypatch):
    """PyTorch refuses to compile for ever; here it traces a network, and compiles nothing."""
    shapes, real = [], torch.compile

    def traced(graph, inputs):
        is_volume = [getattr(value, "ndim", 0) == 5 and value.shape[1] == 1 for value in inputs]
        shapes.append(inputs[is_volume.index(True)].shape)
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda *a, mode=None, **more: real(*a, **more, backend=traced)
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        settings = {"overlap": 0.0, "batch_size": 4}
        plain, computed = (
            Predictor(model, "cpu", "fp32", compile=compile, **settings)
            for compile in ("off", "on")
        )
        for shape in ((32, 32, 22), (64, 64, 32)):  # of 1 and 4 windows, padded or in slabs
            volume = np.random.default_rng(0).random(shape).astype(np.float32)
            assert np.array_equal(computed(volume, np.eye(4)), plain(volume, np.eye(4)))
    assert shapes == [(4, 1, 16, 16, 16)]


def test_it_reads_the_model_once_and_its_input_stays(model, image, monkeypatch):
    predictor, before = Predictor(model, device="cpu", precision="fp32"), image.copy()
    monkeypatch.setattr(model_file, "load_model", lambda _: pytest.fail("it is read again"))
    assert np.array_equal(predictor(image, AFFINE), predictor(image[None], AFFINE.tolist()))
    assert np.array_equal(image, before) and predictor.window.overlap == 0.25


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((2, 9, 9, 9), AFFINE, r"shape \(2, 9, 9, 9\) .* the model takes \(x, y, z\) or"),
        ((9, 9, 9), np.eye(3), r"an affine of \(3, 3\)"),
    ],
)
def test_other_shapes_are_refused(model, shape, affine, message):
    with pytest.raises(UserError, match=message):
        Predictor(model, device="cpu", precision="fp32")(np.zeros(shape), affine)


def test_windows_that_no_memory_holds_are_refused_before_a_volume(model, monkeypatch):
    """One window is counted: its image, and its scores in 2 bytes and in 4."""
    loaded = model_file.load_model(model)
    huge = replace(loaded, task=replace(TASK, patch_size=(2048,) * 3))
    says = r"2048 x 2048 x 2048 voxels, and one takes at least 188,978,561,024 bytes"
    with pytest.raises(UserError, match=says):
        Predictor(huge, "cpu", "fp32")
    monkeypatch.setattr(machine, "free_swap", lambda: 0)
    for free, is_refused in ((16**3 * (4 + 6 * 3) - 1, True), (16**3 * (4 + 6 * 3), False)):
        monkeypatch.setattr(machine, "available_memory", lambda free=free: free)
        with pytest.raises(UserError) if is_refused else nullcontext():
            Predictor(loaded, "cpu", "fp32")
