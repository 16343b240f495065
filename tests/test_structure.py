"""The order of the code: sizes, who imports whom, who sees a command line."""

from __future__ import annotations

import ast

import measure
import pytest

PROGRAM = measure.program()
GRAPH = measure.imports(PROGRAM)
SCRIPTS = {module.name for module in PROGRAM if module.group == "scripts"}


def test_the_program_is_looked_at():
    stages = {"search_dints", "evolve_dints", "train_dints", "infer_dints", "evaluate"}
    assert len(PROGRAM) > 60 and stages <= SCRIPTS and sum(map(len, GRAPH.values())) > 100
    assert {name for names in measure.LEVELS for name in names} == {m.group for m in PROGRAM}


def test_imports_run_one_way_and_in_no_circle():
    assert measure.wrong_way(PROGRAM) == [] and measure.circle(GRAPH) == []


def test_nothing_imports_scripts_and_packages_export_none_of_their_modules():
    assert [name for name, imported in GRAPH.items() if imported & SCRIPTS] == []
    for package in (m for m in PROGRAM if m.path.name == "__init__.py"):
        assert GRAPH[package.name] <= {"dints"}, package.path


def test_no_function_sees_a_command_lines_namespace():
    assert measure.takers_of_namespaces(PROGRAM) == []


@pytest.mark.parametrize("script", ["search_dints", "train_dints"])
def test_a_stage_reaches_no_extras(script):
    groups = {module.group for module in measure.reached(script, PROGRAM, GRAPH)}
    assert groups == {"scripts", "ground", "running", "data", "network", "training"}


def test_functions_are_short():
    for module in PROGRAM:
        for name, function in module.functions():
            place = f"{module.path} {name}"
            most = 80 if name == "parse_args" else 70  # which declares one flag after another
            assert measure.length(function) < most and measure.nesting(function) <= 4, place


class TestMeasures:
    """The measures themselves find what they look for."""

    def test_ways_circles_and_reach(self):
        data, network = (
            parsed("dints.data.b", "from dints.network import c"),
            parsed("dints.network.c", "import dints.data.b"),
        )
        script = parsed("search_dints", "from dints.network.c import x")
        of = [data, network, script, parsed("dints.data", ""), parsed("dints.report.d", "")]
        assert measure.wrong_way(of) == ["dints.data.b (data) -> dints.network.c (network)"]
        assert measure.circle(measure.imports([data, network])) == [data.name, network.name]
        names = {module.name for module in measure.reached("search_dints", of, measure.imports(of))}
        assert names == {"search_dints", "dints.network.c", "dints.data.b", "dints.data"}
        sideways = [parsed("dints.training.a", "from dints.network.c import x"), network]
        assert len(measure.wrong_way(sideways)) == 1

    @pytest.mark.parametrize(
        ("head", "expected"),
        [
            ("f(args)", True),
            ("f(a: argparse.Namespace)", True),
            ("f(*args)", False),
            ("f(a)", False),
        ],
    )
    def test_namespaces(self, head, expected):
        found = measure.takers_of_namespaces([parsed("dints.running.a", f"def {head}: pass")])
        assert found == ["dints.running.a.f"] * expected

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
        ((name, function),) = parsed("a", text).functions()
        found = name, measure.length(function), measure.nesting(function)
        assert found == ("f", 8, 2)

    def test_it_prints_them(self, capsys):
        measure.main()
        said = capsys.readouterr().out
        assert "modules in a circle: 0" in said and "longest functions" in said


def parsed(name: str, text: str) -> measure.Module:
    return measure.Module(measure.Path(name), name, text, ast.parse(text))
