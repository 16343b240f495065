"""Command lines made of typed settings: values, defaults, recipes, help, and mistakes in one
line.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import decode_plot
import download_msd_datasets
import evaluate
import evolve_dints
import infer_dints
import search_dints
import train_dints
from dints import settings
from dints.data.augmentation import CHAINS, chosen
from dints.evolution import proposals
from dints.network import architecture
from dints.options import Settings, course, option, parse, same_option, with_defaults
from dints.recipes import RECIPES
from dints.running.curves import KINDS
from dints.settings import SearchLengthSettings, recipe_line

TRAIN = ["--arch_ckpt", "arch.pth", "--root", "data", "--output_root", "run"]
SEARCH = TRAIN[2:]
SCRIPTS = {
    "search": (search_dints, SEARCH),
    "evolve": (evolve_dints, SEARCH),
    "train": (train_dints, TRAIN),
    "infer": (infer_dints, ["--checkpoint", "model.pth", "--input", "images"]),
    "evaluate": (evaluate, ["--prediction", "a", "--reference", "b"]),
    "decode_plot": (decode_plot, ["--checkpoint", "arch.pth"]),
    "download": (download_msd_datasets, []),
}


@dataclass(frozen=True, kw_only=True)
class Toy(Settings):
    """Toy group.

    With a second line.
    """

    root: Path = option("a folder", decides=False, type=Path)
    size: tuple[int, ...] = option("numbers", default=(1, 2), nargs=2, type=int)
    deep: bool = option("a flag", default=False)
    average_decay: float = option("of a recipe", from_recipe=True, type=float)

    def complaints(self):
        if self.size[0] > self.size[1]:
            yield f"--size {self.size[0]} {self.size[1]}: it must rise"


@dataclass(frozen=True, kw_only=True)
class Other(Settings):
    """Other group."""

    recipe: str = option("a set", default="published", choices=tuple(RECIPES))
    size2: tuple[int, ...] = same_option(Toy, "size")


@dataclass(frozen=True, kw_only=True)
class ToySettings(Settings):
    """Settings of a script."""

    toy: with_defaults(Toy, size=(3, 4))
    other: Other


def test_a_command_line_becomes_groups_of_typed_values():
    given = parse(ToySettings, "It does.", ["--root", "a", "--deep", "--recipe", "recommended"])
    assert (given.toy.root, given.toy.deep, given.toy.size) == (Path("a"), True, (3, 4))
    assert given.toy.average_decay == 0.99 and given.other.size2 == (1, 2)
    own = parse(
        ToySettings, "It does.", ["--root", "a", "--size", "5", "6", "--average_decay", "0"]
    )
    assert own.toy.size == (5, 6) and own.toy.average_decay == 0.0
    assert course(own) == {
        "size": [5, 6],
        "deep": False,
        "average_decay": 0.0,
        "recipe": "published",
        "size2": [1, 2],
    }


def test_values_that_do_not_go_together_are_refused(capsys):
    with pytest.raises(SystemExit) as left:
        parse(ToySettings, "It does.", ["--root", "a", "--size", "9", "6"])
    error = "error: --size 9 6: it must rise (-h lists all options)\n"
    assert left.value.code == 2 and capsys.readouterr().err == error


def test_help_lists_groups_defaults_and_those_of_recipes(capsys):
    with pytest.raises(SystemExit):
        parse(ToySettings, "It does.", ["-h"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("usage: ") and "--root ROOT [options] It does." in said
    assert "toy group: " in said and "With a second line." in said
    assert "numbers (default: 3 4)" in said and "a flag" in said
    assert "of a recipe (default: 0.0; 0.99 in the recommended recipe)" in said


# The scripts


@pytest.mark.parametrize(
    ("steps", "iterations", "expected"),
    [
        (10, 500, (50, 25, 5)),
        (10, 10, (1, 0, 1)),
        (1000, 500, (1, 0, 1)),
        (7, None, (1000, 500, 100)),
    ],
)
def test_a_length_in_iterations_scales_every_number_of_epochs(steps, iterations, expected):
    epochs = {"num_epochs": 1000, "num_epochs_warmup": 500, "num_epochs_per_validation": 100}
    scaled = SearchLengthSettings(**epochs, num_iterations=iterations).scaled(steps)
    found = scaled.num_epochs, scaled.num_epochs_warmup, scaled.num_epochs_per_validation
    assert found == expected


def test_validations_are_regular_and_the_last_epoch_has_one():
    length = settings.LengthSettings(num_epochs=7, num_epochs_per_validation=3)
    assert [epoch for epoch in range(7) if length.is_validation_epoch(epoch)] == [2, 5, 6]


def test_the_architecture_learns_after_the_warm_up():
    length = SearchLengthSettings(num_epochs=6, num_epochs_warmup=2)
    assert [length.past_warmup(epoch) for epoch in (1, 2, 5)] == [
        (False, 0),
        (True, 0),
        (True, 0.75),
    ]


def test_defaults_are_the_published_numbers():
    search, train = search_dints.parse_args(SEARCH), train_dints.parse_args(TRAIN)
    length = search.length
    assert (length.num_epochs, length.num_epochs_warmup) == (1430, 715)
    assert length.num_epochs_per_validation == 100 and search.patches.num_images_per_batch == 1
    assert (search.space.num_blocks, search.space.num_depths, search.space.channel_mul) == (
        12,
        4,
        0.5,
    )
    assert search.weights.learning_rate_milestones == (0.4, 0.8)
    assert search.arch.loss_weights == (1, 1, 1, 0.001) and search.arch.factor_ram_cost == 0.8
    assert (search.arch.learning_rate_arch, search.window.overlap_ratio) == (0.001, 0.625)
    assert (train.length.num_epochs, train.length.num_epochs_per_validation) == (13500, 500)
    assert train.weights.learning_rate_milestones == (0.2, 0.4, 0.6, 0.8)
    assert (train.patches.num_images_per_batch, train.window.overlap_ratio) == (2, 0.5)
    assert search.weights.learning_rate == train.weights.learning_rate == 0.025


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("script", ["search", "evolve", "train"])
def test_a_recipe_gives_what_is_not_given(script, recipe):
    module, sound = SCRIPTS[script]
    given = module.parse_args([*sound, "--recipe", recipe])
    groups = [getattr(given, field.name) for field in fields(given)]
    found = {
        field.name: getattr(group, field.name)
        for group in groups
        for field in fields(group)
        if field.metadata["from_recipe"]
    }
    assert "flip_axes" in found and found == {name: RECIPES[recipe][name] for name in found}
    flips = ["--flip_axes", "X", "Z"]
    assert module.parse_args([*sound, "--recipe", recipe, *flips]).patches.flip_axes == ("X", "Z")


def test_learning_rates_grow_with_the_processes_by_the_published_recipe_alone():
    for recipe, factor in (("published", 8), ("recommended", 1)):
        assert train_dints.parse_args([*TRAIN, "--recipe", recipe]).weights.factor(8) == factor


def test_long_retrainings_by_the_recommended_recipe_have_nnunets_augmentation():
    recommended = ["--recipe", "recommended"]
    assert train_dints.parse_args([*TRAIN, *recommended]).patches.augmentation == "auto"
    assert search_dints.parse_args([*SEARCH, *recommended]).patches.augmentation == "published"
    lengths = ((5000, 60.0), (4999, 60.0), (5000, 59.9))
    expected = ["nnunet", "published", "published"]
    assert [chosen("auto", *length) for length in lengths] == expected
    assert [chosen(name, 1, 1.0) for name in CHAINS] == ["published", "nnunet"]


def test_a_run_by_the_published_recipe_hears_of_the_other():
    line = recipe_line(train_dints.parse_args(TRAIN), "published")
    assert "--recipe recommended trains with --flip_axes auto, --augmentation auto" in line


def test_tables_that_help_does_not_import_are_those_of_the_settings():
    assert (*CHAINS, "auto") == settings.AUGMENTATIONS
    assert settings.PROPOSALS == proposals.KINDS and {*KINDS} == {
        *proposals.KINDS,
        "given",
        "mutant",
    }
    limits = architecture._MAX_BLOCKS, architecture._MAX_DEPTHS
    assert limits == (settings.MAX_BLOCKS, settings.MAX_DEPTHS)


UNKNOWN = "unknown option"
MISTAKES = [
    ("search", "--spacng 1 1 1", f"{UNKNOWN} --spacng: did you mean --spacing? -h lists all"),
    ("search", "--lr=3", f"{UNKNOWN} --lr: did you mean --learning_rate? -h lists all"),
    ("search", "-fold 3", f"{UNKNOWN} -fold: did you mean --fold? -h lists all"),
    ("train", "--batch_size 3", f"{UNKNOWN} --batch_size: did you mean --num_images_per_batch? -h"),
    ("train", "--xyz 3 --local-rnk 3", f"{UNKNOWN} --xyz: --local-rnk: -h lists all"),
    ("train", "--num_epochs ten", "argument --num_epochs: invalid int value: 'ten' (-h lists all"),
    (
        "train",
        "--fold first",
        "argument --fold: 'first' is neither a fold's number, from 0 on, nor",
    ),
    ("train", "--fold 5", "--fold 5 is not one of --num_folds 5: give 0 to 4, or all"),
    ("train", "--flip_axes auto X", "--flip_axes auto X: give axes, or one of auto, all and none"),
    ("train", "--intensity_range 5 5", "--intensity_range 5 5: the first must be below the second"),
    ("train", "--learning_rate_milestones 0.8 0.2", "--learning_rate_milestones must rise"),
    (
        "train",
        "--average_decay 1",
        "argument --average_decay: 1 is not at least 0 and at most 0.99",
    ),
    ("train", "--root= ", "argument --root: an empty path: is a variable in the command not set?"),
    (
        "train",
        "--root ~no_such_user_0/data",
        "argument --root: ~no_such_user_0/data: there is no such",
    ),
    (
        "search",
        "--num_blocks 999999",
        "argument --num_blocks: 999999 is not at least 1 and at most",
    ),
    ("search", "--num_epochs_warmup 1430", "--num_epochs_warmup 1430 must be below --num_epochs"),
    ("evolve", "--proposals best", "argument --proposals: invalid choice: 'best'"),
    ("evolve", "--candidates 2 --arch_ckpt a b", "--arch_ckpt gives 2 files: give --candidates 4"),
    ("infer", "--inputs a", f"{UNKNOWN} --inputs: did you mean --input? -h lists all"),
    (
        "infer",
        "--save_probabilities yes please",
        "yes please belongs to no option: name it, and quote",
    ),
    ("evaluate", "--out x", f"{UNKNOWN} --out: did you mean --output_root? -h lists all"),
    ("decode_plot", "--num_blocks 3", "--num_blocks and --num_depths go with --search_space"),
    ("decode_plot", "--filename graph.png", "--filename graph.png: give it without its ending"),
    (
        "download",
        "--task Task09_Spleen",
        f"{UNKNOWN} --task: did you mean --msd_task? -h lists all",
    ),
]


@pytest.mark.parametrize(("script", "flags", "message"), MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line(script, flags, message, capsys, monkeypatch):
    module, sound = SCRIPTS[script]
    monkeypatch.setattr("sys.argv", [script, *sound, *flags.split()])
    with pytest.raises(SystemExit) as left:
        module.parse_args()
    said = capsys.readouterr()
    assert left.value.code == 2 and said.err.startswith(f"error: {message}"), said.err
    assert said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    ("name", "says"),
    [(None, "--arch_ckpt"), ("--arch_ckptx", "--arch_ckptx: did you mean --arch_ckpt?")],
)
def test_a_required_option_that_is_missing_or_misspelt(name, says, capsys):
    """Of a misspelt one the error says how it is written, not that it is missing."""
    with pytest.raises(SystemExit) as left:
        train_dints.parse_args([*([name, "arch.pth"] if name else []), *TRAIN[2:]])
    said = capsys.readouterr().err
    assert left.value.code == 2 and says in said and said.count("\n") == 1


def test_one_process_of_several_speaks_and_help_is_given_beside_a_mistake(capsys, monkeypatch):
    with pytest.raises(SystemExit) as left:
        train_dints.parse_args(["--spacng", "-h"])
    assert left.value.code == 0 and "usage:" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        train_dints.parse_args(["--spacng"])
    assert left.value.code == 2 and capsys.readouterr().err == ""


def test_a_negative_number_may_be_written_in_any_form():
    given = train_dints.parse_args([*TRAIN, "--intensity_range", "-1e3", "-.5"])
    assert given.data.intensity_range == (-1000, -0.5)


def test_paths_may_begin_at_home_wherever_the_shell_left_that(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of me")
    flags = ["--root=~/d\u00e4ta", "--json", "~", "--cache_dir", "a/~"]
    given = train_dints.parse_args([*TRAIN, *flags])
    assert (given.data.root, given.data.json) == (
        Path("/home/of me/d\u00e4ta"),
        Path("/home/of me"),
    )
    assert given.run.cache_dir == Path("a/~")
