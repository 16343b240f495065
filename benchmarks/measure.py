"""Prints what the house promises of its own code: sizes, who imports whom, who sees the command line, how texts open.

    python benchmarks/measure.py

test_structure.py holds the code to the hard promises.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
# From the ground up: a module imports from its own level and from those below. Two of one level do not know each other.
LEVELS = (
    ("ground",),
    ("running",),
    ("data",),
    ("network", "training", "evaluation"),
    ("candidates", "inference"),
    ("exports", "report"),
    ("scripts",),
)
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match
# A text that begins so has no verb there: a genitive, another preposition, half a question.
NO_SENTENCE = r"(Of|With|In|For|To|On|At|By|From|As|Without|Where|Whether|What|How|Its|Their)\b"
# Nor has a function's, which is to say what the function does; a class, a module or a test may begin with a noun.
NO_VERB = rf"{NO_SENTENCE}|(A|An|The|All|Each|Every)\b"


@dataclass(frozen=True)
class Module:
    """A Python file of the checkout, parsed.

    Attributes:
        path: relative to the checkout.
        name: as it is imported, ``dints.data`` for a package.
    """

    path: Path
    name: str
    text: str
    tree: ast.Module

    @property
    def wing(self) -> str:
        """Name the sub-package, ``scripts`` for what sees the command line, else ``ground``."""
        parts = self.name.split(".")
        if parts[0] != "dints" or self.name == "dints.options":
            return "scripts"
        return parts[1] if len(parts) > 1 and parts[1] in chain(*LEVELS) else "ground"

    def functions(self) -> Iterator[tuple[str, FUNCTIONS]]:
        """Give every function with its name, within its class if it has one; functions in functions are left out."""
        for node in self.tree.body:
            if isinstance(node, FUNCTIONS):
                yield node.name, node
            elif isinstance(node, ast.ClassDef):
                yield from ((f"{node.name}.{inner.name}", inner) for inner in node.body if isinstance(inner, FUNCTIONS))


def modules(*patterns: str) -> list[Module]:
    """Parse the files of the checkout that match."""
    found = []
    for path in sorted({path for pattern in patterns for path in CHECKOUT.glob(pattern)}):
        relative, text = path.relative_to(CHECKOUT), path.read_text(encoding="utf-8")
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        found.append(Module(relative, name, text, ast.parse(text)))
    return found


def program() -> list[Module]:
    """Parse scripts and package."""
    return modules("*.py", "dints/**/*.py", "launch/**/*.py")


def lines_of_code(text: str) -> int:
    """Count the lines that hold anything but blanks, comments and docstrings."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    counted = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            counted |= set(range(token.start[0], token.end[0] + 1))
    for _, owner in texts(ast.parse(text)):
        docstring = owner.body[0]
        counted -= set(range(docstring.lineno, docstring.end_lineno + 1))
    return len(counted)


def texts(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Give every docstring with the node that it belongs to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS) and (docstring := ast.get_docstring(node)):
            yield docstring, node


def length(function: FUNCTIONS) -> int:
    """Count the lines from ``def`` to the end."""
    return function.end_lineno - function.lineno + 1


def nesting(node: ast.AST) -> int:
    """Tell how deep branches, loops and ``with`` stand in each other; ``elif`` goes no deeper."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, nesting(child) + (isinstance(child, BRANCHES) and not is_elif))
    return deepest


def sees_namespace(function: FUNCTIONS) -> bool:
    """Tell whether a function takes the command line's Namespace."""
    arguments = function.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    return any(a.annotation is not None and "Namespace" in ast.unparse(a.annotation) for a in every if a is not None)


def imports(of: list[Module]) -> dict[str, set[str]]:
    """Tell which modules of ``of`` each of them imports, wherever in its text."""
    names, found = {module.name for module in of}, {}
    for module in of:
        asked = []
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                asked += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                members = [f"{node.module}.{alias.name}" for alias in node.names]
                asked += [member if member in names else node.module for member in members]
        found[module.name] = names.intersection(asked) - {module.name}
    return found


def wrong_way(of: list[Module]) -> list[str]:
    """List the imports that lead up, or sideways to another wing of the same level."""
    wings = {module.name: module.wing for module in of}
    level = {wing: number for number, names in enumerate(LEVELS) for wing in names}
    return [
        f"{module} ({wings[module]}) -> {imported} ({wings[imported]})"
        for module, imports_of in imports(of).items()
        for imported in sorted(imports_of)
        if wings[imported] != wings[module] and level[wings[imported]] >= level[wings[module]]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that import each other in a circle, or lead into one; none, as it should be."""
    left = {module: set(imported) for module, imported in graph.items()}
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def opens_without_verb(docstring: str, owner: ast.AST) -> bool:
    """Tell whether a text seems to open with no verb."""
    does_something = isinstance(owner, FUNCTIONS) and not owner.name.startswith("test_")
    return re.match(NO_VERB if does_something else NO_SENTENCE, docstring) is not None


def takers_of_namespaces(of: list[Module]) -> list[str]:
    """List the functions, outside the scripts and options.py, that see the command line's Namespace."""
    package = [module for module in of if module.wing != "scripts"]
    return [f"{m.name}.{name}" for m in package for name, node in m.functions() if sees_namespace(node)]


def texts_without_verb(of: list[Module]) -> Iterator[str]:
    """List the docstrings that seem to open with no verb."""
    for module in of:
        for docstring, owner in texts(module.tree):
            if opens_without_verb(docstring, owner):
                yield f"{module.path}:{owner.body[0].lineno} {docstring.splitlines()[0][:70]}"


def main() -> None:
    code, tests = program(), modules("tests/**/*.py", "benchmarks/*.py")
    for what, of in (("program", code), ("tests and benchmarks", tests)):
        lines = sum(module.text.count("\n") for module in of)
        print(f"{what}: {len(of)} files, {lines} lines, {sum(lines_of_code(module.text) for module in of)} of code")
    functions = [(length(node), nesting(node), f"{m.path} {name}") for m in code for name, node in m.functions()]
    print("\nlongest functions of the program, in lines")
    for count, _, name in sorted(functions, reverse=True)[:12]:
        print(f"{count:5} {name}")
    for title, found in (
        ("nested deeper than 3", [f"{depth} {name}" for _, depth, name in functions if depth > 3]),
        ("functions of dints/ that take a Namespace, outside options.py", takers_of_namespaces(code)),
        ("imports that lead up or sideways", wrong_way(code)),
        ("modules in a circle", circle(imports(code))),
        ("docstrings that seem to open with no verb", list(texts_without_verb([*code, *tests]))),
    ):
        print(f"\n{title}: {len(found)}", *found, sep="\n    ")


if __name__ == "__main__":
    main()
