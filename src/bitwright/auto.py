"""`quantize_model`: the one-liner. It says what is wanted in the terms of the `search` that does the work."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from bitwright.bench.measure import measure, model_bytes
from bitwright.bench.report import Report, Row, bits_per_layer
from bitwright.errors import CalibrationError, NumericsError, PlanError
from bitwright.flow.evaluate import Drop
from bitwright.flow.prepare import plan_of
from bitwright.plan.plan import Plan
from bitwright.search.journal import Trial
from bitwright.search.judge import CONFIDENCE, Judge, PairedJudge, PointJudge
from bitwright.search.ladder import Climb, Goal, Task, candidates, climb, known_rungs
from bitwright.search.table import trials_table

LEVELS = {
    "fp32": ("float", "float"),
    "fp16": ("fp16", "fp16"),
    "int8": ("w8a8", "w8a8-dynamic"),
    "int4": ("w4a8", "w4a16"),
}
"""Presets by the name of a level, with calibration data and without; ``float`` leaves the model as it is."""


@dataclass(frozen=True, slots=True)
class Result:
    """The shipped model, its plan, whether the goal was met and with what confidence, scores, bytes, and the report.

    ``trials`` are all candidates in the order they were tried, ``best`` is the name of the one that was taken.
    ``confidence`` is None where models were compared by one score each, and where the goal was not met.
    ``float_score`` is that of the same items as ``score``; ``folder`` is where the model was saved, ``stopped`` says
    why the climb ended early.
    """

    model: nn.Module
    plan: Plan
    met: bool
    float_score: float
    score: float
    bytes: int
    report: Report
    best: str
    confidence: float | None = None
    trials: tuple[Trial, ...] = ()
    folder: Path | None = None
    stopped: str = ""

    def __str__(self) -> str:
        """The table of rungs, then the report, which says what was met and how sure that is."""
        text = io.StringIO()
        Console(file=text, width=100).print(trials_table(self.trials, self.best))
        return f"{text.getvalue()}\n{self.report}"


def quantize_model(
    model: nn.Module,
    batches: Iterable[Any],
    score: Callable[..., Any],
    *,
    evaluation: Iterable[Any] | None = None,
    score_range: tuple[float, float] = (0.0, 1.0),
    max_drop: float | None = None,
    max_bytes: int | None = None,
    level: str | None = None,
    preset: str | None = None,
    target: str = "cpu",
    recipes: Sequence[str] | None = None,
    example: Any = None,
    work: str | Path | None = None,
    time_budget: float | None = None,
    on_trial: Callable[[str], None] | None = None,
) -> Result:
    """Climb from the cheapest recipe to the most expensive one until the score drops by at most ``max_drop``.

    ``batches`` are calibration inputs (without labels); plans that need none take ``example``, one batch, instead.
    ``score(model)`` is larger for better models. With ``evaluation``, batches of any kind in a sequence, it is
    ``score(model, batch) -> [items]`` within ``score_range``, and "met" holds with 95 % confidence. The start is a
    ``preset`` (`w4a8`) or a ``level``: fp32, fp16, int8, int4. With ``max_bytes`` alone as many layers as fit get 8
    bits, and the best recipe wins. If nothing meets the goal the best model is returned with ``met=False``.
    ``recipes`` are the names of the rungs to climb, by default all (see `search.ladder.RUNGS`).

    ``work`` is a folder that keeps the best model and lets the same call go on after a kill, ``time_budget`` ends the
    climb after so many seconds, ``on_trial`` gets a line for every trial. Raises `NumericsError` without a goal or
    level and for bad scores, `CalibrationError` without data, `CheckpointError` for a folder of another search.
    """
    if max_drop is None and max_bytes is None and level is None:
        raise NumericsError("quantize_model needs a goal: pass max_drop (in units of your score), max_bytes, or both")
    inputs, first = _inputs(batches, example)
    preset = _preset(level, preset, data=bool(inputs))
    goal, say = Goal(max_drop, max_bytes), on_trial or (lambda text: None)
    plan = Plan.preset("fp16" if preset == "float" else preset, model, first, target=target)
    rungs = known_rungs(recipes, data=bool(inputs))
    judge: Judge
    if evaluation is None:
        judge = PointJudge(model, score, max_drop)
        say(f"float: score {judge.float_score:.4f}, {model_bytes(model):,} bytes")
    else:
        held = evaluation if isinstance(evaluation, Sequence) else list(evaluation)
        judge = PairedJudge(model, score, held, max_drop, score_range, candidates(plan, rungs))
        say(f"float: score {judge.known[0].mean().item():.4f} on the first batch, {model_bytes(model):,} bytes")
    if preset == "float":
        return _unchanged(model, plan.with_sites({"*": None}), judge, goal)
    folder = None if work is None else Path(work)
    task = Task(model, plan, inputs, first, goal)
    return _result(model, climb(task, judge, rungs, work=folder, time_budget=time_budget, say=say), judge, goal, first)


def _inputs(batches: Iterable[Any], example: Any) -> tuple[list[Any], Any]:
    """Calibration batches, and one batch to record the model with."""
    if isinstance(batches, Tensor):
        shape = list(batches.shape)
        raise CalibrationError(f"batches must be a list of batches, got one tensor {shape}; pass [batches]")
    inputs = list(batches)
    if not inputs and example is None:
        raise CalibrationError(
            "quantize_model got no calibration batches; pass at least one (a DataLoader with drop_last=True gives none "
            "when it has fewer items than one batch), or example=batch for plans that need no data"
        )
    return inputs, inputs[0] if inputs else example


def _preset(level: str | None, preset: str | None, *, data: bool) -> str:
    if level is None:
        return preset or "w4a8"
    if preset is not None:
        raise PlanError(f"level {level!r} and preset {preset!r} both say where to start; pass one of them")
    if level not in LEVELS:
        raise PlanError(f"unknown level {level!r}; known levels: {', '.join(LEVELS)}")
    return LEVELS[level][0 if data else 1]


def _unchanged(model: nn.Module, plan: Plan, judge: Judge, goal: Goal) -> Result:
    """The result of level fp32: the model that was given, and its score."""
    found = judge(model, lambda: None)
    size = model_bytes(model)
    trial = Trial("float", 0, found.holds, found.score, 0.0, found.low, found.high, found.items, size)
    report = Report(f"{type(model).__name__} in float", [], [Row("float", found.score, bytes=size)])
    met = goal.max_bytes is None or size <= goal.max_bytes
    return Result(model, plan, met, found.score, found.score, size, report, trial.name, trials=(trial,))


def _result(model: nn.Module, found: Climb, judge: Judge, goal: Goal, example: Any) -> Result:
    best, plan = found.best, plan_of(found.model)
    assert best.score is not None
    assert best.drop is not None
    assert best.bytes is not None
    met, float_score = goal.met(best), best.score + best.drop
    sure = CONFIDENCE if met and judge.paired and goal.max_drop is not None else None
    base, shipped = measure({"float": model, "shipped": found.model}, example)
    drop = None
    if best.items is not None and best.low is not None and best.high is not None:
        drop = Drop(best.drop, best.low, best.high, best.items)
    rows = [
        Row("float", float_score, bytes=base.bytes, speed=base.speed),
        Row("shipped", best.score, drop, bytes=shipped.bytes, speed=shipped.speed),
    ]
    report = Report(
        f"{type(model).__name__} for target {plan.target}",
        [*_notes(best, goal, sure), *([f"The search ended early: {found.stopped}."] if found.stopped else [])],
        rows,
        {"shipped": bits_per_layer(found.model)},
    )
    return Result(
        found.model, plan, met, float_score, best.score, best.bytes, report, best.name, sure, found.trials,
        found.folder, found.stopped,
    )  # fmt: skip


def _notes(best: Trial, goal: Goal, sure: float | None) -> list[str]:
    notes = [f"Shipped: {best.name}."]
    if sure is not None:
        notes.append(f"The score drops by at most {goal.max_drop:g}, with {sure:.0%} confidence over the whole search.")
    elif not goal.met(best):
        notes.append("The goal was not met; this is the best answer found.")
    elif goal.max_drop is not None:
        notes.append("The two scores were compared as they are; how sure that is was not measured.")
    return notes
