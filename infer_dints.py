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
from collections import Counter, defaultdict

import nibabel
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dints import cases, engine, runtime
from dints.cases import Leniency
from dints.dataset import ENDING, Case, read_cases, split_fold
from dints.files import write_atomically
from dints.network import load_model
from dints.tasks import Task, read_json
from dints.volumes import Header, Resampling

log = logging.getLogger("infer")


def main(args: argparse.Namespace) -> None:
    with (
        runtime.started(args.device, args.timeout_minutes) as processes,
        runtime.run_folder(args.output_root, processes) as folder,
    ):
        infer(args, processes, folder)


def infer(args: argparse.Namespace, processes: runtime.Processes, folder: Path) -> None:
    network, _, task, _ = load_model(args.checkpoint)
    network.to(processes.device).eval()
    leniency = Leniency.from_args(args)
    selected = processes.on_main(cases_to_segment, args, task)
    outputs = processes.on_main(segmentation_paths, selected, folder)
    headers_of_all = processes.on_main(cases.check_headers, selected, task, leniency)
    precision = runtime.choose_precision(args.precision, processes)
    window = engine.SlidingWindow(task.patch_size, args.overlap_ratio, args.num_sw_batch_size)
    log.info("%d volumes, %s in %s", len(selected), processes.device.type, precision.name)

    counts = torch.zeros(len(selected), task.num_classes - 1, 3, dtype=torch.float64, device=processes.device)
    share = range(processes.rank, len(selected), processes.world_size)
    for number in tqdm(share, desc="segmenting", unit="volume", disable=None if processes.is_main else True):
        headers = headers_of_all[number]
        # First, so that a bad one costs no segmentation.
        label = None if headers.label is None else torch.from_numpy(cases.read_label(headers.label, task))
        segmentation = segment(headers, network, task, leniency, window, precision)
        save_segmentation(segmentation, headers.images[0], outputs[number])
        if label is not None:
            counts[number] = engine.count_overlap(segmentation, label, task.num_classes)
    processes.sum(counts)
    if processes.is_main and args.root is not None:
        scores = engine.scores_from_counts(counts.cpu())
        write_scores(folder / "scores.csv", scores, selected, task)
        print(scores.describe(task.class_names))
    log.info("segmentations are in %s", folder)


def cases_to_segment(args: argparse.Namespace, task: Task) -> list[Case]:
    """The validation cases of the fold under ``--root`` (all of them for ``all``), or the images of ``--input``."""
    if args.root is not None:
        source = args.json or args.root / "dataset.json"
        labelled = read_cases(read_json(source), source, args.root, args.json_key, args.allow_outside_root)
        training, validation = split_fold(labelled, args.num_folds, args.fold)
        return validation or training
    images = []
    for path in args.input:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [file for file in files if file.is_file() and re.fullmatch(r"[^.].*\.nii(\.gz)?", file.name)]
        if not found:
            raise UserError(f"--input {path} is no NIfTI file, nor a folder that holds any: give .nii or .nii.gz files")
        images.extend(found)
    if task.channel_files:
        return cases_of_channels(images, task.num_channels)
    return [Case(ENDING.sub("", image.name), (str(image),)) for image in images]


def cases_of_channels(images: list[Path], num_channels: int) -> list[Case]:
    """The cases that ``<case>_0000``, ``<case>_0001``, ... make together, a file a channel."""
    channels = defaultdict(dict)
    for image in images:
        parts = re.fullmatch(r"(.+)_(\d{4})\.nii(\.gz)?", image.name)
        if parts is None:
            raise UserError(
                f"--input {image}: this model takes a file a channel, <case>_0000, <case>_0001, ...: rename"
            )
        channels[image.parent / parts[1]][int(parts[2])] = str(image)
    for case, files in channels.items():
        if sorted(files) != list(range(num_channels)):
            raise UserError(
                f"--input {case} has the channels {sorted(files)}; this model takes 0 to {num_channels - 1}: add or "
                "remove files"
            )
    return [Case(case.name, tuple(files[channel] for channel in sorted(files))) for case, files in channels.items()]


def segmentation_paths(selected: list[Case], folder: Path) -> list[Path]:
    """Where each case's segmentation goes: under its name; never onto another case's, nor onto an input."""
    names = Counter(file_name(case) for case in selected)
    inputs = {Path(path).resolve() for case in selected for path in case.files}
    for name, count in names.items():
        if count > 1:
            raise UserError(f"{count} images are called {name}: give each a run with its own --output_root")
        if (folder / name).resolve() in inputs:
            raise UserError(f"{folder / name} is an input and would be overwritten: give another --output_root")
    return [folder / name for name in names]


def file_name(case: Case) -> str:
    """Of a case's segmentation: the case's name, with the ending of its image."""
    return case.name + ENDING.search(case.images[0])[0]


@torch.no_grad()
def segment(
    headers: cases.Headers,
    network: nn.Module,
    task: Task,
    leniency: Leniency,
    window: engine.SlidingWindow,
    precision: runtime.Precision,
) -> torch.Tensor:
    """The label of each voxel of an image, uint8, on its file's own grid.

    Class probabilities are resampled to that grid, not labels, so that borders stay smooth.
    """
    voxels, replaced = cases.read_image(headers, leniency)
    if replaced:
        log.warning("%s: %d NaN or infinite voxels are replaced", headers.images[0].path, replaced)
    resampling = headers.resampling(task)
    image = torch.from_numpy(np.ascontiguousarray(cases.preprocess_image(voxels, resampling, task)))
    with precision.autocast():
        scores = window(image[None].to(precision.device), network)[0]
    probabilities = scores.float().softmax(0).cpu().numpy()
    del voxels, image, scores  # each as large as a class of a large volume, or larger
    return most_probable(probabilities, resampling)


def most_probable(probabilities: np.ndarray, resampling: Resampling) -> torch.Tensor:
    """The most probable class of each voxel of the file that ``resampling`` starts from.

    Args:
        probabilities: (classes, *spatial), on the grid that it leads to.
    """
    labels = highest = None
    for value in range(len(probabilities)):  # one class at a time: on a large CT each takes a GB
        probability = torch.from_numpy(np.ascontiguousarray(resampling.undo(probabilities[value : value + 1])[0]))
        if highest is None:
            labels, highest = torch.zeros(probability.shape, dtype=torch.uint8), probability
        else:
            labels[probability > highest] = value
            torch.maximum(highest, probability, out=highest)
    return labels


def save_segmentation(segmentation: torch.Tensor, image: Header, path: Path) -> None:
    """Write labels as NIfTI, with the image's place in space as its header tells it."""
    file = nibabel.Nifti1Image(segmentation.numpy(), image.affine)
    file.set_qform(*image.nifti.get_qform(coded=True))
    file.set_sform(*image.nifti.get_sform(coded=True))
    file.header.set_xyzt_units(xyz=image.nifti.get_xyzt_units()[0])
    content = file.to_bytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    write_atomically(path, content)


def write_scores(path: Path, scores: engine.Scores, selected: list[Case], task: Task) -> None:
    """A row per case: Dice of each class, empty where the case does not have the class."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["case", *task.class_names[1:]])
    for case, dice in zip(selected, scores.dice.tolist(), strict=True):
        table.writerow([file_name(case), *("" if value != value else f"{value:.6f}" for value in dice)])
    write_atomically(path, text.getvalue())


if __name__ == "__main__":
    exit_on_user_error(main, ARGS)
