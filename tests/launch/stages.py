"""Stand in for Python under the launchers: play a fold's training and segmenting; run all else.

A stage adds a line to $CALLS. A training writes a file for its model; segmenting copies the labels
of the fold's cases as their masks. $HANG, as "train 1", names a stage and fold that waits for a
signal; $FAIL one that exits with code 7.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def value(flag: str) -> str:
    return sys.argv[sys.argv.index(flag) + 1]


def train(output: Path) -> None:
    assert value("--fold") == output.name.removeprefix("fold_")
    (output / "best_metric_model.pth").write_text("a network")


def infer(output: Path) -> None:
    assert Path(value("--checkpoint")).is_file()
    root, fold = Path(value("--root")), int(output.name.removeprefix("fold_"))
    num_folds = int(os.environ["NUM_FOLDS"])
    cases = json.loads((root / "dataset.json").read_text())["training"]
    first, last = len(cases) * fold // num_folds, len(cases) * (fold + 1) // num_folds
    labels = [root / case["label"] for case in cases[first:last]]
    for label in labels:
        shutil.copy(label, output / label.name)
    notes = {label.name: {"state": "done"} for label in labels}
    (output / "run.json").write_text(json.dumps({"cases": notes}))


def main() -> None:
    stages = {"train_dints.py": train, "infer_dints.py": infer}
    stage = next((stages[Path(word).name] for word in sys.argv if Path(word).name in stages), None)
    if stage is None:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])  # noqa: S606
    output = Path(value("--output_root"))
    output.mkdir(parents=True, exist_ok=True)
    name = f"{stage.__name__} {output.name.removeprefix('fold_')}"
    with Path(os.environ["CALLS"]).open("a") as file:
        file.write(f"{name}\n")
    if os.environ.get("FAIL") == name:
        sys.exit(7)
    if os.environ.get("HANG") == name:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        (output / "pid").write_text(str(os.getpid()))
        time.sleep(60)
    stage(output)


if __name__ == "__main__":
    main()
