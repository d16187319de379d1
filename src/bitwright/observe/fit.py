"""Range search: the clipping range with the least squared error, on values or on a histogram of them.

At 8 bits clipping hardly matters; at 4 bits and below it is worth 4-6 dB on bell-shaped data (Gaussian optimum at
4 bits: clip at 2.7 standard deviations). The search shrinks both ends of the range together over a geometric grid and
refines around the best. With a zero point it also shrinks each end alone, since data such as GELU's needs all of its
negative lobe and only a part of the positive side; the best of the three is then refined end by end.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import SpecError
from bitwright.numerics.affine import EPS, choose_qparams, decode, encode, live_qparams
from bitwright.numerics.spec import Granularity, QParams, QuantSpec

WEIGHT_OBSERVERS = ("minmax", "mse", "absmean")

Side = Literal["both", "low", "high"]
Range = tuple[Tensor, Tensor]

_COARSE = torch.logspace(0, -7, 43, base=2.0)  # 1 .. 1/128 in steps of 11 %
_AGAIN = torch.logspace(2, -2, 25, base=2.0)  # 4 .. 1/4: the other end may have moved far
_FINE = torch.linspace(1.10, 0.90, 21)
_FINEST = torch.linspace(1.01, 0.99, 11)
_BEYOND = 1.1  # an end may lie a little outside the data: the zero point is rounded


def weight_qparams(weight: Tensor, spec: QuantSpec, observer: str = "mse") -> QParams:
    """Scales of a weight tensor, and its table for formats with a fitted one.

    ======== ===========================================================================================
    minmax   from the extremes
    mse      by least squared error; for binary ``mean|w|``, its optimum (BWN, Rastegari 2016, eq. 6)
    absmean  ``mean|w|`` for ternary and binary, as BitNet b1.58 trains (Ma 2024); ``mse`` for the rest
    ======== ===========================================================================================

    Formats with a fitted table take the scale from the extremes: the table minimises the error. Scales that are
    stored quantized are not rounded here (see `qtensor.snap_scale`); shared exponents are powers of two.

    >>> weight_qparams(torch.tensor([[1.0, -7.0]]), QuantSpec.parse("int4/channel"), "minmax").scale
    tensor([[1.]])
    """
    if observer not in WEIGHT_OBSERVERS:
        raise SpecError(f"unknown weight observer {observer!r}; weights know {', '.join(WEIGHT_OBSERVERS)}")
    weight, name = weight.detach().float(), spec.format.name
    extremes = live_qparams(weight, spec)
    if observer == "minmax" or spec.format.fit or not spec.format.is_scaled:
        return extremes
    blocks, shape = spec.granularity.blocks(weight), extremes.scale.shape
    if name == "binary" or (name == "ternary" and observer == "absmean"):
        return QParams(blocks.abs().mean(-1).clamp(min=EPS).view(shape), extremes.zero_point)
    found = search_range(blocks.flatten(0, -2), spec)
    zero_point = None if found.zero_point is None else found.zero_point.view(shape)
    return QParams(found.scale.view(shape), zero_point)


def search_range(values: Tensor, spec: QuantSpec, counts: Tensor | None = None, low: float | None = None) -> QParams:
    """Scale and zero point per row of ``values [rows, n]`` with the least (``counts``-weighted) squared error.

    ``low`` fixes the lower end of formats with a zero point; only the upper one is searched then. Returns `QParams` of
    shape ``[rows]``.
    """
    lo, hi = values.amin(-1).clamp(max=0.0), values.amax(-1).clamp(min=0.0)
    if spec.symmetric:
        hi = torch.maximum(-lo, hi)
        whole = torch.zeros_like(hi), hi
        return choose_qparams(*_refined(values, counts, spec, whole, "both"), spec)
    whole = (lo if low is None else torch.full_like(lo, low)), hi
    sides: tuple[Side, ...] = ("both", "high", "low") if low is None else ("high",)
    starts = [_refined(values, counts, spec, whole, side) for side in sides]
    best = torch.stack([_squared_error(values, counts, spec, *start) for start in starts]).argmin(0)
    lo, hi = (torch.stack(ends).gather(0, best.unsqueeze(0))[0] for ends in zip(*starts, strict=True))
    for factors in (_AGAIN, _FINE, _FINEST):
        for side in sides[:0:-1] or sides:
            lo, hi = _best(values, counts, spec, (lo, hi), factors, side, whole)
    return choose_qparams(lo, hi, spec)


def _refined(values: Tensor, counts: Tensor | None, spec: QuantSpec, whole: Range, side: Side) -> Range:
    """The best range that shrinking the whole one on one side (or both) by a common factor gives."""
    found = whole
    for factors in (_COARSE, _FINE):
        found = _best(values, counts, spec, found, factors, side, whole)
    return found


def _best(
    values: Tensor, counts: Tensor | None, spec: QuantSpec, ends: Range, factors: Tensor, side: Side, whole: Range
) -> Range:
    """The range with the least error, per row, when factors multiply one end or both; the first wins a tie."""
    lo, hi = best_lo, best_hi = ends
    best_error = torch.full_like(hi, torch.inf)
    for factor in factors.tolist():
        try_lo = lo if side == "high" else torch.maximum(lo * factor, whole[0] * _BEYOND)
        try_hi = hi if side == "low" else torch.minimum(hi * factor, whole[1] * _BEYOND)
        error = _squared_error(values, counts, spec, try_lo, try_hi)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_lo, best_hi = torch.where(better, try_lo, best_lo), torch.where(better, try_hi, best_hi)
    return best_lo, best_hi


def _squared_error(values: Tensor, counts: Tensor | None, spec: QuantSpec, lo: Tensor, hi: Tensor) -> Tensor:
    qparams = choose_qparams(lo.unsqueeze(-1), hi.unsqueeze(-1), spec)
    rows = QuantSpec(spec.format, Granularity("channel"), spec.symmetric)
    error = (decode(encode(values, rows, qparams), rows, qparams) - values).square()
    return (error if counts is None else error * counts).sum(-1)
