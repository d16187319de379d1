"""Ranges follow the norm folded into their weight: codes move with weights and learned ranges, not with gamma."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitwright.numerics.affine import encode
from bitwright.plan.plan import Plan
from bitwright.train.folded import FLOOR, factors
from bitwright.train.loop import train
from bitwright.train.schedule import Schedule
from bitwright.train.step import StepRules
from models import ConvNorm
from nets import calibrated, layers_of, one_thread, unequal_kernels  # noqa: F401


def ready(weight: str = "int3/channel", input: str = "uint8/asym") -> nn.Module:
    torch.manual_seed(0)
    net, x = ConvNorm(), torch.randn(8, 2, 6, 6)
    for _ in range(20):
        net(x)
    return calibrated(net, Plan.preset("w8a8", net, x, sites={"*.weight": weight, "*.input": input}), [x])


def codes(model: nn.Module) -> Tensor:
    layer = layers_of(model)["conv"]
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    assert quantizer.qparams is not None
    return encode(layer.folded()[0].detach(), quantizer.spec, quantizer.qparams).int()


def scale(model: nn.Module) -> Tensor:
    return layers_of(model)["conv"].weight_quantizer.scale.detach().clone()  # type: ignore[union-attr]


def step_to(model: nn.Module, gamma: Tensor, variance: Tensor) -> None:
    rules = StepRules(model, Schedule(steps=8))
    rules.before(0)
    with torch.no_grad():
        model.norm.weight.copy_(gamma)
        model.norm.running_var.copy_(variance)
    rules.after(0)


positive = st.lists(st.floats(0.01, 100.0), min_size=4, max_size=4).map(torch.tensor)


@settings(max_examples=30, deadline=None)
@given(positive, positive, st.sampled_from(["int3/channel", "int8/channel", "ternary/channel", "nf4/channel"]))
def test_a_step_on_gamma_or_variance_leaves_the_codes(gamma: Tensor, variance: Tensor, weight: str) -> None:
    model = ready(weight, "float" if weight.startswith("nf4") else "uint8/asym")
    before, moved = codes(model), scale(model)
    step_to(model, gamma, variance)
    assert not torch.equal(scale(model), moved)
    assert (codes(model) != before).float().mean() < 0.03  # those in the middle between two codes may round otherwise


def test_a_gamma_that_changes_its_sign_mirrors_the_codes() -> None:
    model = ready()
    before = codes(model)
    step_to(model, -0.3 * model.norm.weight.detach(), model.norm.running_var)
    assert torch.equal(codes(model).clamp(-3, 3), -before.clamp(-3, 3))


def test_a_channel_that_was_dead_comes_back_with_its_range() -> None:
    model = ready()
    before, gamma, first = scale(model), model.norm.weight.detach().clone(), codes(model)
    step_to(model, torch.zeros(4), model.norm.running_var)
    assert torch.allclose(scale(model).view(-1) / before.view(-1), (FLOOR / factors(ready())[0]).float(), rtol=1e-5)
    step_to(model, gamma, model.norm.running_var)
    assert torch.allclose(scale(model), before, rtol=1e-5)
    assert torch.equal(codes(model), first)


def test_a_range_that_serves_several_factors_stays() -> None:
    model = ready("int4")
    before = scale(model)
    step_to(model, 0.1 * model.norm.weight.detach(), model.norm.running_var)
    assert torch.equal(scale(model), before)


@pytest.mark.parametrize("share", [0.5, None])
def test_gamma_stays_from_when_its_statistics_do(share: float | None) -> None:
    model, schedule = ready(), Schedule(steps=8, freeze_norms=share)
    for step in range(8):
        schedule.apply(model, step)
        assert model.norm.weight.requires_grad is not schedule.norms_frozen(step)
    schedule.apply(model, 0)
    assert model.norm.weight.requires_grad


def test_training_with_a_gamma_that_crosses_zero_ships_what_it_trained() -> None:
    model = ready("int2/channel")
    x = torch.randn(8, 2, 6, 6)
    with torch.no_grad():
        model.norm.weight[0] = 0.004
    signs = set()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        signs.add(bool(model.norm.weight[0] > 0))
        return model(batch).square().sum() + 50 * model.norm.weight[0]

    train(model, loss, [x], schedule=Schedule(steps=16, lr=0.1))
    assert signs == {True, False}
    assert model.norm.running_var.min() > 1e-3
    assert unequal_kernels(model.eval(), [x]) == []
