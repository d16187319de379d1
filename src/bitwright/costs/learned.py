"""Seconds of layers whose shapes were not measured, learned from the measured ones of the same kind.

A kind is what a row of the latency table is about except sizes: class, kernel size, depthwise or not, specs, and
whether weights come from a cache or from memory. Within a kind

    seconds = a + b * multiplications + c * bytes of weights + d * elements read and written,    a, b, c, d >= 0,

by least squares of the relative errors (non-negative least squares, Lawson and Hanson 1974). What was measured is not
predicted: its time is that of the table. How far to trust a kind is found by leaving out each of its rows in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls
from torch import nn

from bitwright.costs.cost import Cost
from bitwright.costs.latencies import LatencyTable, MeasuredPrices
from bitwright.costs.workload import Load, Specs
from bitwright.errors import SearchError
from bitwright.plan.plan import Plan

FEWEST = 5
"""Measured shapes of a kind below which nothing is learned: one more than there are coefficients."""


@dataclass(frozen=True, slots=True)
class Learned:
    """Coefficients of each kind, and the mean relative error of rows that were left out when they were found."""

    table: LatencyTable
    coefficients: Mapping[str, tuple[float, float, float, float]]
    errors: Mapping[str, float]

    def seconds(self, load: Load) -> float:
        """Predicted time of a call; raises `SearchError` for a kind of which too few shapes were measured.

        >>> from bitwright.costs.stopwatch import Timing
        >>> rows = {f"{n}": Timing(1e-6 * (5 + n), 0.0, 9) for n in range(1, 7)}
        >>> table = LatencyTable(rows, loads={f"{n}": Load("Linear", 1000 * n, 8, 4) for n in range(1, 7)})
        >>> round(1e6 * learn(table).seconds(Load("Linear", 20_000, 8, 4)), 3)
        25.0
        """
        if load.kind not in self.coefficients:
            known = ", ".join(sorted(self.coefficients)) or "none"
            raise SearchError(
                f"fewer than {FEWEST} shapes of {load.kind} were measured, which is too few to learn from (known: "
                f"{known}); call measure_machine for this model, or for others with such layers"
            )
        return float(np.dot(_features(load), self.coefficients[load.kind]))

    def prices(self, model: nn.Module, plan: Plan, example: Any, paths: Sequence[str]) -> LearnedPrices:
        """What the layers at ``paths`` take, measured or predicted; the whole model must have been measured."""
        return LearnedPrices(self, self.table.prices(model, plan, example, paths))


@dataclass(frozen=True, slots=True)
class LearnedPrices:
    """Seconds of the layers of one model: looked up where measured, predicted elsewhere."""

    learned: Learned
    measured: MeasuredPrices

    def layer(self, path: str, specs: Specs) -> Cost:
        """Seconds of all calls of a layer."""
        work, rows = self.measured.work, self.learned.table.rows
        found = []
        for made in work.calls[path]:
            row = rows.get(work.key(path, specs, made))
            found.append(self.learned.seconds(work.load(path, specs, made)) if row is None else row.seconds)
        return Cost(latency=math.fsum(found))

    def rest(self) -> Cost:
        """The measured time of the whole model, less that of the layers with choices as the plan ships them."""
        return self.measured.less(self.layer)


def learn(table: LatencyTable) -> Learned:
    """Fit every kind of which at least `FEWEST` shapes were measured."""
    groups: dict[str, dict[Load, float]] = {}
    for key, load in table.loads.items():
        groups.setdefault(load.kind, {})[load] = table.rows[key].seconds
    groups = {kind: rows for kind, rows in groups.items() if len(rows) >= FEWEST}
    fitted = {kind: _fit(list(rows), list(rows.values())) for kind, rows in groups.items()}
    return Learned(table, fitted, {kind: _left_out(rows) for kind, rows in groups.items()})


def _features(load: Load) -> tuple[float, float, float, float]:
    return 1.0, load.macs, load.stored, load.moved


def _fit(loads: Sequence[Load], seconds: Sequence[float]) -> tuple[float, float, float, float]:
    """Columns are scaled to 1 at most: counts are 10^6 times a second."""
    rows = np.array([_features(load) for load in loads]) / np.array(seconds)[:, None]
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    a, b, c, d = nnls(rows / scale, np.ones(len(rows)))[0] / scale
    return float(a), float(b), float(c), float(d)


def _left_out(rows: Mapping[Load, float]) -> float:
    errors = []
    for load, seconds in rows.items():
        others = {other: value for other, value in rows.items() if other != load}
        found = np.dot(_features(load), _fit(list(others), list(others.values())))
        errors.append(abs(float(found) - seconds) / seconds)
    return sum(errors) / len(errors)
