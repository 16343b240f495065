"""Stand in for Python under the launchers: play a fold's training and segmenting, in no time; all else is Python's.

A stage adds a line to $CALLS. A training writes a file for its model; segmenting takes the labels of the fold's cases
as their masks. $HANG, as "train 1", names a stage and fold that waits for a signal; $FAIL one that leaves with code 7.
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


def train() -> str:
    (Path(value("--output_root")) / "best_metric_model.pth").write_text("a network")
    return value("--fold")


def infer() -> str:
    masks = Path(value("--output_root"))
    fold = int(masks.name.removeprefix("fold_"))
    assert Path(value("--checkpoint")).is_file()
    root = Path(value("--root"))
    cases = json.loads((root / "dataset.json").read_text())["training"]
    num_folds = int(os.environ["NUM_FOLDS"])
    first, last = len(cases) * fold // num_folds, len(cases) * (fold + 1) // num_folds
    labels = [root / case["label"] for case in cases[first:last]]
    for label in labels:
        shutil.copy(label, masks / label.name)
    notes = {label.name: {"state": "done"} for label in labels}
    (masks / "run.json").write_text(json.dumps({"cases": notes}))
    return str(fold)


def main() -> None:
    stages = {f"{name}_dints.py": name for name in ("train", "infer")}
    names = [stages[Path(word).name] for word in sys.argv if Path(word).name in stages]
    if not names:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])  # noqa: S606
    folder = Path(value("--output_root"))
    fold = folder.name.removeprefix("fold_")
    folder.mkdir(parents=True, exist_ok=True)
    with open(os.environ["CALLS"], "a") as calls:
        rank = f" on node {os.environ['NODE_RANK']}" if "NODE_RANK" in os.environ else ""
        calls.write(f"{names[0]} {fold}{rank}\n")
    if os.environ.get("FAIL") == f"{names[0]} {fold}":
        sys.exit(7)
    if os.environ.get("HANG") == f"{names[0]} {fold}":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(60)
    if os.environ.get("NODE_RANK", "0") == "0":
        done = {"train": train, "infer": infer}[names[0]]()
        assert done == fold


if __name__ == "__main__":
    main()
