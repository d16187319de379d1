"""Bits that change during training: progressive (8 -> 6 -> the plan's) and cyclic precision.

Every change goes through `Quantizer.set_format`, which keeps the represented range: ``s_new = s_old * qmax_old /
qmax_new``. Only integer formats change, and each curriculum ends at the plan's own formats, so what is trained at the
end is what the plan says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from bitwright.errors import TrainingError
from bitwright.flow.prepare import plan_of
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.formats import FORMATS, Format
from bitwright.plan.site import Site
from bitwright.train.groups import quantizers_of

LEAST, MOST = 2, 8


@dataclass(frozen=True, slots=True)
class Progressive:
    """Bits that fall in equal steps over the first ``until`` of the run; a site never goes below its own bits.

    Starting at more bits keeps the weights near the float model while they adapt (APoT, Li 2020, starts b bits from
    b + 1).

    >>> falling = Progressive((8, 6), until=0.5)
    >>> [falling.bits_at(step, 100, own=4) for step in (0, 24, 25, 49, 50, 99)]
    [8, 8, 6, 6, 4, 4]
    """

    bits: tuple[int, ...] = (8, 6)
    until: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", tuple(self.bits))
        _check(self.until, self.bits)
        if not self.bits or list(self.bits) != sorted(set(self.bits), reverse=True):
            raise TrainingError(f"Progressive(bits=...) must fall from step to step, got {self.bits}")

    def bits_at(self, step: int, steps: int, own: int) -> int:
        """Bits of a site whose plan says ``own``, at a step of a run."""
        stage = int(len(self.bits) * step / (self.until * steps))
        return own if stage >= len(self.bits) else max(own, self.bits[stage])


@dataclass(frozen=True, slots=True)
class Cyclic:
    """Cyclic precision (CPT, Fu 2021, eq. 1): bits rise from ``low`` to ``high`` in each of ``cycles`` cycles.

    ``b = low + (high - low) * (1 - cos(pi * t)) / 2`` with t in [0, 1) the position in the cycle, rounded; after
    ``until`` of the run every site has its own bits.

    >>> cyclic = Cyclic(low=3, high=8, cycles=2, until=0.5)
    >>> [cyclic.bits_at(step, 100, own=4) for step in (0, 12, 24, 25, 49, 50)]
    [3, 5, 8, 3, 8, 4]
    """

    low: int = 3
    high: int = 8
    cycles: int = 8
    until: float = 0.5

    def __post_init__(self) -> None:
        _check(self.until, (self.low, self.high))
        if not (isinstance(self.cycles, int) and self.cycles >= 1) or self.low >= self.high:
            raise TrainingError(f"Cyclic needs low < high and cycles >= 1, got {self.low}, {self.high}, {self.cycles}")

    def bits_at(self, step: int, steps: int, own: int) -> int:
        """Bits of a site whose plan says ``own``, at a step of a run."""
        share = step / (self.until * steps)
        if share >= 1:
            return own
        position = share * self.cycles % 1.0
        return round(self.low + (self.high - self.low) * 0.5 * (1 - math.cos(math.pi * position)))


Precision = Progressive | Cyclic


def set_bits(model: nn.Module, precision: Precision, step: int, steps: int) -> None:
    """Give every integer quantizer its format for a step; what has it already is left alone."""
    for quantizer, own in _changing(model):
        bits = precision.bits_at(step, steps, own.bits)
        fmt = own if bits == own.bits else FORMATS[f"{_family(own)}{bits}"]
        if quantizer.spec.format != fmt:
            quantizer.set_format(fmt)


def set_own_bits(model: nn.Module) -> None:
    """Give every quantizer the format of the plan again."""
    for quantizer, own in _changing(model):
        if quantizer.spec.format != own:
            quantizer.set_format(own)


def own_bits(model: nn.Module) -> bool:
    """Whether every quantizer has the format of the plan."""
    return all(quantizer.spec.format == own for quantizer, own in _changing(model))


def formats_of(model: nn.Module) -> dict[str, str]:
    """The present formats of quantizers whose bits can change, by site."""
    return {quantizer.site: quantizer.spec.format.name for quantizer, _ in _changing(model)}


def restore_formats(model: nn.Module, formats: dict[str, str]) -> None:
    """Take formats as they are, for scales that were stored with them."""
    for quantizer, _ in _changing(model):
        quantizer.spec = replace(quantizer.spec, format=FORMATS[formats[quantizer.site]])


def _changing(model: nn.Module) -> Iterator[tuple[Quantizer, Format]]:
    """Quantizers whose bits can change (intN and uintN), with their formats in the plan."""
    sites = plan_of(model).sites
    for quantizer in quantizers_of(model):
        spec = sites[Site.parse(quantizer.site)]
        if (
            spec is not None
            and spec.format.is_integer
            and spec.format.name == f"{_family(spec.format)}{spec.format.bits}"
        ):
            yield quantizer, spec.format


def _family(fmt: Format) -> str:
    return fmt.name.rstrip("0123456789")


def _check(until: float, bits: tuple[int, ...]) -> None:
    if not 0 < until <= 1:
        raise TrainingError(f"expected 0 < until <= 1, the share of the run in which bits change; got {until}")
    if not all(isinstance(b, int) and LEAST <= b <= MOST for b in bits):
        raise TrainingError(f"bits must be whole numbers from {LEAST} to {MOST}, got {bits}")
