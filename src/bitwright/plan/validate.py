"""Checks a plan against a model and its target before anything is changed.

Every message names the site, what was asked, what was found and what to do.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from bitwright.errors import ModelError, NumericsError, PlanError, SpecError
from bitwright.numerics.spec import QuantSpec
from bitwright.observe.fit import WEIGHT_OBSERVERS
from bitwright.observe.observer import make_observer
from bitwright.plan.rules import parse_rule
from bitwright.plan.site import (
    PRODUCTS,
    Product,
    Site,
    call_of,
    matching,
    operator_of,
    products_of,
    rows_shape,
    scales_shape,
    slots_of,
    unknown_subclass,
)
from bitwright.plan.target import get_target, spelled


class Decisions(Protocol):
    """The parts of a `Plan` that are checked here."""

    target: str
    sites: dict[Site, QuantSpec | None]
    observers: dict[str, str]
    ranges: dict[str, str]
    folds: dict[str, str]
    shared: dict[Site, Site]
    why: dict[Site, str]

    def observer(self, site: Site) -> str:
        """How the range of a site is found."""
        ...

    def range_rule(self, site: Site) -> str:
        """How the range of a site moves in training."""
        ...


def validate(plan: Decisions, model: nn.Module) -> None:
    """Raise `PlanError` or `ModelError` unless every decision of ``plan`` can run on ``model`` and its target."""
    if not any(operator_of(module) for module in model.modules()) and not plan.sites:
        kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        raise ModelError(
            f"nothing to quantize: {type(model).__name__} has no Linear, Conv1d, Conv2d, Embedding, LSTM, GRU "
            f"or bitwright.Add module; it is made of {', '.join(kinds)}"
        )
    _check_observers(plan)
    _check_ranges(plan)
    for path in dict.fromkeys(site.path for site in plan.sites):
        _check_layer(plan, model, path)
    for conv, norm in plan.folds.items():
        for path in (conv, norm):
            _submodule(model, path, f"[folds] {conv} = {norm}")
    if not any(spec is not None for spec in plan.sites.values()):
        reasons = sorted({plan.why.get(site, "the plan says float") for site in plan.sites})
        raise PlanError(
            f"nothing was quantized: all {len(plan.sites)} sites stay in float ({'; '.join(reasons)}); give at least "
            "one weight a format, e.g. sites={'*.weight': 'int8/channel', '*.input': 'uint8/asym'}"
        )


def _check_observers(plan: Decisions) -> None:
    if not {"weight", "input"} <= set(plan.observers):
        raise PlanError(f"observers are chosen for weight and input, found {', '.join(plan.observers) or 'none'}")
    for pattern, name in plan.observers.items():
        sites = [Site("", pattern)] if pattern in ("weight", "input") else matching(pattern, plan.sites)
        for site in sites:
            _check_observer(site, name, f"[observers] {pattern} = {name!r}")
    for site, leader in plan.shared.items():
        if plan.sites.get(site) is not None and plan.observer(site) != plan.observer(leader):
            raise PlanError(
                f"[observers] {site} has {plan.observer(site)!r}, but it shares the quantizer of {leader}, which has "
                f"{plan.observer(leader)!r}; choose one observer for both"
            )


def _check_observer(site: Site, name: str, line: str) -> None:
    if site.is_weight:
        if name not in WEIGHT_OBSERVERS:
            raise PlanError(f"{line}: unknown weight observer {name!r}; weights know {', '.join(WEIGHT_OBSERVERS)}")
        return
    try:
        make_observer(name)
    except SpecError as cause:
        raise PlanError(f"{line}: {cause}") from cause


def _check_ranges(plan: Decisions) -> None:
    for pattern, rule in plan.ranges.items():
        try:
            parse_rule(rule)
        except SpecError as cause:
            raise PlanError(f"[ranges] {pattern} = {rule!r}: {cause}") from cause
        if pattern not in ("weight", "input"):
            matching(pattern, plan.sites)
    if plan.ranges.get("weight") not in ("fixed", "lsq"):
        raise PlanError(f"[ranges] weight = {plan.ranges.get('weight')!r}: weights know fixed and lsq")
    for site, spec in plan.sites.items():
        if spec is not None and not spec.dynamic:
            _check_rule(site, spec, plan.range_rule(site))


def _check_rule(site: Site, spec: QuantSpec, rule: str) -> None:
    if site.is_weight and rule not in ("fixed", "lsq"):
        raise PlanError(f"[ranges] {rule!r} for {site}: it is a weight; weights know fixed and lsq")
    if rule == "pact" and (spec.format.qmin < 0 or not spec.symmetric or not spec.format.is_integer):
        raise PlanError(
            f"[ranges] 'pact' for {site}: PACT clips at 0, the site is {spec}; use uint formats without asym"
        )
    if rule == "adarange" and not spec.format.is_integer:
        raise PlanError(
            f"[ranges] 'adarange' for {site}: the site is {spec}; only ranges of integer formats are learned"
        )


def _check_layer(plan: Decisions, model: nn.Module, path: str) -> None:
    slots = [site.slot for site in plan.sites if site.path == path]
    quantized = [slot for slot in slots if plan.sites[Site(path, slot)] is not None]
    call = call_of(path)
    if call and path not in dict(model.named_modules()):
        _submodule(model, call[0], f"{path}.{slots[0]}")
        module, products = None, PRODUCTS[call[1]](None)
    else:
        module = _submodule(model, path, f"{path}.{slots[0]}")
        products = products_of(module)
        if not products and not quantized:
            return
        if not products:
            raise PlanError(_no_quantized_form(path, module))
    known = [slot for product in products for slot in (product.weight, *product.inputs) if slot]
    for slot in slots:
        if slot not in known:
            what = operator_of(module) if module else call[1] if call else ""
            raise PlanError(f"{path}.{slot}: {what} layers have the sites {', '.join(known)}; remove this line")
    if quantized and module is not None and operator_of(module) in get_target(plan.target).refuses:
        kind = f"{operator_of(module)} layers"
        raise PlanError(f"{path}: target {plan.target} has no form for {kind}; set the sites of {path} to 'float'")
    for product in products:
        _check_product(plan, path, product, module)


def _check_product(plan: Decisions, path: str, product: Product, module: nn.Module | None) -> None:
    weight = None if product.weight is None else plan.sites.get(Site(path, product.weight))
    inputs = [plan.sites.get(Site(path, slot)) for slot in product.inputs]
    if product.weight is None and len({spec is None for spec in inputs}) > 1:
        raise PlanError(
            f"{path}: {product.op} is quantized on {' and '.join(product.inputs)} or on neither; "
            "set them to one of both"
        )
    if weight is not None and product.weight is not None and module is not None:
        _check_weight(Site(path, product.weight), weight, module)
    if weight is None and all(spec is None for spec in inputs):
        return
    target = get_target(plan.target)
    if weight is not None and weight.scale is not None and any(spec is not None for spec in inputs):
        raise PlanError(
            f"{path}: products of integers need float32 scales, found weight {weight}; remove /scale(...) or set "
            f"{' and '.join(str(Site(path, slot)) for slot in product.inputs)} to 'float'"
        )
    for spec in inputs or [None]:
        if not target.covers(product.op, weight, spec):
            raise PlanError(
                f"{path}: target {target.name} has no {product.op} kernel for weight {spelled(weight)} with input "
                f"{spelled(spec)}; it has {target.choices(product.op)}"
            )


def _check_weight(site: Site, spec: QuantSpec, module: nn.Module) -> None:
    shape = rows_shape(module, site.slot)
    if spec.dynamic:
        raise PlanError(f"{site}: {spec} is dynamic, but weights are stored; remove /dynamic")
    if spec.granularity.kind == "group" and len(shape) != 2:
        raise PlanError(f"{site}: {spec} groups need a 2-d weight, found {list(shape)}; use {spec.format}/channel")
    try:
        spec.granularity.scale_shape(shape)
    except NumericsError as cause:
        raise PlanError(f"{site}: {cause}, or set the site to 'float'") from cause
    if spec.scale is not None:
        _check_scales(site, spec, spec.scale, scales_shape(spec, module, site.slot))


def _check_scales(site: Site, spec: QuantSpec, scales: QuantSpec, shape: tuple[int, int]) -> None:
    if scales.scale is not None or scales.format.fit:
        raise PlanError(f"{site}: {spec} needs scales of scales or a table for them; use e.g. scale(int8/group256)")
    try:
        scales.granularity.scale_shape(shape)
    except NumericsError as cause:
        raise PlanError(f"{site}: {spec} stores its scales as a row of {shape[1]}: {cause}") from cause


def _no_quantized_form(path: str, module: nn.Module) -> str:
    if known := unknown_subclass(module):
        return (
            f"{path} is {type(module).__name__}, an unknown subclass of nn.{known.__name__}; register it with "
            "bitwright.register_module or set its sites to 'float'"
        )
    return f"{path} is {type(module).__name__}, which has no quantized form; remove its sites or set them to 'float'"


def _submodule(model: nn.Module, path: str, asked_by: str) -> nn.Module:
    modules = dict(model.named_modules())
    if path not in modules:
        sites = [Site(name, slot) for name, m in modules.items() for slot in slots_of(m)[:1]]
        try:
            matching(f"{path}.weight", sites)
        except PlanError as near:
            raise PlanError(f"the plan names {asked_by}, but the model has no module {path!r}: {near}") from None
        raise PlanError(f"the plan names {asked_by}, but the model has no module {path!r}")
    return modules[path]
