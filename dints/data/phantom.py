"""Write Task00_Phantom, a CT-like dataset in MSD layout, to try all commands without a download.

    python -m dints.data.phantom --root data_msd/Task00_Phantom --num_training 16 --num_test 4
    --seed 0

Each case is a toy abdomen of ellipsoids with a liver (label 1) and the lesions in it (label 2; one
case in eight has none). Spleen, kidneys, bowel and cysts have the HU of either, but are background:
a threshold does not solve the task. All of it is placed in mm and sampled at each case's own shape,
spacing and orientation.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from dints.data.tasks import TASKS
from dints.errors import UserError, exit_on_user_error

log = logging.getLogger(__name__)

VERSION = 2  # of the recipe: a phantom of another one is replaced
OWN_FILES = r"dataset\.json|(imagesTr|labelsTr|imagesTs)(/phantom_\w+\.nii\.gz)?"
MIN_SIZE, MAX_VOXELS = 16, 2**27  # voxels of an axis; of a volume
# One is mirrored, as in scanner data
ORIENTATIONS = ("RAS", "RAS", "LPS", "RAS", "RAS", "LAS", "RAS", "RAS")
LESION_FREE_EVERY = 8
LIVER, LESION = 1, 2

# Centres and radii in mm (x to the right, y forward, z up; cylinders have no z), and HU or their
# range.
FIELD_OF_VIEW = (120, 104, 112)
AIR, FAT, LIVER_HU, LESION_HU = -1000, -100, (54, 66), (22, 38)
CAVITY = (0, 0), (41, 30)
# Skin, fat, muscle
TRUNK = (((0, 0), (52, 41), 10), ((0, 0), (50, 39), FAT), ((0, 0), (47, 36), 52), (*CAVITY, FAT))
# Shell, marrow, canal
SPINE = (((0, -25), (10, 8), 380), ((0, -25), (8, 6), 170), ((0, -32), (4, 3), 30))
ORGANS = (
    ((23, -14, -17), (8, 7, 15), LESION_HU),  # kidneys
    ((-23, -14, -12), (8, 7, 15), LESION_HU),
    ((-31, -8, 6), (10, 15, 17), LIVER_HU),  # spleen
    ((-18, 14, 8), (13, 10, 16), (25, 60)),  # stomach
    ((14, 18, -20), (6, 7, 9), LESION_HU),  # gallbladder
)
LOBES = ((22, 2, 2), (21, 25, 25)), ((2, 13, 7), (21, 11, 13))  # of the liver

XYZ = Sequence[float] | None


def write_phantom(
    root: str | Path,
    num_training: int = 16,
    num_test: int = 4,
    seed: int = 0,
    shape: XYZ = None,
    spacing: XYZ = None,
) -> Path:
    """Write the dataset into ``root``, unless the same one is there, and return ``root``.

    Raises:
        UserError: a bad argument, a folder that holds anything but a phantom, or a disk that cannot
            be written.
    """
    root = Path(root)
    _check(num_training, num_test, seed, shape, spacing)
    description = _describe(num_training, num_test, seed=seed, shape=shape, spacing=spacing)
    try:
        found = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or none of ours
        found = None
    files = [path for case in description["training"] for path in case.values()]
    files += description["test"]
    if found == description and all((root / file).is_file() for file in files):
        log.info("%s is complete: nothing to do", root)
        return root
    _refuse_foreign(root, found)
    partial = root.with_name(f"{root.name}.{os.getpid()}.partial")
    try:
        _write(partial, description)
        if root.exists():
            log.info("%s held another or an incomplete phantom: replaced", root)
            shutil.rmtree(root)
        partial.rename(root)
    except OSError as error:
        raise UserError(
            f"--root {root} cannot be written ({error}): name another folder or free some space"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("%s: %d training and %d test cases written", root, num_training, num_test)
    return root


def _check(num_training: int, num_test: int, seed: int, shape: XYZ, spacing: XYZ) -> None:
    least = ("num_training", num_training, 2), ("num_test", num_test, 0), ("seed", seed, 0)
    for flag, value, smallest in least:
        if value < smallest:
            raise UserError(f"--{flag} is {value}: it must be at least {smallest}")
    if shape is not None and (min(shape) < MIN_SIZE or math.prod(shape) > MAX_VOXELS):
        needed = f"three counts of at least {MIN_SIZE}, of at most {MAX_VOXELS} voxels in all"
        raise UserError(f"--shape is {' '.join(map(str, shape))}: {needed}")
    if spacing is not None and not all(0.3 <= size <= 6 for size in spacing):
        given = " ".join(map(str, spacing))
        raise UserError(f"--spacing is {given}: three sizes of 0.3 to 6 mm are needed")


def _describe(num_training: int, num_test: int, **recipe: int | XYZ) -> dict:
    """Return the content of dataset.json as a reader gets it back: with lists for tuples."""
    names = [f"phantom_{case:03d}.nii.gz" for case in range(num_training)]
    classes = enumerate(TASKS["Task00_Phantom"].class_names)
    counts = {"num_training": num_training, "num_test": num_test}
    description = {
        "name": "Phantom",
        "licence": "CC0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "description": "Synthetic CT-like abdomens: liver and liver lesions. Not for clinical use.",
        "labels": {str(value): name for value, name in classes},
        "numTraining": num_training,
        "numTest": num_test,
        "training": [
            {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names
        ],
        "test": [f"./imagesTs/phantom_test_{case:03d}.nii.gz" for case in range(num_test)],
        "phantom": {"version": VERSION, **counts, **recipe},
    }
    return json.loads(json.dumps(description))


def _refuse_foreign(root: Path, found: object) -> None:
    """Raise where ``root``, with ``found`` in its dataset.json, holds anything of others."""
    own = OWN_FILES if isinstance(found, dict) and "phantom" in found else ""
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*"))]
    foreign = [name for name in names if not re.fullmatch(own, name)]
    if root.is_symlink() or root.is_file():
        raise UserError(f"--root {root} is not a plain folder: name another one")
    if foreign:
        raise UserError(
            f"--root {root} holds {foreign[0]}, which is not a phantom's: name another folder"
        )


def _write(folder: Path, description: dict) -> None:
    """Write cases and dataset.json into the new ``folder``."""
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    cases = [("Tr", case, paths.values()) for case, paths in enumerate(description["training"])]
    cases += [("Ts", case, [path]) for case, path in enumerate(description["test"])]
    seed, shape, spacing = (description["phantom"][key] for key in ("seed", "shape", "spacing"))
    for split, case, paths in tqdm(cases, desc="phantom", unit="case", disable=None):
        # Or image alone
        for volume, path in zip(make_case(seed, case, split, shape, spacing), paths, strict=False):
            nib.save(volume, folder / path)
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def make_case(
    seed: int, case: int, split: str = "Tr", shape: XYZ = None, spacing: XYZ = None
) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Make image (int16, HU) and label (uint8) number ``case`` of a split, ``Tr`` or ``Ts``.

    Where ``shape`` or ``spacing`` (mm) is given, a child's trunk decides the other; the anatomy is
    scaled to both.
    """
    rng = np.random.default_rng([seed, ("Tr", "Ts").index(split), case])
    scale, (pixel, thickness) = rng.uniform(0.94, 1.06, 3), rng.uniform((1.68, 1.6), (2.16, 2.33))
    if spacing is None:
        spacing = (pixel, pixel, thickness) if shape is None else np.divide(FIELD_OF_VIEW, shape)
    if shape is None:
        shape = np.ceil(np.divide(FIELD_OF_VIEW, spacing))
    else:
        scale *= np.min(np.multiply(shape, spacing) / FIELD_OF_VIEW)
    shape, spacing = np.array(shape, int), np.round(spacing, 3)
    # The number, not a draw, decides whether there is a lesion, so that a small dataset has a case
    # of each kind.
    num_lesions = rng.integers(1, 4) * (case % LESION_FREE_EVERY != seed % LESION_FREE_EVERY)
    hounsfield, label = _draw_anatomy(rng, shape, spacing / scale, num_lesions)
    # A scanner blurs, and its noise is correlated.
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 1.0 / spacing)
    blurred = ndimage.gaussian_filter(hounsfield, 0.7 / spacing)
    image = blurred + rng.uniform(13, 20) / noise.std() * noise
    image = np.rint(image).clip(-1024, 3071).astype(np.int16)
    affine = nib.affines.from_matvec(np.diag(spacing), -(shape - 1) / 2 * spacing)
    orientation = nib.orientations.axcodes2ornt(ORIENTATIONS[case % len(ORIENTATIONS)])
    volumes = [
        nib.Nifti1Image(voxels, affine).as_reoriented(orientation) for voxels in (image, label)
    ]
    for volume in volumes:
        volume.header.set_xyzt_units("mm")
    return tuple(volumes)


def _draw_anatomy(
    rng: np.random.Generator, shape: np.ndarray, step: np.ndarray, num_lesions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw HU, without noise, and label of a patient in RAS order, at voxels of ``step`` mm."""
    points = np.ix_(
        *((np.arange(n) - (n - 1) / 2) * size for n, size in zip(shape, step, strict=True))
    )
    # Surfaces are uneven by 1 mm: a random cubic B-spline with nodes 7 mm apart, whatever the
    # voxels are.
    nodes = 3 * rng.standard_normal((24, 24, 24), dtype=np.float32)
    start = 11.5 - (shape - 1) / 2 * step / 7
    uneven = ndimage.affine_transform(
        nodes, step / 7, start, tuple(shape), mode="grid-wrap", prefilter=False
    )

    def ellipsoid(centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        level = sum(((p - c) / r) ** 2 for p, c, r in zip(points, centre, radii, strict=False))
        return level + 2 / min(radii) * uneven < 1

    hounsfield = np.full(shape, AIR, np.float32)
    for centre, radii, value in TRUNK + SPINE:
        hounsfield[ellipsoid(centre, radii)] = value
    inside = ellipsoid(*CAVITY) & (hounsfield == FAT)  # organs take the place of fat alone
    hounsfield[inside & (uneven > -0.2)] = rng.uniform(30, 55)  # bowel
    cysts = [
        (rng.uniform((-36, -15, -40), (5, 25, 20)), rng.uniform(4, 9, 3), LESION_HU)
        for _ in range(5)
    ]
    for centre, radii, hu in (*cysts, *ORGANS):
        organ = inside & ellipsoid(
            centre + rng.uniform(-3, 3, 3), radii * rng.uniform(0.85, 1.15, 3)
        )
        hounsfield[organ] = rng.uniform(*hu)

    shift, size = rng.uniform(-3, 3, 3), rng.uniform(0.88, 1.12, 3)
    (right, radii), left = [(centre + shift, radii * size) for centre, radii in LOBES]
    liver = inside & (ellipsoid(right, radii) | ellipsoid(*left))
    hounsfield[liver], label = rng.uniform(*LIVER_HU), LIVER * liver.astype(np.uint8)
    for _ in range(num_lesions):
        direction = rng.standard_normal(3)
        centre = right + rng.uniform(0.2, 0.6) * radii * direction / np.linalg.norm(direction)
        lesion = liver & ellipsoid(centre, rng.uniform(5, 9) * rng.uniform(0.8, 1.2, 3))
        hounsfield[lesion], label[lesion] = rng.uniform(*LESION_HU), LESION
    return hounsfield, label


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dints.data.phantom",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, xyz = parser.add_argument, {"nargs": 3, "metavar": ("X", "Y", "Z")}
    add("--root", default="data_msd/Task00_Phantom", help="folder to write (default: %(default)s)")
    add("--num_training", type=int, default=16, help="labelled cases (default: %(default)s)")
    add("--num_test", type=int, default=4, help="unlabelled cases (default: %(default)s)")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--shape", type=int, help="voxels of every case (default: 48 to 72 an axis)", **xyz)
    add("--spacing", type=float, help="voxel size in mm (default: about 1.6 to 2.3)", **xyz)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_phantom(**vars(parse_args(argv)))


if __name__ == "__main__":
    exit_on_user_error(main)
