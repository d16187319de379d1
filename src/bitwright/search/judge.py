"""How a candidate is judged: by one number for each model, or item by item against the float model.

Only the second can say how sure it is. It scores batch after batch and stops when the answer is clear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitwright.errors import NumericsError
from bitwright.flow.digest import digest
from bitwright.graph.dataflow import evaluating
from bitwright.search.sequential import PairedTest, items_needed

CONFIDENCE = 0.95
"""Of the whole climb: the 5 % are shared out evenly among all candidates that it could ever try."""

FEWEST = 8
"""Batches that are scored before a candidate is accepted early."""

Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the drop holds, and what was seen: the mean score and drop, with its interval where items were scored."""

    holds: bool
    score: float
    drop: float
    low: float | None = None
    high: float | None = None
    items: int | None = None
    note: str = ""


class Judge(Protocol):
    """Says whether the score of a candidate drops by at most ``max_drop`` (always, where that is None)."""

    max_drop: float | None
    paired: bool

    def identity(self) -> dict[str, Any]:
        """What tells this judge from others, as plain values."""
        ...

    def __call__(self, candidate: nn.Module, tick: Tick) -> Verdict:
        """Judge a model; ``tick`` is called between batches and may raise."""
        ...


class PointJudge:
    """``score(model) -> float``: two numbers are compared as they are; nobody knows how sure the answer is."""

    paired = False

    def __init__(self, model: nn.Module, score: Callable[[nn.Module], Any], max_drop: float | None) -> None:
        self.score, self.max_drop = score, max_drop
        self.float_score = self._number(model)

    def identity(self) -> dict[str, Any]:
        """The score of the float model."""
        return {"score of the float model": self.float_score}

    def __call__(self, candidate: nn.Module, tick: Tick) -> Verdict:
        """Score a candidate once."""
        tick()
        score = self._number(candidate)
        drop = self.float_score - score
        return Verdict(self.max_drop is None or drop <= self.max_drop, score, drop)

    def _number(self, model: nn.Module) -> float:
        found = self.score(model)
        if isinstance(found, Tensor) and found.numel() != 1:
            raise NumericsError(
                f"score(model) returned a tensor of shape {list(found.shape)}; it must return one number, or pass "
                "evaluation=batches and score(model, batch) for scores of items"
            )
        if math.isnan(float(found)):
            raise NumericsError("score(model) returned NaN; it must return a number, larger is better")
        return float(found)


class PairedJudge:
    """``score(model, batch) -> [items]``: each item's loss of score against the float model, tested sequentially.

    Batches are visited in one random order, the float model scores each of them once. ``candidates`` is the number of
    models that this judge may be asked about: each answer is wrong with a probability of at most 5 % of its reciprocal.
    That holds for independent items. Data sorted by class are not that batch by batch, only as a whole: a candidate is
    accepted early only after `FEWEST` batches, and while they differ no more than chance makes them.
    Raises `NumericsError` for a score that is not repeatable or out of ``score_range``, and for too few items.
    """

    paired = True

    def __init__(
        self,
        model: nn.Module,
        score: Callable[[nn.Module, Any], Any],
        evaluation: Sequence[Any],
        max_drop: float | None,
        score_range: tuple[float, float],
        candidates: int,
    ) -> None:
        self.model, self.score, self.batches, self.max_drop = model, score, evaluation, max_drop
        self.low, self.high = score_range
        self.level = (1 - CONFIDENCE) / candidates
        self.known: dict[int, Tensor] = {}
        if not self.low < self.high:
            raise NumericsError(f"score_range is (lowest, highest) score of an item, got {score_range}")
        if not len(evaluation):
            raise NumericsError("evaluation got no batches; a score of nothing does not exist")
        self._check_repeatable()
        self._check_enough()
        generator = torch.Generator().manual_seed(0)
        self.order = torch.randperm(len(evaluation), generator=generator).tolist()

    @property
    def span(self) -> float:
        """Width of the range of scores."""
        return self.high - self.low

    def identity(self) -> dict[str, Any]:
        """Number of batches, the content of the first one, and what the float model scores on it."""
        return {
            "evaluation data": f"{len(self.batches)} batches, the first {digest(self.batches[0])}",
            "scores of the float model on the first batch": digest(self.known[0]),
            "score_range": [self.low, self.high],
        }

    def __call__(self, candidate: nn.Module, tick: Tick) -> Verdict:
        """Score batches until the drop is shown to hold or not to hold, or until they end."""
        test = PairedTest(0.0 if self.max_drop is None else self.max_drop, self.level, self.span)
        total, answer, seen = 0.0, None, []
        for index in self.order:
            tick()
            before, after = self.before(index), self._items(candidate, index)
            if len(before) != len(after):
                found = f"{len(after)} scores for batch {index}, and {len(before)} for the float model"
                raise NumericsError(f"score(model, batch) returned {found}; it must return one per item")
            total += after.sum().item()
            answer = test.update(before - after)
            seen.append((before, before - after))
            if self.max_drop is not None and (answer is False or (answer and self._may_accept(seen))):
                break
        low, high = test.interval()
        holds = self.max_drop is None or answer is True
        note = self._undecided(test) if answer is None and self.max_drop is not None else ""
        return Verdict(holds, total / test.items, test.drop, low, high, test.items, note)

    def _may_accept(self, seen: list[tuple[Tensor, Tensor]]) -> bool:
        return len(seen) >= FEWEST and all(alike(batches) for batches in zip(*seen, strict=True))

    def _undecided(self, test: PairedTest) -> str:
        needed = test.needed()
        hope = "no number of such items would show it" if needed is None else f"about {needed:,} such items would"
        return f"not decided by all {test.items:,} items; {hope}"

    def before(self, index: int) -> Tensor:
        """Scores of the float model on a batch, asked for once."""
        if index not in self.known:
            self.known[index] = self._items(self.model, index)
        return self.known[index]

    def _items(self, model: nn.Module, index: int) -> Tensor:
        with torch.no_grad(), evaluating(model):
            found = self.score(model, self.batches[index])
        if not isinstance(found, Tensor) or found.dim() != 1 or not len(found):
            shape = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
            raise NumericsError(f"score(model, batch) must return a tensor with one score per item, got {shape}")
        found = found.double().cpu()
        if bool(found.isnan().any()):
            raise NumericsError(f"score(model, batch) returned NaN on batch {index}; larger is better, never NaN")
        if bool(((found < self.low) | (found > self.high)).any()):
            seen = f"{found.min().item():.4g} to {found.max().item():.4g}"
            raise NumericsError(
                f"score(model, batch) returned {seen} on batch {index}, out of score_range=({self.low:g}, "
                f"{self.high:g}); pass the lowest and highest score that an item can have, and clamp to them"
            )
        return found

    def _check_repeatable(self) -> None:
        again, first = self._items(self.model, 0), self.before(0)
        if not torch.equal(again, first):
            raise NumericsError(
                "score(model, batch) gave two answers for one model and one batch; remove what is random in it "
                "(sampling, augmentation, dropout) or seed it inside the function"
            )

    def _check_enough(self) -> None:
        """Refuse a goal that these items could not show even if both models agreed on each of them."""
        if self.max_drop is None:
            return
        if self.max_drop <= 0:
            raise NumericsError(
                f"max_drop={self.max_drop:g} cannot be shown by sampling items: even two equal models do not show it; "
                "pass a drop above 0"
            )
        needed = items_needed(torch.zeros(1), torch.ones(1), self.max_drop, self.level, self.span)
        assert needed is not None
        if len(self.known[0]) * len(self.batches) >= needed:
            return
        found = sum(len(self.before(index)) for index in range(len(self.batches)))
        if found < needed:
            raise NumericsError(
                f"max_drop={self.max_drop:g} needs at least {needed:,} items to be shown with {CONFIDENCE:.0%} "
                f"confidence, even if no score changes; evaluation has {found:,}. Pass more, allow a larger drop, or "
                "pass score(model) -> float to compare without confidence"
            )


def alike(batches: Sequence[Tensor]) -> bool:
    """Whether the means of batches differ no more than those of random draws: chi-square test, 1 %, equal variances.

    >>> alike([torch.zeros(50), torch.ones(50)]), alike([torch.arange(50.0), torch.arange(50.0)])
    (False, True)
    """
    items, sizes = torch.cat(list(batches)), torch.tensor([len(batch) for batch in batches])
    means = torch.stack([batch.mean() for batch in batches])
    between = (sizes * (means - items.mean()).square()).sum().item()
    spread = items.var(correction=0).item()
    freedom = max(len(batches) - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 2.326 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty 1931
    return between <= limit * spread
