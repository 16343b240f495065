"""Exports, read again by what is to run them, give the network's labels, or are not written."""

from __future__ import annotations

import gzip
import json
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from architectures import connected
from commands import infer, run
from monai.bundle import ConfigParser

import infer_dints
from dints.data.cases import normalise
from dints.data.grid import Resampling
from dints.data.listing import Case
from dints.data.nifti import read_header, read_voxels
from dints.data.tasks import Task
from dints.errors import UserError
from dints.exports import bundle, checked, onnx_file, predict_onnx, program
from dints.inference.predictor import Predictor
from dints.network import operations
from dints.network.architecture import Architecture
from dints.network.discrete import DiscreteNetwork
from dints.network.model_file import load_model, save_model

TASK = Task(
    "Toy",
    "MRI",
    2,
    ("background", "a", "b"),
    spacing=(2.0, 2.5, 2.0),
    patch_size=(8, 8, 16),
    channel_files=True,
)
STRAIGHT = connected(np.array([[1, 0, 0, 1]]), np.array([[4, 0, 0, 1]]))
# Grid points that coincide would leave it to the last bit of a place whether a voxel beside zeros
# is exactly zero.
AXES = {
    "LPS, anisotropic": np.diag([-1.53, -1.47, 3.1]),
    "oblique": np.array([[1.6, -0.5, 0.1], [0.48, 1.5, -0.4], [0, 0.42, 1.9]]),
    "sheared": np.array([[1.6, 0.3, 0], [0, 1.7, -0.2], [0.1, 0, 2.2]]),
}


def model_file(path: Path, architecture: Architecture = STRAIGHT, task: Task = TASK) -> Path:
    """Write a model file with random weights."""
    torch.manual_seed(0)
    network = DiscreteNetwork(architecture, task.num_channels, task.num_classes, 0.125)
    save_model(path, network, architecture, 0.125, task, overlap_ratio=0.25)
    return path


def case_files(folder: Path, axes: np.ndarray, unit: str = "mm") -> list[Path]:
    """Write a case of two channels, a file each, thinner than a patch along one axis."""
    affine, rng = np.eye(4), np.random.default_rng(0)
    affine[:3, :3], affine[:3, 3] = axes, (9, -4, 3)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"case_{channel:04d}.nii.gz" for channel in range(2)]
    for path in paths:
        coarse = rng.random((5, 6, 3)).repeat(4, 0).repeat(4, 1).repeat(5, 2)
        voxels = np.where(coarse > 0.2, 900 * coarse + rng.normal(0, 20, coarse.shape), 0)
        image = nib.Nifti1Image(voxels.astype(np.int16), affine)
        image.header.set_xyzt_units(unit)
        image.set_sform(affine, code="scanner")
        nib.save(image, path)
    return paths


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return model_file(tmp_path_factory.mktemp("model") / "best_metric_model.pth")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> list[Path]:
    return case_files(tmp_path_factory.mktemp("case"), AXES["oblique"])


@pytest.fixture(scope="module")
def predictor(model) -> Predictor:
    return Predictor(model, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def made(tmp_path_factory, model, case) -> Path:
    """Export the model in every form, as a user does."""
    out = tmp_path_factory.mktemp("out")
    files = ["--checkpoint", model, "--input", case[0].parent]
    infer(out, *files, "--export onnx exported_program bundle")
    return out


def labels_of(predictor: Predictor, paths: list[Path]) -> np.ndarray:
    voxels = np.stack([np.asarray(nib.load(path).dataobj) for path in paths])
    return predictor(voxels, nib.load(paths[0]).affine)


def is_decided(predictor: Predictor, paths: list[Path]) -> np.ndarray:
    """Tell of each voxel whether its class leads by more than what rounding changes."""
    image = nib.load(paths[0])
    resampling = Resampling(image.shape, image.affine.astype(float), TASK.spacing)
    prepared = normalise(
        resampling.apply(np.stack([np.asarray(nib.load(path).dataobj) for path in paths])), TASK
    )
    probabilities = resampling.undo(predictor._probabilities(np.ascontiguousarray(prepared)))
    _, second, first = np.sort(probabilities, 0)
    return first - second > 1e-5


def scores(network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(image)


class TestWritten:
    """The script leaves every form, as its own runtime takes it, and nothing half written."""

    @pytest.mark.slow
    def test_every_form_is_there_and_nothing_else(self, made):
        configs = {"configs/inference.json", "configs/metadata.json"}
        bundled = {f"bundle/{name}" for name in configs | {"docs/README.md", "models/model.pt"}}
        expected = {".lock", "model.onnx", "model.pt2", "predict_onnx.py"} | bundled
        found = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
        assert found == expected

    @pytest.mark.slow
    def test_the_program_takes_any_multiple_of_the_step(self, made, predictor):
        network, loaded = predictor.networks[0], program.LoadedProgram(made / "model.pt2")
        for shape in ((1, 2, 8, 8, 8), (3, 2, 16, 12, 32)):
            image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(
                scores(loaded, image), scores(network, image), rtol=1e-4, atol=1e-5
            )
        extra = {program.FACTS: ""}
        torch.export.load(made / "model.pt2", extra_files=extra)
        assert json.loads(extra[program.FACTS]) == program.facts(TASK, 0.25)


class TestScript:
    """predict_onnx.py stands alone, and does what the predictor does."""

    @pytest.mark.slow
    def test_alone_it_writes_the_predictors_labels(self, made, predictor, case, tmp_path):
        blocked = "import sys, runpy; sys.modules['torch'] = sys.modules['dints'] = None; "
        code = f"{blocked}runpy.run_path({str(made / 'predict_onnx.py')!r}, run_name='__main__')"
        command = "-I", "-c", Path(code), *case, tmp_path / "out.nii.gz"
        done = run(*command, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        result, image = nib.load(tmp_path / "out.nii.gz"), nib.load(case[0])
        assert result.get_data_dtype() == np.uint8 and np.array_equal(result.affine, image.affine)
        assert (int(result.header["sform_code"]), result.header.get_xyzt_units()[0]) == (1, "mm")
        assert np.array_equal(np.asarray(result.dataobj), labels_of(predictor, case))

    @pytest.mark.slow
    @pytest.mark.parametrize("axes", ["LPS, anisotropic", "sheared"])
    def test_labels_are_the_predictors_on_any_grid(self, made, predictor, axes, tmp_path):
        paths = case_files(tmp_path, AXES[axes])
        labels, expected = (
            predict_onnx.segment(paths, made / "model.onnx"),
            labels_of(predictor, paths),
        )
        assert len(np.unique(expected)) == 3 and labels.dtype == np.uint8
        # a network of random weights may have a voxel or two that are not
        decided = is_decided(predictor, paths)
        assert decided.mean() > 0.999 and np.array_equal(labels[decided], expected[decided])

    def test_a_header_in_metres_counts(self, tmp_path):
        paths = case_files(tmp_path, np.diag([0.0015, 0.002, 0.003]), "meter")
        assert np.allclose(np.diag(predict_onnx.read(paths, 2)[1])[:3], [1.5, 2, 3])

    def test_voxels_without_an_offset_follow_the_header(self, tmp_path):
        """As infer_dints.py reads them; nibabel takes the header for the first ones."""
        voxels, path = np.arange(210, dtype=np.int16).reshape(7, 5, 6), tmp_path / "a.nii.gz"
        image = nib.Nifti1Image(voxels, np.eye(4))
        image.header.set_slope_inter(2, -3)
        content = bytearray(image.to_bytes())
        content[108:112] = bytes(4)
        path.write_bytes(gzip.compress(content))
        found, _ = predict_onnx.read([path], 1)
        assert np.array_equal(found[..., 0], 2.0 * voxels - 3)
        assert np.array_equal(found[..., 0], read_voxels(read_header(str(path)))[0])

    @pytest.mark.parametrize(("name", "count"), [("a.nii", 150), ("a.nii.gz", 2500)])
    def test_a_file_that_cannot_be_read_is_named_in_one_line(self, tmp_path, name, count):
        path = tmp_path / name
        nib.save(nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9)), np.eye(4)), path)
        path.write_bytes(path.read_bytes()[:count])
        with pytest.raises(SystemExit, match=re.escape(f"{path} cannot be read: ")) as raised:
            predict_onnx.read([path], 1)
        assert "\n" not in raised.value.code


class TestBundle:
    """The bundle's transforms and networks are MONAI's and give what ours do."""

    @pytest.mark.parametrize(
        ("spacing", "intensity"),
        [(None, None), ((2.0, 2.5, 2.0), (100.0, 700.0))],
        ids=["MRI", "CT"],
    )
    def test_images_are_prepared_as_ours(self, spacing, intensity, case):
        task = replace(
            TASK, num_channels=1, channel_files=False, spacing=spacing, intensity=intensity
        )
        parser = ConfigParser({**bundle._transforms(task), "output_dir": "nowhere"})
        image = parser.get_parsed_content("preprocessing")({"image": str(case[0])})["image"]
        file = nib.load(case[0])
        resampling = Resampling(file.shape, file.affine, spacing)
        expected = normalise(resampling.apply(np.asarray(file.dataobj)[None]), task)
        assert np.allclose(image.numpy(), expected, atol=1e-4)

    def test_operations_in_another_order_are_monais_too(self, tmp_path):
        """MONAI's network, built from the files, gives our scores."""
        architecture = connected(
            STRAIGHT.arch_code_a,
            np.array([[0, 0, 0, 1]]),
            operations=("conv_1x3x3", "skip_connect"),
        )
        model = load_model(model_file(tmp_path / "m.pth", architecture))
        bundle.write(tmp_path, model, 0.25)
        parser = ConfigParser()
        parser.read_config(tmp_path / "configs/inference.json")
        parser["bundle_root"], parser["device"] = str(tmp_path), "$torch.device('cpu')"
        parser.get_parsed_content("initialize#0")
        image = torch.randn((2, 2, 8, 8, 16), generator=torch.Generator().manual_seed(0))
        found = parser.get_parsed_content("network")(image)
        expected = scores(model.network.eval(), image)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_an_operation_that_monai_lacks_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setitem(operations.OPERATIONS, "new", operations.OPERATIONS["conv_3x3x3"])
        for codes, is_used in (([[1, 0, 0, 1]], True), ([[0, 1, 1, 0]], False)):
            names = ("skip_connect", "new")
            architecture = connected(STRAIGHT.arch_code_a, np.array(codes), operations=names)
            model = load_model(model_file(tmp_path / "m.pth", architecture))
            says = "MONAI lacks the operation new: use exported_program"
            with pytest.raises(UserError, match=says) if is_used else nullcontext():
                bundle.check_operations(model)

    @pytest.mark.slow
    def test_one_that_monai_cannot_run_is_refused(self, case, monkeypatch, tmp_path):
        monkeypatch.setattr(checked, "RUN_BUNDLE", "import dints")
        opened = Case("case", tuple(map(str, case)))
        says = r"MONAI cannot run the bundle \(Mod.*No module named 'dints'\): use another"
        with pytest.raises(UserError, match=says):
            checked._run_bundle(tmp_path, opened, tmp_path / "out")


class TestChecks:
    """An export that does not give the network's labels is not left as if it did."""

    @pytest.fixture
    def listed(self, case) -> Case:
        return Case("case", tuple(map(str, case)))

    def test_other_labels_are_refused_and_an_older_file_stays(
        self, predictor, listed, case, monkeypatch, tmp_path
    ):
        """A new file is checked under a temporary name, before it takes the older one's place."""
        expected, seen = labels_of(predictor, case), []

        def other(*_) -> np.ndarray:
            seen.extend(path.read_text() for path in sorted(tmp_path.iterdir()))
            return np.roll(expected, 1)

        monkeypatch.setattr(program, "exported", lambda model: None)
        monkeypatch.setattr(onnx_file, "as_bytes", lambda *_: b"newer")
        monkeypatch.setattr(predict_onnx, "segment", other)
        (tmp_path / "model.onnx").write_text("older")
        says = r"model.onnx is not written: it gives other labels than the network in \d+ of 7"
        with pytest.raises(UserError, match=says):
            checked.export(["onnx"], predictor, listed, tmp_path)
        assert seen == ["newer", "older"]
        assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]

    def test_a_bundle_takes_the_olders_place_if_it_is_equal(
        self, predictor, listed, case, monkeypatch, tmp_path, capsys
    ):
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle/older").touch()
        labels = labels_of(predictor, case)
        monkeypatch.setattr(checked, "_run_bundle", lambda *_: 0 * labels)
        with pytest.raises(UserError, match="bundle is not written"):
            checked.export(["bundle"], predictor, listed, tmp_path)
        assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "older"]
        labels[0, 0, 0] = (labels[0, 0, 0] + 1) % 3
        monkeypatch.setattr(checked, "LEAST", 0.9998)
        monkeypatch.setattr(checked, "_run_bundle", lambda *_: labels)
        checked.export(["bundle"], predictor, listed, tmp_path)
        says = f"{tmp_path}/bundle: 99.9861% equal to the network, 1 of 7200 voxels of case differ"
        assert says in capsys.readouterr().out
        found = sorted(path.name for path in (tmp_path / "bundle").iterdir())
        assert found == ["configs", "docs", "models"]
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]

    @pytest.mark.fault("package for ONNX missing")
    def test_missing_packages_are_named_before_the_work(
        self, predictor, listed, monkeypatch, tmp_path
    ):
        monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name != "onnx" else sys)
        monkeypatch.setattr(checked, "_segmented", None)
        with pytest.raises(
            UserError, match="needs onnxscript and onnxruntime: pip install onnxscript onnxruntime$"
        ):
            checked.export(["bundle", "onnx"], predictor, listed, tmp_path)

    def test_weights_that_no_onnx_file_can_hold_are_refused(self):
        large = SimpleNamespace(state_dict={"weight": torch.zeros(2**30, device="meta")})
        with pytest.raises(
            UserError, match="4.0 GiB of weights, and a file holds 2: use exported_program"
        ):
            onnx_file.as_bytes(large, {})


def test_several_models_are_no_export(capsys):
    flags = "--checkpoint a.pth b.pth --input x.nii.gz --export onnx"
    with pytest.raises(SystemExit):
        infer_dints.parse_args(flags.split())
    assert "--export writes one network as it is" in capsys.readouterr().err
