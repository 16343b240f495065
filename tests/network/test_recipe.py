"""The published recipe in MONAI's calls is the oracle of the whole search."""

from __future__ import annotations

import dataclasses

import numpy as np
import published
import pytest
import torch
from small_run import begun

import search_dints
from dints.data.tasks import TASKS
from dints.network.fast import layers
from dints.running.precision import Precision

SIZE = 16
TASK = dataclasses.replace(TASKS["Task07_Pancreas"], patch_size=(SIZE,) * 3)
FLAGS = "--root . --output_root . --num_blocks 2 --num_depths 2 --channel_mul 0.125"
FLAGS += " --learning_rate_arch 0.01 --device cpu --precision fp32"


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Make noisy bright balls: class 1 is a ball, class 2 its core."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.arange(SIZE).float()
    made = []
    for _ in range(count):
        centre = 4 + (SIZE - 8) * torch.rand(3, generator=generator)
        distance = sum(
            (axis.view([-1 if i == j else 1 for j in range(3)]) - centre[i]) ** 2 for i in range(3)
        ).sqrt()
        label = (distance < 4).to(torch.uint8) + (distance < 2)
        image = label + 0.3 * torch.randn(label.shape, generator=generator)
        made.append({"image": image[None, None].float(), "label": label[None, None]})
    return made


@pytest.mark.slow
def test_the_published_search_and_ours_take_the_same_course(monkeypatch):
    """In float64, where rounding has no say; two thirds of the steps train the alphas too."""
    dtype, iterations = torch.float64, 36
    # All ways, however small the size
    for threshold in ("MIN_MULTIPLY_ADDS", "MIN_WEIGHTS", "MIN_WEIGHTS_OF_PRODUCT"):
        monkeypatch.setattr(layers, threshold, 0)
    precision = Precision("fp32", torch.device("cpu"))
    theirs = published.Search(2, 2, 0.125, 1, TASK.num_classes, precision, learning_rate_arch=0.01)
    settings = search_dints.parse_args(FLAGS.split())
    run = begun(machine=settings.machine)
    ours = search_dints.build_supernet(settings, TASK, True, run)
    weights, arch = search_dints.trainers(ours, settings, TASK, run)
    theirs.network.load_state_dict(ours.state_dict())
    alphas = [ours.dints_space.log_alpha_a, ours.dints_space.log_alpha_c]
    starts = [alpha.detach().clone() for alpha in alphas]
    data = [{**batch, "image": batch["image"].to(dtype)} for batch in batches(32)]
    for network in (theirs.network, ours):
        network.to(dtype)
    for state in weights.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
    losses = np.zeros((iterations, 4))
    for iteration in range(iterations):
        sample, other = data[iteration % 32], data[(7 * iteration + 3) % 32]
        losses[iteration, 0] = theirs.weights_step(*sample.values())
        losses[iteration, 1] = weights.step(sample)
        if iteration >= iterations // 3:
            progress = iteration / iterations
            losses[iteration, 2] = theirs.architecture_step(*other.values(), progress)
            losses[iteration, 3] = arch.step(other, progress)
    assert np.abs(losses[:, ::2] - losses[:, 1::2]).max() < 1e-9
    # Both learn, or the comparison shows nothing
    assert losses[-10:, 0].mean() < 0.9 * losses[:10, 0].mean()
    assert all(
        (alpha - start).abs().max() > 0.05 for alpha, start in zip(alphas, starts, strict=True)
    )
    for expected, found in zip(theirs.space.decode(), ours.dints_space.decode(), strict=True):
        np.testing.assert_array_equal(found, expected)
