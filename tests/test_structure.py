"""The code keeps to the house's order: sizes, who imports whom, who sees the command line."""

import ast

import measure
import pytest

PROGRAM = measure.program()
PACKAGE = [module for module in PROGRAM if module.name.split(".")[0] == "dints"]
GRAPH = measure.imports(PROGRAM)
SCRIPTS = {module.name for module in PROGRAM if module.wing == "scripts" and module.name != "dints.options"}
# They read like a table of contents, or declare the flags one after another.
MAIN_LIKE = {"main", "search", "train", "infer", "parse_args"}


def module(name: str, text: str) -> measure.Module:
    return measure.Module(measure.Path(name), name, text, ast.parse(text))


def test_the_program_is_looked_at():
    assert len(PACKAGE) > 40 and {"search_dints", "train_dints", "infer_dints", "evaluate", "decode_plot"} <= SCRIPTS
    assert {wing for names in measure.LEVELS for wing in names} == {module.wing for module in PROGRAM}
    assert sum(map(len, GRAPH.values())) > 100


def test_only_options_sees_the_command_lines_namespace():
    assert measure.takers_of_namespaces(PROGRAM) == []


def test_imports_run_one_way():
    assert measure.wrong_way(PROGRAM) == []


def test_no_modules_import_each_other_in_a_circle():
    assert measure.circle(GRAPH) == []


def test_scripts_are_imported_by_nobody_and_options_by_scripts_only():
    assert [(name, imported & SCRIPTS) for name, imported in GRAPH.items() if imported & SCRIPTS] == []
    assert {name for name, imported in GRAPH.items() if "dints.options" in imported} <= SCRIPTS


def test_packages_export_nothing_of_their_modules():
    for package in (module for module in PACKAGE if module.path.name == "__init__.py"):
        assert GRAPH[package.name] <= {"dints"}, package.path
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(package.tree))


@pytest.mark.parametrize("module", PROGRAM, ids=lambda module: str(module.path))
def test_functions_are_short(module):
    for name, function in module.functions():
        assert measure.length(function) < (80 if name in MAIN_LIKE else 60), name
    assert not [name for name, function in module.functions() if measure.nesting(function) > 4]


class TestMeasures:
    """The measures themselves find what they look for."""

    A = "import argparse\nfrom dints.data import b\n\ndef f(args: argparse.Namespace): pass\n"

    def test_ways_and_circles(self):
        of = [module("dints.data.b", "from dints.network import c"), module("dints.network.c", "import dints.data.b")]
        assert measure.wrong_way(of) == ["dints.data.b (data) -> dints.network.c (network)"]
        assert measure.circle(measure.imports(of)) == ["dints.data.b", "dints.network.c"]
        sideways = [module("dints.training.a", "from dints.network.c import x"), module("dints.network.c", "")]
        assert len(measure.wrong_way(sideways)) == 1 and measure.circle(measure.imports(sideways)) == []

    def test_namespaces(self):
        of = [module("dints.running.a", self.A), module("search_dints", self.A)]
        assert measure.takers_of_namespaces(of) == ["dints.running.a.f"]

    def test_sizes(self):
        text = """'''Says.'''


def f():
    '''Says.'''
    for a in b:  # why
        if a:

            c
        elif b:
            d
"""
        ((name, function),) = module("a", text).functions()
        assert (name, measure.length(function), measure.nesting(function)) == ("f", 8, 2)
        assert measure.lines_of_code(text) == 6

    def test_texts_without_a_verb(self):
        texts = {"def f(): 'The sum.'": True, "def f(): 'Return it.'": False, "def test_f(): 'The sum is 3.'": False}
        texts |= {"class C: 'A sum.'": False, "class C: 'Of a sum.'": True, "'From the ground up.'": True}
        for text, expected in texts.items():
            assert bool(list(measure.texts_without_verb([module("a", text)]))) == expected, text

    def test_it_prints_them(self, monkeypatch, capsys):
        monkeypatch.setattr(measure, "modules", lambda *patterns: [module("dints.running.a", self.A)])
        measure.main()
        said = capsys.readouterr().out
        assert "modules in a circle: 0" in said and "longest functions" in said
