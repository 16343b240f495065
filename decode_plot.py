"""Draw a DiNTS architecture, or the whole search space, as a graph.

    python decode_plot.py --checkpoint runs/search/search_code_600.pth --directory Figures --filename graph
    python decode_plot.py --checkpoint search_code_600.pth --cost --patch_size 96 96 96
    python decode_plot.py --search_space --num_blocks 12 --num_depths 4 --directory Figures --filename search_space

Blocks run from left to right, numbered from 0; resolutions from top to bottom. The image enters through one stem per
active node of the first column; what leaves the last column is upsampled and added from the deepest row to the topmost.
Every node and path has its fixed place, so that two architectures can be compared at sight. The .gv source, written
beside the picture, can be rendered again by "dot -Tpng graph.gv -o graph.png". With --cost, the network's parameters,
multiply-adds, activations and time are printed, and stand below the picture's title.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dints import data, network, options, running
from dints.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    import graphviz

    from dints.network.architecture import Architecture


def parse_args() -> argparse.Namespace:
    parser = options.parser(__doc__)
    drawn = parser.add_argument_group("what is drawn, one of the two").add_mutually_exclusive_group(required=True)
    drawn.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="an arch file: search_code_<iteration>.pth, or a published one"
    )
    drawn.add_argument("--search_space", action="store_true", help="all nodes and all paths that a search chooses from")

    space = parser.add_argument_group("size of the search space, with --search_space")
    blocks, depths = options.number(int, 1, options.MAX_BLOCKS), options.number(int, 2, options.MAX_DEPTHS)
    space.add_argument("--num_blocks", type=blocks, metavar="N", help="blocks, from left to right (default: 12)")
    space.add_argument("--num_depths", type=depths, metavar="N", help="resolutions, from top to bottom (default: 4)")

    add_cost(parser)
    files = parser.add_argument_group(
        "files: DIRECTORY/FILENAME.gv, the source, and DIRECTORY/FILENAME.FORMAT, the picture"
    )
    files.add_argument("--directory", type=Path, default="./", help="made if absent")
    files.add_argument("--filename", default="graph", help="without an ending")
    files.add_argument("--format", choices=("png", "svg", "pdf"), default="png", help="of the picture")
    args = parser.parse_args()
    if not args.search_space and (args.num_blocks or args.num_depths):
        parser.error("--num_blocks and --num_depths go with --search_space: an arch file has its own")
    if Path(args.filename).suffix in (".gv", ".png", ".svg", ".pdf"):
        parser.error(f"--filename {args.filename}: give it without its ending, and that as --format")
    if args.cost and args.search_space:
        parser.error("--cost goes with --checkpoint: a search space is no network yet")
    settings = ("patch_size", "in_channels", "num_classes", "channel_mul", "device")
    given = [f"--{name}" for name in settings if getattr(args, name) is not None]
    if given and not args.cost:
        parser.error(f"{', '.join(given)}: only with --cost")
    return args


def add_cost(parser: argparse.ArgumentParser) -> None:
    """Add --cost and its settings; None where a setting is not given."""
    add = parser.add_argument_group("what the network costs").add_argument
    at_least_1 = options.number(int, 1)
    add("--cost", action="store_true", help="count it for a batch of one patch, in fp32, and time a forward pass")
    add(
        "--patch_size",
        type=at_least_1,
        nargs=3,
        metavar=options.XYZ,
        help="of the input, voxels (default: that of the arch file's task if it is known, else 96 96 96)",
    )
    add("--in_channels", type=at_least_1, metavar="N", help="image channels (default: the known task's, else 1)")
    add("--num_classes", type=at_least_1, metavar="N", help="background included (default: the known task's, else 2)")
    add(
        "--channel_mul",
        type=options.number(float, 0.0625),
        help="times 32, 64, ... channels (default: the width that it was judged at, else 1)",
    )
    add("--device", choices=("auto", "cuda", "cpu"), help="that is timed (default: auto, a GPU where there is one)")


def plot_graph(
    codepath: str | Path,
    filename: str = "graph",
    directory: str | Path = "./",
    code2in: Sequence[int] | None = None,
    code2out: Sequence[int] | None = None,
    format: str = "png",
    caption: Sequence[str] = (),
) -> graphviz.Digraph:
    """Draw the architecture of an arch file; write and return as `draw_architecture`.

    Args:
        codepath: arch file, ours or a published one.
        code2in, code2out: source and target depth of each path of a block. They follow from the file's number of
            depths; published callers that pass them may go on doing so.

    Raises:
        UserError: as `load_architecture` and `draw_architecture`, or ``code2in``/``code2out`` are not the file's.
    """
    architecture = network.architecture.load_architecture(codepath)
    sources, targets = zip(*network.architecture.paths(architecture.num_depths), strict=True)
    for name, given, expected in (("code2in", code2in, sources), ("code2out", code2out, targets)):
        if given is not None and [int(depth) for depth in given] != list(expected):
            raise UserError(
                f"{name} is {[int(depth) for depth in given]}, but the {architecture.num_depths} depths of {codepath} "
                f"make it {list(expected)}: leave {name} out"
            )
    return network.drawing.draw_architecture(architecture, filename, directory, format, caption)


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    files = {"filename": args.filename, "directory": args.directory, "format": args.format}
    if args.search_space:
        network.drawing.draw_search_space(args.num_blocks or 12, args.num_depths or 4, **files)
    else:
        caption = cost_lines(network.architecture.load_architecture(args.checkpoint), args) if args.cost else []
        plot_graph(args.checkpoint, **files, caption=caption)


def cost_lines(architecture: Architecture, args: argparse.Namespace) -> list[str]:
    """Print what the architecture's network costs with the settings in ``args``, and return these lines."""
    channels, classes, patch_size = 1, 2, (96, 96, 96)
    name = architecture.info.get("task")
    if isinstance(name, str) and name in data.tasks.TASKS:
        task = data.tasks.TASKS[name]
        channels, classes, patch_size = task.num_channels, task.num_classes, task.patch_size
    with running.processes.started(args.device or "auto") as processes:
        lines = network.cost.cost(
            architecture,
            args.in_channels or channels,
            args.num_classes or classes,
            tuple(args.patch_size or patch_size),
            args.channel_mul or architecture.channel_mul,
            device=processes.device,
        ).lines()
    print("\n".join(lines), flush=True)
    return lines


if __name__ == "__main__":
    exit_on_user_error(main, parse_args())
