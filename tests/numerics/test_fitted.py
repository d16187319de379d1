"""Fitted tables: k-means and quantiles against the Gaussian optimum, rows, weights, storage (algorithms.md 15)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.affine import encode, live_qparams, simulate, with_codebook
from bitwright.numerics.codebook import kmeans, nearest_code, quantile_levels
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.qtensor import dequantize, quantize
from bitwright.numerics.spec import QParams, QuantSpec

# Lloyd-Max for N(0, 1): positive levels and mean squared error.
LLOYD = {
    2: ([0.7979], 0.36338),
    3: ([0.0, 1.224], 0.19017),
    4: ([0.4528, 1.5104], 0.11748),
    8: ([0.2451, 0.756, 1.3439, 2.1519], 0.034548),
    16: ([0.1284, 0.388, 0.6568, 0.9423, 1.2562, 1.618, 2.069, 2.7326], 0.009501),
}

# Best clipping point and error of 2^b - 1 even levels, -(2^(b-1) - 1) s to (2^(b-1) - 1) s, for N(0, 1).
NARROW = {
    2: (1.224, 0.19017),
    3: (1.952, 0.046860),
    4: (2.474, 0.012889),
    5: (2.899, 0.0036932),
    6: (3.270, 0.0010693),
    8: (3.921, 8.831e-5),
}


@pytest.fixture(scope="module")
def million() -> Tensor:
    return torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(5))


def error(x: Tensor, table: Tensor, weights: Tensor | None = None) -> float:
    middles = (table[:, 1:] + table[:, :-1]) / 2
    squares = (table.gather(1, torch.searchsorted(middles, x)) - x).double().square()
    return (squares if weights is None else squares * weights).sum().item()


@pytest.mark.parametrize("bits", NARROW)
def test_even_levels_have_the_known_errors_and_best_clipping_points(bits, million):
    alpha, mse = NARROW[bits]
    spec = QuantSpec.parse(f"int{bits}")

    def clipped_at(end: float) -> float:
        narrow = million.clamp(-end, end)  # so that the code -2^(b-1) is never used
        found = simulate(narrow, spec, QParams(torch.tensor([end / spec.format.qmax])))
        return (found - million).double().square().mean().item()

    assert clipped_at(alpha) == pytest.approx(mse, rel=0.023)  # 0.1 dB
    assert clipped_at(alpha) < min(clipped_at(0.94 * alpha), clipped_at(1.06 * alpha))


@pytest.mark.parametrize("levels", LLOYD)
def test_kmeans_reaches_the_gaussian_optimum(levels, million):
    table = kmeans(million, levels)
    positive, mse = LLOYD[levels]
    assert table[0, levels // 2 :].tolist() == pytest.approx(positive, rel=0.03, abs=0.03)
    assert error(million, table) / million.numel() == pytest.approx(mse, rel=0.01)


def test_256_levels_come_within_one_percent_of_where_lloyd_ends(million):
    density_limit = 3**0.5 * torch.pi / 2 / 256**2  # Panter and Dite, approached from below
    found = error(million, kmeans(million, 256))
    assert found <= error(million, kmeans(million, 256, iterations=3000)) * 1.01
    assert found / million.numel() < density_limit * 1.01


@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_never_rises_from_one_iteration_to_the_next(weighted):
    x = torch.randn(3, 4000) ** 3
    weights = torch.rand(3, 4000) if weighted else None
    for row in range(3):
        part, weight = x[row : row + 1], None if weights is None else weights[row : row + 1]
        errors = [error(part, kmeans(part, 16, weight, iterations=n), weight) for n in range(40)]
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
        assert errors[-1] < errors[0] * 0.95


@given(
    st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=60),
    st.sampled_from([2, 4, 16]),
    st.integers(0, 99),
)
def test_tables_ascend_and_stay_among_the_values(values, levels, seed):
    x = torch.tensor([values])
    weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    for table in (kmeans(x, levels), kmeans(x, levels, weights), quantile_levels(x, levels)):
        assert table.shape == (1, levels)
        assert torch.equal(table, table.sort().values)
        assert table.min() >= x.min() - 1e-5
        assert table.max() <= x.max() + 1e-5


def test_as_many_evenly_spaced_values_as_levels_are_kept_exactly():
    x = torch.tensor([[-1.0, -0.5, 0.0, 0.5]]).repeat(1, 5)
    assert kmeans(x, 4).tolist() == [[-1.0, -0.5, 0.0, 0.5]]
    assert kmeans(torch.full((1, 7), 2.0), 4).tolist() == [[2.0] * 4]


def test_weights_count_like_repetitions_and_zero_weights_not_at_all():
    x = torch.randn(1, 60)
    weights = torch.randint(1, 5, (1, 60)).float()
    repeated = x.repeat_interleave(weights[0].long(), 1)
    assert error(x, kmeans(x, 4, weights), weights) == pytest.approx(error(repeated, kmeans(repeated, 4)), rel=0.05)
    x[0, ::2] += 0.01 * torch.randn(30)
    important = torch.zeros(1, 60)
    important[0, :4] = 1.0
    assert error(x, kmeans(x, 4, important), important) < 0.1 * error(x, kmeans(x, 4), important)


def test_quantiles_use_every_code_equally_often(million):
    table = quantile_levels(million, 16)
    counts = nearest_code(million, FORMATS["quantile4"], table[0]).long().flatten().bincount()
    assert counts[1:-1].float() / len(million[0]) == pytest.approx([1 / 16] * 14, rel=0.1)
    wanted = torch.special.ndtri((torch.arange(16, dtype=torch.float64) + 0.5) / 16)
    assert (table[0] - wanted).abs().max() < 0.01
    assert error(million, table) > error(million, kmeans(million, 16)) * 1.2


@pytest.mark.parametrize("text", ["kmeans3", "kmeans3/channel", "quantile4", "quantile4/channel", "kmeans2/group8"])
def test_the_nearest_level_equals_a_search_over_the_table(text):
    spec = QuantSpec.parse(text)
    x = torch.randn(6, 4, 8)
    params = live_qparams(x, spec)
    found = simulate(x, spec, params)
    by_row = spec.granularity.kind == "channel"
    assert params.codebook.shape == ((6,) if by_row else ()) + (2**spec.format.bits,)
    scale = params.scale.view(6, 4, 1, 1) if spec.granularity.kind == "group" else params.scale.unsqueeze(-1)
    table = params.codebook.view(6, 1, 1, -1) if by_row else params.codebook.view(1, 1, 1, -1)
    nearest = (table * scale - x.unsqueeze(-1)).abs().min(-1).values
    assert ((found - x).abs() - nearest).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(5,), (4, 6), (4, 3, 3, 2)])
@pytest.mark.parametrize("text", ["kmeans4", "kmeans4/channel", "quantile2/channel"])
def test_stored_tensors_decode_to_their_simulation_and_every_code_comes_back(text, shape):
    spec, x = QuantSpec.parse(text), torch.randn(shape)
    q = quantize(x, spec)
    assert torch.equal(dequantize(q), simulate(x, spec, q.qparams))
    again = quantize(dequantize(q), spec, q.qparams)
    assert torch.equal(dequantize(again), dequantize(q))


def test_tables_of_rows_do_not_see_one_another_in_parts_or_whole(monkeypatch):
    spec, w = QuantSpec.parse("kmeans4/channel"), torch.randn(7, 64) * torch.logspace(-3, 3, 7).unsqueeze(1)
    together = quantize(w, spec)
    monkeypatch.setattr("bitwright.numerics.codebook._PART", 130)  # two rows at a time
    assert torch.equal(quantize(w, spec).codebook, together.codebook)
    for row in range(7):
        assert torch.equal(quantize(w[row : row + 1], spec).codebook[0], together.codebook[row])


def test_a_table_by_row_beats_one_for_all_when_rows_differ():
    w = torch.cat([torch.randn(4, 2000), torch.rand(4, 2000).sign() * torch.rand(4, 2000) ** 6])
    errors = [(dequantize(quantize(w, QuantSpec.parse(t))) - w).square().sum() for t in ("kmeans3/channel", "kmeans3")]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("text", ["kmeans4/group32", "kmeans4"])
def test_least_squares_beats_quantiles_and_nf4(text):
    w = torch.randn(64, 512)
    names = [text, text.replace("kmeans", "quantile"), text.replace("kmeans4", "nf4")]
    errors = [(dequantize(quantize(w, QuantSpec.parse(t))) - w).square().mean().item() for t in names]
    assert errors[0] < min(errors[1:])


def test_importance_moves_levels_to_the_weights_that_matter():
    w, importance = torch.randn(4, 500), torch.full((4, 500), 1e-3)
    importance[:, :20] = 1.0
    spec = QuantSpec.parse("kmeans3/channel")
    plain = live_qparams(w, spec)
    aware = with_codebook(w, spec, QParams(plain.scale), importance)
    squares = [((simulate(w, spec, p) - w).square() * importance).sum().item() for p in (aware, plain)]
    assert squares[0] < squares[1] * 0.6


def test_a_missing_table_is_named():
    spec = QuantSpec.parse("kmeans4")
    with pytest.raises(NumericsError, match="kmeans4 needs a table that is fitted to the tensor"):
        encode(torch.ones(3), spec, QParams(torch.ones(1)))


def test_gradients_pass_straight_through_a_fitted_table():
    x = torch.randn(4, 8, requires_grad=True)
    spec = QuantSpec.parse("kmeans2/channel")
    params = live_qparams(x, spec)
    assert not params.codebook.requires_grad
    simulate(x, spec, params).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
