"""Quantized scales: microscaling, NVFP4, double quantization; bits per weight to the byte (algorithms.md 5, 14.5)."""

from __future__ import annotations

import pytest
import torch

from bitwright.errors import NumericsError
from bitwright.numerics.affine import EPS, encode, live_qparams, shared_exponent, simulate
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.qtensor import QTensor, dequantize, quantize, quantize_scale, snap_scale
from bitwright.numerics.spec import QParams, QuantSpec

MX, NV = QuantSpec.parse("mxfp4"), QuantSpec.parse("nvfp4")
DOUBLE = QuantSpec.parse("nf4/group64/scale(int8/group256)")
SPECS = [MX, NV, DOUBLE, QuantSpec.parse("uint4/group64/asym/scale(int8/group256)")]


@pytest.mark.parametrize(
    ("spec", "bits"), [(MX, 4.25), (NV, 4.5), (DOUBLE, 4.127), (QuantSpec.parse("nf4/group64"), 4.5)], ids=str
)
def test_bits_per_weight(spec, bits):
    q = quantize(torch.randn(128, 4096), spec)
    spare = 4 if spec is NV else 0  # one fp32 scale per tensor
    assert 8 * (q.nbytes - spare) / (128 * 4096) == pytest.approx(bits, abs=0 if spec is not DOUBLE else 5e-4)


@pytest.mark.parametrize("name", ["fp4", "fp8_e4m3", "fp8_e5m2", "int4", "int8"])
def test_the_shared_exponent_is_the_largest_one_less_that_of_the_format(name):
    fmt = FORMATS[name]
    emax = {"fp4": 2, "fp8_e4m3": 8, "fp8_e5m2": 15, "int4": 2, "int8": 6}[name]
    most = torch.cat([torch.rand(1000) * 100 + 0.1, 2.0 ** torch.arange(-3, 8)])
    most = torch.cat([most, torch.nextafter(most, torch.tensor(0.0)), torch.nextafter(most, torch.tensor(1e9))])
    wanted = 2.0 ** (most.double().log2().floor() - emax)
    assert torch.equal(shared_exponent(most, fmt).double(), wanted)


def test_mxfp4_blocks_as_in_the_microscaling_rule():
    x = torch.zeros(1, 64)
    x[0, :4] = torch.tensor([7.9, -5.0, 0.25, 0.3])
    x[0, 32:35] = torch.tensor([0.1, 0.0625, -0.02])
    q = quantize(x, MX)
    assert isinstance(q.scale, QTensor)
    assert q.scale.packed.tolist() == [[127, 127 - 6]]  # 2**0 and 2**(-4 - 2), biased exponents
    assert dequantize(q)[0, :4].tolist() == [6.0, -4.0, 0.0, 0.5]
    assert (dequantize(q)[0, 32:35] * 64).tolist() == [6.0, 4.0, -1.5]
    assert q.packed[0, :2].tolist() == [7 | 14 << 4, 0 | 1 << 4]  # low nibble first


def test_nvfp4_scales_are_e4m3_of_the_blocks_over_one_scale_of_the_tensor():
    x = torch.randn(8, 64) * torch.rand(8, 1)
    q = quantize(x, NV)
    assert isinstance(q.scale, QTensor)
    tensor_scale = x.abs().max() / 6 / 448
    assert q.scale.scale.item() == pytest.approx(tensor_scale.item(), rel=1e-6)
    blocks = x.view(8, 4, 16).abs().amax(-1) / 6 / q.scale.scale
    wanted = blocks.clamp(max=448).to(torch.float8_e4m3fn)
    assert torch.equal(q.scale.packed, wanted.view(torch.uint8).view(1, -1))
    stored = wanted.float() * q.scale.scale
    assert torch.equal(dequantize(q), simulate(x, NV, QParams(stored)))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_snapped_scales_are_those_that_are_stored_and_used(spec):
    x = torch.randn(16, 1024) * torch.rand(16, 1)
    params = live_qparams(x, spec)
    q = quantize(x, spec, params)
    snapped = snap_scale(params.scale, spec)
    assert torch.equal(q.qparams.scale, snapped)
    assert snapped.shape == params.scale.shape
    used = QParams(snapped, params.zero_point)
    assert torch.equal(q.codes.float(), encode(x, spec, used))
    assert torch.equal(dequantize(q), simulate(x, spec, used))


def test_powers_of_two_stay_when_snapped_again_and_others_take_the_exponent_of_their_block():
    scale = torch.rand(4, 8) + 0.01
    once = snap_scale(scale, MX)
    assert torch.equal(snap_scale(once, MX), once)
    assert torch.equal(once, shared_exponent(scale * 6, FORMATS["fp4"]))
    assert torch.equal(once.log2(), once.log2().round())


def test_scales_without_a_spec_of_their_own_stay():
    scale = torch.rand(3, 1)
    assert torch.equal(snap_scale(scale, QuantSpec.parse("int4/channel")), scale)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_blocks_of_zeros_and_of_tiny_values_stay_finite(spec):
    x = torch.randn(4, 4096)
    x[0, :64] *= 1e-9
    x[1, :64] = 0
    q = quantize(x, spec)
    assert q.qparams.scale.min() >= EPS
    assert dequantize(q).isfinite().all()
    assert dequantize(q)[1, :64].abs().max() == 0


def test_a_tensor_that_is_not_positive_has_no_exponents():
    with pytest.raises(NumericsError, match="cannot quantize to e8m0: it holds positive powers of two, found -1"):
        quantize(torch.tensor([1.0, -1.0]), QuantSpec.parse("e8m0"))


def test_a_number_of_scales_that_the_groups_do_not_divide_is_refused():
    with pytest.raises(NumericsError, match=r"group256 needs a last axis divisible by 256, found shape \[1, 2\]"):
        quantize_scale(torch.ones(1, 2), DOUBLE)


def test_coarser_scales_cost_accuracy_in_the_order_of_their_coarseness():
    x = torch.randn(512, 1024)

    def decibel(text: str) -> float:
        error = dequantize(quantize(x, QuantSpec.parse(text))) - x
        return 10 * torch.log10(x.square().sum() / error.square().sum()).item()

    mx, nv, full = (decibel(text) for text in ("mxfp4", "nvfp4", "fp4/group16"))
    assert mx + 1 < nv < full < nv + 0.3
