"""FOLD=each: stages run in order, are skipped when done, and resume; stages are stand-ins."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
from architectures import chain
from test_launch import CHECKOUT, LIMIT, nothing_is_left, stand_in, start, start_job, wait_for

from dints.errors import UserError
from dints.network.architecture import save_architecture

__all__ = ["nothing_is_left"]  # a fixture
STAGES = [f"{stage} {fold}" for fold in range(3) for stage in ("train", "infer")]
WRITTEN = {"postprocessing.json", "scores.csv", "summary.json"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Import launch/folds.py, which is no module of a package."""
    spec = spec_from_file_location("folds", CHECKOUT / "launch/folds.py")
    module = sys.modules["folds"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Each:
    """Starts train_dints.sh with FOLD=each, three folds, and stages that are stand-ins."""

    def __init__(self, folder: Path, root: Path):
        self.folder, self.root, self.runs = folder, root, folder / "runs"
        self.calls, self.output = folder / "calls", folder / "output"
        save_architecture(folder / "arch.pth", chain(0, 1, 0, num_depths=3))
        stages = f'exec {sys.executable} {CHECKOUT}/tests/launch/stages.py "$@"'
        python = stand_in(folder / "python", stages)
        self.environment = {"FOLD": "each", "NUM_FOLDS": "3", "TASK": root.name}
        self.environment |= {"DATA_ROOT": str(root), "ARCH_CKPT": f"{folder}/arch.pth"}
        self.environment |= {"OUTPUT_ROOT": str(self.runs), "PYTHON": str(python)}
        self.environment |= {"CALLS": str(self.calls)}

    def start(self, *arguments: str, **environment: str):
        command = ["bash", CHECKOUT / "train_dints.sh", *arguments]
        return start(self.output, *command, **self.environment, **environment)

    def code(self, *arguments: str, **environment: str) -> int:
        return self.start(*arguments, **environment).wait(60)

    def stages(self) -> list[str]:
        """Return the stages that were run, in their order."""
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def said(self) -> str:
        return self.output.read_text()

    def written(self) -> set[str]:
        """Return the files beside the folds' folders."""
        return {path.name for path in self.runs.glob("[!.]*.*") if path.is_file()}


@pytest.fixture
def each(tmp_path) -> Each:
    """Write three small cases, one a fold; ``twice`` lists two of the same name."""
    root, entries = tmp_path / "data", []
    voxels = np.zeros((8, 8, 8), np.uint8)
    voxels[2:5, 2:5, 2:5] = 1
    for name in ("case_0", "case_1", "case_2", "more/case_0"):
        entry = {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
        for path in entry.values():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / path)
        entries.append(entry)
    description = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "organ"}}
    description |= {"training": entries[:3], "twice": [entries[0], entries[3]]}
    (root / "dataset.json").write_text(json.dumps(description))
    return Each(tmp_path, root)


def stop(each: Each, stage: str, number: int, *arguments: str) -> int:
    """Start, send a signal while ``stage`` runs, and return the exit code."""
    process = each.start(*arguments, HANG=stage)
    name, fold = stage.split()
    pid = each.runs / ("out_of_fold" if name == "infer" else "") / f"fold_{fold}" / "pid"
    wait_for(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    if number == signal.SIGKILL:  # which nothing forwards to the stage
        os.kill(int(pid.read_text()), number)
    return process.wait(LIMIT)


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_the_same_command_resumes_where_it_was_stopped_or_failed(each):
    own = each.folder / "own.json"
    shutil.copy(each.root / "dataset.json", own)
    arguments = ["--json", str(own), "--precision=fp32", "--trust_shapes", "--num_epochs", "3"]
    assert stop(each, "train 1", signal.SIGTERM, *arguments) == 143
    assert stop(each, "infer 1", signal.SIGKILL, *arguments) == -signal.SIGKILL
    assert each.code(*arguments, FAIL="train 2") == 7 and each.written() == set()
    assert each.code(*arguments) == 0, each.said()
    begun = [STAGES[:3], STAGES[2:4], STAGES[2:5], STAGES[4:]]
    assert each.stages() == sum(begun, []) and each.written() == WRITTEN
    assert "| organ | 3 | 1.0000 | 1.0000 to 1.0000 |" in each.said()
    before = {path: path.read_bytes() for path in each.runs.rglob("*") if path.is_file()}
    assert each.code(*arguments) == 0
    assert each.stages() == sum(begun, []) and "fold 2 of 3: done before" in each.said()
    assert {path: path.read_bytes() for path in before} == before
    # Segmenting gets the options that it shares with training.
    stages = [line.split(f"{CHECKOUT}/")[-1].strip() for line in each.said().splitlines()]
    (trained, *_) = (stage for stage in stages if stage.startswith("train_dints.py"))
    (*_, segmented) = (stage for stage in stages if stage.startswith("infer_dints.py"))
    assert f"--root {each.root} --fold 0 --num_folds 3" in trained
    assert trained.endswith(" ".join(arguments))
    model = f"--checkpoint {each.runs}/fold_2/best_metric_model.pth --root {each.root}"
    masks = f"--output_root {each.runs}/out_of_fold/fold_2 --precision fp32"
    assert segmented == f"infer_dints.py {model} {masks} --json {own} --trust_shapes"


@pytest.mark.slow
def test_of_array_tasks_that_end_at_once_exactly_one_makes_the_table(each):
    tasks = [each.start(SLURM_ARRAY_TASK_ID=str(fold)) for fold in range(3)]
    assert [task.wait(60) for task in tasks] == [0, 0, 0], each.said()
    assert sorted(each.stages()) == sorted(STAGES) and each.written() == WRITTEN
    assert each.said().count("== all folds: scores") == 1
    assert each.said().count("not done yet: folds ") == 2


@pytest.mark.slow
def test_an_array_task_of_two_nodes(each):
    """Node 0 writes the note. Node 0 may still have the training's port when segmenting starts."""
    environment = {**each.environment, "SLURM_ARRAY_TASK_ID": "1"}
    assert start_job(each.folder, CHECKOUT / "train_dints.sh", **environment).wait(60) == 0
    ran = [f"{stage} 1 on node {rank}" for stage in ("infer", "train") for rank in (0, 1)]
    said = each.said()
    assert sorted(each.stages()) == ran and (each.runs / "fold_1/done.json").exists()
    assert said.count("not done yet: folds 0, 2;") == 1
    ports = re.findall(r"--rdzv_endpoint=127.0.0.1:(\d+) .*/(\w+)_dints", said)
    ports = {stage: int(port) for port, stage in ports}
    assert ports["infer"] == ports["train"] + 500


@pytest.mark.parametrize("change", ["arguments", "architecture", "dataset", "masks"])
def test_a_fold_is_done_until_anything_changes(change, each, script):
    """Each fold may have an architecture of its own."""
    each.environment["ARCH_CKPT"] = f"{each.folder}/fold{{fold}}.pth"
    for fold in range(3):
        shutil.copy(each.folder / "arch.pth", each.folder / f"fold{fold}.pth")
    folds = script.parse(["--num_epochs", "3"], each.environment)
    folds.check()
    for fold in (0, 1):
        for path in (folds.model(fold), folds.masks(fold) / "run.json", folds.note(fold)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(folds.request(fold))
    assert list(map(folds.is_done, range(3))) == [True, True, False]
    if change == "arguments":
        folds = script.parse(["--num_epochs", "4"], each.environment)
    elif change == "architecture":
        save_architecture(each.folder / "fold0.pth", chain(0, 0, 0, num_depths=3))
    elif change == "dataset":
        (each.root / "dataset.json").write_text((each.root / "dataset.json").read_text() + "\n")
    elif change == "masks":
        (folds.masks(0) / "run.json").unlink()
    both = change in ("arguments", "dataset")
    assert list(map(folds.is_done, range(3))) == [False, not both, False]


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--output_root=x"], {}, "--output_root cannot be given with FOLD=each: set OUTPUT_ROOT"),
        ([], {"ARCH_CKPT": "none{fold}"}, "there is no none0, no none1, no none2: run"),
        ([], {"NUM_FOLDS": "x"}, "NUM_FOLDS is 'x': give a number of folds, 2 or more"),
        ([], {"NUM_FOLDS": "4"}, "--num_folds 4, but there are only 3 cases"),
        (["--json_key", "twice"], {}, "2 cases are called case_0: rename all but one"),
        ([], {"SLURM_ARRAY_TASK_ID": "3"}, "the array has a task 3, and NUM_FOLDS=3"),
    ],
)
def test_a_wrong_request_is_refused_before_any_training(arguments, environment, said, each, script):
    with pytest.raises(UserError, match=re.escape(said)):
        script.parse(arguments, each.environment | environment).check()
