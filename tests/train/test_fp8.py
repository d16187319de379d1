"""FP8 casts against their code tables, the automaton of delayed scaling, and training with both."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from bitwright.errors import TrainingError
from bitwright.train.fp8 import BACKWARD, FORWARD, Fp8Linear, Fp8Scale, Scaling, cast_fp8, simulate_fp8
from models import Mlp


def table(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """All non-negative finite values, from the definition of the formats (Micikevicius 2022, table 1)."""
    bias, values = 2 ** (exponent_bits - 1) - 1, []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        if exponent_bits == 5 and exponent == 31:
            continue  # infinities and NaN
        if exponent_bits == 4 and code == 127:
            continue  # e4m3 has one NaN and no infinity
        fraction = mantissa / 2**mantissa_bits
        values.append(2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction))
    return values


@pytest.mark.parametrize(("dtype", "bits"), [(FORWARD, (4, 3)), (BACKWARD, (5, 2))])
def test_every_code_comes_back(dtype: torch.dtype, bits: tuple[int, int]) -> None:
    values = torch.tensor(table(*bits))
    assert values.max().item() == {FORWARD: 448.0, BACKWARD: 57344.0}[dtype]
    for signed in (values, -values):
        assert torch.equal(cast_fp8(signed, dtype), signed)
    middles = (values[1:] + values[:-1]) / 2
    nearest = torch.where(torch.arange(len(middles)) % 2 == 0, values[:-1], values[1:])  # ties to the even code
    assert torch.equal(cast_fp8(middles, dtype), nearest)
    assert torch.equal(cast_fp8(middles * (1 + 1e-6), dtype), values[1:])


def test_what_is_too_large_saturates() -> None:
    large = torch.tensor([463.0, 465.0, 1000.0, -1e30])
    assert cast_fp8(large, FORWARD).tolist() == [448.0, 448.0, 448.0, -448.0]
    assert cast_fp8(torch.tensor([62000.0, -1e30]), BACKWARD).tolist() == [57344.0, -57344.0]


def test_delayed_scaling_follows_the_largest_of_its_history() -> None:
    scale, factors = Fp8Scale(FORWARD, length=3, margin=1), []
    for amax in (2.0, 8.0, 1.0, 1.0, 1.0, 1.0, math.inf, 1.0, 0.0, 0.0, 0.0, 0.0):
        factors.append(scale.factor_for(torch.tensor([-amax, amax / 2])))
    known = [2.0, 2.0, 8.0, 8.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    assert factors == [1.0 if amax == 0 else 448 / (2 * amax) for amax in known]


def test_current_scaling_uses_the_tensor_itself() -> None:
    scale = Fp8Scale(FORWARD, length=0)
    for amax in (448.0, 0.007, 1e-30, 3e30):
        x = torch.tensor([amax, -amax, amax / 2, 0.0])
        assert torch.allclose(scale.cast(x), x, rtol=1e-6), amax
    assert scale.cast(torch.zeros(3)).tolist() == [0.0] * 3
    assert scale.cast(torch.zeros(0)).shape == (0,)


def test_a_layer_computes_with_cast_operands_and_a_cast_gradient() -> None:
    net = Mlp()
    assert simulate_fp8(net, scaling="current") == ["2"]
    layer, x, g = net[2], torch.randn(5, 32), torch.randn(5, 32)
    assert isinstance(layer, Fp8Linear)
    assert isinstance(layer, nn.Linear)
    x.requires_grad_()
    out = layer(x)
    out.backward(g)
    cx, cw = (Fp8Scale(FORWARD, 0).cast(value.detach()) for value in (x, layer.weight))
    cg = Fp8Scale(BACKWARD, 0).cast(g)
    assert torch.equal(out, linear(cx, cw, layer.bias))
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert torch.allclose(x.grad, cg @ cw, atol=1e-5)
    assert torch.allclose(layer.weight.grad, cg.T @ cx, atol=1e-5)
    assert torch.allclose(layer.bias.grad, cg.sum(0), atol=1e-5)
    assert not torch.equal(cg, g)


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_training_in_fp8_follows_float32(scaling: Scaling) -> None:
    torch.manual_seed(0)
    float_net = Mlp(hidden=64)
    eight = copy.deepcopy(float_net)
    simulate_fp8(eight, scaling=scaling)
    x = torch.randn(256, 16)
    y = (x @ torch.randn(16, 4)).argmax(1)
    losses = []
    for net in (float_net, eight):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
        for _ in range(60):
            optimizer.zero_grad()
            loss = cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.2
    assert losses[1] < 0.2
    assert losses[0] != losses[1]


def test_mistakes_are_explained() -> None:
    with pytest.raises(TrainingError, match="first and the last linear layer stay in float, and this model has 2"):
        simulate_fp8(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(TrainingError, match="scaling must be 'delayed' or 'current', got 'late'"):
        simulate_fp8(Mlp(), scaling="late")  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="a history of at least 1, got 0"):
        simulate_fp8(Mlp(), length=0)
    with pytest.raises(TrainingError, match="expected length >= 0 and margin >= 0, got -1 and 0"):
        Fp8Scale(FORWARD, -1)
