"""What activations look like on their way into their modules: ends, moments, share of zeros, quantiles.

A range is chosen from these: far ends beside the quantiles mean outliers that a percentile or MSE observer clips, a
minimum of 0 means unsigned codes without a zero point, many zeros that ReLU is at work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from bitwright.errors import SearchError
from bitwright.graph.dataflow import call, evaluating
from bitwright.harm.alone import Activations, Forward, passed_in
from bitwright.observe.histogram import Histogram
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site, matching

QUANTILES = (0.001, 0.01, 0.5, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Distribution:
    """All values of one activation; ``zeros`` is a share in [0, 1].

    ``quantiles`` are those of `QUANTILES`, to the width of a bin (1 / 2048 of the range or less).
    """

    count: int
    least: float
    most: float
    mean: float
    deviation: float
    zeros: float
    quantiles: tuple[float, ...]


@torch.no_grad()
def distributions(
    model: nn.Module, plan: Plan, batches: Sequence[Any], sites: str = "*", *, forward: Forward = call
) -> dict[str, Distribution]:
    """The distribution of each activation that the pattern selects, in the float model, over all batches.

    Activations that lie inside their module (hidden states, probabilities) are left out; those that share a quantizer
    are one, under the name of their leader. Raises `SearchError` where none is left, where one never occurred, and for
    values that are not finite.
    """
    chosen = [site for site in matching(sites, plan.sites) if not site.is_weight and passed_in(site)]
    leaders = list(dict.fromkeys(plan.shared.get(site, site) for site in chosen))
    if not leaders:
        raise SearchError(f"{sites!r} selects no activation that is passed to a module; use a pattern like '*.input'")
    seen = {site: _Seen() for site in leaders}
    held = Activations(model, plan, [], [], forward)
    with evaluating(held.model), held.at(leaders, lambda site, x: seen[site].update(site, x)):
        for batch in batches:
            forward(held.model, batch)
    return {str(site): one.found(site) for site, one in seen.items()}


def distribution_table(found: dict[str, Distribution]) -> Table:
    """One row per activation."""
    table = Table(title="Activations", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("site")
    for name in ("least", *(f"{100 * share:g} %" for share in QUANTILES), "most", "mean", "deviation", "zeros"):
        table.add_column(name, justify="right", no_wrap=True)
    for site, one in found.items():
        values = (one.least, *one.quantiles, one.most, one.mean, one.deviation)
        table.add_row(site, *(f"{value:.3g}" for value in values), f"{100 * one.zeros:.0f} %")
    return table


class _Seen:
    def __init__(self) -> None:
        self.histogram = Histogram()
        self.count, self.total, self.squares, self.zeros = 0, 0.0, 0.0, 0
        self.last: Tensor | None = None

    def update(self, site: Site, x: Tensor) -> None:
        if x is self.last:  # one tensor, several readers
            return
        self.last = x
        if not x.isfinite().all():
            raise SearchError(f"{site} has values that are not finite; look at the data")
        self.histogram.update(x)
        values = x.double()
        self.count += x.numel()
        self.total += values.sum().item()
        self.squares += values.square().sum().item()
        self.zeros += int((x == 0).sum())

    def found(self, site: Site) -> Distribution:
        if not self.count:
            raise SearchError(f"{site} never occurred on the data; look at the batches, or leave it out")
        mean = self.total / self.count
        return Distribution(
            self.count,
            self.histogram.lo.item(),
            self.histogram.hi.item(),
            mean,
            math.sqrt(max(self.squares / self.count - mean**2, 0.0)),
            self.zeros / self.count,
            tuple(self.histogram.quantile(share).item() for share in QUANTILES),
        )
