"""Walks along the lower convex hulls of cost and harm: `pareto`, `greedy`. No solver.

The hull of a layer holds its choices that are best for some price of the resource. Steps along all hulls, those first
that save the most harm per cost, visit allocations that are optimal for what they cost (Lagrange); what lies between
two of them, which is at most one step of one layer, is left to `allocate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from bitwright.costs.cost import Cost
from bitwright.errors import SearchError
from bitwright.search.budget import RESOURCES, Allocation, Choice, Layer, Ties, summed

_JOINED = 10_000  # choices of tied layers that are listed


def greedy(
    layers: Sequence[Layer],
    limit: float,
    resource: str = "bytes",
    *,
    ties: Ties = (),
    fixed: Cost | None = None,
) -> Allocation:
    """From the cheapest choices on, the step that lessens harm most per cost, as long as the next one fits.

    At most one step of one layer away from the optimum, and without a solver. Raises `SearchError` where even the
    cheapest choices are over the limit.
    """
    walk = _Walk(layers, resource, ties)
    cost = sum(_sums(hull[0], resource)[0] for hull in walk.hulls) + getattr(fixed or Cost(), resource)
    if cost > limit:
        asked = f"the budget of {resource} {limit:g}"
        raise SearchError(f"nothing meets {asked}; the smallest that any choice reaches is {resource} {cost:.12g}")
    at = [0] * len(walk.hulls)
    for group, place in walk.steps:
        before, after = walk.hulls[group][place - 1 : place + 1]
        cost += _sums(after, resource)[0] - _sums(before, resource)[0]
        if cost > limit:
            break
        at[group] = place
    return walk.allocation(at, fixed or Cost())


def pareto(
    layers: Sequence[Layer], resource: str = "bytes", *, ties: Ties = (), fixed: Cost | None = None
) -> list[Allocation]:
    """The allocations on the convex front of cost and harm, from the cheapest to the least harmful one.

    Each is optimal for its own cost: no allocation has less harm at that cost. Between two neighbours, which differ in
    one layer (or in layers that are tied), use `allocate`. Raises `SearchError` for more than 10,000 choices of tied
    layers.
    """
    walk = _Walk(layers, resource, ties)
    at = [0] * len(walk.hulls)
    found = [walk.allocation(at, fixed or Cost())]
    for group, place in walk.steps:
        at[group] = place
        found.append(walk.allocation(at, fixed or Cost()))
    return found


_Joint = dict[int, Choice]


class _Walk:
    """The hulls of all layers, and the steps along them in the order of the harm they save per cost."""

    def __init__(self, layers: Sequence[Layer], resource: str, ties: Ties) -> None:
        if resource not in RESOURCES[:-1]:
            raise SearchError(f"a front is over one of {', '.join(RESOURCES[:-1])}; got {resource!r}")
        self.layers = layers
        self.hulls = [_hull(choices, resource) for choices in _joined(layers, [list(group) for group in ties])]
        steps = [
            (-_slope(hull[place - 1], hull[place], resource), group, place)
            for group, hull in enumerate(self.hulls)
            for place in range(1, len(hull))
        ]
        self.steps = [(group, place) for _, group, place in sorted(steps)]

    def allocation(self, at: Sequence[int], fixed: Cost) -> Allocation:
        """The allocation in which each group stands at a place of its hull."""
        picked: _Joint = {}
        for hull, place in zip(self.hulls, at, strict=True):
            picked |= hull[place]
        return summed(self.layers, [picked[i] for i in range(len(self.layers))], fixed)


def _joined(layers: Sequence[Layer], ties: list[list[str]]) -> list[list[_Joint]]:
    """Layers that ties connect, with the choices in which tied sites agree."""
    holders = {site: at for at, layer in enumerate(layers) for site in layer.sites}
    groups: list[set[int]] = [{at} for at in range(len(layers))]
    for tie in ties:
        touched = [group for group in groups if group & {holders[site] for site in tie}]
        groups = [group for group in groups if group not in touched] + [set().union(*touched)]
    leaders = {site: tie[0] for tie in ties for site in tie}
    found = []
    for group in sorted(sorted(group) for group in groups):
        partial: list[tuple[_Joint, dict[str, str]]] = [({}, {})]
        for at in group:
            grown = []
            for (joint, specs), choice in itertools.product(partial, layers[at].choices):
                own = [
                    (leaders[s], spec) for s, spec in zip(layers[at].sites, choice.specs, strict=True) if s in leaders
                ]
                wanted = specs | dict(own)
                if all(wanted[leader] == spec == specs.get(leader, spec) for leader, spec in own):
                    grown.append(({**joint, at: choice}, wanted))
            partial = grown
            if len(partial) > _JOINED:
                raise SearchError(f"tied layers have more than {_JOINED:,} choices together; use allocate")
        found.append([joint for joint, _ in partial])
        if not partial:
            raise SearchError("the ties leave no choice: tied sites have no spec in common")
    return found


def _sums(joint: _Joint, resource: str) -> tuple[float, float]:
    return sum(getattr(c.cost, resource) for c in joint.values()), sum(c.harm for c in joint.values())


def _slope(one: _Joint, other: _Joint, resource: str) -> float:
    """Harm that a step saves per cost."""
    (cost, harm), (more, less) = _sums(one, resource), _sums(other, resource)
    return (harm - less) / (more - cost)


def _hull(choices: list[_Joint], resource: str) -> list[_Joint]:
    """The choices on the lower convex hull of cost and harm, from the cheapest on."""
    hull: list[_Joint] = []
    for joint in sorted(choices, key=lambda joint: _sums(joint, resource)):
        if hull and _sums(joint, resource)[1] >= _sums(hull[-1], resource)[1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1], resource) <= _slope(hull[-1], joint, resource):
            hull.pop()
        hull.append(joint)
    return hull
