"""A paired test that may look at the data after every batch and stop at any time.

Two models are scored on the same items; ``x = before - after`` is the loss of score of one item, in ``[-span, span]``.
To show that its mean is below a margin ``m``, a gambler bets on it: with the stake ``f`` capital is multiplied by
``1 + f (m - x) / (span - m)``, which is never negative for ``f < 1`` and, were the mean ``m`` or more, would not grow
on average. So the capital is then a nonnegative supermartingale that starts at 1, and by Ville's inequality it *ever*
reaches ``1 / level`` with a probability of at most ``level``: looking often costs nothing. The stake that grows fastest
depends on what is not known before, so the capital is spread over `STAKES`; their mean is a supermartingale too
(Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting": the capital process).

What must hold: scores lie in a known range, and items are independent draws in random order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitwright.errors import NumericsError

STAKES = 0.95 * 2.0 ** (-torch.arange(16, dtype=torch.float64) / 2)
"""Shares of the largest bet, from 0.95 to 0.005: enough for margins down to about a thousandth of the span."""

_NEVER = 1e12  # items


def capital(values: Tensor, counts: Tensor, margin: float, span: float) -> float:
    """Logarithm of the capital of the bet that the mean is below ``margin``, after ``counts`` times each of ``values``.

    ``margin`` must lie in ``(-span, span)``. It grows with the margin, and the order of items does not matter.

    >>> capital(torch.zeros(1), torch.tensor([600]), 0.01, 1.0) > math.log(20)
    True
    """
    return _mean(counts.double() @ _growth(values, margin, span))


def upper_bound(values: Tensor, counts: Tensor, level: float, span: float) -> float:
    """The smallest margin that the mean was shown to lie below, wrong with a probability of at most ``level``.

    >>> round(upper_bound(torch.zeros(1), torch.tensor([1000]), 0.05, 1.0), 4)
    0.0057
    """
    low, high = (counts.double() @ values.double()).item() / max(counts.sum().item(), 1), span
    for _ in range(40):
        middle = (low + high) / 2
        if middle >= span or capital(values, counts, middle, span) >= -math.log(level):
            high = middle
        else:
            low = middle
    return high


def items_needed(values: Tensor, counts: Tensor, margin: float, level: float, span: float) -> int | None:
    """How many items, distributed like these, show that the mean is below ``margin``; None where no number does.

    >>> items_needed(torch.zeros(1), torch.ones(1), 0.01, 0.05, 1.0)
    570
    """
    if margin >= span:
        return 1
    growth = (counts.double() / counts.sum()) @ _growth(values, margin, span)
    low, high, wanted = 0, 1, -math.log(level)
    while _mean(high * growth) < wanted:
        low, high = high, 2 * high
        if high > _NEVER:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _mean(middle * growth) >= wanted else (middle, high)
    return high


@dataclass
class PairedTest:
    """Collects paired losses batch by batch, until their mean is shown to be below ``margin`` or not below it.

    ``level`` is the probability of a wrong answer in either direction, ``span`` the width of the range of scores.
    Raises `NumericsError` for a level outside (0, 1) and for a margin that is not above ``-span``.
    """

    margin: float
    level: float
    span: float = 1.0
    values: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    counts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or not self.margin > -self.span:
            found = f"level {self.level}, margin {self.margin}, span {self.span}"
            raise NumericsError(f"a paired test needs a level in (0, 1) and a margin above -span, found {found}")

    @property
    def items(self) -> int:
        """How many items were seen."""
        return int(self.counts.sum())

    @property
    def drop(self) -> float:
        """Mean loss of the items seen."""
        return (self.counts.double() @ self.values).item() / max(self.items, 1)

    def update(self, losses: Tensor) -> bool | None:
        """Add losses ``[n]`` of ``n`` more items: True when shown below the margin, False when not, None if open."""
        losses = losses.double().flatten()
        if not bool((losses.abs() <= self.span * (1 + 1e-9)).all()):
            raise NumericsError(f"losses must lie within {self.span} of 0, found {losses.abs().max().item():.4g}")
        values, place = torch.cat([self.values, losses]).unique(return_inverse=True)
        new = torch.cat([self.counts, torch.ones(len(losses), dtype=torch.int64)])
        self.values, self.counts = values, torch.zeros(len(values), dtype=torch.int64).scatter_add_(0, place, new)
        if self.margin >= self.span:
            return True
        threshold = -math.log(self.level)
        if capital(self.values, self.counts, self.margin, self.span) >= threshold:
            return True
        return False if capital(-self.values, self.counts, -self.margin, self.span) >= threshold else None

    def interval(self) -> tuple[float, float]:
        """Lower and upper bound of the mean loss; each is wrong with a probability of at most ``level``."""
        low = -upper_bound(-self.values, self.counts, self.level, self.span)
        return low, upper_bound(self.values, self.counts, self.level, self.span)

    def needed(self) -> int | None:
        """How many items in all would show a drop below the margin, should further ones be like those seen."""
        return items_needed(self.values, self.counts, self.margin, self.level, self.span)


def _growth(values: Tensor, margin: float, span: float) -> Tensor:
    """``[values, stakes]``: logarithm of the factor by which one item multiplies the capital."""
    gain = (margin - values.double()) / (span - margin)
    return torch.log1p(gain.unsqueeze(1).clamp_min(-1) * STAKES)


def _mean(logs: Tensor) -> float:
    """Logarithm of the mean of exponentials."""
    return logs.logsumexp(0).item() - math.log(len(logs))
