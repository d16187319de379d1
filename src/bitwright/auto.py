"""`quantize_model`: the one-liner. It reads as the tutorial of the straight line.

It starts from a low-bit preset, measures the score, and moves the most sensitive layers to 8 bits, no more of them than
the goal needs. Sensitivity of a layer: the squared error that quantizing this layer alone adds to the model's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.bench.measure import measure, model_bytes
from bitwright.bench.report import Report, Row, bits_per_layer
from bitwright.errors import CalibrationError, NumericsError
from bitwright.flow.calibrate import calibrate
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.graph.dataflow import call, evaluating
from bitwright.nn.layer import QLayer
from bitwright.nn.quantizer import Stage
from bitwright.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Result:
    """The shipped model, its plan, whether the goal was met, both scores (as fractions), bytes, and the report."""

    model: nn.Module
    plan: Plan
    met: bool
    float_score: float
    score: float
    bytes: int
    report: Report


@dataclass(frozen=True, slots=True)
class _Trial:
    raised: int
    model: nn.Module
    plan: Plan
    score: float
    bytes: int


def quantize_model(
    model: nn.Module,
    batches: Iterable[Any],
    score: Callable[[nn.Module], float],
    *,
    max_drop: float | None = None,
    max_bytes: int | None = None,
    preset: str = "w4a8",
    target: str = "cpu",
    on_trial: Callable[[str], None] | None = None,
) -> Result:
    """The smallest mix of ``preset`` and 8 bits that drops at most ``max_drop`` of score and fits ``max_bytes``.

    ``batches`` are calibration inputs (without labels), ``score(model)`` is larger for better models and is measured on
    the shipped model. With ``max_bytes`` alone, as many layers as fit get 8 bits. If no mix meets the goal the best
    one is returned with ``met=False``. Raises `NumericsError` when no goal is given or the score is NaN.
    """
    if max_drop is None and max_bytes is None:
        raise NumericsError("quantize_model needs a goal: pass max_drop (in units of your score), max_bytes, or both")
    batches = list(batches)
    if not batches:
        raise CalibrationError("quantize_model got no calibration batches; pass at least one")
    say = on_trial or (lambda text: None)
    float_score = _checked(score(model))
    say(f"float: score {float_score:.4f}, {model_bytes(model):,} bytes")
    low, high = (Plan.preset(name, model, batches[0], target=target) for name in (preset, "w8a8"))
    order = _most_sensitive_first(model, low, batches)
    trials: dict[int, _Trial] = {}

    def attempt(raised: int) -> _Trial:
        """The plan whose ``raised`` most sensitive layers have 8 bits, calibrated, shipped and scored."""
        if raised not in trials:
            plan = low.with_sites({str(site): high.sites[site] for site in low.sites if site.path in order[:raised]})
            shipped = _ship(model, plan, batches)
            trial = _Trial(raised, shipped, plan, _checked(score(shipped)), model_bytes(shipped))
            say(f"{raised} of {len(order)} layers at 8 bits: score {trial.score:.4f}, {trial.bytes:,} bytes")
            trials[raised] = trial
        return trials[raised]

    def holds(trial: _Trial) -> bool:
        drop_holds = max_drop is None or float_score - trial.score <= max_drop
        return drop_holds and (max_bytes is None or trial.bytes <= max_bytes)

    if max_drop is None:
        _last(len(order), lambda raised: attempt(raised).bytes <= (max_bytes or 0))
    else:
        _first(len(order), lambda raised: float_score - attempt(raised).score <= max_drop)
    good = [trial for trial in trials.values() if holds(trial)]
    best = _best(good, max_drop) or max(trials.values(), key=lambda trial: (trial.score, -trial.bytes))
    report = _report(model, best, float_score, batches[0])
    return Result(best.model, best.plan, bool(good), float_score, best.score, best.bytes, report)


def _best(good: list[_Trial], max_drop: float | None) -> _Trial | None:
    """Of the trials that meet the goal: the smallest under a limit on the drop, the one with most 8-bit layers else."""
    if not good:
        return None
    return max(good, key=lambda trial: trial.raised if max_drop is None else -trial.bytes)


def _ship(model: nn.Module, plan: Plan, batches: list[Any]) -> nn.Module:
    prepared = prepare(model, plan)
    calibrate(prepared, batches)
    return convert(prepared, inplace=True)


@torch.no_grad()
def _most_sensitive_first(model: nn.Module, plan: Plan, batches: list[Any]) -> list[str]:
    """Paths of the quantized layers by the squared error that each alone adds to the output on the first batch."""
    prepared = prepare(model, plan)
    calibrate(prepared, batches)
    layers = {p: m for p, m in prepared.named_modules() if isinstance(m, QLayer) and m.weight_quantizer is not None}
    with evaluating(prepared):
        _only(layers, None)
        expected = _outputs(prepared, batches[0])
        errors = {}
        for path in layers:
            _only(layers, path)
            got = _outputs(prepared, batches[0])
            errors[path] = sum((a - b).square().sum().item() for a, b in zip(got, expected, strict=True))
    return sorted(errors, key=lambda path: -errors[path])


def _only(layers: dict[str, QLayer], chosen: str | None) -> None:
    for path, layer in layers.items():
        assert layer.weight_quantizer is not None
        layer.weight_quantizer.stage = Stage.SIMULATE if path == chosen else Stage.FLOAT


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    return [
        leaf.double()
        for leaf in tree_leaves(call(model, batch))
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """Smallest number in 0..count that holds, by bisection; ``count`` if none does."""
    if holds(0):
        return 0
    bad, good = 0, count
    if not holds(count):
        return count
    while good - bad > 1:
        middle = (bad + good) // 2
        bad, good = (bad, middle) if holds(middle) else (middle, good)
    return good


def _last(count: int, holds: Callable[[int], bool]) -> int:
    """Largest number in 0..count that holds, by bisection; 0 if none does."""
    return count - _first(count, lambda number: holds(count - number))


def _checked(score: float) -> float:
    if math.isnan(float(score)):
        raise NumericsError("score(model) returned NaN; it must return a number, larger is better")
    return float(score)


def _report(model: nn.Module, best: _Trial, float_score: float, example: Any) -> Report:
    base, shipped = measure({"float": model, "shipped": best.model}, example)
    return Report(
        f"{type(model).__name__} for target {best.plan.target}",
        [f"{best.raised} layers were moved to 8 bits to keep the score."],
        [
            Row("float", float_score, bytes=base.bytes, speed=base.speed),
            Row("shipped", best.score, bytes=shipped.bytes, speed=shipped.speed),
        ],
        {"shipped": bits_per_layer(best.model)},
    )
