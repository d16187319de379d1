"""Choices that another one beats are never taken; nothing that could be best is lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.costs.cost import Cost
from bitwright.errors import SearchError
from bitwright.search.allocate import allocate
from bitwright.search.budget import Budget, Choice, Layer
from bitwright.search.dominance import slower, undominated

SMALL = st.integers(0, 3)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Layer], list[tuple[str, ...]]]:
    """Layers with one or two sites and few distinct numbers, so that choices tie and beat each other often."""
    layers = []
    for at in range(draw(st.integers(1, 4))):
        sites = tuple(f"{at}.{slot}" for slot in ("weight", "input")[: draw(st.integers(1, 2))])
        choices = [
            Choice(specs, float(draw(SMALL)), Cost(bytes=draw(SMALL), latency=draw(SMALL), live=draw(SMALL)))
            for specs in itertools.product("abc", repeat=len(sites))
        ]
        layers.append(Layer(sites, tuple(choices)))
    names = [site for layer in layers for site in layer.sites]
    tie = draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
    return layers, [tuple(tie)] if len(tie) > 1 else []


def numbers(choices: tuple[Choice, ...]) -> tuple[float, ...]:
    cost = sum((choice.cost for choice in choices), Cost())
    return (sum(choice.harm for choice in choices), cost.bytes, cost.latency, cost.live)


def allocations(layers: list[Layer], ties: list[tuple[str, ...]]) -> list[tuple[Choice, ...]]:
    sites = [site for layer in layers for site in layer.sites]
    found = []
    for picked in itertools.product(*(layer.choices for layer in layers)):
        specs = dict(zip(sites, (spec for choice in picked for spec in choice.specs), strict=True))
        if all(len({specs[site] for site in tie}) == 1 for tie in ties):
            found.append(picked)
    return found


@given(problems())
def test_every_allocation_has_one_as_good_among_the_rest(problem: tuple[list[Layer], list[tuple[str, ...]]]) -> None:
    layers, ties = problem
    kept = {numbers(picked) for picked in allocations(undominated(layers, ties), ties)}
    for picked in allocations(layers, ties):
        own = numbers(picked)
        assert any(all(a <= b for a, b in zip(other, own, strict=True)) for other in kept)


@given(problems(), st.integers(0, 12), st.integers(0, 12))
def test_no_choice_is_taken_that_another_of_its_layer_beats(
    problem: tuple[list[Layer], list[tuple[str, ...]]], stored: int, seconds: int
) -> None:
    layers, ties = problem
    tied = {site for tie in ties for site in tie}
    try:
        found = allocate(layers, Budget(bytes=stored, latency=seconds), ties=ties)
    except SearchError:
        return
    for layer in layers:
        own = next(c for c in layer.choices if c.specs == tuple(found.sites[site] for site in layer.sites))
        for other in layer.choices:
            fits = all(a == b for site, a, b in zip(layer.sites, own.specs, other.specs, strict=True) if site in tied)
            beats = all(a <= b for a, b in zip(numbers((other,)), numbers((own,)), strict=True))
            assert not (fits and beats and numbers((other,)) != numbers((own,)))


@pytest.mark.parametrize("tied", [False, True])
def test_among_choices_of_equal_harm_the_cheaper_one_is_taken(tied: bool) -> None:
    worse = [Choice((f"bad{at}",), 0.0, Cost(bytes=8 + at, latency=10)) for at in range(4)]
    choices = (*worse[:2], Choice(("good",), 0.0, Cost(bytes=4, latency=10)), *worse[2:])
    layers = [Layer((name,), choices) for name in "xyz"]
    found = allocate(layers, Budget(), ties=[("x", "y", "z")] if tied else ())
    assert set(found.sites.values()) == {"good"}


def test_a_spec_of_a_tie_that_another_beats_everywhere_goes() -> None:
    def layer(name: str, times: dict[str, float]) -> Layer:
        return Layer((name,), tuple(Choice((spec,), 0.0, Cost(latency=time)) for spec, time in times.items()))

    ties = [("x", "y")]
    mixed = [layer("x", {"a": 1.0, "b": 2.0}), layer("y", {"a": 2.0, "b": 1.0})]
    assert undominated(mixed, ties) == mixed
    beaten = [layer("x", {"a": 1.0, "b": 2.0}), layer("y", {"a": 1.0, "b": 1.0})]
    assert [choice.specs for one in undominated(beaten, ties) for choice in one.choices] == [("a",), ("a",)]
    missing = [layer("x", {"a": 1.0, "b": 2.0}), layer("y", {"b": 1.0})]
    assert allocate(missing, Budget(), ties=ties).sites == {"x": "b", "y": "b"}


def test_a_narrow_width_without_a_winning_kernel_is_named_and_not_taken() -> None:
    choices = (
        Choice(("int8",), 0.0, Cost(bytes=8, latency=10e-6)),
        Choice(("int4",), 0.1, Cost(bytes=4, latency=5e-6)),
        Choice(("int3",), 0.3, Cost(bytes=4, latency=7e-6)),
        Choice(("int2",), 0.9, Cost(bytes=2, latency=6e-6)),
    )
    layer = Layer(("conv.weight",), choices)
    assert [str(row) for row in slower([layer])] == [
        "conv.weight as int3 has no winning kernel: 7.0 us; int4 takes 5.0 us",
        "conv.weight as int2 has no winning kernel: 6.0 us; int4 takes 5.0 us",
    ]
    kept = [choice.specs for choice in undominated([layer])[0].choices]
    assert kept == [("int8",), ("int4",), ("int2",)]  # int2 is still the smallest
    with pytest.raises(SearchError, match="latency is limited"):
        allocate([Layer(("a",), (Choice(("x",), 0.0, Cost()),))], Budget(latency=1.0))
    assert slower([Layer(("a",), (Choice(("x",), 0.0, Cost()), Choice(("y",), 1.0, Cost())))]) == []
