"""A volume that is done slab by slab is segmented as one that is done at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import chain

from dints.data.grid import Resampling
from dints.inference import slabs
from dints.network.discrete import DiscreteNetwork
from dints.running.precision import Precision
from dints.training import windows
from dints.training.windows import SlidingWindow

FP32 = Precision("fp32", torch.device("cpu"))
WINDOW = SlidingWindow((16, 8, 8), 0.4, 3)
AXES = {
    "RAS": np.diag([2.0, 2, 2]),
    "LPS": np.diag([-1.5, -1.5, 2.5]),
    "permuted PIR": np.array([[0, 0, 2.4], [-1.8, 0, 0], [0, -1.4, 0]]),
}


@pytest.fixture(scope="module")
def networks() -> list[DiscreteNetwork]:
    """Make two networks of three classes with random weights."""
    torch.manual_seed(0)
    return [DiscreteNetwork(chain(0, 1, 0, num_depths=2), 2, 3, 0.125).eval() for _ in range(2)]


def affine(axes: np.ndarray) -> np.ndarray:
    full = np.eye(4)
    full[:3, :3] = axes
    return full


@pytest.mark.parametrize(
    ("axes", "shape", "spacing"),
    [
        ("RAS", (40, 25, 23), None),
        ("LPS", (23, 64, 20), (1.7, 3.1, 2.2)),
        ("permuted PIR", (23, 64, 20), (1.7, 3.1, 2.2)),
    ],
    ids=str,
)
def test_labels_are_those_of_the_whole_volume(networks, axes, spacing, shape):
    resampling = Resampling(shape, affine(AXES[axes]), spacing)
    image = np.random.default_rng(0).normal(size=(2, *resampling.shape)).astype(np.float32)
    assert slabs.fits(resampling.shape, WINDOW, resampling)
    found = slabs.segmented(image, networks[:1], WINDOW, FP32, resampling).labels
    expected = resampling.undo(WINDOW.probabilities(image, networks[0], FP32)).argmax(0)
    assert found.shape == shape and found.dtype == np.uint8 and len(np.unique(found)) == 3
    # where two classes are equally probable but for rounding
    assert (found != expected).mean() < 1e-4


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_probabilities_are_those_of_the_whole_volume(networks, axis):
    image = np.random.default_rng(0).normal(size=(2, 40, 24, 16)).astype(np.float32)
    starts, parts = zip(*slabs.probabilities(image, networks[0], WINDOW, FP32, axis), strict=True)
    assert len(parts) > 1 or axis == 2
    assert list(starts) == np.cumsum([0, *(part.shape[1 + axis] for part in parts)])[:-1].tolist()
    whole = WINDOW.probabilities(image, networks[0], FP32)
    assert np.allclose(np.concatenate(parts, 1 + axis), whole, atol=1e-6)


def test_maps_are_those_of_the_whole_volume(networks, spacing=(1.7, 3.1, 2.2)):
    resampling = Resampling((40, 25, 23), affine(AXES["permuted PIR"]), spacing)
    image = np.random.default_rng(0).normal(size=(2, *resampling.shape)).astype(np.float32)
    found = slabs.segmented(
        image, networks[:1], WINDOW, FP32, resampling, ("probabilities", "uncertainty")
    )
    expected = resampling.undo(WINDOW.probabilities(image, networks[0], FP32)).astype(np.float64)
    entropy = -(expected * np.log(expected)).sum(0) / np.log(3)
    assert found.probabilities.dtype == found.uncertainty.dtype == np.uint8
    assert np.abs(found.probabilities / 255 - expected).max() < 0.5 / 255 + 1e-5
    assert np.abs(found.uncertainty / 255 - entropy).max() < 0.5 / 255 + 1e-5
    assert np.ptp(found.uncertainty) > 10


def test_room_for_a_patchs_planes_is_asked_for_after_a_pass(networks, monkeypatch):
    asked, passes = [], []
    monkeypatch.setattr(
        windows, "place_of_sums", lambda count, device: asked.append((count, len(passes))) or device
    )
    hook = networks[0].register_forward_hook(lambda *_: passes.append(1))
    image = np.random.default_rng(0).normal(size=(2, 40, 24, 16)).astype(np.float32)
    list(slabs.probabilities(image, networks[0], WINDOW, FP32, 0))
    hook.remove()
    # float32 of three classes, and the weights' sums
    assert asked == [(16 * 24 * 16 * (3 + 1) * 4, 1)]


def test_padding_or_shearing_is_done_at_once():
    straight = Resampling((40, 40, 40), np.eye(4), (2.0, 2.0, 2.0))
    assert straight.is_separable and not slabs.fits((15, 40, 40), WINDOW, straight)
    cos, sin = np.cos(np.radians(20)), np.sin(np.radians(20))
    rotated = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.2]])
    sheared = rotated @ np.array([[1, 0.3, 0], [0, 1, 0], [0, 0, 1]])
    for axes, separable in ((rotated, True), (sheared, False)):
        resampling = Resampling((40, 40, 40), affine(axes), (2.0, 2.0, 2.0))
        assert resampling.is_separable == separable
        window = SlidingWindow((8, 8, 8), 0.5, 1)
        assert slabs.fits(resampling.shape, window, resampling) == separable
