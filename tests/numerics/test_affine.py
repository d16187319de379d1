"""Value -> code -> value against tables, torch's fake quantization, and algorithms.md 2.1-2.4, 2.7 and 4.1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.affine import EPS, choose_qparams, decode, encode, live_qparams, simulate
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.spec import QParams, QuantSpec

INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer]
SPECS = [f"{name}{asym}" for name in INTEGERS for asym in ("", "/asym")]


def spec(text: str) -> QuantSpec:
    return QuantSpec.parse(text)


def params(scale: float, zero_point: float | None = None) -> QParams:
    return QParams(torch.tensor([scale]), None if zero_point is None else torch.tensor([zero_point]))


def range_params(x: Tensor, text: str) -> QParams:
    return choose_qparams(x.min().view(1), x.max().view(1), spec(text))


def with_ties(count: int, scale: float) -> Tensor:
    """Normal values with every tie ``(k + 0.5) * scale`` of 300 codes around zero, and all whole codes."""
    steps = torch.arange(-300, 300) * 0.5
    return torch.cat([torch.randn(count) * 40 * scale, steps * scale])


# --- the rounding rule -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "code"),
    [(-9, -8), (-8.5, -8), (-1.5, -2), (-0.5, 0), (0.5, 0), (1.5, 2), (2.5, 2), (7.49, 7), (8, 7)],
)
def test_int4_rounds_half_to_even_and_clips_as_the_table_in_the_module_says(steps, code):
    assert encode(torch.tensor([steps]), spec("int4"), params(1.0)).item() == code


def test_half_way_values_round_to_even():
    found = encode(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), spec("int8"), params(1.0))
    assert found.tolist() == [0, 2, 2, 0, -2]


def test_the_zero_point_is_added_after_rounding():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, -0.25])  # x / s = 0.5, 1.5, 2.5, 3.5, -0.5
    assert simulate(x, spec("uint8/asym"), params(0.5, 1.0)).tolist() == [0, 1, 1, 2, 0]


@pytest.mark.parametrize("zero_point", [0.0, 1.0, 2.0, 7.0, 128.0, 255.0])
def test_codes_are_rint_of_the_quotient_plus_zero_point_for_every_zero_point(zero_point):
    x = with_ties(10_000, 0.37)
    wanted = np.clip(np.rint(x.numpy() / np.float32(0.37)) + zero_point, 0, 255)
    found = encode(x, spec("uint8/asym"), params(0.37, zero_point))
    assert np.array_equal(found.numpy(), wanted)


def test_values_are_divided_by_the_scale_and_not_multiplied_by_its_inverse():
    scale = torch.tensor([0.37])
    x = (torch.arange(-120, 120) + 0.5) * scale  # at every tie
    divided, multiplied = (x / scale).round(), (x * (1 / scale)).round()
    assert (divided != multiplied).any(), "this data no longer tells the two apart"
    found = encode(x, QuantSpec(FORMATS["int8"]), QParams(scale))
    assert torch.equal(found, divided.clamp(-128, 127))


@pytest.mark.parametrize("text", SPECS)
def test_all_codes_of_a_format_are_their_own_codes(text):
    fmt = spec(text).format
    codes = torch.arange(fmt.qmin, fmt.qmax + 1).float()
    p = params(0.3, float(fmt.qmin + 1) if "asym" in text else None)
    assert torch.equal(encode(decode(codes, spec(text), p), spec(text), p), codes)


# --- against torch ---------------------------------------------------------------------------------

# torch multiplies by the inverse scale, bitwright divides; with a power of two both are exact, so both must agree on
# every value and every tie. (For other scales they differ by design, see the test above.)


@pytest.mark.parametrize("zero_point", [0, 1, 77, 128, 255])
def test_simulation_equals_torchs_per_tensor_fake_quantization_forward_and_backward(zero_point):
    x = with_ties(100_000, 2.0**-5).requires_grad_()
    theirs = torch.fake_quantize_per_tensor_affine(x, 2.0**-5, zero_point, 0, 255)
    upstream = torch.randn_like(theirs)
    (their_gradient,) = torch.autograd.grad(theirs, x, upstream)
    ours = simulate(x, spec("uint8/asym"), params(2.0**-5, float(zero_point)))
    (our_gradient,) = torch.autograd.grad(ours, x, upstream)
    assert torch.equal(ours, theirs)
    assert torch.equal(our_gradient, their_gradient)
    assert 0 < (our_gradient == 0).sum() < len(x)


@pytest.mark.parametrize("text", ["int8/channel", "int4/channel", "uint4/channel/asym"])
def test_simulation_equals_torchs_per_channel_fake_quantization_forward_and_backward(text):
    s = spec(text)
    x = with_ties(100_000, 2.0**-4)[:100_600].view(8, -1).requires_grad_()
    scale = 2.0 ** torch.arange(-7, 1).float()
    zero_point = torch.zeros(8) if s.symmetric else torch.arange(0, 16, 2).float()
    qmin, qmax = s.format.qmin, s.format.qmax
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 0, qmin, qmax)
    upstream = torch.randn_like(theirs)
    (their_gradient,) = torch.autograd.grad(theirs, x, upstream)
    p = QParams(scale.view(8, 1), None if s.symmetric else zero_point.view(8, 1))
    ours = simulate(x, s, p)
    (our_gradient,) = torch.autograd.grad(ours, x, upstream)
    assert torch.equal(ours, theirs)
    assert torch.equal(our_gradient, their_gradient)


def test_the_gradient_is_one_where_the_code_was_not_clipped_and_zero_elsewhere():
    x = torch.tensor([-4.26, -4.25, -4.24, 0.3, 3.7, 3.74, 3.76], requires_grad=True)  # codes -9, -8, ..., 7, 8
    simulate(x, spec("int4"), params(0.5)).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


# --- properties of choose_qparams and simulate --------------------------------------------------------


@settings(max_examples=200)
@given(
    text=st.sampled_from(SPECS),
    lo=st.floats(-1e4, 1e4, width=32),
    width=st.floats(0, 1e4, width=32),
    seed=st.integers(0, 2**16),
)
def test_quantization_of_any_range_is_faithful(text, lo, width, seed):
    s = spec(text)
    x = torch.rand(200, generator=torch.Generator().manual_seed(seed)) * width + lo
    if s.format.qmin == 0 and s.symmetric:
        x = x.abs()
    p = range_params(x, text)
    scale = p.scale.item()
    if p.zero_point is not None:
        assert p.zero_point.item() == round(p.zero_point.item())
        assert s.format.qmin <= p.zero_point.item() <= s.format.qmax
    y = simulate(x, s, p)
    tolerance = scale / 2 + float(np.spacing(np.float32(x.abs().max()))) * 2
    assert (y - x).abs().max() <= tolerance, "error above half a step"
    assert simulate(torch.zeros(1), s, p).item() == 0.0, "zero is not exact"
    assert torch.equal(simulate(y, s, p), y), "not idempotent"
    order = x.argsort()
    assert (y[order].diff() >= 0).all(), "not monotone"
    assert len(y.unique()) <= 2**s.format.bits


@pytest.mark.parametrize(("lo", "hi"), [(0.5, 2.0), (-2.0, -0.5)])
def test_an_asymmetric_range_is_extended_to_zero(lo, hi):
    p = choose_qparams(torch.tensor([lo]), torch.tensor([hi]), spec("uint8/asym"))
    assert p.scale.item() == pytest.approx(2.0 / 255)
    assert p.zero_point.item() == (0 if lo > 0 else 255)
    assert simulate(torch.zeros(3), spec("uint8/asym"), p).tolist() == [0, 0, 0]


def test_zero_is_exact_on_the_range_that_an_unrounded_zero_point_gets_wrong():
    p = choose_qparams(torch.tensor([-1.0]), torch.tensor([2.03]), spec("uint8/asym"))
    assert simulate(torch.zeros(1), spec("uint8/asym"), p).item() == 0.0
    assert simulate(torch.tensor([-1.0]), spec("uint8/asym"), p).item() == pytest.approx(-1, abs=0.006)


def test_symmetric_scales_put_the_largest_magnitude_on_the_largest_code():
    x = torch.tensor([0.9817, 0.8796, 0.9921, 0.4611, 0.0832, 0.1784, 0.3674, 0.5676, 0.3376, 0.2119])
    p = range_params(x, "int8")
    assert 1 / p.scale.item() == pytest.approx(128.01, abs=0.005)
    assert encode(x, spec("int8"), p).tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_extremes_use_the_narrow_range_and_smaller_scales_reach_the_full_one(bits):
    s, largest = spec(f"int{bits}"), 2 ** (bits - 1) - 1
    x = torch.tensor([-3.0, 3.0])
    p = range_params(x, f"int{bits}")
    assert encode(x, s, p).tolist() == [-largest, largest]
    assert encode(x, s, QParams(p.scale / 4)).tolist() == [-largest - 1, largest]


def test_two_bit_symmetric_and_ternary_differ_by_the_code_minus_two():
    x = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])
    assert encode(x, spec("int2"), params(1.0)).tolist() == [-2, -1, 0, 1, 1]
    assert encode(x, spec("ternary"), params(1.0)).tolist() == [-1, -1, 0, 1, 1]


@pytest.mark.parametrize("text", ["int8", "uint8/asym", "ternary", "nf4"])
def test_a_tensor_of_zeros_gets_the_smallest_scale_and_stays_zero(text):
    p = range_params(torch.zeros(5), text)
    assert p.scale.item() == EPS
    assert simulate(torch.zeros(5), spec(text), p).tolist() == [0] * 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("text", ["int8", "uint4/asym", "nf4", "fp16"])
def test_a_range_that_is_not_finite_is_refused_and_the_spec_named(bad, text):
    if bad == -math.inf:
        bounds = torch.tensor([bad]), torch.ones(1)
    else:
        bounds = -torch.ones(1), torch.tensor([bad])
    with pytest.raises(NumericsError, match=f"scale for {text}: a range bound is NaN or infinite"):
        choose_qparams(*bounds, spec(text))


def test_scales_and_codes_are_float32_for_half_precision_input():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    p = live_qparams(x, spec("int8/token/dynamic"))
    assert p.scale.dtype == torch.float32
    assert encode(x, spec("int8/token/dynamic"), p).dtype == torch.float32
    assert torch.equal(encode(x, spec("int8"), params(0.01)), encode(x.float(), spec("int8"), params(0.01)))


# --- granularity ------------------------------------------------------------------------------------


def test_a_group_as_long_as_the_row_equals_one_scale_per_channel():
    w = torch.randn(6, 32)
    channel = live_qparams(w, spec("int4/channel"))
    group = live_qparams(w, spec("int4/group32"))
    assert torch.equal(channel.scale, group.scale)
    assert torch.equal(simulate(w, spec("int4/channel"), channel), simulate(w, spec("int4/group32"), group))


def test_groups_are_neighbours_along_the_last_axis():
    w = torch.tensor([[1.0, 2.0, 30.0, 40.0], [5.0, 6.0, 70.0, 80.0]])
    p = live_qparams(w, spec("int8/group2"))
    assert torch.equal(p.scale, torch.tensor([[2.0, 40.0], [6.0, 80.0]]) / 127)
    found = encode(w, spec("int8/group2"), p)
    assert found.tolist() == [[64, 127, 95, 127], [106, 127, 111, 127]]


def test_groups_with_zero_points_decode_what_they_encoded():
    w = torch.rand(3, 64) + torch.arange(3).view(3, 1)
    s = spec("uint4/group16/asym")
    p = live_qparams(w, s)
    assert p.zero_point.shape == p.scale.shape == (3, 4)
    assert ((simulate(w, s, p) - w).abs() <= p.scale.repeat_interleave(16, 1) / 2 + 1e-6).all()


def test_channels_of_a_convolution_have_one_scale_each():
    w = torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 2.0, 4.0, 8.0]).view(4, 1, 1, 1)
    p = live_qparams(w, spec("int8/channel"))
    assert torch.equal(p.scale.view(-1), w.abs().flatten(1).amax(1) / 127)
    assert encode(w, spec("int8/channel"), p).abs().flatten(1).amax(1).tolist() == [127] * 4


def test_finer_granularity_never_raises_the_error_bound():
    w = torch.randn(16, 128) * torch.rand(16, 1) * torch.rand(1, 128)
    tensor, channel, group = (
        live_qparams(w, spec(f"int4{kind}")).scale.square().mean() / 12 for kind in ("", "/channel", "/group16")
    )
    assert group < channel < tensor


def test_dynamic_scales_follow_every_token():
    x = torch.randn(2, 5, 16) * torch.arange(1, 6).view(1, 5, 1)
    s = spec("int8/token/dynamic")
    p = live_qparams(x, s)
    assert torch.equal(p.scale, x.abs().amax(-1, keepdim=True) / 127)
    for token in range(5):
        alone = live_qparams(x[:, token], s)
        assert torch.equal(simulate(x, s, p)[:, token], simulate(x[:, token], s, alone))


def test_dynamic_scales_of_a_whole_tensor_equal_static_ones_with_its_extremes():
    x = torch.randn(3, 7)
    found, wanted = live_qparams(x, spec("uint8/asym/dynamic")), range_params(x, "uint8/asym")
    assert torch.equal(found.scale, wanted.scale)
    assert torch.equal(found.zero_point, wanted.zero_point)


def test_a_live_tensor_with_nan_is_refused():
    with pytest.raises(NumericsError, match="int8/token/dynamic"):
        live_qparams(torch.tensor([[1.0, math.nan]]), spec("int8/token/dynamic"))


@pytest.mark.parametrize("text", ["int4", "int4/channel", "int4/group4", "uint4/group4/asym", "nf4/group4"])
def test_memory_layout_does_not_change_codes_or_values(text):
    w = torch.randn(16, 8).t()
    assert not w.is_contiguous()
    s = spec(text)
    p = live_qparams(w.contiguous(), s)
    assert torch.equal(encode(w, s, p), encode(w.contiguous(), s, p))
    assert torch.equal(simulate(w, s, p), simulate(w.contiguous(), s, p))


# --- learned scales -----------------------------------------------------------------------------------


def test_lsq_outputs_and_gradients_equal_the_published_formula():
    x = torch.tensor([-5, -1.3, -0.4, 0.1, 0.74, 2.2, 9], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    y = simulate(x, spec("int4"), QParams(scale))
    assert y.tolist() == [-4, -1.5, -0.5, 0, 0.5, 2, 3.5]
    terms = [torch.autograd.grad(y[i], scale, retain_graph=True)[0].item() for i in range(7)]
    assert terms == pytest.approx([-8, -0.4, -0.2, -0.2, -0.48, -0.4, 7], abs=1e-6)
    y.sum().backward()
    assert scale.grad.item() == pytest.approx(-2.68, abs=1e-6)
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_lsq_clips_before_it_rounds_so_half_a_step_outside_the_range_counts_as_outside():
    x = torch.tensor([-4.2, 3.6], requires_grad=True)  # -8.4 and 7.2 steps, which round to codes of the format
    for i, term in enumerate([-8.0, 7.0]):
        scale = torch.tensor([0.5], requires_grad=True)
        dx, ds = torch.autograd.grad(simulate(x, spec("int4"), QParams(scale))[i], (x, scale))
        assert ds.item() == term
        assert dx.tolist() == [0, 0]


def test_lsq_gradients_equal_torchs_learnable_fake_quantization():
    x = (torch.randn(10_000) * 2).requires_grad_()
    ours_scale = torch.tensor([0.25], requires_grad=True)
    theirs_scale = torch.tensor([0.25], requires_grad=True)
    zero_point = torch.zeros(1)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, theirs_scale, zero_point, -8, 7, 1.0)
    # Up to half a step outside the ends torch still rounds, LSQ (eq. 3) clips already; elsewhere they are one formula.
    differ = ((x > -8.5 * 0.25) & (x < -8 * 0.25)) | ((x > 7 * 0.25) & (x < 7.5 * 0.25))
    assert differ.any()
    upstream = torch.randn_like(theirs) * ~differ
    their_dx, their_ds = torch.autograd.grad(theirs, (x, theirs_scale), upstream)
    ours = simulate(x, spec("int4"), QParams(ours_scale))
    our_dx, our_ds = torch.autograd.grad(ours, (x, ours_scale), upstream)
    assert torch.equal(ours, theirs)
    assert our_ds.item() == pytest.approx(their_ds.item(), rel=1e-4)
    assert torch.equal(our_dx, their_dx)


@pytest.mark.parametrize("text", ["int4/channel", "uint4/channel/asym", "int4/group8"])
def test_each_learned_scale_gets_the_gradient_of_its_own_elements(text):
    s = spec(text)
    w = torch.randn(4, 16)
    p = live_qparams(w, s)
    scale = (p.scale / 2).requires_grad_()
    y = simulate(w, s, QParams(scale, p.zero_point))
    upstream = torch.zeros(4, 16)
    upstream[1, 8:] = 1.0
    y.backward(upstream)
    touched = scale.grad != 0
    assert touched[1].any()
    assert not touched[[0, 2, 3]].any()
    if s.granularity.kind == "group":
        assert touched[1].tolist() == [False, True]


def test_a_learned_scale_gives_the_same_values_as_a_fixed_one():
    x = with_ties(10_000, 0.37)
    fixed = simulate(x, spec("uint8/asym"), params(0.37, 5.0))
    scale = torch.tensor([0.37], requires_grad=True)
    assert torch.equal(simulate(x, spec("uint8/asym"), QParams(scale, torch.tensor([5.0]))), fixed)


# --- formats that are not integers ----------------------------------------------------------------------


@pytest.mark.parametrize(("text", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_float_formats_round_like_torch_and_saturate_instead_of_overflowing(text, dtype):
    x = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-8, 4, (1000,)), torch.tensor([3e38, -3.4e38, 1e6])])
    largest = torch.finfo(dtype).max
    y = simulate(x, spec(text), params(1.0))
    assert torch.isfinite(y).all()
    assert y.abs().max() <= largest
    inside = x.abs() < largest
    assert torch.equal(y[inside], x[inside].to(dtype).float())
    if text == "fp16":
        assert y[-3:].tolist() == [65504, -65504, 65504]


def test_float_formats_pass_the_gradient_where_they_do_not_saturate():
    x = torch.tensor([1.0003, -7e4, 7e4], requires_grad=True)
    simulate(x, spec("fp16"), params(1.0)).sum().backward()
    assert x.grad.tolist() == [1, 0, 0]


def test_codebook_formats_pass_the_gradient_straight_through():
    x = torch.randn(3, 64, requires_grad=True)
    s = spec("nf4/group64")
    upstream = torch.randn(3, 64)
    simulate(x, s, live_qparams(x, s)).backward(upstream)
    assert torch.equal(x.grad, upstream)
