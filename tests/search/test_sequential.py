"""The test errs at most as often as it says, however often it looks; and it decides where there is enough data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.search.sequential import PairedTest, capital, items_needed, upper_bound


def losses(count: int, drop: float, disagree: float, generator: torch.Generator) -> Tensor:
    """Right-or-wrong losses in {-1, 0, 1}: ``disagree`` of the items differ, their mean is ``drop``."""
    u = torch.rand(count, generator=generator)
    return (u < (disagree + drop) / 2).double() - (u > 1 - (disagree - drop) / 2).double()


def decisions(drop: float, margin: float, disagree: float, *, runs: int, looks: int, size: int = 100) -> Tensor:
    """What each of ``runs`` tests said in the end: 1 below the margin, -1 not below it, 0 open."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(runs):
        test = PairedTest(margin, 0.05)
        answer = None
        for _ in range(looks):
            answer = test.update(losses(size, drop, disagree, generator))
            if answer is not None:
                break
        found.append(0 if answer is None else 1 if answer else -1)
    return torch.tensor(found)


@pytest.mark.parametrize(("margin", "disagree"), [(0.01, 0.04), (0.05, 0.2), (0.02, 0.02)])
def test_at_the_boundary_it_errs_at_most_as_often_as_its_level(margin: float, disagree: float) -> None:
    found = decisions(margin, margin, disagree, runs=250, looks=20, size=150)
    slack = 3 * math.sqrt(0.05 * 0.95 / 250)
    assert (found == 1).float().mean() <= 0.05 + slack
    assert (found == -1).float().mean() <= 0.05 + slack


def test_a_test_of_one_look_repeated_would_err_too_often() -> None:
    generator, wrong = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        x = losses(3000, 0.05, 0.2, generator)
        for count in range(100, 3001, 100):
            seen = x[:count]
            if seen.mean() + 1.645 * seen.std() / math.sqrt(count) < 0.05:
                wrong += 1
                break
    assert wrong / 300 > 0.15


@pytest.mark.parametrize(("drop", "answer"), [(0.0, 1), (0.03, -1)])
def test_clear_cases_are_decided_early(drop: float, answer: int) -> None:
    found = decisions(drop, 0.01, 0.04, runs=60, looks=60)
    assert (found == answer).float().mean() > 0.8


def test_the_interval_covers_the_drop_that_is() -> None:
    generator, missed = torch.Generator().manual_seed(1), 0
    for _ in range(200):
        test = PairedTest(0.5, 0.05)
        test.update(losses(1000, 0.02, 0.1, generator))
        low, high = test.interval()
        assert low < test.drop < high
        assert high - low < 0.09
        missed += not low <= 0.02 <= high
    assert missed <= 0.1 * 200


def test_batches_may_come_in_any_cut_and_order() -> None:
    x = losses(500, 0.02, 0.3, torch.Generator().manual_seed(2))
    whole, parts = PairedTest(0.2, 0.05), PairedTest(0.2, 0.05)
    whole.update(x)
    for part in x.flip(0).split(77):
        parts.update(part)
    assert whole.interval() == parts.interval()
    assert whole.items == parts.items == 500


def test_answer_and_interval_agree() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        test = PairedTest(0.05, 0.05)
        answer = None
        while answer is None and test.items < 4000:
            answer = test.update(losses(50, 0.02, 0.1, generator))
        low, high = test.interval()
        assert answer is None or (high <= 0.05 + 1e-6 if answer else low >= 0.05 - 1e-6)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.floats(-0.9, 0.9), st.floats(0, 0.09))
def test_the_capital_grows_with_the_margin(x: list[float], margin: float, more: float) -> None:
    values, counts = torch.tensor(x, dtype=torch.float64), torch.ones(len(x))
    assert capital(values, counts, margin, 1.0) <= capital(values, counts, margin + more, 1.0) + 1e-9


@given(st.floats(0.01, 0.99), st.floats(-0.9, 0.9))
def test_on_average_the_capital_does_not_grow_where_the_mean_is_the_margin(share: float, margin: float) -> None:
    # two outcomes around the margin with the probabilities that give it as their mean
    low, high = margin - share * (1 + margin), margin + share * (1 - margin)
    chance = (high - margin) / (high - low)
    expected = sum(
        p * math.exp(capital(torch.tensor([x]), torch.ones(1), margin, 1.0))
        for p, x in ((chance, low), (1 - chance, high))
    )
    assert expected == pytest.approx(1.0, abs=1e-6)


def test_equal_answers_need_as_many_items_as_it_says() -> None:
    zero = torch.zeros(1)
    for margin, level in ((0.01, 0.05), (0.002, 0.05), (0.01, 0.004)):
        needed = items_needed(zero, torch.ones(1), margin, level, 1.0)
        assert needed is not None
        assert upper_bound(zero, torch.tensor([needed]), level, 1.0) <= margin * (1 + 1e-6)
        assert upper_bound(zero, torch.tensor([needed - 1]), level, 1.0) > margin
        assert 3 / margin < needed < 12 / margin
    assert items_needed(torch.ones(1), torch.ones(1), 0.01, 0.05, 1.0) is None


def test_a_narrower_range_of_scores_is_the_same_test_on_another_scale() -> None:
    x = losses(300, 0.02, 0.3, torch.Generator().manual_seed(4))
    wide, narrow = PairedTest(0.2, 0.05, 1.0), PairedTest(0.02, 0.05, 0.1)
    wide.update(x), narrow.update(0.1 * x)
    assert narrow.interval()[1] == pytest.approx(0.1 * wide.interval()[1], abs=1e-6)


def test_a_margin_of_the_whole_range_holds_at_once() -> None:
    assert PairedTest(1.0, 0.05).update(torch.ones(3)) is True


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(NumericsError, match=r"level in \(0, 1\)"):
        PairedTest(0.1, 0.0)
    with pytest.raises(NumericsError, match="margin"):
        PairedTest(-1.0, 0.05)
    with pytest.raises(NumericsError, match=r"within 1\.0 of 0"):
        PairedTest(0.1, 0.05).update(torch.tensor([1.5]))
    with pytest.raises(NumericsError, match="within"):
        PairedTest(0.1, 0.05).update(torch.tensor([math.nan]))
