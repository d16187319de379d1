"""What a drop of score is, and how sure that is, from the scores of two models on the same items.

======== ============================================================== ============================================
method   used for                                                       bound
======== ============================================================== ============================================
exact    scores of 0 and 1, fewer than `FEW` items that differ          smallest exact limit (Buehler 1957)
normal   scores of 0 and 1, `FEW` or more                               ``D + z sqrt(b + c - (b - c)^2 / n) / n``
bootstrap other scores, `FEW` or more items that differ                 percentiles of resampled means
betting  other scores in a known range, fewer than `FEW`                capital process, see `sequential`
======== ============================================================== ============================================

With b items that only the first model gets right, c that only the second does, and n items, ``D = (b - c) / n``.
McNemar's test asks whether any change is shown (``D = 0``); that it shows none is no proof that there is none, so the
claim "the drop is below a limit" rests on the upper bound alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.flow.evaluate import resampled_drops
from bitwright.search.sequential import upper_bound

CONFIDENCE = 0.95
FEW = 50
"""Items that differ, below which neither the normal approximation nor the bootstrap is trusted."""

_GRID, _HALVINGS = 60, 32


@dataclass(frozen=True, slots=True)
class Paired:
    """Mean scores before and after, the drop, its two-sided 95 % interval and its one-sided 95 % upper bound.

    ``lost`` and ``gained`` count the items whose score fell and rose. ``p`` is that of McNemar's exact test, None for
    scores that are not 0 and 1.
    """

    before: float
    after: float
    drop: float
    low: float
    high: float
    upper: float
    items: int
    lost: int
    gained: int
    p: float | None
    method: str

    def needed(self, max_drop: float) -> int | None:
        """About how many items, distributed like these, show a drop below ``max_drop``; None where no number does."""
        if self.drop >= max_drop:
            return None
        shrink = (self.upper - self.drop) / (max_drop - self.drop)  # the bound nears the drop as 1 / sqrt(n)
        return math.ceil(self.items * (shrink**2 if self.lost + self.gained else shrink)) + 1


def paired(before: Tensor, after: Tensor, score_range: tuple[float, float] | None = None) -> Paired:
    """The drop between scores ``[n]`` of two models on the same items; their order does not matter.

    Raises `NumericsError` for lengths that differ, and where too few items differ to say anything about scores that are
    not 0 and 1 and whose ``score_range`` (lowest, highest) is not given.

    >>> found = paired(torch.ones(600), torch.ones(600))
    >>> found.drop, round(found.upper, 4), found.method
    (0.0, 0.005, 'exact')
    """
    if before.shape != after.shape or not len(before):
        raise NumericsError(f"paired scores need the same items, found {len(before)} and {len(after)}")
    losses = (before.double() - after.double()).sort().values
    lost, gained, items = int((losses > 0).sum()), int((losses < 0).sum()), len(losses)
    p = None
    if _is_binary(before) and _is_binary(after):
        method = "exact" if lost + gained < FEW else "normal"
        p = mcnemar(lost, gained)
        low, high, upper = _binary_bounds(lost, gained, items)
    elif lost + gained >= FEW:
        method = "bootstrap"
        low, high, upper = _bootstrapped(losses)
    else:
        method = "betting"
        low, high, upper = _bets(losses, lost + gained, score_range)
    ends = before.double().mean().item(), after.double().mean().item()
    return Paired(*ends, losses.mean().item(), low, high, upper, items, lost, gained, p, method)


def itself(scores: Tensor) -> Paired:
    """The scores ``[n]`` of a model beside themselves: a drop of 0, about which nothing is uncertain."""
    mean, p = scores.double().mean().item(), 1.0 if _is_binary(scores) else None
    return Paired(mean, mean, 0.0, 0.0, 0.0, 0.0, len(scores), 0, 0, p, "same model")


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of the exact test that losses and gains are equally likely.

    >>> round(mcnemar(10, 15), 4), round(mcnemar(60, 40), 4), mcnemar(0, 0)
    (0.4244, 0.0569, 1.0)
    """
    return float(stats.binomtest(min(lost, gained), lost + gained).pvalue) if lost + gained else 1.0


def exact_upper(lost: int, gained: int, items: int, level: float) -> float:
    """Upper limit of P(an item is lost) - P(an item is gained), wrong with a probability of at most ``level``.

    Outcomes are ordered by ``b - c + z sqrt(b + c)``; the limit is the largest difference under which an outcome of at
    most this order has a probability above ``level`` (Buehler 1957). The probability of a gain, unknown too, is
    restricted to an interval of its own, whose share of the error is taken off ``level`` (Berger and Boos 1994).

    >>> round(600 * exact_upper(0, 0, 600, 0.05), 1)  # the rule of three
    3.0
    """
    z, guard = stats.norm.ppf(1 - level), level / 500
    order = lost - gained + z * math.sqrt(lost + gained)
    top = 1.0 if gained == items else stats.beta.ppf(1 - guard, gained + 1, items - gained)
    gain = np.linspace(0, top, _GRID)[:, None]
    c = np.arange(int(stats.binom.isf(1e-12, items, top)) + 1)[None]
    root = np.sqrt(np.maximum(z * z + 4 * (2 * c + order), 0))
    most = np.where(root >= z, np.floor(((root - z) / 2) ** 2 - c + 1e-9), -1)  # largest b of at most this order
    weights = stats.binom.pmf(c, items, gain)
    low, high = np.zeros_like(gain), 1 - gain
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        chance = np.minimum(middle / np.maximum(1 - gain, 1e-300), 1)
        total = (weights * stats.binom.cdf(most, items - c, chance)).sum(1, keepdims=True)
        low, high = np.where(total > level - guard, middle, low), np.where(total > level - guard, high, middle)
    return float(np.where(low > 0, high - gain, -top).max())  # where low is 0, no loss goes with such a gain


def _is_binary(scores: Tensor) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def _binary_bounds(lost: int, gained: int, items: int) -> tuple[float, float, float]:
    tail = (1 - CONFIDENCE) / 2
    if lost + gained < FEW:
        low, high = -exact_upper(gained, lost, items, tail), exact_upper(lost, gained, items, tail)
        return low, high, exact_upper(lost, gained, items, 2 * tail)
    drop = (lost - gained) / items
    error = math.sqrt(lost + gained - (lost - gained) ** 2 / items) / items
    two, one = (float(stats.norm.ppf(1 - level)) * error for level in (tail, 2 * tail))
    return drop - two, drop + two, drop + one


def _bootstrapped(losses: Tensor) -> tuple[float, float, float]:
    tail = (1 - CONFIDENCE) / 2
    wanted = torch.tensor([tail, 1 - tail, CONFIDENCE], dtype=torch.float64)
    low, high, upper = resampled_drops(losses).quantile(wanted).tolist()
    return low, high, upper


def _bets(losses: Tensor, differ: int, score_range: tuple[float, float] | None) -> tuple[float, float, float]:
    if score_range is None:
        raise NumericsError(
            f"{differ} of {len(losses):,} items have another score, and scores are not 0 and 1; that is too few for "
            f"the bootstrap, which needs {FEW}. Pass more items, or score_range=(lowest, highest) of an item's score"
        )
    span = score_range[1] - score_range[0]
    if not span > 0 or bool((losses.abs() > span).any()):
        raise NumericsError(
            f"score_range is (lowest, highest) score of an item, got {score_range}, "
            f"but one item's score changed by {losses.abs().max().item():.4g}"
        )
    values, counts = losses.unique(return_counts=True)
    tail = (1 - CONFIDENCE) / 2
    high, low = upper_bound(values, counts, tail, span), -upper_bound(-values, counts, tail, span)
    return low, high, upper_bound(values, counts, 2 * tail, span)
