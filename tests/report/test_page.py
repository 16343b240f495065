"""infer_dints.py --report writes a page that needs nothing beside it, and costs no segmentation."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from architectures import chain
from commands import infer
from threshold import Threshold, knows
from volumes import save

from dints.data.tasks import Task
from dints.errors import PartlyDone, UserError
from dints.evaluation.scores import NAN, Row
from dints.inference.batch import Batch
from dints.report import page
from dints.report.overlays import Overlay
from dints.report.results import Result, unusual_volumes

# As a task, a class and a case may be called; the last one is a file's name, without a slash.
CALLED = """Toy & <co></title></style><script>alert("task")</script>{{ 7 * 7 }}-->"""
ORGAN = """<1>'"></text><script>x()</script>"""
HOSTILE = """b"><script>alert('case')<!--<img src=x onerror=alert(1)>&lt;"""
TASK = Task(CALLED, "CT", 1, ("background", ORGAN, "other"), None, (0.0, 200.0), (16,) * 3)
AFFINE = np.diag([1.0, 1, 3, 1])
FACTS = {
    "architecture": replace(chain(0, 1, 0, num_depths=2), info={"task": HOSTILE}),
    "channel_mul": 0.125,
    "training_cases": ["trained_1"],
    "validation_cases": ["a", HOSTILE],
    "flips": {"axes": [0]},
    "recipe": "<i>own</i>",
}


class Page(HTMLParser):
    """A page, parsed: its elements with their attributes, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.content, self.elements, self.text = path.read_text(encoding="utf-8"), [], ""
        self.feed(self.content)
        self.ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.elements if found == tag]


def ball(radius: float) -> np.ndarray:
    """Make an image in which class 1 is a ball of this radius, in voxels."""
    x, y, z = np.indices((18, 20, 16))
    depth = radius - np.sqrt((x - 9) ** 2 + (y - 9) ** 2 + (z - 8) ** 2)
    return np.clip(100 + 15 * depth, 0, 200).astype(np.float32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Nine labelled cases, of which later ones have smaller references; one has no file."""
    root, entries = tmp_path_factory.mktemp("data") / "toy", []
    for number, name in enumerate(["a", HOSTILE, *"cdefghi"]):
        paths = {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
        image = ball(5 if number < 8 else 7.5)
        save(root / paths["image"], image, AFFINE)
        save(root / paths["label"], (image > 100 + 4 * number).astype(np.uint8), AFFINE)
        entries.append(paths)
    (root / "dataset.json").write_text(json.dumps({"training": entries}))
    (root / entries[3]["image"]).write_bytes(b"no <b>image</b>")
    return root


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, dataset) -> Path:
    """Segment the dataset twice, the second time for the report alone; return its folder."""
    out, run = tmp_path_factory.mktemp("labelled"), tmp_path_factory.mktemp("run")
    table = [["epoch", "iteration", "seconds", "dice", f"dice_{ORGAN}"], [1, 5, 9, 0.5, 0.5]]
    with open(run / "accuracy_history.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    flags = ["--checkpoint", run / "best_metric_model.pth", "--root", dataset, "--fold", "all"]
    with pytest.MonkeyPatch.context() as patch:
        knows(patch, TASK)(Threshold(num_classes=3), **FACTS)
        with pytest.raises(PartlyDone):
            infer(out, *flags)
        assert not (out / "report.html").exists()
        patch.setattr(Batch, "decide", lambda *a: pytest.fail("what is done is done again"))
        with pytest.raises(PartlyDone):
            infer(out, *flags, "--report")
    return out


@pytest.fixture(scope="module")
def shown(labelled) -> Page:
    return Page(labelled / "report.html")


class TestLabelled:
    def test_it_asks_for_nothing_and_runs_its_own_lines_only(self, shown):
        attributes = [pair for _, own in shown.elements for pair in own.items()]
        for key, value in attributes:
            assert not key.startswith("on") and key not in ("srcset", "action", "poster"), key
            if key.split(":")[-1] in ("src", "href"):
                assert value.startswith(("#", "data:")), value
        assert "://" not in shown.content and "@import" not in shown.content
        assert {*re.findall(r"url\((.)", shown.content)} <= {"#"}
        (script,) = re.findall("<script>(.*?)</script>", shown.content, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        (policy,) = [a["content"] for a in shown.all("meta") if "http-equiv" in a]
        assert policy.startswith("default-src 'none'; ")
        assert policy.endswith(f"script-src 'sha256-{digest}'")

    @pytest.mark.fault("HTML in the names of tasks, classes, cases and patients")
    def test_names_are_text(self, shown):
        """In elements, attributes and drawings: names add no element and no attribute."""
        assert not shown.all("img") and not shown.all("i") and not shown.all("co")
        assert len(shown.all("script")) == len(shown.all("style")) == 1
        for text in (HOSTILE, ORGAN, CALLED, "<i>own</i>"):
            assert text in shown.text
        assert HOSTILE in {a.get("data-value") for a in shown.all("th")}
        assert any(HOSTILE in a.get("aria-label", "") for a in shown.all("svg"))
        names = {key for _, attributes in shown.elements for key in attributes}
        assert all(re.fullmatch("[a-zA-Z][a-zA-Z0-9:-]*", name) for name in names)
        for drawn in re.findall(r"<svg .*?</svg>", shown.content, re.DOTALL):
            ElementTree.fromstring(drawn.replace("&nbsp;", " ").replace(" hidden ", " "))  # noqa: S314  our own

    def test_ids_are_unique_and_links_lead_somewhere(self, shown):
        own = [name for name in shown.ids if not re.match("[a-zA-Z]+[0-9_]*[0-9a-f]{10}", name)]
        assert len(own) == len({*own}) and own.count("case-0") == own.count("picture-0") == 1
        assert {a["href"][1:] for a in shown.all("a")} <= {*shown.ids}

    def test_scores_are_those_of_the_evaluation(self, labelled, shown):
        with open(labelled / "scores.csv", newline="") as file:
            scored = [row for row in list(csv.reader(file))[1:] if row[1]]
        assert len(scored) == 8
        for name, value, _ in scored:
            said = f"{name.removesuffix('.nii.gz')}{float(value):.3f}"
            assert said.replace(" ", "") in re.sub(r"[\s⚠]", "", shown.text), name

    def test_pictures_are_described_and_the_worst_come_first(self, shown):
        pictures = [a["id"] for a in shown.all("figure") if "id" in a]
        assert pictures[:2] == ["picture-6", "picture-7"] and len(pictures) == 8
        drawn = [a for a in shown.all("svg") if a.get("role") == "img"]
        assert len(drawn) > 3 * 8  # those at once have many planes
        assert all("of the reference" in a["aria-label"] for a in drawn)
        assert sum("hidden" not in a for a in drawn) == 3 * 8
        sliders = [a for a in shown.all("input") if a["type"] == "range"]
        assert len(sliders) == 3 * 7 and all(0 <= int(a["value"]) <= int(a["max"]) for a in sliders)

    def test_failures_and_unusual_cases_are_listed(self, shown):
        for said in ("d.nii.gz", "cannot be read: it is no NIfTI file", "8 of 9"):
            assert said in shown.text
        unusual = re.escape(ORGAN) + r" has [\d.]+ ml, where half of these cases have"
        assert re.search(unusual, shown.text)


class TestUnlabelled:
    @pytest.fixture
    def segmented(self, tmp_path, monkeypatch) -> Callable[..., Page]:
        """Return a function that segments three images, and reads their report."""
        for number in range(3):
            save(tmp_path / f"images/trained_{number}.nii.gz", ball(3 + number), AFFINE)

        def segmented(*flags: object, **facts: object) -> Page:
            knows(monkeypatch, TASK)(Threshold(num_classes=3), **{**FACTS, **facts})
            out = infer(tmp_path / "out", "--input", tmp_path / "images", "--report", *flags)
            return Page(out / "report.html")

        return segmented

    def test_volumes_take_the_place_of_scores(self, tmp_path, monkeypatch, segmented):
        """Training cases are marked, and what is unlike them in header or intensities is said."""
        monkeypatch.setenv("PATH", "")  # no dot
        ranges = {
            "spacing": [[1, 1, 1], [1, 1, 1]],
            "extent": [[9, 9, 9], [99, 99, 99]],
            "intensity": [[3, 0], [3, 0.1]],
        }
        # of another program
        (tmp_path / "accuracy_history.csv").write_text("epoch\tmetric\n1\t0.5\n")
        models = [tmp_path / "model.pth", tmp_path / "other.pth"]
        found = segmented("--checkpoint", *models, ranges=ranges)
        assert "Dice" not in found.text.partition("Model")[0]
        text = " ".join(found.text.split())
        for said in (
            f"{ORGAN}, ml as segmented",
            "3 mm between voxels bottom-top, where training cases have 1 to 1",
            "are they in Hounsfield units?",
            "1 of these cases was trained on",
            "trained_1 ⚠ trained on",
            "No picture of the architecture",
            "'dot', which is not installed",
            "none of train_dints.py's",
            "Models, whose class probabilities",
            f"that of {models[0]}",
        ):
            assert said in text

    def test_a_report_that_fails_costs_nothing_else(self, tmp_path, segmented):
        (tmp_path / "out/report.html").mkdir(parents=True)
        says = r"report.html could not be made \(.*report.html cannot be written.*--report"
        with pytest.raises(UserError, match=says):
            segmented()
        run = json.loads((tmp_path / "out/run.json").read_text())
        assert [case["state"] for case in run["cases"].values()] == ["done"] * 3
        assert not list((tmp_path / "out").glob(".*.partial"))


def result(name: str, dice: float, falsely: float = NAN) -> Result:
    """Make a result of two classes, of which the reference has but the first."""
    rows = [
        Row(name, label, *scores, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1, 0, 0, False)
        for label, *scores in (("a", dice, dice), ("b", NAN, falsely))
    ]
    return Result(name, tuple(rows), (1.0, 1.0), (), Overlay((), ""))


def batch(*found: Result) -> page.Batch:
    return page.Batch(found, [], [], [], {})


def test_cases_are_grouped_by_dice_and_what_is_falsely_found_counts():
    found = [result(str(number), 0.5 + number / 100) for number in range(20)]
    found[15] = result("15", 0.9, falsely=0.0)
    groups = page.grouped(batch(*found), [[]] * 20)
    assert groups["The worst by Dice"] == [15, 0, 1, 2] and groups["The best by Dice"] == [19, 18]
    assert groups["The median by Dice"] == [9]
    assert sorted(number for numbers in groups.values() for number in numbers) == list(range(20))
    assert list(page.grouped(batch(*found[:3]), [[]] * 3).values()) == [[0, 1, 2], []]
    assert found[15].dice == 0.9 and found[15].rank == 0.45
    assert np.isnan(result("x", NAN).dice) and result("x", NAN).rank == 1.0  # rightly empty


def test_pictures_keep_to_their_bytes(monkeypatch):
    monkeypatch.setattr(
        Overlay, "size", property(lambda overlay: {"still": 10, "many": 25}[overlay.chosen])
    )
    found = [replace(result(str(number), 0.5), overlay=Overlay((), "still")) for number in range(9)]
    groups, num_left_out = page.pictures(
        batch(*found), [[]] * 9, lambda number: Overlay((), "many"), 7 * 10 + 2 * 15 + 10
    )
    chosen = [picture.chosen for _, group in groups for picture in group.values()]
    assert chosen == ["many"] * 2 + ["still"] * 6 and num_left_out == 1


def test_volumes_that_are_far_from_the_others_are_named():
    rising = np.linspace(0, 0.4, 10)[:, None]
    volumes = np.array([[1.0, 5.0]] * 8 + [[1.1, 5.0], [9.0, 0.0]]) + rising
    found = unusual_volumes(volumes, ["a", "b"])
    assert [len(of_case) for of_case in found] == [0] * 9 + [2]
    assert found[9][0].startswith("a has 9.4 ml, where half of these cases have 1.")
    assert unusual_volumes(volumes[5:], ["a", "b"]) == [[]] * 5  # too few to compare with
