"""Prints what this project promises of its own code: sizes, imports, command lines.

    python benchmarks/measure.py

test_structure.py checks the hard promises.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
# From the ground up: a module imports from its own group and from the levels below; two groups of
# one level do not know each other.
LEVELS = (
    ("ground",),
    ("running",),
    ("data",),
    ("network", "training", "evaluation"),
    ("evolution", "inference"),
    ("exports", "report"),
    ("scripts",),
)
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match


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
    def group(self) -> str:
        """Name the sub-package, ``scripts`` for those, else ``ground``."""
        parts = self.name.split(".")
        if parts[0] != "dints":
            return "scripts"
        return parts[1] if len(parts) > 1 and parts[1] in chain(*LEVELS) else "ground"

    def functions(self) -> Iterator[tuple[str, FUNCTIONS]]:
        """Give every function with its name, within its class if it has one; functions in functions
        are left out.
        """
        for node in self.tree.body:
            if isinstance(node, FUNCTIONS):
                yield node.name, node
            elif isinstance(node, ast.ClassDef):
                yield from (
                    (f"{node.name}.{inner.name}", inner)
                    for inner in node.body
                    if isinstance(inner, FUNCTIONS)
                )


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


def takes_namespace(function: FUNCTIONS) -> bool:
    """Tell whether a function takes a command line's Namespace, or a parameter named ``args``."""
    given = function.args
    every = (*given.posonlyargs, *given.args, *given.kwonlyargs)
    named = any(one.arg == "args" for one in every)
    annotations = (one.annotation for one in every if one.annotation is not None)
    return named or any("Namespace" in ast.unparse(annotation) for annotation in annotations)


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
    """List the imports that lead up, or sideways to another group of the same level."""
    groups = {module.name: module.group for module in of}
    level = {group: number for number, names in enumerate(LEVELS) for group in names}
    return [
        f"{module} ({groups[module]}) -> {imported} ({groups[imported]})"
        for module, imports_of in imports(of).items()
        for imported in sorted(imports_of)
        if groups[imported] != groups[module] and level[groups[imported]] >= level[groups[module]]
    ]


def reached(script: str, of: list[Module], graph: dict[str, set[str]]) -> list[Module]:
    """Return the modules that a script imports, directly or not, with their packages and itself."""
    by_name = {module.name: module for module in of}
    waiting, found = [script], {}
    while waiting:
        name = waiting.pop()
        if name in by_name and name not in found:
            found[name] = by_name[name]
            waiting += [*graph[name], name.rpartition(".")[0]]
    return list(found.values())


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that import each other in a circle, or lead into one; none, as it should
    be.
    """
    left = {module: set(imported) for module, imported in graph.items()}
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def takers_of_namespaces(of: list[Module]) -> list[str]:
    """List the functions, but for those that parse command lines, that take a Namespace."""
    outside = [module for module in of if module.name != "dints.options"]
    return [
        f"{m.name}.{name}" for m in outside for name, node in m.functions() if takes_namespace(node)
    ]


def main() -> None:
    code, tests = program(), modules("tests/**/*.py", "benchmarks/**/*.py")
    for title, of in (("program", code), ("tests and benchmarks", tests)):
        print(f"{title}: {len(of)} files, {lines_of(of)} lines")
    print("\nmodules that a script reaches, itself among them, and their lines")
    graph = imports(code)
    for module in code:
        if module.path.parent == Path():
            all_of_it = reached(module.name, code, graph)
            print(f"{len(all_of_it):5} {lines_of(all_of_it):6} {module.name}")
    functions = [
        (length(node), nesting(node), f"{m.path} {name}")
        for m in code
        for name, node in m.functions()
    ]
    print("\nlongest functions of the program, in lines")
    for count, _, name in sorted(functions, reverse=True)[:12]:
        print(f"{count:5} {name}")
    for title, found in (
        ("nested deeper than 3", [f"{depth} {name}" for _, depth, name in functions if depth > 3]),
        ("functions that take a Namespace", takers_of_namespaces(code)),
        ("imports that lead up or sideways", wrong_way(code)),
        ("modules in a circle", circle(graph)),
    ):
        print(f"\n{title}: {len(found)}", *found, sep="\n    ")


def lines_of(of: list[Module]) -> int:
    return sum(module.text.count("\n") for module in of)


if __name__ == "__main__":
    main()
