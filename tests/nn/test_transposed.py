"""Gradients of transposed and volume convolutions and of embedding bags: those of autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.nn.layer import QLayer
from bitwright.nn.quantizer import Quantizer
from nets import calibrated, layer_plan, layers_of, one_thread  # noqa: F401


def straight_through(x: Tensor, quantizer: Quantizer, scale: Tensor, count: float) -> Tensor:
    """LSQ in float64 by autograd: ``rint(clamp(x / s)) s``, the gradient of s times ``1 / sqrt(count * qmax)``."""
    fmt = quantizer.spec.format
    shift = 0.0 if quantizer.zero_point is None else quantizer.zero_point.double()
    gain = 1 / math.sqrt(count * fmt.qmax)
    scale = scale * gain + (scale - scale * gain).detach()
    v = (x / scale).clamp(fmt.qmin - shift, fmt.qmax - shift)
    return (v + (v.round() - v).detach()) * scale


def close(actual: Tensor | None, expected: Tensor | None, name: str) -> None:
    assert actual is not None, name
    assert expected is not None, name
    assert expected.abs().max() > 0, name
    assert (actual.double() - expected).norm() <= 1e-4 * expected.norm(), name


def learning(layer: QLayer) -> None:
    """Ranges that clip something and are learned."""
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        if quantizer is not None:
            with torch.no_grad():
                quantizer.scale *= 0.6
            quantizer.scale.requires_grad_(True)


TRANSPOSED: dict[str, Callable[[], Any]] = {
    "1-d": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2),
    "2-d": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "2-d, groups": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2),
    "3-d": lambda: nn.ConvTranspose3d(4, 6, 2, groups=2),
}
FUNCTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@pytest.mark.parametrize("shape", TRANSPOSED)
@pytest.mark.parametrize("weight", ["int4/channel", "int4"])
def test_transposed_gradients_are_those_of_the_straight_through_form(shape: str, weight: str) -> None:
    layer = TRANSPOSED[shape]()
    spatial = len(layer.kernel_size)
    x = torch.randn(3, 4, *(5,) * spatial)
    simulated: Any = calibrated(layer, layer_plan(layer, weight, "uint4/asym"), [x])
    learning(simulated)
    inner = x.clone().requires_grad_(True)
    out = simulated(inner)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()

    leaves = [x, simulated.weight, simulated.bias]
    scales = [simulated.input_quantizer.scale, simulated.weight_quantizer.scale]
    again = [leaf.detach().double().requires_grad_(True) for leaf in (*leaves, *scales)]
    g = layer.groups
    per_filter = 4 // g * math.prod(layer.kernel_size)
    scale = again[4]
    if weight.endswith("channel"):  # [out, 1, ...] as it meets the stored weight [in, out / groups, ...]
        scale = scale.view(g, 1, 6 // g, *[1] * spatial).expand(g, 4 // g, -1, *[1] * spatial).flatten(0, 1)
    filters = straight_through(again[1], simulated.weight_quantizer, scale, per_filter * (1 if "ch" in weight else 6))
    values = straight_through(again[0], simulated.input_quantizer, again[3], x[0].numel())
    step = (again[3] * again[4].view(-1)).detach()
    bias = again[2] + ((again[2] / step).round() * step - again[2]).detach()
    args = (layer.stride, layer.padding, layer.output_padding, g, layer.dilation)
    expected = FUNCTIONS[spatial](values, filters, bias, *args)
    assert torch.allclose(expected.float(), out, atol=1e-4)
    (expected * direction).sum().backward()
    names = ("x", "weight", "bias", "input scale", "weight scale")
    for name, leaf, other in zip(names, (inner, *leaves[1:], *scales), again, strict=True):
        close(leaf.grad, other.grad, name)


def test_volume_gradients_are_those_of_the_straight_through_form() -> None:
    layer, x = nn.Conv3d(4, 6, 3, stride=(1, 2, 1), padding=1, groups=2), torch.randn(2, 4, 4, 5, 3)
    simulated: Any = calibrated(layer, layer_plan(layer, "int4/channel", "uint4/asym"), [x])
    learning(simulated)
    out = simulated(x)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    leaves = [simulated.weight, simulated.input_quantizer.scale, simulated.weight_quantizer.scale]
    again = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    expected = F.conv3d(
        straight_through(x.double(), simulated.input_quantizer, again[1], x[0].numel()),
        straight_through(again[0], simulated.weight_quantizer, again[2], 2 * 27),
        None, layer.stride, layer.padding, 1, 2,
    )  # fmt: skip
    (expected * direction).sum().backward()
    for name, leaf, other in zip(("weight", "input scale", "weight scale"), leaves, again, strict=True):
        close(leaf.grad, other.grad, name)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bag_gradients_are_those_of_the_straight_through_form(mode: str) -> None:
    layer = nn.EmbeddingBag(8, 16, mode=mode, padding_idx=1)
    simulated: Any = calibrated(layer, layer_plan(layer, "int4/channel"), [])
    learning(simulated)
    ids, starts = torch.tensor([0, 3, 3, 7, 1, 0]), torch.tensor([0, 3])
    weights = torch.rand(6) if mode == "sum" else None
    out = simulated(ids, starts, weights)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    leaves = [simulated.weight, simulated.weight_quantizer.scale]
    again = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    rows = straight_through(again[0], simulated.weight_quantizer, again[1], 16)
    per_sample = None if weights is None else weights.double()
    expected = F.embedding_bag(ids, rows, starts, mode=mode, padding_idx=1, per_sample_weights=per_sample)
    (expected * direction).sum().backward()
    for name, leaf, other in zip(("weight", "scale"), leaves, again, strict=True):
        close(leaf.grad, other.grad, name)
    assert simulated.weight.grad[[1, 2, 4, 5, 6]].abs().max() == 0


def test_stored_weights_and_rows_are_one_exchange_of_axes() -> None:
    for make in TRANSPOSED.values():
        layer = make()
        [simulated] = layers_of(calibrated(layer, layer_plan(layer, "int8/channel"), [torch.zeros(0)][:0])).values()
        rows = simulated.as_rows(simulated.weight)
        assert rows.shape[0] == layer.out_channels
        assert torch.equal(simulated.from_rows(rows), simulated.weight)
