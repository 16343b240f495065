"""The published data recipe in MONAI's own calls: the oracle of tests and the baseline of
benchmarks.

`CacheDataset` holds what the first half makes of a case, and gives the second half a deep copy each
time.
"""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
from monai.transforms import (
    CastToTyped,
    Compose,
    CopyItemsd,
    EnsureChannelFirstd,
    EnsureTyped,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandRotated,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandZoomd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
    ToTensord,
)
from scipy import ndimage

from dints.data.listing import Case
from dints.data.tasks import Task

KEYS, MODES = ["image", "label"], ["bilinear", "nearest"]
DILATIONS = 48


def files(case: Case) -> dict:
    """Return what the recipe is given."""
    images = list(case.images)
    return {"image": images[0] if len(images) == 1 else images, "label": case.label}


def caching(task: Task, masks_type: type = float) -> Compose:
    """Make the way from `files` to what is cached: image (float32), label (uint8), and a mask for
    each class.

    The masks are float64 in the later versions of the published scripts; in the earlier ones uint8,
    as the label is.
    """
    resample = []
    if task.spacing is not None:
        resample = [Spacingd(KEYS, task.spacing, mode=MODES, align_corners=(True, True))]
    if task.intensity is not None:
        low, high = task.intensity
        intensity = ScaleIntensityRanged(
            ["image"], a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True
        )
    else:
        intensity = NormalizeIntensityd(["image"], nonzero=True, channel_wise=True)

    def class_masks(label) -> np.ndarray:
        masks = ((label == value).astype(label.dtype) for value in range(task.num_classes))
        return np.concatenate(
            [
                ndimage.binary_dilation(mask, iterations=DILATIONS).astype(masks_type)
                for mask in masks
            ]
        )

    return Compose(
        [
            LoadImaged(KEYS),
            EnsureChannelFirstd(KEYS),
            Orientationd(KEYS, axcodes="RAS", labels=None),
            *resample,
            CastToTyped(["image"], dtype=torch.float32),
            intensity,
            CastToTyped(KEYS, dtype=(np.float16, np.uint8)),
            CopyItemsd(["label"], times=1, names=["label4crop"]),
            Lambdad(["label4crop"], class_masks, overwrite=True),
            EnsureTyped(KEYS),
            CastToTyped(["image"], dtype=torch.float32),
            SpatialPadd(
                [*KEYS, "label4crop"], task.patch_size, mode=["reflect", "constant", "constant"]
            ),
        ]
    )


def sampling(task: Task) -> Compose:
    """Make the way from a copy of what is cached to a list of one patch."""
    return Compose(
        [
            RandCropByLabelClassesd(
                KEYS,
                label_key="label4crop",
                spatial_size=task.patch_size,
                ratios=[1] * task.num_classes,
                num_classes=task.num_classes,
                num_samples=1,
                warn=False,
            ),
            Lambdad(["label4crop"], lambda masks: 0),
            RandRotated(KEYS, range_x=0.3, range_y=0.3, range_z=0.3, mode=MODES, prob=0.2),
            RandZoomd(
                KEYS,
                min_zoom=0.8,
                max_zoom=1.2,
                mode=["trilinear", "nearest"],
                align_corners=[True, None],
                prob=0.16,
            ),
            RandGaussianSmoothd(
                ["image"], sigma_x=(0.5, 1.15), sigma_y=(0.5, 1.15), sigma_z=(0.5, 1.15), prob=0.15
            ),
            RandScaleIntensityd(["image"], factors=0.3, prob=0.5),
            RandShiftIntensityd(["image"], offsets=0.1, prob=0.5),
            RandGaussianNoised(["image"], std=0.01, prob=0.15),
            *(RandFlipd(KEYS, spatial_axis=axis, prob=0.5) for axis in range(3)),
            CastToTyped(KEYS, dtype=(torch.float32, torch.uint8)),
            ToTensord(KEYS),
        ]
    )


def sample(cached: dict, transforms: Compose) -> dict:
    """Make a patch of a cached case as `CacheDataset` does."""
    (patch,) = transforms(deepcopy(cached))
    return patch
