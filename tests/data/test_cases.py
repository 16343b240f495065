"""Cases as they are cached: in the published recipe's voxels, intensities and crop masks."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import published_data
import pytest
from monai.transforms import NormalizeIntensity
from toys import TASK, make_case, save, stored_mask

from dints.data import phantom
from dints.data.cases import normalise, prepare, preprocess_image, read_image, resampling_of
from dints.data.listing import Case

MRI = replace(TASK, modality="MRI", intensity=None)
FLOAT16 = 5e-4  # a step between 0.5 and 1


@pytest.mark.parametrize("number", [1, 2])  # their axes are stored in two ways
@pytest.mark.parametrize("task", [replace(TASK, spacing=(1.5, 3, 6)), replace(MRI, num_channels=2)])
def test_a_case_is_prepared_as_the_published_recipe_does(tmp_path, task, number):
    image, label = phantom.make_case(0, number, shape=(28, 26, 22))
    images = []
    for channel in range(task.num_channels):
        voxels = np.asarray(image.dataobj) + np.int16(1024 * channel)
        images.append(save(tmp_path / f"image_{channel}.nii.gz", voxels, image.affine))
    nib.save(label, tmp_path / "label.nii")
    case = Case("case", tuple(images), str(tmp_path / "label.nii"))
    expected = published_data.caching(task)(published_data.files(case))
    ours = prepare(case, task)
    assert ours.image.dtype == np.float16 and ours.label.dtype == np.uint8
    assert np.allclose(ours.image, expected["image"].numpy(), rtol=2 * FLOAT16, atol=FLOAT16)
    assert ours.label.any() and np.array_equal(ours.label, expected["label"][0].numpy())
    masks = [stored_mask(ours.masks, value, ours.label.shape) for value in range(task.num_classes)]
    assert np.array_equal(masks, expected["label4crop"].numpy() > 0)
    if task.spacing is not None:
        assert not np.all(masks[1:])  # the case is longer than masks grow


@pytest.mark.parametrize(("task", "spacing"), [(TASK, None), (MRI, (1.5, 1.0, 2.0))])
def test_voxels_as_read_are_not_changed(tmp_path, task, spacing):
    """They lie in the file's bytes; preprocessing makes its own."""
    case = make_case(tmp_path)
    read, replaced = read_image(case)
    assert not read.flags.writeable and not replaced
    kept = read.copy()
    prepared = preprocess_image(read, resampling_of(case, replace(task, spacing=spacing)), task)
    assert not np.shares_memory(prepared, read) and np.array_equal(read, kept)
    assert np.array_equal(kept[0], nib.load(case.images[0]).get_fdata())


def test_mri_is_a_z_score_of_each_channels_nonzero_voxels():
    rng = np.random.default_rng(1)
    moments = (500, 20), (7, 3), (0, 1), (0, 1)
    image = np.stack([rng.normal(*given, (9, 9, 9)) for given in moments]).astype(np.float32)
    image[:, :3] = 0
    image[2], image[3, 3:] = 0, 0.1  # all zero; and constant
    expected = NormalizeIntensity(nonzero=True, channel_wise=True)(image.copy())
    result = normalise(image.copy(), MRI)
    assert result.dtype == np.float32 and np.allclose(result, expected, rtol=0, atol=1e-4)
    assert (result[:, :3] == 0).all() and (result[2:] == 0).all()
    for channel in range(2):
        values = image[channel, 3:]
        z_score = (values - values.mean()) / values.std()
        assert np.allclose(result[channel, 3:], z_score, atol=1e-4)
