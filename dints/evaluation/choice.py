"""The choice of post-processing: a removal is kept if it helps the Dice of cases out of fold.

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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from dints.evaluation.postprocessing import Postprocessing, Rule, components, keeps

LADDER = (1, 2, 5)  # times powers of 10: minimal volumes, in mm3


@dataclass(frozen=True)
class Parts:
    """The components of a case's segmentation, from which its Dice follows, whichever are removed.

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
            wholes = np.bincount(self.whole, self.size)
            kept &= keeps(wholes, Rule(largest=True), self.voxel_mm3)[self.whole]
        for value, rule in enumerate(postprocessing.rules, start=1):
            of_class = np.flatnonzero(kept & (self.label == value))
            kept[of_class] = keeps(self.size[of_class], rule, self.voxel_mm3)
        return kept

    def dice(self, postprocessing: Postprocessing) -> np.ndarray:
        """Return each class's Dice as nnU-Net has it: NaN where it is in neither, 0 in one only."""
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
    """Measure components of labels (x, y, z), uint8; ``spacing`` in mm, classes with background."""
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
    """Choose what is removed, unless the other folds' choice harms the cases of a fold.

    A choice that helps the cases that it was made on, and harms others, would harm new ones.
    """
    cases = [case for of_fold in folds for case in of_fold]
    nothing = Postprocessing.nothing(class_names)
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
        what = "all but the largest component of all classes together"
        steps.append(_step(what, mean(before), mean(after), helps))
        chosen, before = (tried, after) if helps else (chosen, before)
    for number, name in enumerate(class_names[1:]):
        tried = _with_rule(chosen, number, largest=True)
        after = class_means(cases, tried)[number]
        helps = bool(after > before[number])
        what = f"all but the largest component of {name}"
        steps.append(_step(what, before[number], after, helps))
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
        what = f"components of {name} below {volumes[best]:g} mm3"
        steps.append(_step(what, before[number], means[best], helps))
        chosen = candidates[best] if helps else chosen
    return chosen, steps


def _with_rule(postprocessing: Postprocessing, number: int, **changes: object) -> Postprocessing:
    rules = list(postprocessing.rules)
    rules[number] = replace(rules[number], **changes)
    return replace(postprocessing, rules=tuple(rules))


def _step(what: str, before: float, after: float, kept: bool) -> Step:
    return Step(what, none_for_nan(before), none_for_nan(after), kept)


def none_for_nan(value: float) -> float | None:
    """Return a value as JSON has it."""
    return float(value) if math.isfinite(value) else None


def volumes_of(cases: Sequence[Parts], label: int, chosen: Postprocessing) -> list[float]:
    """List the minimal volumes to try for a class in mm3: ..., 0.5, 1, 2, 5, 10, ...

    They begin above the smallest component that is left by what is chosen already. None is above
    the smallest volume that the class has in a reference which has it, so that nothing is removed
    that could be all of it.
    """
    predicted, references = [], []
    for case in cases:
        sizes = case.size[case.kept(chosen) & (case.label == label)]
        predicted += [size * case.voxel_mm3 for size in sizes]
        if case.reference[label - 1]:
            references.append(case.reference[label - 1] * case.voxel_mm3)
    if not predicted or not references:
        return []
    low, high = min(predicted), min(references)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ladder = [float(f"{step}e{power}") for power in powers for step in LADDER]
    return [volume for volume in ladder if low < volume <= high]


def chosen_on_others(folds: Sequence[Sequence[Parts]], class_names: Sequence[str]) -> np.ndarray:
    """Return each class's mean Dice if each fold's cases have the other folds' choice.

    This is what to expect of new cases; a choice is a little too good on its own cases.
    """
    dice = []
    for number, cases in enumerate(folds):
        others = [*folds[:number], *folds[number + 1 :]]
        chosen, _ = choose([case for of_fold in others for case in of_fold], class_names)
        dice += [case.dice(chosen) for case in cases]
    return mean(np.array(dice))
