"""From summed harm to the drop of the whole: the non-falling map of least squared error, and its inverse."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.search.curve import Curve

NUMBERS = st.floats(0, 10).map(lambda value: round(value, 3))
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12)


def means(points: list[tuple[float, float]]) -> list[tuple[float, float, int]]:
    groups: dict[float, list[float]] = {}
    for summed, drop in points:
        groups.setdefault(summed, []).append(drop)
    return [(at, sum(groups[at]) / len(groups[at]), len(groups[at])) for at in sorted(groups)]


@given(POINTS)
def test_it_is_the_isotonic_regression(points: list[tuple[float, float]]) -> None:
    """Min-max formula (Barlow 1972, theorem 1.4): the largest of the least means of runs that hold the place."""
    rows = means(points)

    def mean(first: int, last: int) -> float:
        part = rows[first : last + 1]
        return sum(value * count for _, value, count in part) / sum(count for *_, count in part)

    places = range(len(rows))
    expected = [max(min(mean(j, k) for k in places if k >= i) for j in places if j <= i) for i in places]
    found = Curve.fit(points)
    assert found.summed == tuple(at for at, *_ in rows)
    assert found.drop == pytest.approx(expected, abs=1e-9)


@given(POINTS, NUMBERS)
def test_the_limit_is_the_largest_sum_within_the_drop(points: list[tuple[float, float]], drop: float) -> None:
    found = Curve.fit(points)
    limit = found.limit(drop)
    if math.isinf(limit):
        assert found.at(1e9) <= drop
    elif found.drop[0] > drop:
        assert limit == 0
    else:
        assert found.at(limit) <= drop + 1e-9
        assert found.at(limit * (1 + 1e-6) + 1e-3) > drop


def test_what_is_no_number_tells_nothing() -> None:
    assert Curve.fit([(1.0, 0.5), (2.0, math.inf), (3.0, math.nan)]) == Curve((1.0,), (0.5,))
    assert math.isnan(Curve.fit([]).at(1.0))
    assert Curve.fit([(1.0, math.inf)]).limit(0.1) == math.inf
