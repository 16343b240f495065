"""A step of the weights, what it leaves alone, and its schedules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_run import ALONE, begun
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dints.running.epoch_loss import EpochLoss
from dints.settings import RetrainingSettings
from dints.training.steps import MovingAverage, WeightsTrainer, scheduled, sgd

NONFINITE = pytest.mark.fault("non-finite loss on one rank")


def settings(**given: object) -> RetrainingSettings:
    defaults = {"learning_rate": 0.1, "learning_rate_schedule": "halvings", "average_decay": 0.0}
    return RetrainingSettings(**{**defaults, **given})


def trainer_of(network: nn.Module, precision: str = "fp32", **given: object) -> WeightsTrainer:
    run = begun(precision=precision)
    return WeightsTrainer(network, network.parameters(), settings(**given), run, (1, 1, 4, 4, 4))


def batch_of(value: float | None = None) -> dict[str, torch.Tensor]:
    """Make an image, random or everywhere the same, all of it foreground."""
    size = 1, 1, 4, 4, 4
    image = torch.randn(size) if value is None else torch.full(size, value)
    return {"image": image, "label": torch.ones(size, dtype=torch.uint8)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_lower_the_loss(precision):
    torch.manual_seed(0)
    weights = trainer_of(nn.Conv3d(1, 3, 3, padding=1), precision)
    image = torch.randn(2, 1, 8, 8, 8)
    batch = {"image": image, "label": (image > -0.5).to(torch.uint8) + (image > 0.5)}
    losses = [weights.step(batch) for _ in range(60)]
    assert losses[0].dtype == torch.float32 and not losses[0].requires_grad
    assert losses[-1] < 0.6 * losses[0]


def test_a_step_starts_from_no_gradient_and_leaves_other_parameters_alone():
    network, batch, gradients = nn.Conv3d(1, 2, 1), batch_of(), []
    run = begun()
    weights = WeightsTrainer(network, [network.weight], settings(), run, (1, 1, 4, 4, 4))
    weights.schedule(0.0)
    weights.optimizer.param_groups[0]["lr"] = 0.0  # so that both steps have the same gradient
    for _ in range(2):
        weights.step(batch)
        gradients.append(network.weight.grad.clone())
    assert torch.equal(*gradients)
    assert network.bias.grad is None and network.bias.requires_grad


@NONFINITE
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_step_whose_loss_is_not_finite_changes_nothing(precision, step):
    """Nor does it spoil the momentum, though it be the first one."""

    def trained(steps: list[float]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = nn.Conv3d(1, 2, 1)
        weights = trainer_of(network, precision)
        for value in steps:
            weights.step(batch_of(value))
        states = weights.optimizer.state.values()
        return [*network.parameters(), *(state["momentum_buffer"] for state in states)]

    sound = [1.0, 2.0, 3.0]
    spoilt = [*sound[:step], math.nan, *sound[step:]]
    assert all(map(torch.equal, trained(sound), trained(spoilt)))


@NONFINITE
def test_gradients_that_the_fp16_scaler_refuses_are_no_error():
    """It skips the step; the loss, which is finite, counts."""
    network, loss = nn.Conv3d(1, 2, 1), EpochLoss("loss", ALONE)
    network.weight.register_hook(lambda gradient: gradient * math.inf)
    before = network.weight.detach().clone()
    weights = trainer_of(network)
    weights.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # fp16 itself needs a GPU
    loss.add(weights.step(batch_of()), 1, [])
    assert math.isfinite(loss.mean()) and torch.equal(network.weight, before)
    assert weights.scaler.get_scale() == 512


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_step_clips_the_norm_of_all_gradients(scale):
    torch.manual_seed(0)
    batch, network, norms = batch_of(), nn.Conv3d(1, 2, 1), []
    for limit in (None, 1e6, 0.01):
        twin = copy.deepcopy(network)
        weights = trainer_of(twin, max_gradient_norm=limit)
        weights.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        weights.optimizer = torch.optim.SGD(twin.parameters(), 1.0)  # whose step is the gradient
        weights.step(batch)
        steps = [a - b for a, b in zip(twin.parameters(), network.parameters(), strict=True)]
        norms.append(torch.cat([step.detach().flatten() for step in steps]).norm().item())
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.1
    assert norms[2] == pytest.approx(0.01, rel=1e-3)


def test_sgd_is_pytorchs_with_the_published_settings():
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


def test_the_learning_rate_halves_at_each_milestone_or_falls_as_nnunets():
    halvings = settings(learning_rate_milestones=(0.2, 0.4, 0.8))
    expected = {0: 8, 0.2: 8, 0.21: 4, 0.4: 4, 0.6: 2, 0.8: 2, 0.81: 1, 1: 1}
    assert {share: scheduled(8, share, halvings) for share in expected} == expected
    polynomial = settings(learning_rate_schedule="polynomial", learning_rate_milestones=(0.5,))
    expected = {0: 0.01, 0.25: pytest.approx(0.01 * (1 - 250 / 1000) ** 0.9), 1: 0}
    assert {share: scheduled(0.01, share, polynomial) for share in expected} == expected
    weights = trainer_of(nn.Conv3d(1, 2, 1), learning_rate_milestones=(0.5,))
    weights.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 5.0})
    weights.schedule(0.75)
    assert [group["lr"] for group in weights.optimizer.param_groups] == [0.05, 0.05]


def test_weights_are_averaged_after_every_step():
    torch.manual_seed(0)
    network = nn.Conv3d(1, 2, 1)
    weights, expected = trainer_of(network, average_decay=0.25), None
    for decay in (None, 2 / 11, 3 / 12, 0.25, 0.25):  # the second's would be 0.25 were it not early
        weights.step(batch_of())
        now = network.weight.detach().clone()
        expected = now if decay is None else decay * expected + (1 - decay) * now
    torch.testing.assert_close(weights.averaged.weight.detach(), expected)
    assert not torch.equal(weights.averaged.weight, network.weight)
    assert {*weights.parts} == {"optimizer", "scaler", "average"}
    plain = trainer_of(network)
    assert plain.averaged is network and {*plain.parts} == {"optimizer", "scaler"}


def test_the_average_is_pytorchs():
    """To the bit, and its state too."""
    torch.manual_seed(0)

    def update(averages, weights, steps):
        decay = min(0.5, (1 + int(steps)) / (10 + int(steps)))
        get_ema_multi_avg_fn(decay)(averages, weights, steps)

    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
    pytorchs, ours = AveragedModel(network, multi_avg_fn=update), MovingAverage(network, 0.5)
    for _ in range(12):
        network(torch.randn(1, 1, 4, 4, 4))
        for weight in network.parameters():
            weight.data += torch.randn_like(weight)
        pytorchs.update_parameters(network)
        ours.update_parameters(network)
        states = pytorchs.state_dict(), ours.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(map(torch.equal, states[0].values(), states[1].values()))
