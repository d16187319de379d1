"""Observers: a stream of tensors -> the range that static activation scales are chosen from.

An observer sees every calibration batch once, in bounded memory, and answers with `QParams`. Under
``torch.distributed`` its `reduce` makes all ranks agree before the answer is taken. Spelling in plans and on the
command line: a name, and numbers behind a colon, by place or by name.

============================== ===================================================================================
minmax                         the extremes
ema, ema:0.99                  a moving average of the extremes of batches
percentile, percentile:99.99   the range that holds that share of the values
mse                            the range of least squared error
mse:low=-0.169971              likewise, with the lower end known (see `activations.fixed_low`)
kl                             the threshold that loses least information, for 6 bits and more
fixed:0,1                      a range known beforehand (softmax, sigmoid)
============================== ===================================================================================
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
from bitwright.observe import entropy
from bitwright.observe.fit import search_range
from bitwright.observe.histogram import NOTHING_SEEN, Histogram
from bitwright.observe.ranks import all_reduce

_KL_BITS = 6
_SLACK = 0.01  # activations in bfloat16 pass a known end by their rounding


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

    def state(self) -> dict[str, Tensor]:
        """What was seen so far, as tensors that can be stored."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from the `state` of an observer of the same spelling."""
        ...


OBSERVERS: dict[str, Callable[..., Observer]] = {}


def register_observer(name: str) -> Callable[[type], type]:
    """Class decorator that makes an observer available under ``name``, its arguments being numbers."""

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
    >>> make_observer("mse:low=-0.25").low
    -0.25
    """
    name, _, rest = text.partition(":")
    if name not in OBSERVERS:
        raise SpecError(f"unknown observer {text!r}; known observers: {', '.join(sorted(OBSERVERS))}")
    try:
        arguments = [word.rpartition("=") for word in rest.split(",")] if rest else []
        places = [float(value) for key, _, value in arguments if not key]
        return OBSERVERS[name](*places, **{key: float(value) for key, _, value in arguments if key})
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

    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {"ends": torch.cat([self.lo, self.hi])}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: D102
        self.lo, self.hi = state["ends"].clone().split(1)


@register_observer("fixed")
class Fixed(MinMax):
    """A range known beforehand, whatever the data: ``fixed:0,1`` behind a softmax, ``fixed:-1,1`` behind a tanh.

    Data that lies outside by more than 1 % of the range is an error: the site is not what it was taken for.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"the lower end must lie below the upper one, got {low} and {high}")
        self.low, self.high = low, high

    def qparams(self, spec: QuantSpec) -> QParams:  # noqa: D102
        super().qparams(spec)
        slack = (self.high - self.low) * _SLACK
        _refuse_beyond(self.low - slack, self.lo.item(), f"fixed:{self.low:g},{self.high:g}")
        _refuse_beyond(-self.high - slack, -self.hi.item(), f"fixed:{self.low:g},{self.high:g}")
        return choose_qparams(torch.tensor([self.low]), torch.tensor([self.high]), spec)


def _refuse_beyond(end: float, seen: float, asked: str) -> None:
    if seen < end:
        raise CalibrationError(f"observer {asked} fixes an end that the data passes: found {abs(seen):g} in magnitude")


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

    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {} if self.range is None else {"range": self.range.clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: D102
        self.range = state["range"].clone() if "range" in state else None


class _OnHistogram:
    """Observers that decide on the histogram of all values."""

    def __init__(self) -> None:
        self.histogram = Histogram()

    def update(self, x: Tensor) -> None:
        self.histogram.update(x)

    def reduce(self) -> None:
        self.histogram.reduce()

    def state(self) -> dict[str, Tensor]:
        return self.histogram.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.histogram.load_state(state)


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
    """The clipping range with the least mean squared quantization error, found on a histogram.

    ``low`` fixes the lower end where it is known, as behind a GELU; formats without a zero point do not use it. Data
    that lies further down by more than 1 % of the data's range is an error.
    """

    def __init__(self, low: float | None = None) -> None:
        super().__init__()
        if low is not None and not -torch.inf < low <= 0:
            raise ValueError(f"the lower end must be finite and at most 0, got {low}")
        self.low = low

    def qparams(self, spec: QuantSpec) -> QParams:  # noqa: D102
        values, counts = self.histogram.points()
        if self.low is not None:
            slack = (values[-1] - values[0]).item() * _SLACK
            _refuse_beyond(self.low - slack, values[0].item(), f"mse:low={self.low:g}")
        return search_range(values.unsqueeze(0), spec, counts.unsqueeze(0), self.low)


@register_observer("kl")
class Kl(_OnHistogram):
    """The clipping threshold on ``|x|`` that loses least information (see `entropy`).

    Below 6 bits too few levels are left for the rule to mean anything: those formats, and all that are not integers,
    take the range of `Mse`.
    """

    def qparams(self, spec: QuantSpec) -> QParams:  # noqa: D102
        fmt, histogram = spec.format, self.histogram
        if not fmt.is_integer or fmt.bits < _KL_BITS:
            values, counts = histogram.points()
            return search_range(values.unsqueeze(0), spec, counts.unsqueeze(0))
        counts, width = histogram.magnitudes(entropy.BINS)
        both_signs = bool(histogram.lo < 0) and bool(histogram.hi > 0)
        asymmetric = (fmt.qmax - fmt.qmin + 1) // (2 if both_signs else 1)
        levels = fmt.qmax + 1 if spec.symmetric else asymmetric
        threshold = torch.tensor([entropy.threshold_bins(counts, levels) * width])
        return choose_qparams(histogram.lo.maximum(-threshold), histogram.hi.minimum(threshold), spec)
