"""A step of the weights, what it leaves alone, and its schedules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dints.running.precision import Precision
from dints.running.processes import Processes
from dints.training.losses import EpochLoss
from dints.training.steps import (
    WeightsTraining,
    averaged,
    halved,
    is_validation_epoch,
    scheduled,
    sgd,
    weights_step,
    weights_training,
)

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
NONFINITE = pytest.mark.fault("non-finite loss on one rank")


def training_of(network: nn.Module, precision: str = "fp32", rate: float = 0.1, **more: object) -> WeightsTraining:
    weights = network.parameters()
    return weights_training(network, weights, Precision(precision, CPU), ALONE, learning_rate=rate, **more)


def batch_of(value: float | None = None) -> dict[str, torch.Tensor]:
    """Make an image, random or everywhere the same, all of it foreground."""
    image = torch.randn(1, 1, 4, 4, 4) if value is None else torch.full((1, 1, 4, 4, 4), value)
    return {"image": image, "label": torch.ones(1, 1, 4, 4, 4, dtype=torch.uint8)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_step_lowers_the_loss(precision):
    torch.manual_seed(0)
    training = training_of(nn.Conv3d(1, 3, 3, padding=1), precision)
    image = torch.randn(2, 1, 8, 8, 8)
    batch = {"image": image, "label": (image > -0.5).to(torch.uint8) + (image > 0.5)}
    losses = [weights_step(training, batch) for _ in range(60)]
    assert losses[0].dtype == torch.float32 and not losses[0].requires_grad
    assert losses[-1] < 0.6 * losses[0]


def test_weights_step_starts_from_no_gradient():
    network, batch, gradients = nn.Conv3d(1, 2, 1), batch_of(), []
    training = training_of(network, rate=0.0)  # so that both steps have the same gradient
    for _ in range(2):
        weights_step(training, batch)
        gradients.append(network.weight.grad.clone())
    assert torch.equal(*gradients)


@NONFINITE
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_step_whose_loss_is_not_finite_changes_nothing(precision, step):
    """Nor does it spoil the momentum, though it be the first one."""

    def trained(steps: list[float]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = nn.Conv3d(1, 2, 1)
        training = training_of(network, precision)
        for value in steps:
            weights_step(training, batch_of(value))
        return [*network.parameters(), *(state["momentum_buffer"] for state in training.optimizer.state.values())]

    sound = [1.0, 2.0, 3.0]
    spoilt = [*sound[:step], math.nan, *sound[step:]]
    assert all(map(torch.equal, trained(sound), trained(spoilt)))


@NONFINITE
def test_gradients_that_the_fp16_scaler_refuses_are_no_error():
    """It skips the step, and the loss, which is finite, goes on."""
    network, loss = nn.Conv3d(1, 2, 1), EpochLoss("loss", ALONE)
    network.weight.register_hook(lambda gradient: gradient * math.inf)
    before = network.weight.detach().clone()
    training = training_of(network)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # fp16 itself needs a GPU
    loss.add(weights_step(training, batch_of()), 1, [])
    assert math.isfinite(loss.mean()) and torch.equal(network.weight, before) and training.scaler.get_scale() == 512


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_weights_step_clips_the_norm_of_all_gradients(scale):
    torch.manual_seed(0)
    batch, network, norms = batch_of(), nn.Conv3d(1, 2, 1), []
    for limit in (None, 1e6, 0.01):
        twin = copy.deepcopy(network)
        training = training_of(twin, max_gradient_norm=limit)
        training.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        training.optimizer = torch.optim.SGD(twin.parameters(), 1.0)  # whose step is the gradient
        weights_step(training, batch)
        steps = [a - b for a, b in zip(twin.parameters(), network.parameters(), strict=True)]
        norms.append(torch.cat([step.detach().flatten() for step in steps]).norm().item())
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.1
    assert norms[2] == pytest.approx(0.01, rel=1e-3)


def test_sgd_is_pytorchs_published_settings():
    results = []
    for build in (sgd, lambda p, rate: torch.optim.SGD(p, rate, momentum=0.9, weight_decay=4e-5)):
        torch.manual_seed(0)
        network = nn.Conv3d(2, 2, 3)
        optimizer = build(network.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.ones(1, 2, 4, 4, 4)).square().sum().backward()
            optimizer.step()
        results.append(network.weight.detach())
    torch.testing.assert_close(*results)


def test_the_learning_rate_reaches_every_group():
    training = training_of(nn.Conv3d(1, 2, 1))
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 5.0})
    training.set_learning_rate(0.25)
    assert [group["lr"] for group in training.optimizer.param_groups] == [0.25, 0.25]


def test_the_learning_rate_halves_at_each_milestone():
    expected = {0: 8, 0.2: 8, 0.21: 4, 0.4: 4, 0.6: 2, 0.8: 2, 0.81: 1, 1: 1}
    assert {share: halved(8, share, (0.2, 0.4, 0.8)) for share in expected} == expected
    assert halved(0.025, 1.0, ()) == 0.025


def test_the_polynomial_schedule_is_nnunets():
    assert scheduled("polynomial", 0.01, 0.0, (0.5,)) == 0.01
    assert scheduled("polynomial", 0.01, 0.25, (0.5,)) == pytest.approx(0.01 * (1 - 250 / 1000) ** 0.9)
    assert scheduled("polynomial", 0.01, 1.0, ()) == 0
    assert scheduled("halvings", 8, 0.6, (0.2, 0.5)) == halved(8, 0.6, (0.2, 0.5)) == 2


def test_weights_are_averaged_after_every_step():
    torch.manual_seed(0)
    network = nn.Conv3d(1, 2, 1)
    average = averaged(network, 0.25)
    training, expected = training_of(network, average=average), None
    for decay in (None, 2 / 11, 3 / 12, 0.25, 0.25):  # the second's would be 0.25 were it not so early
        weights_step(training, batch_of())
        now = network.weight.detach().clone()
        expected = now if decay is None else decay * expected + (1 - decay) * now
    torch.testing.assert_close(average.module.weight.detach(), expected)
    assert not torch.equal(average.module.weight, network.weight)
    assert averaged(network, 0.0) is None


def test_the_average_is_pytorchs():
    """To the bit, and its state too, so that runs of before go on."""
    torch.manual_seed(0)

    def update(averages, weights, steps):
        get_ema_multi_avg_fn(min(0.5, (1 + int(steps)) / (10 + int(steps))))(averages, weights, steps)

    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
    pytorchs, ours = AveragedModel(network, multi_avg_fn=update), averaged(network, 0.5)
    for _ in range(12):
        network(torch.randn(1, 1, 4, 4, 4))
        for weight in network.parameters():
            weight.data += torch.randn_like(weight)
        pytorchs.update_parameters(network)
        ours.update_parameters(network)
        states = pytorchs.state_dict(), ours.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(map(torch.equal, states[0].values(), states[1].values()))


@pytest.mark.parametrize(
    ("num_epochs", "every", "expected"), [(6, 2, [1, 3, 5]), (7, 3, [2, 5, 6]), (2, 100, [1]), (3, 1, [0, 1, 2])]
)
def test_validation_epochs_are_regular_and_include_the_last(num_epochs, every, expected):
    assert [epoch for epoch in range(num_epochs) if is_validation_epoch(epoch, num_epochs, every)] == expected
