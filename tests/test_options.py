"""What the parsed options mean."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import decode_plot
import download_msd_datasets
import evaluate
import infer_dints
import search_dints
import train_dints
from dints import options
from dints.evolution import proposals
from dints.data.augmentation import CHAINS, chosen
from dints.network import architecture
from dints.recipes import RECIPES
from dints.running.curves import KINDS

TRAIN = ["--arch_ckpt", "arch.pth", "--root", "data", "--output_root", "run"]
SEARCH = TRAIN[2:]


@pytest.mark.parametrize(
    ("steps", "iterations", "expected"),
    [
        (10, 500, (50, 25, 5)),
        (5, 500, (100, 50, 10)),
        (10, 10, (1, 0, 1)),
        (7, 100, (14, 7, 1)),
        (1000, 500, (1, 0, 1)),
    ],
)
def test_a_budget_in_iterations_scales_every_number_of_epochs(steps, iterations, expected):
    args = argparse.Namespace(
        num_iterations=iterations, num_epochs=1000, num_epochs_warmup=500, num_epochs_per_validation=100
    )
    scaled = options.scaled_to_iterations(args, steps)
    assert (scaled.num_epochs, scaled.num_epochs_warmup, scaled.num_epochs_per_validation) == expected
    assert args.num_epochs == 1000  # what the run is known by
    args.num_iterations = None
    assert options.scaled_to_iterations(args, steps) is args


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("script", "flags", "names"),
    [
        (search_dints, SEARCH, {"use_downsample", "flip_axes"}),
        (train_dints, TRAIN, {"flip_axes", "learning_rate_schedule", "average_decay"}),
    ],
    ids=["search", "train"],
)
def test_a_recipe_fills_what_is_not_given(script, flags, names, recipe):
    values = vars(script.parse_args([*flags, "--recipe", recipe]))
    assert {name: values[name] for name in names} == {name: RECIPES[recipe][name] for name in names}
    given = vars(script.parse_args([*flags, "--recipe", recipe, "--flip_axes", "X", "Z"]))
    assert given == {**values, "flip_axes": ["X", "Z"]}


def test_the_stages_use_all_of_a_recipe_and_recipes_have_the_same_options():
    used = {*search_dints.OF_RECIPES, *train_dints.OF_RECIPES}
    assert all(values.keys() == used for values in RECIPES.values())


def test_all_chains_of_augmentations_may_be_chosen():
    assert (*CHAINS, "auto") == options.AUGMENTATIONS


def test_all_kinds_of_proposals_may_be_chosen():
    assert search_dints.PROPOSALS == proposals.KINDS and {*KINDS} == {*proposals.KINDS, "mutant"}


def test_long_retrainings_by_the_recommended_recipe_have_nnunets_augmentation():
    args = train_dints.parse_args([*TRAIN, "--recipe", "recommended"])
    assert args.augmentation == "auto"
    lengths = ((5000, 60.0), (4999, 60.0), (5000, 59.9), (10**6, 1e6))
    assert [chosen("auto", *length) for length in lengths] == ["nnunet", "published", "published", "nnunet"]
    assert [chosen(name, *length) for name in CHAINS for length in lengths[:2]] == ["published"] * 2 + ["nnunet"] * 2
    assert search_dints.parse_args([*SEARCH, "--recipe", "recommended"]).augmentation == "published"
    assert (
        train_dints.parse_args([*TRAIN, "--recipe", "recommended", "--augmentation", "nnunet"]).augmentation == "nnunet"
    )


def test_learning_rates_grow_with_the_processes_by_the_published_recipe_alone():
    for script, flags in ((search_dints, SEARCH), (train_dints, TRAIN)):
        factors = {
            recipe: options.learning_rate_factor(script.parse_args([*flags, "--recipe", recipe]), 8)
            for recipe in RECIPES
        }
        assert factors == {"published": 8, "recommended": 1}


def test_runs_from_before_there_were_recipes_go_on():
    """Their states lack these options: by the published recipe they are as if none had been given."""
    for script, flags in ((search_dints, SEARCH), (train_dints, TRAIN)):
        course = options.course(script.parse_args(flags))
        since = ("recipe", "augmentation", "ram_loss", "loss_weights", "ramp", *RECIPES["published"])
        assert all(course.get(name) is None for name in since)
        assert not [name for name in course if "candidate" in name] and "memory_mib" not in course
        assert course == options.course(script.parse_args([*flags, "--flip_axes", "all", "--recipe", "published"]))
        assert options.course(script.parse_args([*flags, "--recipe", "recommended"]))["flip_axes"] == ["auto"]


@pytest.mark.parametrize("flag", ["--checkpoint_activations", "--cuda_graphs"])
def test_a_run_may_go_on_in_another_manner(flag):
    for script, flags in ((search_dints, SEARCH), (train_dints, TRAIN)):
        courses = [options.course(script.parse_args([*flags, *more])) for more in ([], [flag])]
        assert courses[0] == courses[1]


def test_a_run_from_before_the_finest_path_could_be_kept_goes_on():
    courses = [options.course(search_dints.parse_args([*SEARCH, *more])) for more in ([], ["--keep_finest"])]
    assert [course["keep_finest"] for course in courses] == [None, True]  # None: as if it were not there
    for recipe in RECIPES:
        assert not search_dints.parse_args([*SEARCH, "--recipe", recipe]).keep_finest


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--flip_axes auto X", "--flip_axes auto X: give axes, or one of auto, all and none"),
        ("--flip_axes none all", "--flip_axes none all: give axes"),
        ("--flip_axes left", "invalid choice: 'left'"),
        ("--augmentation none", "invalid choice: 'none'"),
        ("--recipe nnunet", "invalid choice: 'nnunet'"),
        ("--average_decay 1", "1 is not at least 0 and at most 0.9999"),
        ("--average_decay -0.1", "-0.1 is not at least 0"),
        ("--learning_rate_schedule cosine", "invalid choice: 'cosine'"),
        ("--use_downsample maybe", "invalid choice: 'maybe'"),
    ],
)
def test_values_that_no_recipe_takes(flags, complaint, capsys):
    with pytest.raises(SystemExit):
        train_dints.parse_args([*TRAIN, *flags.split()])
    assert complaint in capsys.readouterr().err


def test_a_run_by_the_published_recipe_is_told_of_the_other():
    args = train_dints.parse_args(TRAIN)
    line = options.recipe_line(args, *train_dints.OF_RECIPES)
    assert "--recipe recommended trains with --flip_axes auto, --learning_rate_schedule polynomial" in line
    args = train_dints.parse_args([*TRAIN, "--recipe", "recommended"])
    assert options.recipe_line(args, *train_dints.OF_RECIPES) == "recipe: recommended"


SCRIPTS = {
    "search": (search_dints, SEARCH),
    "train": (train_dints, TRAIN),
    "infer": (infer_dints, ["--checkpoint", "model.pth", "--input", "images"]),
    "evaluate": (evaluate, ["--prediction", "a", "--reference", "b"]),
    "decode_plot": (decode_plot, ["--checkpoint", "arch.pth"]),
    "download": (download_msd_datasets, []),
}
UNKNOWN = "unknown option"
MISTAKES = [
    ("search", "--spacng 1 1 1", f"{UNKNOWN} --spacng: did you mean --spacing? -h lists all"),
    ("search", "--lr=3", f"{UNKNOWN} --lr: did you mean --learning_rate? -h lists all"),
    ("search", "-fold 3", f"{UNKNOWN} -fold: did you mean --fold? -h lists all"),
    ("train", "--batch_size 3", f"{UNKNOWN} --batch_size: did you mean --num_images_per_batch? -h lists all"),
    ("train", "--xyz 3 --local-rnk 3", f"{UNKNOWN} --xyz: --local-rnk: -h lists all"),
    ("train", "--num_epochs ten", "argument --num_epochs: invalid int value: 'ten' (-h lists all options)"),
    ("train", "--fold first", "argument --fold: 'first' is neither a fold's number, from 0 on, nor all"),
    ("search", "--num_blocks 999999", "argument --num_blocks: 999999 is not at least 1 and at most 1000"),
    ("decode_plot", "--num_depths 17", "argument --num_depths: 17 is not at least 2 and at most 16"),
    ("decode_plot", "--filename graph.png", "--filename graph.png: give it without its ending, and that as --format"),
    ("train", "--root= ", "argument --root: an empty path: is a variable in the command not set?"),
    ("train", "--root ~no_such_user_0/data", "argument --root: ~no_such_user_0/data: there is no such user"),
    ("infer", "--batch_size 3", f"{UNKNOWN} --batch_size: did you mean --num_sw_batch_size? -h lists all"),
    ("infer", "--inputs a", f"{UNKNOWN} --inputs: did you mean --input? -h lists all"),
    (
        "infer",
        "--save_probabilities yes please",
        "yes please belongs to no option: name it, and quote values that have",
    ),
    ("evaluate", "--out x", f"{UNKNOWN} --out: did you mean --output_root? -h lists all"),
    ("decode_plot", "--filname x", f"{UNKNOWN} --filname: did you mean --filename? -h lists all"),
    ("decode_plot", "--num_blocks 3", "--num_blocks and --num_depths go with --search_space"),
    ("download", "--task Task09_Spleen", f"{UNKNOWN} --task: did you mean --msd_task? -h lists all"),
]


@pytest.mark.parametrize(("script", "flags", "message"), MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line(script, flags, message, capsys, monkeypatch):
    module, sound = SCRIPTS[script]
    monkeypatch.setattr("sys.argv", [script, *sound, *flags.split()])
    with pytest.raises(SystemExit) as left:
        module.parse_args()
    said = capsys.readouterr()
    assert left.value.code == 2 and said.err.startswith(f"error: {message}") and said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize(("script", "missing"), [("search", "--root"), ("train", "--arch_ckpt"), ("infer", "--input")])
def test_a_required_option_that_is_misspelt_or_missing(script, missing, capsys):
    """Of a misspelt one it is said how it is written, not that it is missing."""
    module, sound = SCRIPTS[script]
    at = sound.index(missing)
    for flags, says in (
        ([*sound[:at], *sound[at + 2 :]], f"{missing}"),
        (
            [*sound[:at], f"{missing}x", *sound[at + 1 :]],
            f"unknown option {missing}x: did you mean {missing}? -h lists",
        ),
    ):
        with pytest.raises(SystemExit) as left:
            module.parse_args(flags)
        said = capsys.readouterr().err
        assert left.value.code == 2 and says in said and said.count("\n") == 1


def test_one_process_of_several_tells_and_help_is_given_beside_a_mistake(capsys, monkeypatch):
    with pytest.raises(SystemExit) as left:
        train_dints.parse_args(["--spacng", "-h"])
    assert left.value.code == 0 and "usage:" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        train_dints.parse_args(["--spacng"])
    assert left.value.code == 2 and capsys.readouterr().err == ""


def test_a_negative_number_may_be_written_in_any_form():
    args = train_dints.parse_args([*TRAIN, "--intensity_range", "-1e3", "-.5"])
    assert args.intensity_range == [-1000, -0.5]


def test_the_limits_of_a_space_are_those_of_architectures():
    assert (options.MAX_BLOCKS, options.MAX_DEPTHS) == (architecture._MAX_BLOCKS, architecture._MAX_DEPTHS)


def test_paths_may_begin_at_home_wherever_the_shell_left_that(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of me")
    args = train_dints.parse_args([*TRAIN, "--root=~/d\u00e4ta", "--json", "~", "--cache_dir", "a/~"])
    assert (args.root, args.json, args.cache_dir) == (Path("/home/of me/d\u00e4ta"), Path("/home/of me"), Path("a/~"))
