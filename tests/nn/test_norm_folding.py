"""A batch norm folded into the layer before it: same function, same statistics, same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bitwright.flow.calibrate import calibrate
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.nn.norm import FoldedBatchNorm1d, FoldedBatchNorm2d
from bitwright.plan.plan import Plan
from models import with_statistics
from nets import layers_of, one_thread  # noqa: F401

PAIRS = {
    "conv": lambda: (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), torch.randn(16, 3, 9, 8)),
    "conv with bias": lambda: (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), torch.randn(16, 3, 9, 8)),
    "no momentum": lambda: (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=None), torch.randn(16, 3, 9, 8)),
    "large eps": lambda: (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.1, momentum=0.3), torch.randn(16, 3, 9, 8)),
    "not affine": lambda: (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), torch.randn(16, 3, 9, 8)),
    "depthwise": lambda: (nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), torch.randn(16, 6, 9, 8)),
    "1-d": lambda: (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), torch.randn(16, 3, 30)),
    "linear": lambda: (nn.Linear(12, 6), nn.BatchNorm1d(6), torch.randn(400, 12)),
}


def make(kind: str) -> tuple[nn.Sequential, Tensor]:
    layer, norm, x = PAIRS[kind]()
    net = nn.Sequential(layer, norm)
    if norm.affine:
        with_statistics(net)
        with torch.no_grad():
            norm.weight[0], norm.weight[1] = -1.2, 0.7
    else:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return net.eval(), x


def folded(net: nn.Module, x: Tensor) -> nn.Module:
    plan = Plan.preset("w8a8", net, x, sites={"0.weight": "int8/channel", "0.input": "uint8/asym"})
    assert plan.folds == {"0": "1"}
    return prepare(net, plan)


@pytest.mark.parametrize("kind", PAIRS)
def test_before_calibration_the_folded_pair_computes_what_it_did(kind: str) -> None:
    net, x = make(kind)
    with torch.no_grad():
        if net[1].affine:
            net[1].weight[2] = 0.0
        expected = net(x)
        prepared = folded(net, x)
        assert (prepared(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert type(prepared[1]) in (FoldedBatchNorm1d, FoldedBatchNorm2d)
        assert torch.equal(prepared[1](x), x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_gradients_reach_weight_gamma_and_beta_as_in_the_pair(kind: str, training: bool) -> None:
    net, x = make(kind)
    if net[1].affine and training:
        with torch.no_grad():
            net[1].weight[3] = 0.0
    prepared = folded(net, x)
    direction = torch.randn_like(net(x))
    for model in (net.train(training), prepared.train(training)):
        (model(x) * direction).sum().backward()
    own = dict(prepared.named_parameters())
    for name, twin in net.named_parameters():
        if training and name == "0.bias":  # the mean that is subtracted takes it away
            assert own[name].grad is None
            continue
        assert twin.grad.abs().max() > 0, name
        assert (own[name].grad - twin.grad).norm() <= 1e-4 * twin.grad.norm(), name
        if name == "1.weight" and training:
            assert own[name].grad[3] != 0


@pytest.mark.parametrize("kind", PAIRS)
def test_in_training_the_folded_pair_without_quantizers_is_the_pair(kind: str) -> None:
    net, x = make(kind)
    if net[1].affine:
        with torch.no_grad():
            net[1].weight[3] = 0.0
    prepared = folded(net, x)
    net.train()
    prepared.train()
    with torch.no_grad():
        for scale in (1.0, 1.7):
            expected = net(scale * x)
            assert (prepared(scale * x) - expected).abs().max() <= 2e-5 * expected.abs().max()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        ours, theirs = getattr(prepared[1], name), getattr(net[1], name)
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("kind", PAIRS)
def test_statistics_approach_those_of_the_pair_with_nearly_lossless_quantizers(kind: str) -> None:
    net, x = make(kind)
    settle(net, x)
    later = 1.15 * x + 0.1  # training sees other data than what the statistics come from
    prepared = folded(net, x)
    calibrate(prepared, [x, later])
    start = net[1].running_mean.clone(), net[1].running_var.clone()
    net.train()
    prepared.train()
    with torch.no_grad():
        for _ in range(40):
            net(later)
            prepared(later)
    ours, theirs = prepared[1], net[1]
    assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked)
    assert ((ours.running_mean - theirs.running_mean).abs() <= 0.02 * theirs.running_var.sqrt()).all()
    assert (ours.running_var / theirs.running_var - 1).abs().max() < 0.03
    assert (theirs.running_var / start[1] - 1).min() > 0.1  # they did not simply stay
    assert (theirs.running_mean - start[0]).abs().max() > 0.04 * theirs.running_var.max().sqrt()


def settle(net: nn.Module, x: Tensor) -> None:
    """Give the norm the statistics of ``x``, as a trained model has them."""
    net.train()
    with torch.no_grad():
        for _ in range(60):
            net(x)
    if net[1].momentum is None:  # a cumulative average over 60 batches would hardly move any more
        net[1].num_batches_tracked.fill_(2)
    net.eval()


def test_a_channel_with_gamma_zero_learns_and_is_never_nan() -> None:
    net, x = make("conv")
    with torch.no_grad():
        net[1].weight[2] = 0.0
    prepared = folded(net, x)
    calibrate(prepared, [x])
    before = copy.deepcopy(prepared[1])
    optimizer = torch.optim.SGD(prepared[1].parameters(), lr=0.1)
    prepared.train()
    with torch.no_grad():
        prepared(x)
    assert (prepared[1].running_mean != before.running_mean).all()
    for _ in range(20):
        optimizer.zero_grad()
        (prepared(x) - 1).square().mean().backward()
        optimizer.step()
    assert prepared[1].weight[2] != 0
    assert all(value.isfinite().all() for value in prepared.state_dict().values())
    with torch.no_grad():
        prepared[1].weight[2] = 0.0
    shipped = convert(prepared)
    prepared.eval()
    assert prepared(x).isfinite().all()
    assert torch.equal(shipped(x), prepared(x))


def test_statistics_move_only_in_training_and_only_unfrozen() -> None:
    net, x = make("conv")
    prepared = folded(net, x)
    before = prepared[1].running_mean.clone()
    calibrate(prepared, [x])
    prepared.eval()(x)
    assert torch.equal(prepared[1].running_mean, before)
    layers_of(prepared)["0"].freeze_norm = True
    prepared.train()(x)
    assert torch.equal(prepared[1].running_mean, before)
    layers_of(prepared)["0"].freeze_norm = False
    prepared(x)
    assert not torch.equal(prepared[1].running_mean, before)


def test_a_frozen_norm_trains_the_function_that_is_evaluated() -> None:
    net, x = make("conv with bias")
    prepared = folded(net, x)
    calibrate(prepared, [x])
    with torch.no_grad():
        expected = prepared.eval()(x)
        assert not torch.equal(prepared.train()(x), expected)
        expected = prepared.eval()(x)
        layers_of(prepared)["0"].freeze_norm = True
        assert torch.equal(prepared.train()(x), expected)


def test_a_batch_with_one_value_per_channel_leaves_the_statistics_alone() -> None:
    net, x = make("linear")
    prepared = folded(net, x)
    calibrate(prepared, [x])
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    with torch.no_grad():
        assert prepared.train()(x[:1]).isfinite().all()
    assert all(torch.equal(before[name], value) for name, value in prepared.state_dict().items())


def test_the_stored_variance_is_the_unbiased_one() -> None:
    net, x = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6, momentum=1.0)), torch.randn(5, 12)
    settle(net, x)
    prepared = folded(net, x)
    calibrate(prepared, [x])
    with torch.no_grad():
        prepared.train()(x)
        expected = net[0](x).var(0, correction=1)
    assert torch.allclose(net[1].running_var, expected)
    assert (prepared[1].running_var / expected - 1).abs().max() < 0.05  # the biased one is 20 % smaller


def test_a_norm_with_two_consumers_or_two_calls_is_not_folded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            return self.fc((self.norm(z) + z).mean((2, 3)))

    assert Plan.preset("w8a8", Twice().eval(), torch.randn(2, 3, 6, 6)).folds == {}
