"""What a user lets pass in files that would be refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Leniency:
    """What a user lets pass in files that would be refused.

    Attributes:
        trust_shapes: an affine of a label other than its image's; the image's is taken.
        replace_nonfinite: NaN and infinite voxels of images; they become this value.
    """

    trust_shapes: bool = False
    replace_nonfinite: float | None = None
