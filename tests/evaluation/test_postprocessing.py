"""Post-processing removes components, of all classes and of each one, as its file says."""

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
        # equally large ones stay
        (removing(organ=LARGEST), [(1, 0, 5), (1, 8, 13), (1, 20, 21)], [0, 1]),
        # the whole comes first
        (removing(True, LARGEST), [(1, 0, 3), (2, 3, 8), (1, 8, 9), (1, 20, 26)], [0, 1]),
        (removing(organ=Rule(min_volume_mm3=9)), [(1, 0, 3), (1, 8, 10), (2, 20, 21)], [0, 2]),
        (removing(organ=Rule(True, 7)), [(1, 0, 2), (2, 20, 21)], [1]),  # all of a class
    ],
)
@pytest.mark.parametrize("order", "CF")
def test_removals(postprocessing, before, after, order):
    labels, expected = bars(*before, order=order), bars(*(before[number] for number in after))
    given = labels.copy()
    assert np.array_equal(postprocessing.apply(labels, SPACING), expected)
    assert np.array_equal(labels, given)  # it stays as it is


def test_corners_connect_and_a_headers_rounding_does_not_decide():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[range(3), range(3), range(3)] = 1
    labels[3, 0, 0] = 1
    assert removing(organ=LARGEST).apply(labels, SPACING).sum() == 3
    small = removing(organ=Rule(min_volume_mm3=9))
    assert small.apply(bars((1, 0, 3)), (1.0, 2.0, 1.4999999)).any()


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "postprocessing.json"
    for chosen in (removing(True, LARGEST, Rule(min_volume_mm3=20)), removing()):
        path.write_text(json.dumps({**chosen.to_dict(), "chosen_on": {"num_cases": 9}}))
        assert read(path, NAMES) == chosen
    assert not chosen.removes


SOUND = removing(True).to_dict()
RULE = {"largest": True, "min_volume_mm3": 0}
BAD = {
    "no JSON": ("{", "is malformed"),
    "no classes": ({"classes": None}, "has no object 'classes'"),
    "a rule": ({"classes": {"organ": {"largest": True}}}, "class 'organ' must have 'largest' and"),
    "a volume": ({"classes": {"organ": {**RULE, "min_volume_mm3": -1}}}, "a volume in mm3"),
    "other classes": ({"classes": {"organ": RULE}}, "is of the classes background, organ, and the"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_in_one_line(name, tmp_path):
    content, said = BAD[name]
    path = tmp_path / "postprocessing.json"
    path.write_text(content if isinstance(content, str) else json.dumps({**SOUND, **content}))
    with pytest.raises(UserError, match=re.escape(said)) as refusal:
        read(path, NAMES)
    assert str(refusal.value).startswith(f"--postprocessing {path} ")
    assert "\n" not in str(refusal.value)
