"""Exports that are read again and segment a real case before they get their names."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dints import files
from dints.data.cases import check_case, read_image
from dints.data.listing import Case
from dints.data.nifti import read_header, read_voxels
from dints.errors import UserError
from dints.exports import bundle, onnx_file, predict_onnx, program
from dints.inference.predictor import Predictor

log = logging.getLogger(__name__)

LEAST = 0.9999  # share of a case's voxels that get the network's labels
# Run by a Python that neither its folder nor the environment leads to our code; the bundle is all
# that it knows.
RUN_BUNDLE = """
import json, sys
from monai.bundle import run, verify_net_in_out
places, settings = json.loads(sys.argv[1])
verify_net_in_out("network_def", device="cpu", **places, **settings)
run(**places, **settings, device="$torch.device('cpu')")
"""


@dataclass(frozen=True)
class Check:
    """A case, and what the network makes of it: labels (x, y, z), uint8."""

    case: Case
    expected: np.ndarray

    def accept(self, labels: np.ndarray, path: Path) -> None:
        """Print how many voxels have the network's labels.

        Raises:
            UserError: too few.
        """
        size = self.expected.size
        different = (
            int((labels != self.expected).sum()) if labels.shape == self.expected.shape else size
        )
        counts = f"{different} of {size} voxels of {self.case.name}"
        if size - different < LEAST * size:
            raise UserError(
                f"{path} is not written: it gives other labels than the network in {counts}, more "
                f"than {1 - LEAST:.2%}: use another kind of --export"
            )
        print(f"{path}: {1 - different / size:.4%} equal to the network, {counts} differ")


def export(kinds: Sequence[str], predictor: Predictor, case: Case, folder: Path) -> None:
    """Write exports of a predictor's network into a folder, each read again and checked on a case.

    Args:
        kinds: of ``onnx``, ``exported_program`` and ``bundle``.
        predictor: on the CPU, in fp32.

    Raises:
        UserError: a package or operation is missing, the case cannot be segmented, or an export
            segments it otherwise.
    """
    if "onnx" in kinds:
        onnx_file.check_packages()
    (model,), overlap = predictor.models, predictor.window.overlap
    if "bundle" in kinds:
        bundle.check_operations(model)
    check_case(case, model.task)
    check = Check(case, _segmented(predictor, case))
    if not check.expected.any():
        log.warning(
            "%s holds nothing that the network finds, which checks little: give another case",
            case.name,
        )
    exported = program.exported(model) if {*kinds} - {"bundle"} else None
    facts = program.facts(model.task, overlap)
    if "onnx" in kinds:
        _write_onnx(folder / "model.onnx", onnx_file.as_bytes(exported, facts), check)
    if "exported_program" in kinds:
        _write_program(folder / "model.pt2", program.as_bytes(exported, facts), check, predictor)
    if "bundle" in kinds:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".bundle.") as partial:
            written = Path(partial) / "bundle"
            bundle.write(written, model, overlap)
            check.accept(_run_bundle(written, case, Path(partial) / "segmented"), folder / "bundle")
            _replace_folder(folder / "bundle", written)


def _segmented(predictor: Predictor, case: Case) -> np.ndarray:
    decision = predictor.segment(lambda: read_image(case)[0], case.affine, case.name)
    return decision.labels


def _write_onnx(path: Path, content: bytes, check: Check) -> None:
    script = Path(__file__).with_name("predict_onnx.py")
    with files.replacing(path) as file:
        file.write(content)
        file.flush()
        check.accept(predict_onnx.segment(list(check.case.images), file.name), path)
    files.write_atomically(path.with_name(script.name), script.read_bytes())


def _write_program(path: Path, content: bytes, check: Check, predictor: Predictor) -> None:
    with files.replacing(path) as file:
        file.write(content)
        file.flush()
        other = copy.copy(predictor)
        other.networks = [program.LoadedProgram(file.name)]
        check.accept(_segmented(other, check.case), path)


def _run_bundle(folder: Path, case: Case, output: Path) -> np.ndarray:
    """Have MONAI verify the bundle in a folder; return the labels that it writes of a case."""
    images = [os.path.abspath(image) for image in case.images]
    places = {
        "config_file": f"{folder}/configs/inference.json",
        "meta_file": f"{folder}/configs/metadata.json",
    }
    settings = {
        "bundle_root": str(folder),
        "output_dir": str(output),
        "datalist": [images if len(images) > 1 else images[0]],
    }
    command = [sys.executable, "-I", "-c", RUN_BUNDLE, json.dumps([places, settings])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)  # noqa: S603  the words are ours
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(
            f"--export bundle: MONAI cannot run the bundle ({lines[-1]}): use another "
            "kind of --export"
        )
    (written,) = output.iterdir()
    return read_voxels(read_header(str(written)))[0]


def _replace_folder(path: Path, new: Path) -> None:
    """Put a folder in the place of another one, which is there until then."""
    try:
        if path.exists():
            os.replace(path, new.with_name("old"))  # in the temporary folder, which is removed
        os.replace(new, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
