"""The choices of a layer: combinations of the specs of its sites for which the target has kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from bitwright.graph.calls import KINDS
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan, read_spec
from bitwright.plan.site import Site, call_of, matching, products_of
from bitwright.plan.target import get_target, spelled

Specs = Mapping[str, Sequence[str]]
"""Specs to choose from, by patterns over sites."""

Decided = dict[Site, QuantSpec | None]
"""The spec of every site of one layer."""


def sharing(plan: Plan, leader: Site) -> list[Site]:
    """The sites that share the quantizer of ``leader``, it included."""
    return [leader, *(site for site, other in plan.shared.items() if other == leader)]


def spread(plan: Plan, specs: Specs) -> dict[Site, list[str]]:
    """Specs in their canonical spelling or ``float``, at the sites that patterns select and at those that share."""
    found: dict[Site, list[str]] = {}
    for pattern, texts in specs.items():
        own = list(dict.fromkeys(spelled(read_spec(text)) for text in texts))
        for site in matching(pattern, plan.sites):
            found |= dict.fromkeys(sharing(plan, plan.shared.get(site, site)), own)
    return found


def decided(plan: Plan, path: str) -> Decided:
    """What the plan decides for the sites of one layer."""
    return {site: spec for site, spec in plan.sites.items() if site.path == path}


def combinations(
    model: nn.Module, plan: Plan, path: str, specs: Mapping[Site, Sequence[str]]
) -> Iterator[tuple[tuple[str, ...], Decided]]:
    """Each combination of ``specs`` that the target can run: the texts, and with them the spec of every site."""
    sites, module = [site for site in specs if site.path == path], module_at(model, path)
    for texts in itertools.product(*(specs[site] for site in sites)):
        own = {site: read_spec(text) for site, text in zip(sites, texts, strict=True)}
        whole = {**decided(plan, path), **own}
        if _runs(module, plan.target, path, whole):
            yield texts, whole


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The float module at ``path``; for a functional call the module that will stand for it.

    >>> module_at(nn.Sequential(nn.ReLU()), "0"), module_at(nn.Sequential(), "add_0")
    (ReLU(), Add())
    """
    modules, named = dict(model.named_modules()), call_of(path)
    return KINDS[named[1]].module() if named is not None and path not in modules else modules[path]


def _runs(module: nn.Module, target: str, path: str, specs: Decided) -> bool:
    for product in products_of(module):
        weight = specs.get(Site(path, product.weight)) if product.weight else None
        inputs = [specs.get(Site(path, slot)) for slot in product.inputs] or [None]
        if any(x is not None for x in (weight, *inputs)) and not all(
            get_target(target).covers(product.op, weight, x) for x in inputs
        ):
            return False
    return True
