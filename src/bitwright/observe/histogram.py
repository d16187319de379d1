"""A histogram that never loses a count: bins of width 2**k at multiples of 2**k.

The width depends on the range seen so far, extended to 0, and on nothing else: it is the finest at which that range has
at most `BINS` bins. When the range grows, k goes up and neighbours merge, which is exact. Two histograms of different
processes merge exactly too, after the finer one is coarsened. Memory stays below `BINS` counters for any stream, and
the final state does not depend on the order of the data.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from bitwright.errors import CalibrationError
from bitwright.observe.ranks import all_reduce, world_size

BINS = 4096
NOTHING_SEEN = "this observer saw no values; give calibration at least one batch"
_SMALLEST_EXPONENT = -100
_PART = 2**18


class Histogram:
    """Counts of values in bins ``[i * 2**k, (i + 1) * 2**k)``, for ``i`` from ``first``; plus the true extremes."""

    def __init__(self) -> None:
        self.exponent = _SMALLEST_EXPONENT
        self.first = 0
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.lo, self.hi = torch.tensor([torch.inf]), torch.tensor([-torch.inf])

    def update(self, x: Tensor) -> None:
        """Count all elements of a finite tensor; one without elements changes nothing."""
        x = x.detach().float().cpu().reshape(-1)
        if not len(x):
            return
        lo, hi = (bound.view(1) for bound in x.aminmax())
        self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
        self._fit(self.lo.item(), self.hi.item())
        for part in x.split(_PART):  # the temporaries must stay small beside the activation itself
            # Exact: a power of two, and in float64, where the smallest values do not become 0.
            index = torch.floor(part.double() * 2.0**-self.exponent).int() - self.first
            self.counts += torch.bincount(index, minlength=len(self.counts))

    def _fit(self, lo: float, hi: float) -> None:
        """Choose the finest width at which [lo, hi] and 0 fit, and make room for [lo, hi]."""
        low, high = min(lo, 0.0), max(hi, 0.0)
        exponent = self.exponent
        if not len(self.counts):
            exponent = max(math.frexp(max(high - low, 1e-30) / BINS)[1] - 1, _SMALLEST_EXPONENT)
        while math.floor(high / 2.0**exponent) - math.floor(low / 2.0**exponent) >= BINS:
            exponent += 1
        self._coarsen(exponent)
        first, last = math.floor(lo / 2.0**exponent), math.floor(hi / 2.0**exponent)
        grown = torch.zeros(last - first + 1, dtype=torch.int64)
        if len(self.counts):
            grown[self.first - first : self.first - first + len(self.counts)] = self.counts
        self.first, self.counts = first, grown

    def _coarsen(self, exponent: int) -> None:
        """Merge neighbours until bins are ``2**exponent`` wide."""
        if len(self.counts) and exponent > self.exponent:
            index = (torch.arange(len(self.counts)) + self.first) >> min(exponent - self.exponent, 62)
            self.first = int(index[0])
            merged = torch.zeros(int(index[-1]) - self.first + 1, dtype=torch.int64)
            self.counts = merged.index_add_(0, index - self.first, self.counts)
        self.exponent = exponent

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors; `load_state` of another histogram continues from it."""
        place = torch.tensor([self.exponent, self.first])
        return {"place": place, "counts": self.counts.clone(), "ends": torch.cat([self.lo, self.hi])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue where the histogram that gave ``state`` stood."""
        self.exponent, self.first = state["place"].tolist()
        self.counts = state["counts"].clone()
        self.lo, self.hi = state["ends"].clone().split(1)

    def reduce(self) -> None:
        """Sum the histograms of all ranks; every rank ends with the same state."""
        if world_size() == 1:
            return
        exponent = torch.tensor([self.exponent if len(self.counts) else _SMALLEST_EXPONENT])
        all_reduce(exponent, dist.ReduceOp.MAX)
        all_reduce(self.lo, dist.ReduceOp.MIN)
        all_reduce(self.hi, dist.ReduceOp.MAX)
        if self.lo > self.hi:
            return
        self._coarsen(max(int(exponent), self.exponent))
        if not len(self.counts):
            self.first = math.floor(self.lo.item() / 2.0**self.exponent)
        self._fit(self.lo.item(), self.hi.item())
        all_reduce(self.counts, dist.ReduceOp.SUM)

    def points(self) -> tuple[Tensor, Tensor]:
        """Bin centres and counts, float32, of the bins that are not empty; the outer centres are the true extremes."""
        if not len(self.counts):
            raise CalibrationError(NOTHING_SEEN)
        filled = torch.nonzero(self.counts).flatten()
        centres = ((filled + self.first).double() + 0.5) * 2.0**self.exponent
        centres = centres.float().clamp(self.lo, self.hi)
        centres[0], centres[-1] = self.lo[0], self.hi[0]
        return centres, self.counts[filled].float()

    def magnitudes(self, most: int) -> tuple[Tensor, float]:
        """Counts of the absolute values in equal bins from 0 on, at most ``most`` of them, and the width of a bin.

        Bins are merged by two until they fit: a width between the bins' own would leave gaps.
        """
        if not len(self.counts):
            raise CalibrationError(NOTHING_SEEN)
        index = torch.arange(len(self.counts)) + self.first
        index, exponent = torch.where(index < 0, -index - 1, index), self.exponent
        while int(index.max()) >= most:
            index, exponent = index >> 1, exponent + 1
        counts = torch.zeros(int(index.max()) + 1, dtype=torch.int64).index_add_(0, index, self.counts)
        return counts, 2.0**exponent

    def quantile(self, share: float) -> Tensor:
        """Smallest value below which ``share`` of the counts lie, to the width of a bin; shape ``[1]``."""
        values, counts = self.points()
        cumulative = counts.double().cumsum(0)
        index = int(torch.searchsorted(cumulative, share * cumulative[-1]).clamp(max=len(values) - 1))
        return values[index].view(1)
