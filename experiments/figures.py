r"""Draw the README's pictures.

    python experiments/figures.py opening --root data_msd/Task04_Hippocampus \
        --segmentations segmentations
    python experiments/figures.py time
    python experiments/figures.py memory
    python experiments/figures.py rungs --search search_30mib_fold2_seed0

opening: what a search chooses from, and a case as a discrete network segments it. SEGMENTATIONS is
what infer_dints.py wrote with --root: the case is the one whose mean Dice is the median of
scores.csv, so that the picture flatters nobody. time, memory, rungs, from results.jsonl: Dice
against the minutes of training; Dice of what was trained at equal memory, a panel a budget; how the
candidates of a search competed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runner import read_results
from tables import KINDS, NAMES, at_equal_memory

from dints import files
from dints.data.formats import read_dataset
from dints.network.drawing import draw_search_space
from dints.running import curves, tables

FIGURES = Path(__file__).resolve().parents[1] / "Figures"
# of Dice against minutes
CURVES_OF = {"recipe": "recommended", "processes": 1, "fold": 0, "seed": 0}
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442")  # of Okabe and Ito; one a class


def draw_opening(args: argparse.Namespace) -> None:
    task, cases = read_dataset(args.root)
    name, dice = median_case(args.segmentations / "scores.csv")
    (case,) = (case for case in cases if Path(case.images[0]).name == name)
    image, label, found = (
        in_ras(path) for path in (case.images[0], case.label, args.segmentations / name)
    )

    figure = Figure(figsize=(12, 8.2), layout="constrained")
    space, below = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    draw_space(space.subplots(), args.num_blocks, args.num_depths)
    panels = below.subplots(1, 3)
    plane = np.argmax((label > 0).sum((1, 2)))  # the sagittal one with most foreground
    for axes, mask, title in zip(
        panels,
        (None, label, found),
        ("image", "label", f"segmentation, Dice {dice:.2f}"),
        strict=True,
    ):
        show_plane(axes, image[plane], None if mask is None else mask[plane], title)
    handles = [
        matplotlib.patches.Patch(color=colour, label=name)
        for colour, name in zip(COLOURS, task.class_names[1:], strict=False)
    ]
    below.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    with files.replacing(args.output) as file:
        figure.savefig(file, format="png", dpi=110)


def draw_time(args: argparse.Namespace) -> None:
    of_networks = time_to_dice(read_results())
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (network, points), colour, marker in zip(
        of_networks.items(), COLOURS, "osD^v", strict=False
    ):
        minutes, dice = zip(*points, strict=True)
        axes.plot(minutes, dice, f"{marker}-", color=colour, label=NAMES.get(network, network))
    axes.set_xscale("log")
    ticks = sorted({minutes for points in of_networks.values() for minutes, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("minutes of training on one core; each point is a training of its own")
    axes.set_ylabel(f"Dice of fold {CURVES_OF['fold']}, mean of both classes")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with files.replacing(args.output) as file:
        figure.savefig(file, format="png", dpi=110)


def time_to_dice(results: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Return the points (minutes, Dice) of each network of which there are several, by the
    recommended recipe.

    All are of one fold and one seed, so that points differ in the time alone: minutes are those on
    an idle core.
    """
    points = defaultdict(dict)
    for result in results:
        if result.get("minutes") is not None and all(
            result[key] == value for key, value in CURVES_OF.items()
        ):
            points[result["network"]][result["minutes"]] = result["dice"]
    return {
        network: sorted(of_network.items())
        for network, of_network in points.items()
        if len(of_network) > 1
    }


def draw_memory(args: argparse.Namespace) -> None:
    of_budgets = dice_at_equal_memory(read_results())
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(of_budgets), sharey=True, squeeze=False)[0]
    for axes, (memory, of_kinds) in zip(panels, of_budgets.items(), strict=True):
        for place, kind in enumerate(KINDS):
            dice = of_kinds.get(kind, [])
            axes.plot(dice, [place] * len(dice), "o", color=COLOURS[0], markersize=6, alpha=0.7)
            if len(dice) > 1:
                axes.plot(
                    statistics.mean(dice),
                    place,
                    "|",
                    color="black",
                    markersize=16,
                    markeredgewidth=2,
                )
        axes.set_title(f"{memory:g} MiB of activations", loc="left")
        axes.set_xlabel("Dice, mean of both classes")
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(KINDS)), KINDS.values())
    panels[0].set_ylim(len(KINDS) - 0.5, -0.5)
    with files.replacing(args.output) as file:
        figure.savefig(file, format="png", dpi=110)


def dice_at_equal_memory(results: list[dict]) -> dict[float, dict[str, list[float]]]:
    """Return by budget in MiB and kind the Dice of the networks that were trained at equal memory,
    means over seeds.
    """
    dice = defaultdict(dict)
    for (memory, kind), networks in at_equal_memory(results).items():
        dice[memory][kind] = [
            statistics.mean(line["dice"] for line in of_network) for of_network in networks
        ]
    return dict(sorted(dice.items()))


def draw_rungs(args: argparse.Namespace) -> None:
    (search,) = (line for line in read_results() if line["name"] == args.search)
    with tempfile.TemporaryDirectory() as folder:
        tables.write_rows(Path(folder) / tables.CANDIDATES, search["candidates"])
        curves.draw_candidates(Path(folder))
        files.write_atomically(args.output, (Path(folder) / "candidates.png").read_bytes())


def median_case(scores: Path) -> tuple[str, float]:
    """Return the file name and mean Dice of the case whose mean Dice is the median."""
    with scores.open() as file:
        rows = [
            (
                statistics.mean(
                    float(value) for key, value in row.items() if key != "case" and value
                ),
                row["case"],
            )
            for row in csv.DictReader(file)
        ]
    dice, name = sorted(rows)[len(rows) // 2]
    return name, dice


def in_ras(path: str | Path) -> np.ndarray:
    """Read a volume (x, y, z), turned to RAS."""
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def draw_space(axes: Axes, num_blocks: int, num_depths: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draw_search_space(num_blocks, num_depths, "space", folder)
        axes.imshow(
            matplotlib.image.imread(Path(folder) / "space.png"), interpolation="antialiased"
        )
    axes.set_axis_off()


def show_plane(axes: Axes, image: np.ndarray, mask: np.ndarray | None, title: str) -> None:
    """Show a plane (y, z), z upwards, with the classes of a mask laid over it."""
    low, high = np.percentile(image, (1, 99.5))
    axes.imshow(image.T, cmap="gray", vmin=low, vmax=high, origin="lower")
    if mask is not None:
        for value, colour in enumerate(COLOURS, start=1):
            layer = np.zeros((*mask.T.shape, 4))
            layer[value == mask.T] = matplotlib.colors.to_rgba(colour, 0.6)
            axes.imshow(layer, origin="lower", interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pictures = parser.add_subparsers(required=True)
    opening = pictures.add_parser("opening", help="search space, and a segmentation")
    opening.set_defaults(draw=draw_opening)
    opening.add_argument("--root", type=Path, required=True, help="the dataset")
    opening.add_argument(
        "--segmentations", type=Path, required=True, help="output folder of infer_dints.py --root"
    )
    opening.add_argument("--output", type=Path, default=FIGURES / "opening.png", help="the picture")
    opening.add_argument("--num_blocks", type=int, default=12, help="of the space that is drawn")
    opening.add_argument("--num_depths", type=int, default=4, help="of the space that is drawn")
    time = pictures.add_parser("time", help="Dice against minutes")
    time.set_defaults(draw=draw_time)
    time.add_argument(
        "--output", type=Path, default=FIGURES / "time_to_dice.png", help="the picture"
    )
    memory = pictures.add_parser("memory", help="Dice at equal memory")
    memory.set_defaults(draw=draw_memory)
    memory.add_argument(
        "--output", type=Path, default=FIGURES / "equal_memory.png", help="the picture"
    )
    rungs = pictures.add_parser("rungs", help="a search's candidates")
    rungs.set_defaults(draw=draw_rungs)
    rungs.add_argument("--search", required=True, help="name of its row")
    rungs.add_argument("--output", type=Path, default=FIGURES / "rungs.png", help="the picture")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    arguments.draw(arguments)
