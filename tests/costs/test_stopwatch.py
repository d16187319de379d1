"""Medians and their standard errors; candidates take turns. How long anything takes is not tested."""

from __future__ import annotations

import random
import statistics
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.costs.stopwatch import in_turns, timing

TIMES = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=60)


@given(TIMES)
def test_the_median_is_that_of_statistics_and_lies_within_the_samples(samples: list[float]) -> None:
    found = timing(samples)
    assert found.seconds == pytest.approx(statistics.median(samples), rel=1e-12)
    assert 0 <= found.error <= (max(samples) - min(samples)) / 2
    assert found.count == len(samples)


def test_the_error_is_the_spread_of_medians() -> None:
    generator = random.Random(0)
    drawn = [timing([generator.lognormvariate(0.0, 0.5) for _ in range(101)]) for _ in range(400)]
    spread = statistics.pstdev(found.seconds for found in drawn)
    assert statistics.mean(found.error for found in drawn) == pytest.approx(spread, rel=0.1)


def test_one_slow_call_does_not_move_the_median() -> None:
    assert timing([1.0] * 30 + [1000.0]).seconds == 1.0
    assert timing([1.0] * 30 + [1000.0]).error == 0.0


def test_candidates_take_turns_and_use_their_copies_one_after_the_other() -> None:
    calls: list[str] = []
    candidates = [[lambda name=name: calls.append(name) for name in names] for names in (("a", "b", "c"), ("x",))]
    found = in_turns(candidates, precision=0.0, seconds=0.0)
    assert calls[:12] == ["a", "b", "x", "x", "c", "a", "x", "x", "b", "c", "x", "x"]  # every other call is timed
    assert len(calls) == 2 * 2 * (3 + 5)
    assert [row.count for row in found] == [5, 5]


def test_the_share_of_the_processor_is_seen() -> None:
    def asleep() -> None:
        time.sleep(0.01)

    assert in_turns([[asleep]], precision=0.0, seconds=0.0)[0].share < 0.5


def test_equal_times_are_precise_after_thirty_rounds() -> None:
    found = in_turns([[lambda: None]], precision=1e9, seconds=60.0)
    assert found[0].count == 30
