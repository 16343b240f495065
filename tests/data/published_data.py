"""The published data recipe in MONAI's calls: the oracle of tests, the baseline of benchmarks.

`CacheDataset` holds what the first half makes of a case; the second half gets a deep copy of it.
"""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
from monai import transforms as mt
from scipy import ndimage

from dints.data.listing import Case
from dints.data.tasks import Task

KEYS, MODES = ["image", "label"], ["bilinear", "nearest"]
DILATIONS = 48


def files(case: Case) -> dict:
    """Return what the recipe is given."""
    images = list(case.images)
    return {"image": images[0] if len(images) == 1 else images, "label": case.label}


def caching(task: Task, masks_type: type = float) -> mt.Compose:
    """Make the way from `files` to what is cached: image (float32), label (uint8), and a mask for
    each class.

    The masks are float64 in the later versions of the published scripts; in the earlier ones uint8,
    as the label is.
    """
    resample = []
    if task.spacing is not None:
        resample = [mt.Spacingd(KEYS, task.spacing, mode=MODES, align_corners=(True, True))]
    if task.intensity is not None:
        low, high = task.intensity
        intensity = mt.ScaleIntensityRanged(["image"], low, high, 0.0, 1.0, clip=True)
    else:
        intensity = mt.NormalizeIntensityd(["image"], nonzero=True, channel_wise=True)

    def class_masks(label) -> np.ndarray:
        grown = [
            ndimage.binary_dilation((label == value).astype(label.dtype), iterations=DILATIONS)
            for value in range(task.num_classes)
        ]
        return np.concatenate([mask.astype(masks_type) for mask in grown])

    return mt.Compose(
        [
            mt.LoadImaged(KEYS),
            mt.EnsureChannelFirstd(KEYS),
            mt.Orientationd(KEYS, axcodes="RAS", labels=None),
            *resample,
            mt.CastToTyped(["image"], dtype=torch.float32),
            intensity,
            mt.CastToTyped(KEYS, dtype=(np.float16, np.uint8)),
            mt.CopyItemsd(["label"], times=1, names=["label4crop"]),
            mt.Lambdad(["label4crop"], class_masks, overwrite=True),
            mt.EnsureTyped(KEYS),
            mt.CastToTyped(["image"], dtype=torch.float32),
            mt.SpatialPadd(
                [*KEYS, "label4crop"], task.patch_size, mode=["reflect", "constant", "constant"]
            ),
        ]
    )


def sampling(task: Task) -> mt.Compose:
    """Make the way from a copy of what is cached to a list of one patch."""
    zoom = {"mode": ["trilinear", "nearest"], "align_corners": [True, None]}
    return mt.Compose(
        [
            mt.RandCropByLabelClassesd(
                KEYS,
                label_key="label4crop",
                spatial_size=task.patch_size,
                ratios=[1] * task.num_classes,
                num_classes=task.num_classes,
                num_samples=1,
                warn=False,
            ),
            mt.Lambdad(["label4crop"], lambda masks: 0),
            mt.RandRotated(KEYS, range_x=0.3, range_y=0.3, range_z=0.3, mode=MODES, prob=0.2),
            mt.RandZoomd(KEYS, 0.16, 0.8, 1.2, **zoom),
            mt.RandGaussianSmoothd(["image"], *[(0.5, 1.15)] * 3, prob=0.15),
            mt.RandScaleIntensityd(["image"], factors=0.3, prob=0.5),
            mt.RandShiftIntensityd(["image"], offsets=0.1, prob=0.5),
            mt.RandGaussianNoised(["image"], std=0.01, prob=0.15),
            *(mt.RandFlipd(KEYS, spatial_axis=axis, prob=0.5) for axis in range(3)),
            mt.CastToTyped(KEYS, dtype=(torch.float32, torch.uint8)),
            mt.ToTensord(KEYS),
        ]
    )


def sample(cached: dict, transforms: mt.Compose) -> dict:
    """Make a patch of a cached case as `CacheDataset` does."""
    (patch,) = transforms(deepcopy(cached))
    return patch
