"""Analytic quantization error of GELU and SiLU, and the ends known beforehand (algorithms.md 16)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from bitwright.errors import SpecError
from bitwright.numerics.affine import choose_qparams, decode, simulate
from bitwright.numerics.spec import QuantSpec
from bitwright.observe.activation_error import (
    _edges,
    _gelu,
    _quadrature,
    best_upper_end,
    gelu_antiderivatives,
    moments,
    squared_error,
)
from bitwright.observe.activations import _RANGES, fixed_low, fixed_range, lowest_at, range_observer

FUNCTIONS = {
    "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu, "hardswish": F.hardswish, "mish": F.mish, "elu": F.elu, "softplus": F.softplus,
    "sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid, "softmax": lambda x: F.softmax(x.view(-1, 1), 1),
    "tanh": torch.tanh, "hardtanh": F.hardtanh,
}  # fmt: skip

# bits: (best upper end, error, dB) with a zero point; dB symmetric; dB unsigned without zero point.
GELU = {
    2: (1.80, 0.030561, 11.43, 6.53, 11.43),
    3: (2.30, 0.014383, 14.71, 11.43, 14.71),
    4: (2.60, 0.0035231, 20.82, 14.74, 16.34),
    6: (3.35, 2.861e-4, 31.72, 26.09, 17.15),
    8: (4.10, 2.377e-5, 42.53, 37.17, 17.23),
}


def levels(text: str, low: float, high: float) -> torch.Tensor:
    spec = QuantSpec.parse(text)
    codes = torch.arange(spec.format.qmin, spec.format.qmax + 1).float()
    return decode(codes, spec, choose_qparams(torch.tensor([low]), torch.tensor([high]), spec))


def decibel(error: float, power: float) -> float:
    return 10 * math.log10(power / error)


@pytest.mark.parametrize("bits", GELU)
def test_the_table_of_gelu_at_its_upper_ends(bits):
    upper, error, asymmetric, _, _ = GELU[bits]
    found = squared_error("gelu", levels(f"uint{bits}/asym", fixed_low("gelu"), upper))
    assert found == pytest.approx(error, rel=2e-3)
    assert decibel(found, moments("gelu")[1]) == pytest.approx(asymmetric, abs=0.02)


@pytest.mark.parametrize(("text", "bits", "column"), [("uint4/asym", 4, 2), ("int4", 4, 3), ("uint4", 4, 4)])
def test_the_best_upper_end_reaches_the_table(text, bits, column):
    end, error = best_upper_end("gelu", QuantSpec.parse(text))
    assert decibel(error, moments("gelu")[1]) == pytest.approx(GELU[bits][column], abs=0.015)
    if column == 2:
        assert end == pytest.approx(GELU[bits][0], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("bits", GELU)
@pytest.mark.parametrize(("kind", "column"), [("uint{}/asym", 2), ("int{}", 3), ("uint{}", 4)])
def test_the_whole_table_of_best_ends(bits, kind, column):
    error = best_upper_end("gelu", QuantSpec.parse(kind.format(bits)))[1]
    assert decibel(error, moments("gelu")[1]) == pytest.approx(GELU[bits][column], abs=0.015)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("name", "function"), [("gelu", F.gelu), ("silu", F.silu)])
@pytest.mark.parametrize(("text", "upper"), [("uint4/asym", 2.6), ("int6", 3.0), ("uint3", 2.0), ("uint8/asym", 4.0)])
def test_computed_errors_are_those_of_samples(name, function, text, upper, sigma):
    y = function(torch.randn(2_000_000) * sigma)
    spec = QuantSpec.parse(text)
    params = choose_qparams(torch.tensor([fixed_low(name)]), torch.tensor([upper * sigma]), spec)
    sampled = (simulate(y, spec, params) - y).double().square().mean().item()
    assert squared_error(name, levels(text, fixed_low(name), upper * sigma), sigma) == pytest.approx(sampled, rel=0.015)


def test_the_closed_form_is_the_integral():
    edges = _edges(_gelu, lowest_at("gelu"), torch.linspace(-0.16, 3.0, 40, dtype=torch.float64), 1.0)
    closed = gelu_antiderivatives(edges).diff(dim=1)
    assert (closed - _quadrature(_gelu, edges, 1.0)).abs().max() < 1e-14


def test_moments_of_gelu():
    assert moments("gelu") == pytest.approx(
        (1 / (2 * math.sqrt(math.pi)), 1 / 3 + 1 / (2 * math.pi * math.sqrt(3))), rel=1e-12
    )
    assert moments("gelu", 0.5) == pytest.approx((0.0892062, 0.0835067), abs=1e-7)
    assert moments("gelu", 2.0) == pytest.approx((0.7136496, 1.9298650), abs=1e-7)
    for sigma in (0.3, 1.7, 4.0):
        v = sigma**2 / (1 + sigma**2)
        second = sigma**2 * (0.25 + math.asin(v) / (2 * math.pi))
        second += sigma**2 * v / (math.pi * math.sqrt((1 + sigma**2) * (1 + v)))
        first = sigma**2 / math.sqrt(2 * math.pi * (1 + sigma**2))
        assert moments("gelu", sigma) == pytest.approx((first, second), rel=1e-10)


@pytest.mark.parametrize(
    ("name", "sigma", "floor"),
    [("gelu", 1.0, 17.24), ("silu", 1.0, 12.12), ("gelu", 2.0, 25.5), ("silu", 2.0, 19.1), ("gelu", 4.0, 34.3),
     ("silu", 4.0, 27.4)],
)  # fmt: skip
def test_without_the_negative_lobe_no_number_of_bits_helps(name, sigma, floor):
    fine = torch.linspace(0, 12 * sigma, 20_000)
    error = squared_error(name, fine, sigma)
    assert decibel(error, moments(name, sigma)[1]) == pytest.approx(floor, abs=0.06)
    if (name, sigma) == ("gelu", 1.0):
        closed = 1 / 24 - 1 / (4 * math.pi) + 1 / (4 * math.pi * math.sqrt(3))
        assert error == pytest.approx(closed, rel=1e-4)


def test_no_error_where_every_value_has_a_level_and_all_of_it_where_there_is_one():
    assert squared_error("silu", torch.zeros(1)) == pytest.approx(moments("silu")[1], rel=1e-12)
    assert squared_error("gelu", torch.linspace(-0.17, 8, 100_000)) < 1e-9


@pytest.mark.parametrize("name", FUNCTIONS)
def test_known_ends_are_those_of_the_function(name):
    x = torch.cat([torch.linspace(-60, 60, 400_001, dtype=torch.float64), torch.linspace(-2, 0, 400_001).double()])
    y = FUNCTIONS[name](x)
    assert y.min().item() == pytest.approx(fixed_low(name), abs=1e-9 if name != "softmax" else 1.0)
    assert y.min() >= fixed_low(name) - 1e-9
    if (bounds := fixed_range(name)) is not None:
        assert bounds[0] <= y.min()
        assert y.max().item() == pytest.approx(bounds[1], abs=1e-9)
    if name in ("gelu", "silu", "mish", "hardswish", "gelu_tanh"):
        at = torch.tensor([lowest_at(name)], dtype=torch.float64)
        assert FUNCTIONS[name](at).item() == pytest.approx(fixed_low(name), abs=1e-9)


def test_every_known_function_is_checked_above():
    assert set(FUNCTIONS) == set(_RANGES)


def test_what_is_known_becomes_an_observer():
    assert [range_observer(name) for name in ("gelu", "softmax", "tanh", "relu")] == [
        "mse:low=-0.169971", "fixed:0,1", "fixed:-1,1", "mse:low=0",
    ]  # fmt: skip


def test_unknown_functions_are_named():
    with pytest.raises(SpecError, match="unknown activation function 'sin'; known ones: relu, relu6, gelu"):
        fixed_low("sin")
    with pytest.raises(SpecError, match="'mish' is not known analytically; known: gelu, silu"):
        squared_error("mish", torch.zeros(1))
    with pytest.raises(SpecError, match="relu takes its smallest value at no single input"):
        lowest_at("relu")
