"""`Curve`: from summed harm to the drop of the whole, by isotonic regression over plans that were measured.

Harm adds up only roughly, but more of it rarely drops less: all that is assumed of the map is that it does not fall.
Among such maps the regression takes the one of least squared error (pool adjacent violators; Barlow 1972, "Statistical
inference under order restrictions", section 1.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression


@dataclass(frozen=True, slots=True)
class Curve:
    """A map that does not fall: ``drop`` at each ``summed`` harm (rising), straight between, constant beyond."""

    summed: tuple[float, ...]
    drop: tuple[float, ...]

    @classmethod
    def fit(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """The map nearest to measured (summed harm, drop); points whose drop is not finite tell nothing.

        >>> Curve.fit([(1.0, 0.2), (2.0, 0.1), (4.0, 0.6)])
        Curve(summed=(1.0, 2.0, 4.0), drop=(0.15, 0.15, 0.6))
        """
        known: dict[float, list[float]] = {}
        for summed, drop in points:
            if math.isfinite(drop):
                known.setdefault(summed, []).append(drop)
        if not known:
            return cls((), ())
        places = sorted(known)
        means, counts = [math.fsum(known[at]) / len(known[at]) for at in places], [len(known[at]) for at in places]
        found = isotonic_regression(means, weights=counts).x
        return cls(tuple(places), tuple(round(value, 15) for value in found.tolist()))

    def at(self, summed: float) -> float:
        """The drop to expect of a plan with this summed harm; NaN where nothing was measured.

        >>> Curve((1.0, 3.0), (0.0, 0.5)).at(2.0)
        0.25
        """
        return float(np.interp(summed, self.summed, self.drop)) if self.summed else math.nan

    def limit(self, drop: float) -> float:
        """The largest summed harm of which at most this drop is expected: 0 where none is, infinite where all are.

        >>> Curve((1.0, 3.0), (0.0, 0.5)).limit(0.125)
        1.5
        """
        if not self.summed or self.drop[-1] <= drop:
            return math.inf
        last = sum(value <= drop for value in self.drop) - 1
        if last < 0:
            return 0.0
        share = (drop - self.drop[last]) / (self.drop[last + 1] - self.drop[last])
        return self.summed[last] + share * (self.summed[last + 1] - self.summed[last])
