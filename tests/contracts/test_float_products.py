"""Contract C3: with float inputs the codes are exact, and the sum is the backend's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.flow.convert import convert
from bitwright.numerics.qtensor import dequantize
from nets import FEATURES, calibrated, layer_plan, one_thread, trained  # noqa: F401

EPS = torch.finfo(torch.float32).eps


def bound(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """``2 * K * eps * |x| |w|`` for every output; K is the length of the sum."""
    length = weight[0].numel()
    if isinstance(layer, nn.Linear):
        return 2 * length * EPS * F.linear(x.abs(), weight.abs())
    assert isinstance(layer, nn.Conv2d)
    return (
        2
        * length
        * EPS
        * F.conv2d(x.abs(), weight.abs(), None, layer.stride, layer.padding, layer.dilation, layer.groups)
    )


@pytest.mark.parametrize(
    "weight",
    [
        *(
            "int4/group32",
            "nf4/group32",
            "int4/channel",
            "uint4/group32/asym",
            "ternary/channel",
            "fp16",
            "bf16",
            "int8",
        ),
        *("mxfp4", "nvfp4", "nf4/group32/scale(int8/group45)", "kmeans4/channel", "kmeans2/group32", "quantile3"),
        *(
            "int16/channel",
            "uint16/group32/asym",
            "fp8_e4m3/channel",
            "fp8_e5m2",
            "apot4/channel",
            "pot3",
            "binary",
            "midrise2/channel",
            "midrise3/channel",
        ),
    ],
)
def test_weight_only_linear_stays_within_the_bound(weight: str) -> None:
    layer = nn.Linear(160, 9)
    x = torch.randn(4, 160)
    simulated = trained(calibrated(layer, layer_plan(layer, weight), []), [x])
    check(layer, simulated, x)


@pytest.mark.parametrize(
    "weight",
    [
        *("int4/channel", "nf4/channel", "uint8/channel/asym", "ternary", "fp16"),
        *("kmeans4/channel", "quantile2", "int16/channel", "fp8_e4m3/channel", "nf4/channel/scale(int8)"),
    ],
)
def test_weight_only_conv_stays_within_the_bound(weight: str) -> None:
    layer = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
    x = torch.randn(2, 6, 9, 8)
    simulated = trained(calibrated(layer, layer_plan(layer, weight), []), [x])
    check(layer, simulated, x)


def check(layer: nn.Module, simulated: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = simulated(x)
        value = simulated.weight_quantizer.simulate(simulated.weight)
        exact = bound_free(layer, x, value, simulated.bias)
        limit = bound(layer, x, value)
        for features in FEATURES.values():
            shipped = convert(simulated, features=features)
            assert torch.equal(dequantize(shipped.weight), value)
            assert torch.equal(shipped.weight.qparams.scale, simulated.weight_quantizer.qparams.scale)
            assert ((shipped(x) - expected).abs() <= limit).all()
            assert ((shipped(x).double() - exact).abs() <= limit).all()
    assert expected.abs().max() > 1e2 * limit.max()


def bound_free(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product in float64."""
    if isinstance(layer, nn.Linear):
        return F.linear(x.double(), weight.double(), bias.double())
    assert isinstance(layer, nn.Conv2d)
    rest = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.conv2d(x.double(), weight.double(), bias.double(), *rest)


def test_a_whole_weight_only_model_keeps_its_codes() -> None:
    net = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 8), nn.Linear(8, 3))
    ids = torch.randint(20, (4, 6))
    simulated = trained(calibrated(net, "w4a16", [ids]), [ids])
    shipped = convert(simulated)
    for number, spec in ((0, "int8/channel"), (1, "int4/channel"), (3, "int4/group128")):
        layer, stored = simulated[number], shipped[number].weight
        assert str(stored.spec) == spec
        assert torch.equal(dequantize(stored), layer.weight_quantizer.simulate(layer.weight).detach())
    with torch.no_grad():
        assert torch.allclose(shipped(ids), simulated(ids), atol=1e-5)
