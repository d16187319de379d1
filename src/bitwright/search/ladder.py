"""`climb`: from the cheapest recipe to the most expensive one, until the goal holds.

The rungs are recipes of post-training quantization, each of which runs inside `calibrate`; after the last one, layers
are moved to 8 bits at the recipe whose outputs came nearest to the float model's on the calibration data. Candidates
are thus fixed by model, plan and calibration data; which of them is tried next depends on the scores, and that is why
the permitted error is shared out among all of them (see `judge`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.algorithms.pipeline import calibrate
from bitwright.bench.measure import model_bytes
from bitwright.errors import BitwrightError, PlanError
from bitwright.flow.convert import convert
from bitwright.flow.digest import digest
from bitwright.flow.prepare import prepare
from bitwright.plan.plan import Plan
from bitwright.plan.step import Step
from bitwright.search.bits import (
    Layers,
    first_that_holds,
    last_that_holds,
    levels,
    most_sensitive_first,
    narrow_layers,
    output_error,
    with_eight_bits,
)
from bitwright.search.journal import Journal, Trial
from bitwright.search.judge import Judge

INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Rung:
    """A recipe: the steps that `calibrate` takes beside choosing ranges."""

    name: str
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        options = (" ".join(f"{key}={value}" for key, value in step.options.items()) for step in self.steps)
        return f"{self.name}: {', '.join(f'{s.name} {o}'.strip() for s, o in zip(self.steps, options, strict=True))}"


RUNGS = (
    Rung("nearest"),
    Rung("bias correction", (Step("bias_correction"),)),
    Rung("gptq", (Step("gptq"), Step("ranges", {"by_output": True}), Step("affine_repair"), Step("bias_correction"))),
    Rung("block reconstruction", (Step("brecq"),)),
)
"""Recipes from the cheapest to the most expensive."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a candidate must keep to; with neither limit, the first rung is the answer."""

    max_drop: float | None = None
    max_bytes: int | None = None

    def met(self, trial: Trial) -> bool:
        """Whether a trial keeps to both limits."""
        fits = self.max_bytes is None or (trial.bytes is not None and trial.bytes <= self.max_bytes)
        return trial.holds and not trial.failed and fits

    def rank(self, trial: Trial) -> tuple[Any, ...]:
        """The best trial is the one of the largest rank.

        First those that meet the goal. Where a limit on the drop is met, the smallest of them; else the one that loses
        least.
        """
        if trial.drop is None or trial.bytes is None:
            return (-1,)
        met = self.met(trial)
        if met and self.max_drop is not None:
            return (1, -trial.bytes, -trial.drop)
        return (int(met), -trial.drop, -trial.bytes)


@dataclass(frozen=True, slots=True)
class Task:
    """What is searched: a float model and its starting plan, with calibration data and one batch to look at."""

    model: nn.Module
    plan: Plan
    batches: Sequence[Any]
    example: Any
    goal: Goal


@dataclass(frozen=True, slots=True)
class Climb:
    """The best model, its trial, all trials in order, where the model was saved, and why the climb ended early."""

    model: nn.Module
    best: Trial
    trials: tuple[Trial, ...]
    folder: Path | None
    stopped: str


class _StopError(Exception):
    """The climb ends here; the text says why."""


def known_rungs(names: Sequence[str] | None = None, *, data: bool = True) -> tuple[Rung, ...]:
    """The recipes of these names in the order of the ladder; without calibration data, only those without steps.

    Raises `PlanError` for an unknown name.

    >>> [rung.name for rung in known_rungs(data=False)]
    ['nearest']
    """
    known = [rung.name for rung in RUNGS]
    names = known if names is None else names
    for name in names or ("",):
        if name not in known:
            raise PlanError(f"unknown recipe {name!r}; the ladder has {', '.join(known)}")
    chosen = tuple(rung for rung in RUNGS if rung.name in names and (data or not rung.steps))
    if not chosen:
        raise PlanError(f"{', '.join(names)} need calibration data; pass batches")
    return chosen


def candidates(plan: Plan, rungs: Sequence[Rung]) -> int:
    """How many models a paired judge may be asked about."""
    return len(rungs) + len(levels(len(narrow_layers(plan)), paired=True))


def climb(
    task: Task,
    judge: Judge,
    rungs: Sequence[Rung],
    *,
    work: Path | None = None,
    time_budget: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Climb:
    """Try the rungs in order until one meets the goal, then layers at 8 bits; the best model found, in any case.

    With ``work`` every finished trial is stored there, and the same call goes on after the last one. A trial that
    would take the climb over ``time_budget`` seconds, were it as long as the longest so far, is not begun, and one that
    does is given up; only the first always runs. Ctrl-C ends the climb likewise once there is a trial to return.
    """
    identity = _identity(task, rungs) | judge.identity()
    ladder = _Ladder(task, judge, rungs, Journal(work, identity, Trial), time_budget, say)
    try:
        ladder.run()
        stopped = ""
    except _StopError as reason:
        stopped = str(reason)
    except KeyboardInterrupt:
        if ladder.journal.best is None:
            raise
        stopped = INTERRUPTED
    if stopped:
        say(f"stopped: {stopped}")
    journal = ladder.journal
    assert journal.best is not None
    return Climb(journal.model(task.model), journal.best, tuple(journal.trials.values()), journal.place, stopped)


def _identity(task: Task, rungs: Sequence[Rung]) -> dict[str, Any]:
    """What a stored search must have in common with this one."""
    return {
        "model": f"{type(task.model).__name__} {digest(task.model.state_dict())}",
        "plan": task.plan.to_toml().splitlines(),
        "calibration data": f"{len(task.batches)} batches {digest(task.batches)}",
        "max_drop": task.goal.max_drop,
        "max_bytes": task.goal.max_bytes,
        "recipes": [str(rung) for rung in rungs],
    }


class _Ladder:
    """One climb: what it is about, what was found, and the clock."""

    def __init__(
        self,
        task: Task,
        judge: Judge,
        rungs: Sequence[Rung],
        journal: Journal[Trial],
        budget: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.task, self.judge, self.rungs, self.journal, self.say = task, judge, rungs, journal, say
        self.budget, self.start = budget, time.monotonic()
        self.layers = len(narrow_layers(task.plan))
        self.order: list[Layers] | None = None
        for trial in journal.trials.values():
            say(f"{self.told(trial)} (done before)")

    def run(self) -> None:
        """Climb until the goal is met or nothing is left to try."""
        goal = self.task.goal
        if goal == Goal():
            self.attempt(self.rungs[0], 0)
        elif goal.max_drop is None:
            self.fill(goal.max_bytes or 0)
        elif not any(self.attempt(rung, 0).holds for rung in self.rungs):
            steps = [0, *levels(self.layers, paired=self.judge.paired)]
            first_that_holds(len(steps) - 1, lambda step: self.attempt(self.nearest_rung(), steps[step]).holds)

    def fill(self, limit: int) -> None:
        """As many layers at 8 bits as fit, and the recipe that then scores best."""
        first = self.rungs[0]
        count = last_that_holds(self.layers, lambda raised: (self.attempt(first, raised).bytes or 0) <= limit)
        if (self.attempt(first, count).bytes or 0) <= limit:
            for rung in self.rungs[1:]:
                self.attempt(rung, count)

    def nearest_rung(self) -> Rung:
        """The recipe whose outputs on the calibration data were the nearest to the float model's."""
        errors = {rung.name: self.journal.trials[rung.name].error for rung in self.rungs}
        return min(self.rungs, key=lambda rung: float("inf") if (e := errors[rung.name]) is None else e)

    def attempt(self, rung: Rung, raised: int) -> Trial:
        """The trial of a recipe with some layers at 8 bits: remembered, or carried out now."""
        name = rung.name + (f", {raised} of {self.layers} layers at 8 bits" if raised else "")
        if name in self.journal.trials:
            return self.journal.trials[name]
        self.check_estimate(name)
        start = time.monotonic()
        try:
            shipped, error = self.build(rung, raised)
        except BitwrightError as cause:
            if not self.journal.trials:
                raise
            trial = Trial(name, raised, False, seconds=time.monotonic() - start, failed=str(cause))
            self.journal.add(trial, None, is_best=False)
        else:
            found = self.judge(shipped, self.tick)
            seen = found.score, found.drop, found.low, found.high, found.items, model_bytes(shipped)
            trial = Trial(name, raised, found.holds, *seen, error, time.monotonic() - start, found.note)
            best, rank = self.journal.best, self.task.goal.rank
            self.journal.add(trial, shipped, is_best=best is None or rank(trial) > rank(best))
        self.say(self.told(trial))
        return trial

    def told(self, trial: Trial) -> str:
        """A line about a trial."""
        if self.task.goal.max_drop is None or trial.failed:
            return str(trial)
        return f"{trial} -> {'holds' if trial.holds else 'does not hold'}"

    def build(self, rung: Rung, raised: int) -> tuple[nn.Module, float]:
        """The shipped model of a candidate, and its error on the calibration data; no other trial changes its bits."""
        task = self.task
        batches = task.batches or [task.example]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if raised and self.order is None:
                self.order = most_sensitive_first(task.model, task.plan, task.batches, task.example)
            plan = replace(task.plan, steps=rung.steps)
            prepared = prepare(task.model, with_eight_bits(plan, (self.order or [])[:raised]))
            calibrate(prepared, task.batches, on_layer=lambda *_: self.tick())
            shipped = convert(prepared, inplace=True)
            return shipped, output_error(task.model, shipped, batches)

    def check_estimate(self, name: str) -> None:
        """Stop before a trial that is likely to take longer than there is time."""
        if self.budget is None or not self.journal.trials:
            return
        used, longest = time.monotonic() - self.start, max(trial.seconds for trial in self.journal.trials.values())
        if used + longest > self.budget:
            raise _StopError(
                f"{name} was not begun: the longest trial took {longest:.1f} s, and {max(self.budget - used, 0):.1f} s "
                f"of the time budget of {self.budget:g} s are left"
            )

    def tick(self) -> None:
        """Stop in the middle of a trial when time is over and there is something to return."""
        if self.budget is not None and self.journal.best and time.monotonic() - self.start > self.budget:
            raise _StopError(f"the time budget of {self.budget:g} s ended in the middle of a trial, which was given up")
