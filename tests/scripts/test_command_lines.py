"""The scripts' command lines give help at once, and say what is wrong before any work, in one
line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from architectures import chain
from commands import CHECKOUT, evolve, only_error, run, search, train

import search_dints
from dints.errors import UserError
from dints.network.architecture import save_architecture
from dints.network.operations import OPERATIONS

SCRIPTS = (
    "search_dints.py",
    "evolve_dints.py",
    "train_dints.py",
    "infer_dints.py",
    "evaluate.py",
    "decode_plot.py",
    "download_msd_datasets.py",
)
SEARCH, TRAIN = "--num_epochs 4 --num_epochs_warmup 2", "--num_epochs 3"


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """Write an architecture of two blocks and three depths."""
    path = tmp_path_factory.mktemp("arch") / "search_code_1.pth"
    save_architecture(path, chain(0, 1, 0, num_depths=3))
    return path


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_all_options_and_imports_nothing_heavy(script):
    program = f"""if True:
        import runpy, sys
        try:
            sys.path[0] = "."
            runpy.run_path({script!r}, run_name="__main__")
        except SystemExit:
            print({{"torch", "monai"}} & sys.modules.keys())
    """
    done = run("-c", Path(program), "-h")
    assert done.stdout.endswith("set()\n"), done.stderr
    assert "usage:" in done.stdout and "None" not in done.stdout
    assert f"    python {script}" in (CHECKOUT / script).read_text().split('"""')[1]


def test_help_begins_with_the_options_that_are_needed_first(capsys):
    with pytest.raises(SystemExit):
        search_dints.parse_args(["-h"])
    first, second = capsys.readouterr().out.partition("most used options:")[2].split("\n\n")[:2]
    for flag in ("--root", "--output_root", "--fold", "--num_iterations", "--recipe", "--resume"):
        assert f"{flag} " in first and f"{flag} " not in second
    assert first.count("  --") < 18


# Flags after a sound command line of a stage, and what the refusal must name.
REFUSALS = [
    ("train", "--fold 3", "--fold 3 is not one of --num_folds 3"),
    ("train", "--num_folds 9", "--num_folds 9, but there are only 8 cases"),
    ("train", "--json_key validation", "no cases under 'validation'"),
    ("train", "--root {tmp} --json {phantom}/dataset.json", "16 of the 16 files"),
    ("search", "--patch_size 20 16 16", "--patch_size 20 16 16 does not fit 3 depths"),
    ("train", "--patch_size 20 16 16", "--patch_size 20 16 16 does not fit 3 depths"),
    ("train", "--resume must", "--resume must"),
    ("train", "--precision fp16", "--precision fp16 needs a GPU"),
    ("search", "--loss dice", "--loss 'dice' is none of dice_ce"),
    ("train", "--loss dice", "--loss 'dice' is none of dice_ce"),
    ("search", "--operations conv_3x3x3 conv_9", f"does not have ({', '.join(OPERATIONS)})"),
    ("search", "--operations conv_3x3x3 conv_3x3x3", "name each operation once"),
    (
        "search",
        "--keep_finest --max_ram_ratio 0.05",
        "--max_ram_ratio 0.05 is too small for 2 blocks and 3 depths with --keep_finest: give at",
    ),
    (
        "search",
        "--num_folds 2 --json {tmp}/two.json",
        "--fold 0 of --num_folds 2 leaves 1 of 2 cases to train on, and 2 are needed: give --fold",
    ),
    ("evolve", "--memory_mib 0.01", "--memory_mib 0.01 is too small: at the smallest"),
    ("evolve", "--arch_ckpt {tmp}/none.pth", "none.pth does not exist"),
]


@pytest.fixture
def given(phantom, code, tmp_path) -> Callable[..., None]:
    """Return a function that gives a stage a sound command line, with further flags."""

    def give(stage: str, flags: str) -> None:
        more = flags.format(tmp=tmp_path, phantom=phantom)
        if stage == "train":
            train(phantom, tmp_path / "run", code, TRAIN, more)
        elif stage == "search":
            search(phantom, tmp_path / "run", SEARCH, more)
        else:
            evolve(phantom, tmp_path / "run", "--candidates 4", more)

    return give


@pytest.mark.fault("fold out of range")
@pytest.mark.parametrize(("stage", "flags", "message"), REFUSALS)
def test_bad_input_is_refused_before_a_case_is_read(
    stage, flags, message, given, phantom, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("dints.data.cache.Cache.hold", lambda *_: pytest.fail("data was read"))
    description = json.loads((phantom / "dataset.json").read_text())
    two = {**description, "training": description["training"][:2]}
    (tmp_path / "two.json").write_text(json.dumps(two))
    with pytest.raises((UserError, SystemExit)) as refusal:
        given(stage, flags)
    error = capsys.readouterr().err.splitlines()[-1:]
    said = str(refusal.value) if refusal.type is UserError else error[0]
    assert message in said and "\n" not in said
    assert not list(tmp_path.glob("run/*.pth"))


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("search", "", None),
        ("evolve", "", None),
        ("train", "", None),
        ("search", "--num_folds 9", "--num_folds 9, but there are only 8 cases"),
        ("evolve", "--memory_mib 0.01", "--memory_mib 0.01 is too small"),
        ("train", "--spacing 0.001 0.001 0.001", "is not fit for training"),
    ],
)
def test_check_judges_the_whole_command_and_writes_nothing(
    stage, flags, message, given, tmp_path, capsys
):
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        given(stage, f"{flags} --check")
    assert "Task00_Phantom: 8 cases" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "search_dints.py --root none --output_root {tmp}/run",
        "evolve_dints.py --root none --output_root {tmp}/run",
        "infer_dints.py --checkpoint none.pth --output_root {tmp}/run --input none.nii.gz --device "
        "cpu",
        "evaluate.py --prediction none --reference none --output_root {tmp}/run",
        "decode_plot.py --checkpoint none.pth --directory {tmp}/run",
    ],
)
def test_an_error_of_a_process_is_one_line(command, tmp_path):
    done = run(command.format(tmp=tmp_path))
    assert "none" in only_error(done) and done.stdout == ""
