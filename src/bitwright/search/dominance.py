"""Choices that another choice beats: they are never taken, and widths without a winning kernel are among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bitwright.search.budget import Choice, Layer, Ties


def undominated(layers: Sequence[Layer], ties: Ties = ()) -> list[Layer]:
    """The layers without choices that another one of theirs beats: no more harm, no more of any cost, less of one.

    Where sites are tied the other choice must have the same spec there; a spec of a tie goes as a whole, where in all
    its layers another spec is at least as good for every choice of the other sites, and better for one.

    >>> from bitwright.costs.cost import Cost
    >>> choices = Choice(("int4",), 0.1, Cost(bytes=4, latency=1)), Choice(("int3",), 0.2, Cost(bytes=4, latency=2))
    >>> [choice.specs for choice in undominated([Layer(("a",), choices)])[0].choices]
    [('int4',)]
    """
    ties = [list(tie) for tie in ties]
    tied = {site for tie in ties for site in tie}
    found = [_within(layer, tied) for layer in layers]
    for tie in ties:
        holders = [at for at, layer in enumerate(found) if set(layer.sites) & set(tie)]
        for spec in sorted({spec for at in holders for spec in _specs(found[at], tie)}):
            own = [found[at] for at in holders]
            others = sorted({other for layer in own for other in _specs(layer, tie)} - {spec})
            if any(_replaces(own, tie, spec, other) for other in others):
                for at in holders:
                    found[at] = _without(found[at], tie, spec)
    return found


def _numbers(choice: Choice) -> tuple[float, ...]:
    cost = choice.cost
    return (choice.harm, cost.bytes, cost.latency, cost.energy, cost.bops, cost.live)


def _as_good(one: Choice, other: Choice) -> bool:
    return all(a <= b for a, b in zip(_numbers(one), _numbers(other), strict=True))


def _within(layer: Layer, tied: set[str]) -> Layer:
    places = [at for at, site in enumerate(layer.sites) if site in tied]

    def beaten(choice: Choice) -> bool:
        return any(
            _as_good(other, choice)
            and _numbers(other) != _numbers(choice)
            and all(other.specs[at] == choice.specs[at] for at in places)
            for other in layer.choices
        )

    return replace(layer, choices=tuple(choice for choice in layer.choices if not beaten(choice)))


def _specs(layer: Layer, tie: Sequence[str]) -> set[str]:
    return {choice.specs[at] for at, site in enumerate(layer.sites) if site in tie for choice in layer.choices}


def _replaces(layers: Sequence[Layer], tie: Sequence[str], spec: str, other: str) -> bool:
    """Whether in every allocation the tie could have ``other`` for ``spec``, at no loss and for a gain."""
    pairs = [pair for layer in layers for pair in _pairs(layer, tie, spec, other)]
    return all(new is not None and _as_good(new, old) for old, new in pairs) and any(
        new is not None and _numbers(new) != _numbers(old) for old, new in pairs
    )


def _pairs(layer: Layer, tie: Sequence[str], spec: str, other: str) -> Iterator[tuple[Choice, Choice | None]]:
    """Choices with ``spec`` at the tied sites, and those that differ from them only in having ``other`` there."""
    places = [at for at, site in enumerate(layer.sites) if site in tie]
    known = {choice.specs: choice for choice in layer.choices}
    for choice in layer.choices:
        if all(choice.specs[at] == spec for at in places):
            yield choice, known.get(tuple(other if at in places else text for at, text in enumerate(choice.specs)))


def _without(layer: Layer, tie: Sequence[str], spec: str) -> Layer:
    places = [at for at, site in enumerate(layer.sites) if site in tie]
    gone = [choice for choice in layer.choices if all(choice.specs[at] == spec for at in places)]
    return replace(layer, choices=tuple(choice for choice in layer.choices if choice not in gone))


@dataclass(frozen=True, slots=True)
class Slower:
    """A choice that gains no time: ``than`` has no more harm and takes no longer. Times in seconds."""

    sites: tuple[str, ...]
    specs: tuple[str, ...]
    seconds: float
    than: tuple[str, ...]
    than_seconds: float

    def __str__(self) -> str:
        named = ", ".join(f"{site} as {spec}" for site, spec in zip(self.sites, self.specs, strict=True))
        return (
            f"{named} has no winning kernel: {1e6 * self.seconds:,.1f} us; "
            f"{', '.join(self.than)} takes {1e6 * self.than_seconds:,.1f} us"
        )


def slower(layers: Sequence[Layer]) -> list[Slower]:
    """Choices for which another one of their layer has no more harm and no more latency, and less of one of them.

    They can still be worth their bytes. The fastest of the choices that beat one is named. Without latencies: none.
    """
    found = []
    for layer in layers:
        for choice in layer.choices if any(choice.cost.latency for choice in layer.choices) else ():
            own = (choice.harm, choice.cost.latency)
            better = [
                other
                for other in layer.choices
                if (other.harm, other.cost.latency) != own
                and other.harm <= choice.harm
                and other.cost.latency <= choice.cost.latency
            ]
            if better:
                best = min(better, key=lambda other: other.cost.latency)
                found.append(Slower(layer.sites, choice.specs, choice.cost.latency, best.specs, best.cost.latency))
    return found
