"""A histogram that never loses a count, stays small, and forgets the order of its data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import CalibrationError
from bitwright.observe.histogram import BINS, Histogram

magnitudes = st.sampled_from([0.0, 1e-30, 1e-6, 1e-3, 0.5, 1.0, 37.0, 1024.0, 1e6, 1e30])


@st.composite
def streams(draw: st.DrawFn) -> list[Tensor]:
    sizes = draw(
        st.lists(st.tuples(magnitudes, st.floats(-1, 1, width=32), st.integers(1, 50)), min_size=1, max_size=6)
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return [(torch.rand(n, generator=generator) - shift) * size for size, shift, n in sizes]


def filled(*batches: Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def state(histogram: Histogram) -> tuple:
    return (
        histogram.exponent,
        histogram.first,
        histogram.counts.tolist(),
        histogram.lo.item(),
        histogram.hi.item(),
    )


@settings(max_examples=200)
@given(streams(), st.randoms())
def test_the_state_does_not_depend_on_the_order_of_the_data(batches, random):
    shuffled = random.sample(batches, len(batches))
    assert state(filled(*batches)) == state(filled(*shuffled)) == state(filled(torch.cat(batches)))


@settings(max_examples=200)
@given(streams())
def test_no_value_is_lost_and_memory_stays_bounded(batches):
    histogram = Histogram()
    total = 0
    for batch in batches:
        histogram.update(batch)
        total += len(batch)
        assert histogram.counts.sum() == total
        assert len(histogram.counts) <= BINS
    assert histogram.lo.item() == min(batch.min().item() for batch in batches)
    assert histogram.hi.item() == max(batch.max().item() for batch in batches)


@settings(max_examples=200)
@given(streams())
def test_every_value_lies_in_the_bin_that_counts_it(batches):
    histogram = filled(*batches)
    values = torch.cat(batches).double()
    bins = torch.floor(values / 2.0**histogram.exponent).long() - histogram.first
    assert torch.equal(torch.bincount(bins, minlength=len(histogram.counts)), histogram.counts)


def test_memory_stays_bounded_while_the_range_grows_by_twelve_orders_of_magnitude():
    histogram = Histogram()
    for step in range(121):
        histogram.update(torch.randn(1000) * 10 ** (-6 + step / 10))
        assert len(histogram.counts) <= BINS
    assert histogram.counts.sum() == 121_000
    assert histogram.counts.dtype == torch.int64


def test_bins_are_no_wider_than_the_range_needs():
    for size in (1e-6, 0.3, 1.0, 1000.0):
        histogram = filled(torch.linspace(-size, size, 10_001))
        assert BINS / 2 - 2 <= len(histogram.counts) <= BINS


def test_a_batch_of_zeros_before_large_values_costs_nothing():
    histogram = filled(torch.zeros(7), torch.tensor([1e6, -3.0]))
    assert histogram.counts.sum() == 9
    assert state(histogram) == state(filled(torch.tensor([1e6, -3.0]), torch.zeros(7)))


def test_values_far_from_zero_do_not_depend_on_the_order_either():
    low, high = torch.tensor([1023.0, 1023.9]), torch.tensor([1024.0, 1024.1])
    assert state(filled(low, high)) == state(filled(high, low))


@pytest.mark.parametrize("value", [0.0, 1e-40, -3.5, 3e38, -3e38])
def test_a_constant_is_one_point(value):
    values, counts = filled(torch.full((5,), value)).points()
    assert values.tolist() == [torch.tensor(value).item()]
    assert counts.tolist() == [5]


def test_points_are_bin_centres_with_the_true_extremes_at_the_ends():
    x = torch.randn(50_000)
    histogram = filled(x)
    values, counts = histogram.points()
    assert values[0] == x.min()
    assert values[-1] == x.max()
    assert counts.sum() == 50_000
    assert (counts > 0).all()
    width = 2.0**histogram.exponent
    assert torch.equal(values[1:-1] / width % 1, torch.full_like(values[1:-1], 0.5))


def test_counts_weigh_the_points_like_the_values_they_stand_for():
    x = torch.randn(100_000)
    values, counts = filled(x).points()
    assert (values * counts).sum() / 1e5 == pytest.approx(x.mean().item(), abs=2e-3)
    assert (values.square() * counts).sum() / 1e5 == pytest.approx(x.square().mean().item(), rel=2e-3)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.5, 0.9, 0.999, 1.0])
def test_quantiles_are_right_to_the_width_of_a_bin(share):
    x = torch.randn(20_001).sort().values
    histogram = filled(*x[torch.randperm(len(x))].split(3000))
    assert histogram.quantile(share).shape == (1,)
    position = max(math.ceil(share * len(x)) - 1, 0)
    assert histogram.quantile(share).item() == pytest.approx(x[position].item(), abs=2.0**histogram.exponent)


def test_half_precision_and_any_shape_are_counted():
    histogram = filled(torch.ones(2, 3, 4, dtype=torch.float16), torch.ones(5, dtype=torch.bfloat16), torch.tensor(2.0))
    assert histogram.counts.sum() == 30


def test_a_batch_without_values_changes_nothing():
    histogram = filled(torch.ones(3))
    before = state(histogram)
    histogram.update(torch.zeros(0, 8))
    assert state(histogram) == before


def test_a_histogram_that_saw_nothing_says_so():
    with pytest.raises(CalibrationError, match="saw no values; give calibration at least one batch"):
        Histogram().points()


def test_reducing_without_a_process_group_changes_nothing():
    histogram = filled(torch.randn(10))
    before = state(histogram)
    histogram.reduce()
    assert state(histogram) == before
