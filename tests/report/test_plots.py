"""Plots name nothing outside their page; the names of classes and cases are text in them."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from dints.report import plots

HOSTILE = 'a$x"><script>alert(1)</script>'


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314  our own


def test_points_lead_to_their_cases_and_names_are_text():
    values = {"organ": [0.9, 0.8, math.nan, 0.7], HOSTILE: [0.1, math.inf, 0.3, 0.2]}
    drawn = plots.strips(values, ["one", HOSTILE, "three", "four"], 1.0)
    links = [(link.get("href"), link.find("title").text) for link in parsed(drawn).iter("a")]
    cases = enumerate(["one", HOSTILE, "three", "four"])
    one, hostile, three, four = [(f"#case-{number}", name) for number, name in cases]
    assert links == [one, hostile, four, one, three, four]  # but for those that are not finite
    texts = [text.text for text in parsed(drawn).iter("text")]
    assert "organ" in texts and HOSTILE in texts
    assert {element.tag for element in parsed(drawn).iter()}.isdisjoint({"script", "style"})
    assert "currentColor" in drawn and "#000000" not in drawn and "font-family" not in drawn
    assert "://" not in drawn and "id=" not in re.sub("<(path|clipPath) id=", "", drawn)
    targets = re.findall(r'href="(.*?)"', drawn) + re.findall(r"url\((.*?)\)", drawn)
    assert all(target.startswith("#") for target in targets)


def test_volumes_agree_on_the_diagonal():
    values = [1.0, math.nan, 2.0], [1.0, 3.0, 2.0]
    drawn = plots.agreement(*({"organ": of_one} for of_one in values), ["one", "two", "three"])
    assert [link.get("href") for link in parsed(drawn).iter("a")] == ["#case-0", "#case-2"]
    empty = plots.agreement({"organ": [0.0]}, {"organ": [0.0]}, ["one"])
    assert len(list(parsed(empty).iter("a"))) == 1
