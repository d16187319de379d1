"""Allocations are optimal: published instances, exhaustive search on small ones, and the walks along the hull."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.costs.cost import Cost
from bitwright.errors import SearchError
from bitwright.search.allocate import allocate
from bitwright.search.budget import Allocation, Budget, Choice, Layer
from bitwright.search.front import greedy, pareto

# HAWQ-V3's released data of ResNet-18: 19 layers at 4 or 8 bits.
TRACE = (
    ".06857826 .03162379 .03298575 .01205663 .02222431 .00596336 .06931772 .00807129 .00372905 .00530698 .00209011 "
    ".00737569 .00210454 .00151197 .00158041 .00078146 .00451841 .00098745 .00072944"
)
ERROR = {
    8: (
        ".0235 .0125 .0102 .0082 .0145 .0344 .0023 .0287 .0148 .0333 .0682 .0027 .0448 .0336 .0576 .1130 .0102 .0947 "
        ".0532"
    ),
    4: (
        "6.7430 3.9691 3.3281 2.6796 4.7277 10.5966 .6827 9.0942 4.8857 10.7599 21.7546 .8603 14.5324 10.9651 18.7706 "
        "36.4044 3.1572 29.6994 17.4016"
    ),
}
LATENCY = {
    4: (
        ".21094404 .21092674 .21104113 .21086851 .13642465 .19167506 .02532183 .19148203 .19142914 .11395316 .20556011 "
        ".01917474 .20566918 .20566509 .13185102 .22287786 .01790088 .22304611 .22286099"
    ),
    8: (
        ".36189111 .36211718 .31141909 .30454471 .19184896 .38948934 .0334169 .38904905 .3892859 .19134735 .34307431 "
        ".02802354 .34313329 .34310756 .21117103 .37376585 .02896843 .37398187 .37405185"
    ),
}
PARAMS = [*[36864] * 4, 73728, 147456, 8192, *[147456] * 2, 294912, 589824, 32768, *[589824] * 2, 1179648, 2359296]
PARAMS += [131072, *[2359296] * 2]
MACS = [
    {4: 57802752, 9: 57802752, 14: 57802752, 6: 6422528, 11: 6422528, 16: 6422528}.get(i, 115605504) for i in range(19)
]
TIES = [("4", "6"), ("9", "11"), ("14", "16")]


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def hawq() -> list[Layer]:
    """Sizes in MiB, latency in ms, bit operations in the published units (millions, 64 at 4 bits are 1)."""
    layers = []
    for i, trace in enumerate(numbers(TRACE)):
        choices = []
        for bits in (4, 8):
            size, bops = PARAMS[i] / 2**20 * bits / 8, MACS[i] / 1e6 * bits**2 / 1024
            cost = Cost(bytes=size, bops=bops, latency=numbers(LATENCY[bits])[i])
            choices.append(Choice((str(bits),), trace * numbers(ERROR[bits])[i], cost))
        layers.append(Layer((str(i),), tuple(choices)))
    return layers


INSTANCES = {
    "bytes": (7.98047, "8 8 8 8 8 8 8 8 8 8 8 8 8 8 8 4 8 4 4", 0.074506, 7.26562, 0.074506),
    "bops": (66.23232, "8 8 8 4 8 8 8 8 4 8 8 8 4 4 4 4 4 4 4", 0.215689, 65.0281, 0.217223),
    "latency": (4.24618, "8 8 8 8 8 4 8 8 4 8 8 8 4 4 8 4 8 4 4", 0.202674, 4.2201, 0.202674),
}


@pytest.mark.parametrize("resource", INSTANCES)
def test_hawq_resnet18(resource: str) -> None:
    limit, bits, harm, used, walked = INSTANCES[resource]
    found = allocate(hawq(), Budget(**{resource: limit}), ties=TIES)
    assert " ".join(found.sites[str(i)] for i in range(19)) == bits
    assert found.harm == pytest.approx(harm, abs=1e-6)
    assert getattr(found.cost, resource) == pytest.approx(used, abs=1e-4)
    assert found.gap == 0
    assert greedy(hawq(), limit, resource, ties=TIES).harm == pytest.approx(walked, abs=1e-6)


def test_hawq_limits_are_half_way_and_ends_are_those_published() -> None:
    for resource, (limit, *_) in INSTANCES.items():
        ends = [sum(getattr(layer.choices[i].cost, resource) for layer in hawq()) for i in (0, 1)]
        assert sum(ends) / 2 == pytest.approx(limit, abs=1e-5)
    front = pareto(hawq(), "bytes", ties=TIES)
    assert (front[0].harm, front[-1].harm) == (pytest.approx(1.307713, abs=1e-6), pytest.approx(0.004258, abs=1e-6))


SPECS = "abcd"
number = st.integers(0, 50).map(float)
costs = st.builds(Cost, bytes=number, latency=number, energy=number, bops=number, live=number)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Layer], list[tuple[str, ...]], Budget, Cost]:
    layers = []
    for i in range(draw(st.integers(1, 4))):
        width = draw(st.integers(1, 2))
        specs = draw(st.sets(st.tuples(*[st.sampled_from(SPECS)] * width), min_size=1, max_size=4))
        harms = st.floats(0, 10).map(lambda x: round(x, 3))
        choices = tuple(Choice(spec, draw(harms), draw(costs)) for spec in sorted(specs))
        layers.append(Layer(tuple(f"{i}.{place}" for place in range(width)), choices))
    sites = [site for layer in layers for site in layer.sites]
    ties = [tuple(draw(st.permutations(sites))[:2])] if len(sites) > 1 and draw(st.booleans()) else []
    limits = {
        name: draw(st.integers(0, 60 * len(layers))) for name in draw(st.sets(st.sampled_from(LIMITS), max_size=3))
    }
    return layers, ties, Budget(**limits), draw(costs)


LIMITS = ("drop", "bytes", "latency", "energy", "bops", "peak_memory")


def value(name: str, found: Allocation) -> float:
    return found.harm if name in ("drop", "harm") else getattr(found.cost, name)


def all_of(layers: Sequence[Layer], ties: Sequence[tuple[str, ...]], fixed: Cost) -> Iterator[Allocation]:
    """Every allocation in which tied sites agree."""
    for picked in itertools.product(*(layer.choices for layer in layers)):
        sites = {
            s: spec
            for layer, c in zip(layers, picked, strict=True)
            for s, spec in zip(layer.sites, c.specs, strict=True)
        }
        if all(len({sites[site] for site in tie}) == 1 for tie in ties):
            yield Allocation(sites, math.fsum(c.harm for c in picked), sum((c.cost for c in picked), fixed))


def answered(ask: Callable[[], Allocation]) -> Allocation | None:
    try:
        return ask()
    except SearchError as cause:
        if not any(text in str(cause) for text in ("no choice has one", "smallest", "in common")):
            raise
        return None


@given(problems(), st.sampled_from(["harm", "bytes", "bops", "peak_memory"]))
def test_allocations_are_those_of_exhaustive_search(problem: tuple, minimize: str) -> None:
    layers, ties, budget, fixed = problem
    fitting = [f for f in all_of(layers, ties, fixed) if all(value(n, f) <= m for n, m in budget.limits().items())]
    found = answered(lambda: allocate(layers, budget, ties=ties, fixed=fixed, minimize=minimize))
    if found is None:
        keys = {"peak_memory": "live"}
        needed = {keys.get(name, name) for name in (*budget.limits(), minimize)} - {"drop", "harm"}
        without = [k for k in needed if not any(getattr(c.cost, k) for layer in layers for c in layer.choices)]
        assert without or not fitting
        return
    assert fitting
    assert all(value(name, found) <= limit for name, limit in budget.limits().items())
    assert value(minimize, found) == pytest.approx(min(value(minimize, f) for f in fitting), abs=1e-6)
    assert any(f.sites == found.sites for f in fitting)


@given(problems())
def test_the_front_is_optimal_at_each_of_its_costs(problem: tuple) -> None:
    layers, ties, _, fixed = problem
    every = list(all_of(layers, ties, fixed))
    if not every:
        with pytest.raises(SearchError, match="no spec in common"):
            pareto(layers, ties=ties, fixed=fixed)
        return
    front = pareto(layers, ties=ties, fixed=fixed)
    for point in front:
        assert any(f.sites == point.sites for f in every)
        best = min(f.harm for f in every if f.cost.bytes <= point.cost.bytes)
        assert point.harm == pytest.approx(best, abs=1e-9)
    assert front[0].cost.bytes == min(f.cost.bytes for f in every)
    assert front[-1].harm == pytest.approx(min(f.harm for f in every))
    assert greedy(layers, front[-1].cost.bytes, ties=ties, fixed=fixed) == front[-1]


def test_more_bytes_never_do_more_harm() -> None:
    layers = random_layers(12, 4)
    least, most = (sum(layer.choices[i].cost.bytes for layer in layers) for i in (0, -1))
    limits = [least + (most - least) * i / 30 for i in range(31)]
    harms = [allocate(layers, Budget(bytes=limit)).harm for limit in limits]
    assert harms == sorted(harms, reverse=True)
    assert allocate(layers, Budget(bytes=10 * most)).harm == math.fsum(layer.choices[-1].harm for layer in layers)
    assert all(greedy(layers, limit).harm >= harm - 1e-12 for limit, harm in zip(limits, harms, strict=True))


def random_layers(count: int, widths: int) -> list[Layer]:
    generator = random.Random(0)
    layers = []
    for i in range(count):
        size, base = generator.randint(1000, 4_000_000), 10 ** generator.uniform(-5, 0)
        bits = (2, 3, 4, 5, 6, 7, 8, 16)[:widths]
        harms = [base * 4.0**-b * generator.uniform(0.8, 1.2) for b in bits]
        choices = [Choice((f"int{b}",), h, Cost(bytes=-(-size * b // 8))) for b, h in zip(bits, harms, strict=True)]
        layers.append(Layer((f"{i}.weight",), tuple(choices)))
    return layers


def test_three_hundred_layers_take_about_a_second() -> None:
    layers = random_layers(300, 8)
    limit = sum(layer.choices[-1].cost.bytes for layer in layers) / 4
    start = time.process_time()
    found = allocate(layers, Budget(bytes=limit))
    assert time.process_time() - start < 5  # 0.5 to 1.1 s measured; slack for slower machines
    assert found.gap == 0
    assert found.cost.bytes <= limit
    assert found.harm <= greedy(layers, limit).harm


def test_budgets_that_nothing_meets_say_what_would() -> None:
    layers = random_layers(3, 4)
    least = sum(layer.choices[0].cost.bytes for layer in layers)
    with pytest.raises(SearchError, match=f"bytes 10; the smallest that any choice reaches is bytes {least:.0f}"):
        allocate(layers, Budget(bytes=10))
    with pytest.raises(SearchError, match=f"bytes 10; the smallest that any choice reaches is bytes {least:.0f}"):
        greedy(layers, 10)
    assert allocate(layers, Budget(bytes=least)).cost.bytes == least


def test_limits_that_exclude_each_other_are_named_together() -> None:
    small, fast = Choice(("a",), 0.0, Cost(bytes=1, latency=9)), Choice(("b",), 0.0, Cost(bytes=5, latency=2))
    with pytest.raises(SearchError, match="with the other limits kept: bytes 5 or latency 9"):
        allocate([Layer(("x",), (small, fast))], Budget(bytes=4, latency=3))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: Budget(bytes=-1), "at least 0, found bytes=-1"),
        (lambda: Budget(bytes=math.nan), "found bytes=nan"),
        (lambda: Choice(("a",), -0.1, Cost()), "harm of a must be a finite number of at least 0, got -0.1"),
        (lambda: Layer(("x",), ()), "x: no choices"),
        (lambda: Layer(("x",), (Choice(("a", "b"), 0.0, Cost()),)), "one spec per site, found 2 specs"),
        (lambda: allocate([], Budget()), "nothing to allocate"),
        (lambda: allocate(random_layers(2, 2), Budget(latency=1)), "latency is limited or minimized, but no choice"),
        (lambda: allocate(random_layers(2, 2), Budget(), minimize="joy"), "minimize is one of"),
        (lambda: allocate(random_layers(2, 2), Budget(), ties=[("0.weight", "7.weight")]), "7.weight has no choices"),
        (lambda: pareto(random_layers(2, 2), "peak_memory"), "a front is over one of"),
    ],
)
def test_what_cannot_be_asked(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        ask()


def test_sites_of_one_layer_can_be_tied() -> None:
    choices = [Choice((a, b), float(a != b), Cost(bytes=len(a + b))) for a in ("x", "yy") for b in ("x", "yy")]
    front = pareto([Layer(("0.a", "0.b"), tuple(choices))], ties=[("0.a", "0.b")])
    assert [tuple(point.sites.values()) for point in front] == [("x", "x")]
