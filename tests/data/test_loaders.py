"""Batches whose patches depend on seed and place alone, and whole volumes for validation."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from small_run import begun
from toys import ALONE, TASK, cache_of, make_case

from dints.data import augmentation, loaders
from dints.data.cache import Cache
from dints.data.cases import prepare
from dints.data.listing import Case
from dints.data.loaders import (
    EpochSampler,
    TrainingLoader,
    TrainingSamples,
    choose_augmentation,
    training_loader,
    validation_loader,
)
from dints.running.processes import Processes
from dints.running.run import Run
from dints.settings import PatchSettings

MODES = ["ram", "disk", "none"]


def rank_of(rank: int, world_size: int) -> Processes:
    return replace(ALONE, rank=rank, world_size=world_size)


def run_of(processes: Processes, **settings: object) -> Run:
    run = begun(**settings)
    run.processes = processes  # loaders exchange nothing with other ranks
    return run


def settings_of(batch_size: int = 2, flip_axes: Sequence[str] = ("all",)) -> PatchSettings:
    return PatchSettings(num_images_per_batch=batch_size, flip_axes=flip_axes)


def loader_of(
    cases: Sequence[Case],
    cache: Cache | None = None,
    processes: Processes = ALONE,
    batch_size: int = 2,
    steps: int | None = 3,
    stream: str = "weights",
    **settings: object,
) -> TrainingLoader:
    run = run_of(processes, **{"num_workers": 0, **settings})
    cache, patches = cache or cache_of(), settings_of(batch_size)
    return training_loader(cases, cache, patches, run, steps=steps, stream=stream)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    folder = tmp_path_factory.mktemp("cases")
    return [make_case(folder / f"{number}", (24, 26, 22), seed=number) for number in range(5)]


# Patches


@pytest.mark.parametrize(
    ("shape", "num_channels"),
    [((20, 20, 20), 4), ((3, 40, 1), 1)],
)
def test_patches_have_the_networks_shape_and_type(tmp_path, shape, num_channels):
    task = replace(TASK, num_channels=num_channels)
    case = make_case(tmp_path, shape, num_channels)
    loader = loader_of([case], cache_of(task=task), batch_size=3)
    for epoch in range(3):  # so that each random transform is drawn
        for batch in loader.epoch(epoch):
            image, label = batch["image"], batch["label"]
            assert image.shape == (3, num_channels, 16, 16, 16) and image.dtype == torch.float32
            assert label.shape == (3, 1, 16, 16, 16) and label.dtype == torch.uint8
            assert type(image) is torch.Tensor and type(label) is torch.Tensor
            assert torch.isfinite(image).all() and label.max() < 3
            assert batch["cases"] == ["case"] * 3 and set(batch) == {"image", "label", "cases"}


def tensors(batches) -> list[torch.Tensor]:
    """Return images and labels of batches, in order."""
    return [batch[key] for batch in batches for key in ("image", "label")]


def patches(loader: TrainingLoader, epoch: int) -> list[torch.Tensor]:
    return tensors(loader.epoch(epoch))


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def test_patches_do_not_depend_on_workers_restart_or_cache(cases, tmp_path, monkeypatch):
    straight = loader_of(cases)
    expected = [patches(straight, epoch) for epoch in range(3)]
    assert not same(expected[0], expected[1])
    loader = loader_of(cases, num_workers=2)
    assert same(patches(loader, 0), expected[0])
    monkeypatch.setattr(loader, "loader", None)  # its workers go on, without a start
    assert same(patches(loader, 1), expected[1])
    assert same(patches(loader_of(cases, cache_of("disk", tmp_path)), 2), expected[2])  # restarted
    assert same(patches(loader_of(cases, cache_of("none")), 1), expected[1])


@pytest.mark.parametrize(
    ("mode", "chain"), zip(MODES, (*augmentation.CHAINS, "nnunet"), strict=True)
)
def test_workers_that_are_not_forked_give_the_same_patches(cases, tmp_path, mode, chain):
    """As on Windows and macOS, where a worker is no copy of this process but gets all in
    writing.
    """
    loader = loader_of(cases, cache_of(mode, tmp_path)).loader
    loader.dataset.steps = augmentation.chain(chain, (0, 2))
    sent = ForkingPickler.dumps((loader.dataset, loader.collate_fn, loaders._ignore_signals))
    samples, make_batch, _ = ForkingPickler.loads(sent)
    for place in ((0, 0, 1), (3, 1, 4)):
        expected = loader.collate_fn([loader.dataset[place]])
        assert same(tensors([make_batch([samples[place]])]), tensors([expected]))


def test_patches_do_not_depend_on_how_far_an_earlier_epoch_was_followed(cases):
    expected = patches(loader_of(cases, steps=7), 3)  # two turns, and more
    for step in (1, 7):
        rest = tensors(loader_of(cases, steps=7).epoch(3, step))
        assert len(rest) == 2 * (7 - step) and all(map(torch.equal, rest, expected[2 * step :]))
    loader = loader_of(cases, num_workers=1, steps=7)
    next(loader.epoch(0))  # as when a run is interrupted
    batches = loader.epoch(3)
    assert same(tensors(next(batches) for _ in range(7)), expected)  # as a search takes them


def test_augmenting_where_the_network_is_gives_the_workers_patches(cases, monkeypatch):
    """On a GPU the main process does it; here on a CPU that is taken for one."""
    expected = patches(loader_of(cases), 0)
    monkeypatch.setattr(TrainingSamples, "augmented_patches", None)  # a worker's way
    samples, sampler = loader_of(cases).loader.dataset, EpochSampler(5, 6, 0, "weights/0")
    loader = TrainingLoader(samples, sampler, 2, 0, torch.device("meta"))
    loader.device = ALONE.device
    assert same(patches(loader, 0), expected)


def test_after_an_error_the_batch_that_was_lost_comes_again(cases, monkeypatch):
    """As when a training that lacked memory for it resumes from a save just before."""
    expected, loader = patches(loader_of(cases), 0), loader_of(cases)
    batches, fetch = loader.epoch(0), loader._next

    def fails() -> None:
        fetch()
        raise MemoryError

    next(batches)
    with monkeypatch.context() as failing, pytest.raises(MemoryError):
        failing.setattr(loader, "_next", fails)
        next(batches)
    assert same(tensors(loader.epoch(0, 1)), expected[2:])  # an image and a label a batch


def lost_connection() -> Iterator[None]:
    raise ConnectionResetError("reset by peer")
    yield


@pytest.mark.fault("GPU or host memory exhausted")
@pytest.mark.parametrize("is_heard", [True, False])
def test_pytorchs_late_report_of_a_killed_worker_is_the_error(cases, monkeypatch, is_heard):
    loader = loader_of(cases)
    monkeypatch.setattr(loader, "_batches", lost_connection())
    monkeypatch.setattr(loader, "_place", (0, 0))
    monkeypatch.setattr(loaders, "SECONDS_TO_HEAR_OF_A_DEATH", 0.4)

    def report(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    before = signal.signal(signal.SIGCHLD, report)
    try:
        if is_heard:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGCHLD)).start()
        says = r"\(pid 7\)" if is_heard else r"\(pid unknown\) is gone: reset by peer"
        with pytest.raises(RuntimeError, match=says):
            next(loader.epoch(0))
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_patches_differ_between_epochs_turns_streams_seeds_cases_and_ranks(cases):
    one = loader_of(cases[:1] * 2).loader.dataset  # the same case twice
    others = {"seed": 1}, {"stream": "architecture"}, {"processes": rank_of(1, 2)}
    samples = [one[0, 0, 0], one[1, 0, 0], one[0, 1, 0], one[0, 0, 1]]
    samples += [loader_of(cases[:1], **given).loader.dataset[0, 0, 0] for given in others]
    images = [augmentation.augment(*sample[:3], augmentation.chain())[0] for sample in samples]
    for number, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[number + 1 :]), number


def places_of(sampler: EpochSampler, epoch: int) -> list[tuple[int, int, int]]:
    sampler.start = epoch, 0
    return [place for place, _ in zip(sampler, range(sampler.length), strict=False)]


@pytest.mark.parametrize(("num_cases", "length"), [(1, 4), (5, 3), (5, 13)])
def test_an_epoch_passes_over_all_cases_in_an_order_of_its_own(num_cases, length):
    sampler = EpochSampler(num_cases, length, 0, "weights/0")
    for epoch in (0, 7):
        places = places_of(sampler, epoch)
        assert len(places) == length == len(set(places))
        assert {place[0] for place in places} == {epoch}
        for start in range(0, length, num_cases):
            turn = places[start : start + num_cases]
            assert {place[1] for place in turn} == {start // num_cases}
            assert len({place[2] for place in turn}) == len(turn)
            assert {place[2] for place in turn} <= set(range(num_cases))

    def order(seed=0, stream="weights/0", epoch=3, length=40):
        return [index for _, _, index in places_of(EpochSampler(20, length, seed, stream), epoch)]

    assert order(length=17) == order()[:17]
    orders = [order(), order(seed=1), order(stream="weights/1"), order(epoch=4), order()[20:]]
    assert len({tuple(order[:20]) for order in orders}) == 5


# Flips and augmentation


def test_flips_and_chain_are_chosen_for_all_loaders(cases, caplog):
    """Both are logged, and returned for the model file."""
    halves = [loader_of(cases[:2]), loader_of(cases[2:], stream="architecture")]
    settings = replace(settings_of(flip_axes=("X", "Z")), augmentation="auto")
    for iterations, name in ((6, "published"), (10**6, "nnunet")):
        with caplog.at_level("INFO"):
            found = choose_augmentation(halves, settings, TASK, begun(), iterations, len(cases))
        assert found == {"flips": {"axes": [0, 2], "reasons": []}, "augmentation": name}
        says = f"{name}, for {iterations} iterations see each case {iterations * 2 / 5:.0f} times"
        assert f"augmentation: {says}" in caplog.text
        for loader in halves:
            steps = loader.loader.dataset.steps
            assert steps[:-1] == augmentation.CHAINS[name] and steps[-1].name == "flip"
            assert steps[-1].draw.keywords == {"axes": (0, 2)}


# Ranks


@pytest.mark.parametrize(("num_cases", "world_size", "batch_size"), [(7, 2, 2), (2, 4, 2)])
@pytest.mark.fault("unequal training steps per rank")
def test_ranks_share_the_cases_and_take_equal_steps(monkeypatch, num_cases, world_size, batch_size):
    monkeypatch.setattr(Cache, "hold", lambda self, cases, what: cases)
    numbered = [Case(f"case{number}", ()) for number in range(num_cases)]
    of_ranks = [
        loader_of(numbered, None, rank_of(rank, world_size), batch_size, steps=None)
        for rank in range(world_size)
    ]
    assert {len(loader) for loader in of_ranks} == {-(-num_cases // (world_size * batch_size))}
    held = [loader.loader.dataset.numbers for loader in of_ranks]
    for loader, numbers in zip(of_ranks, held, strict=True):
        assert loader.loader.dataset.cases == [numbered[number] for number in numbers]
        # Each is seen in every epoch.
        assert {index for _, _, index in places_of(loader.sampler, 0)} == set(range(len(numbers)))
    assert set().union(*held) == set(range(num_cases))
    if num_cases >= world_size:
        assert sum(map(len, held)) == num_cases  # no case is prepared twice


@pytest.mark.fault("fewer cases than ranks; a rank without validation cases")
def test_validation_cases_are_whole_and_numbered(cases):
    numbers = []
    for rank in range(2):
        loader = validation_loader(cases[:3], cache_of(), run_of(rank_of(rank, 2)))
        assert len(loader) == (2, 1)[rank]
        for case in loader:
            assert case["image"].shape == case["label"].shape == (1, 1, 24, 26, 22)
            assert case["image"].dtype == torch.float32 and case["label"].dtype == torch.uint8
            numbers.append(case["number"])
            expected = prepare(cases[numbers[-1]], TASK)
            assert np.array_equal(case["image"][0].numpy(), expected.image.astype(np.float32))
            assert np.array_equal(case["label"][0, 0].numpy(), expected.label)
    assert numbers == [0, 2, 1]
    assert list(validation_loader(cases[:1], cache_of(), run_of(rank_of(1, 2)))) == []


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("cores", "given", "expected"), [(64, None, 6), (64, 9, 9), (4, None, 3)])
def test_workers_are_as_many_as_given_or_as_cores_are_left(cores, given, expected, monkeypatch):
    monkeypatch.setattr(Cache, "hold", lambda self, cases, what: cases)
    monkeypatch.setattr(loaders, "cores_per_process", lambda: cores)
    loader = loader_of([Case("case", ())], num_workers=given).loader
    assert loader.num_workers == expected
