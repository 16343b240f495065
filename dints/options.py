"""Command lines made of typed settings: flags, defaults, ranges and help stand at the fields.

A script's settings are a frozen dataclass whose fields are groups, which are dataclasses too; each
field of a group is made by `option`. `parse` makes the command line of them, and them of it.

No heavy import here: ``-h`` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from dints import launcher
from dints.errors import tell
from dints.recipes import RECIPES

S = TypeVar("S")

COMMON = "most used options"
# What other programs call an option; a suggestion goes by similar letters otherwise.
OTHER_NAMES = {
    "batch_size": ("num_images_per_batch", "num_sw_batch_size"),
    "lr": ("learning_rate",),
    "model": ("checkpoint",),
    "gpu": ("device",),
}


class Settings:
    """A group of settings, or all groups of a script."""

    def complaints(self) -> Iterable[str]:
        """Yield what is wrong with the values taken together."""
        return ()


def option(
    help: str | None,
    *,
    default: object = dataclasses.MISSING,
    common: bool = False,
    decides: bool = True,
    from_recipe: bool = False,
    names: Sequence[str] = (),
    **settings: object,
) -> dataclasses.Field:
    """Declare a field of a group as an option of the command line.

    Args:
        help: its effect and unit; None hides it.
        default: where it is not given; without one, it is required.
        common: list it among the most used ones.
        decides: it decides what a run computes, so that a stored run is resumed with the same value
            only; False for places of files, and for ways to do the same.
        from_recipe: where it is not given, it has the value of ``--recipe``.
        names: other spellings.
        settings: of argparse's ``add_argument``; True and False need none.
    """
    metadata = {
        "help": argparse.SUPPRESS if help is None else help,
        "common": common,
        "decides": decides,
        "from_recipe": from_recipe,
        "names": names,
        "settings": settings,
    }
    default = None if from_recipe else default
    return dataclasses.field(default=default, metadata=metadata)


def same_option(group: type, name: str) -> dataclasses.Field:
    """Return an option of another group, for a group that has it too."""
    field = group.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


def with_defaults(group: type[S], **defaults: object) -> type[S]:
    """Return a group like ``group`` whose fields have other defaults."""
    own = {field.name: field for field in dataclasses.fields(group)}
    changed = [
        (name, own[name].type, dataclasses.field(default=default, metadata=own[name].metadata))
        for name, default in defaults.items()
    ]
    made = dataclasses.make_dataclass(
        group.__name__, changed, bases=(group,), frozen=True, kw_only=True
    )
    made.__doc__ = group.__doc__
    return made


def parse(kind: type[S], description: str, argv: Sequence[str] | None = None) -> S:
    """Read a script's settings from its command line.

    Args:
        kind: dataclass of the script's groups, whose docstrings are their titles and texts.
        description: the script's docstring.
    """
    groups = typing.get_type_hints(kind)
    parser = Parser(description=description, formatter_class=_HelpFormatter)
    for group in groups.values():
        _add_group(parser, group)
    needed = [action for action in parser._actions if action.required]
    words = [f"{action.option_strings[0]} {action.dest.upper()}" for action in needed]
    parser.usage = " ".join(["%(prog)s", *words, "[options]"])
    given = vars(parser.parse_args(argv))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    for field in (field for group in groups.values() for field in dataclasses.fields(group)):
        if field.metadata["from_recipe"] and given[field.name] is None:
            given[field.name] = RECIPES[given["recipe"]][field.name]
    made = {
        name: group(**{field.name: given[field.name] for field in dataclasses.fields(group)})
        for name, group in groups.items()
    }
    settings = kind(**made)
    complaints = [fault for part in (*made.values(), settings) for fault in part.complaints()]
    if complaints:
        parser.error("; ".join(complaints))
    return settings


def course(settings: object) -> dict[str, object]:
    """Return, as plain values, the settings that decide what a run computes."""
    found = {}
    for group in (getattr(settings, field.name) for field in dataclasses.fields(settings)):
        for field in dataclasses.fields(group):
            if field.metadata["decides"]:
                found[field.name] = _plain(getattr(group, field.name))
    return found


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _add_group(parser: Parser, group: type) -> None:
    title, _, text = inspect.cleandoc(group.__doc__).partition("\n\n")
    title = title[:1].lower() + title[1:].rstrip(".")
    for field in dataclasses.fields(group):
        own = field.metadata
        settings = {"help": own["help"], **own["settings"]}
        if own["from_recipe"]:
            settings["help"] += f" (default: {_of_recipes(field.name)})"
        if field.default is dataclasses.MISSING:
            settings["required"] = True
        else:
            settings["default"] = field.default
        if field.type in ("bool", bool):
            settings["action"] = "store_true"
        place = parser.group(COMMON) if own["common"] else parser.group(title, text)
        place.add_argument(f"--{field.name}", *own["names"], **settings)


def _of_recipes(name: str) -> str:
    """Tell the values that the recipes give to an option."""
    published, recommended = (_words(RECIPES[recipe][name]) for recipe in RECIPES)
    if published == recommended:
        return published
    return f"{published}; {recommended} in the recommended recipe"


def _words(value: object) -> str:
    return " ".join(value) if isinstance(value, (list, tuple)) else str(value)


class Parser(argparse.ArgumentParser):
    """Parses a script's command line; what is wrong with it is one line on stderr, exit code 2."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)
        self.register("type", Path, path)
        # -1e3 too, which argparse takes for an option.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        self._titles = {}
        self.group(COMMON)  # before all others

    def group(self, title: str, text: str = "") -> argparse._ArgumentGroup:
        """Return the group of options of this title; help has groups in the order of first calls.

        Args:
            text: shown below the title.
        """
        if title not in self._titles:
            self._titles[title] = self.add_argument_group(title, text or None)
        return self._titles[title]

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        self._check_names(words)
        namespace, extra = self.parse_known_args(words, namespace)
        if extra:
            self.error(
                f"{shlex.join(extra)} belongs to no option: name it, and quote values that have "
                "spaces"
            )
        return namespace

    def error(self, message: str, closing: str = " (-h lists all options)") -> NoReturn:
        if launcher.rank() == 0:  # all processes have the same command line
            tell(f"error: {message}{closing}")
        self.exit(2)

    def _check_names(self, words: Sequence[str]) -> None:
        """Refuse unknown options; argparse would first complain about the required one misspelt."""
        known = {name for action in self._actions for name in action.option_strings}
        given = [word.partition("=")[0] for word in words if re.match("--?[A-Za-z]", word)]
        unknown = dict.fromkeys(name for name in given if name not in known and " " not in name)
        if unknown and {"-h", "--help"}.isdisjoint(given):
            alike = {name: self._alike(name) for name in unknown}
            remarks = [
                f"{name}: did you mean {other}?" if other else f"{name}:"
                for name, other in alike.items()
            ]
            self.error(f"unknown option {' '.join(remarks)} -h lists all", closing="")

    def _alike(self, name: str) -> str | None:
        """Return the option that is probably meant."""
        listed = [action for action in self._actions if action.help != argparse.SUPPRESS]
        shown = {name.lstrip("-"): name for action in listed for name in action.option_strings}
        name = name.lstrip("-")
        by_letters = difflib.get_close_matches(name, shown, 1)
        by_letters += [other for other in shown if other.startswith(name)]
        found = [other for other in (*OTHER_NAMES.get(name, ()), *by_letters) if other in shown]
        return shown[found[0]] if found else None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; adds defaults, unless the help says what no value means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, ()) or action.required:
            return action.help
        if isinstance(action.default, tuple) and action.help != argparse.SUPPRESS:
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def path(text: str) -> Path:
    """Return a path, ``~`` expanded also where a shell leaves it (``--root=~/data``)."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path: is a variable in the command not set?")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: there is no such user") from error


def number(
    kind: type, low: float, high: float = float("inf"), *, above: bool = False
) -> Callable[[str], float]:
    """Make an argparse type: an ``int`` or ``float`` from ``low`` (or just above it) to
    ``high``.
    """

    def parse(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is no finite number")
        if not (low < value if above else low <= value) or value > high:
            limits = f"above {low}" if above else f"at least {low}"
            upper = "" if high == float("inf") else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}{upper}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


positive = number(float, 0, above=True)
finite = number(float, -1e30, 1e30)


def fold(text: str) -> int | str:
    """Read ``--fold``."""
    if text != "all" and not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fold's number, from 0 on, nor all")
    return text if text == "all" else number(int, 0)(text)
