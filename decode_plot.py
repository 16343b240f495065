r"""Draw a DiNTS architecture, or the whole search space, as a graph.

    python decode_plot.py --checkpoint runs/search/search_code_600.pth --directory Figures \
        --filename graph
    python decode_plot.py --checkpoint search_code_600.pth --cost --patch_size 96 96 96
    python decode_plot.py --search_space --num_blocks 12 --num_depths 4 --directory Figures \
        --filename search_space

Blocks run from left to right, numbered from 0; resolutions from top to bottom. The image enters
through one stem per active node of the first column; what leaves the last column is upsampled and
added from the deepest row to the topmost. Every node and path has its fixed place, so that two
architectures can be compared at sight. The .gv source, written beside the picture, can be rendered
again by "dot -Tpng graph.gv -o graph.png". With --cost, the network's parameters, multiply-adds,
activations and time are printed, and stand below the picture's title.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dints.options import Settings, number, option, parse
from dints.settings import MAX_BLOCKS, MAX_DEPTHS, XYZ, count


@dataclass(frozen=True, kw_only=True)
class DrawingSettings(Settings):
    """Drawing: one of --checkpoint and --search_space."""

    checkpoint: Path | None = option(
        "an arch file: search_code_<iteration>.pth, or a published one",
        default=None,
        type=Path,
        metavar="FILE",
    )
    search_space: bool = option(
        "draw all nodes and paths that a search chooses from", default=False
    )
    num_blocks: int | None = option(
        "blocks of the search space (default: 12)",
        default=None,
        type=number(int, 1, MAX_BLOCKS),
        metavar="N",
    )
    num_depths: int | None = option(
        "resolutions of the search space (default: 4)",
        default=None,
        type=number(int, 2, MAX_DEPTHS),
        metavar="N",
    )
    directory: Path = option("folder of the drawing", default=Path("./"), type=Path)
    filename: str = option("of the source (.gv) and the picture, no ending", default="graph")
    format: str = option("of the picture", default="png", choices=("png", "svg", "pdf"))

    def complaints(self) -> Iterable[str]:
        if self.search_space == (self.checkpoint is not None):
            yield "give one of --checkpoint and --search_space"
        if not self.search_space and (self.num_blocks or self.num_depths):
            yield "--num_blocks and --num_depths go with --search_space: an arch file has its own"
        if Path(self.filename).suffix in (".gv", ".png", ".svg", ".pdf"):
            yield (f"--filename {self.filename}: give it without its ending, and that as --format")


@dataclass(frozen=True, kw_only=True)
class CostSettings(Settings):
    """Cost."""

    cost: bool = option(
        "count parameters, multiply-adds and activations for a batch of one patch, in fp32, and "
        "time a forward pass",
        default=False,
    )
    patch_size: tuple[int, ...] | None = option(
        "voxels of the input (default: that of the arch file's task if it is known, else 96 96 96)",
        default=None,
        type=count,
        nargs=3,
        metavar=XYZ,
    )
    in_channels: int | None = option(
        "image channels (default: the known task's, else 1)", default=None, type=count, metavar="N"
    )
    num_classes: int | None = option(
        "background included (default: the known task's, else 2)",
        default=None,
        type=count,
        metavar="N",
    )
    channel_mul: float | None = option(
        "times 32, 64, ... channels (default: the width that it was judged at, else 1)",
        default=None,
        type=number(float, 0.0625),
    )
    device: str | None = option(
        "that is timed (default: auto, a GPU where there is one)",
        default=None,
        choices=("auto", "cuda", "cpu"),
    )

    def complaints(self) -> Iterable[str]:
        names = ("patch_size", "in_channels", "num_classes", "channel_mul", "device")
        given = [f"--{name}" for name in names if getattr(self, name) is not None]
        if given and not self.cost:
            yield f"{', '.join(given)}: only with --cost"


@dataclass(frozen=True, kw_only=True)
class PlotSettings(Settings):
    """What decode_plot.py goes by."""

    drawing: DrawingSettings
    cost: CostSettings

    def complaints(self) -> Iterable[str]:
        if self.cost.cost and self.drawing.search_space:
            yield "--cost goes with --checkpoint: a search space is no network yet"


def parse_args(argv: list[str] | None = None) -> PlotSettings:
    return parse(PlotSettings, __doc__, argv)


if __name__ == "__main__":  # before the imports below take seconds
    SETTINGS = parse_args()

import logging

import graphviz

from dints.data.tasks import TASKS
from dints.errors import UserError, exit_on_user_error
from dints.network.architecture import Architecture, load_architecture, paths
from dints.network.drawing import draw_architecture, draw_search_space
from dints.running.processes import started


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
        code2in, code2out: source and target depth of each path of a block. They follow from the
            file's number of depths; published callers pass them.

    Raises:
        UserError: as `load_architecture` and `draw_architecture`, or ``code2in``/``code2out`` are
            not the file's.
    """
    architecture = load_architecture(codepath)
    sources, targets = map(list, zip(*paths(architecture.num_depths), strict=True))
    for name, codes, expected in (("code2in", code2in, sources), ("code2out", code2out, targets)):
        given = expected if codes is None else [int(depth) for depth in codes]
        if given != expected:
            raise UserError(
                f"{name} is {given}, but the {architecture.num_depths} depths of {codepath} make "
                f"it {expected}: leave {name} out"
            )
    return draw_architecture(architecture, filename, directory, format, caption)


def main(settings: PlotSettings) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = settings.drawing
    files = {"filename": given.filename, "directory": given.directory, "format": given.format}
    if given.search_space:
        draw_search_space(given.num_blocks or 12, given.num_depths or 4, **files)
        return
    architecture = load_architecture(given.checkpoint)
    caption = cost_lines(architecture, settings.cost) if settings.cost.cost else []
    plot_graph(given.checkpoint, **files, caption=caption)


def cost_lines(architecture: Architecture, settings: CostSettings) -> list[str]:
    """Print the cost of the architecture's network, and return these lines."""
    from dints.network.cost import cost  # with it MONAI, for which a drawing does not wait

    channels, classes, patch_size = 1, 2, (96, 96, 96)
    name = architecture.info.get("task")
    if isinstance(name, str) and name in TASKS:
        task = TASKS[name]
        channels, classes, patch_size = task.num_channels, task.num_classes, task.patch_size
    with started(settings.device or "auto") as processes:
        lines = cost(
            architecture,
            settings.in_channels or channels,
            settings.num_classes or classes,
            settings.patch_size or patch_size,
            settings.channel_mul or architecture.channel_mul,
            device=processes.device,
        ).lines()
    print("\n".join(lines), flush=True)
    return lines


if __name__ == "__main__":
    exit_on_user_error(main, SETTINGS)
