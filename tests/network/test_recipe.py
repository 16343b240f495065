"""The published recipe in MONAI's calls is the oracle of the whole search: same seeds, same data, no autocast."""

from __future__ import annotations

import dataclasses

import numpy as np
import published
import pytest
import torch

import search_dints
from dints.data.tasks import TASKS
from dints.network.fast import layers
from dints.running.precision import Precision
from dints.running.processes import Processes

PROCESSES = Processes(0, 1, torch.device("cpu"))
FP32 = Precision("fp32", PROCESSES.device)
SIZE = 16
TASK = dataclasses.replace(TASKS["Task07_Pancreas"], patch_size=(SIZE,) * 3)


def searches(num_blocks: int, num_depths: int) -> tuple[published.Search, search_dints.Supernet]:
    """Make both searches with the same weights and alphas."""
    theirs = published.Search(num_blocks, num_depths, 0.125, 1, TASK.num_classes, FP32, learning_rate_arch=0.01)
    size = f"--num_blocks {num_blocks} --num_depths {num_depths} --channel_mul 0.125 --learning_rate_arch 0.01"
    args = search_dints.parse_args(["--root", ".", "--output_root", ".", *size.split()])
    ours = search_dints.Supernet(args, TASK, FP32, PROCESSES)
    theirs.network.load_state_dict(ours.network.state_dict())
    return theirs, ours


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Make noisy bright balls: class 1 is a ball, class 2 its core."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.arange(SIZE).float()
    made = []
    for _ in range(count):
        centre = 4 + (SIZE - 8) * torch.rand(3, generator=generator)
        distance = sum((axis.view([-1 if i == j else 1 for j in range(3)]) - centre[i]) ** 2 for i in range(3)).sqrt()
        label = (distance < 4).to(torch.uint8) + (distance < 2)
        image = label + 0.3 * torch.randn(label.shape, generator=generator)
        made.append({"image": image[None, None].float(), "label": label[None, None]})
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "iterations", "tolerance"),
    [
        # In float64 rounding has no say: all iterations are the same but for the last digits.
        (torch.float64, 60, 1e-9),
        # In float32 rounding grows to 1e-3, here after 75 iterations. The recipes are not what differs: the published
        # one parts from itself after 50 when its first weights are changed by their last digit.
        (torch.float32, 50, 1e-3),
    ],
    ids=str,
)
def test_the_published_search_and_ours_take_the_same_course(dtype, iterations, tolerance, monkeypatch):
    """Two thirds of the iterations also train the architecture."""
    for threshold in ("MIN_MULTIPLY_ADDS", "MIN_WEIGHTS", "MIN_WEIGHTS_OF_PRODUCT"):  # all ways, however small the size
        monkeypatch.setattr(layers, threshold, 0)
    torch.manual_seed(0)
    theirs, ours = searches(3, 3)
    starts = [alpha.detach().clone() for alpha in ours.arch_parameters]
    data = [{**batch, "image": batch["image"].to(dtype)} for batch in batches(32)]
    for search in (theirs, ours):
        search.network.to(dtype)
    for state in ours.weights.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
    losses = np.zeros((iterations, 4))
    for iteration in range(iterations):
        sample, other = data[iteration % 32], data[(7 * iteration + 3) % 32]
        losses[iteration, 0] = theirs.weights_step(*sample.values())
        losses[iteration, 1] = search_dints.weights_step(ours, sample)
        if iteration >= iterations // 3:
            ramp = iteration / iterations
            losses[iteration, 2] = theirs.architecture_step(*other.values(), ramp)
            losses[iteration, 3] = search_dints.architecture_step(ours, other, ramp)
    assert np.abs(losses[:, ::2] - losses[:, 1::2]).max() < tolerance
    assert losses[-10:, 0].mean() < 0.9 * losses[:10, 0].mean()  # both learn, or the comparison shows nothing
    assert all((alpha - start).abs().max() > 0.05 for alpha, start in zip(ours.arch_parameters, starts, strict=True))
    if dtype == torch.float64:
        for expected, found in zip(theirs.space.decode(), ours.space.decode(), strict=True):
            np.testing.assert_array_equal(found, expected)
