"""`mixed`: plans tried as wholes, the one that was planned among them; the best one within the budget is taken.

An allocation is the best one for *summed* harm, each measured alone. The whole is more or less than that sum: errors of
several layers can cancel or reinforce each other. So a few plans are calibrated and the drop of the whole is measured,
on data that calibrated nothing:

- the plan as it is, where it is within the budget: the answer drops no more than that one on this data;
- the allocation of least summed harm, right where errors of layers are independent (squares of errors add up);
- the allocation of the least sum of roots, right where they all point the same way (errors add up);
- points of the convex front of cost and summed harm, from end to end;
- under a limit on the drop: cheapest allocations within the sum of harm that `Curve`, from all plans so far, allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitwright.algorithms.pipeline import calibrate
from bitwright.errors import SearchError
from bitwright.flow.digest import digest
from bitwright.flow.prepare import prepare
from bitwright.graph.dataflow import call
from bitwright.harm.sensitivity import Loss
from bitwright.plan.plan import Plan
from bitwright.search.budget import Allocation, Budget
from bitwright.search.mixed import Mixture, with_allocation
from bitwright.search.tried import Mixed, Trials, Tried
from bitwright.search.whole import Found, HarmJudge, Score, ScoreJudge, WholeJudge

PLANNED, ALLOCATED, ROOTS = "as planned", "least summed harm", "least sum of roots"
STEPS = 32  # limits on summed harm that may be tried under a limit on the drop


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
    score: Score | None = None,
    score_range: tuple[float, float] = (0.0, 1.0),
    minimize: str | None = None,
    forward: Callable[[nn.Module, Any], Any] = call,
    points: int = 3,
    rounds: int = 4,
    work: str | Path | None = None,
    say: Callable[[Tried], object] = lambda tried: None,
) -> Mixed:
    """The best plan within ``budget``, as a whole on ``judge``, of a few that are tried.

    The drop of a whole is its harm (``method`` and ``loss`` are those of `sensitivity`, without ``fisher``), or, with
    ``score(model, batch) -> [items]`` within ``score_range``, the mean loss of score, paired with the float model.
    ``Budget(drop=...)`` limits that drop: of harm the mean, of scores the upper bound (see `whole`). Then the plan of
    the least ``minimize`` (by default bytes) that keeps to it is the answer, and up to ``rounds`` more plans are tried
    to come near the limit. Without a limit the least drop is, never worse than ``plan`` if that is within the budget.

    ``batches`` calibrate; ``judge`` holds batches of other data (for both see ``forward``). ``choices`` is the
    `Mixture` of ``plan``. ``points`` of the front are tried too, over the budget as well, so that the table shows what
    more bytes would buy. ``work`` is a folder that holds every tried plan, what was measured, and the best model; the
    same call goes on there after the last trial. Each trial starts from the same random state of torch.

    Raises `SearchError` for a budget that nothing meets, with the smallest drop that was measured, for specs of
    ``plan`` that are not among the choices, for fewer than 2 batches to judge by (of scores, too few items), and where
    no harm is finite; `NumericsError` for bad scores, `CheckpointError` for a folder of another search.
    """
    minimize, held = _goal(minimize, budget), list(judge)
    judges: WholeJudge = (
        HarmJudge(model, held, method, loss, forward)
        if score is None
        else ScoreJudge(model, held, score, score_range, budget.drop, plans=3 + points + STEPS)
    )

    def measured(candidate: Plan) -> tuple[nn.Module, Found]:
        prepared = calibrated(model, candidate, batches, forward)
        return prepared, judges(prepared)

    identity = _identity(model, plan, batches, choices, budget) | {
        "goal": f"least {minimize}, {points} points, {rounds} rounds",
        **judges.identity(),
    }
    trials = Trials(None if work is None else Path(work), identity, budget, minimize, measured, say)
    candidates = _candidates(plan, choices, budget, points, minimize)
    found = {name: trials.add(name, candidate, known) for name, candidate, known in candidates}
    if minimize != "harm" and found[ALLOCATED].holds:  # else no other one within the costs will
        _approach(trials, plan, choices, rounds)
    return trials.answer(model, judges.unit)


def _goal(minimize: str | None, budget: Budget) -> str:
    if minimize is None:
        return "harm" if math.isinf(budget.drop) else "bytes"
    if minimize != "harm" and math.isinf(budget.drop):
        raise SearchError(f"the least {minimize} without a limit on the drop is the worst plan; give Budget(drop=...)")
    return minimize


def calibrated(
    model: nn.Module, plan: Plan, batches: Sequence[Any], forward: Callable[[nn.Module, Any], Any] = call
) -> nn.Module:
    """A prepared and calibrated model; torch's random numbers start anew, so that it is the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prepared = prepare(model, plan)
        calibrate(prepared, batches, forward=forward)
    return prepared


def _identity(model: nn.Module, plan: Plan, batches: Sequence[Any], choices: Mixture, budget: Budget) -> dict[str, Any]:
    """What a stored search must have in common with this one, beside its judge and goal."""
    return {
        "model": f"{type(model).__name__} {digest(model.state_dict())}",
        "plan": plan.to_toml().splitlines(),
        "calibration data": f"{len(batches)} batches {digest(list(batches))}",
        "choices": [f"{', '.join(at.sites)}: {choice}" for at in choices.layers for choice in at.choices],
        "budget": [f"{name} {limit:g}" for name, limit in budget.limits().items()],
    }


def split(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Batches that calibrate and measure harm, and the last third (2 at least), which judges wholes.

    Raises `SearchError` for fewer than 4, as both need 2 for their standard errors.

    >>> split(range(7))
    ([0, 1, 2, 3, 4], [5, 6])
    """
    batches = list(batches)
    count = max(2, len(batches) // 3)
    if len(batches) - count < 2:
        raise SearchError(
            f"mixed precision needs at least 4 calibration batches, got {len(batches)}: 2 measure harm and calibrate, "
            "2 others judge what comes of it; split them"
        )
    return batches[:-count], batches[-count:]


def _candidates(
    plan: Plan, choices: Mixture, budget: Budget, points: int, minimize: str
) -> list[tuple[str, Plan, Allocation]]:
    """Names, plans and their allocations; a limit on the drop is left to measurement."""
    costs = replace(budget, drop=math.inf)
    found = [(ALLOCATED, choices.allocate(costs))]
    if minimize == "harm":
        found.append((ROOTS, _with_roots(choices).allocate(costs)))
    front = choices.front("bytes" if minimize in ("harm", "peak_memory") else minimize)
    for at in dict.fromkeys(round(i * (len(front) - 1) / max(points - 1, 1)) for i in range(points)):
        found.append((f"front, {at + 1} of {len(front)}", front[at]))
    plans = [(PLANNED, plan), *((name, with_allocation(plan, known)) for name, known in found)]
    return [(name, candidate, choices.of(candidate)) for name, candidate in plans]


def _with_roots(choices: Mixture) -> Mixture:
    layers = [replace(at, choices=tuple(replace(c, harm=c.harm**0.5) for c in at.choices)) for at in choices.layers]
    return replace(choices, layers=tuple(layers))


def _approach(trials: Trials, plan: Plan, choices: Mixture, rounds: int) -> None:
    """Try the cheapest allocations within limits on summed harm that close in on the limit of the drop.

    The limits are `STEPS` fixed ones, evenly on a logarithmic scale between the sums of the least harmful and of the
    cheapest allocation within the costs: fixed before anything is judged, so that all plans that could be tried are
    known in number. Those up to ``low`` are taken to hold, those from ``high`` on not to.
    """
    budget, costs = trials.budget, replace(trials.budget, drop=math.inf)
    most = choices.allocate(costs, minimize=trials.minimize).harm
    least = max(choices.allocate(costs).harm, most * 1e-12)
    if not 0 < least < most:
        return
    limits = [*np.geomspace(least, most, STEPS)[:-1].tolist(), math.inf]
    held = max((one.summed for one in trials.all if one.holds and one.name != PLANNED), default=0.0)
    over = min((one.summed for one in trials.all if not one.holds and one.summed > held), default=math.inf)
    low = max(sum(limit <= held for limit in limits) - 1, 0)
    high = STEPS if math.isinf(over) else sum(limit < over for limit in limits)
    while high - low > 1 and rounds:
        wanted = sum(limit <= trials.bounds.limit(budget.drop) for limit in limits) - 1
        margin = max((high - low) // 8, 1)
        at = min(max(wanted, low + margin), high - margin)
        known = choices.allocate(replace(budget, drop=limits[at]), minimize=trials.minimize)
        candidate = with_allocation(plan, known)
        one = trials.of(candidate)
        if one is None:
            one = trials.add(f"limit {at + 1} of {STEPS} on the sum", candidate, known)
            rounds -= 1
        low, high = (at, high) if one.holds else (low, at)
