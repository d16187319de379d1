"""Observers: a stream of tensors -> the range that static activation scales are chosen from.

An observer sees every calibration batch once, in bounded memory, and answers with `QParams`. Under
``torch.distributed`` its `reduce` makes all ranks agree before the answer is taken. Spelling in plans and on the
command line: ``minmax``, ``ema`` or ``ema:0.99``, ``percentile`` or ``percentile:99.99``, ``mse``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from bitwright.errors import CalibrationError, SpecError
from bitwright.numerics.affine import choose_qparams
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.observe.fit import search_range
from bitwright.observe.histogram import NOTHING_SEEN, Histogram, all_reduce


class Observer(Protocol):
    """Turns tensors into a range; one range for the whole tensor."""

    def update(self, x: Tensor) -> None:
        """Take in one finite tensor of any shape; one without elements changes nothing."""
        ...

    def reduce(self) -> None:
        """Make all ranks of a distributed run hold the state of the whole data."""
        ...

    def qparams(self, spec: QuantSpec) -> QParams:
        """Scale and zero point, shape ``[1]``, for the range seen so far; `CalibrationError` when nothing was seen."""
        ...


OBSERVERS: dict[str, Callable[..., Observer]] = {}


def register_observer(name: str) -> Callable[[type], type]:
    """Class decorator that makes an observer available under ``name`` (optionally ``name:number``)."""

    def add(cls: type) -> type:
        if name in OBSERVERS:
            raise SpecError(f"observer {name!r} is registered already")
        OBSERVERS[name] = cls
        return cls

    return add


def make_observer(text: str) -> Observer:
    """A new observer from its spelling; raises `SpecError` for unknown names and unreadable numbers.

    >>> type(make_observer("percentile:99.9")).__name__
    'Percentile'
    """
    name, _, argument = text.partition(":")
    if name not in OBSERVERS:
        raise SpecError(f"unknown observer {text!r}; known observers: {', '.join(sorted(OBSERVERS))}")
    try:
        return OBSERVERS[name](*([float(argument)] if argument else []))
    except (TypeError, ValueError) as cause:
        raise SpecError(f"cannot read observer {text!r}: {cause}") from cause


@register_observer("minmax")
class MinMax:
    """The smallest and largest value ever seen: nothing is clipped, outliers decide."""

    def __init__(self) -> None:
        self.lo, self.hi = torch.tensor([torch.inf]), torch.tensor([-torch.inf])

    def update(self, x: Tensor) -> None:  # noqa: D102
        if x.numel():
            lo, hi = x.detach().aminmax()
            self.lo, self.hi = (
                torch.minimum(self.lo, lo.float().cpu()),
                torch.maximum(self.hi, hi.float().cpu()),
            )

    def reduce(self) -> None:  # noqa: D102
        all_reduce(self.lo, dist.ReduceOp.MIN)
        all_reduce(self.hi, dist.ReduceOp.MAX)

    def qparams(self, spec: QuantSpec) -> QParams:  # noqa: D102
        if self.lo > self.hi:
            raise CalibrationError(NOTHING_SEEN)
        return choose_qparams(self.lo, self.hi, spec)


@register_observer("ema")
class Ema:
    """Exponential moving average of batch extremes: ``r <- a r + (1 - a) r_batch``; the first batch sets r.

    With ``a`` = 0.99 it remembers about the last 69 batches: meant for training, not for a short calibration.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay must lie between 0 and 1, got {decay}")
        self.decay = decay
        self.range: Tensor | None = None

    def update(self, x: Tensor) -> None:  # noqa: D102
        if not x.numel():
            return
        batch = torch.stack(x.detach().aminmax()).float().cpu()
        self.range = batch if self.range is None else self.decay * self.range + (1 - self.decay) * batch

    def reduce(self) -> None:
        """The mean over the ranks that saw data."""
        total = torch.zeros(3) if self.range is None else torch.cat([self.range, torch.ones(1)])
        all_reduce(total, dist.ReduceOp.SUM)
        self.range = total[:2] / total[2] if total[2] else None

    def qparams(self, spec: QuantSpec) -> QParams:  # noqa: D102
        if self.range is None:
            raise CalibrationError(NOTHING_SEEN)
        lo, hi = self.range
        return choose_qparams(lo.view(1), hi.view(1), spec)


class _OnHistogram:
    """Observers that decide on the histogram of all values."""

    def __init__(self) -> None:
        self.histogram = Histogram()

    def update(self, x: Tensor) -> None:
        self.histogram.update(x)

    def reduce(self) -> None:
        self.histogram.reduce()


@register_observer("percentile")
class Percentile(_OnHistogram):
    """The range that holds ``percent`` % of all values, half of the rest cut at either end."""

    def __init__(self, percent: float = 99.99) -> None:
        super().__init__()
        if not 50 < percent <= 100:
            raise ValueError(f"the percentile must lie above 50 and at most at 100, got {percent}")
        self.tail = (100 - percent) / 200

    def qparams(self, spec: QuantSpec) -> QParams:  # noqa: D102
        return choose_qparams(self.histogram.quantile(self.tail), self.histogram.quantile(1 - self.tail), spec)


@register_observer("mse")
class Mse(_OnHistogram):
    """The clipping range with the least mean squared quantization error, found on a histogram."""

    def qparams(self, spec: QuantSpec) -> QParams:  # noqa: D102
        values, counts = self.histogram.points()
        return search_range(values.unsqueeze(0), spec, counts.unsqueeze(0))
