"""From harm to a plan: the choices of each layer with harm and cost, and the plan of an allocation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bitwright.costs.choices import Decided, combinations, decided, module_at, sharing
from bitwright.costs.cost import Cost, Work, layer_cost, plan_bytes, work_of
from bitwright.costs.prices import Prices, Pricing
from bitwright.errors import SearchError
from bitwright.harm.agreement import LEAST_RANK, check
from bitwright.harm.sensitivity import Sensitivity
from bitwright.plan.plan import Plan, read_spec
from bitwright.plan.site import Site, rows_shape
from bitwright.plan.target import spelled
from bitwright.search.allocate import allocate
from bitwright.search.budget import Allocation, Budget, Choice, Layer, summed
from bitwright.search.dominance import Slower, slower
from bitwright.search.front import pareto

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True)
class Mixture:
    """What `allocate` needs for a model: layers with choices, sites that must agree, and the cost of the rest."""

    layers: tuple[Layer, ...]
    ties: tuple[tuple[str, ...], ...]
    fixed: Cost

    def allocate(self, budget: Budget, **options: Any) -> Allocation:
        """The best allocation within ``budget``, see `allocate`."""
        return allocate(self.layers, budget, ties=self.ties, fixed=self.fixed, **options)

    def of(self, plan: Plan) -> Allocation:
        """What a plan has at these sites, as an allocation; raises `SearchError` for specs that are no choice."""
        picked = []
        for layer in self.layers:
            specs = tuple(spelled(plan.sites[Site.parse(site)]) for site in layer.sites)
            known = {choice.specs: choice for choice in layer.choices}
            if specs not in known:
                raise SearchError(
                    f"{', '.join(layer.sites)}: the plan has {', '.join(specs)}, of which no harm is known; measure "
                    "the sensitivity for the specs of the plan too"
                )
            picked.append(known[specs])
        return summed(self.layers, picked, self.fixed)

    def front(self, resource: str = "bytes") -> list[Allocation]:
        """The convex front of one resource and summed harm, from the cheapest allocation on, see `pareto`."""
        return pareto(self.layers, resource, ties=self.ties, fixed=self.fixed)

    def slower(self) -> list[Slower]:
        """Choices that have no winning kernel: another one of their layer is as fast and harms no more."""
        return slower(self.layers)


def mixture(
    model: nn.Module,
    plan: Plan,
    example: Any,
    found: Sensitivity,
    *,
    latency: Pricing | None = None,
    least_rank: float = LEAST_RANK,
) -> Mixture:
    """Layers and choices from measured harm, for one forward on ``example`` (pass one item).

    A layer's choices are the combinations of the specs of its sites in ``found`` for which the target has kernels;
    their harm is the sum, negative harm, which is noise, counts as 0. Sites that share a quantizer are tied, their harm
    counts once. Bytes are exact: an allocation's sum is what the shipped model stores. ``latency`` gives seconds: the
    table that `measure_machine` returns, or a `search.roofline.Machine`, which gives modelled joules too. Raises
    `SearchError` for a proxy whose rank correlation with measured harm is not known or below ``least_rank``, for sites
    that the plan does not have, for a layer of which the target can run no combination, and for a choice that
    ``latency`` does not know.
    """
    check(found, least_rank)
    unknown = [site for site in found.sites if Site.parse(site) not in plan.sites]
    if unknown:
        raise SearchError(f"{unknown[0]} is no site of the plan; measure the sensitivity with this plan")
    work, harm = work_of(model, example), {key: max(row.harm, 0.0) for key, row in found.table.items()}
    specs = {s: texts for leader, texts in found.sites.items() for s in sharing(plan, Site.parse(leader))}
    paths = list(dict.fromkeys(site.path for site in specs))
    prices = None if latency is None else latency.prices(model, plan, example, paths)
    layers = tuple(_layer(model, plan, path, work.get(path, Work(0, 0, 0)), specs, harm, prices) for path in paths)
    ties = [tuple(str(s) for s in sharing(plan, Site.parse(leader))) for leader in found.sites]
    start = {site: layer.choices[0].specs[i] for layer in layers for i, site in enumerate(layer.sites)}
    rest = plan_bytes(model, _replaced(plan, start)) - sum(layer.choices[0].cost.bytes for layer in layers)
    others = [path for path in work if path not in paths]
    bops = sum(_cost(model, path, work[path], decided(plan, path), None).bops for path in others)
    fixed = Cost(bytes=rest, bops=bops) + (Cost() if prices is None else prices.rest())
    return Mixture(layers, tuple(tie for tie in ties if len(tie) > 1), fixed)


def _layer(
    model: nn.Module,
    plan: Plan,
    path: str,
    work: Work,
    specs: Mapping[Site, list[str]],
    harm: Mapping[tuple[str, str], float],
    prices: Prices | None,
) -> Layer:
    sites = [site for site in specs if site.path == path]
    choices = []
    for texts, whole in combinations(model, plan, path, specs):
        cost = _cost(model, path, work, whole, prices)
        own = {site: whole[site] for site in sites if not (site.is_weight and site in plan.shared)}
        stored = _cost(model, path, work, own, None).bytes  # a weight that another site stores is counted there
        stored += _norm_bytes(model, plan, path, whole)
        total = sum(harm.get((str(site), text), 0.0) for site, text in zip(sites, texts, strict=True))
        choices.append(Choice(texts, total, replace(cost, bytes=stored)))
    if not choices:
        raise SearchError(
            f"{path}: target {plan.target} can run none of the specs together; look at the sites of the plan"
        )
    return Layer(tuple(str(site) for site in sites), tuple(choices))


def _cost(model: nn.Module, path: str, work: Work, specs: Decided, prices: Prices | None) -> Cost:
    """What one layer costs with these specs."""
    slots = {site.slot: spec for site, spec in specs.items()}
    cost = layer_cost(module_at(model, path), work, slots)
    return cost if prices is None else cost + prices.layer(path, slots)


def _norm_bytes(model: nn.Module, plan: Plan, path: str, specs: Decided) -> int:
    """Bytes of a batch norm that does not fold, because the weight before it is float, beyond those of a folded one."""
    if path not in plan.folds or specs[Site(path, "weight")] is not None:
        return 0
    norm, layer = model.get_submodule(plan.folds[path]), model.get_submodule(path)
    folded = 4 * rows_shape(layer, "weight")[0] if layer.bias is None else 0  # a bias that the layer did not have
    return sum(tensor.nbytes for tensor in norm.state_dict().values()) - folded


def _replaced(plan: Plan, specs: Mapping[str, str]) -> Plan:
    """The plan with other specs at these sites; what they share stays shared."""
    sites = {**plan.sites, **{Site.parse(site): read_spec(text) for site, text in specs.items()}}
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


def choices_of(plan: Plan) -> dict[str, list[str]]:
    """Every weight with an integer spec: that spec, and the same at all of `BITS`.

    Raises `SearchError` for a plan without such weights.
    """
    found = {}
    for site, spec in plan.sites.items():
        own = re.match(r"int(\d+)/", str(spec))
        if site.is_weight and own is not None:
            widths = sorted({*BITS, int(own[1])})
            found[str(site)] = [re.sub(r"^int\d+", f"int{bits}", str(spec)) for bits in widths]
    if not found:
        raise SearchError("mixed precision needs weights with integer specs, and the plan gives none; use w4a8, w4a4")
    return found


def one_item(batch: Any) -> Any:
    """The first item of a batch of inputs."""
    return tree_map(lambda leaf: leaf[:1] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)
