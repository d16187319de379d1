"""The rung that spends bits: which layers can be moved to 8 bits, and which of them the output feels most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.flow.calibrate import calibrate
from bitwright.flow.prepare import prepare
from bitwright.graph.dataflow import call, evaluating
from bitwright.nn.layer import Simulated
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.formats import get_format
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan

Layers = tuple[str, ...]
"""Paths of modules that must move together, because they share a weight; mostly just one."""

FRACTIONS = 8
"""How finely the share of layers at 8 bits is searched where items are scored: every candidate costs confidence."""

_WIDE = QuantSpec.parse("int8/channel")


def narrow_layers(plan: Plan) -> list[Layers]:
    """Modules with a weight of fewer than 8 bits: any kind, recurrent ones, attention and experts included."""
    groups: dict[str, list[str]] = {}
    for site, spec in plan.sites.items():
        if not site.is_weight or spec is None or spec.format.bits >= 8:
            continue
        leader = plan.shared.get(site, site).path
        group = groups.setdefault(leader, [])
        if site.path not in group:
            group.append(site.path)
    return [tuple(group) for group in groups.values()]


def with_eight_bits(plan: Plan, chosen: Sequence[Layers]) -> Plan:
    """The plan with every site of the chosen modules at 8 bits or more: weights as ``int8/channel``."""
    paths = {path for layers in chosen for path in layers}
    narrow = {
        s: spec for s, spec in plan.sites.items() if s.path in paths and spec is not None and spec.format.bits < 8
    }
    if not narrow:
        return plan
    wide = plan.with_sites({str(site): _WIDE if site.is_weight else _widened(spec) for site, spec in narrow.items()})
    why = dict.fromkeys(narrow, f"among the {len(chosen)} most sensitive layers, which keep 8 bits")
    return replace(wide, why={**wide.why, **why})


def _widened(spec: QuantSpec) -> QuantSpec:
    return replace(spec, format=get_format("uint8" if spec.format.qmin >= 0 else "int8"))


@torch.no_grad()
def most_sensitive_first(model: nn.Module, plan: Plan, batches: Sequence[Any], example: Any) -> list[Layers]:
    """`narrow_layers` by the squared error that each alone, quantized, adds to the output on ``example``.

    The activations of the other modules are in float then too, except where they feed no weight.
    """
    prepared = prepare(model, replace(plan, steps=()))
    calibrate(prepared, batches)
    layers = narrow_layers(plan)
    quantizers = [_weights(prepared, group) for group in layers]
    with evaluating(prepared):
        _set(quantizers, Stage.FLOAT)
        expected = outputs(prepared, example)
        errors: dict[Layers, float] = {}
        for group, own in zip(layers, quantizers, strict=True):
            _set([own], Stage.SIMULATE)
            errors[group] = _squared(outputs(prepared, example), expected)
            _set([own], Stage.FLOAT)
    return sorted(errors, key=lambda group: -errors[group])


def _weights(model: nn.Module, group: Layers) -> list[Quantizer]:
    found = []
    for path in group:
        module = model.get_submodule(path)
        assert isinstance(module, Simulated)
        found += [module.quantizer(slot) for slot in module.quantized_weights()]
    return [quantizer for quantizer in found if quantizer is not None]


def _set(groups: Sequence[Sequence[Quantizer]], stage: Stage) -> None:
    for group in groups:
        for quantizer in group:
            quantizer.stage = stage


@torch.no_grad()
def output_error(model: nn.Module, changed: nn.Module, batches: Sequence[Any]) -> float:
    """Squared error of the outputs of ``changed`` relative to the squares of those of ``model``."""
    error = total = 0.0
    with evaluating(model), evaluating(changed):
        for batch in batches:
            wanted = outputs(model, batch)
            error += _squared(outputs(changed, batch), wanted)
            total += sum(leaf.square().sum().item() for leaf in wanted)
    return error / total if total else 0.0


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The floating-point tensors that a model returns, as float64."""
    return [
        leaf.double()
        for leaf in tree_leaves(call(model, batch))
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def _squared(one: list[Tensor], other: list[Tensor]) -> float:
    return sum((a - b).square().sum().item() for a, b in zip(one, other, strict=True))


def levels(layers: int, *, paired: bool) -> list[int]:
    """Numbers of layers at 8 bits that may be tried: all of them, or eighths where every candidate costs confidence.

    >>> levels(20, paired=True), levels(3, paired=False)
    ([3, 5, 8, 10, 13, 15, 18, 20], [1, 2, 3])
    """
    if not paired:
        return list(range(1, layers + 1))
    return sorted({-(-layers * part // FRACTIONS) for part in range(1, FRACTIONS + 1)} - {0})


def first_that_holds(count: int, holds: Callable[[int], bool]) -> int:
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


def last_that_holds(count: int, holds: Callable[[int], bool]) -> int:
    """Largest number in 0..count that holds, by bisection; 0 if none does."""
    return count - first_that_holds(count, lambda number: holds(count - number))
