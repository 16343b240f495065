"""FOLD=each: which stages run for which fold, what is passed over, signals, array tasks. The stages are stand-ins."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from architectures import chain
from test_launch import CHECKOUT, LIMIT, nothing_is_left, stand_in, start, start_job, wait_for

from dints.network.architecture import save_architecture

__all__ = ["nothing_is_left"]  # a fixture
STAGES = [f"{stage} {fold}" for fold in range(3) for stage in ("train", "infer")]
WRITTEN = {"postprocessing.json", "scores.csv", "summary.json"}


class Each:
    """Starts train_dints.sh with FOLD=each, three folds, and stages that are stand-ins."""

    def __init__(self, folder: Path, root: Path):
        self.folder, self.root, self.runs, self.calls = folder, root, folder / "runs", folder / "calls"
        self.output = folder / "output"
        save_architecture(folder / "arch.pth", chain(0, 1, 0, num_depths=3))
        python = stand_in(folder / "python", f'exec {sys.executable} {CHECKOUT}/tests/launch/stages.py "$@"')
        self.environment = {"FOLD": "each", "NUM_FOLDS": "3", "TASK": root.name, "DATA_ROOT": str(root)}
        self.environment |= {"ARCH_CKPT": f"{folder}/arch.pth", "OUTPUT_ROOT": str(self.runs), "CALLS": str(self.calls)}
        self.environment |= {"PYTHON": str(python)}

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
        return {path.name for path in self.runs.glob("*.*") if path.is_file() and not path.name.startswith(".")}


@pytest.fixture
def each(tmp_path) -> Each:
    """Write three small cases, one a fold."""
    root, entries = tmp_path / "data", []
    voxels = np.zeros((8, 8, 8), np.uint8)
    voxels[2:5, 2:5, 2:5] = 1
    for number in range(3):
        entry = {"image": f"imagesTr/case_{number}.nii.gz", "label": f"labelsTr/case_{number}.nii.gz"}
        for path in entry.values():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / path)
        entries.append(entry)
    description = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "organ"}, "training": entries}
    description["twice"] = [entries[0], {key: f"more/{path}" for key, path in entries[0].items()}]
    for path in entries[0].values():
        (root / "more" / path).parent.mkdir(parents=True)
        (root / "more" / path).write_bytes((root / path).read_bytes())
    (root / "dataset.json").write_text(json.dumps(description))
    return Each(tmp_path, root)


@pytest.mark.slow
def test_all_folds_are_trained_and_scored_and_then_passed_over(each):
    assert each.code("--num_epochs", "3") == 0, each.said()
    assert each.stages() == STAGES and each.written() == WRITTEN
    assert "| organ | 3 | 1.0000 | 1.0000 to 1.0000 |" in each.said()
    before = {path: path.read_bytes() for path in each.runs.rglob("*") if path.is_file()}
    assert each.code("--num_epochs", "3") == 0
    assert each.stages() == STAGES and "fold 2 of 3: done before" in each.said()
    assert {path: path.read_bytes() for path in each.runs.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("change", ["nothing", "arguments", "architecture", "dataset", "masks"])
def test_a_fold_is_asked_again_where_anything_has_changed(each, change):
    """The stages know what they have done themselves. An array task does one fold."""
    assert each.code(SLURM_ARRAY_TASK_ID="0") == 0
    if change == "architecture":
        save_architecture(each.folder / "arch.pth", chain(0, 0, 0, num_depths=3))
    elif change == "dataset":
        (each.root / "dataset.json").write_text((each.root / "dataset.json").read_text() + "\n")
    elif change == "masks":
        (each.runs / "out_of_fold/fold_0/run.json").unlink()
    assert each.code(*["--num_epochs", "4"] * (change == "arguments"), SLURM_ARRAY_TASK_ID="0") == 0
    assert each.stages() == STAGES[:2] * (1 if change == "nothing" else 2)
    assert not each.written() and "not done yet: folds 1, 2" in each.said()


def test_each_fold_may_have_an_architecture_of_its_own(each):
    """A fold whose architecture is another one is asked again, and only that; missing ones are all named first."""
    template = f"{each.folder}/search_fold{{fold}}.pth"
    first, second, third = (Path(template.format(fold=fold)) for fold in range(3))
    each.environment |= {"ARCH_CKPT": template}
    shutil.copy(each.folder / "arch.pth", second)
    assert each.code() == 1 and each.stages() == []
    (error,) = (line for line in each.said().splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: ARCH_CKPT={template}, but there is no {first}, no {third}: run search_dints.sh")
    assert each.code(SLURM_ARRAY_TASK_ID="1") == 0, each.said()  # the others are other tasks'
    assert each.stages() == STAGES[2:4] and "not done yet: folds 0, 2" in each.said()
    for path in (first, third):
        shutil.copy(each.folder / "arch.pth", path)
    assert each.code() == 0 and each.stages() == [*STAGES[2:4], *STAGES[:2], *STAGES[4:]], each.said()
    for fold in range(3):
        assert f"train_dints.py --arch_ckpt {template.format(fold=fold)} --root" in each.said()
    save_architecture(second, chain(0, 0, 0, num_depths=3))
    assert each.code() == 0 and each.stages()[6:] == STAGES[2:4]


def test_stages_get_the_options_that_are_theirs(each):
    description = each.folder / "own.json"
    description.write_text((each.root / "dataset.json").read_text())
    arguments = ["--json", str(description), "--precision=fp32", "--trust_shapes", "--patch_size", "16", "16", "16"]
    assert each.code(*arguments, "--replace_nonfinite", "-1024") == 0
    launched = [line.split(f"{CHECKOUT}/")[-1] for line in each.said().splitlines() if "torchrun.py" in line]
    assert f"train_dints.py --arch_ckpt {each.folder}/arch.pth --root {each.root} --fold 0 --num_folds 3" in launched[0]
    assert launched[0].strip().endswith(" ".join([*arguments, "--replace_nonfinite -1024"]))
    masks = f"--output_root {each.runs}/out_of_fold/fold_2 --replace_nonfinite -1024 --precision fp32"
    model = f"infer_dints.py --checkpoint {each.runs}/fold_2/best_metric_model.pth --root {each.root}"
    assert launched[-1].strip() == f"{model} {masks} --json {description} --trust_shapes"


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT, preemption")
@pytest.mark.parametrize(("stage", "number"), [("train 1", signal.SIGTERM), ("infer 1", signal.SIGKILL)])
def test_the_same_command_goes_on_where_it_was_stopped(each, stage, number):
    process = each.start(HANG=stage)
    folder = each.runs / ("out_of_fold/fold_1" if stage.startswith("infer") else "fold_1")
    wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text())
    process.send_signal(number)
    if number == signal.SIGKILL:  # of which nobody knows; its stage has a life of its own
        os.kill(int((folder / "pid").read_text()), number)
    assert process.wait(LIMIT) == (143 if number == signal.SIGTERM else -number)
    assert each.stages()[:3] == STAGES[:3] and not (each.runs / "fold_1/done.json").exists()
    stopped = len(each.stages())
    assert each.code() == 0, each.said()
    assert each.stages()[stopped:] == STAGES[2:] and each.written() == WRITTEN  # fold 0 is passed over


def test_a_stage_that_fails_ends_all_with_its_code(each):
    assert each.code(FAIL="train 1") == 7
    assert each.stages() == STAGES[:3] and each.written() == set()


@pytest.mark.slow
def test_of_array_tasks_that_end_at_once_exactly_one_makes_the_table(each):
    tasks = [each.start(SLURM_ARRAY_TASK_ID=str(fold)) for fold in range(3)]
    assert [task.wait(60) for task in tasks] == [0, 0, 0], each.said()
    assert sorted(each.stages()) == sorted(STAGES) and each.written() == WRITTEN
    assert each.said().count("== all folds: scores") == 1 and each.said().count("not done yet: folds ") == 2


def test_an_array_task_of_two_nodes(each):
    """Node 0 makes the note. The second launch has another port, which no node can find taken by the first one."""
    environment = {**each.environment, "SLURM_ARRAY_TASK_ID": "1"}
    assert start_job(each.folder, CHECKOUT / "train_dints.sh", **environment).wait(60) == 0
    assert sorted(each.stages()) == [f"{stage} 1 on node {rank}" for stage in ("infer", "train") for rank in (0, 1)]
    said = each.said()
    assert said.count("not done yet: folds 0, 2;") == 1 and (each.runs / "fold_1/done.json").exists()
    ports = {stage: int(port) for port, stage in re.findall(r"--rdzv_endpoint=127.0.0.1:(\d+) .*/(\w+)_dints", said)}
    assert ports["infer"] == ports["train"] + 500


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--fold", "3"], {}, "--fold cannot be given with FOLD=each: leave it out"),
        (["--output_root=x"], {}, "--output_root cannot be given with FOLD=each: set OUTPUT_ROOT"),
        (["--resume", "never"], {}, "set another OUTPUT_ROOT to start afresh"),
        ([], {"ARCH_CKPT": "none.pth"}, "ARCH_CKPT=none.pth, but there is no none.pth: run search_dints.sh"),
        ([], {"NUM_FOLDS": "1"}, "NUM_FOLDS is '1': give a number of folds, 2 or more"),
        ([], {"NUM_FOLDS": "x"}, "NUM_FOLDS is 'x'"),
        ([], {"NUM_FOLDS": "4"}, "--num_folds 4, but there are only 3 cases"),
        (["--json_key", "twice"], {}, "2 cases are called case_0: rename all but one"),
        ([], {"SLURM_ARRAY_TASK_ID": "3"}, "the array has a task 3, and NUM_FOLDS=3: give sbatch --array=0-2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(each, arguments, environment, said):
    each.environment |= environment
    assert each.code(*arguments) == 1
    errors = [line for line in each.said().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and "Traceback" not in each.said()
    assert each.stages() == [] and not each.runs.exists()
