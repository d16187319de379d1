"""What a plan does as a whole: its harm on data that calibrated nothing, or what it loses of the user's score.

===================== ============================================ ============================================
judge                 drop                                         a limit is kept where
===================== ============================================ ============================================
`HarmJudge`           harm of the whole, in the unit of its method the mean over batches is at most the limit
`ScoreJudge`          mean loss of score of items, paired with     its upper bound is, with 95 % confidence over
                      the float model                              all plans that the search could ever try
===================== ============================================ ============================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from bitwright.errors import SearchError
from bitwright.flow.digest import digest
from bitwright.harm.alone import Forward
from bitwright.harm.sensitivity import Loss, harm_of_whole
from bitwright.search.judge import CONFIDENCE, PairedJudge
from bitwright.search.sequential import items_needed

Score = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, slots=True)
class Found:
    """The drop of a whole, infinite where it is no number, with its standard error or, of items, its bounds."""

    drop: float
    error: float | None = None
    low: float | None = None
    high: float | None = None
    items: int | None = None


class WholeJudge(Protocol):
    """Measures the drop of a prepared and calibrated model."""

    unit: str

    def identity(self) -> dict[str, Any]:
        """What tells this judge from others, as plain values."""
        ...

    def __call__(self, candidate: nn.Module) -> Found:
        """Measure one model."""
        ...


class HarmJudge:
    """Harm of the whole on batches, see `harm_of_whole`."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], method: str, loss: Loss | None, forward: Forward):
        self.harm, self.unit = harm_of_whole(model, batches, method, loss, forward)
        self._identity = {"judging data": f"{len(batches)} batches {digest(batches)}", "judged by": method}

    def identity(self) -> dict[str, Any]:
        """The data and the method."""
        return self._identity

    def __call__(self, candidate: nn.Module) -> Found:
        """The mean over batches and its standard error."""
        values = self.harm(candidate)
        if not bool(values.isfinite().all()):
            return Found(math.inf, math.inf)
        return Found(values.mean().item(), values.std().item() / math.sqrt(len(values)))


class ScoreJudge:
    """``score(model, batch) -> [items]``, larger is better, on every item, paired with the float model.

    Raises `NumericsError` for scores that are NaN, not repeatable or out of ``score_range``, and `SearchError` for a
    ``limit`` that so few items could not show of any of ``plans`` plans, whatever they score.
    """

    unit = "of the score"

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        score: Score,
        score_range: tuple[float, float],
        limit: float,
        plans: int,
    ):
        self.paired = PairedJudge(model, score, batches, None, score_range, plans)
        if math.isfinite(limit):
            self._check_enough(limit)

    def identity(self) -> dict[str, Any]:
        """The data, and what the float model scores."""
        return self.paired.identity() | {"judged by": "score"}

    def __call__(self, candidate: nn.Module) -> Found:
        """The mean loss of all items, and its bounds."""
        found = self.paired(candidate, lambda: None)
        return Found(found.drop, None, found.low, found.high, found.items)

    def _check_enough(self, limit: float) -> None:
        if limit <= 0:
            raise SearchError(f"a drop of {limit:g} cannot be shown by items: even two equal models do not show it")
        same = torch.zeros(1), torch.ones(1)
        needed = items_needed(*same, limit, self.paired.level, self.paired.span)
        assert needed is not None
        found = sum(len(self.paired.before(at)) for at in range(len(self.paired.batches)))
        if found < needed:
            raise SearchError(
                f"a drop of at most {limit:g} needs at least {needed:,} items to be shown with {CONFIDENCE:.0%} "
                f"confidence, even if no score changes; judge has {found:,}. Pass more, allow a larger drop, or leave "
                "the score out and limit the harm"
            )
