"""decode_plot.py draws files and the search space, prints what a network costs, and says in a line
what is wrong.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import random_architecture

import decode_plot
from decode_plot import plot_graph
from dints.errors import UserError
from dints.network import cost
from dints.network.architecture import save_architecture
from dints.network.drawing import draw_architecture, draw_search_space

SCRIPT = Path(decode_plot.__file__)
PUBLISHED_CODE2IN = [0, 1, 0, 1, 2, 1, 2, 3, 2, 3]
PUBLISHED_CODE2OUT = [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]

needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None, reason="graphviz's program 'dot' is not installed"
)


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code that can import the script, in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment, cwd=folder
    )


def main(monkeypatch, *arguments: object) -> None:
    """Run the script in this process, which has imported PyTorch and MONAI already."""
    monkeypatch.setattr(sys, "argv", ["decode_plot.py", *map(str, arguments)])
    decode_plot.main(decode_plot.parse_args())


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
def test_a_search_space_is_drawn_from_the_command_line(tmp_path):
    result = run(
        "--search_space",
        "--num_blocks",
        2,
        "--num_depths",
        3,
        "--directory",
        tmp_path,
        "--filename",
        "space",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "space.gv").read_text() == draw_search_space(2, 3, "same", tmp_path).source
    assert (tmp_path / "space.png").read_bytes().startswith(b"\x89PNG")


def assert_told_in_a_line(result: subprocess.CompletedProcess, part: str) -> None:
    assert result.returncode == 1
    assert (
        result.stderr.startswith("error: ")
        and result.stderr.count("\n") == 1
        and part in result.stderr
    )


def test_without_dot_one_line_says_so(tmp_path):
    save_architecture(tmp_path / "code.pth", random_architecture(3, 4, 3))
    result = run(
        "--checkpoint", tmp_path / "code.pth", "--directory", tmp_path / "out", PATH=str(tmp_path)
    )
    assert_told_in_a_line(result, "graph.gv is written, but drawing")


@pytest.mark.fault("truncated, empty or foreign file")
@pytest.mark.parametrize(
    ("write", "message"), [(None, "does not exist"), ("no PyTorch file", "is damaged or not a")]
)
def test_a_bad_file_is_named_before_anything_is_written(tmp_path, monkeypatch, write, message):
    if write is not None:
        (tmp_path / "code.pth").write_text(write)
    with pytest.raises(UserError, match=f"{tmp_path}/code.pth {message}"):
        main(monkeypatch, "--checkpoint", tmp_path / "code.pth", "--directory", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "give one of --checkpoint and --search_space"),
        ("--checkpoint a.pth --search_space", "give one of --checkpoint and --search_space"),
        ("--checkpoint a.pth --num_blocks 6", "go with --search_space"),
        (
            "--checkpoint a.pth --num_classes 2 --channel_mul 1",
            "--num_classes, --channel_mul: only",
        ),
        ("--checkpoint a.pth --cost --patch_size 32 32 0", "--patch_size: 0 is not at least 1"),
    ],
)
def test_a_bad_command_line_is_refused(monkeypatch, capsys, line, message):
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, *line.split())
    assert message in capsys.readouterr().err


def test_import_runs_nothing_and_does_not_load_monai(tmp_path):
    result = python("import sys, decode_plot; assert 'monai' not in sys.modules", tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag_and_does_not_wait_for_torch(tmp_path):
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['decode_plot.py', '-h']; "
    result = python(
        f"{code}import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')", tmp_path
    )
    assert result.returncode == 0, result.stderr
    flags = (
        "checkpoint search_space num_blocks num_depths directory filename format cost "
        "patch_size in_channels"
    )
    for flag in (*flags.split(), "num_classes", "channel_mul", "device"):
        assert f"--{flag}" in result.stdout


@needs_dot
def test_cost_is_printed_and_drawn(tmp_path, monkeypatch, capsys):
    architecture = random_architecture(1, 3, 3)
    save_architecture(tmp_path / "code.pth", architecture)
    files = ("--checkpoint", tmp_path / "code.pth", "--directory", tmp_path)
    settings = (
        "--patch_size 16 16 32 --in_channels 2 --num_classes 4 --channel_mul 0.25 --device cpu"
    )
    main(monkeypatch, "--cost", *files, *settings.split())
    amounts, rest = capsys.readouterr().out.splitlines()
    assert amounts == cost.cost(architecture, 2, 4, (16, 16, 32), 0.25).lines()[0]
    assert re.fullmatch(
        r"at 1x2x16x16x32 \(channel_mul 0\.25\), [\d.,]+ ms a forward pass on \d+ "
        r"threads? of .+",
        rest,
    )
    assert re.findall(r'caption\d \[label="?(.*?)\\l', (tmp_path / "graph.gv").read_text()) == [
        amounts,
        rest,
    ]


@needs_dot
@pytest.mark.parametrize(
    ("task", "flags", "settings"),
    [
        ("Task04_Hippocampus", "", (1, 3, (32, 32, 32), 1.0)),
        ("Task05_Prostate", "--num_classes 2", (2, 2, (96, 96, 32), 1.0)),
        (None, "--patch_size 32 16 32 --channel_mul 0.5", (1, 2, (32, 16, 32), 0.5)),
    ],
)
def test_cost_is_of_the_files_task(tmp_path, monkeypatch, task, flags, settings):
    stale = {"cost": {"parameters": 1, "gmac": 1.0}}
    architecture = random_architecture(2, 3, 3, stale if task is None else {**stale, "task": task})
    save_architecture(tmp_path / "code.pth", architecture)
    asked, answer = [], cost.Cost(1060, 1.0, 1.0, (1, 1, 8, 8, 8), 1.0)

    def note(found, *given, device: torch.device) -> cost.Cost:
        asked.append((found.codes(), given, device.type))
        return answer

    monkeypatch.setattr(cost, "cost", note)
    main(
        monkeypatch,
        "--cost",
        "--checkpoint",
        tmp_path / "code.pth",
        "--directory",
        tmp_path,
        *flags.split(),
    )
    assert asked == [
        (architecture.codes(), settings, "cuda" if torch.cuda.is_available() else "cpu")
    ]


def test_cost_that_cannot_be_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    save_architecture(tmp_path / "code.pth", random_architecture(0, 3, 3))
    flags = ["--cost", "--checkpoint", tmp_path / "code.pth", "--directory", tmp_path]
    with pytest.raises(UserError, match="--patch_size 30 32 32 does not fit 3 depths"):
        main(monkeypatch, *flags, "--patch_size", 30, 32, 32)
    assert [file.name for file in tmp_path.iterdir()] == ["code.pth"]
    assert capsys.readouterr().out == ""
