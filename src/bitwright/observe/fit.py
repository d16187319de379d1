"""Range search: the clipping range with the least squared error, on values or on a histogram of them.

At 8 bits clipping hardly matters; at 4 bits and below it is worth 4-6 dB on bell-shaped data (Gaussian optimum at
4 bits: clip at 2.7 standard deviations). The search shrinks both ends of the range together over a geometric grid,
refines around the best, then (asymmetric formats) tries each end alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.errors import SpecError
from bitwright.numerics.affine import choose_qparams, decode, encode
from bitwright.numerics.spec import Granularity, QParams, QuantSpec

WEIGHT_OBSERVERS = ("minmax", "mse")

_COARSE = torch.logspace(0, -7, 43, base=2.0)  # 1 .. 1/128 in steps of 11 %
_FINE = torch.linspace(1.10, 0.90, 21)


def weight_qparams(weight: Tensor, spec: QuantSpec, observer: str = "mse") -> QParams:
    """Scales of a weight tensor: from its extremes (``minmax``) or by least squared error (``mse``).

    >>> weight_qparams(torch.tensor([[1.0, -7.0]]), QuantSpec.parse("int4/channel"), "minmax").scale
    tensor([[1.]])
    """
    blocks = spec.granularity.blocks(weight.detach().float())
    shape = spec.granularity.scale_shape(weight.shape)
    if observer not in WEIGHT_OBSERVERS:
        raise SpecError(f"unknown weight observer {observer!r}; weights know {' and '.join(WEIGHT_OBSERVERS)}")
    if observer == "minmax":
        return choose_qparams(blocks.amin(-1).view(shape), blocks.amax(-1).view(shape), spec)
    found = search_range(blocks.flatten(0, -2), spec)
    zero_point = None if found.zero_point is None else found.zero_point.view(shape)
    return QParams(found.scale.view(shape), zero_point)


def search_range(values: Tensor, spec: QuantSpec, counts: Tensor | None = None) -> QParams:
    """Scale and zero point per row of ``values [rows, n]`` with the least (``counts``-weighted) squared error.

    Returns `QParams` of shape ``[rows]``.
    """
    lo, hi = values.amin(-1).clamp(max=0.0), values.amax(-1).clamp(min=0.0)
    if spec.symmetric:
        hi = torch.maximum(-lo, hi)
        lo = torch.zeros_like(hi)
    lo, hi = _best(values, counts, spec, lo, hi, _COARSE, both=True)
    lo, hi = _best(values, counts, spec, lo, hi, _FINE, both=True)
    if not spec.symmetric:
        lo, hi = _best(values, counts, spec, lo, hi, _COARSE[:15], both=False)
        hi, lo = (-bound for bound in _best(-values, counts, spec, -hi, -lo, _COARSE[:15], both=False))
    return choose_qparams(lo, hi, spec)


def _best(
    values: Tensor,
    counts: Tensor | None,
    spec: QuantSpec,
    lo: Tensor,
    hi: Tensor,
    factors: Tensor,
    *,
    both: bool,
) -> tuple[Tensor, Tensor]:
    """The range among ``(lo or factor * lo, factor * hi)`` with the least error, per row; the first wins a tie."""
    best_lo, best_hi = lo, hi
    best_error = torch.full_like(hi, torch.inf)
    for factor in factors.tolist():
        try_lo, try_hi = (lo * factor if both else lo), hi * factor
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
