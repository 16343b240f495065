"""Segment CT or MRI with the network in model.onnx, beside this file.

    python predict_onnx.py scan.nii.gz segmentation.nii.gz
    python predict_onnx.py case_0000.nii.gz case_0001.nii.gz segmentation.nii.gz  # per channel

It needs numpy, nibabel and onnxruntime, and nothing of the scripts that the network was trained
with. What is done to an image before the network sees it stands in model.onnx, as JSON. Volumes are
arrays of (x, y, z, channels).
"""

import json
import sys
import zlib
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import onnxruntime

MM = {1: 1000.0, 3: 0.001}  # of a header's code of a unit: metre and micrometre; all else is mm
SAME = 1e-3  # differences of sizes in mm, or of affines, that count as none
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)


def main(*paths):
    if len(paths) < 2:
        sys.exit(__doc__)
    *images, output = paths
    labels, first = segment(images, Path(__file__).with_name("model.onnx")), nib.load(images[0])
    result = nib.Nifti1Image(labels, first.affine)
    result.set_qform(*first.get_qform(coded=True))
    result.set_sform(*first.get_sform(coded=True))
    result.header["xyzt_units"] = int(first.header["xyzt_units"]) & 7
    nib.save(result, output)


def segment(paths, model):
    """Return the label of each voxel (x, y, z), uint8, of an image on its own grid."""
    session = onnxruntime.InferenceSession(
        str(model), providers=onnxruntime.get_available_providers()
    )
    facts = json.loads(session.get_modelmeta().custom_metadata_map["dints"])
    voxels, affine = read(paths, facts["num_channels"])
    turn = nib.io_orientation(affine)  # which axis becomes which of RAS, and which ones flip
    turned = nib.apply_orientation(voxels, turn)
    affine = affine @ nib.orientations.inv_ornt_aff(turn, voxels.shape[:3])
    shape, matrix = grid(turned.shape[:3], affine, facts["spacing"])
    image = normalised(resampled(turned, matrix, shape), facts["intensity"])
    probabilities = blended(
        image, session, np.array(facts["patch_size"]), facts["overlap"], len(facts["class_names"])
    )
    probabilities = resampled(probabilities, np.linalg.inv(matrix), turned.shape[:3])
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turn)
    return nib.apply_orientation(probabilities.argmax(-1).astype(np.uint8), back)


def read(paths, num_channels):
    """Return the voxels of all files together, float32, and the affine of the first one in mm."""
    files, voxels = zip(*map(read_file, paths), strict=True)
    voxels = np.concatenate(voxels, -1)
    if voxels.shape[3] != num_channels or not np.isfinite(voxels).all():
        sys.exit(
            f"{paths[0]}: give {num_channels} channels of finite voxels, not {voxels.shape[3]}"
        )
    affine = files[0].affine.astype(float)
    affine[:3] *= MM.get(int(files[0].header["xyzt_units"]) & 7, 1.0)
    return voxels, affine


def read_file(path):
    """Return a file as nibabel has it, and its voxels."""
    try:
        file = nib.load(path)
        source, header = file.dataobj, file.header
        if getattr(header, "is_single", False) and source.offset < header.single_vox_offset:
            # 0 says that voxels follow the header; nibabel would read the header as voxels.
            scale = source.slope, source.inter
            place = source.shape, source.dtype, header.single_vox_offset, *scale
            source = nib.arrayproxy.ArrayProxy(file.get_filename(), place)
        return file, np.asarray(source, np.float32).reshape(*file.shape[:3], -1)
    except DAMAGED as error:
        sys.exit(f"{path} cannot be read: {' '.join(str(error).split())}")


def grid(shape, affine, spacing):
    """Return the shape of MONAI's grid of a spacing in mm, and its matrix to a volume's indices."""
    if spacing is None:
        return shape, np.eye(4)
    axes, shape_before = affine[:3, :3], np.array(shape)
    own = np.linalg.norm(axes, axis=0)
    sizes = np.where(np.abs(own - spacing) <= SAME, own, spacing)
    new = affine.copy()
    new[:3, :3] = axes @ np.linalg.inv(np.linalg.cholesky(axes.T @ axes).T) * sizes  # without shear
    corners = np.indices((2, 2, 2)).reshape(3, 8) * (shape_before[:, None] - 1)
    corners = np.linalg.solve(new[:3, :3], axes @ corners)
    shape = np.round(np.ptp(corners, 1) + 1).astype(int)
    # the first voxel is not the lowest along all axes: middle on middle
    if not np.allclose(corners.min(1), 0):
        new[:3, 3] += (axes @ shape_before - new[:3, :3] @ shape) / 2
    matrix = np.linalg.solve(affine, new)
    is_same = np.allclose(new, affine, atol=SAME) or np.allclose(matrix, np.eye(4), atol=SAME)
    return tuple(shape.tolist()), np.eye(4) if is_same and (shape == shape_before).all() else matrix


def resampled(volume, matrix, shape):
    """Interpolate linearly where ``matrix`` places the indices of a grid of ``shape``."""
    if (matrix == np.eye(4)).all():
        return volume
    result, last = np.empty((*shape, volume.shape[3]), np.float32), np.array(volume.shape[:3]) - 1
    plane = np.indices((1, *shape[1:])).reshape(3, -1)
    for x in range(shape[0]):  # plane by plane, which needs little memory
        places = (matrix[:3, :3] @ (plane + [[x], [0], [0]]) + matrix[:3, 3:]).T.clip(0, last)
        low = np.floor(places).astype(int)
        high, share, total = np.minimum(low + 1, last), places - low, 0.0
        for corner in product((False, True), repeat=3):
            i, j, k = np.where(corner, high, low).T
            total += np.where(corner, share, 1 - share).prod(1)[:, None] * volume[i, j, k]
        result[x] = total.reshape(result.shape[1:])
    return result


def normalised(image, intensity):
    """Map a CT window to 0..1, clipped; without one, z-score each channel's non-zero voxels."""
    if intensity is not None:
        return ((image - intensity[0]) / (intensity[1] - intensity[0])).clip(0, 1)
    image = image.copy()
    for channel in np.moveaxis(image, -1, 0):
        values = channel[channel != 0].astype(np.float64)
        if len(values):
            channel[channel != 0] = (values - values.mean()) / (values.std() or 1)
    return image


def blended(image, session, patch, overlap, num_classes):
    """Return class probabilities, from overlapping windows whose middle counts most."""
    missing = np.maximum(patch - image.shape[:3], 0)
    before, after = missing // 2, missing - missing // 2
    mode = "reflect" if (after < image.shape[:3]).all() else "edge"
    padded = np.pad(image, [*zip(before, after, strict=True), (0, 0)], mode)
    gauss = [
        np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (size / 8)) ** 2) for size in patch
    ]
    weights = np.maximum(np.einsum("x,y,z", *gauss), 1e-3).astype(np.float32)[..., None]
    counts = np.zeros((*padded.shape[:3], 1), np.float32)
    scores = counts.repeat(num_classes, -1)
    steps = np.maximum((patch * (1 - overlap)).astype(int), 1)
    ends = np.array(padded.shape[:3]) - patch
    for start in product(
        *(range(0, end + step, step) for end, step in zip(ends, steps, strict=True))
    ):
        start = np.minimum(start, ends)
        window = tuple(slice(*along) for along in zip(start, start + patch, strict=True))
        of_window = session.run(
            None, {"image": np.ascontiguousarray(np.moveaxis(padded[window], -1, 0)[None])}
        )[0][0]
        scores[window] += np.moveaxis(of_window, 0, -1) * weights
        counts[window] += weights
    inside = tuple(
        slice(first, first + size) for first, size in zip(before, image.shape[:3], strict=True)
    )
    scores = scores[inside] / counts[inside]
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
