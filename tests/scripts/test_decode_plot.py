"""decode_plot.py draws files and the search space, prints costs, and names a fault in a line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import random_architecture
from commands import only_error, run, words

import decode_plot
from decode_plot import plot_graph
from dints.errors import UserError
from dints.network import cost
from dints.network.architecture import save_architecture
from dints.network.drawing import draw_architecture, draw_search_space

PUBLISHED_CODE2IN = [0, 1, 0, 1, 2, 1, 2, 3, 2, 3]
PUBLISHED_CODE2OUT = [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]

needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None, reason="graphviz's program 'dot' is not installed"
)


def main(folder: Path, *flags: object) -> None:
    """Run the script in this process, which has imported PyTorch and MONAI already."""
    decode_plot.main(decode_plot.parse_args(words(*flags, "--directory", folder)))


@needs_dot
def test_plot_graph_draws_a_published_file_for_published_callers(tmp_path):
    architecture = random_architecture(7, 12, 4, {"iter_num": 1430, "best_dsc": 0.61234})
    content = {
        "node_a": architecture.node_a.astype(np.float64),
        "code_a": architecture.arch_code_a.astype(np.float64),
        "code_c": architecture.arch_code_c,
        "iter_num": 1430,
        "best_dsc": np.float64(0.61234),
    }
    file, codes = (
        str(tmp_path / "search_code.pth"),
        {"code2in": PUBLISHED_CODE2IN, "code2out": PUBLISHED_CODE2OUT},
    )
    torch.save(content, file)
    graph = plot_graph(file, "legacy", str(tmp_path), **codes)
    assert graph.source == draw_architecture(architecture, "ours", tmp_path).source
    assert "DiNTS architecture · iteration 1430 · supernet's best Dice 0.612" in graph.source
    assert (tmp_path / "legacy.gv").read_text() == graph.source
    assert (tmp_path / "legacy.png").stat().st_size > 10_000


def test_code2in_and_code2out_must_be_the_files(tmp_path):
    save_architecture(tmp_path / "small.pth", random_architecture(0, 3, 3))
    for name, codes in (("code2in", PUBLISHED_CODE2IN), ("code2out", PUBLISHED_CODE2OUT)):
        with pytest.raises(
            UserError, match=f"{name} is .*{re.escape(str(codes))}.* 3 depths of .*small.pth"
        ):
            plot_graph(tmp_path / "small.pth", directory=tmp_path, **{name: codes})
    assert not (tmp_path / "graph.gv").exists()


@needs_dot
def test_a_search_space_is_drawn(tmp_path):
    main(tmp_path, "--search_space --num_blocks 2 --num_depths 3 --filename space")
    assert (tmp_path / "space.gv").read_text() == draw_search_space(2, 3, "same", tmp_path).source
    assert (tmp_path / "space.png").read_bytes().startswith(b"\x89PNG")


def test_without_dot_one_line_says_so(tmp_path, monkeypatch):
    save_architecture(tmp_path / "code.pth", random_architecture(3, 4, 3))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="graph.gv is written, but drawing"):
        main(tmp_path / "out", "--checkpoint", tmp_path / "code.pth")


@pytest.mark.slow
@pytest.mark.fault("truncated, empty or foreign file")
def test_a_bad_file_is_named_before_anything_is_written(tmp_path):
    """By a process of its own, which imports no MONAI for a drawing."""
    (tmp_path / "code.pth").write_text("no PyTorch file")
    code = "import runpy, sys; sys.modules['monai'] = None; "
    code += f"runpy.run_path({decode_plot.__file__!r}, run_name='__main__')"
    flags = ["--checkpoint", tmp_path / "code.pth", "--directory", tmp_path / "out"]
    said = only_error(run("-c", Path(code), *flags))
    assert f"{tmp_path}/code.pth is damaged or not a" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "give one of --checkpoint and --search_space"),
        ("--checkpoint a.pth --num_blocks 6", "go with --search_space"),
        ("--checkpoint a.pth --num_classes 2", "--num_classes: only"),
    ],
)
def test_a_bad_command_line_is_refused(capsys, line, message):
    with pytest.raises(SystemExit, match="2"):
        decode_plot.parse_args(line.split())
    assert message in capsys.readouterr().err


@needs_dot
def test_cost_is_printed_and_drawn(tmp_path, capsys):
    architecture = random_architecture(1, 2, 2)
    save_architecture(tmp_path / "code.pth", architecture)
    settings = "--patch_size 16 16 32 --in_channels 2 --num_classes 4 --channel_mul 0.25"
    main(tmp_path, "--cost --device cpu --checkpoint", tmp_path / "code.pth", settings)
    amounts, rest = capsys.readouterr().out.splitlines()
    assert amounts == cost.cost(architecture, 2, 4, (16, 16, 32), 0.25).lines()[0]
    says = r"at 1x2x16x16x32 \(channel_mul 0\.25\), [\d.,]+ ms a forward pass on \d+ threads? of .+"
    assert re.fullmatch(says, rest)
    drawn = re.findall(r'caption\d \[label="?(.*?)\\l', (tmp_path / "graph.gv").read_text())
    assert drawn == [amounts, rest]


@needs_dot
@pytest.mark.parametrize(
    ("task", "flags", "settings"),
    [
        ("Task05_Prostate", "--num_classes 3", (2, 3, (96, 96, 32), 1.0)),
        (None, "--patch_size 32 16 32 --channel_mul 0.5", (1, 2, (32, 16, 32), 0.5)),
    ],
)
def test_cost_is_of_the_files_task(tmp_path, monkeypatch, task, flags, settings):
    architecture = random_architecture(2, 3, 3, {} if task is None else {"task": task})
    save_architecture(tmp_path / "code.pth", architecture)
    asked = []

    def note(found, *given, device: torch.device) -> cost.Cost:
        asked.append((found.codes(), given))
        return cost.Cost(1060, 1.0, 1.0, (1, 1, 8, 8, 8), 1.0)

    monkeypatch.setattr(cost, "cost", note)
    main(tmp_path, "--cost --checkpoint", tmp_path / "code.pth", flags)
    assert asked == [(architecture.codes(), settings)]


def test_cost_that_cannot_be_is_refused_before_anything_is_drawn(tmp_path, capsys):
    save_architecture(tmp_path / "code.pth", random_architecture(0, 3, 3))
    flags = ["--cost --patch_size 30 32 32 --checkpoint", tmp_path / "code.pth"]
    with pytest.raises(UserError, match="--patch_size 30 32 32 does not fit 3 depths"):
        main(tmp_path, *flags)
    assert [file.name for file in tmp_path.iterdir()] == ["code.pth"]
    assert capsys.readouterr().out == ""
