"""Quantize, dequantize, bytes; double quantization as in QLoRA (algorithms.md 14.5)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import NumericsError
from bitwright.numerics.affine import EPS, encode, live_qparams, simulate
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.qtensor import QTensor, dequantize, quantize
from bitwright.numerics.spec import QParams, QuantSpec

DOUBLE = QuantSpec.parse("nf4/group64/scale(int8/group256)")
TEXTS = [f"{name}{kind}" for name in FORMATS if name != "e8m0" for kind in ("", "/channel", "/group4")]
TEXTS += [f"{name}{kind}/asym" for name in ("int4", "uint3", "uint8") for kind in ("", "/channel", "/group4")]


@settings(max_examples=300)
@given(text=st.sampled_from(TEXTS), rows=st.integers(1, 4), groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_stored_tensor_decodes_to_its_simulation_bit_for_bit(text, rows, groups, seed):
    spec = QuantSpec.parse(text)
    x = torch.randn(rows, 4 * groups, generator=torch.Generator().manual_seed(seed)) * 3
    q, params = quantize(x, spec), live_qparams(x, spec)
    assert torch.equal(q.codes.float(), encode(x, spec, params))
    assert torch.equal(dequantize(q), simulate(x, spec, params))
    assert dequantize(q).shape == x.shape == q.shape


@pytest.mark.parametrize("shape", [(5,), (4, 6), (4, 3, 3, 3), (2, 3, 4, 5, 6)])
def test_every_number_of_dimensions_survives(shape):
    x = torch.randint(-7, 8, shape).float()
    x.view(-1)[0] = 7
    found = dequantize(quantize(x, QuantSpec.parse("int4")))
    assert torch.equal(found, x)


def test_given_scales_are_used_and_copied():
    x = torch.randn(3, 8)
    params = QParams(torch.full((3, 1), 0.25), torch.full((3, 1), 7.0))
    spec = QuantSpec.parse("uint4/channel/asym")
    q = quantize(x, spec, params)
    wanted = simulate(x, spec, params)
    params.scale.zero_()
    params.zero_point.zero_()
    assert torch.equal(dequantize(q), wanted)


def test_gradients_stop_at_stored_tensors():
    x = torch.randn(2, 4, requires_grad=True)
    q = quantize(x, QuantSpec.parse("int8/channel"))
    assert not q.scale.requires_grad
    assert not dequantize(q).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_come_back_in_the_asked_dtype(dtype):
    q = quantize(torch.randn(2, 4), QuantSpec.parse("int8"))
    assert dequantize(q, dtype).dtype == dtype
    assert torch.equal(dequantize(q, dtype), dequantize(q).to(dtype))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("int8/channel", 4 * 64 + 4 * 4),
        ("int4/channel", 4 * 32 + 4 * 4),
        ("int4/group16", 4 * 32 + 4 * 4 * 4),
        ("uint4/group16/asym", 4 * 32 + 2 * 4 * 4 * 4),
        ("ternary", 4 * 13 + 4),
        ("int3", 4 * 24 + 4),
        ("fp16", 4 * 128),  # without a scale
        ("int16/channel", 4 * 128 + 4 * 4),
        ("binary/channel", 4 * 8 + 4 * 4),
        ("fp8_e4m3", 4 * 64 + 4),
        ("fp4/group16", 4 * 32 + 4 * 4 * 4),
        ("mxfp4", 4 * 32 + 4 * 2),
        ("nvfp4", 4 * 32 + 4 * 4 + 4),
        ("kmeans4", 4 * 32 + 4 + 4 * 16),
        ("kmeans3/channel", 4 * 24 + 4 * 4 + 4 * 4 * 8),
        ("quantile2/group16", 4 * 16 + 4 * 4 * 4 + 4 * 4),
    ],
)
def test_bytes_count_codes_scales_and_zero_points(text, size):
    assert quantize(torch.randn(4, 64), QuantSpec.parse(text)).nbytes == size


def test_double_quantization_takes_4_127_bits_per_weight():
    q = quantize(torch.randn(128, 4096), DOUBLE)
    blocks = 128 * 4096 // 64
    assert q.nbytes == 128 * 4096 // 2 + blocks + 4 * (blocks // 256)
    assert 8 * q.nbytes / (128 * 4096) == pytest.approx(4.127, abs=5e-4)


def test_double_quantization_encodes_with_the_scales_it_stores():
    x = torch.randn(16, 1024)
    q = quantize(x, DOUBLE)
    assert isinstance(q.scale, QTensor)
    stored = dequantize(q.scale).view(16, 16)
    assert torch.equal(q.qparams.scale, stored)
    single = quantize(x, QuantSpec.parse("nf4/group64"))
    assert ((stored - single.scale).abs() <= q.scale.scale.max() / 2 + 1e-7).all()
    assert torch.equal(q.codes.float(), encode(x, DOUBLE, QParams(stored)))
    assert torch.equal(dequantize(q), simulate(x, DOUBLE, QParams(stored)))


def test_double_quantization_costs_little_accuracy():
    x = torch.randn(64, 1024)

    def decibel(text: str) -> float:
        error = dequantize(quantize(x, QuantSpec.parse(text))) - x
        return 10 * math.log10(x.square().sum() / error.square().sum())

    single, double = decibel("nf4/group64"), decibel(str(DOUBLE))
    assert single == pytest.approx(20.72, abs=0.1)
    assert single - 0.1 < double < single + 0.05


def test_scales_that_round_to_zero_do_not_divide_by_zero():
    x = torch.randn(4, 4096)
    x[0, :64] *= 1e-6
    x[1, :64] = 0
    for text in (str(DOUBLE), "int4/group64/scale(int8/group256)", "uint4/group64/asym/scale(int8/group256)"):
        q = quantize(x, QuantSpec.parse(text))
        assert q.qparams.scale.min() == pytest.approx(EPS)
        y = dequantize(q)
        assert torch.isfinite(y).all()
        assert y[0, :64].abs().max() < 3e-6
        assert y[1, :64].abs().max() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted_and_refused(bad):
    x = torch.zeros(3, 4)
    x[1, 2] = x[0, 0] = bad
    with pytest.raises(NumericsError, match="cannot quantize to int4/channel: 2 of 12 values are NaN or infinite"):
        quantize(x, QuantSpec.parse("int4/channel"))


@pytest.mark.parametrize("shape", [(), (0, 4), (3, 0)])
def test_tensors_without_values_or_dimensions_are_refused(shape):
    with pytest.raises(NumericsError, match="cannot quantize to int8: needs at least one dimension and one value"):
        quantize(torch.zeros(shape), QuantSpec.parse("int8"))


def test_a_group_that_does_not_fit_is_refused():
    with pytest.raises(NumericsError, match=r"group64 needs a last axis divisible by 64, found shape \[2, 100\]"):
        quantize(torch.zeros(2, 100), QuantSpec.parse("int4/group64"))
