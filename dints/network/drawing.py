"""Drawings of an architecture or of the search space, laid out here and rendered by graphviz."""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import graphviz
import numpy as np

from dints.errors import UserError
from dints.files import replacing
from dints.network.architecture import Architecture, paths
from dints.network.operations import OPERATIONS, PUBLISHED, Operation

FORMATS = ("png", "svg", "pdf")

logger = logging.getLogger(__name__)

Point = tuple[float, float]

FONT = "Helvetica,Arial,sans-serif"
GREY = "#808080"
# what no search changes: stems, sums, head
FIXED = {"color": GREY, "fontcolor": GREY, "penwidth": "1"}
BOX_HEIGHT = 18.0
INACTIVE = "#C4C4C4", "#EEEEEE"
ARROW_LENGTH = 6.5  # points; graphviz makes it 10 times arrowsize


# By change of depth: color of the Okabe-Ito palette (vermilion, blue, black), which is safe for
# colour-blind readers, line and arrowhead; and the meaning.
LOOKS = {
    1: {"color": "#D55E00", "style": "solid", "arrowhead": "normal"},
    -1: {"color": "#0072B2", "style": "dashed", "arrowhead": "empty"},
    0: {"color": "#222222", "style": "solid", "arrowhead": "vee"},
}
MEANINGS = {
    1: "down: half the resolution, twice the channels",
    -1: "up: twice the resolution, half the channels",
    0: "same resolution",
}


@dataclass(frozen=True)
class Grid:
    """Where things are, in points (1/72 inch), y upwards, the topmost first node at (0, 0).

    At 12 blocks the picture is about 1000 points wide: its 10 point text stays readable in a page.
    """

    num_blocks: int
    num_depths: int
    num_halvings: int  # of the image, before depth 0: 0 or 1

    row_gap = 88.0
    radius = 9.0
    margin = 48.0  # from the first and last nodes to the stems and the sums
    header = 46.0  # height of the image and of the block numbers above the topmost nodes
    sides = 2 * margin + 90.0  # row labels, stems, sums and output together
    legend_columns = (0.0, 288.0, 408.0)
    legend_width = 700.0

    @property
    def left(self) -> float:
        return -self.margin - 50.0

    @property
    def column_gap(self) -> float:
        # Wide enough for the labels, and for few blocks to be about as wide as the legend
        return min(max((self.legend_width - self.sides) / self.num_blocks, 72.0), 110.0)

    def node(self, row: int, depth: int) -> Point:
        return row * self.column_gap, -depth * self.row_gap

    def image(self) -> Point:
        return -self.margin, self.header

    def sum(self, depth: int) -> Point:
        return self.num_blocks * self.column_gap + self.margin, -depth * self.row_gap

    def segmentation(self) -> Point:
        return self.sum(0)[0], self.header


def draw_architecture(
    architecture: Architecture,
    filename: str = "graph",
    directory: str | Path = "./",
    format: str = "png",
    caption: Sequence[str] = (),
) -> graphviz.Digraph:
    """Write ``<directory>/<filename>.gv``, and its rendering beside it, each atomically.

    Args:
        caption: further lines below the title, for example what the network costs.

    Raises:
        UserError: the files cannot be written, or graphviz's ``dot`` is missing or fails. The
            source is on disk by then, so that a search may catch it, warn and continue.
    """
    return _write(_graph_of(architecture, caption), filename, directory, format)


def architecture_svg(architecture: Architecture, caption: Sequence[str] = ()) -> str:
    """Return the drawing as the text of an SVG file; nothing is written.

    Raises:
        UserError: graphviz's ``dot`` is missing or fails.
    """
    graph = _graph_of(architecture, caption)
    return _rendered(graph, "svg", "drawing the architecture").decode()


def _graph_of(architecture: Architecture, caption: Sequence[str]) -> graphviz.Digraph:
    operations = [OPERATIONS[name] for name in architecture.operations]
    ends = paths(architecture.num_depths)
    active = {
        (block, *ends[path]): operations[architecture.arch_code_c[block, path]]
        for block, path in np.argwhere(architecture.arch_code_a == 1).tolist()
    }
    title = " · ".join(["DiNTS architecture", *_facts(architecture.info)])
    size = architecture.num_blocks, architecture.num_depths
    grid = Grid(*size, int(architecture.use_downsample))
    return _graph(grid, architecture.node_a == 1, active, operations, title, caption)


def draw_search_space(
    num_blocks: int = 12,
    num_depths: int = 4,
    filename: str = "search_space",
    directory: str | Path = "./",
    format: str = "png",
    caption: Sequence[str] = (),
    operations: Sequence[str] = PUBLISHED,
    use_downsample: bool = True,
) -> graphviz.Digraph:
    """Draw all that a search chooses from; write, return and raise as `draw_architecture`."""
    everything = dict.fromkeys(
        (block, *ends) for block in range(num_blocks) for ends in paths(num_depths)
    )
    title = (
        f"DiNTS search space · {num_blocks} blocks · {num_depths} resolutions · {len(everything)} "
        f"paths, each on or off, with one of {len(operations)} operations"
    )
    all_nodes = np.ones((num_blocks + 1, num_depths), dtype=bool)
    grid = Grid(num_blocks, num_depths, int(use_downsample))
    operations = [OPERATIONS[name] for name in operations]
    graph = _graph(grid, all_nodes, everything, operations, title, caption)
    return _write(graph, filename, directory, format)


def _facts(info: dict) -> list[str]:
    """Put into words what an arch file says about itself, as far as its values make sense."""
    facts = [info["task"]] if isinstance(info.get("task"), str) else []
    for key, wording in (
        ("factor_ram_cost", "RAM factor {:g}"),
        ("iter_num", "iteration {:.0f}"),
        ("best_dsc", "supernet's best Dice {:.3f}"),
    ):
        try:
            number = float(info.get(key, math.nan))
        except (TypeError, ValueError, RuntimeError):
            continue
        if 0 <= number < math.inf:  # published searches start from a best Dice of -1
            facts.append(wording.format(number))
    return facts


def _graph(
    grid: Grid,
    active: np.ndarray,
    active_paths: dict[tuple[int, int, int], Operation | None],
    operations: Sequence[Operation],
    title: str,
    caption: Sequence[str],
) -> graphviz.Digraph:
    """Lay out the drawing.

    Args:
        active: (blocks + 1, depths), which nodes are active.
        active_paths: operations by block and source and target depths; None: not chosen yet.
    """
    graph = graphviz.Digraph("dints")
    # nop2: graphviz draws at the given positions and moves nothing.
    graph.attr(layout="nop2", outputorder="nodesfirst", bgcolor="white", pad="0.12", fontname=FONT)
    graph.attr("node", fontname=FONT, fontsize="10", label="", shape="circle", fixedsize="true")
    graph.attr(
        "edge", fontname=FONT, fontsize="10", penwidth="1.7", arrowsize=f"{ARROW_LENGTH / 10:g}"
    )
    _add_headings(graph, grid, title, caption)
    for row, depth in np.ndindex(active.shape):
        _add_node(graph, f"row{row}_depth{depth}", grid.node(row, depth), bool(active[row, depth]))
    _add_stems(graph, grid, np.flatnonzero(active[0]).tolist())
    for path, operation in active_paths.items():
        _add_path(graph, grid, *path, operation)
    _add_output(graph, grid, np.flatnonzero(active[-1]).tolist())
    _add_legend(graph, grid, operations, has_inactive=not active.all())
    return graph


def _add_headings(graph: graphviz.Digraph, grid: Grid, title: str, caption: Sequence[str]) -> None:
    """Add title, caption, block numbers, and each row's resolution as a part of the image's."""
    height = grid.header + 42 + 15 * len(caption)
    _add_text(graph, "title", (grid.left, height), title, fontsize=13, bold=True)
    for number, line in enumerate(caption):
        _add_text(graph, f"caption{number}", (grid.left, height - 19 - 15 * number), line)
    for block in range(grid.num_blocks):
        center = (block + 0.5) * grid.column_gap
        look = {"shape": "plain", "fixedsize": "false", "fontcolor": GREY}
        graph.node(f"block{block}", f"block {block}", pos=_pos(center, grid.header), **look)
    _add_text(graph, "resolutions", (grid.left, grid.header + 17), "resolution")
    for depth in range(-1, grid.num_depths):
        height = grid.header if depth < 0 else grid.node(0, depth)[1]
        part = 1 if depth < 0 else 2 ** (depth + grid.num_halvings)
        _add_text(graph, f"resolution{depth + 1}", (grid.left, height), f"1/{part}", fontsize=12)


def _add_node(graph: graphviz.Digraph, name: str, at: Point, active: bool) -> None:
    width, color, fill = (2 * Grid.radius, "#222222", "#56B4E9") if active else (8, *INACTIVE)
    graph.node(
        name, pos=_pos(*at), width=_inches(width), style="filled", color=color, fillcolor=fill
    )


def _add_path(
    graph: graphviz.Digraph,
    grid: Grid,
    block: int,
    source: int,
    target: int,
    operation: Operation | None,
) -> None:
    start, end = grid.node(block, source), grid.node(block + 1, target)
    # Labels of level paths lie on top of the line; those of slanted ones near their start, clear of
    # where paths cross.
    if source == target:
        label_at = (start[0] + end[0] - ARROW_LENGTH) / 2, start[1] + 8.5
    else:
        label_at = tuple(a + 0.3 * (b - a) for a, b in zip(start, end, strict=True))
    label = {} if operation is None else {"label": _pill(operation), "lp": _pos(*label_at)}
    graph.edge(
        f"row{block}_depth{source}",
        f"row{block + 1}_depth{target}",
        pos=_arrow(_towards(start, end, grid.radius), _towards(end, start, grid.radius)),
        **LOOKS[target - source],
        **label,
    )


def _add_stems(graph: graphviz.Digraph, grid: Grid, depths: Sequence[int]) -> None:
    """Add the image and a stem into each active node of the first column."""
    x, y = grid.image()
    _add_box(graph, "image", (x, y))
    for depth in depths:
        node_x, node_y = grid.node(0, depth)
        route = _arrow((x, y - BOX_HEIGHT / 2), (x, node_y), (node_x - grid.radius, node_y))
        ends, label_at = ("image", f"row0_depth{depth}"), _pos(x + 19, node_y + 7)
        graph.edge(*ends, pos=route, label="stem", lp=label_at, **FIXED)


def _add_output(graph: graphviz.Digraph, grid: Grid, depths: Sequence[int]) -> None:
    """Add the way up from the last column's deepest active node; to it the others are added."""
    _add_box(graph, "segmentation", grid.segmentation())
    radius = {depth: 7.0 if depth in depths else 2.5 for depth in range(max(depths))}
    radius[max(depths)] = 2.5
    for depth in radius:
        x, y = grid.sum(depth)
        look = {"label": "+"} if radius[depth] == 7 else {"style": "filled", "fillcolor": GREY}
        graph.node(
            f"sum{depth}", pos=_pos(x, y), width=_inches(2 * radius[depth]), color=GREY, **look
        )
        above, label, ceiling = "segmentation", "head", grid.segmentation()[1] - BOX_HEIGHT / 2
        if depth > 0:
            above, label = f"sum{depth - 1}", "x2"
            ceiling = grid.sum(depth - 1)[1] - radius[depth - 1]
        route = _arrow((x, y + radius[depth]), (x, ceiling))
        label_at = _pos(x + 4 + 3 * len(label), (y + ceiling) / 2)
        graph.edge(f"sum{depth}", above, pos=route, label=label, lp=label_at, **FIXED)
    for depth in depths:
        (x, y), (sum_x, _) = grid.node(grid.num_blocks, depth), grid.sum(depth)
        route = _arrow((x + grid.radius, y), (sum_x - radius[depth], y))
        graph.edge(f"row{grid.num_blocks}_depth{depth}", f"sum{depth}", pos=route, **FIXED)


def _add_legend(
    graph: graphviz.Digraph, grid: Grid, operations: Sequence[Operation], has_inactive: bool
) -> None:
    top = grid.node(0, grid.num_depths - 1)[1] - 50
    paths_x, nodes_x, operations_x = (grid.left + offset for offset in grid.legend_columns)
    for x, heading in (
        (paths_x, "Paths"),
        (nodes_x, "Nodes"),
        (operations_x, "Operations, one for each path"),
    ):
        _add_text(graph, f"legend {heading}", (x, top), heading, fontsize=11, bold=True)

    arrows = [(MEANINGS[change], look) for change, look in LOOKS.items()]
    arrows.append(("not searched: stem, upsampling (x2), head", FIXED))
    for line, (meaning, look) in enumerate(arrows, start=1):
        y = top - 17 * line
        start, end = (paths_x, y), (paths_x + 34, y)
        for name, at in ((f"legend start{line}", start), (f"legend end{line}", end)):
            graph.node(name, pos=_pos(*at), style="invis", width="0.01")
        graph.edge(f"legend start{line}", f"legend end{line}", pos=_arrow(start, end), **look)
        _add_text(graph, f"legend {meaning}", (paths_x + 42, y), meaning)

    kinds = [("active", True), ("inactive", False)] if has_inactive else [("features", True)]
    for line, (kind, active) in enumerate(kinds, start=1):
        y = top - 17 * line - 2
        _add_node(graph, f"legend {kind} node", (nodes_x + grid.radius, y), active)
        _add_text(graph, f"legend {kind}", (nodes_x + 26, y), kind)

    for line, operation in enumerate(operations, start=1):
        y = top - 17 * line
        name, at = f"legend {operation.label} pill", _pos(operations_x + 21, y)
        graph.node(name, _pill(operation), pos=at, shape="plain", fixedsize="false")
        _add_text(graph, f"legend {operation.label}", (operations_x + 50, y), operation.meaning)


def _add_text(
    graph: graphviz.Digraph,
    name: str,
    at: Point,
    text: str,
    fontsize: float = 10,
    bold: bool = False,
) -> None:
    """Add text that starts at the point ``at``: a borderless box with a left-aligned label."""
    width = 0.62 * fontsize * len(text) + 10
    graph.node(
        name,
        graphviz.escape(text) + r"\l",
        pos=_pos(at[0] + width / 2, at[1]),
        shape="box",
        peripheries="0",
        margin="0",
        width=_inches(width),
        height=_inches(1.6 * fontsize),
        fontname=f"{FONT} bold" if bold else FONT,
        fontsize=f"{fontsize:g}",
    )


def _add_box(graph: graphviz.Digraph, name: str, at: Point) -> None:
    size = {"width": _inches(5.4 * len(name) + 14), "height": _inches(BOX_HEIGHT)}
    graph.node(name, name, pos=_pos(*at), shape="box", style="rounded", color=GREY, **size)


def _pill(operation: Operation) -> str:
    """Return an operation's name on its colour in graphviz's HTML; it covers the line below."""
    return (
        '<<TABLE BORDER="1" COLOR="#777777" STYLE="rounded" CELLBORDER="0" CELLPADDING="0" '
        'CELLSPACING="1" '
        f'BGCOLOR="{operation.colour}"><TR><TD>{html.escape(operation.label)}</TD></TR></TABLE>>'
    )


def _pos(x: float, y: float) -> str:
    return f"{x:.1f},{y:.1f}"


def _inches(points: float) -> str:
    return f"{points / 72:.3f}"


def _towards(start: Point, end: Point, distance: float) -> Point:
    """Return the point at ``distance`` from ``start`` on the way to ``end``."""
    share = distance / math.dist(start, end)
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _arrow(*corners: Point) -> str:
    """Return graphviz's spline for straight lines; the last few points are the arrowhead's."""
    *route, tip = corners
    route.append(_towards(tip, route[-1], ARROW_LENGTH))
    controls = [route[0]]
    for start, end in zip(route, route[1:], strict=False):
        controls += [start, end, end]
    return " ".join([f"e,{_pos(*tip)}", *(_pos(*point) for point in controls)])


def _write(
    graph: graphviz.Digraph, filename: str, directory: str | Path, format: str
) -> graphviz.Digraph:
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; it is one of {', '.join(FORMATS)}")
    if not filename or Path(filename).name != filename:
        raise UserError(
            f"--filename is {filename!r}; give a name here, and the folder as --directory"
        )
    graph.filename, graph.directory, graph.format = f"{filename}.gv", str(directory), format
    if format == "png":
        graph.attr(dpi="144")  # about 2000 pixels for 12 blocks; an SVG would be enlarged by it
    source, picture = (Path(directory) / f"{filename}.{ending}" for ending in ("gv", format))
    with replacing(source) as file:
        file.write(graph.source.encode())
    content = _rendered(graph, format, f"{source} is written, but drawing {picture}")
    with replacing(picture) as file:
        file.write(content)
    logger.info("drawn: %s", picture)
    return graph


def _rendered(graph: graphviz.Digraph, format: str, task: str) -> bytes:
    """Return a drawing's file.

    Args:
        task: what is not done where it fails, for the message.
    """
    try:
        # not graph.pipe(), which is broken off where dot ends before it has read all, and then
        # loses what dot said
        return graphviz.pipe(graph.engine, format, graph.source.encode())
    except graphviz.ExecutableNotFound as error:
        raise UserError(
            f"{task} needs graphviz's program 'dot', which is not installed: apt-get install "
            "graphviz, conda install graphviz, or brew install graphviz"
        ) from error
    except graphviz.CalledProcessError as error:
        reason = (error.stderr or b"").decode(errors="replace")
        raise UserError(f"{task} failed in graphviz's 'dot': {reason}") from error
