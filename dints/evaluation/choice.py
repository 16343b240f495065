"""The choice of post-processing: what helps the Dice of cases that were segmented out of fold is
kept, all else not.

The rule is that of nnU-Net v2 (``nnunetv2/postprocessing/remove_connected_components.py``,
``determine_postprocessing``): first of all classes together, then of one class after another, all
but the largest component is removed, of 26 neighbours; the first is kept if the mean Dice over the
classes rises and that of no class falls, the others if the Dice of their class rises. Then, as
nnU-Net v1 had it in another form, components of each class below a minimal volume are removed, by
the same rule. nnU-Net stops there; here nothing is removed where that choice, made without a fold's
cases, lowers their Dice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from dints.evaluation.postprocessing import Postprocessing, Rule, components, keeps

LADDER = (1, 2, 5)  # times powers of 10: minimal volumes, in mm3


@dataclass(frozen=True)
class Parts:
    """The components of a case's segmentation, from which its Dice follows, whichever of them are
    removed.

    A component of a class lies in one component of all classes together. Arrays have an entry a
    component of a class.

    Attributes:
        label: its class.
        whole: the number of the component of all classes together that it lies in.
        size, common: its voxels, and those of them that the reference gives the same class.
        reference: (classes,) voxels of each foreground class in the reference.
        voxel_mm3: volume of a voxel.
    """

    label: np.ndarray
    whole: np.ndarray
    size: np.ndarray
    common: np.ndarray
    reference: np.ndarray
    voxel_mm3: float

    def kept(self, postprocessing: Postprocessing) -> np.ndarray:
        """Tell of each component whether `Postprocessing.apply` leaves it."""
        kept = np.ones(len(self.label), bool)
        if postprocessing.largest_foreground:
            kept &= keeps(np.bincount(self.whole, self.size), Rule(largest=True), self.voxel_mm3)[
                self.whole
            ]
        for value, rule in enumerate(postprocessing.rules, start=1):
            of_class = np.flatnonzero(kept & (self.label == value))
            kept[of_class] = keeps(self.size[of_class], rule, self.voxel_mm3)
        return kept

    def dice(self, postprocessing: Postprocessing) -> np.ndarray:
        """Return each foreground class's Dice; as nnU-Net has it NaN where a class is in neither,
        and 0 in one only.
        """
        kept, count = self.kept(postprocessing), len(self.reference)
        common, predicted = (
            np.bincount(self.label[kept], voxels[kept], count + 1)[1:]
            for voxels in (self.common, self.size)
        )
        with np.errstate(invalid="ignore"):
            return 2 * common / (predicted + self.reference)


def parts_of(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], num_classes: int
) -> Parts:
    """Measure the components of labels (x, y, z), uint8, with ``spacing`` in mm; background is one
    of the classes.
    """
    wholes, _ = components(prediction > 0)
    rows = [np.zeros((0, 4), np.int64)]
    for value, box in enumerate(ndimage.find_objects(prediction, num_classes - 1), start=1):
        if box is None:
            continue
        parts, sizes = components(prediction[box] == value)
        inside = parts > 0
        of_whole = np.zeros(len(sizes), np.int64)
        of_whole[parts[inside]] = wholes[box][inside]
        common = np.bincount(parts[inside & (reference[box] == value)], minlength=len(sizes))
        rows.append(np.column_stack([np.full(len(sizes), value), of_whole, sizes, common])[1:])
    in_reference = np.bincount(reference.ravel("K"), minlength=num_classes)[1:]
    return Parts(*np.concatenate(rows).T, in_reference, math.prod(map(float, spacing)))


@dataclass(frozen=True)
class Step:
    """A removal that was tried.

    Attributes:
        what: is removed, for people.
        before, after: Dice that decided, of all classes or of one; None where it is not defined.
    """

    what: str
    before: float | None
    after: float | None
    kept: bool


def class_means(cases: Sequence[Parts], postprocessing: Postprocessing) -> np.ndarray:
    """Return each foreground class's mean Dice over the cases, NaN for one that is nowhere."""
    return mean(np.array([case.dice(postprocessing) for case in cases]))


def mean(values: np.ndarray) -> np.ndarray:
    """Average over the first axis what is defined; NaN where nothing is."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(0) / defined.sum(0)


@dataclass(frozen=True)
class Choice:
    """What is removed from segmentations, and why.

    Attributes:
        chosen: what the cases of all folds choose; nothing, where that harms.
        steps: that were tried; none is kept where they harm.
        expected: each class's mean Dice if each fold's cases have what the others choose:
            `chosen_on_others`.
        harms: whether that is on average below the Dice of segmentations from which nothing is
            removed.
    """

    chosen: Postprocessing
    steps: list[Step]
    expected: np.ndarray
    harms: bool


def choose_checked(folds: Sequence[Sequence[Parts]], class_names: Sequence[str]) -> Choice:
    """Choose what is removed from the segmentations of all folds, unless what the other folds
    choose harms a fold's.

    A choice that helps the cases that it was made on, and harms others, would harm new ones.
    """
    cases, nothing = (
        [case for of_fold in folds for case in of_fold],
        Postprocessing.nothing(class_names),
    )
    tried, steps = choose(cases, class_names)
    expected = chosen_on_others(folds, class_names)
    harms = bool(tried.removes and mean(expected) < mean(class_means(cases, nothing)))
    if harms:
        tried, steps = nothing, [replace(step, kept=False) for step in steps]
    return Choice(tried, steps, expected, harms)


def choose(cases: Sequence[Parts], class_names: Sequence[str]) -> tuple[Postprocessing, list[Step]]:
    """Choose what is removed from segmentations, and tell what was tried.

    Args:
        class_names: background first.
    """
    chosen, steps = Postprocessing.nothing(class_names), []
    before = class_means(cases, chosen)
    if len(before) > 1:
        tried = replace(chosen, largest_foreground=True)
        after = class_means(cases, tried)
        helps = bool(mean(after) > mean(before) and not (after < before).any())
        steps.append(
            _step(
                "all but the largest component of all classes together",
                mean(before),
                mean(after),
                helps,
            )
        )
        chosen, before = (tried, after) if helps else (chosen, before)
    for number, name in enumerate(class_names[1:]):
        tried = _with_rule(chosen, number, largest=True)
        after = class_means(cases, tried)[number]
        helps = bool(after > before[number])
        steps.append(
            _step(f"all but the largest component of {name}", before[number], after, helps)
        )
        if helps:
            chosen, before[number] = tried, after
    for number, name in enumerate(class_names[1:]):
        volumes = volumes_of(cases, number + 1, chosen)
        candidates = [_with_rule(chosen, number, min_volume_mm3=volume) for volume in volumes]
        if not candidates:
            continue
        means = [class_means(cases, candidate)[number] for candidate in candidates]
        # the smallest volume of equally good ones
        best = int(np.argmax(np.nan_to_num(means, nan=-1)))
        helps = bool(means[best] > before[number])
        steps.append(
            _step(
                f"components of {name} below {volumes[best]:g} mm3",
                before[number],
                means[best],
                helps,
            )
        )
        chosen = candidates[best] if helps else chosen
    return chosen, steps


def _with_rule(postprocessing: Postprocessing, number: int, **changes: object) -> Postprocessing:
    rules = list(postprocessing.rules)
    rules[number] = replace(rules[number], **changes)
    return replace(postprocessing, rules=tuple(rules))


def _step(what: str, before: float, after: float, kept: bool) -> Step:
    return Step(
        what, *(float(value) if math.isfinite(value) else None for value in (before, after)), kept
    )


def volumes_of(cases: Sequence[Parts], label: int, chosen: Postprocessing) -> list[float]:
    """List the minimal volumes that are tried for a class, in mm3: 1, 2, 5, 10, ... (or 0.1, ...,
    if voxels are small).

    They begin above the smallest component that is left by what is chosen already. None is above
    the smallest volume that the class has in a reference which has it, so that nothing is removed
    that could be all of it.
    """
    predicted = [
        size * case.voxel_mm3
        for case in cases
        for size in case.size[case.kept(chosen) & (case.label == label)]
    ]
    references = [
        case.reference[label - 1] * case.voxel_mm3 for case in cases if case.reference[label - 1]
    ]
    if not predicted or not references:
        return []
    low, high = min(predicted), min(references)
    return [volume for volume in _ladder(low, high) if low < volume <= high]


def _ladder(low: float, high: float) -> Iterator[float]:
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        yield from (float(f"{step}e{power}") for step in LADDER)


def chosen_on_others(folds: Sequence[Sequence[Parts]], class_names: Sequence[str]) -> np.ndarray:
    """Return each class's mean Dice if each fold's cases have what the others choose.

    What all cases choose is a little too good on these same cases; this is what to expect of new
    ones.
    """
    dice = []
    for number, cases in enumerate(folds):
        others = [
            case for other, of_other in enumerate(folds) if other != number for case in of_other
        ]
        chosen, _ = choose(others, class_names)
        dice += [case.dice(chosen) for case in cases]
    return mean(np.array(dice))
