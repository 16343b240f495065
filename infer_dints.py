"""Segment volumes with a retrained network, and score the segmentations where labels are known: stage 3 of DiNTS.

    python infer_dints.py --checkpoint runs/train/best_metric_model.pth --input data_msd/Task09_Spleen/imagesTs
    python infer_dints.py --checkpoint runs/train/best_metric_model.pth --root data_msd/Task09_Spleen --fold 0

The model file holds the network and its preprocessing. With --input, every given NIfTI file (or every one in a given
folder) is segmented. With --root, the validation cases of the fold are, and OUTPUT_ROOT/scores.csv tells each case's
Dice on the grid of its own label, as a challenge would compute it. Segmentations have the grid of their image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dints import options
from dints.errors import UserError, exit_on_user_error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best_metric_model.pth of train_dints.py")
    parser.add_argument("--input", type=Path, nargs="+", help="images, or folders of images, to segment")
    parser.add_argument("--output_root", type=Path, default=Path("segmentations"), help="folder for what is written")
    options.add_data(parser, required=False)
    options.add_window(parser, overlap_ratio=0.5)
    options.add_machine(parser)
    args = parser.parse_args(argv)
    if (args.input is None) == (args.root is None):
        parser.error("give either --input (images to segment) or --root (a dataset whose fold is segmented and scored)")
    complaints = options.data_complaints(args)
    if complaints:
        parser.error("; ".join(complaints))
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports of torch and MONAI, which take seconds, so that -h answers at once

import csv
import gzip
import io
import logging
import re
from collections import Counter

import nibabel
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms import Compose, Invertd
from torch import nn
from tqdm import tqdm

from dints import data, engine, runtime
from dints.network import load_model
from dints.tasks import Task, read_json

log = logging.getLogger("infer")


def main(args: argparse.Namespace) -> None:
    with runtime.started(args.device) as processes, runtime.run_folder(args.output_root, processes) as folder:
        infer(args, processes, folder)


def infer(args: argparse.Namespace, processes: runtime.Processes, folder: Path) -> None:
    network, _, task, _ = load_model(args.checkpoint)
    network.to(processes.device).eval()
    cases = processes.on_main(cases_to_segment, args)
    outputs = processes.on_main(segmentation_paths, cases, folder)
    precision = runtime.choose_precision(args.precision, processes)
    window = engine.SlidingWindow(task.patch_size, args.overlap_ratio, args.num_sw_batch_size)
    log.info("%d volumes, %s in %s", len(cases), processes.device.type, precision.name)

    counts = torch.zeros(len(cases), task.num_classes - 1, 3, dtype=torch.float64, device=processes.device)
    share = range(processes.rank, len(cases), processes.world_size)
    for number in tqdm(share, desc="segmenting", unit="volume", disable=None if processes.is_main else True):
        case = cases[number]
        label = read_label(case, task) if "label" in case else None  # first, so that a bad one costs no segmentation
        segmentation = segment(case["image"], network, task, window, precision)
        save_segmentation(segmentation, case["image"], outputs[number])
        if label is not None:
            counts[number] = engine.count_overlap(segmentation, label, task.num_classes)
    processes.sum(counts)
    if processes.is_main and args.root is not None:
        scores = engine.scores_from_counts(counts.cpu())
        write_scores(folder / "scores.csv", scores, cases, task)
        print(scores.describe(task.class_names))
    log.info("segmentations are in %s", folder)


def cases_to_segment(args: argparse.Namespace) -> list[dict[str, str]]:
    """The validation cases of the fold under ``--root`` (all of them for ``all``), or the images of ``--input``."""
    if args.root is not None:
        source = args.json or args.root / "dataset.json"
        cases = data.read_cases(read_json(source), source, args.root, args.json_key)
        training, validation = data.split_fold(cases, args.num_folds, args.fold)
        return validation or training
    images = []
    for path in args.input:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [file for file in files if file.is_file() and re.fullmatch(r"[^.].*\.nii(\.gz)?", file.name)]
        if not found:
            raise UserError(f"--input {path} is no NIfTI file, nor a folder that holds any: give .nii or .nii.gz files")
        images.extend(found)
    return [{"image": str(path)} for path in images]


def segmentation_paths(cases: list[dict[str, str]], folder: Path) -> list[Path]:
    """Where each case's segmentation goes: under its image's name; never onto another case's, nor onto an input."""
    names = Counter(Path(case["image"]).name for case in cases)
    inputs = {Path(path).resolve() for case in cases for path in case.values()}
    for name, count in names.items():
        if count > 1:
            raise UserError(f"{count} images are called {name}: give each a run with its own --output_root")
        if (folder / name).resolve() in inputs:
            raise UserError(f"{folder / name} is an input and would be overwritten: give another --output_root")
    return [folder / name for name in names]


def read_label(case: dict[str, str], task: Task) -> torch.Tensor:
    """The reference of each voxel, uint8, as its file holds it."""
    with data.user_errors():
        return Compose(data.reading(task, ["image", "label"]))(case)["label"][0].as_tensor().to(torch.uint8)


@torch.no_grad()
def segment(
    image: str, network: nn.Module, task: Task, window: engine.SlidingWindow, precision: runtime.Precision
) -> torch.Tensor:
    """The label of each voxel of an image file, uint8, on the file's own grid.

    Class probabilities are resampled to that grid, not labels, so that borders stay smooth.
    """
    preprocess = Compose(data.preprocessing(task, keys=["image"]))
    with data.user_errors():
        case = preprocess({"image": image})
    with precision.autocast():
        scores = window(case["image"][None].as_tensor().to(precision.device), network)
    return most_probable(scores[0].float().softmax(0).cpu(), case["image"], preprocess)


def most_probable(probabilities: torch.Tensor, image: MetaTensor, preprocess: Compose) -> torch.Tensor:
    """The most probable class of each voxel of the file that ``image`` was made from by ``preprocess``.

    Args:
        probabilities: (classes, *spatial), on the grid of the preprocessed image.
    """
    # Probabilities take the image's place and history, and that history is undone.
    undo = Invertd(["class"], preprocess, orig_keys=["image"], nearest_interp=False)
    labels = highest = None
    for value, probability in enumerate(probabilities):  # one class at a time: on a large CT each takes a GB
        probability = undo({"class": MetaTensor(probability[None]), "image": image})["class"][0].as_tensor()
        if highest is None:
            labels, highest = torch.zeros(probability.shape, dtype=torch.uint8), probability
        else:
            labels[probability > highest] = value
            torch.maximum(highest, probability, out=highest)
    return labels


def save_segmentation(segmentation: torch.Tensor, image: str, path: Path) -> None:
    """Write labels as NIfTI, with the image's place in space as its header tells it."""
    source = nibabel.load(image)
    file = nibabel.Nifti1Image(segmentation.numpy(), source.affine)
    file.set_qform(*source.get_qform(coded=True))
    file.set_sform(*source.get_sform(coded=True))
    file.header.set_xyzt_units(xyz=source.header.get_xyzt_units()[0])
    content = file.to_bytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    runtime.write_atomically(path, content)


def write_scores(path: Path, scores: engine.Scores, cases: list[dict[str, str]], task: Task) -> None:
    """A row per case: Dice of each class, empty where the case does not have the class."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["case", *task.class_names[1:]])
    for case, dice in zip(cases, scores.dice.tolist(), strict=True):
        table.writerow([Path(case["image"]).name, *("" if value != value else f"{value:.6f}" for value in dice)])
    runtime.write_atomically(path, text.getvalue())


if __name__ == "__main__":
    exit_on_user_error(main, ARGS)
