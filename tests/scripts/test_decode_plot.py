"""decode_plot.py: what is in the drawing, the files it writes, and what it says to bad input."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import random_architecture

import decode_plot
from decode_plot import plot_graph
from dints.errors import UserError
from dints.network import cost
from dints.network.architecture import Architecture, save_architecture
from dints.network.drawing import draw_architecture, draw_search_space

SCRIPT = Path(__file__).parents[2] / "decode_plot.py"
LABELS = ("skip", "3x3x3", "P3D-xy", "P3D-xz", "P3D-yz")
PUBLISHED_CODE2IN = [0, 1, 0, 1, 2, 1, 2, 3, 2, 3]
PUBLISHED_CODE2OUT = [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
PATH_LINE = re.compile(r"row(\d+)_depth(\d+) -> row(\d+)_depth(\d+) \[(.*)\]")

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz's program 'dot' is not installed")


def ends_of_paths(num_depths: int) -> list[tuple[int, int]]:
    return [(s, t) for t in range(num_depths) for s in (t - 1, t, t + 1) if 0 <= s < num_depths]


def drawn_paths(source: str) -> dict[tuple[int, int, int], str]:
    """Return (block, source depth, target depth) -> graphviz's attributes, of each path in the drawing."""
    drawn = {}
    for start_row, start, end_row, end, attributes in PATH_LINE.findall(source):
        assert int(end_row) == int(start_row) + 1
        assert (int(start_row), int(start), int(end)) not in drawn
        drawn[int(start_row), int(start), int(end)] = attributes
    return drawn


def operation(attributes: str) -> str:
    return re.search("<TD>(.*)</TD>", attributes)[1]


def node_width(source: str, row: int, depth: int) -> str:
    return re.search(rf"\trow{row}_depth{depth} \[.*width=([\d.]+)", source)[1]


def run(*arguments: object, path: str | None = None) -> subprocess.CompletedProcess:
    environment = dict(os.environ) if path is None else {**os.environ, "PATH": path}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@needs_dot
@pytest.mark.parametrize(
    ("num_blocks", "num_depths"), [(1, 2), (1, 5), (3, 5), (4, 2), (6, 3), (12, 4)], ids=lambda size: str(size)
)
def test_drawing_holds_the_architecture(tmp_path, num_blocks, num_depths):
    architecture = random_architecture(num_blocks, num_blocks, num_depths)
    source = draw_architecture(architecture, "found", tmp_path).source

    ends = ends_of_paths(num_depths)
    expected = {
        (block, *ends[path]): LABELS[architecture.arch_code_c[block, path]]
        for block, path in np.argwhere(architecture.arch_code_a)
    }
    assert {path: operation(attributes) for path, attributes in drawn_paths(source).items()} == expected

    active_width, inactive_width = "0.250", "0.111"
    for (row, depth), active in np.ndenumerate(architecture.node_a):
        assert node_width(source, row, depth) == (active_width if active else inactive_width)

    assert re.findall(r'"?(1/\d+)\\l', source) == [f"1/{2**depth}" for depth in range(num_depths + 1)]
    inputs, outputs = (np.flatnonzero(architecture.node_a[row]).tolist() for row in (0, -1))
    assert [int(depth) for depth in re.findall(r"image -> row0_depth(\d+)", source)] == inputs
    assert re.findall(rf"row{num_blocks}_depth(\d+) -> sum(\d+)", source) == [(str(d), str(d)) for d in outputs]
    sums = [("0", "segmentation"), *((str(d), f"sum{d - 1}") for d in range(1, max(outputs) + 1))]
    assert sorted(re.findall(r"sum(\d+) -> (\w+)", source)) == sorted(sums)
    assert source.count('label="+"') == len(outputs) - 1


@needs_dot
def test_directions_differ_in_colour_and_in_line_or_arrowhead(tmp_path):
    source = draw_search_space(3, 3, "space", tmp_path).source
    looks = {}
    for (_, start, end), attributes in drawn_paths(source).items():
        look = tuple(re.search(rf"\b{key}=\"?([#\w]+)", attributes)[1] for key in ("color", "style", "arrowhead"))
        looks.setdefault(end - start, set()).add(look)
    assert sorted(looks) == [-1, 0, 1]
    (up,), (level,), (down,) = (looks[change] for change in (-1, 0, 1))
    assert len({up[0], level[0], down[0]}) == len({up[1:], level[1:], down[1:]}) == 3


@needs_dot
@pytest.mark.parametrize(("num_blocks", "num_depths"), [(1, 2), (12, 4)])
def test_labels_do_not_overlap_where_every_path_is_active(tmp_path, num_blocks, num_depths):
    shape = (num_blocks, 3 * num_depths - 2)
    everything = Architecture(np.ones((num_blocks + 1, num_depths)), np.ones(shape), np.full(shape, 4))
    source = draw_architecture(everything, "full", tmp_path).source
    places = [
        tuple(map(float, re.search(r'lp="([-\d.]+),([-\d.]+)"', a).groups())) for a in drawn_paths(source).values()
    ]
    assert len(places) == num_blocks * (3 * num_depths - 2)
    width, height = 42, 15  # of "P3D-xy" in 10 point Helvetica, with its frame
    for (x, y), (other_x, other_y) in combinations(places, 2):
        assert abs(x - other_x) > width or abs(y - other_y) > height


@needs_dot
def test_published_numpy_file(tmp_path):
    architecture = random_architecture(7, 12, 4)
    content = {
        "node_a": architecture.node_a.astype(np.float64),
        "code_a": architecture.arch_code_a.astype(np.float64),
        "code_c": architecture.arch_code_c,
        "iter_num": 1430,
        "best_dsc": np.float64(0.61234),
    }
    torch.save(content, tmp_path / "search_code.pth")
    graph = plot_graph(
        str(tmp_path / "search_code.pth"),
        "legacy",
        str(tmp_path),
        code2in=PUBLISHED_CODE2IN,
        code2out=PUBLISHED_CODE2OUT,
    )
    assert len(drawn_paths(graph.source)) == architecture.arch_code_a.sum()
    assert "DiNTS architecture · iteration 1430 · supernet's best Dice 0.612" in graph.source
    assert (tmp_path / "legacy.gv").read_text() == graph.source
    assert (tmp_path / "legacy.png").stat().st_size > 10_000


@needs_dot
@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG\r\n\x1a\n"), ("svg", b"<?xml"), ("pdf", b"%PDF-")])
def test_formats(tmp_path, ending, magic):
    folder = tmp_path / "made" / "here"
    # A dot in the name is not an ending: Figures/arch_ram-cost-0.8.png has one.
    draw_architecture(random_architecture(0, 3, 3), "ram-cost-0.8", folder, ending)
    assert (folder / f"ram-cost-0.8.{ending}").read_bytes().startswith(magic)
    assert sorted(file.name for file in folder.iterdir()) == sorted([f"ram-cost-0.8.{ending}", "ram-cost-0.8.gv"])


@needs_dot
@pytest.mark.parametrize(
    ("info", "title"),
    [
        ({}, "DiNTS architecture"),
        (
            {"task": "Task04_Hippocampus", "factor_ram_cost": 0.8, "iter_num": 1234567, "best_dsc": 0.85},
            "DiNTS architecture · Task04_Hippocampus · RAM factor 0.8 · iteration 1234567 · supernet's best Dice 0.850",
        ),
        ({"iter_num": torch.tensor(5), "best_dsc": -1}, "DiNTS architecture · iteration 5"),
        ({"task": None, "iter_num": "many", "best_dsc": torch.ones(2), "factor_ram_cost": [1]}, "DiNTS architecture"),
        ({"task": r'a "b" \n <c>'}, r"DiNTS architecture · a \"b\" \\n <c>"),
    ],
)
def test_title_and_caption(tmp_path, info, title):
    graph = draw_architecture(
        random_architecture(0, 2, 2, info), "titled", tmp_path, "svg", caption=["1.5 M <weights>"]
    )
    assert f'label="{title}\\l"' in graph.source
    assert "1.5 M &lt;weights&gt;</text>" in (tmp_path / "titled.svg").read_text()


def test_code2in_must_be_the_files(tmp_path):
    save_architecture(tmp_path / "small.pth", random_architecture(0, 3, 3))
    for name, codes in (("code2in", PUBLISHED_CODE2IN), ("code2out", PUBLISHED_CODE2OUT)):
        with pytest.raises(UserError, match=f"{name} is .*{re.escape(str(codes))}.* 3 depths of .*small.pth"):
            plot_graph(tmp_path / "small.pth", directory=tmp_path, **{name: codes})
    assert not (tmp_path / "graph.gv").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"filename": "sub/graph"}, "'sub/graph'"),
        ({"filename": ""}, "''"),
        ({"format": "bmp"}, "'bmp'.*png, svg, pdf"),
        ({"directory": "taken"}, "taken.*cannot be written"),
    ],
)
def test_files_that_cannot_be(tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file, not a folder")
    with pytest.raises(UserError, match=message):
        draw_architecture(random_architecture(0, 2, 2), **files)
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_failing_dot_keeps_the_previous_picture(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "dot"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'no such renderer' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    (tmp_path / "graph.png").write_bytes(b"previous")
    with pytest.raises(UserError, match="no such renderer"):
        draw_architecture(random_architecture(0, 2, 2), directory=tmp_path)
    assert (tmp_path / "graph.png").read_bytes() == b"previous"


def test_without_dot_the_source_is_written(tmp_path):
    architecture = random_architecture(3, 4, 3)
    save_architecture(tmp_path / "code.pth", architecture)
    result = run("--checkpoint", tmp_path / "code.pth", "--directory", tmp_path / "out", path=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for word in ("graph.gv is written", "apt-get install graphviz", "conda install graphviz", "brew install graphviz"):
        assert word in result.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["graph.gv"]
    assert len(drawn_paths((tmp_path / "out" / "graph.gv").read_text())) == architecture.arch_code_a.sum()


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("fault", ["missing", "text", "malicious"])
def test_bad_file_ends_the_script_with_one_line(tmp_path, fault):
    file, marker = tmp_path / f"{fault}.pth", tmp_path / "it ran"
    if fault == "text":
        file.write_text("not a PyTorch file")
    elif fault == "malicious":
        torch.save({"node_a": Malicious(marker)}, file)
    result = run("--checkpoint", file, "--directory", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(file) in result.stderr
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint --search_space is required"),
        (["--checkpoint", "a.pth", "--search_space"], "not allowed with"),
        (["--checkpoint", "a.pth", "--num_blocks", "6"], "go with --search_space"),
        (["--search_space", "--num_depths", "1"], "--num_depths: 1"),
        (["--search_space", "--num_blocks", "0"], "--num_blocks: 0"),
        (["--search_space", "--format", "bmp"], "'bmp'"),
        (["--search_space", "--cost"], "--cost goes with --checkpoint"),
        (["--checkpoint", "a.pth", "--patch_size", "32", "32", "32"], "--patch_size: only with --cost"),
        (["--checkpoint", "a.pth", "--in_channels", "1"], "--in_channels: only with --cost"),
        (["--checkpoint", "a.pth", "--num_classes", "2", "--channel_mul", "1"], "--num_classes, --channel_mul: only"),
        (["--search_space", "--device", "cpu"], "--device: only with --cost"),
        (["--checkpoint", "a.pth", "--cost", "--patch_size", "32", "32"], "--patch_size: expected 3 arguments"),
        (["--checkpoint", "a.pth", "--cost", "--patch_size", "32", "32", "0"], "--patch_size: 0 is not at least 1"),
        (["--checkpoint", "a.pth", "--cost", "--in_channels", "0"], "--in_channels: 0 is not at least 1"),
        (["--checkpoint", "a.pth", "--cost", "--num_classes", "two"], "--num_classes: invalid int value"),
        (["--checkpoint", "a.pth", "--cost", "--channel_mul", "0.01"], "--channel_mul: 0.01 is not at least"),
        (["--checkpoint", "a.pth", "--cost", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
    ],
)
def test_bad_command_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


@needs_dot
def test_search_space_from_the_command_line(tmp_path):
    result = run("--search_space", "--num_blocks", 2, "--num_depths", 3, "--directory", tmp_path, "--filename", "space")
    assert result.returncode == 0, result.stderr
    drawn = drawn_paths((tmp_path / "space.gv").read_text())
    assert set(drawn) == {(block, *ends) for block in range(2) for ends in ends_of_paths(3)}
    assert not any("label" in attributes for attributes in drawn.values())
    assert (tmp_path / "space.png").read_bytes().startswith(b"\x89PNG")


def test_import_runs_nothing_and_does_not_load_monai(tmp_path):
    code = "import sys, decode_plot; assert 'monai' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_wait_for_torch():
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['decode_plot.py', '-h']; "
    code += f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=5, env=environment)
    assert result.returncode == 0, result.stderr
    for flag in (
        "--checkpoint",
        "--search_space",
        "--num_blocks",
        "--num_depths",
        "--directory",
        "--filename",
        "--format",
        "--cost",
        "--patch_size",
        "--in_channels",
        "--num_classes",
        "--channel_mul",
        "--device",
    ):
        assert flag in result.stdout


def draw_with_cost(monkeypatch, capsys, *arguments: object) -> str:
    """Run the script in this process, which has imported MONAI already, and return what it printed."""
    monkeypatch.setattr(sys, "argv", ["decode_plot.py", "--cost", *map(str, arguments)])
    decode_plot.main(decode_plot.parse_args())
    return capsys.readouterr().out


@needs_dot
def test_cost_is_printed_and_drawn(tmp_path, monkeypatch, capsys):
    architecture = random_architecture(1, 3, 3)
    save_architecture(tmp_path / "code.pth", architecture)
    files = ("--checkpoint", tmp_path / "code.pth", "--directory", tmp_path)
    settings = ("--patch_size", 16, 16, 32, "--in_channels", 2, "--num_classes", 4, "--channel_mul", 0.25)
    printed = draw_with_cost(monkeypatch, capsys, *files, *settings, "--device", "cpu")
    amounts, rest = printed.splitlines()
    assert amounts == cost.cost(architecture, 2, 4, (16, 16, 32), 0.25).lines()[0]
    assert re.fullmatch(r"at 1x2x16x16x32 \(channel_mul 0\.25\), [\d.,]+ ms a forward pass on \d+ threads? of .+", rest)
    source = (tmp_path / "graph.gv").read_text()
    assert re.findall(r'caption\d \[label="?(.*?)\\l', source) == [amounts, rest]


@needs_dot
@pytest.mark.parametrize(
    ("task", "flags", "settings"),
    [
        ("Task04_Hippocampus", [], (1, 3, (32, 32, 32), 1.0)),
        ("Task00_Phantom", ["--channel_mul", 0.5], (1, 3, (32, 32, 32), 0.5)),
        ("Task05_Prostate", ["--num_classes", 2], (2, 2, (96, 96, 32), 1.0)),
        (None, ["--patch_size", 32, 16, 32], (1, 2, (32, 16, 32), 1.0)),
        ("Task77_Own", ["--num_classes", 7], (1, 7, (96, 96, 96), 1.0)),
        (["Task05_Prostate"], ["--in_channels", 2, "--channel_mul", 0.25], (2, 2, (96, 96, 96), 0.25)),
    ],
)
def test_cost_is_of_the_files_task(tmp_path, monkeypatch, capsys, task, flags, settings):
    stale = {"parameters": 1, "gmac": 1.0}
    architecture = random_architecture(2, 3, 3, {"cost": stale} if task is None else {"cost": stale, "task": task})
    save_architecture(tmp_path / "code.pth", architecture)
    count, devices = cost.cost, []

    def count_only(*arguments, device: torch.device) -> cost.Cost:
        devices.append(device.type)
        return count(*arguments)

    monkeypatch.setattr(cost, "cost", count_only)
    printed = draw_with_cost(
        monkeypatch, capsys, "--checkpoint", tmp_path / "code.pth", "--directory", tmp_path, *flags
    )
    assert printed.splitlines() == count(architecture, *settings).lines()
    assert devices == ["cuda" if torch.cuda.is_available() else "cpu"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch_size", 30, 32, 32], "--patch_size 30 32 32 does not fit 3 depths"),
        (["--channel_mul", "inf"], "channel_mul inf.* too large"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda, but PyTorch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_cost_that_cannot_be(tmp_path, monkeypatch, capsys, flags, message):
    save_architecture(tmp_path / "code.pth", random_architecture(0, 3, 3))
    with pytest.raises(UserError, match=message):
        draw_with_cost(monkeypatch, capsys, "--checkpoint", tmp_path / "code.pth", "--directory", tmp_path, *flags)
    assert [file.name for file in tmp_path.iterdir()] == ["code.pth"]
    assert capsys.readouterr().out == ""
