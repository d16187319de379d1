"""Factors as integer and shift, and requantization in integers alone (algorithms.md 2.6)."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import NumericsError
from bitwright.numerics.dyadic import dyadic, requantize


def test_one_half_is_two_to_the_thirty_shifted_by_thirty_one():
    assert [part.item() for part in dyadic(torch.tensor(0.5))] == [2**30, 31]


def test_random_factors_are_met_to_half_a_unit_of_31_bits():
    factor = torch.empty(100_000, dtype=torch.float64).uniform_(6e-6, 1)
    m, shift = dyadic(factor)
    assert ((m * torch.exp2(-shift.double()) - factor) / factor).abs().max() <= 2.0**-31
    assert m.min() >= 2**30
    assert m.max() < 2**31


def test_a_fraction_that_rounds_up_to_one_does_not_overflow():
    m, shift = dyadic(torch.tensor([1 - 2.0**-40, 2 - 2.0**-40], dtype=torch.float64))
    assert m.tolist() == [2**30, 2**30]
    assert shift.tolist() == [30, 29]


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20),
    st.floats(2.0**-31, 2.0**29),
    st.integers(0, 255),
)
def test_integers_round_as_exact_fractions_do(accumulators, factor, zero_point):
    m, shift = dyadic(torch.tensor(factor, dtype=torch.float64))
    found = requantize(torch.tensor(accumulators), m, shift, zero_point, -(2**40), 2**40)
    exact = [round(Fraction(acc * int(m), 2 ** int(shift))) + zero_point for acc in accumulators]
    assert found.tolist() == [min(max(value, -(2**40)), 2**40) for value in exact]


def test_ties_go_to_even_for_both_signs():
    acc = torch.tensor([1, 3, 5, -1, -3, -5])
    assert requantize(acc, *dyadic(torch.tensor(0.5)), 0, -128, 127).tolist() == [0, 2, 2, 0, -2, -2]
    quarter = torch.arange(-64, 65)
    found = requantize(quarter, *dyadic(torch.tensor(0.25)), 0, -128, 127)
    assert torch.equal(found, (quarter / 4).round().long())


def test_codes_are_clamped_after_the_zero_point_and_channels_have_their_own_factor():
    acc = torch.tensor([[1000, -1000], [1000, -1000]])
    m, shift = dyadic(torch.tensor([[0.1], [0.01]]))
    assert requantize(acc, m, shift, 3, -90, 100).tolist() == [[100, -90], [13, -7]]


@pytest.mark.parametrize("factor", [0.0, -0.5, 2.0**-32, 2.0**30, float("nan")])
def test_factors_out_of_range_are_refused(factor):
    with pytest.raises(NumericsError, match=r"a dyadic factor lies in \[2\*\*-31, 2\*\*30\), found"):
        dyadic(torch.tensor([factor]))
