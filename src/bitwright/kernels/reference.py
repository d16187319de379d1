"""The meaning of every operator in plain torch: what simulation computes, what native kernels must equal.

Integer products are exact. Codes are integers held in float32, so a float32 sum is exact while it cannot exceed 2**24;
beyond that the reduction is split into blocks that are exact each, and their sum is rounded once, which is what
converting an int32 accumulator to float32 does. The epilogue has one order: ``acc * (s_x * s_w) + bias``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bitwright.numerics.affine import centred, encode, live_qparams
from bitwright.numerics.spec import QParams, QuantSpec

EXACT = 2**24  # float32 holds every integer up to here


class Codes(NamedTuple):
    """Integer codes minus their zero point, as float32, with their scale and the largest possible magnitude."""

    values: Tensor
    scale: Tensor
    limit: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of a 2-d convolution: everything but the weights. Padding is with zeros, the same on both sides."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def largest_code(spec: QuantSpec) -> int:
    """Largest magnitude of ``code - zero_point``.

    >>> largest_code(QuantSpec.parse("uint8/asym")), largest_code(QuantSpec.parse("int4/channel"))
    (255, 8)
    """
    fmt = spec.format
    return max(-fmt.qmin, fmt.qmax) if spec.symmetric else fmt.qmax - fmt.qmin


def codes_of(x: Tensor, spec: QuantSpec, qparams: QParams | None) -> Codes:
    """Encode ``x``; without ``qparams`` (dynamic specs) they come from ``x`` itself."""
    if qparams is None:
        qparams = live_qparams(x, spec)
    values = centred(encode(x, spec, qparams), qparams.zero_point)
    return Codes(values, qparams.scale, largest_code(spec))


def linear(x: Codes, weight: Codes, bias: Tensor | None) -> Tensor:
    """Integer linear layer ``[..., k] x [n, k] -> [..., n]`` in float32."""
    limit = x.limit * weight.limit * x.values.shape[-1]
    acc = _exact(F.linear, x.values, weight.values, limit, axis=-1)
    out = acc * (x.scale * weight.scale.view(-1))
    return out if bias is None else out + bias


def conv2d(x: Codes, weight: Codes, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Integer 2-d convolution ``[n, c, h, w] -> [n, o, h', w']`` in float32; padding is the code of 0.0.

    The result is in channels-last memory, as from the native kernels: float operators behind it (a mean, say) add in
    memory order, so equal values in another layout would end in other last bits.
    """
    g = geometry

    def product(values: Tensor, filters: Tensor) -> Tensor:
        return F.conv2d(values, filters, None, g.stride, g.padding, g.dilation, g.groups)

    limit = x.limit * weight.limit * weight.values[0].numel()
    values = x.values.contiguous(memory_format=torch.channels_last)
    acc = _exact(product, values, weight.values, limit, axis=1 if g.groups == 1 else None)
    acc = acc.contiguous(memory_format=torch.channels_last)
    out = acc * (x.scale * weight.scale.view(-1)).view(1, -1, 1, 1)
    return out if bias is None else out + bias.view(1, -1, 1, 1)


def add(a: Codes, b: Codes) -> Tensor:
    """Sum of two quantized tensors in float32: ``a * s_a + b * s_b``."""
    return a.values * a.scale + b.values * b.scale


def _exact(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, limit: int, axis: int | None) -> Tensor:
    """The integer product rounded once to float32: by blocks along the input ``axis``, in float64 without one."""
    with torch.autocast(x.device.type, enabled=False):  # it would round the sums
        if limit <= EXACT:
            return product(x, w)
        size = 0 if axis is None else x.shape[axis] * EXACT // limit  # so many inputs cannot exceed EXACT
        if axis is None or not size:
            return product(x.double(), w.double()).float()
        parts = [product(a, b) for a, b in zip(x.split(size, axis), w.split(size, 1), strict=True)]
        if len(parts) == 2:
            return parts[0] + parts[1]
        return torch.stack([part.double() for part in parts]).sum(0).float()
