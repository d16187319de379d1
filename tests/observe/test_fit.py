"""The range search against the Gaussian optimum and the table of what clipping is worth (algorithms.md 3)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitwright.errors import NumericsError, SpecError
from bitwright.numerics.affine import live_qparams, simulate
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.observe.fit import search_range, weight_qparams


def spec(text: str) -> QuantSpec:
    return QuantSpec.parse(text)


def decibel(x: Tensor, y: Tensor) -> float:
    return 10 * torch.log10(x.double().square().sum() / (x - y).double().square().sum()).item()


def squared_error(x: Tensor, text: str, observer: str) -> float:
    return (simulate(x, spec(text), weight_qparams(x, spec(text), observer)) - x).double().square().sum().item()


GAUSSIAN = {
    "ternary": 7.21,
    "int2": 8.26,
    "midrise2": 9.25,
    "midrise3": 14.27,
    "int4": 19.26,
}  # the others: test_observer.py


@pytest.mark.parametrize("name", GAUSSIAN)
def test_a_long_gaussian_row_is_quantized_as_well_as_the_optimum(name):
    w = torch.randn(1, 60_000)
    found = decibel(w, simulate(w, spec(f"{name}/channel"), weight_qparams(w, spec(f"{name}/channel"))))
    assert found == pytest.approx(GAUSSIAN[name], abs=0.1)


def samples(name: str) -> Tensor:
    """20 000 values with the extremes of the table's samples: they alone decide the min-max error."""
    normal, uniform = torch.randn(20_000), torch.rand(20_000) * 2 - 1
    laplace = -torch.rand(20_000).clamp(min=1e-7).log() * uniform.sign()
    values = {"uniform": uniform, "gaussian": normal, "laplace": laplace, "relu": normal.relu()}[name]
    lo, hi = {"uniform": (-1, 1), "gaussian": (-4.57, 4.57), "laplace": (-10.5, 10.5), "relu": (0, 3.85)}[name]
    return torch.cat([values.clamp(lo, hi), torch.tensor([lo, hi])])


# SQNR in dB, min-max range -> clipped range.
CLIPPING = {
    "uniform": {2: (9.5, 9.7), 3: (16.9, 16.9), 4: (23.5, 23.5), 6: (35.9, 35.9), 8: (48.1, 48.1)},
    "gaussian": {2: (1.8, 8.2), 3: (8.5, 13.8), 4: (15.1, 19.1), 6: (27.6, 29.3), 8: (39.7, 39.9)},
    "laplace": {2: (1.1, 6.6), 3: (5.3, 11.0), 4: (11.1, 15.4), 6: (23.4, 24.7), 8: (35.5, 35.7)},
    "relu": {2: (8.5, 13.4), 3: (16.0, 19.1), 4: (22.6, 24.5), 6: (35.0, 35.5), 8: (47.2, 47.2)},
}


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_clipping_pays_what_the_table_says(name, bits):
    x, s = samples(name).unsqueeze(0), spec(f"uint{bits}/channel/asym")
    found = [decibel(x, simulate(x, s, weight_qparams(x, s, observer))) for observer in ("minmax", "mse")]
    wide, tight = CLIPPING[name][bits]
    assert found[0] == pytest.approx(wide, abs=0.7)
    assert tight - 0.3 < found[1] < tight + 0.5  # the table shrinks both ends alike; the search does not have to


# Best asymmetric range of GELU(N(0, 1)) (algorithms.md 16): all of the negative lobe, and a part of the positive side.
GELU = {2: 11.43, 3: 14.71, 4: 20.82, 6: 31.72, 8: 42.53}


@pytest.mark.parametrize("bits", GELU)
def test_each_end_of_an_asymmetric_range_is_clipped_on_its_own(bits):
    x, s = F.gelu(torch.randn(1, 300_000)), spec(f"uint{bits}/channel/asym")
    found = weight_qparams(x, s)
    assert decibel(x, simulate(x, s, found)) == pytest.approx(GELU[bits], abs=0.2)
    if bits >= 4:
        lowest = -found.zero_point * found.scale
        assert lowest.item() == pytest.approx(-0.17, abs=found.scale.item())


def test_clipping_does_not_help_against_large_outliers():
    x = torch.randn(1, 20_000)
    x[0, ::2000], x[0, 1000::2000] = 40.0, -40.0
    s = spec("uint4/channel/asym")
    wide, tight = (decibel(x, simulate(x, s, weight_qparams(x, s, name))) for name in ("minmax", "mse"))
    assert (wide, tight) == (pytest.approx(4.2, abs=0.3), pytest.approx(4.4, abs=0.3))


@pytest.mark.parametrize(
    "text", ["int2", "ternary", "int4/channel", "uint4/channel/asym", "int3/group16", "int8", "nf4/group32", "nf4"]
)
@pytest.mark.parametrize("shape", [(8, 64), (8, 3, 3, 32)])
def test_the_search_is_never_worse_than_the_extremes(text, shape):
    w = torch.randn(shape) * torch.rand(shape[0], *[1] * (len(shape) - 1))
    assert squared_error(w, text, "mse") <= squared_error(w, text, "minmax") * (1 + 1e-6)


@pytest.mark.parametrize("text", ["int4/channel", "uint4/channel/asym", "int4/group16", "int4", "nf4/group16"])
def test_found_scales_have_the_shape_of_the_granularity(text):
    w = torch.randn(6, 64)
    found = weight_qparams(w, spec(text))
    wanted = live_qparams(w, spec(text))
    assert found.scale.shape == wanted.scale.shape
    assert (found.zero_point is None) == (wanted.zero_point is None)
    assert torch.equal(weight_qparams(w, spec(text), "minmax").scale, wanted.scale)


def test_rows_are_searched_independently():
    w = torch.randn(5, 128) * torch.tensor([1e-3, 1.0, 10.0, 1e3, 1.0]).view(5, 1)
    s = spec("uint4/channel/asym")
    together = weight_qparams(w, s)
    for row in range(5):
        alone = weight_qparams(w[row : row + 1], s)
        assert torch.equal(together.scale[row], alone.scale[0])
        assert torch.equal(together.zero_point[row], alone.zero_point[0])


def test_counts_weigh_like_repetitions():
    values = torch.randn(1, 50)
    counts = torch.randint(1, 5, (1, 50))
    repeated = values.repeat_interleave(counts[0], 1)
    for text in ("int3", "uint3/asym"):
        counted = search_range(values, spec(text), counts.float())
        assert torch.equal(counted.scale, search_range(repeated, spec(text)).scale)


def test_values_on_the_grid_are_kept_exactly():
    w = torch.randint(-7, 8, (4, 64)).float() * 0.25
    w[:, 0] = 1.75
    assert squared_error(w, "int4/channel", "mse") == 0
    assert weight_qparams(w, spec("int4/channel")).scale.flatten().tolist() == [0.25] * 4


def test_rows_of_zeros_stay_zero():
    w = torch.zeros(2, 16)
    for text in ("int4/channel", "uint4/channel/asym", "nf4/channel"):
        assert torch.equal(simulate(w, spec(text), weight_qparams(w, spec(text))), w)


def test_weights_that_are_not_finite_are_refused():
    w = torch.ones(2, 4)
    w[0, 0] = torch.nan
    for observer in ("mse", "minmax"):
        with pytest.raises(NumericsError, match="int4/channel: a range bound is NaN or infinite"):
            weight_qparams(w, spec("int4/channel"), observer)


def test_an_unknown_weight_observer_is_named_with_the_known_ones():
    with pytest.raises(SpecError, match="unknown weight observer 'percentile'; weights know minmax, mse, absmean"):
        weight_qparams(torch.ones(1, 2), spec("int8"), "percentile")


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("function", [F.gelu, F.silu, F.hardswish, torch.expm1, F.relu], ids=lambda f: f.__name__)
def test_no_scale_and_zero_point_is_a_tenth_of_a_decibel_better(function, bits):
    x, s = function(torch.randn(1, 4000)), spec(f"uint{bits}/asym")
    found = decibel(x, simulate(x, s, search_range(x, s)))
    levels, width = 2**bits - 1, (x.max() - x.min()).item()
    best = 0.0
    for scale in (torch.logspace(-3, 0, 90, base=2.0) * width / levels).tolist():
        whole = round(-x.min().item() / scale)
        for zero in range(max(0, whole - max(2, levels // 8)), min(levels, whole + 1) + 1):
            best = max(best, decibel(x, simulate(x, s, QParams(torch.tensor([scale]), torch.tensor([float(zero)])))))
    assert found > best - 0.1


def test_absmean_is_the_mean_magnitude_for_ternary_and_binary_and_least_squares_for_the_rest():
    w = torch.randn(6, 5000)
    for text, mean in (("ternary", w.abs().mean().view(1)), ("binary/channel", w.abs().mean(1, keepdim=True))):
        assert torch.allclose(weight_qparams(w, spec(text), "absmean").scale, mean)
    assert torch.equal(weight_qparams(w, spec("int4"), "absmean").scale, weight_qparams(w, spec("int4"), "mse").scale)
    gaussian = torch.randn(1, 200_000)
    values = simulate(gaussian, spec("ternary"), weight_qparams(gaussian, spec("ternary"), "absmean"))
    assert (values == 0).float().mean().item() == pytest.approx(0.31, abs=0.005)
    assert decibel(gaussian, values) == pytest.approx(5.79, abs=0.05)
    best = simulate(gaussian, spec("ternary"), weight_qparams(gaussian, spec("ternary")))
    assert decibel(gaussian, best) == pytest.approx(7.21, abs=0.05)


def test_binary_takes_the_mean_magnitude_which_no_scale_beats():
    w = torch.randn(3, 2000) * torch.tensor([[1.0], [5.0], [0.1]])
    found = weight_qparams(w, spec("binary/channel"))
    assert torch.allclose(found.scale, w.abs().mean(1, keepdim=True))
    error = (simulate(w, spec("binary/channel"), found) - w).square().sum(1)
    for factor in (0.9, 0.99, 1.01, 1.1):
        other = QParams(found.scale * factor)
        assert ((simulate(w, spec("binary/channel"), other) - w).square().sum(1) > error).all()


@pytest.mark.parametrize("text", ["kmeans4/channel", "quantile3", "kmeans3/group32"])
@pytest.mark.parametrize("observer", ["mse", "minmax", "absmean"])
def test_fitted_tables_come_with_the_scales(text, observer):
    w = torch.randn(8, 64)
    found = weight_qparams(w, spec(text), observer)
    assert torch.equal(found.codebook, live_qparams(w, spec(text)).codebook)
    assert decibel(w, simulate(w, spec(text), found)) > 9


def test_shared_exponents_are_searched_among_powers_of_two():
    w, s = torch.randn(16, 256), spec("mxfp4")
    found, plain = weight_qparams(w, s), weight_qparams(w, s, "minmax")
    assert torch.equal(found.scale.log2(), found.scale.log2().round())
    errors = [(simulate(w, s, p) - w).square().sum().item() for p in (found, plain)]
    assert errors[0] <= errors[1]
