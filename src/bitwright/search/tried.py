"""`Trials`: plans that were tried as wholes, in memory and, where a folder is given, each one in a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

from bitwright.errors import CheckpointError, SearchError
from bitwright.flow.digest import digest
from bitwright.plan.plan import Plan
from bitwright.search.budget import Allocation, Budget, keeps_to
from bitwright.search.curve import Curve
from bitwright.search.journal import Journal, slug
from bitwright.search.whole import Found


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the journal holds of a trial; ``plan`` is the digest of its file."""

    name: str
    plan: str
    drop: float
    error: float | None
    low: float | None
    high: float | None
    items: int | None


@dataclass(frozen=True, slots=True)
class Tried:
    """A plan that was calibrated: stored bytes, summed harm, and the drop of the whole.

    ``harm`` is that drop on the judging data, in harm or in score, infinite where it is no number; ``error`` its
    standard error over batches, ``low`` and ``high`` its bounds where ``items`` were scored. ``inside`` says whether
    the plan is within the limits on costs, ``holds`` whether its drop is; ``cost`` is what is to be least.
    """

    name: str
    plan: Plan
    bytes: int
    summed: float
    harm: float
    error: float | None
    inside: bool
    holds: bool
    cost: float
    low: float | None = None
    high: float | None = None
    items: int | None = None

    def __str__(self) -> str:
        if self.items is not None:
            drop = f"drop {self.harm:+.4f} [{self.low:+.4f}, {self.high:+.4f}] on {self.items:,} items"
        else:
            drop = f"harm {self.harm:.3g} +- {self.error:.1g}"
        return f"{self.name}: {self.bytes:,} bytes, {drop}"

    @property
    def fits(self) -> bool:
        """Whether the plan is within the whole budget."""
        return self.inside and self.holds

    @property
    def bound(self) -> float:
        """What a limit on the drop is compared with."""
        return self.harm if self.high is None else self.high

    @property
    def rank(self) -> tuple[float, ...]:
        """The best plan has the smallest."""
        return (self.cost, self.harm, self.summed, self.bytes)


@dataclass(frozen=True, slots=True)
class Mixed:
    """All plans that were tried, from the fewest bytes on, the best one within the budget, and its calibrated model.

    ``curve`` is the map from summed harm to the drop of the whole, ``unit`` that of the drop.
    """

    tried: tuple[Tried, ...]
    best: Tried
    model: nn.Module
    unit: str
    curve: Curve

    @property
    def front(self) -> tuple[Tried, ...]:
        """Plans that no other one beats: each has less measured harm than all that are as small or smaller."""
        found: list[Tried] = []
        for one in sorted(self.tried, key=lambda one: (one.bytes, one.harm)):
            if not found or one.harm < found[-1].harm:
                found.append(one)
        return tuple(found)

    def table(self) -> Table:
        """One row per plan: what the curve expects of its summed harm, and what was measured.

        "on the front" are those that no plan as small or smaller beats.
        """
        scored = self.best.items is not None
        table = Table(title="Bits by layer", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("plan")
        for name in ("bytes", "summed", "expected", "measured", "at most" if scored else "+-", "front"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in self.tried:
            over = "" if one.inside else " (over the budget)"
            name = one.name + (" (best)" if one is self.best else over if one.holds else " (drops too much)")
            on_front = "yes" if any(one is other for other in self.front) else "no"
            expected = self.curve.at(one.summed)
            drops = (
                (f"{expected:+.4f}", f"{one.harm:+.4f}", f"{one.high:+.4f}")
                if scored
                else (f"{expected:.2e}", f"{one.harm:.2e}", f"{one.error:.0e}")
            )
            table.add_row(name, f"{one.bytes:,}", f"{one.summed:.2e}", *drops, on_front)
        return table


class Trials:
    """Tries plans one after the other, each once, and knows the best one within the budget so far."""

    def __init__(
        self,
        folder: Path | None,
        identity: Mapping[str, Any],
        budget: Budget,
        minimize: str,
        measure: Callable[[Plan], tuple[nn.Module, Found]],
        say: Callable[[Tried], object],
    ) -> None:
        self.journal = Journal(folder, identity, Outcome)
        self.folder, self.budget, self.minimize, self.measure, self.say = folder, budget, minimize, measure, say
        self.all: list[Tried] = []
        self.best: Tried | None = None

    @property
    def curve(self) -> Curve:
        """What the trials so far say of summed harm."""
        return Curve.fit((one.summed, one.harm) for one in self.all)

    @property
    def bounds(self) -> Curve:
        """What they say of summed harm and that which a limit on the drop is compared with."""
        return Curve.fit((one.summed, one.bound) for one in self.all)

    def of(self, plan: Plan) -> Tried | None:
        """The trial of a plan with these specs."""
        return next((one for one in self.all if one.plan.sites == plan.sites), None)

    def add(self, name: str, plan: Plan, known: Allocation) -> Tried:
        """The trial of a plan: what is known of it, or what measuring it finds."""
        before = self.of(plan)
        if before is not None:
            return before
        row, model = self._outcome(name, plan)
        inside = keeps_to(known, replace(self.budget, drop=math.inf))
        holds = (row.drop if row.high is None else row.high) <= self.budget.drop
        cost = 0.0 if self.minimize == "harm" else float(getattr(known.cost, self.minimize))
        one = Tried(
            name, plan, int(known.cost.bytes), known.harm, row.drop, row.error, inside, holds, cost, row.low,
            row.high, row.items,
        )  # fmt: skip
        self.all.append(one)
        is_best = one.fits and (self.best is None or one.rank < self.best.rank)
        if is_best:
            self.best = one
        if model is not None:
            self.journal.add(row, model, is_best=is_best)
        self.say(one)
        return one

    def _outcome(self, name: str, plan: Plan) -> tuple[Outcome, nn.Module | None]:
        """What the journal knows, or what was measured now, with its model."""
        text, row = plan.to_toml(), self.journal.trials.get(name)
        path = None if self.folder is None else self.folder / f"{slug(name)}.toml"
        if path is not None and path.exists() and path.read_text(encoding="utf-8") != text:
            raise CheckpointError(
                f"{path} is not the plan that the search tries as {name!r}; delete it (to ship a plan of your own, "
                "calibrate that)"
            )
        if path is not None and not path.exists():
            plan.save(path)
        if row is None:
            model, found = self.measure(plan)
            return Outcome(name, digest(text), found.drop, found.error, found.low, found.high, found.items), model
        if row.plan != digest(text):
            raise CheckpointError(f"the trial {name!r} in {self.folder} is of another plan; delete the folder")
        return row, None

    def answer(self, float_model: nn.Module, unit: str) -> Mixed:
        """All trials and the best one; raises `SearchError` where none is within the budget or has a finite drop."""
        least = min(self.all, key=lambda one: (one.harm, one.bytes))
        if math.isinf(least.harm) or (self.best is not None and math.isinf(self.best.harm)):
            raise SearchError("the harm of no plan is finite on every batch; look at the loss and at the data")
        if self.best is None:
            raise SearchError(self._nothing(unit))
        tried = tuple(sorted(self.all, key=lambda one: one.bytes))
        return Mixed(tried, self.best, self.journal.model(float_model), unit, self.curve)

    def _nothing(self, unit: str) -> str:
        costs = replace(self.budget, drop=math.inf)
        within = [one for one in self.all if one.inside]
        least = min(within, key=lambda one: one.bound)
        others = ", ".join(f"{name} {limit:g}" for name, limit in costs.limits().items())
        return (
            f"no plan that was tried{' within ' + others if others else ''} keeps to a drop of {self.budget.drop:g} "
            f"({unit}); the smallest is {least.bound:.4g}: {least}"
        )
