"""What the parsed options mean."""

from __future__ import annotations

import argparse

import pytest

import search_dints
import train_dints
from dints import options
from dints.candidates import proposals
from dints.data.augmentation import CHAINS, chosen
from dints.recipes import RECIPES
from dints.training.curves import KINDS

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
        since = ("recipe", "augmentation", "ram_loss", "loss_weights", "ramp", "decoded_steps", *RECIPES["published"])
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
