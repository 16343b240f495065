"""The scripts need nothing of POSIX for one process; what does need it says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CHECKOUT, SPACE, TINY, only_error, run

from dints import system

RUN = CHECKOUT / "tests/without_posix.py"


@pytest.mark.slow
def test_every_stage_and_tool_runs_without_posix(phantom, tmp_path):
    """In one process, one after another: importing takes longest."""
    data = f"--root {phantom} --num_folds 3 {TINY}"
    found, model = tmp_path / "search/search_code_6.pth", tmp_path / "train/best_metric_model.pth"
    masks, references = tmp_path / "masks", phantom / "labelsTr"
    commands = (
        "download_msd_datasets.py -h",
        f"decode_plot.py --search_space --directory {tmp_path}",
        f"search_dints.py {data} {SPACE} --output_root {tmp_path}/search --num_epochs 2 "
        "--num_epochs_warmup 1",
        f"decode_plot.py --checkpoint {found} --directory {tmp_path} --filename found",
        f"train_dints.py {data} --output_root {tmp_path}/train --arch_ckpt {found} --num_epochs 1 "
        "--cache disk",
        f"infer_dints.py --checkpoint {model} --root {phantom} --output_root {masks} --device cpu "
        "--precision fp32",
        f"evaluate.py --prediction {masks} --reference {references} --predicted_only --output_root "
        f"{tmp_path}/scores",
    )
    done = run(RUN, " then ".join(commands))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    made = ("graph.gv", "found.gv", "scores/summary.json", "masks/scores.csv", "dints_cache")
    assert {name for name in made if (tmp_path / name).exists()} == {*made}
    assert "Fetch tasks of the Medical" in done.stdout


def test_the_launcher_says_that_it_needs_posix(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, signal\nprint(hasattr(os, 'fork'), hasattr(signal, 'SIGHUP'))"
    )
    done = run(RUN, tmp_path / "script.py", "then launch/torchrun.py")
    assert "launch/torchrun.py needs Linux or macOS" in only_error(done)
    assert done.stdout == "False False\n"  # what stands in for Windows does take things away


def test_a_user_without_a_name_is_given_one():
    """As with docker run --user: MONAI, when it is imported, ends with a KeyError where there is
    none.
    """
    code = (
        "import getpass, pwd\ndef none(_): raise KeyError\npwd.getpwuid = none\nimport "
        "dints\nprint(getpass.getuser())"
    )
    environment = {
        key: os.environ[key] for key in os.environ.keys() - {"LOGNAME", "USER", "LNAME", "USERNAME"}
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "user\n", done.stderr


def test_nothing_else_asks_for_what_windows_lacks():
    """So that one place knows the difference; the launcher needs POSIX, and says so before."""
    names = (
        "fcntl",
        "msvcrt",
        "signal.SIGHUP",
        "signal.SIGUSR",
        "signal.SIGCHLD",
        "os.fork",
        "sysconf",
        "statvfs",
    )
    names += ("sched_getaffinity", "O_DIRECTORY", "register_at_fork", "killpg", "getuid")
    names += ("import resource", "import pwd")
    own = [path for path in CHECKOUT.glob("*.py")] + sorted((CHECKOUT / "dints").rglob("*.py"))
    found = [
        (path.name, name)
        for path in [*own, CHECKOUT / "launch/folds.py"]
        for name in names
        if path != Path(system.__file__) and name in path.read_text(encoding="utf-8")
    ]
    assert found == []
