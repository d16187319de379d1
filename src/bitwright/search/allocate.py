"""`allocate`: one choice for each layer, so that the harm is least and a budget is kept. Exactly.

A multiple-choice knapsack with side constraints: a binary per layer and choice, one choice per layer, tied sites agree,
sums stay within the budget. HiGHS solves it to a gap of 0 in milliseconds to seconds (HAWQ-V3, Yao 2021, section 3.4,
solves the same program).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult, milp
from scipy.sparse import csr_array, hstack

from bitwright.costs.cost import Cost
from bitwright.errors import SearchError
from bitwright.search.budget import RESOURCES, Allocation, Budget, Choice, Layer, Ties, summed
from bitwright.search.dominance import undominated

Rule = tuple[Any, Any, Any]
"""Rows, and the lower and upper bounds of their sums."""


def allocate(
    layers: Sequence[Layer],
    budget: Budget,
    *,
    ties: Ties = (),
    fixed: Cost | None = None,
    minimize: str = "harm",
    seconds: float = 60.0,
) -> Allocation:
    """The choices of least harm within ``budget``, or of least ``bytes`` ... where ``minimize`` says so.

    ``ties`` are groups of sites that must get one spec; ``fixed`` is the cost of everything that is not chosen. A limit
    on ``drop`` is one on the summed harm, in its units. After ``seconds`` the best solution so far is returned with its
    ``gap``. A choice that another one of its layer beats in harm or a cost and matches in all others is never taken.
    Raises `SearchError` for a budget that nothing meets, with the smallest values that something does, and for
    a limit on what no choice has a number for.

    >>> bits = [Choice((f"int{b}",), harm, Cost(bytes=b)) for b, harm in ((2, 1.0), (4, 0.25), (8, 0.0))]
    >>> layers = [Layer(("a",), tuple(bits)), Layer(("b",), tuple(bits))]
    >>> allocate(layers, Budget(bytes=10)).sites
    {'a': 'int4', 'b': 'int4'}
    """
    problem = _Problem(layers, ties, fixed or Cost())
    problem.check(budget, minimize)
    found = problem.solve(minimize, budget.limits(), seconds)
    if isinstance(found, OptimizeResult):
        if found.status == 2:
            raise SearchError(_smallest(problem, budget, seconds))
        raise SearchError(f"no allocation was found within {seconds:g} s: {found.message}; allow more seconds")
    return found


def _smallest(problem: _Problem, budget: Budget, seconds: float) -> str:
    """Why a budget cannot be met: the smallest value of each limit, alone or with the others."""
    limits = budget.limits()
    asked = ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
    single = {name: problem.solve(name, {}, seconds) for name in limits}
    lowest = {name: problem.value(name, found) for name, found in single.items() if isinstance(found, Allocation)}
    over = [f"{name} {value:.12g}" for name, value in lowest.items() if value > limits[name]]
    if over:
        return f"nothing meets the budget of {asked}; the smallest that any choice reaches is {', '.join(over)}"
    if not lowest:
        return "the ties leave no choice: tied sites have no spec in common"
    joint = []
    for name in limits:
        found = problem.solve(name, {k: v for k, v in limits.items() if k != name}, seconds)
        if isinstance(found, Allocation):
            joint.append(f"{name} {problem.value(name, found):.12g}")
    return f"nothing meets the budget of {asked}; the smallest with the other limits kept: {' or '.join(joint)}"


class _Problem:
    """The integer program: binaries per layer and choice, and behind them the peak of memory."""

    def __init__(self, layers: Sequence[Layer], ties: Ties, fixed: Cost) -> None:
        if not layers:
            raise SearchError("there is nothing to allocate: no layer has choices")
        ties = [list(tie) for tie in ties]
        self.all, self.layers, self.fixed = layers, undominated(layers, ties), fixed
        self.flat = [(at, choice) for at, layer in enumerate(self.layers) for choice in layer.choices]
        owners = np.array([at for at, _ in self.flat])
        rows = [(owners[None] == np.arange(len(layers))[:, None]).astype(float), *self._equal(ties)]
        right = [1.0] * len(layers) + [0.0] * (len(rows) - 1)
        self.rules: Rule = (csr_array(np.vstack(rows)), right, right)

    def _equal(self, ties: Ties) -> Iterator[np.ndarray]:
        """Rows that are 0 where two tied sites have one spec: for each spec, as often here as there."""
        holders = {site: (at, place) for at, layer in enumerate(self.layers) for place, site in enumerate(layer.sites)}
        for sites in ties:
            first, *others = sites
            unknown = [site for site in (first, *others) if site not in holders]
            if unknown:
                raise SearchError(f"tied site {unknown[0]} has no choices; name sites of the layers")
            for other in others:
                (a, i), (b, k) = holders[first], holders[other]
                specs = {choice.specs[i] for choice in self.layers[a].choices}
                for spec in sorted(specs | {choice.specs[k] for choice in self.layers[b].choices}):
                    here = [float(at == a and choice.specs[i] == spec) for at, choice in self.flat]
                    there = [float(at == b and choice.specs[k] == spec) for at, choice in self.flat]
                    yield np.array(here) - np.array(there)

    def check(self, budget: Budget, minimize: str) -> None:
        """Refuse limits and goals that no number stands behind."""
        if minimize not in ("harm", *RESOURCES):
            raise SearchError(f"minimize is one of harm, {', '.join(RESOURCES)}; got {minimize!r}")
        for name in (*budget.limits(), minimize):
            if name in ("drop", "harm"):
                continue
            key = "live" if name == "peak_memory" else name
            if not any(getattr(choice.cost, key) for layer in self.all for choice in layer.choices):
                raise SearchError(f"{name} is limited or minimized, but no choice has one; give its cost first")

    def value(self, name: str, found: Allocation) -> float:
        """The value of a resource or of the harm."""
        return found.harm if name in ("drop", "harm") else getattr(found.cost, name)

    def numbers(self, name: str) -> np.ndarray:
        """What each binary adds to a sum."""
        if name in ("drop", "harm"):
            return np.array([choice.harm for _, choice in self.flat])
        return np.array([getattr(choice.cost, name) for _, choice in self.flat], dtype=float)

    def solve(self, minimize: str, limits: Mapping[str, float], seconds: float) -> Allocation | OptimizeResult:
        """The optimum; what the solver said where it found none.

        A solver keeps limits to about 1e-6 of them; a limit that its answer exceeds is lowered by what it is over.
        """
        allowed = dict(limits)
        while True:
            found = self._solve(minimize, allowed, seconds)
            if isinstance(found, OptimizeResult):
                return found
            over = {name: self.value(name, found) - limit for name, limit in limits.items()}
            if max(over.values(), default=0.0) <= 0:
                return found
            for name, excess in over.items():
                allowed[name] -= max(excess, 0.0)

    def _solve(self, minimize: str, limits: Mapping[str, float], seconds: float) -> Allocation | OptimizeResult:
        count, rules = len(self.flat), [self.rules]
        sums = {name: limit for name, limit in limits.items() if name != "peak_memory"}
        rules += [_at_most(self.numbers(name), limit - self._fixed(name)) for name, limit in sums.items()]
        goal = None if minimize == "peak_memory" else self._above_least(self.numbers(minimize))
        integral, upper = np.ones(count), np.ones(count)
        if "peak_memory" in limits or goal is None:  # one more variable: the peak without the fixed bytes
            unit = float(self.numbers("bytes").sum() + self.numbers("live").max() + self.fixed.live)
            rules = [*(_widened(rule) for rule in rules), self._peak(unit)]
            goal = np.append(np.zeros(count), 1.0) if goal is None else np.append(goal, 0.0)
            integral = np.append(integral, 0.0)
            upper = np.append(upper, max(limits.get("peak_memory", math.inf) - self.fixed.bytes, 0.0) / unit)
        options = {"mip_rel_gap": 0.0, "time_limit": seconds}
        found = milp(
            goal, constraints=rules, bounds=(np.zeros(len(upper)), upper), integrality=integral, options=options
        )
        if found.x is None:
            return found
        picked = [choice for (_, choice), chosen in zip(self.flat, found.x, strict=False) if chosen > 0.5]
        return summed(self.layers, picked, self.fixed, float(found.mip_gap or 0.0))

    def _fixed(self, name: str) -> float:
        return 0.0 if name == "drop" else getattr(self.fixed, name)

    def _above_least(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers above the least of their layer, in units far above the solver's absolute tolerances."""
        least = np.array([min(numbers[i] for i, _ in group) for _, group in self._grouped()])
        above = numbers - least[[at for at, _ in self.flat]]
        positive = above[above > 0]
        return above * (1e3 / np.median(positive)) if len(positive) else above

    def _grouped(self) -> Iterator[tuple[int, list[tuple[int, Choice]]]]:
        for at, group in itertools.groupby(enumerate(self.flat), key=lambda entry: entry[1][0]):
            yield at, [(i, choice) for i, (_, choice) in group]

    def _peak(self, unit: float) -> Rule:
        """Stored bytes of all and live bytes of each layer are at most the last variable, in units of ``unit``."""
        stored, live = self.numbers("bytes"), self.numbers("live")
        rows, right = [], []
        for _, group in self._grouped():
            row = stored.copy()
            row[[i for i, _ in group]] += live[[i for i, _ in group]]
            rows.append(np.append(row / unit, -1.0))
            right.append(0.0)
        rows.append(np.append(stored / unit, -1.0))
        right.append(-self.fixed.live / unit)
        return (np.stack(rows), -np.inf, right)


def _at_most(row: np.ndarray, limit: float) -> Rule:
    unit = abs(limit) or 1.0
    return (row[None] / unit, -np.inf, limit / unit)


def _widened(rule: Rule) -> Rule:
    """A constraint with a further variable that it does not ask about."""
    rows = hstack([csr_array(rule[0]), csr_array((rule[0].shape[0], 1))])
    return (rows, rule[1], rule[2])
