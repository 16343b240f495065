"""Components that are removed from a segmentation, as ``postprocessing.json`` says."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from dints.errors import UserError
from dints.evaluation.lesions import TOUCHING

ROUNDING = 1e-5  # of volumes: headers of one grid may differ by so much


@dataclass(frozen=True)
class Rule:
    """What is removed of a class.

    Attributes:
        largest: all but its largest component; of several that are equally large none is removed.
        min_volume_mm3: components of a smaller volume, also the largest.
    """

    largest: bool = False
    min_volume_mm3: float = 0.0


@dataclass(frozen=True)
class Postprocessing:
    """What is removed from segmentations of a task; a removed voxel becomes background.

    Components have 26 neighbours, as in nnU-Net. What is done to one class is nothing to another.

    Attributes:
        class_names: of the labels, background first.
        largest_foreground: first, all but the largest component of all classes together are
            removed.
        rules: what is then removed of each class, the first one being that of label 1.
    """

    class_names: tuple[str, ...]
    largest_foreground: bool
    rules: tuple[Rule, ...]

    @classmethod
    def nothing(cls, class_names: Sequence[str]) -> Postprocessing:
        """Return what leaves segmentations as they are."""
        return cls(tuple(class_names), False, (Rule(),) * (len(class_names) - 1))

    @property
    def removes(self) -> bool:
        """Whether it does anything."""
        return self != self.nothing(self.class_names)

    def apply(self, labels: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """Return new labels (x, y, z), uint8, without the removed components.

        Args:
            spacing: mm between voxels along each axis of the array.
        """
        if not self.removes:
            return labels
        labels, voxel_mm3 = labels.copy(order="K"), math.prod(map(float, spacing))
        if self.largest_foreground:
            _remove(labels, labels > 0, Rule(largest=True), voxel_mm3)
        for value, box in enumerate(ndimage.find_objects(labels, len(self.rules)), start=1):
            rule = self.rules[value - 1]
            if box is not None and rule != Rule():
                _remove(labels[box], labels[box] == value, rule, voxel_mm3)
        return labels

    def to_dict(self) -> dict:
        """Return plain values; `from_dict` is the inverse."""
        background, *names = self.class_names
        return {
            "background": background,
            "largest_foreground": self.largest_foreground,
            "classes": {n: asdict(rule) for n, rule in zip(names, self.rules, strict=True)},
        }

    @classmethod
    def from_dict(cls, content: object) -> Postprocessing:
        """Read what `to_dict` gave; further keys are let pass.

        Raises:
            ValueError: it is malformed.
        """
        content = content if isinstance(content, dict) else {}
        classes, background, whole = (
            content.get(key) for key in ("classes", "background", "largest_foreground")
        )
        if not isinstance(classes, dict):
            raise ValueError("it has no object 'classes'")
        if not isinstance(background, str) or not isinstance(whole, bool):
            raise ValueError("'background' must be a name, and 'largest_foreground' true or false")
        rules = []
        for name, rule in classes.items():
            if not isinstance(rule, dict) or rule.keys() != asdict(Rule()).keys():
                raise ValueError(f"class {name!r} must have 'largest' and 'min_volume_mm3' alone")
            largest, volume = rule["largest"], rule["min_volume_mm3"]
            is_volume = type(volume) in (int, float) and 0 <= volume < math.inf
            if not isinstance(largest, bool) or not is_volume:
                raise ValueError(f"class {name!r} must have true or false, and a volume in mm3")
            rules.append(Rule(largest, float(volume)))
        return cls((background, *classes), whole, tuple(rules))


def read(path: str | Path, class_names: Sequence[str]) -> Postprocessing:
    """Read the file that `dints.evaluation.cross_validation` writes.

    Args:
        class_names: of the model, background first.

    Raises:
        UserError: it is missing or malformed, or of other classes.
    """
    try:
        found = Postprocessing.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(
            f"--postprocessing {path} cannot be read ({error.strerror}): give the "
            "postprocessing.json that train_dints.sh writes with FOLD=each"
        ) from error
    except (ValueError, RecursionError) as error:  # also what is no JSON, or not UTF-8
        raise UserError(
            f"--postprocessing {path} is malformed ({error}): fix it, or make it again"
        ) from error
    if found.class_names != tuple(class_names):
        raise UserError(
            f"--postprocessing {path} is of the classes {', '.join(found.class_names)}, and the "
            f"model segments {', '.join(class_names)}: give the one of this model's folds"
        )
    return found


def components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the components of a bool mask (x, y, z) from 1; return them, and voxels of each."""
    parts, count = ndimage.label(mask, TOUCHING)
    sizes = np.bincount(parts.ravel("K"), minlength=count + 1)
    sizes[0] = 0
    return parts, sizes


def keeps(sizes: np.ndarray, rule: Rule, voxel_mm3: float) -> np.ndarray:
    """Tell of each component of a class, by its voxels, whether a rule keeps it."""
    kept = sizes * voxel_mm3 * (1 + ROUNDING) >= rule.min_volume_mm3
    return kept & (sizes == sizes.max(initial=0)) if rule.largest else kept


def _remove(labels: np.ndarray, mask: np.ndarray, rule: Rule, voxel_mm3: float) -> None:
    """Make background, in place, of the components of a mask that the rule does not keep."""
    parts, sizes = components(mask)
    kept = keeps(sizes, rule, voxel_mm3)
    kept[0] = True  # what is outside the mask
    if not kept.all():
        labels[~kept[parts]] = 0
