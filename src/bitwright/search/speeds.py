"""How long the choices of layers take, before any harm is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bitwright.costs.choices import combinations, spread
from bitwright.costs.cost import bits_of
from bitwright.costs.prices import Pricing
from bitwright.plan.plan import Plan
from bitwright.search.budget import Choice, Layer


def speeds(
    latency: Pricing, model: nn.Module, plan: Plan, example: Any, specs: Mapping[str, Sequence[str]]
) -> list[Layer]:
    """The layers that ``specs`` select, each choice with its latency; in place of its harm, ``1 / bits`` of its sites.

    `search.dominance.slower` of them are the choices of fewer bits that are no faster than one of more.
    """
    wanted = spread(plan, specs)
    paths = list(dict.fromkeys(site.path for site in wanted))
    prices, found = latency.prices(model, plan, example, paths), []
    for path in paths:
        sites = [site for site in wanted if site.path == path]
        choices = []
        for texts, whole in combinations(model, plan, path, wanted):
            narrow = sum(1 / bits_of(whole[site]) for site in sites)
            cost = prices.layer(path, {site.slot: spec for site, spec in whole.items()})
            choices.append(Choice(texts, narrow, cost))
        if choices:
            found.append(Layer(tuple(str(site) for site in sites), tuple(choices)))
    return found
