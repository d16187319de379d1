"""`mixed`: plans of one budget, tried for real, the one that was planned among them; the least harmful is taken.

An allocation is the best one for *summed* harm, each measured alone. The whole is more or less than that sum: errors of
several layers can cancel or reinforce each other. So a few plans are calibrated and the harm of the whole is measured,
on data that calibrated nothing:

- the plan as it is, where it is within the budget: the answer does no more harm than that one on this data;
- the allocation of least summed harm, right where errors of layers are independent (squares of errors add up);
- the allocation of the least sum of roots, right where they all point the same way (errors add up);
- points of the convex front of cost and summed harm, from end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

from bitwright.algorithms.pipeline import calibrate
from bitwright.errors import SearchError
from bitwright.flow.prepare import prepare
from bitwright.graph.dataflow import call
from bitwright.plan.plan import Plan
from bitwright.search.budget import Allocation, Budget, keeps_to
from bitwright.search.mixed import Mixture, with_allocation
from bitwright.search.sensitivity import Loss, harm_of_whole

PLANNED, ALLOCATED, ROOTS = "as planned", "least summed harm", "least sum of roots"


@dataclass(frozen=True, slots=True)
class Tried:
    """A plan that was calibrated: stored bytes, summed harm, harm of the whole.

    ``harm`` is the mean over batches of the judging data, infinite where one of them gives no number, and ``error`` its
    standard error; ``fits`` says whether the plan is within the budget.
    """

    name: str
    plan: Plan
    bytes: int
    summed: float
    harm: float
    error: float
    fits: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.bytes:,} bytes, harm {self.harm:.3g} +- {self.error:.1g}"


@dataclass(frozen=True, slots=True)
class Mixed:
    """All plans that were tried, from the fewest bytes on, the best one within the budget, and its calibrated model."""

    tried: tuple[Tried, ...]
    best: Tried
    model: nn.Module
    unit: str

    @property
    def front(self) -> tuple[Tried, ...]:
        """Plans that no other one beats: each has less measured harm than all that are as small or smaller."""
        found: list[Tried] = []
        for one in sorted(self.tried, key=lambda one: (one.bytes, one.harm)):
            if not found or one.harm < found[-1].harm:
                found.append(one)
        return tuple(found)

    def table(self) -> Table:
        """One row per plan; "on the front" are those that no plan as small or smaller beats."""
        table = Table(title="Bits by layer", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("plan")
        for name in ("bytes", "summed", "measured", "+-", "front"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in self.tried:
            name = one.name + (" (best)" if one is self.best else "" if one.fits else " (over the budget)")
            on_front = "yes" if any(one is other for other in self.front) else "no"
            table.add_row(name, f"{one.bytes:,}", f"{one.summed:.2e}", f"{one.harm:.2e}", f"{one.error:.0e}", on_front)
        return table


def mixed(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    choices: Mixture,
    budget: Budget,
    *,
    judge: Sequence[Any],
    method: str = "kl",
    loss: Loss | None = None,
    forward: Callable[[nn.Module, Any], Any] = call,
    points: int = 3,
    say: Callable[[Tried], object] = lambda tried: None,
) -> Mixed:
    """The plan within ``budget`` that does the least harm as a whole on ``judge``, of a few that are tried.

    Never worse there than ``plan`` itself, if that is within the budget. ``batches`` calibrate; ``judge`` holds batches
    of other data (for both see ``forward``). ``choices`` is the `Mixture` of ``plan``; ``method`` and ``loss`` are
    those of `sensitivity`, without ``fisher``. ``points`` of the front are tried too, over the budget as well, so that
    the table shows what more bytes would buy. Raises `SearchError` for a budget that nothing meets, for specs of
    ``plan`` that are not among the choices, for fewer than 2 batches to judge by, and where no harm is finite.
    """
    harm, unit = harm_of_whole(model, judge, method, loss, forward)
    trials: list[Tried] = []
    best: tuple[Tried, nn.Module] | None = None
    for name, candidate, known in _candidates(plan, choices, budget, points):
        prepared = prepare(model, candidate)
        calibrate(prepared, batches, forward=forward)
        values = harm(prepared)
        found = values.mean().item(), values.std().item() / math.sqrt(len(values))
        found = found if math.isfinite(found[0]) else (math.inf, math.inf)
        one = Tried(name, candidate, int(known.cost.bytes), known.harm, *found, keeps_to(known, budget))
        say(one)
        trials.append(one)
        if one.fits and (best is None or one.harm < best[0].harm):
            best = one, prepared
    assert best is not None
    if math.isinf(best[0].harm):
        raise SearchError("the harm of no plan is finite on every batch; look at the loss and at the data")
    return Mixed(tuple(sorted(trials, key=lambda one: one.bytes)), *best, unit)


def _candidates(plan: Plan, choices: Mixture, budget: Budget, points: int) -> list[tuple[str, Plan, Allocation]]:
    """Names, plans and their allocations, each plan once."""
    chosen = choices.allocate(budget)
    found = [(PLANNED, plan), (ALLOCATED, with_allocation(plan, chosen))]
    if math.isinf(budget.drop):  # a limit on harm says nothing of its roots
        found.append((ROOTS, with_allocation(plan, _with_roots(choices).allocate(budget))))
    front = choices.front()
    for at in dict.fromkeys(round(i * (len(front) - 1) / max(points - 1, 1)) for i in range(points)):
        found.append((f"front, {at + 1} of {len(front)}", with_allocation(plan, front[at])))
    sites = [candidate.sites for _, candidate in found]
    return [(*one, choices.of(one[1])) for at, one in enumerate(found) if sites[at] not in sites[:at]]


def _with_roots(choices: Mixture) -> Mixture:
    layers = [replace(at, choices=tuple(replace(c, harm=c.harm**0.5) for c in at.choices)) for at in choices.layers]
    return replace(choices, layers=tuple(layers))
