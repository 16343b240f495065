"""From a dataset's folder to batches: tasks as they are measured, and patches that depend on seed and place alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import search_dints
import train_dints
from dints import augmentation, data
from dints.cache import Cache
from dints.cases import Leniency, prepare
from dints.dataset import Case, read_cases, split_fold
from dints.errors import UserError
from dints.phantom import write_phantom
from dints.runtime import Processes
from dints.tasks import TASKS, Task

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
TASK = Task(
    "Toy", "CT", 1, ("background", "organ", "lesion"), spacing=None, intensity=(-100.0, 300.0), patch_size=(16, 16, 16)
)


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"seed": 0, "num_images_per_batch": 2, "num_workers": 0, **changes})


def cache_of(mode: str = "ram", folder: Path = Path("unused"), task: Task = TASK) -> Cache:
    return Cache(mode, folder, task, Leniency(), 1)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return str(path)


def make_case(folder: Path, shape: tuple[int, ...] = (20, 20, 20), num_channels: int = 1) -> Case:
    """Noise, with a block of either foreground class."""
    rng = np.random.default_rng(0)
    label = np.zeros(shape, np.uint8)
    label[: shape[0] // 2] = 1
    label[..., : shape[2] // 3] = 2
    channels = () if num_channels == 1 else (num_channels,)
    image = rng.normal(100, 60, (*shape, *channels)).astype(np.float32)
    return Case("case", (save(folder / "image.nii.gz", image),), save(folder / "label.nii.gz", label))


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    root = write_phantom(tmp_path_factory.mktemp("data") / "Task00_Phantom", 5, 1, shape=(24, 26, 22))
    return read_cases(json.loads((root / "dataset.json").read_text()), root / "dataset.json", root)


# Datasets


def opened(root: Path, *flags: object, known: tuple[Path, ...] = ()) -> data.LabelledDataset:
    args = search_dints.parse_args([*map(str, ["--root", root, "--output_root", root.parent / "run", *flags])])
    return data.open_dataset(args, *known)


def write_dataset(root: Path, shapes_and_spacings: list, *, channel: str = "CT", nnunet: bool = False) -> Path:
    """Images of foreground 0, 1, 2, ... HU (as many as voxels) in a background of 5000 HU."""
    entries = []
    for number, (shape, spacing) in enumerate(shapes_and_spacings):
        label = np.zeros(shape, np.int16)
        label[2:12, 2:12, 2:12] = 1 + number % 2
        image = np.full(shape, 5000, np.int16)
        image[label > 0] = np.arange(1000)
        names = (f"case_{number}_0000.nii.gz", f"case_{number}.nii.gz") if nnunet else (f"case_{number}.nii.gz",) * 2
        for folder, name, voxels in zip(("imagesTr", "labelsTr"), names, (image, label), strict=True):
            save(root / folder / name, voxels, np.diag([*spacing, 1]))
        entries.append({"image": f"imagesTr/{names[0]}", "label": f"labelsTr/{names[1]}"})
    description = {"modality": {"0": channel}, "labels": {"0": "background", "1": "a", "2": "b"}, "training": entries}
    if nnunet:
        labels = {"background": 0, "a": 1, "b": 2}
        description = {"channel_names": {"0": channel}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 3}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


THREE = [((40, 40, 40), (1, 1, 3)), ((40, 70, 50), (1, 1, 4)), ((40, 50, 60), (2, 2, 5))]


@pytest.mark.parametrize("nnunet", [False, True])
def test_an_unknown_dataset_is_measured(tmp_path, nnunet):
    dataset = opened(write_dataset(tmp_path / "Mine", THREE, nnunet=nnunet))
    task = dataset.task
    assert (task.name, task.modality, task.channel_files) == ("Mine", "CT", nnunet)
    assert task.spacing == (1, 1, 4)
    assert task.intensity == pytest.approx((0.005 * 999, 0.995 * 999), abs=0.1)  # the foreground is 0 to 999
    # Voxels at that spacing: 40 40 30, 40 70 50, 79 99 75 (the distance of the outermost voxels and one more).
    assert dataset.measured.shape == (40, 70, 50)
    assert task.patch_size == (32, 64, 32)


def test_mri_of_an_unknown_dataset_is_z_scored(tmp_path):
    task = opened(write_dataset(tmp_path / "Mine", THREE, channel="T1")).task
    assert (task.modality, task.intensity, task.spacing) == ("MRI", None, (1, 1, 4))


def test_spacing_is_measured_in_the_patients_axes(tmp_path):
    """Whatever order a file stores its axes in."""
    root = write_dataset(tmp_path / "Mine", THREE[:2])
    for path in root.rglob("case_1*.nii.gz"):
        turned = nib.orientations.axcodes2ornt("SAL")
        nib.save(nib.load(path).as_reoriented(nib.orientations.ornt_transform(turned, [[0, 1], [1, 1], [2, 1]])), path)
    assert nib.aff2axcodes(nib.load(root / "labelsTr/case_1.nii.gz").affine) != ("R", "A", "S")
    assert opened(root).task.spacing == (1, 1, 3.5)


def test_the_command_line_overrides_what_is_known_and_what_is_measured(tmp_path):
    flags = ["--spacing", 2, 2, 3, "--intensity_range", 0, 5, "--patch_size", 16, 32, 48]
    mine = opened(write_dataset(tmp_path / "Mine", THREE), *flags).task
    (tmp_path / "Mine").rename(tmp_path / "Task09_Spleen")
    spleen = opened(tmp_path / "Task09_Spleen", *flags).task
    for task in (mine, spleen):
        assert (task.spacing, task.intensity, task.patch_size) == ((2, 2, 3), (0, 5), (16, 32, 48))
    plain = opened(tmp_path / "Task09_Spleen").task
    assert (plain.spacing, plain.intensity) == (TASKS["Task09_Spleen"].spacing, TASKS["Task09_Spleen"].intensity)
    assert plain.class_names == ("background", "a", "b")


def test_what_was_measured_is_kept_and_used_again(tmp_path, monkeypatch):
    root = write_dataset(tmp_path / "Mine", THREE)
    first = opened(root, "--patch_size", 48, 48, 48)
    search_dints.write_task(tmp_path / "search", first.task, first.measured)
    kept = json.loads((tmp_path / "search" / "task.json").read_text())
    assert kept["task"]["patch_size"] == [48, 48, 48] and kept["fingerprint"]["spacing"] == [1, 1, 4]
    with monkeypatch.context() as patch:
        patch.setattr("dints.fingerprint._window", lambda *_: pytest.fail("measured again"))
        again = opened(root, known=(tmp_path / "search",))
    assert again.measured == first.measured
    assert again.task == replace(first.task, patch_size=(32, 64, 32))  # flags of another run are not taken over


def test_the_measurements_of_another_dataset_are_not_used(tmp_path):
    first = opened(write_dataset(tmp_path / "Mine", THREE))
    search_dints.write_task(tmp_path / "search", first.task, first.measured)
    (tmp_path / "Mine").rename(tmp_path / "old")
    other = opened(write_dataset(tmp_path / "Mine", THREE[1:]), known=(tmp_path / "search",))
    assert other.task.spacing == (1.5, 1.5, 4.5)
    for damaged in ("{", "[]", '{"fingerprint": {"dataset": 1}}', '{"fingerprint": null}'):
        (tmp_path / "search" / "task.json").write_text(damaged)
        assert opened(tmp_path / "Mine", known=(tmp_path / "search",)).task == other.task


def test_a_dataset_without_any_foreground_is_refused(tmp_path):
    root = write_dataset(tmp_path / "Mine", THREE)
    for path in (root / "labelsTr").iterdir():
        save(path, np.zeros((40, 40, 40), np.uint8), np.diag([1, 1, 3, 1]))
        save(root / "imagesTr" / path.name, np.zeros((40, 40, 40), np.int16), np.diag([1, 1, 3, 1]))
    with pytest.raises(UserError, match="no case has any foreground"):
        opened(root)


def test_task04_is_split_into_four_folds_of_52(task04):
    dataset = opened(task04)
    assert dataset.task == TASKS["Task04_Hippocampus"] and dataset.measured is None and len(dataset.cases) == 208
    for fold in range(4):
        training, validation = split_fold(dataset.cases, 4, fold)
        assert (len(training), len(validation)) == (156, 52)


# Patches


@pytest.mark.parametrize("num_channels", [1, 4])
@pytest.mark.parametrize(
    "shape", [(20, 20, 20), (16, 16, 16), (40, 9, 17), (5, 20, 4), (3, 4, 2), (20, 20, 1)], ids=str
)
def test_patches_have_the_networks_shape_and_type(tmp_path, shape, num_channels):
    task = replace(TASK, num_channels=num_channels)
    case = make_case(tmp_path, shape, num_channels)
    loader = data.training_loader([case], "weights", 2, cache_of(task=task), options(num_images_per_batch=3), ALONE)
    for epoch in range(3):  # so that each random transform is drawn
        for batch in loader.epoch(epoch):
            assert batch["image"].shape == (3, num_channels, 16, 16, 16) and batch["image"].dtype == torch.float32
            assert batch["label"].shape == (3, 1, 16, 16, 16) and batch["label"].dtype == torch.uint8
            assert type(batch["image"]) is torch.Tensor and type(batch["label"]) is torch.Tensor
            assert torch.isfinite(batch["image"]).all() and batch["label"].max() < 3
            assert batch["cases"] == ["case"] * 3 and set(batch) == {"image", "label", "cases"}


def patches(loader: data.TrainingLoader, epoch: int) -> list[torch.Tensor]:
    """Images and labels of an epoch, in order."""
    return [tensor for batch in loader.epoch(epoch) for tensor in (batch["image"], batch["label"])]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def weights_loader(cases, stream="weights", processes=ALONE, steps=3, cache=None, **changes):
    return data.training_loader(cases, stream, steps, cache or cache_of(), options(**changes), processes)


def test_patches_do_not_depend_on_workers_restart_or_cache(cases, tmp_path):
    straight = weights_loader(cases)
    expected = [patches(straight, epoch) for epoch in range(3)]
    assert not same(expected[0], expected[1])
    for num_workers in (1, 2):
        loader = weights_loader(cases, num_workers=num_workers)
        assert all(same(patches(loader, epoch), expected[epoch]) for epoch in range(3))
    restarted = weights_loader(cases, num_workers=1)
    assert same(patches(restarted, 2), expected[2])
    for mode in ("disk", "none"):
        other = weights_loader(cases, cache=cache_of(mode, tmp_path))
        assert same(patches(other, 1), expected[1])


def test_patches_do_not_depend_on_how_far_an_earlier_epoch_was_followed(cases):
    loader = weights_loader(cases, num_workers=1)
    expected = [patches(loader, epoch) for epoch in range(2)]
    next(loader.epoch(0))  # as when a run is interrupted
    assert same(patches(loader, 1), expected[1]) and same(patches(loader, 0), expected[0])
    batches = loader.epoch(1)
    taken = [next(batches) for _ in range(3)]  # as the search takes its architecture's
    assert same([tensor for batch in taken for tensor in (batch["image"], batch["label"])], expected[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_goes_on_in_its_middle(cases, workers):
    expected = patches(weights_loader(cases, num_workers=workers, steps=7), 3)  # two turns of five cases, and more
    for step in (0, 1, 4, 7):
        rest = [b[key] for b in weights_loader(cases, steps=7).epoch(3, step) for key in ("image", "label")]
        assert len(rest) == 2 * (7 - step) and all(map(torch.equal, rest, expected[2 * step :]))


def test_an_epoch_goes_on_where_the_last_one_ended(cases, monkeypatch):
    """Workers are not started anew: what they prepared meanwhile is used."""
    loader = weights_loader(cases, num_workers=1)
    patches(loader, 0)
    monkeypatch.setattr(loader, "loader", None)
    assert len(patches(loader, 1)) == 6


def test_augmenting_where_the_network_is_gives_the_workers_patches(cases, monkeypatch):
    """On a GPU the main process does it; here on a CPU that is taken for one."""
    expected = patches(weights_loader(cases), 0)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_augmented_patches", lambda *_: pytest.fail("augmented by the worker"))
        samples = weights_loader(cases).loader.dataset
        sampler = data.EpochSampler(5, 6, 0, "weights/0")
        patch.setattr(data.TrainingLoader, "on_gpu", True, raising=False)
        loader = data.TrainingLoader(samples, sampler, 2, 0, torch.device("meta"))
        loader.device = CPU
        assert same(patches(loader, 0), expected)


def test_waiting_is_measured(cases, monkeypatch):
    loader = weights_loader(cases)
    waited = data.ShareOfWaiting(loader, weights_loader(cases))
    assert waited.take(1.0) == 0
    clock = iter(range(100))
    monkeypatch.setattr(data.time, "perf_counter", lambda: next(clock))
    patches(loader, 0)
    assert loader.seconds_waited == 3  # a second for each batch
    assert waited.take(10.0) == 0.3 and waited.take(10.0) == 0


def test_patches_do_not_depend_on_the_order_of_asking(cases):
    samples = weights_loader(cases).loader.dataset
    places = [(epoch, turn, index) for epoch in (0, 4) for turn in (0, 1) for index in range(len(cases))]
    first = {place: samples[place] for place in places}
    for place in reversed(places):
        image, label, draw, _ = samples[place]
        assert torch.equal(first[place][0], image) and torch.equal(first[place][1], label) and first[place][2] == draw


def test_patches_differ_between_epochs_turns_streams_seeds_and_cases(cases):
    one = weights_loader(cases[:1] * 2).loader.dataset  # the same case twice
    seeded, streamed = weights_loader(cases[:1], seed=1), weights_loader(cases[:1], "architecture")
    samples = [one[0, 0, 0], one[1, 0, 0], one[0, 1, 0], one[0, 0, 1]]
    samples += [loader.loader.dataset[0, 0, 0] for loader in (seeded, streamed)]
    images = [augmentation.augment(*sample[:3])[0] for sample in samples]
    for number, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[number + 1 :]), number


def places_of(sampler: data.EpochSampler, epoch: int) -> list[tuple[int, int, int]]:
    sampler.start = epoch, 0
    return [place for place, _ in zip(sampler, range(sampler.length), strict=False)]


@pytest.mark.parametrize(("num_cases", "length"), [(1, 1), (1, 4), (5, 3), (5, 5), (5, 13), (20, 20)])
def test_epoch_sampler_passes_over_all_cases_and_wraps(num_cases, length):
    sampler = data.EpochSampler(num_cases, length, 0, "weights/0")
    for epoch in (0, 7):
        places = places_of(sampler, epoch)
        assert len(places) == length == len(set(places))
        assert {place[0] for place in places} == {epoch}
        for start in range(0, length, num_cases):
            turn = places[start : start + num_cases]
            assert {place[1] for place in turn} == {start // num_cases}
            assert len({place[2] for place in turn}) == len(turn)
            assert {place[2] for place in turn} <= set(range(num_cases))


def test_epoch_sampler_goes_on_into_the_next_epoch():
    sampler = data.EpochSampler(5, 7, 0, "weights/0")
    expected = [*places_of(sampler, 2), *places_of(sampler, 3)]
    sampler.start = 2, 0
    assert [place for place, _ in zip(sampler, range(14), strict=False)] == expected


def test_epoch_samplers_order_depends_on_seed_stream_and_epoch_only():
    def order(seed=0, stream="weights/0", epoch=3, length=40):
        return [index for _, _, index in places_of(data.EpochSampler(20, length, seed, stream), epoch)]

    assert order() == order() and order(length=17) == order()[:17]
    orders = [order(), order(seed=1), order(stream="weights/1"), order(epoch=4)]
    orders += [order()[20:], order(length=20)]  # two turns of one epoch
    assert len({tuple(o[:20]) for o in orders}) == 5  # the last one is the first's beginning


# Ranks


def numbered(count: int) -> list[Case]:
    return [Case(f"case{number}", (f"image{number}",), f"label{number}") for number in range(count)]


@pytest.mark.parametrize(
    ("num_cases", "world_size", "batch_size"), [(7, 1, 2), (7, 2, 2), (5, 3, 1), (2, 4, 2), (1, 2, 1)]
)
def test_ranks_share_the_cases_and_take_equal_steps(monkeypatch, num_cases, world_size, batch_size):
    monkeypatch.setattr(Cache, "hold", lambda self, cases, what: cases)
    args = options(num_images_per_batch=batch_size)
    steps = data.steps_per_epoch(num_cases, batch_size, Processes(0, world_size, CPU))
    loaders = [
        data.training_loader(numbered(num_cases), "weights", steps, cache_of(), args, Processes(rank, world_size, CPU))
        for rank in range(world_size)
    ]
    assert {len(loader) for loader in loaders} == {steps}
    held = [loader.loader.dataset.numbers for loader in loaders]
    for loader, numbers in zip(loaders, held, strict=True):
        assert loader.loader.dataset.cases == [numbered(num_cases)[number] for number in numbers]
        # Each is seen in every epoch.
        assert {index for _, _, index in places_of(loader.sampler, 0)} == set(range(len(numbers)))
    assert set().union(*held) == set(range(num_cases))
    if num_cases >= world_size:
        assert sum(map(len, held)) == num_cases  # no case is prepared twice
    assert steps == max(1, -(-num_cases // (world_size * batch_size)))


def test_ranks_that_hold_the_same_case_draw_different_patches(cases):
    loaders = [weights_loader(cases[:1], processes=Processes(rank, 2, CPU), steps=2) for rank in (0, 1)]
    first, second = (patches(loader, 0) for loader in loaders)
    assert len(first) == len(second) == 4
    assert not any(torch.equal(a, b) for a in first[::2] for b in second[::2])


@pytest.mark.parametrize("mode", ["ram", "disk", "none"])
def test_validation_cases_are_whole_and_numbered(cases, mode, tmp_path):
    numbers = []
    for rank in range(2):
        loader = data.validation_loader(cases, cache_of(mode, tmp_path), Processes(rank, 2, CPU))
        assert len(loader) == (3, 2)[rank]
        for case in loader:
            assert case["image"].shape == case["label"].shape == (1, 1, 24, 26, 22)
            assert case["image"].dtype == torch.float32 and case["label"].dtype == torch.uint8
            numbers.append(case["number"])
            expected = prepare(cases[numbers[-1]], TASK, Leniency())
            assert np.array_equal(case["image"][0].numpy(), expected.image.astype(np.float32))
            assert np.array_equal(case["label"][0, 0].numpy(), expected.label)
    assert numbers == [0, 2, 4, 1, 3]


def test_a_rank_without_validation_cases_has_an_empty_loader(cases):
    assert list(data.validation_loader(cases[:1], cache_of(), Processes(1, 2, CPU))) == []
    assert list(data.validation_loader([], cache_of(), ALONE)) == []


def test_number_of_workers(monkeypatch):
    monkeypatch.setattr(data, "cores_per_process", lambda: 64)
    assert [data.num_workers(options(num_workers=given)) for given in (None, 0, 9)] == [6, 0, 9]
    monkeypatch.setattr(data, "cores_per_process", lambda: 1)
    assert data.num_workers(options(num_workers=None)) == 0


def test_a_patch_that_the_network_cannot_take_is_reported_with_the_nearest_that_it_can(cases, tmp_path):
    root = Path(cases[0].images[0]).parents[1]
    common = ["--root", str(root), "--output_root", str(tmp_path), "--patch_size", "96", "40", "30"]
    with pytest.raises(UserError, match="--patch_size 96 40 30 does not fit 4 depths.* for example 96 (32|48) 32"):
        search_dints.prepare(search_dints.parse_args(common))
    assert train_dints.parse_args([*common, "--arch_ckpt", "x.pth"]).patch_size == [96, 40, 30]
