"""Gradients of simulated layers equal those of the textbook form that dequantizes first (LSQ, Esser 2020)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.flow.convert import convert
from bitwright.lowbit.layer import LowbitLayer
from bitwright.nn.layer import QLayer
from bitwright.nn.quantizer import Quantizer
from bitwright.plan.plan import Plan
from nets import calibrated, layer_plan, layers_of, one_thread  # noqa: F401


class Textbook(torch.autograd.Function):
    """``s * rint(clamp(x / s, Qn, Qp))`` with the gradients of the paper, that of s times ``gain``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float, gain: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.low, ctx.high, ctx.gain = low, high, gain
        return (x / scale).clamp(low, high).round() * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        v = x / scale
        inside = (v > ctx.low) & (v < ctx.high)
        slope = torch.where(inside, v.round() - v, v.clamp(ctx.low, ctx.high))
        return grads[0] * inside, (grads[0] * slope).sum_to_size(scale.shape) * ctx.gain, None, None, None


def dequantized(x: Tensor, quantizer: Quantizer, scale: Tensor, count: float) -> Tensor:
    """The textbook simulation of ``x``, with ``count`` elements per scale (per sample, for activations)."""
    fmt = quantizer.spec.format
    shift = 0.0 if quantizer.zero_point is None else quantizer.zero_point.item()
    gain = 1 / math.sqrt(count * fmt.qmax)
    return Textbook.apply(x, scale, fmt.qmin - shift, fmt.qmax - shift, gain)  # type: ignore[no-any-return]


def on_grid(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """The bias rounded to the accumulator's step, with the gradient of the bias itself."""
    step = (input_scale * weight_scale.view(-1)).detach()
    return bias + ((bias / step).round() * step - bias).detach()


def learning(simulated: nn.Module) -> QLayer:
    [layer] = layers_of(simulated).values()
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        if quantizer is not None and quantizer.scale is not None:
            with torch.no_grad():
                quantizer.scale *= 0.6  # so that something is clipped
            quantizer.scale.requires_grad_(True)
    return layer


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None
    assert expected is not None
    assert expected.abs().max() > 0
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("input", ["uint8/asym", "int4", "uint4/asym"])
@pytest.mark.parametrize("weight", ["int8/channel", "int4/channel", "ternary/channel", "int8", "int3"])
def test_linear_gradients_are_those_of_the_textbook(weight: str, input: str) -> None:
    x = torch.randn(6, 5, 24)
    layer = learning(calibrated(nn.Linear(24, 8), layer_plan(nn.Linear(1, 1), weight, input), [x]))
    direction = torch.randn(6, 5, 8)
    inner = x.clone().requires_grad_(True)
    (layer(inner) * direction).sum().backward()

    leaves = [x.clone(), layer.weight, layer.bias, layer.input_quantizer.scale, layer.weight_quantizer.scale]
    again = [leaf.detach().clone().requires_grad_(True) for leaf in leaves]
    per_scale = 24.0 if "channel" in weight else 24.0 * 8
    out = F.linear(
        dequantized(again[0], layer.input_quantizer, again[3], 5 * 24),
        dequantized(again[1], layer.weight_quantizer, again[4], per_scale),
        on_grid(again[2], again[3], again[4]),
    )
    assert torch.allclose(out, layer(x), atol=1e-4)
    (out * direction).sum().backward()
    for leaf, expected in zip([inner, *leaves[1:]], again, strict=True):
        close(leaf.grad, expected.grad)


@pytest.mark.parametrize("weight", ["int4/channel", "int4"])
def test_conv_gradients_are_those_of_the_textbook(weight: str) -> None:
    x = torch.randn(3, 4, 6, 5)
    float_layer = nn.Conv2d(4, 6, 3, padding=1)
    layer = learning(calibrated(float_layer, layer_plan(float_layer, weight, "uint4/asym"), [x]))
    direction = torch.randn(3, 6, 6, 5)
    (layer(x) * direction).sum().backward()
    leaves = [layer.weight, layer.input_quantizer.scale, layer.weight_quantizer.scale]
    again = [leaf.detach().clone().requires_grad_(True) for leaf in leaves]
    out = F.conv2d(
        dequantized(x, layer.input_quantizer, again[1], 4 * 6 * 5),
        dequantized(again[0], layer.weight_quantizer, again[2], 36.0 if "channel" in weight else 36.0 * 6),
        layer.bias.detach(),
        padding=1,
    )
    (out * direction).sum().backward()
    for leaf, expected in zip(leaves, again, strict=True):
        close(leaf.grad, expected.grad)


def test_embedding_gradients_are_those_of_the_textbook() -> None:
    ids = torch.tensor([[0, 3, 3], [7, 1, 0]])
    float_layer = nn.Embedding(8, 16)
    layer = learning(calibrated(float_layer, layer_plan(float_layer, "int4/channel"), []))
    direction = torch.randn(2, 3, 16)
    (layer(ids) * direction).sum().backward()
    leaves = [layer.weight, layer.weight_quantizer.scale]
    again = [leaf.detach().clone().requires_grad_(True) for leaf in leaves]
    (F.embedding(ids, dequantized(again[0], layer.weight_quantizer, again[1], 16)) * direction).sum().backward()
    for leaf, expected in zip(leaves, again, strict=True):
        close(leaf.grad, expected.grad)
    assert layer.weight.grad[[2, 4, 5, 6]].abs().max() == 0


def test_a_shipped_bias_is_a_multiple_of_the_accumulators_step_where_that_is_known() -> None:
    x = torch.randn(6, 24)
    for layer in (nn.Linear(24, 8), nn.Sequential(nn.Linear(24, 8), nn.BatchNorm1d(8))):
        layer.train()(x)
        plan = Plan.preset("w4a4", layer, x) if isinstance(layer, nn.Sequential) else None
        simulated = calibrated(layer, plan or layer_plan(layer, "int4/channel", "uint4/asym"), [x])
        [inner] = layers_of(simulated).values()
        [shipped] = [m for m in convert(simulated).modules() if isinstance(m, LowbitLayer)]
        step = shipped.input_scale * shipped.weight_scale.view(-1)
        float_bias = inner.folded()[1]
        assert ((shipped.bias - float_bias).abs() <= 0.5001 * step).all()
        assert torch.equal((shipped.bias / step).round() * step, shipped.bias)
        assert not torch.equal(shipped.bias, float_bias)
    dynamic = calibrated(nn.Linear(24, 8), layer_plan(nn.Linear(1, 1), "int4/channel", "int8/token/dynamic"), [])
    assert torch.equal(convert(dynamic).bias, dynamic.bias)


def test_a_fixed_scale_gets_no_gradient_and_x_gets_torchs_own() -> None:
    x = torch.cat([torch.randn(500), torch.arange(-40, 40) * 0.05]).view(1, -1)
    layer = nn.Linear(x.shape[1], 1, bias=False)
    [simulated] = layers_of(calibrated(layer, layer_plan(layer, "int8/channel", "uint4/asym"), [x])).values()
    quantizer = simulated.input_quantizer
    with torch.no_grad():
        quantizer.scale.fill_(0.1)
    inner = x.clone().requires_grad_(True)
    quantizer(inner).values.sum().backward()
    expected = x.clone().requires_grad_(True)
    torch.fake_quantize_per_tensor_affine(expected, 0.1, int(quantizer.zero_point), 0, 15).sum().backward()
    assert torch.equal(inner.grad * quantizer.scale, expected.grad)
    assert 0 < expected.grad.sum() < expected.grad.numel()
    assert quantizer.scale.grad is None


def test_dynamic_inputs_pass_the_gradient_straight_through() -> None:
    x = torch.randn(4, 12, requires_grad=True)
    float_layer = nn.Linear(12, 3)
    layer = calibrated(float_layer, layer_plan(float_layer, "int8/channel", "int8/token/dynamic"), [])
    layer(x).sum().backward()
    weight = layer.weight_quantizer.simulate(layer.weight).detach()
    assert torch.allclose(x.grad, weight.sum(0).expand(4, 12), atol=1e-6)


@pytest.mark.parametrize("samples", [1, 4, 16])
def test_the_gain_of_an_activation_scale_does_not_depend_on_the_batch(samples: int) -> None:
    x = torch.randn(1, 10)
    float_layer = nn.Linear(10, 3)
    layer = learning(calibrated(float_layer, layer_plan(float_layer, "int8/channel", "uint4/asym"), [x]))
    layer(x.expand(samples, 10)).sum().backward()
    alone = layer.input_quantizer.scale.grad.clone() / samples
    layer.zero_grad()
    layer(x).sum().backward()
    close(alone, layer.input_quantizer.scale.grad)
