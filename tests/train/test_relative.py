"""Learned ranges under optimizers that normalize the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.train.groups import quantizers_of
from bitwright.train.relative import GAIN, make_relative


def prepared(rule: str = "lsq") -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(32, 8)
    sites = {"*.weight": "int4/channel", "*.input": "uint8/asym"}
    model = bw.prepare(net, bw.Plan.preset("w8a8", net, x, sites=sites, ranges={"input": rule}))
    bw.calibrate(model, [x])
    return model


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    bw.Schedule(steps=10, lr=1.0, shares=(0.0, 1.0, 0.0), ramp=0.0).apply(model, 0, optimizer)  # a rate of 0.01
    model(torch.randn(64, 8)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop])
def test_a_step_of_adam_moves_every_scale_by_the_same_share(optimizer: type[torch.optim.Optimizer]) -> None:
    model = prepared()
    before = {q.site: q.scale.detach().clone() for q in quantizers_of(model)}
    weight = model[0].weight.detach().clone()
    one_step(model, optimizer(bw.param_groups(model, weight_decay=0.0), lr=1.0))
    for quantizer in quantizers_of(model):
        share = (quantizer.scale.detach() / before[quantizer.site]).log().abs()
        assert share.max() <= 0.1 + 1e-6
        assert share.max() > 0.05
    assert (model[0].weight - weight).abs().max() > 0.005  # weights go as the optimizer wants


def test_small_steps_are_steps_of_the_logarithm() -> None:
    model = prepared()
    optimizer = torch.optim.Adam(bw.param_groups(model, weight_decay=0.0), lr=1.0)
    before = {q.site: q.scale.detach().clone() for q in quantizers_of(model)}
    schedule = bw.Schedule(steps=10, lr=1e-3, shares=(0.0, 1.0, 0.0), ramp=0.0)
    schedule.apply(model, 0, optimizer)
    model(torch.randn(64, 8)).square().mean().backward()
    optimizer.step()
    for quantizer in quantizers_of(model):
        assert quantizer.scale.grad is not None
        moved = (quantizer.scale.detach() / before[quantizer.site]).log().abs()
        assert torch.allclose(moved, torch.full_like(moved, GAIN * 1e-5), rtol=0.05)


def test_offsets_move_by_a_share_of_the_width() -> None:
    model = prepared("lsq+")
    [quantizer] = [q for q in quantizers_of(model) if q.site == "0.input"]
    width, start = quantizer.scale.item() * 255, quantizer.offset.item()
    one_step(model, torch.optim.Adam(bw.param_groups(model, weight_decay=0.0), lr=1.0))
    assert quantizer.offset.item() != start
    assert abs(quantizer.offset.item() - start) <= 0.1 * width * (1 + 1e-4)


def test_sgd_takes_its_own_steps() -> None:
    model, other = prepared(), prepared()
    optimizer, plain = (torch.optim.SGD(bw.param_groups(m), lr=0.01) for m in (model, other))
    torch.manual_seed(1)
    one_step(model, optimizer)
    bw.Schedule(steps=10, lr=1.0, shares=(0.0, 1.0, 0.0), ramp=0.0).apply(other, 0)
    torch.manual_seed(1)
    other(torch.randn(64, 8)).square().mean().backward()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_rule_is_installed_once() -> None:
    model = prepared()
    optimizer = torch.optim.Adam(bw.param_groups(model), lr=1e-5)
    for _ in range(3):
        make_relative(model, optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
