"""Write Task00_Phantom, a CT-like dataset in MSD layout, so that every command can be tried without a download.

    python -m dints.data.phantom --root data_msd/Task00_Phantom --num_training 16 --num_test 4 --seed 0

Each case is a toy abdomen: a trunk with fat, muscle, ribs, spine, lungs, bowel and kidneys, a liver (label 1) and the
lesions inside it (label 2; one case in eight has none). Spleen, muscle, gallbladder, kidneys and cysts look like one of
the two in HU but are background, so that a threshold does not solve the task. The anatomy is defined in mm and sampled
at each case's own shape, spacing and orientation: an organ's size does not depend on the voxels.
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
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from dints.data.tasks import TASKS
from dints.errors import UserError, exit_on_user_error

log = logging.getLogger(__name__)

LIVER, LESION = 1, 2
VERSION = 1  # of the recipe below: a folder written by another one is written anew
MIN_SIZE, MAX_VOXELS = 16, 2**27  # voxels of an axis; of a volume (some 65 bytes each while it is made)

# Field of view in mm of the unscaled anatomy; a shorter one cuts the trunk, but must hold the liver.
FIELD_OF_VIEW, LIVER_HEIGHT = (118.0, 98.0, 108.0), 80.0
# A few cases are not RAS, one of them mirrored, as in scanner data.
ORIENTATIONS = ("RAS", "RAS", "LPS", "RAS", "RAS", "LAS", "RAS", "RAS")
LESION_FREE_EVERY = 8
OWN_FILES = r"dataset\.json|(imagesTr|labelsTr|imagesTs)/phantom_\w+\.nii\.gz"

# HU of the tissues that do not vary between patients.
AIR, GAS, LUNG, FAT, SKIN = -1000, -850, -820, -100, 10
FLUID, BLOOD, MUSCLE, DISC, MARROW, BONE = 30, 42, 52, 75, 170, 380


@dataclass(frozen=True)
class Grid:
    """Voxels of a case: their number and size in mm, and how much larger than the unscaled one its anatomy is."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    scale: float

    def axis(self, dimension: int) -> np.ndarray:
        """Voxel centres along one axis in unscaled mm, 0 at the centre of the volume."""
        count = self.shape[dimension]
        return ((np.arange(count) - (count - 1) / 2) * self.spacing[dimension] / self.scale).astype(np.float32)


@dataclass(frozen=True)
class Body:
    """A patient while it is drawn: volumes, or the values of some of their voxels.

    Attributes:
        points: x, y and z in the patient's unscaled mm, deformed.
        roughness, texture: smooth noise that makes surfaces uneven, and tissue.
        hounsfield: the canvas.
    """

    points: list[np.ndarray]
    roughness: np.ndarray
    texture: np.ndarray
    hounsfield: np.ndarray

    def within(self, mask: np.ndarray) -> Body:
        """A copy of the voxels in ``mask``."""
        return Body([p[mask] for p in self.points], self.roughness[mask], self.texture[mask], self.hounsfield[mask])


def write_phantom(
    root: str | Path,
    num_training: int = 16,
    num_test: int = 4,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
) -> Path:
    """Write the dataset, unless ``root`` already holds the same one.

    A case's voxels depend on ``seed``, its split, its number, ``shape`` and ``spacing``, not on how many are written.

    Args:
        root: the dataset's folder. One that holds anything but a phantom is left alone; another phantom is replaced.
        num_training, num_test: labelled and unlabelled cases.
        seed: of everything random.
        shape: voxels of every case; by default 48 to 72 along each axis.
        spacing: voxel size of every case in mm; by default the one at which ``shape`` covers a child-sized trunk
            (118 mm wide). With both given, the anatomy is scaled to fit the field of view.

    Returns:
        ``root``.

    Raises:
        UserError: a bad argument, a folder that is not a phantom's, or a disk that cannot be written.
    """
    root = Path(root)
    _check_arguments(num_training, num_test, seed, shape, spacing)
    parameters = {
        "version": VERSION,
        "num_training": num_training,
        "num_test": num_test,
        "seed": seed,
        "shape": None if shape is None else [int(count) for count in shape],
        "spacing": None if spacing is None else [float(size) for size in spacing],
    }
    try:
        if _is_complete(root, parameters):
            log.info("%s is complete: nothing to do", root)
            return root
        _refuse_foreign(root)
        partial = root.with_name(f"{root.name}.{os.getpid()}.partial")
        try:
            _write_dataset(partial, parameters)
            if root.exists():
                log.info("%s held another or an incomplete phantom: replaced", root)
                shutil.rmtree(root)
            partial.rename(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--root {root} cannot be written ({error}): name another folder or free some space") from error
    log.info("%s: %d training and %d test cases written", root, num_training, num_test)
    return root


def make_case(
    seed: int,
    case: int,
    split: str = "Tr",
    shape: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Image (int16, HU) and label (uint8) number ``case`` of a split, ``Tr`` or ``Ts``."""
    rng = np.random.default_rng([seed, ("Tr", "Ts").index(split), case])
    grid = _draw_grid(rng, shape, spacing)
    # The number, not a draw, decides these, so that a small dataset has some of each.
    num_lesions = 0 if case % LESION_FREE_EVERY == seed % LESION_FREE_EVERY else int(rng.integers(1, 4))
    hounsfield, label = _draw_anatomy(rng, grid, num_lesions)
    hounsfield = _scan(rng, hounsfield, grid)
    orientation = ORIENTATIONS[case % len(ORIENTATIONS)]
    return _to_nifti(hounsfield, grid, orientation), _to_nifti(label, grid, orientation)


def _check_arguments(
    num_training: int, num_test: int, seed: int, shape: Sequence[int] | None, spacing: Sequence[float] | None
) -> None:
    for flag, value, least in (("num_training", num_training, 2), ("num_test", num_test, 0), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"--{flag} is {value}: it must be at least {least}")
    if shape is not None and (len(shape) != 3 or min(shape) < MIN_SIZE or math.prod(shape) > MAX_VOXELS):
        given = " ".join(map(str, shape))
        raise UserError(
            f"--shape is {given}: three counts of at least {MIN_SIZE}, of at most {MAX_VOXELS} voxels in all"
        )
    if spacing is not None and (len(spacing) != 3 or not all(0.3 <= size <= 6 for size in spacing)):
        raise UserError(f"--spacing is {' '.join(map(str, spacing))}: three sizes of 0.3 to 6 mm are needed")


def _file_names(parameters: dict) -> tuple[list[str], list[str]]:
    """Names of the training and of the test cases."""
    training = [f"phantom_{case:03d}.nii.gz" for case in range(parameters["num_training"])]
    return training, [f"phantom_test_{case:03d}.nii.gz" for case in range(parameters["num_test"])]


def _is_complete(root: Path, parameters: dict) -> bool:
    """Whether ``root`` holds every file of the phantom that ``parameters`` describe."""
    training, test = _file_names(parameters)
    files = [f"{folder}/{name}" for folder in ("imagesTr", "labelsTr") for name in training]
    files += [f"imagesTs/{name}" for name in test]
    return _read_description(root).get("phantom") == parameters and all((root / file).is_file() for file in files)


def _read_description(root: Path) -> dict:
    """The content of ``root``'s dataset.json; empty where there is none that can be read."""
    try:
        description = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return description if isinstance(description, dict) else {}


def _refuse_foreign(root: Path) -> None:
    """Raise unless ``root`` can be replaced without losing anything that this module did not write."""
    if not root.exists() and not root.is_symlink():
        return
    remedy = "name another folder with --root, or remove it yourself"
    if not root.is_dir() or root.is_symlink():
        raise UserError(f"--root {root} exists and is not a plain folder: {remedy}")
    if any(root.iterdir()) and "phantom" not in _read_description(root):
        raise UserError(f"--root {root} holds something that is not a phantom dataset: {remedy}")
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_dir() and not re.fullmatch(OWN_FILES, name):
            raise UserError(f"--root {root} also holds {name}, which is not the phantom's: {remedy}")


def _write_dataset(folder: Path, parameters: dict) -> None:
    """Write cases and ``dataset.json`` into the new ``folder``."""
    training, test = _file_names(parameters)
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    cases = [("Tr", case, name) for case, name in enumerate(training)]
    cases += [("Ts", case, name) for case, name in enumerate(test)]
    for split, case, name in tqdm(cases, desc="phantom", unit="case", disable=None):
        image, label = make_case(parameters["seed"], case, split, parameters["shape"], parameters["spacing"])
        nib.save(image, folder / f"images{split}" / name)
        if split == "Tr":
            nib.save(label, folder / "labelsTr" / name)
    description = {
        "name": "Phantom",
        "description": "Synthetic CT-like abdomens: liver and liver lesions. Not for clinical use.",
        "reference": "dints/data/phantom.py",
        "licence": "CC0",
        "release": f"{VERSION}.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(value): name for value, name in enumerate(TASKS["Task00_Phantom"].class_names)},
        "numTraining": len(training),
        "numTest": len(test),
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in training],
        "test": [f"./imagesTs/{name}" for name in test],
        "phantom": parameters,
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _draw_grid(rng: np.random.Generator, shape: Sequence[int] | None, spacing: Sequence[float] | None) -> Grid:
    """A case's voxels; what is not given follows from a drawn field of view, so that the anatomy is whole."""
    view = np.array(FIELD_OF_VIEW) * rng.uniform(1.0, 1.06, 3)
    across, slices = rng.integers(50, 73), rng.integers(48, 73)
    scale = rng.uniform(0.94, 1.06)
    if shape is not None and spacing is not None:
        scale *= float((np.multiply(shape, spacing) / (*FIELD_OF_VIEW[:2], LIVER_HEIGHT)).min())
    elif shape is not None:
        spacing = view / shape
    elif spacing is not None:
        shape = np.maximum(np.ceil(view / spacing), MIN_SIZE)
    else:
        # Pixels are square, as in CT; slices are thicker or thinner.
        spacing = np.array([view[0] / across, view[0] / across, view[2] / slices])
        shape = (across, max(48, round(view[1] / spacing[1])), slices)
    return Grid(tuple(int(count) for count in shape), tuple(round(float(size), 3) for size in spacing), scale)


def _smooth_field(rng: np.random.Generator, grid: Grid, cell: float) -> np.ndarray:
    """A random field of mean 0 and standard deviation about 1 that varies over ``cell`` unscaled mm.

    It is a cubic B-spline over a periodic lattice of fixed size: the same at any voxel size.
    """
    nodes = 24
    field = rng.standard_normal((nodes, nodes, nodes), dtype=np.float32)
    for dimension in range(3):
        distance = grid.axis(dimension)[:, None] / cell - np.arange(nodes, dtype=np.float32)
        distance = np.abs((distance + nodes / 2) % nodes - nodes / 2)
        near, far = 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6
        # einsum, not a matrix product: BLAS rounds differently with another number of threads. Axes end up x, y, z.
        field = np.einsum("xyz,nx->yzn", field, np.where(distance < 1, near, far))
    field = np.ascontiguousarray(field)
    field *= 3  # a cubic B-spline in 3D leaves a third of white noise's deviation
    return field


def _ellipsoid(points: Sequence[np.ndarray], centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Distance from ``centre`` in units of ``radii``: below 1 inside. An infinite radius makes it a cylinder."""
    return np.sqrt(sum(((p - c) / r) ** 2 for p, c, r in zip(points, centre, radii, strict=True)))


def _tube(points: Sequence[np.ndarray], start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance in mm from the line between ``start`` and ``end``."""
    direction = end - start
    along = sum((p - s) * d for p, s, d in zip(points, start, direction, strict=True)) / (direction**2).sum()
    along = np.clip(along, 0, 1)
    return np.sqrt(sum((p - s - along * d) ** 2 for p, s, d in zip(points, start, direction, strict=True)))


def _draw_anatomy(rng: np.random.Generator, grid: Grid, num_lesions: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise-free HU (float32) and label (uint8) of one patient, in RAS order: x to the right, y forward, z up."""
    shift = rng.uniform(-4, 4, 3)
    points = [_smooth_field(rng, grid, 22) for _ in range(3)]  # the deformation that makes no two patients alike
    for dimension, point in enumerate(points):
        point *= 2.2
        point += np.expand_dims(grid.axis(dimension), [d for d in range(3) if d != dimension]) - shift[dimension]
    body = Body(points, _smooth_field(rng, grid, 7), _smooth_field(rng, grid, 4), np.full(grid.shape, AIR, np.float32))

    liver_hounsfield = rng.uniform(54, 66)
    cavity = _draw_trunk(rng, body)
    _draw_other_organs(rng, body, cavity, liver_hounsfield)
    liver, centre, radii = _draw_liver(rng, body, cavity)
    label = liver.astype(np.uint8) * LIVER
    body.hounsfield[liver], label[liver] = _draw_inside_liver(
        rng, body.within(liver), centre, radii, liver_hounsfield, num_lesions
    )
    return body.hounsfield, label


def _draw_trunk(rng: np.random.Generator, body: Body) -> np.ndarray:
    """Paint skin, fat, muscle, bones, lungs and bowel; return the mask of the abdomen, where organs may lie."""
    _, y, z = body.points
    hounsfield, texture = body.hounsfield, body.texture
    half_width, half_depth = 52 * rng.uniform(0.95, 1.05), 40 * rng.uniform(0.95, 1.05)
    radius = _ellipsoid(body.points, (0, 0, 0), (half_width, half_depth, np.inf))
    depth = (1 - radius) * (half_width + half_depth) / 2  # mm below the skin, nearly
    fat = rng.uniform(3, 6.5)

    hounsfield[depth > 0] = SKIN
    hounsfield[depth > 1.5] = FAT
    muscle = depth > fat
    hounsfield[muscle] = MUSCLE + 6 * texture[muscle]
    ribs = (depth > fat + 1) & (depth < fat + 4.5) & ((z - 0.35 * y + rng.uniform(0, 16)) % 16 < 5) & (z > -12)
    hounsfield[ribs] = BONE

    inside = depth > fat + rng.uniform(5, 7)
    diaphragm = rng.uniform(34, 40) - 26 * radius**2
    lungs = inside & (z > diaphragm)
    cavity = inside & (z < diaphragm - 1.5)
    hounsfield[inside] = MUSCLE
    hounsfield[lungs] = LUNG + 25 * texture[lungs]
    hounsfield[cavity] = FAT
    bowel = cavity & (body.roughness > -0.2)
    hounsfield[bowel] = rng.uniform(30, 55) + 8 * texture[bowel]
    hounsfield[bowel & (body.roughness > 1.4) & (y > 5)] = GAS
    return cavity


def _draw_other_organs(rng: np.random.Generator, body: Body, cavity: np.ndarray, liver_hounsfield: float) -> None:
    """Paint kidneys, spleen, stomach, cysts, spine and vessels: background, of the liver's HU or of a lesion's."""
    points, hounsfield = body.points, body.hounsfield
    for side in (-1, 1):
        hounsfield[(_ellipsoid(points, (side * 14, -22, 0), (7, 7, np.inf)) < 1) & cavity] = MUSCLE  # psoas
    for centre, radii, value in (
        ((23, -14, -16), (8, 7, 15), rng.uniform(28, 36)),  # kidneys: as a lesion
        ((-23, -14, -12), (8, 7, 15), rng.uniform(28, 36)),
        ((-31, -8, 6), (10, 15, 17), liver_hounsfield + rng.uniform(-6, 3)),  # spleen
        ((-18, 14, 8), (13, 10, 16), rng.uniform(25, 60)),  # stomach
    ):
        level = _ellipsoid(points, centre + rng.uniform(-3, 3, 3), radii * rng.uniform(0.85, 1.15, 3))
        hounsfield[cavity & (level < 1)] = value
    hounsfield[cavity & (_ellipsoid(points, (-18, 20, 8), (7, 4, 8)) < 1)] = GAS  # the stomach's
    for _ in range(rng.integers(3, 7)):
        centre = rng.uniform((-36, -15, -40), (5, 25, 20))
        cyst = cavity & (_ellipsoid(points, centre, rng.uniform(4, 9, 3)) < 1)
        hounsfield[cyst] = rng.uniform(18, 36)

    vertebra = _ellipsoid(points, (0, -24, 0), (9.5, 8, np.inf))
    disc = (points[2] + rng.uniform(0, 14)) % 14 < 3
    hounsfield[vertebra < 1] = BONE
    hounsfield[vertebra < 0.8] = MARROW
    hounsfield[(vertebra < 1) & disc] = DISC
    hounsfield[_ellipsoid(points, (0, -30, 0), (3, 3, np.inf)) < 1] = FLUID  # spinal canal
    for centre in ((-3, -12, 0), (8, -12, 0)):  # aorta and vena cava
        hounsfield[_ellipsoid(points, centre, (3.8, 3.8, np.inf)) < 1] = BLOOD


def _draw_liver(rng: np.random.Generator, body: Body, cavity: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The liver's mask, and centre and radii of its right lobe in mm; paints the gallbladder beside it."""
    centre = np.array([22.0, 2, 2]) + rng.uniform(-3, 3, 3)
    radii = np.array([21.0, 25, 25]) * rng.uniform(0.85, 1.15, 3)
    right = _ellipsoid(body.points, centre, radii)
    left = _ellipsoid(body.points, centre + (-20, 11, 5), radii * (1.0, 0.45, 0.5))
    gallbladder = cavity & (_ellipsoid(body.points, centre + radii * (-0.45, 0.55, -0.85), (5, 6, 8)) < 1)
    body.hounsfield[gallbladder] = rng.uniform(15, 30)
    return cavity & ~gallbladder & (np.minimum(left, right) + 0.07 * body.roughness < 1), centre, radii


def _draw_inside_liver(
    rng: np.random.Generator,
    liver: Body,
    centre: np.ndarray,
    radii: np.ndarray,
    liver_hounsfield: float,
    num_lesions: int,
) -> tuple[np.ndarray, np.ndarray]:
    """HU and label of the liver's own voxels, a tenth of the volume: tissue, vessels, lesions."""
    hounsfield = liver_hounsfield + 5 * liver.texture
    label = np.full(hounsfield.shape, LIVER, np.uint8)
    hilum = centre + radii * (-0.5, 0.1, -0.2)
    for _ in range(6):
        end = centre + 0.8 * radii * _draw_direction(rng)
        hounsfield[_tube(liver.points, hilum, end) < rng.uniform(1.2, 2.2)] = liver_hounsfield - 14
    for _ in range(num_lesions):
        # At most 0.7 of the way to the surface: a lesion never lies outside altogether.
        lesion_centre = centre + rng.uniform(0.2, 0.7) * radii * _draw_direction(rng)
        level = _ellipsoid(liver.points, lesion_centre, rng.uniform(5.5, 9.5) * rng.uniform(0.8, 1.2, 3))
        lesion = level + 0.15 * liver.roughness < 1
        hounsfield[lesion] = rng.uniform(18, 34) + 4 * liver.texture[lesion]
        label[lesion] = LESION
    return hounsfield, label


def _draw_direction(rng: np.random.Generator) -> np.ndarray:
    vector = rng.standard_normal(3)
    return vector / np.linalg.norm(vector)


def _scan(rng: np.random.Generator, hounsfield: np.ndarray, grid: Grid) -> np.ndarray:
    """Blur as a scanner does, add its correlated noise, and round to int16."""
    image = ndimage.gaussian_filter(hounsfield, [0.7 / size for size in grid.spacing])
    noise = rng.standard_normal(grid.shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, [1.0 / size for size in grid.spacing])
    noise *= rng.uniform(13, 20) / noise.std()
    image += noise
    return np.rint(image, out=image).clip(-1024, 3071).astype(np.int16)


def _to_nifti(voxels: np.ndarray, grid: Grid, orientation: str) -> nib.Nifti1Image:
    """A NIfTI image with the origin at the volume's centre, its axes stored in ``orientation``."""
    affine = np.diag([*grid.spacing, 1.0])
    affine[:3, 3] = [-(count - 1) / 2 * size for count, size in zip(grid.shape, grid.spacing, strict=True)]
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image = image.as_reoriented(nib.orientations.axcodes2ornt(orientation))
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    return image


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dints.data.phantom", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data_msd/Task00_Phantom", help="folder to write (default: %(default)s)")
    parser.add_argument("--num_training", type=int, default=16, help="labelled cases (default: %(default)s)")
    parser.add_argument("--num_test", type=int, default=4, help="unlabelled cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar=("X", "Y", "Z"), help="voxels of every case (default: 48 to 72 an axis)"
    )
    parser.add_argument(
        "--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="voxel size in mm (default: about 1.6 to 2.5)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_phantom(**vars(parse_args(argv)))


if __name__ == "__main__":
    exit_on_user_error(main)
