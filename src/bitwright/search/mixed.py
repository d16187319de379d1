"""From harm to a plan: the choices of each layer with harm and cost, and the plan of an allocation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from bitwright.errors import SearchError
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site, products_of
from bitwright.plan.target import get_target
from bitwright.search.agreement import LEAST_RANK, check
from bitwright.search.allocate import allocate
from bitwright.search.alone import sharing
from bitwright.search.budget import Allocation, Budget, Choice, Layer
from bitwright.search.cost import Cost, Work, layer_cost, plan_bytes, work_of
from bitwright.search.sensitivity import Sensitivity


@dataclass(frozen=True, slots=True)
class Mixture:
    """What `allocate` needs for a model: layers with choices, sites that must agree, and the cost of the rest."""

    layers: tuple[Layer, ...]
    ties: tuple[tuple[str, ...], ...]
    fixed: Cost

    def allocate(self, budget: Budget, **options: Any) -> Allocation:
        """The best allocation within ``budget``, see `allocate`."""
        return allocate(self.layers, budget, ties=self.ties, fixed=self.fixed, **options)


def mixture(
    model: nn.Module, plan: Plan, example: Any, found: Sensitivity, *, least_rank: float = LEAST_RANK
) -> Mixture:
    """Layers and choices from measured harm, for one forward on ``example`` (pass one item).

    A layer's choices are the combinations of the specs of its sites in ``found`` for which the target has kernels;
    their harm is the sum, negative harm, which is noise, counts as 0. Sites that share a quantizer are tied, their harm
    counts once. Bytes are exact: an allocation's sum is what the shipped model stores. Raises `SearchError` for a proxy
    whose rank correlation with measured harm is not known or below ``least_rank``, for sites that the plan does not
    have, and for a layer of which the target can run no combination.
    """
    check(found, least_rank)
    unknown = [site for site in found.sites if Site.parse(site) not in plan.sites]
    if unknown:
        raise SearchError(f"{unknown[0]} is no site of the plan; measure the sensitivity with this plan")
    work, harm = work_of(model, example), {key: max(row.harm, 0.0) for key, row in found.table.items()}
    specs = {s: texts for leader, texts in found.sites.items() for s in sharing(plan, Site.parse(leader))}
    paths = dict.fromkeys(site.path for site in specs)
    layers = tuple(_layer(model, plan, path, work.get(path, Work(0, 0, 0)), specs, harm) for path in paths)
    ties = [tuple(str(s) for s in sharing(plan, Site.parse(leader))) for leader in found.sites]
    start = {site: layer.choices[0].specs[i] for layer in layers for i, site in enumerate(layer.sites)}
    rest = plan_bytes(model, _replaced(plan, start)) - sum(layer.choices[0].cost.bytes for layer in layers)
    others = [path for path in work if path not in paths]
    bops = sum(_cost(model, plan, path, work[path], _decided(plan, path)).bops for path in others)
    return Mixture(layers, tuple(tie for tie in ties if len(tie) > 1), Cost(bytes=rest, bops=bops))


def _decided(plan: Plan, path: str) -> dict[Site, QuantSpec | None]:
    return {site: spec for site, spec in plan.sites.items() if site.path == path}


def _layer(
    model: nn.Module,
    plan: Plan,
    path: str,
    work: Work,
    specs: Mapping[Site, list[str]],
    harm: Mapping[tuple[str, str], float],
) -> Layer:
    sites = [site for site in specs if site.path == path]
    choices = []
    for texts in itertools.product(*(specs[site] for site in sites)):
        own = {site: QuantSpec.parse(text) for site, text in zip(sites, texts, strict=True)}
        if not _runs(model, plan, path, {**_decided(plan, path), **own}):
            continue
        cost = _cost(model, plan, path, work, {**_decided(plan, path), **own})
        stored = _cost(model, plan, path, work, {s: spec for s, spec in own.items() if not _follows(plan, s)}).bytes
        total = sum(harm.get((str(site), text), 0.0) for site, text in zip(sites, texts, strict=True))
        choices.append(Choice(texts, total, replace(cost, bytes=stored)))
    if not choices:
        raise SearchError(
            f"{path}: target {plan.target} can run none of the specs together; look at the sites of the plan"
        )
    return Layer(tuple(str(site) for site in sites), tuple(choices))


def _runs(model: nn.Module, plan: Plan, path: str, specs: Mapping[Site, QuantSpec | None]) -> bool:
    """Whether the target has kernels for a layer with these specs; functional calls are looked at by `prepare`."""
    module, target = dict(model.named_modules()).get(path), get_target(plan.target)
    for product in products_of(module) if module is not None else ():
        weight = specs.get(Site(path, product.weight)) if product.weight else None
        inputs = [specs.get(Site(path, slot)) for slot in product.inputs] or [None]
        if any(x is not None for x in (weight, *inputs)) and not all(
            target.covers(product.op, weight, x) for x in inputs
        ):
            return False
    return True


def _follows(plan: Plan, site: Site) -> bool:
    """Whether a weight is stored by another site."""
    return site.is_weight and site in plan.shared


def _cost(model: nn.Module, plan: Plan, path: str, work: Work, specs: Mapping[Site, QuantSpec | None]) -> Cost:
    modules = dict(model.named_modules())
    module = modules.get(path, nn.Identity())
    return layer_cost(module, work, {site.slot: spec for site, spec in specs.items()})


def _replaced(plan: Plan, specs: Mapping[str, str]) -> Plan:
    """The plan with other specs at these sites; what they share stays shared."""
    sites = {**plan.sites, **{Site.parse(site): QuantSpec.parse(text) for site, text in specs.items()}}
    return replace(plan, sites=sites).with_sites({})


def with_allocation(plan: Plan, found: Allocation, reason: str = "") -> Plan:
    """The plan with the specs of an allocation, and why.

    Raises `SearchError` for sites that the plan does not have.
    """
    unknown = [site for site in found.sites if Site.parse(site) not in plan.sites]
    if unknown:
        raise SearchError(f"{unknown[0]} is no site of the plan; use the plan that the harm was measured with")
    why = {Site.parse(site): reason or "chosen by allocation: the least harm within the budget" for site in found.sites}
    return replace(_replaced(plan, found.sites), why={**plan.why, **why})
