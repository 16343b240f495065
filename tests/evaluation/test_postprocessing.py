"""Post-processing removes components, of all classes and of each one; its file is read as it was
written.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from dints.errors import UserError
from dints.evaluation.postprocessing import Postprocessing, Rule, read

NAMES = ("background", "organ", "lesion")
SPACING = (1.0, 2.0, 1.5)  # 3 mm3


def bars(*bars: tuple[int, int, int], order: str = "C") -> np.ndarray:
    """Make labels with bars along x: label, first and end."""
    labels = np.zeros((40, 3, 4), np.uint8, order)
    for label, start, end in bars:
        labels[start:end, 1, 1] = label
    return labels


NOTHING = Rule()


def removing(
    largest_foreground: bool = False, organ: Rule = NOTHING, lesion: Rule = NOTHING
) -> Postprocessing:
    return Postprocessing(NAMES, largest_foreground, (organ, lesion))


LARGEST = Rule(largest=True)


@pytest.mark.parametrize(
    ("postprocessing", "before", "after"),
    [
        (removing(organ=LARGEST), [(1, 0, 5), (1, 8, 10), (2, 12, 13), (2, 20, 22)], [0, 2, 3]),
        (removing(lesion=LARGEST), [(1, 0, 5), (1, 8, 10), (2, 12, 13), (2, 20, 22)], [0, 1, 3]),
        # equally large ones stay
        (removing(organ=LARGEST), [(1, 0, 5), (1, 8, 13), (1, 20, 21)], [0, 1]),
        # nine voxels of two classes
        (removing(True), [(1, 0, 5), (2, 5, 9), (1, 12, 20), (2, 30, 32)], [0, 1]),
        # the whole comes first
        (removing(True, LARGEST), [(1, 0, 3), (2, 3, 8), (1, 8, 9), (1, 20, 26)], [0, 1]),
        (removing(organ=Rule(min_volume_mm3=9)), [(1, 0, 3), (1, 8, 10), (2, 20, 21)], [0, 2]),
        (removing(organ=Rule(min_volume_mm3=9.1)), [(1, 0, 3), (2, 20, 21)], [1]),  # all of a class
        (removing(organ=Rule(True, 7)), [(1, 0, 2), (2, 20, 21)], [1]),
    ],
)
@pytest.mark.parametrize("order", "CF")
def test_what_is_removed(postprocessing, before, after, order):
    labels, expected = bars(*before, order=order), bars(*(before[number] for number in after))
    given = labels.copy()
    assert np.array_equal(postprocessing.apply(labels, SPACING), expected)
    assert np.array_equal(labels, given)  # it stays as it is


def test_corners_connect():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[range(3), range(3), range(3)] = 1
    labels[3, 0, 0] = 1
    assert removing(organ=LARGEST).apply(labels, SPACING).sum() == 3


def test_a_headers_rounding_does_not_decide():
    labels = bars((1, 0, 3))
    assert removing(organ=Rule(min_volume_mm3=9)).apply(labels, (1.0, 2.0, 1.4999999)).any()


def test_a_file_says_what_is_removed(tmp_path):
    chosen = removing(True, LARGEST, Rule(min_volume_mm3=20))
    path = tmp_path / "postprocessing.json"
    path.write_text(json.dumps({**chosen.to_dict(), "chosen_on": {"num_cases": 9}}))
    assert read(path, NAMES) == chosen and chosen.removes
    nothing = Postprocessing.nothing(NAMES)
    assert Postprocessing.from_dict(nothing.to_dict()) == nothing and not nothing.removes


SOUND = removing(True).to_dict()
BAD = {
    "no JSON": ("{", "is malformed"),
    "no classes": ({**SOUND, "classes": None}, "has no object 'classes'"),
    "a rule": (
        {**SOUND, "classes": {"organ": {"largest": True}}},
        "class 'organ' must have 'largest' and",
    ),
    "a volume": (
        {**SOUND, "classes": {"organ": {"largest": True, "min_volume_mm3": -1}}},
        "a volume in mm3",
    ),
    "other classes": (
        {**SOUND, "classes": {"organ": {"largest": True, "min_volume_mm3": 0}}},
        "is of the classes background, organ, and the model segments background, organ, lesion",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_told_in_one_line(name, tmp_path):
    content, said = BAD[name]
    path = tmp_path / "postprocessing.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=re.escape(said)) as refusal:
        read(path, NAMES)
    assert str(refusal.value).startswith(f"--postprocessing {path} ") and "\n" not in str(
        refusal.value
    )
    assert re.search(r"\b(give|fix)\b", str(refusal.value))
