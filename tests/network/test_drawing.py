"""A drawing holds the architecture or the space, legibly, and its files are written whole."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from architectures import everything, random_architecture

from dints.errors import UserError
from dints.network.architecture import paths
from dints.network.drawing import draw_architecture, draw_search_space
from dints.network.operations import OPERATIONS, PUBLISHED

LABELS = [OPERATIONS[name].label for name in PUBLISHED]
PATH_LINE = re.compile(r"row(\d+)_depth(\d+) -> row(\d+)_depth(\d+) \[(.*)\]")
needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None, reason="graphviz's program 'dot' is not installed"
)


def drawn_paths(source: str) -> dict[tuple[int, int, int], str]:
    """Return each path's attributes by (block, source depth, target depth)."""
    drawn = {}
    for start_row, start, end_row, end, attributes in PATH_LINE.findall(source):
        assert int(end_row) == int(start_row) + 1
        assert (int(start_row), int(start), int(end)) not in drawn
        drawn[int(start_row), int(start), int(end)] = attributes
    return drawn


@needs_dot
@pytest.mark.parametrize(("num_blocks", "num_depths"), [(1, 5), (4, 2), (12, 4)])
def test_drawing_holds_the_architecture(tmp_path, num_blocks, num_depths):
    architecture = random_architecture(num_blocks, num_blocks, num_depths)
    if num_blocks == 4:
        architecture = replace(architecture, use_downsample=False)
    source = draw_architecture(architecture, "found", tmp_path, "svg").source

    ends = paths(num_depths)
    assert {path: re.search("<TD>(.*)</TD>", a)[1] for path, a in drawn_paths(source).items()} == {
        (block, *ends[path]): LABELS[architecture.arch_code_c[block, path]]
        for block, path in np.argwhere(architecture.arch_code_a)
    }
    for (row, depth), active in np.ndenumerate(architecture.node_a):
        width = re.search(rf"\trow{row}_depth{depth} \[.*width=([\d.]+)", source)[1]
        assert width == ("0.250" if active else "0.111")
    assert re.findall(r'"?(1/\d+)\\l', source) == ["1/1"] + [
        f"1/{2 ** (depth + architecture.use_downsample)}" for depth in range(num_depths)
    ]
    inputs, outputs = (np.flatnonzero(architecture.node_a[row]).tolist() for row in (0, -1))
    assert [int(depth) for depth in re.findall(r"image -> row0_depth(\d+)", source)] == inputs
    sums = [("0", "segmentation"), *((str(d), f"sum{d - 1}") for d in range(1, max(outputs) + 1))]
    assert sorted(re.findall(r"sum(\d+) -> (\w+)", source)) == sorted(sums)
    of_nodes = re.findall(rf"row{num_blocks}_depth(\d+) -> sum(\d+)", source)
    assert of_nodes == [(str(depth), str(depth)) for depth in outputs]
    assert source.count('label="+"') == len(outputs) - 1


@needs_dot
def test_a_search_space_holds_every_path_and_directions_differ_in_colour_and_in_line_or_head(
    tmp_path,
):
    drawn = drawn_paths(draw_search_space(3, 3, "space", tmp_path, "svg").source)
    assert set(drawn) == {(block, *ends) for block in range(3) for ends in paths(3)}
    assert not any("label" in attributes for attributes in drawn.values())
    looks = {}
    for (_, start, end), attributes in drawn.items():
        keys = ("color", "style", "arrowhead")
        look = tuple(re.search(rf"\b{key}=\"?([#\w]+)", attributes)[1] for key in keys)
        looks.setdefault(end - start, set()).add(look)
    (up,), (level,), (down,) = (looks.pop(change) for change in (-1, 0, 1))
    assert not looks
    assert len({up[0], level[0], down[0]}) == len({up[1:], level[1:], down[1:]}) == 3


@needs_dot
def test_labels_do_not_overlap(tmp_path):
    source = draw_architecture(everything(12, 4), "full", tmp_path, "svg").source
    places = [
        tuple(map(float, re.search(r'lp="([-\d.]+),([-\d.]+)"', attributes).groups()))
        for attributes in drawn_paths(source).values()
    ]
    assert len(places) == 120
    width, height = 42, 15  # of "P3D-xy" in 10 point Helvetica, with its frame
    for (x, y), (other_x, other_y) in combinations(places, 2):
        assert abs(x - other_x) > width or abs(y - other_y) > height


@needs_dot
@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF-")])
def test_each_format_is_written_beside_its_source(tmp_path, ending, magic):
    # A dot in the name is not an ending: Figures/arch_ram-cost-0.8.png has one.
    draw_architecture(random_architecture(0, 2, 2), "ram-cost-0.8", tmp_path / "made", ending)
    picture, source = sorted((tmp_path / "made").iterdir(), key=lambda path: path.suffix == ".gv")
    assert (picture.name, source.name) == (f"ram-cost-0.8.{ending}", "ram-cost-0.8.gv")
    assert picture.read_bytes().startswith(magic)


@needs_dot
@pytest.mark.parametrize(
    ("info", "title"),
    [
        (
            {"task": r"a <b> \n", "factor_ram_cost": 0.8, "iter_num": 1234567, "best_dsc": 0.85},
            r"DiNTS architecture · a <b> \\n · RAM factor 0.8 · iteration 1234567 · "
            "supernet's best Dice 0.850",
        ),
        ({"task": None, "iter_num": "many", "best_dsc": -1}, "DiNTS architecture"),
    ],
)
def test_title_and_caption_say_what_the_file_knows(tmp_path, info, title):
    architecture = random_architecture(0, 2, 2, info)
    graph = draw_architecture(architecture, "titled", tmp_path, "svg", caption=["1.5 M <weights>"])
    assert f'label="{title}\\l"' in graph.source
    assert "1.5 M &lt;weights&gt;</text>" in (tmp_path / "titled.svg").read_text()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"filename": "sub/graph"}, "'sub/graph'"),
        ({"format": "bmp"}, "'bmp'.*png, svg, pdf"),
        ({"directory": "taken"}, "taken.*cannot be written"),
    ],
)
def test_files_that_cannot_be_written_are_refused(tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file, not a folder")
    with pytest.raises(UserError, match=message):
        draw_architecture(random_architecture(0, 2, 2), **files)
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_failing_dot_keeps_the_previous_picture_and_without_dot_the_source_is_written(
    tmp_path, monkeypatch
):
    (tmp_path / "graph.png").write_bytes(b"previous")
    program = tmp_path / "bin" / "dot"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'no such renderer' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    with pytest.raises(UserError, match="no such renderer"):
        draw_architecture(everything(2, 2), directory=tmp_path)
    assert (tmp_path / "graph.png").read_bytes() == b"previous"

    program.unlink()
    with pytest.raises(UserError, match=r"graph.gv is written, .*apt-get install graphviz"):
        draw_architecture(everything(2, 2), directory=tmp_path / "out")
    (source,) = (tmp_path / "out").iterdir()
    assert source.name == "graph.gv" and len(drawn_paths(source.read_text())) == 8
