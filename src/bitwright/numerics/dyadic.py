"""Requantization with integers alone: a real factor as a 31-bit integer and a shift (Jacob 2018, section 2.2).

``M = s_x s_w / s_y`` becomes ``m * 2**-shift``; the product is taken in 64 bits and rounded half to even, as everywhere
else. HAWQ-V3 (Yao 2021) uses this form for convolutions and for both branches of a residual add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.errors import NumericsError


def dyadic(factor: Tensor) -> tuple[Tensor, Tensor]:
    """``m`` and ``shift``, int64 of the shape of ``factor``, with ``m * 2**-shift`` within 2**-31 of it (relative).

    ``m`` lies in ``[2**30, 2**31)`` and ``shift`` in ``[1, 61]``. Raises `NumericsError` unless every factor lies in
    ``[2**-31, 2**30)``.

    >>> [t.item() for t in dyadic(torch.tensor(0.5))]
    [1073741824, 31]
    """
    factor = factor.double()
    if not ((factor >= 2.0**-31) & (factor < 2.0**30)).all():
        raise NumericsError(f"a dyadic factor lies in [2**-31, 2**30), found {factor.min():g} to {factor.max():g}")
    fraction, exponent = torch.frexp(factor)
    m = (fraction * 2.0**31).round().long()
    overflow = m == 2**31  # a fraction just below 1 rounds up to 1, which 31 bits cannot hold
    return torch.where(overflow, 2**30, m), 31 - exponent.long() - overflow.long()


def requantize(acc: Tensor, m: Tensor, shift: Tensor, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """Codes ``clamp(rint(acc * m * 2**-shift) + zero_point, qmin, qmax)``, int64, without floating point.

    ``acc`` holds int32 accumulators (any integer dtype); ``m`` and ``shift`` come from `dyadic` and broadcast.

    >>> requantize(torch.tensor([1, 3, -3, 900]), *dyadic(torch.tensor(0.5)), 0, -128, 127).tolist()
    [0, 2, -2, 127]
    """
    product = acc.long() * m
    half = torch.ones_like(shift) << (shift - 1)
    rounded = (product + half) >> shift  # rounds half up
    tie = ((product + half) & ((half << 1) - 1)) == 0
    rounded = rounded - (tie & (rounded & 1 == 1)).long()
    return (rounded + zero_point).clamp(qmin, qmax)
