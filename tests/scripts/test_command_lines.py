"""The scripts' command lines give help at once, and tell what is wrong before any work, in one line."""

from __future__ import annotations

import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from architectures import chain
from commands import CHECKOUT, only_error, run, search, train

from dints.errors import UserError
from dints.network.architecture import save_architecture
from dints.network.operations import OPERATIONS

SCRIPTS = (
    "search_dints.py",
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
def test_help_is_complete_and_imports_nothing_heavy(script):
    program = """if True:
        import runpy, sys
        try:
            sys.path[0] = "."
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit:
            print({"torch", "monai", "scipy"} & sys.modules.keys())
    """
    done = run("-c", Path(program.replace("sys.argv[0]", repr(script))), "-h")
    assert done.stdout.endswith("set()\n"), done.stderr
    assert "usage:" in done.stdout and "None" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_begins_with_its_command_and_runs_nothing_when_it_is_imported(script):
    text = (CHECKOUT / script).read_text()
    assert text.startswith('"""') and f"    python {script}" in text.split('"""')[1]
    assert text.count("if __name__") == 1 and text.rstrip().endswith("exit_on_user_error(main, parse_args())")
    ignores = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["per-file-ignores"]
    excused = [pattern for pattern, rules in ignores.items() if "E402" in rules and fnmatch(script, pattern)]
    assert not excused and "E402" not in text  # imports stand at the top


# Flags after a sound command line of a stage, and what the refusal must name.
REFUSALS = {
    "fold": ("--fold 3", "--fold 3 is not one of --num_folds 3"),
    "negative fold": ("--fold -1", "argument --fold: -1"),
    "more folds than cases": ("--num_folds 9", "--num_folds 9, but there are only 8 cases"),
    "list of cases": ("--json_key validation", "no cases under 'validation'"),
    "missing files": ("--root {tmp} --json {phantom}/dataset.json", "16 of the 16 files"),
    "window": ("--intensity_range 5 5", "--intensity_range 5 5"),
    "patch size": ("--patch_size 20 16 16", "--patch_size 20 16 16 does not fit 3 depths"),
    "nothing to continue": ("--resume must", "--resume must"),
    "fp16 on a CPU": ("--precision fp16", "--precision fp16 needs a GPU"),
    "epochs": ("--num_epochs 0", "argument --num_epochs: 0 is not at least 1"),
    "milestones": ("--learning_rate_milestones 0.8 0.2", "--learning_rate_milestones must rise"),
    "unknown flag": ("--epochs 3", "--epochs"),
}
OF_SEARCH = {
    "warm-up": ("--num_epochs_warmup 4", "--num_epochs_warmup 4 must be below --num_epochs 4"),
    "unknown operation": (
        "--operations conv_3x3x3 conv_9",
        f"--operations names the operation 'conv_9', which this version does not have ({', '.join(OPERATIONS)})",
    ),
    "operation twice": ("--operations conv_3x3x3 conv_3x3x3", "name each operation once"),
    "no room for the finest path": (
        "--keep_finest --max_ram_ratio 0.05",
        "--max_ram_ratio 0.05 is too small for 2 blocks and 3 depths with --keep_finest: give at least",
    ),
    "weights of the loss": ("--loss_weights 1 1 -1 1", "argument --loss_weights: -1 is not at least 0"),
    "ramp": ("--ramp 0", "argument --ramp: 0 is not above 0"),
    "one candidate": ("--candidates 1 --memory_mib 9", "--candidates 1 has nothing to compete with"),
    "candidates of any memory": ("--candidates 4 --factor_ram_cost 0", "--candidates needs --memory_mib"),
    "no search and no candidates": ("--proposals random", "--proposals random needs --candidates"),
    "unknown proposals": ("--proposals best", "argument --proposals: invalid choice: 'best'"),
    "no room for a candidate": ("--candidates 4 --memory_mib 0.01", "--memory_mib 0.01 is too small: at the smallest"),
    "one training case": (
        "--num_folds 2 --json {tmp}/two.json",
        "--fold 0 of --num_folds 2 leaves 1 of 2 cases to train on, and 2 are needed: give --fold all",
    ),
}
FAULTS = {"fold", "negative fold", "more folds than cases"}
CASES = [
    pytest.param(stage, *row, id=f"{stage}: {name}", marks=[pytest.mark.fault("fold out of range")] * (name in FAULTS))
    for stage, table in (("search", REFUSALS | OF_SEARCH), ("train", REFUSALS))
    for name, row in table.items()
]


@pytest.mark.parametrize(("stage", "flags", "message"), CASES)
def test_bad_input_is_refused_before_a_case_is_read(
    stage, flags, message, phantom, code, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("dints.data.cache.Cache.hold", lambda *_: pytest.fail("data was read"))
    description = json.loads((phantom / "dataset.json").read_text())
    (tmp_path / "two.json").write_text(json.dumps({**description, "training": description["training"][:2]}))
    flags = flags.format(tmp=tmp_path, phantom=phantom)
    with pytest.raises((UserError, SystemExit)) as refusal:
        if stage == "search":
            search(phantom, tmp_path / "run", SEARCH, flags)
        else:
            train(phantom, tmp_path / "run", code, TRAIN, flags)
    said = str(refusal.value) if refusal.type is UserError else capsys.readouterr().err.splitlines()[-1]
    assert message in said and "\n" not in said
    assert not list(tmp_path.glob("run/*.pth"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", None),
        ("--patch_size 20 16 16", "--patch_size 20 16 16 does not fit 3 depths"),
        ("--num_folds 9", "--num_folds 9, but there are only 8 cases"),
        ("--spacing 0.001 0.001 0.001", "is not fit for training"),
    ],
)
@pytest.mark.parametrize("stage", ["search", "train"])
def test_check_judges_the_whole_command_and_writes_nothing(stage, flags, message, phantom, code, tmp_path, capsys):
    def check():
        if stage == "search":
            search(phantom, tmp_path / "run", SEARCH, flags, "--check")
        else:
            train(phantom, tmp_path / "run", code, TRAIN, flags, "--check")

    if message is None:
        check()
    else:
        with pytest.raises(UserError, match=message):
            check()
    assert "Task00_Phantom: 8 cases" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "search_dints.py --root none --output_root {tmp}/run",
        "train_dints.py --root none --output_root {tmp}/run --arch_ckpt none.pth",
        "infer_dints.py --checkpoint none.pth --output_root {tmp}/run --input none.nii.gz --device cpu",
        "evaluate.py --prediction none --reference none --output_root {tmp}/run",
        "decode_plot.py --checkpoint none.pth --directory {tmp}/run",
    ],
)
def test_an_error_of_a_process_is_one_line(command, tmp_path):
    done = run(command.format(tmp=tmp_path))
    assert "none" in only_error(done) and done.stdout == ""
