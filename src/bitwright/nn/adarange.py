"""`AdaRange`: a range that follows the data until it is stationary and is then learned, and back when it drifts.

This is our own definition, no published method. Two modes:

* TRACK: every `EVERY` steps the range becomes the one `decided_range` chooses; no gradient reaches it.
* LEARN: scale and offset are trained as in LSQ+, from the last tracked range on. Tracking goes on in the background.

A check takes place every `EVERY` steps. TRACK -> LEARN after `PATIENCE` checks in a row at which the width of the
decided range had changed by less than `STEADY`. LEARN -> TRACK after `PATIENCE` checks in a row at which it differed
from that of the learned range by more than `DRIFT`, or more than `most_clipped` of the values lay outside the learned
one. A mode lasts at least `DWELL` steps. A switch never moves the range itself. `train.adarange.step` runs the checks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.nn.tracker import Tracker, range_ends
from bitwright.numerics.affine import choose_qparams, simulate
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.observe.fit import search_range

EVERY = 50  # steps between checks
PATIENCE = 3  # checks in a row before a switch
DWELL = 2 * EVERY  # steps that a mode lasts at least
STEADY = 0.05  # relative change of the decided range below which it stands still
DRIFT = 0.5  # relative difference of decided and learned range above which the learned one is left behind
GAIN = 0.05  # relative error that the tight range must save
KEPT = 256  # values of each forward that are kept for the next check

_BINS = 2048
_SPREAD = 2654435761  # Knuth's multiplicative hash: which values are kept


class AdaRange(Tracker):
    """State of one quantizer: buffers only, so a saved run resumes exactly.

    ``samples`` is a ring of rows, the values kept since the last check; ``rows`` counts them, ``seen`` all forwards.
    ``decided`` is the range of the last check. ``counters`` are the mode (1 = LEARN), the steps since the last check
    and since the last switch, and the checks in a row that spoke for a switch.
    """

    samples: Tensor
    rows: Tensor
    seen: Tensor
    decided: Tensor
    counters: Tensor
    publishes = False

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__(decay)
        self.register_buffer("samples", torch.zeros(EVERY, KEPT))
        self.register_buffer("rows", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("decided", torch.zeros(2))
        self.register_buffer("counters", torch.zeros(4, dtype=torch.int64))

    def start(self, ends: Tensor) -> None:
        """Begin anew in mode TRACK from a range ``[low, high]``."""
        super().start(ends)
        self.decided.copy_(ends)
        for buffer in (self.rows, self.seen, self.counters):
            buffer.zero_()

    def update(self, x: Tensor, consumers: int) -> None:
        """Take in one batch."""
        super().update(x, consumers)
        if not x.numel():
            return
        kept = (self.seen * KEPT + torch.arange(KEPT, device=x.device)) * _SPREAD % x.numel()
        row = x.flatten()[kept].float()
        self.samples.index_copy_(0, self.seen % EVERY, torch.where(row.isfinite(), row, 0.0).unsqueeze(0))
        self.rows.add_(1)
        self.seen.add_(1)

    @property
    def learning(self) -> bool:
        """Whether the mode is LEARN."""
        return bool(self.counters[0])

    def values(self) -> Tensor:
        """The values kept since the last check."""
        rows = (self.seen - 1 - torch.arange(min(int(self.rows), EVERY), device=self.seen.device)) % EVERY
        return self.samples[rows].flatten()


def decided_range(values: Tensor, ends: Tensor, spec: QuantSpec) -> Tensor:
    """The wide range ``ends``, or the tight one within it of least squared error, ``[low, high]``.

    The tight one is taken where its squared error on ``values`` is smaller by more than `GAIN`.
    """
    wide = choose_qparams(ends[:1], ends[1:], spec)
    points, counts = _binned(values.clamp(ends[0], ends[1]))
    tight = search_range(points.unsqueeze(0), spec, counts.unsqueeze(0))
    errors = [(simulate(values, spec, qparams) - values).square().mean().item() for qparams in (wide, tight)]
    return range_ends(tight if errors[1] < (1 - GAIN) * errors[0] else wide, spec)


def _binned(values: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and counts of a fine histogram: a search on it takes a fraction of the time."""
    low, high = values.aminmax()
    counts = torch.histc(values, _BINS, low.item(), high.item())
    centres = low + (high - low) * (torch.arange(_BINS, device=values.device) + 0.5) / _BINS
    return centres, counts


def limits(qparams: QParams, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The values of the smallest and the largest code of a whole tensor.

    >>> limits(QParams(torch.tensor([0.5])), QuantSpec.parse("int4"))
    (tensor([-4.]), tensor([3.5000]))
    """
    zero = 0.0 if qparams.zero_point is None else qparams.zero_point
    return (spec.format.qmin - zero) * qparams.scale, (spec.format.qmax - zero) * qparams.scale


def most_clipped(bits: int) -> float:
    """The largest share of clipped values that is no drift: 25 % at 2 bits, 5 % at 8, on a straight line between.

    >>> most_clipped(8), most_clipped(2)
    (0.05, 0.25)
    """
    return round(0.05 + 0.2 * (8 - bits) / 6, 6)


def relative_change(old: Tensor, new: Tensor) -> float:
    """The change of a range's width, relative to its width."""
    width = (old[1] - old[0]).clamp(min=1e-30)
    return ((new[1] - new[0] - width).abs() / width).item()
