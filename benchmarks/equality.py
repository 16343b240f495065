"""Compare what two checkouts compute, to the last bit: searches, candidates, trainings, resumes and
segmentations.

    python benchmarks/equality.py run --checkout OLD --output old.json
    python benchmarks/equality.py run --checkout . --output new.json
    python benchmarks/equality.py compare old.json new.json

Every run is a small one on the phantom, by command line as a user gives it. Each file that it
leaves counts by the digests of its tensors, or as a table without times. A spelling that changed
between versions is one entry of `RUNS`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = (
    "--patch_size 16 16 16 --num_workers 0 --num_folds 3 --overlap_ratio 0 --channel_mul 0.125 "
    "--device cpu --save_minutes 0"
)
SPACE = (
    "--num_blocks 2 --num_depths 3 --num_epochs 4 --num_epochs_warmup 2 "
    "--num_epochs_per_validation 2"
)
SHORT = "--num_epochs 4 --num_epochs_per_validation 2"
COMPETITION = (  # since issue 29, and before
    "evolve_dints.py --num_blocks 2 --num_depths 3 --candidates 4 --memory_mib 4 "
    "--num_iterations 8",
    "search_dints.py --num_blocks 2 --num_depths 3 --candidates 4 --proposals by_hand random "
    "--memory_mib 4 --candidate_iterations 8",
)
ARCH = "--arch_ckpt {search_published_fp32}"
# By name: the words of a command line. `{name}` is the newest architecture of that run.
RUNS = {
    "search_published_fp32": f"search_dints.py {SPACE} --recipe published --precision fp32",
    "search_recommended_fp32": f"search_dints.py {SPACE} --recipe recommended --precision fp32 "
    "--ram_budget fixed",
    "search_published_bf16": f"search_dints.py {SPACE} --recipe published --precision bf16 "
    "--keep_finest",
    "competition_fp32": tuple(
        f"{line} --recipe recommended --precision fp32" for line in COMPETITION
    ),
    "train_published_fp32": f"train_dints.py {ARCH} {SHORT} --recipe published --precision fp32",
    "train_published_bf16": f"train_dints.py {ARCH} {SHORT} --recipe published --precision bf16",
    "train_recommended_fp32": f"train_dints.py {ARCH} {SHORT} --recipe recommended --precision "
    "fp32",
    "train_recommended_bf16": f"train_dints.py {ARCH} {SHORT} --recipe recommended --precision "
    "bf16",
    "train_nnunet_fp32": f"train_dints.py {ARCH} {SHORT} --augmentation nnunet --precision fp32 "
    "--checkpoint_activations",
}
# these are also stopped in the middle, and resumed
STOPPED = ("search_published_fp32", "train_recommended_fp32")
TIMES = ("second", "time", "wait", "s/it")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def tensors(content: object, name: str = "") -> dict[str, str]:
    """Return a digest for each tensor and number of a file's content, by its place there."""
    import numpy as np
    import torch

    if isinstance(content, torch.Tensor):
        content = content.detach().cpu().contiguous()
        raw = (
            content.view(torch.uint8).numpy()
            if content.dim()
            else np.frombuffer(repr(content.item()).encode(), np.uint8)
        )
        return {name: digest(f"{content.dtype} {tuple(content.shape)}".encode() + raw.tobytes())}
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, (list, tuple)):
        items = enumerate(content)
    else:
        return {}
    return {
        key: value
        for place, part in items
        for key, value in tensors(part, f"{name}/{place}").items()
    }


def digests(folder: Path) -> dict[str, object]:
    """Return what a run left: architectures and models by their tensors, the state by the set of
    them, and tables.
    """
    import torch

    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "before_" in name or "cache" in name:
            continue
        if path.suffix == ".pth" and not path.name.startswith("previous"):
            of = tensors(torch.load(path, weights_only=True))
            # parts may be renamed
            found[name] = sorted(of.values()) if path.name == "latest.pth" else of
        elif path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            found[name] = [
                {key: value for key, value in row.items() if not any(word in key for word in TIMES)}
                for row in rows
            ]
        elif path.name.endswith((".nii.gz", ".nii")):
            import nibabel
            import numpy as np

            found[name] = digest(np.ascontiguousarray(nibabel.load(path).dataobj).tobytes())
    return found


def newest(folder: Path) -> Path:
    return max(folder.glob("search_code_*.pth"), key=lambda path: path.stat().st_mtime_ns)


def start(checkout: Path, words: str, flags: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, *words.split(), *flags],
            cwd=checkout,
            env=environment,
            stdout=file,
            stderr=file,
        )


def run(checkout: Path, names: list[str]) -> dict[str, object]:
    results = {}
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        root = work / "Task00_Phantom"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "dints.data.phantom",
                "--root",
                root,
                "--num_training",
                "8",
                "--num_test",
                "2",
            ],
            cwd=checkout,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        plan = [(name, False) for name in RUNS] + [(name, True) for name in STOPPED]
        for name, is_stopped in plan:
            if names and name not in names:
                continue
            folder = work / (f"{name}_stopped" if is_stopped else name)
            words = RUNS[name]
            if isinstance(words, tuple):
                words = next(line for line in words if (checkout / line.split()[0]).exists())
            arch = work / "search_published_fp32"
            if "{search_published_fp32}" in words:
                words = words.replace("{search_published_fp32}", str(newest(arch)))
            flags = [*TINY.split(), "--root", str(root), "--output_root", str(folder)]
            log = work / f"{folder.name}.log"
            if is_stopped:
                process = start(checkout, words, flags, log)
                # save_minutes 0: a save a step; stopped once the first epoch is noted
                while process.poll() is None:
                    if (
                        "epoch 1" in log.read_text(encoding="utf-8", errors="replace")
                        or (folder / "loss_history.csv").exists()
                    ):
                        process.send_signal(signal.SIGTERM)
                        break
                    time.sleep(0.02)
                process.wait()
            code = start(checkout, words, flags, log).wait()
            if code:
                sys.exit(f"{folder.name} ended with {code}:\n{log.read_text()[-3000:]}")
            results[folder.name] = digests(folder)
            print(
                folder.name,
                "stopped and resumed" if is_stopped and "stopped" in log.read_text() else "",
                flush=True,
            )
            if name == "train_recommended_fp32" and not is_stopped:
                masks = work / "masks"
                words = (
                    f"infer_dints.py --checkpoint {folder}/best_metric_model.pth --device cpu "
                    "--precision fp32"
                )
                code = start(
                    checkout, words, ["--root", str(root), "--output_root", str(masks)], log
                ).wait()
                if code:
                    sys.exit(log.read_text()[-3000:])
                results["infer"] = digests(masks)
        for name in STOPPED:
            if name in results and f"{name}_stopped" in results:
                differ = differences(results[name], results[f"{name}_stopped"])
                print(name, "resumed equals straight:", differ or "yes")
    return results


def differences(one: object, other: object, place: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for key in sorted({*one, *other})
            for line in differences(one.get(key), other.get(key), f"{place}/{key}")
        ]
    return [] if one == other else [f"{place}: {str(one)[:80]} != {str(other)[:80]}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    runs = commands.add_parser("run")
    runs.add_argument("--checkout", type=Path, default=Path("."))
    runs.add_argument("--output", type=Path, required=True)
    runs.add_argument("--only", nargs="*", default=[])
    compare = commands.add_parser("compare")
    compare.add_argument("files", nargs=2, type=Path)
    args = parser.parse_args()
    if args.command == "run":
        args.output.write_text(json.dumps(run(args.checkout.resolve(), args.only), indent=1))
    else:
        found = differences(*(json.loads(path.read_text()) for path in args.files))
        print("\n".join(found) or "equal")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
