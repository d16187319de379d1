"""What an allocation is about: limits, layers with their choices, and the answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from bitwright.costs.cost import Cost
from bitwright.errors import SearchError

RESOURCES = ("bytes", "latency", "energy", "bops", "peak_memory")

Ties = Iterable[Iterable[str]]
"""Groups of sites that must get one spec."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper limits: drop, stored bytes, seconds, joules, bit operations, and stored with live bytes at the peak.

    The drop is that of the whole where it is measured (`mixed`: harm, or points of a score), and summed harm where
    nothing is (`allocate`).

    >>> Budget(bytes=100).limits()
    {'bytes': 100}
    """

    drop: float = math.inf
    bytes: float = math.inf
    latency: float = math.inf
    energy: float = math.inf
    bops: float = math.inf
    peak_memory: float = math.inf

    def __post_init__(self) -> None:
        bad = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if not getattr(self, f.name) >= 0]
        if bad:
            raise SearchError(f"a budget holds limits of at least 0, found {', '.join(bad)}")

    def limits(self) -> dict[str, float]:
        """The limits that are finite, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: limit for name, limit in found.items() if math.isfinite(limit)}


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to carry out a layer: a spec for each of its sites (``float`` for none), its harm, its cost."""

    specs: tuple[str, ...]
    harm: float
    cost: Cost

    def __post_init__(self) -> None:
        if not (math.isfinite(self.harm) and self.harm >= 0):
            raise SearchError(f"harm of {', '.join(self.specs)} must be a finite number of at least 0, got {self.harm}")


@dataclass(frozen=True, slots=True)
class Layer:
    """Sites that are decided together, and the choices there are."""

    sites: tuple[str, ...]
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not self.choices:
            raise SearchError(f"{', '.join(self.sites)}: no choices; give at least one spec")
        for choice in self.choices:
            if len(choice.specs) != len(self.sites):
                found = f"{len(choice.specs)} specs ({', '.join(choice.specs)})"
                raise SearchError(f"{', '.join(self.sites)}: a choice has one spec per site, found {found}")


@dataclass(frozen=True, slots=True)
class Allocation:
    """The spec of every site, the summed harm and cost, and by which share of the harm it may miss the optimum."""

    sites: Mapping[str, str]
    harm: float
    cost: Cost
    gap: float = 0.0


def summed(layers: Sequence[Layer], picked: Sequence[Choice], fixed: Cost, gap: float = 0.0) -> Allocation:
    """The allocation that takes ``picked``, one choice per layer."""
    sites = {
        site: spec
        for layer, choice in zip(layers, picked, strict=True)
        for site, spec in zip(layer.sites, choice.specs, strict=True)
    }
    cost = sum((choice.cost for choice in picked), fixed)
    return Allocation(sites, math.fsum(choice.harm for choice in picked), cost, gap)


def keeps_to(found: Allocation, budget: Budget) -> bool:
    """Whether an allocation is within all limits.

    >>> keeps_to(Allocation({}, 0.0, Cost(bytes=5)), Budget(bytes=4))
    False
    """
    value = {name: found.harm if name == "drop" else getattr(found.cost, name) for name in budget.limits()}
    return all(value[name] <= limit for name, limit in budget.limits().items())
