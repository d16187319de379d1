"""What `mixture` asks a machine: the seconds and joules of a layer for each choice, and of everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from bitwright.costs.cost import Cost
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan


class Prices(Protocol):
    """Latency and energy of one model on one machine, as costs whose other numbers are 0."""

    def layer(self, path: str, specs: Mapping[str, QuantSpec | None]) -> Cost:
        """Of the layer at ``path`` with these specs by slot."""
        ...

    def rest(self) -> Cost:
        """Of everything but the layers that have choices."""
        ...


class Pricing(Protocol):
    """A machine, measured or described: `costs.latencies.LatencyTable`, `costs.roofline.Machine`."""

    def prices(self, model: nn.Module, plan: Plan, example: Any, paths: Sequence[str]) -> Prices:
        """Its prices for a model that ships by ``plan``, gets ``example`` and has choices at ``paths``."""
        ...
