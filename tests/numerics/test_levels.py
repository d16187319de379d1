"""Level sets: e2m1, power of two, APoT, binary; and the float formats of eight bits (algorithms.md 5, 15, 18)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.numerics.affine import choose_qparams, decode, encode, live_qparams, simulate
from bitwright.numerics.codebook import look_up, nearest_code
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.levels import additive_power_of_two, power_of_two, signed
from bitwright.numerics.spec import QParams, QuantSpec

ONE = QParams(torch.ones(1))

APOT = {
    2: [0, 0.25, 0.5, 1],
    3: [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1],
    4: [
        0, 0.0208, 0.0417, 0.0625, 0.0833, 0.125, 0.1667, 0.1875,
        0.25, 0.3333, 0.375, 0.5, 0.6667, 0.6875, 0.75, 1,
    ],
}  # fmt: skip


@pytest.mark.parametrize("bits", APOT)
def test_apot_levels_are_the_published_ones(bits):
    assert [round(level, 4) for level in additive_power_of_two(bits)] == APOT[bits]


@pytest.mark.parametrize("bits", range(2, 7))
def test_apot_uses_every_code_of_its_magnitude(bits):
    levels = additive_power_of_two(bits)
    assert len(levels) == len(set(levels)) == 2**bits
    assert (levels[0], levels[-1]) == (0.0, 1.0)
    assert list(FORMATS[f"apot{bits + 1}"].codebook) == [-v for v in levels[:0:-1]] + list(levels)


def test_mid_rise_levels_are_odd_numbers():
    assert FORMATS["midrise2"].codebook == (-3, -1, 1, 3)
    assert FORMATS["midrise3"].codebook == (-7, -5, -3, -1, 1, 3, 5, 7)
    assert look_up(encode(torch.zeros(1), QuantSpec.parse("midrise2"), ONE), FORMATS["midrise2"]).tolist() == [-1]


@pytest.mark.parametrize(("bits", "spacing", "error"), [(2, 0.9957, 0.1188), (3, 0.5860, 0.03744)])
def test_mid_rise_levels_have_the_published_errors_of_a_normal_tensor(bits, spacing, error):
    """Max 1960, table II: the best spacing of 2^bits even levels, and its mean squared error."""
    x, spec = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)), QuantSpec.parse(f"midrise{bits}")
    found = [simulate(x, spec, QParams(torch.tensor([spacing / 2 * by]))) for by in (1, 0.95, 1.05)]
    errors = [(values - x).square().mean().item() for values in found]
    assert errors[0] == pytest.approx(error, rel=0.005)
    assert errors[0] < min(errors[1:])


def test_powers_of_two_halve_down_from_one_and_hold_zero():
    assert power_of_two(3) == (0, 2**-6, 2**-5, 2**-4, 2**-3, 2**-2, 2**-1, 1)
    assert FORMATS["pot4"].codebook == signed(power_of_two(3))
    assert len(FORMATS["pot5"].codebook) == 31


@pytest.mark.parametrize(
    "name", ["fp4", "nf4", "pot3", "pot4", "pot5", "apot3", "apot4", "apot5", "apot7", "binary", "midrise2", "midrise3"]
)
def test_the_nearest_level_equals_a_search_over_all_levels(name):
    fmt = FORMATS[name]
    table = torch.tensor(fmt.codebook)
    x = torch.cat([torch.randn(20_000), torch.linspace(-1.5, 1.5, 3001)]) * fmt.largest
    distance = (x.double().unsqueeze(1) - table.double()).abs()
    found = look_up(nearest_code(x, fmt), fmt)
    assert ((found.double() - x.double()).abs() - distance.min(1).values).abs().max() < 2e-7 * fmt.largest


@pytest.mark.parametrize("name", ["fp4", "nf4", "pot4", "apot6", "binary", "midrise2", "fp8_e4m3", "fp8_e5m2"])
def test_every_level_is_its_own_code_under_any_scale(name):
    spec, params = QuantSpec.parse(name), QParams(torch.tensor([0.375]))
    fmt = spec.format
    codes = torch.tensor(fmt.order, dtype=torch.float32)
    if fmt.dtype is not None:
        codes = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).float()
        codes = codes[codes.isfinite()]
    assert torch.equal(encode(decode(codes, spec, params), spec, params), codes)


def test_fp4_codes_are_sign_exponent_and_mantissa_bits():
    values = look_up(torch.arange(16), FORMATS["fp4"])
    for code, value in enumerate(values.tolist()):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
        assert abs(value) == magnitude
        assert (value < 0 or str(value) == "-0.0") == (code >= 8)


def test_fp4_ties_go_to_the_even_mantissa_and_the_ends_saturate():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.1, 1e9])
    wanted = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0])
    spec = QuantSpec.parse("fp4")
    assert torch.equal(simulate(x, spec, ONE), wanted)
    assert torch.equal(simulate(-x, spec, ONE), -wanted)
    up, down = torch.nextafter(x[:7], torch.tensor(9.0)), torch.nextafter(x[:7], torch.tensor(-9.0))
    assert simulate(up, spec, ONE).tolist() == [0.5, 1, 1.5, 2, 3, 4, 6]
    assert simulate(down, spec, ONE).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4]


def test_binary_is_the_sign_times_the_scale_and_zero_counts_as_positive():
    spec = QuantSpec.parse("binary")
    x = torch.tensor([-3.0, -1e-30, -0.0, 0.0, 1e-30, 5.0])
    assert simulate(x, spec, QParams(torch.tensor([0.5]))).tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(("name", "most"), [("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0)])
def test_the_largest_magnitude_maps_to_the_largest_float(name, most):
    x = torch.randn(2, 100)
    spec = QuantSpec.parse(f"{name}/channel")
    params = live_qparams(x, spec)
    assert torch.equal(params.scale, x.abs().amax(1, keepdim=True) / most)
    assert encode(x, spec, params).abs().amax(1).tolist() == [most, most]


@pytest.mark.parametrize(("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_round_as_torch_casts(name, dtype):
    spec, most = QuantSpec.parse(name), torch.finfo(dtype).max
    grid = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = grid[grid.isfinite()].sort().values.unique()
    ties = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, ties, torch.randn(50_000) * 10, torch.randn(50_000) * most / 4, torch.randn(9_999) * 1e-4])
    x = x.clamp(-most, most)
    assert torch.equal(encode(x, spec, ONE), x.to(dtype).float())


@pytest.mark.parametrize(("name", "most"), [("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0)])
@pytest.mark.parametrize("value", [1.01, 1.04, 1.1, 2.3, 1e30])
def test_what_is_too_large_saturates_whatever_the_cast_does(name, most, value):
    x = torch.tensor([most * value, -most * value])
    assert encode(x, QuantSpec.parse(name), ONE).tolist() == [most, -most]


def test_gradients_of_eight_bit_floats_pass_where_nothing_was_clipped():
    x = torch.tensor([1.3, 447.0, 449.0, -1e6], requires_grad=True)
    simulate(x, QuantSpec.parse("fp8_e4m3"), ONE).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


@given(st.floats(-1e4, 1e4, width=32), st.sampled_from(["fp4", "fp8_e4m3", "pot4", "apot5", "nf4"]))
def test_a_quantized_value_stays_where_it_is(value, name):
    spec = QuantSpec.parse(name)
    params = choose_qparams(torch.tensor([-1e4]), torch.tensor([1e4]), spec)
    once = simulate(torch.tensor([value]), spec, params)
    assert torch.equal(simulate(once, spec, params), once)
