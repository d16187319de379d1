"""The drop and its bounds: published values, exact coverage, and agreement of methods where two apply."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from bitwright.claims.paired import FEW, _binary_bounds, exact_upper, itself, mcnemar, paired
from bitwright.errors import NumericsError


def outcomes(lost: int, gained: int, items: int) -> tuple[Tensor, Tensor]:
    before, after = torch.ones(items), torch.ones(items)
    after[:lost] = 0
    before[lost : lost + gained] = 0
    return before, after


@pytest.mark.parametrize(
    ("items", "rate", "width"),
    [(1000, 0.08, 1.47), (5000, 0.01, 0.23), (5000, 0.04, 0.47), (10_000, 0.04, 0.33), (50_000, 0.08, 0.21)],
)
def test_width_of_the_bound_is_the_published_one(items: int, rate: float, width: float) -> None:
    half = round(items * rate / 2)
    found = paired(*outcomes(half, half, items))
    assert found.method == "normal"
    assert 100 * found.upper == pytest.approx(width, abs=0.006)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(10, 15) == pytest.approx(0.4244, abs=5e-5)
    assert mcnemar(60, 40) == pytest.approx(0.0569, abs=5e-5)
    assert mcnemar(0, 6) == 2 * 0.5**6
    assert paired(*outcomes(10, 15, 500)).p == mcnemar(15, 10)


def test_without_a_difference_the_bound_is_the_rule_of_three() -> None:
    found = paired(*outcomes(0, 0, 600))
    assert found.upper == pytest.approx(1 - 0.05 ** (1 / 600), rel=2e-3)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 600), rel=2e-3)
    assert found.low == -found.high


@functools.cache
def bound(lost: int, gained: int, items: int, level: float) -> float:
    return exact_upper(lost, gained, items, level)


@pytest.mark.parametrize("chances", [(0.0, 0.0), (0.02, 0.0), (0.05, 0.02), (0.02, 0.05), (0.1, 0.09), (0.06, 0.3)])
def test_exact_bound_covers_at_least_as_often_as_it_says(chances: tuple[float, float]) -> None:
    items, level, covered, total = 40, 0.05, 0.0, 0.0
    for lost in range(items + 1):
        for gained in range(items + 1 - lost):
            rest = items - lost - gained
            chance = stats.multinomial.pmf([lost, gained, rest], items, [*chances, 1 - sum(chances)])
            if chance > 1e-5:
                total += chance
                covered += chance * (bound(lost, gained, items, level) >= chances[0] - chances[1] - 1e-3)
    assert total > 0.99
    assert covered >= (1 - level) * total - 2e-3


def test_normal_bounds_cover_as_often_as_they_say() -> None:
    items, chances, draws = 3000, (0.04, 0.03), 4000
    counts = stats.multinomial(items, [*chances, 1 - sum(chances)], seed=0).rvs(draws)
    bounds = [_binary_bounds(int(lost), int(gained), items) for lost, gained, _ in counts]
    low, high, upper = (torch.tensor(values) for values in zip(*bounds, strict=True))
    true = chances[0] - chances[1]
    assert ((low <= true) & (true <= high)).double().mean().item() == pytest.approx(0.95, abs=0.01)
    assert (true <= upper).double().mean().item() == pytest.approx(0.95, abs=0.01)


def test_exact_and_normal_bounds_meet_where_they_change_over() -> None:
    for lost, gained in ((30, 18), (24, 24), (10, 38)):
        found, other = paired(*outcomes(lost, gained, 2000)), paired(*outcomes(lost + 1, gained + 1, 2000))
        assert (found.method, other.method) == ("exact", "normal")
        assert found.upper == pytest.approx(other.upper, abs=0.25 * math.sqrt(FEW) / 2000)


def test_order_of_arguments_flips_the_sign() -> None:
    for lost, gained in ((7, 3), (80, 40)):
        before, after = outcomes(lost, gained, 1000)
        one, other = paired(before, after), paired(after, before)
        assert (one.drop, one.low, one.high) == pytest.approx((-other.drop, -other.high, -other.low))
        assert (one.lost, one.gained) == (other.gained, other.lost) == (lost, gained)


def test_order_of_items_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(300, generator=generator), torch.rand(300, generator=generator)
    order = torch.randperm(300, generator=generator)
    one, other = paired(before, after), paired(before[order], after[order])
    assert one.method == "bootstrap"
    assert (one.low, one.high, one.upper) == (other.low, other.high, other.upper)


def test_bootstrap_agrees_with_the_analytic_error() -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.rand(2000, generator=generator)
    after = before - 0.02 + 0.1 * torch.randn(2000, generator=generator)
    found, error = paired(before, after), (before - after).std().item() / math.sqrt(2000)
    assert found.p is None
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.upper == pytest.approx(found.drop + 1.645 * error, rel=0.02)


def test_few_differences_of_other_scores_need_their_range() -> None:
    before = torch.full((800,), 0.5)
    after = before.clone()
    after[:3] = 0.25
    with pytest.raises(NumericsError, match="3 of 800 items have another score"):
        paired(before, after)
    found = paired(before, after, (0.0, 1.0))
    assert found.method == "betting"
    assert found.low < found.drop < found.upper < found.high < 0.02
    with pytest.raises(NumericsError, match=r"changed by 0\.25"):
        paired(before, after, (0.4, 0.6))


def test_the_number_of_items_that_is_asked_for_is_enough() -> None:
    for lost, gained, items in ((6, 2, 500), (40, 30, 1000), (0, 0, 100)):
        found = paired(*outcomes(lost, gained, items))
        limit = found.drop + 0.4 * (found.upper - found.drop)
        needed = found.needed(limit)
        assert needed is not None
        assert needed > items
        times = needed / items
        enough = paired(*outcomes(round(lost * times), round(gained * times), needed))
        assert enough.upper < limit * 1.02  # counts are whole numbers
        assert needed <= items / 0.4**2 + 2
    assert found.needed(-0.1) is None


def test_a_model_beside_itself() -> None:
    found = itself(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert (found.before, found.after, found.drop, found.low, found.high, found.p) == (0.75, 0.75, 0, 0, 0, 1.0)


def test_other_items_are_an_error() -> None:
    with pytest.raises(NumericsError, match="found 3 and 4"):
        paired(torch.ones(3), torch.ones(4))
