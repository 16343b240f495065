"""Plots are parts of a page: they name nothing outside of it, and whatever a class or case is
called is text.
"""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from dints.report import plots

HOSTILE = 'a$x"><script>alert(1)</script>'


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314  our own


@pytest.fixture(scope="module")
def strips() -> str:
    values = {"organ": [0.9, 0.8, math.nan, 0.7], HOSTILE: [0.1, math.inf, 0.3, 0.2]}
    return plots.strips(values, ["one", HOSTILE, "three", "four"], 1.0)


def test_points_lead_to_their_cases_and_are_named(strips):
    links = [(link.get("href"), link.find("title").text) for link in parsed(strips).iter("a")]
    one, hostile, three, four = [
        (f"#case-{n}", name) for n, name in enumerate(["one", HOSTILE, "three", "four"])
    ]
    assert links == [one, hostile, four, one, three, four]  # but for those that are not finite


def test_names_are_text(strips):
    texts = [text.text for text in parsed(strips).iter("text")]
    assert "organ" in texts and HOSTILE in texts
    assert {element.tag for element in parsed(strips).iter()}.isdisjoint({"script", "style"})


def test_a_plot_goes_by_the_pages_colour_and_names_nothing_outside(strips):
    assert "currentColor" in strips and "#000000" not in strips and "font-family" not in strips
    assert "://" not in strips and "id=" not in re.sub("<(path|clipPath) id=", "", strips)
    assert all(
        target.startswith("#")
        for target in re.findall(r'href="(.*?)"|url\((.*?)\)', strips)
        for target in target
        if target
    )


def test_volumes_agree_on_the_diagonal():
    drawn = plots.agreement(
        {"organ": [1.0, math.nan, 2.0]}, {"organ": [1.0, 3.0, 2.0]}, ["one", "two", "three"]
    )
    assert [link.get("href") for link in parsed(drawn).iter("a")] == ["#case-0", "#case-2"]
    assert (
        len(list(parsed(plots.agreement({"organ": [0.0]}, {"organ": [0.0]}, ["one"])).iter("a")))
        == 1
    )
