"""FOLD=each: stages run in order, are skipped when done, and resume; stages are stand-ins."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
from architectures import chain
from commands import CHECKOUT
from test_launch import LIMIT, imported, nothing_is_left, stand_in, start, wait_for

from dints.errors import UserError
from dints.network.architecture import save_architecture

__all__ = ["nothing_is_left"]  # a fixture
WRITTEN = {"postprocessing.json", "scores.csv", "summary.json"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return imported("folds")


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


@pytest.mark.slow
@pytest.mark.fault("SIGTERM, SIGINT, preemption")
def test_the_same_command_resumes_where_it_was_stopped_or_failed(each):
    own = each.folder / "own.json"
    shutil.copy(each.root / "dataset.json", own)
    arguments = ["--json", str(own), "--precision=fp32", "--trust_shapes", "--num_epochs", "3"]
    process, pid = each.start(*arguments, HANG="train 1"), each.runs / "fold_1/pid"
    wait_for(lambda: pid.exists() and pid.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 143
    assert each.code(*arguments, FAIL="infer 2") == 7 and each.written() == set()
    assert each.code(*arguments) == 0, each.said()
    first, second, last = ([f"train {fold}", f"infer {fold}"] for fold in range(3))
    calls = [*first, "train 1", *second, *last, *last]
    assert each.calls.read_text().splitlines() == calls and each.written() == WRITTEN
    said = each.said()
    assert (
        "fold 1 of 3: done before" in said and "| organ | 3 | 1.0000 | 1.0000 to 1.0000 |" in said
    )
    # Segmenting gets the options that it shares with training.
    stages = [line.split(f"{CHECKOUT}/")[-1].strip() for line in said.splitlines()]
    (trained, *_) = (stage for stage in stages if stage.startswith("train_dints.py"))
    (*_, segmented) = (stage for stage in stages if stage.startswith("infer_dints.py"))
    assert f"--root {each.root} --fold 0 --num_folds 3" in trained
    assert trained.endswith(" ".join(arguments))
    model = f"--checkpoint {each.runs}/fold_2/best_metric_model.pth --root {each.root}"
    masks = f"--output_root {each.runs}/out_of_fold/fold_2 --precision fp32"
    assert segmented == f"infer_dints.py {model} {masks} --json {own} --trust_shapes"


def test_of_array_tasks_that_end_at_once_exactly_one_makes_the_table(
    each, script, monkeypatch, capsys
):
    """And of a task's nodes, the first writes the note; segmenting has a port of its own."""
    ports, tables = [], []

    def run(command: list, **environment: object) -> None:
        words = [str(word) for word in command]
        if words[0] != "bash":
            tables.append(words)
            return
        output = environment.get("OUTPUT_ROOT") or Path(words[words.index("--output_root") + 1])
        output.mkdir(parents=True, exist_ok=True)
        (output / ("run.json" if "MASTER_PORT" in environment else "best_metric_model.pth")).touch()
        ports.append(environment.get("MASTER_PORT"))

    monkeypatch.setattr(script, "run", run)
    tasks = [
        script.parse([], each.environment | {"SLURM_ARRAY_TASK_ID": str(fold)}) for fold in range(3)
    ]
    monkeypatch.setenv("NODE_RANK", "1")
    script.main(tasks[0])
    assert ports == [None, 30000] and not list(each.runs.rglob("done.json"))
    monkeypatch.setenv("NODE_RANK", "0")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(script.main, tasks))
    assert len(ports) == 8 and len(tables) == 1 and "cross_validation" in tables[0][2]
    assert capsys.readouterr().out.count("not done yet: folds ") == 2


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
    else:
        (folds.masks(0) / "run.json").unlink()
    both = change in ("arguments", "dataset")
    assert list(map(folds.is_done, range(3))) == [False, not both, False]


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--output_root=x"], {}, "--output_root cannot be given with FOLD=each: set OUTPUT_ROOT"),
        ([], {"ARCH_CKPT": "none{fold}"}, "there is no none0, no none1, no none2: run"),
        ([], {"NUM_FOLDS": "x"}, "NUM_FOLDS is 'x': give a number of folds, 2 or more"),
        (["--json_key", "twice"], {}, "2 cases are called case_0: rename all but one"),
        ([], {"SLURM_ARRAY_TASK_ID": "3"}, "the array has a task 3, and NUM_FOLDS=3"),
    ],
)
def test_a_wrong_request_is_refused_before_any_training(arguments, environment, said, each, script):
    with pytest.raises(UserError, match=re.escape(said)):
        script.parse(arguments, each.environment | environment).check()
