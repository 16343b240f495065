"""Cases and folds, checks, transforms, and batches that depend on seed, stream, epoch and case alone."""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, Spacingd
from scipy import ndimage

from dints import data
from dints.errors import UserError
from dints.phantom import write_phantom
from dints.runtime import Processes
from dints.tasks import Task

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
TASK = Task(
    "Toy", "CT", 1, ("background", "organ", "lesion"), spacing=None, intensity=(-100.0, 300.0), patch_size=(16, 16, 16)
)


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"seed": 0, "num_images_per_batch": 2, "num_workers": 0, "cache": "ram", **changes})


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return str(path)


def save_case(folder: Path, image: np.ndarray, label: np.ndarray, affine: np.ndarray | None = None) -> data.Case:
    return {
        "image": save(folder / "image.nii.gz", image, affine),
        "label": save(folder / "label.nii.gz", label, affine),
    }


def good_case(folder: Path, shape: tuple[int, ...] = (20, 20, 20), num_channels: int = 1) -> data.Case:
    """Noise, with a block of either foreground class."""
    rng = np.random.default_rng(0)
    label = np.zeros(shape, np.uint8)
    label[: shape[0] // 2] = 1
    label[..., : shape[2] // 3] = 2
    channels = () if num_channels == 1 else (num_channels,)
    return save_case(folder, rng.normal(100, 60, (*shape, *channels)).astype(np.float32), label)


def preprocessed(case: data.Case, task: Task) -> dict[str, torch.Tensor]:
    return Compose(data.preprocessing(task))(case)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[data.Case]:
    root = write_phantom(tmp_path_factory.mktemp("data") / "Task00_Phantom", 5, 1, shape=(24, 26, 22))
    return data.read_cases(json.loads((root / "dataset.json").read_text()), root / "dataset.json", root)


# Cases and folds


def numbered(count: int) -> list[data.Case]:
    return [{"image": f"image{number}", "label": f"label{number}"} for number in range(count)]


@pytest.mark.parametrize("num_cases", [2, 3, 5, 8, 17, 20, 41, 208])
@pytest.mark.parametrize("num_folds", [2, 3, 4, 5, 8])
def test_folds_validate_every_case_once(num_cases, num_folds):
    cases = numbered(num_cases)
    if num_folds > num_cases:
        with pytest.raises(UserError, match=f"--num_folds {num_folds}, but there are only {num_cases} cases"):
            data.split_fold(cases, num_folds, 0)
        return
    splits = [data.split_fold(cases, num_folds, fold) for fold in range(num_folds)]
    assert [case for _, validation in splits for case in validation] == cases  # each once, in contiguous folds
    sizes = [len(validation) for _, validation in splits]
    assert max(sizes) - min(sizes) <= 1
    for fold, (training, validation) in enumerate(splits):
        assert training == [case for case in cases if case not in validation]
        if num_cases % num_folds == 0:  # then it is the published split
            size = num_cases // num_folds
            assert validation == cases[fold * size : (fold + 1) * size]


def test_fold_all_trains_on_every_case():
    assert data.split_fold(numbered(3), 5, "all") == (numbered(3), [])


def test_task04_is_split_into_four_folds_of_52(task04):
    args = argparse.Namespace(
        root=Path(task04), json=None, json_key="training", spacing=None, intensity_range=None, patch_size=[32, 32, 32]
    )
    task, cases = data.open_dataset(args)
    assert (task.name, task.spacing, task.patch_size, len(cases)) == ("Task04_Hippocampus", None, (32, 32, 32), 208)
    for fold in range(4):
        training, validation = data.split_fold(cases, 4, fold)
        assert (len(training), len(validation)) == (156, 52)
        assert validation == cases[52 * fold : 52 * (fold + 1)]


def test_command_line_overrides_the_task(tmp_path):
    description = {"modality": {"0": "CT"}, "labels": {"0": "b", "1": "x"}, "mine": []}
    good_case(tmp_path / "a")
    description["mine"] = [{"image": "a/image.nii.gz", "label": "./a/label.nii.gz"}]
    (tmp_path / "my.json").write_text(json.dumps(description))
    args = argparse.Namespace(
        root=tmp_path,
        json=tmp_path / "my.json",
        json_key="mine",
        spacing=[2.0, 2.0, 3.0],
        intensity_range=[0.0, 5.0],
        patch_size=None,
    )
    task, cases = data.open_dataset(args)
    assert (task.spacing, task.intensity, task.patch_size) == ((2.0, 2.0, 3.0), (0.0, 5.0), (96, 96, 96))
    assert data.names(cases) == ["image.nii.gz"]


def test_missing_files_are_counted_and_the_first_named(tmp_path):
    good_case(tmp_path / "a")
    entries = [{"image": f"{folder}/image.nii.gz", "label": f"{folder}/label.nii.gz"} for folder in "abcd"]
    with pytest.raises(UserError) as raised:
        data.read_cases({"training": entries}, "my.json", tmp_path)
    message = str(raised.value)
    assert "6 of the 8 files" in message and "my.json" in message and "--root" in message
    assert str(tmp_path / "b/image.nii.gz") in message and "d/label" not in message


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ({"validation": [], "test": [1]}, ["'training'", "--json_key", "validation, test"]),
        ({"name": "x"}, ["'training'", "--json_key", "none"]),
        ({"training": [], "name": "x"}, ["'training'", "--json_key"]),
        ({"training": {"image": "a"}}, ["'training'", "--json_key"]),
        ({"training": ["a.nii.gz"]}, ["entry 0 of 'training'", "'a.nii.gz'"]),
        ({"training": [{"image": "a.nii.gz"}]}, ["entry 0 of 'training'", "'label'"]),
        ({"training": [{"image": ["a", "b"], "label": "c"}]}, ["entry 0 of 'training'", "['a', 'b']"]),
    ],
)
def test_a_malformed_case_list_is_named(description, expected):
    with pytest.raises(UserError) as raised:
        data.read_cases(description, "my.json", "root")
    assert all(part in str(raised.value) for part in ["my.json", *expected])


# Transforms


def test_class_masks_are_48_binary_dilations():
    label = np.zeros((120, 70, 9), np.uint8)
    label[0, 0, 0] = 1  # tiny, in a corner
    label[60:75, 65:, 3:6] = 2  # touches the border
    label[40, 30, 4] = label[110, 5, 8] = 4  # two parts; class 3 is absent
    masks = data.ClassMasksd(5)({"label": torch.from_numpy(label[None])})["crop_mask"]
    assert masks.dtype == torch.uint8 and masks.shape == (5, *label.shape)
    for value in range(5):
        expected = ndimage.binary_dilation(label == value, iterations=data.CROP_DILATION)
        assert np.array_equal(masks[value].numpy().astype(bool), expected), value
    assert 0 < masks[1].sum() < label.size and masks[3].sum() == 0


def test_crops_are_centred_in_each_class_equally_often():
    """A third of the crops lies around each of three masks, however large they are; an absent class has no share."""
    task = replace(TASK, class_names=("b", "x", "y", "absent"), patch_size=(3, 3, 3))
    masks = torch.zeros(4, 40, 12, 12, dtype=torch.uint8)
    masks[0, :30], masks[1, 32:36], masks[2, 38:39] = 1, 1, 1
    position = torch.arange(40.0)[None, :, None, None].expand(1, 40, 12, 12)
    case = {"image": position, "label": position.clone(), "crop_mask": masks}
    crop = data.augmentation(task).transforms[0]
    crop.set_random_state(0)
    centres = [int(crop(case)[0]["image"][0, 1, 1, 1]) for _ in range(600)]
    shares = Counter(int(np.searchsorted([31, 37], centre)) for centre in centres)
    assert set(shares) == {0, 1, 2} and len({centre for centre in centres if centre < 31}) > 20
    assert all(abs(shares[value] - 200) < 50 for value in range(3)), shares  # 4.3 standard deviations


@pytest.mark.parametrize("num_channels", [1, 4])
@pytest.mark.parametrize(
    "shape", [(20, 20, 20), (16, 16, 16), (40, 9, 17), (5, 20, 4), (3, 4, 2), (20, 20, 1)], ids=str
)
def test_patches_have_the_networks_shape_and_type(tmp_path, shape, num_channels):
    task = replace(TASK, num_channels=num_channels)
    loader = data.training_loader(
        [good_case(tmp_path, shape, num_channels)], "weights", task, 2, options(num_images_per_batch=3), ALONE
    )
    for epoch in range(3):  # so that each random transform is drawn
        for batch in loader.epoch(epoch):
            assert batch["image"].shape == (3, num_channels, 16, 16, 16) and batch["image"].dtype == torch.float32
            assert batch["label"].shape == (3, 1, 16, 16, 16) and batch["label"].dtype == torch.uint8
            assert type(batch["image"]) is torch.Tensor and type(batch["label"]) is torch.Tensor
            assert torch.isfinite(batch["image"]).all() and batch["label"].max() < 3
            assert set(batch) == {"image", "label"}


def test_small_volumes_are_padded_by_reflection_or_by_their_border(tmp_path):
    case = data.training_cache(TASK)(good_case(tmp_path, (20, 11, 4)))
    read = preprocessed(good_case(tmp_path, (20, 11, 4)), TASK)
    assert {key: value.dtype for key, value in case.items()} == {
        "image": torch.float16,
        "label": torch.uint8,
        "crop_mask": torch.uint8,
    }
    padding = ((0, 0), (0, 0), (2, 3), (6, 6))
    expected = np.pad(read["image"].numpy(), ((0, 0), (0, 0), (0, 0), (1, 1)), mode="edge")  # 4 voxels reflect to 10
    expected = np.pad(expected, ((0, 0), (0, 0), (2, 3), (5, 5)), mode="reflect").astype(np.float16)
    assert np.array_equal(case["image"].numpy(), expected)
    assert np.array_equal(case["label"].numpy(), np.pad(read["label"].numpy(), padding))


def test_channels_keep_their_order(tmp_path):
    image = np.stack([np.full((8, 9, 10), value, np.float32) for value in (0, 100, 200, 300)], -1)
    case = save_case(tmp_path, image, np.zeros((8, 9, 10), np.uint8))
    result = preprocessed(case, replace(TASK, num_channels=4))["image"]
    assert result.shape == (4, 8, 9, 10)
    assert result.mean((1, 2, 3)).tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_a_ct_window_becomes_0_to_1(tmp_path):
    image = np.linspace(-1000, 1000, 512, dtype=np.float32).reshape(8, 8, 8)
    result = preprocessed(save_case(tmp_path, image, np.zeros((8, 8, 8), np.uint8)), TASK)["image"][0]
    assert np.allclose(result, np.clip((image + 100) / 400, 0, 1), atol=1e-6)
    assert result.min() == 0 and result.max() == 1


def test_mri_is_a_z_score_of_each_channels_nonzero_voxels(tmp_path):
    rng = np.random.default_rng(1)
    image = np.stack([rng.normal(500, 20, (9, 9, 9)), rng.normal(7, 3, (9, 9, 9))], -1).astype(np.float32)
    image[:3] = 0
    case = save_case(tmp_path, image, np.zeros((9, 9, 9), np.uint8))
    result = preprocessed(case, replace(TASK, modality="MRI", intensity=None, num_channels=2))["image"]
    assert (result[:, :3] == 0).all()
    for channel in range(2):
        values = image[3:, ..., channel]
        assert np.allclose(result[channel, 3:], (values - values.mean()) / values.std(), atol=1e-4)


def test_resampling_keeps_every_voxels_place(tmp_path):
    """An image that holds its own world coordinates still does, on the new grid."""
    affine = np.array([[1.5, 0, 0, -20], [0, 2, 0, 5], [0, 0, 4, 30], [0, 0, 0, 1]])
    shape = (30, 24, 12)
    world = np.moveaxis(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0)
    task = replace(TASK, num_channels=3, spacing=(2.0, 2.0, 3.0), intensity=(0.0, 1000.0))
    image = np.moveaxis(world, 0, -1).astype(np.float32) + 500
    result = preprocessed(save_case(tmp_path, image, np.zeros(shape, np.uint8), affine), task)
    assert result["image"].pixdim.tolist() == [2, 2, 3] and result["label"].pixdim.tolist() == [2, 2, 3]
    assert result["image"].shape[1:] == result["label"].shape[1:] == (23, 24, 16)
    indices = np.moveaxis(np.indices(result["image"].shape[1:]), 0, -1)
    expected = np.moveaxis(nib.affines.apply_affine(result["image"].affine.numpy(), indices), -1, 0)
    inside = (slice(None), slice(0, 22), slice(None), slice(0, 14))  # beyond it the border is repeated
    assert np.allclose(result["image"].numpy()[inside] * 1000 - 500, expected[inside], atol=1e-2)


def test_resampling_in_float32_is_as_good_as_in_float64(cases):
    task = replace(TASK, spacing=(3.0, 3.0, 2.5))
    in_float64 = Spacingd(["image", "label"], task.spacing, mode=["bilinear", "nearest"], align_corners=True)
    fine = Compose([*data.preprocessing(replace(task, spacing=None, intensity=(0.0, 1.0)))[:-1], in_float64])(cases[0])
    ours = Compose(data.preprocessing(task)[:-1])(cases[0])
    assert ours["image"].shape == fine["image"].shape
    assert (ours["image"] - fine["image"]).abs().max() < 0.05  # HU
    assert (ours["label"] != fine["label"]).float().mean() < 1e-3


@pytest.mark.parametrize("axes", ["LPS", "LAS", "PIR", "SAL"])
def test_anatomy_is_the_same_however_it_is_stored(tmp_path, axes):
    rng = np.random.default_rng(2)
    affine = np.array([[2.0, 0, 0, -7], [0, 3, 0, 4], [0, 0, 4, 11], [0, 0, 0, 1]])
    task = replace(TASK, spacing=(2.5, 2.5, 2.5))
    voxels = {"image": rng.normal(100, 50, (9, 10, 11)).astype(np.float32)}
    voxels["label"] = rng.integers(0, 3, (9, 10, 11)).astype(np.uint8)
    ras = {key: nib.Nifti1Image(array, affine) for key, array in voxels.items()}
    results = []
    for name, orientation in (("stored_RAS", "RAS"), ("stored_otherwise", axes)):
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
        )
        stored = {key: image.as_reoriented(turn) for key, image in ras.items()}
        assert nib.aff2axcodes(stored["image"].affine) == tuple(orientation)
        case = {key: save(tmp_path / name / f"{key}.nii.gz", *nifti(image)) for key, image in stored.items()}
        results.append(preprocessed(case, task))
        assert nib.aff2axcodes(results[-1]["image"].affine.numpy()) == ("R", "A", "S")
    for key, tolerance in (("image", 1e-5), ("label", 0)):
        assert results[0][key].shape == results[1][key].shape
        assert torch.allclose(results[0][key].as_tensor(), results[1][key].as_tensor(), rtol=0, atol=tolerance)


def nifti(image: nib.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(image.dataobj), image.affine


# Bad cases


def spoil_truncated_gzip(case):
    content = Path(case["image"]).read_bytes()
    Path(case["image"]).write_bytes(content[: len(content) // 2])


def spoil_wrong_magic(case):
    content = bytearray(gzip.decompress(Path(case["label"]).read_bytes()))
    content[344:348] = b"XXXX"
    content[0:4] = b"\x01\x02\x03\x04"
    Path(case["label"]).write_bytes(gzip.compress(bytes(content)))


def spoil_text_file(case):
    Path(case["image"]).write_text("<html>404</html>\n")


def spoil_voxel(key, value):
    def spoil(case):
        voxels = np.asarray(nib.load(case[key]).dataobj).astype(np.float32)
        voxels[3, 4, 5] = value
        save(Path(case[key]), voxels)

    return spoil


def spoil_shape(key, shape):
    return lambda case: save(Path(case[key]), np.ones(shape, np.float32))


BAD_CASES = {
    "truncated gzip": (spoil_truncated_gzip, "image", "cannot be read"),
    "wrong magic": (spoil_wrong_magic, "label", "cannot be read"),
    "text file": (spoil_text_file, "image", "cannot be read"),
    "image and label of different shapes": (
        spoil_shape("label", (20, 20, 19)),
        "label",
        "has shape (20, 20, 19), but its image {image} has (20, 20, 20)",
    ),
    "label of two channels": (spoil_shape("label", (20, 20, 20, 2)), "label", "has shape (2, 20, 20, 20)"),
    "label 7": (spoil_voxel("label", 7), "label", "holds the label 7; Toy has the labels 0 to 2"),
    "label -1": (spoil_voxel("label", -1), "label", "holds the label -1;"),
    "label 1.4": (spoil_voxel("label", 1.4), "label", "holds the label 1.4;"),
    "label 256": (spoil_voxel("label", 256), "label", "holds the label 256;"),
    "label NaN": (spoil_voxel("label", np.nan), "label", "holds the label nan;"),
    "four channels": (spoil_shape("image", (20, 20, 20, 4)), "image", "has 4 channels"),
    "2D image": (spoil_shape("image", (20, 20)), "image", "of shape (20, 20); Toy has 1 channels in three dimensions"),
    "NaN voxel": (spoil_voxel("image", np.nan), "image", "has NaN or infinite voxels"),
    "infinite voxel": (spoil_voxel("image", -np.inf), "image", "has NaN or infinite voxels"),
}


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("stage", ["training", "validation"])
@pytest.mark.parametrize("fault", BAD_CASES)
def test_a_bad_case_is_named_before_training(tmp_path, fault, stage, cache):
    spoil, key, expected = BAD_CASES[fault]
    cases = [good_case(tmp_path / name) for name in ("good", "bad")]
    spoil(cases[1])
    with pytest.raises(UserError) as raised:
        if stage == "training":
            data.training_loader(cases, "weights", TASK, 1, options(cache=cache), ALONE)
        else:
            data.validation_loader(cases, TASK, options(cache=cache), ALONE)
    message = str(raised.value)
    assert message.startswith(cases[1][key]) and expected.format(**cases[1]) in message
    assert "\n" not in message and len(message) < 500 and message.endswith(("replace the file", "the case"))


def test_a_fault_of_the_program_is_not_made_the_users():
    def broken(case):
        raise ZeroDivisionError("a bug")

    with pytest.raises(RuntimeError) as raised, data.user_errors():
        Compose([broken])({})
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


# Caches and loaders


def patches(loader: data.TrainingLoader, epoch: int) -> list[torch.Tensor]:
    """Images and labels of an epoch, in order."""
    return [tensor for batch in loader.epoch(epoch) for tensor in (batch["image"], batch["label"])]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def weights_loader(cases, stream="weights", processes=ALONE, steps=3, **changes):
    return data.training_loader(cases, stream, TASK, steps, options(**changes), processes)


def test_patches_do_not_depend_on_workers_restart_or_cache(cases):
    straight = weights_loader(cases)
    expected = [patches(straight, epoch) for epoch in range(3)]
    assert not same(expected[0], expected[1])
    for num_workers in (1, 2):
        loader = weights_loader(cases, num_workers=num_workers)
        assert all(same(patches(loader, epoch), expected[epoch]) for epoch in range(3))
    restarted = weights_loader(cases, num_workers=1)
    assert same(patches(restarted, 2), expected[2])
    uncached = weights_loader(cases, cache="none")
    assert same(patches(uncached, 1), expected[1])


def test_patches_do_not_depend_on_the_order_of_asking(cases):
    samples = weights_loader(cases).loader.dataset
    draws = [(epoch, turn, index) for epoch in (0, 4) for turn in (0, 1) for index in range(len(cases))]
    first = {draw: samples[draw] for draw in draws}
    for draw in reversed(draws):
        again = samples[draw]
        assert torch.equal(first[draw]["image"], again["image"]) and torch.equal(first[draw]["label"], again["label"])


def test_patches_differ_between_epochs_turns_streams_seeds_and_cases(cases):
    one = weights_loader(cases[:1] * 2).loader.dataset  # the same case twice
    seeded, streamed = weights_loader(cases[:1], seed=1), weights_loader(cases[:1], "architecture")
    images = [one[0, 0, 0], one[1, 0, 0], one[0, 1, 0], one[0, 0, 1]]
    images += [loader.loader.dataset[0, 0, 0] for loader in (seeded, streamed)]
    images = [sample["image"] for sample in images]
    for number, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[number + 1 :]), number


@pytest.mark.parametrize(("num_cases", "length"), [(1, 1), (1, 4), (5, 3), (5, 5), (5, 13), (20, 20)])
def test_epoch_sampler_passes_over_all_cases_and_wraps(num_cases, length):
    sampler = data.EpochSampler(num_cases, length, 0, "weights/0")
    for epoch in (0, 7):
        sampler.epoch = epoch
        draws = list(sampler)
        assert len(draws) == len(sampler) == length == len(set(draws))
        assert {draw[0] for draw in draws} == {epoch}
        for start in range(0, length, num_cases):
            turn = draws[start : start + num_cases]
            assert {draw[1] for draw in turn} == {start // num_cases}
            assert len({draw[2] for draw in turn}) == len(turn)
            assert {draw[2] for draw in turn} <= set(range(num_cases))


def test_epoch_samplers_order_depends_on_seed_stream_and_epoch_only():
    def order(seed=0, stream="weights/0", epoch=3, length=40):
        sampler = data.EpochSampler(20, length, seed, stream)
        sampler.epoch = epoch
        return [index for _, _, index in sampler]

    assert order() == order() and order(length=17) == order()[:17]
    orders = [order(), order(seed=1), order(stream="weights/1"), order(epoch=4)]
    orders += [order()[20:], order(length=20)]  # two turns of one epoch
    assert len({tuple(o[:20]) for o in orders}) == 5  # the last one is the first's beginning


@pytest.mark.parametrize(
    ("num_cases", "world_size", "batch_size"), [(7, 1, 2), (7, 2, 2), (5, 3, 1), (2, 4, 2), (1, 2, 1)]
)
def test_ranks_share_the_cases_and_take_equal_steps(monkeypatch, num_cases, world_size, batch_size):
    monkeypatch.setattr(data, "cached", lambda cases, *_: cases)
    args = options(num_images_per_batch=batch_size)
    steps = data.steps_per_epoch(num_cases, batch_size, Processes(0, world_size, CPU))
    loaders = [
        data.training_loader(numbered(num_cases), "weights", TASK, steps, args, Processes(rank, world_size, CPU))
        for rank in range(world_size)
    ]
    assert {len(loader) for loader in loaders} == {steps}
    held = [loader.loader.dataset.numbers for loader in loaders]
    for loader, numbers in zip(loaders, held, strict=True):
        assert loader.loader.dataset.cases == [numbered(num_cases)[number] for number in numbers]
        assert {index for _, _, index in loader.sampler} == set(range(len(numbers)))  # each seen in every epoch
    assert set().union(*held) == set(range(num_cases))
    if num_cases >= world_size:
        assert sum(map(len, held)) == num_cases
    assert steps == max(1, -(-num_cases // (world_size * batch_size)))


def test_ranks_that_hold_the_same_case_draw_different_patches(cases):
    loaders = [weights_loader(cases[:1], processes=Processes(rank, 2, CPU), steps=2) for rank in (0, 1)]
    first, second = (patches(loader, 0) for loader in loaders)
    assert len(first) == len(second) == 4
    assert not any(torch.equal(a, b) for a in first[::2] for b in second[::2])


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_validation_cases_are_whole_and_numbered(cases, cache):
    numbers = []
    for rank in range(2):
        for batch in data.validation_loader(cases, TASK, options(cache=cache), Processes(rank, 2, CPU)):
            assert batch["image"].shape == batch["label"].shape == (1, 1, 24, 26, 22)
            assert batch["image"].dtype == torch.float32 and batch["label"].dtype == torch.uint8
            assert type(batch["image"]) is torch.Tensor
            numbers.append(int(batch["number"]))
            expected = preprocessed(cases[numbers[-1]], TASK)
            assert torch.equal(batch["image"][0], expected["image"].as_tensor())
    assert numbers == [0, 2, 4, 1, 3]


def test_a_rank_without_validation_cases_has_an_empty_loader(cases):
    assert list(data.validation_loader(cases[:1], TASK, options(), Processes(1, 2, CPU))) == []
    assert list(data.validation_loader([], TASK, options(), ALONE)) == []


def test_number_of_workers(monkeypatch):
    monkeypatch.setattr(data, "cores_per_process", lambda: 64)
    assert [data.num_workers(options(num_workers=given)) for given in (None, 0, 9)] == [6, 0, 9]
    monkeypatch.setattr(data, "cores_per_process", lambda: 1)
    assert data.num_workers(options(num_workers=None)) == 0
