"""The meaning of every operator in plain torch: what simulation computes, what native kernels must equal.

Integer products are exact. Codes are integers held in float32, so a float32 sum is exact while it cannot exceed 2**24;
beyond that the reduction is split into blocks that are exact each, and their sum is rounded once, which is what
converting an int32 accumulator to float32 does. The epilogue has one order: ``acc * (s_x * s_w) + bias``. Weights with
several scales per output have a sum per group: ``(sum_g acc_g * s_w_g) * s_x + bias``, groups in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bitwright.numerics.affine import centred, encode, live_qparams
from bitwright.numerics.codebook import look_up
from bitwright.numerics.spec import QParams, QuantSpec

EXACT = 2**24  # float32 holds every integer up to here


class Codes(NamedTuple):
    """Integer codes minus their zero point, or whole numbers of a table, as float32; scale and largest magnitude."""

    values: Tensor
    scale: Tensor
    limit: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of a convolution: everything but the weights. Padding is with zeros, the same on both sides."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True, slots=True)
class Bags:
    """How an embedding bag reduces its rows: ``sum``, ``mean`` or ``max``; see `nn.EmbeddingBag`."""

    mode: str
    include_last_offset: bool
    padding_idx: int | None


def largest_code(spec: QuantSpec) -> int:
    """Largest magnitude of ``code - zero_point``, or of the whole numbers of a table.

    >>> [largest_code(QuantSpec.parse(text)) for text in ("uint8/asym", "int4/channel", "midrise2/channel")]
    [255, 8, 3]
    """
    fmt = spec.format
    if fmt.is_table:
        return int(fmt.largest)
    return max(-fmt.qmin, fmt.qmax) if spec.symmetric else fmt.qmax - fmt.qmin


def codes_of(x: Tensor, spec: QuantSpec, qparams: QParams | None) -> Codes:
    """Encode ``x``; without ``qparams`` (dynamic specs) they come from ``x`` itself."""
    if qparams is None:
        qparams = live_qparams(x, spec)
    codes = encode(x, spec, qparams)
    values = look_up(codes, spec.format) if spec.format.is_table else centred(codes, qparams.zero_point)
    return Codes(values, qparams.scale, largest_code(spec))


def row_qparams(qparams: QParams, spec: QuantSpec, ids: Tensor) -> QParams:
    """Scales, zero points and tables of the rows ``ids [n]`` of a matrix; what all rows share stays as it is."""

    def some(part: Tensor | None) -> Tensor | None:
        return part if part is None or part.dim() == 1 else F.embedding(ids, part)

    if spec.granularity.kind == "tensor":
        return qparams
    return QParams(F.embedding(ids, qparams.scale), some(qparams.zero_point), some(qparams.codebook))


def not_integers(weight: QuantSpec, input: QuantSpec | None) -> str:
    """Why these operands are decoded and not multiplied as integer codes; empty where they are integers (contract C2).

    >>> not_integers(QuantSpec.parse("int16/channel"), QuantSpec.parse("int8"))
    'needs whole numbers of at most 8 bits'
    """
    if input is None:
        return "needs an integer input"
    if weight.format.integer is None or not input.format.is_integer or max(weight.format.bits, input.format.bits) > 8:
        return "needs whole numbers of at most 8 bits"
    if not weight.symmetric or weight.granularity.kind not in ("tensor", "channel", "group"):
        return "needs symmetric weights with scales per tensor, channel or group"
    return "needs scales in float32" if weight.scale is not None else ""


def linear(x: Codes, weight: Codes, bias: Tensor | None) -> Tensor:
    """Integer linear layer ``[..., k] x [n, k] -> [..., n]`` in float32; weight scales are ``[1]`` or ``[n, g]``."""
    if weight.scale.numel() > len(weight.values):
        out = _grouped_linear(x, weight)
        return out if bias is None else out + bias
    limit = x.limit * weight.limit * x.values.shape[-1]
    acc = _exact(F.linear, x.values, weight.values, limit, axis=-1)
    out = acc * (x.scale * weight.scale.view(-1))
    return out if bias is None else out + bias


def _grouped_linear(x: Codes, weight: Codes) -> Tensor:
    """``(sum_g acc_g * s_w[:, g]) * s_x``: a product is rounded, then the sum; no fused multiply-add."""
    size = weight.values.shape[1] // weight.scale.shape[1]
    limit = x.limit * weight.limit * size
    groups = zip(x.values.split(size, -1), weight.values.split(size, 1), weight.scale.unbind(1), strict=True)
    total = x.values.new_zeros(())
    for values, filters, scale in groups:
        total = total + _exact(F.linear, values, filters, limit, axis=-1) * scale
    return total * x.scale


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


def conv3d(x: Codes, weight: Codes, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Integer 3-d convolution ``[n, c, d, h, w] -> [n, o, d', h', w']`` in float32; padding is the code of 0.0."""

    def product(values: Tensor, filters: Tensor) -> Tensor:
        return float_conv3d(values, filters, None, geometry)

    limit = x.limit * weight.limit * weight.values[0].numel()
    acc = _exact(product, x.values, weight.values, limit, axis=1 if geometry.groups == 1 else None)
    return _scaled(acc, x, weight, bias)


def float_conv3d(x: Tensor, filters: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """3-d convolution of float operands."""
    g = geometry
    return F.conv3d(x, filters, bias, g.stride, g.padding, g.dilation, g.groups)


def conv_transpose(
    x: Codes, weight: Codes, bias: Tensor | None, geometry: Geometry, output_padding: tuple[int, ...]
) -> Tensor:
    """Integer transposed convolution ``[n, c, ...] -> [n, o, ...]`` in float32; the weight as `output_major` rows."""

    def product(values: Tensor, filters: Tensor) -> Tensor:
        return _transposed(values, filters, None, geometry, output_padding)

    limit = x.limit * weight.limit * weight.values[0].numel()
    filters = input_major(weight.values, geometry.groups)
    axis = 1 if geometry.groups == 1 and x.values.dim() > filters.dim() - 1 else None
    acc = _exact(product, x.values, filters, limit, axis, other=0)
    return _scaled(acc, x, weight, bias)


def float_conv_transpose(
    x: Tensor, rows: Tensor, bias: Tensor | None, geometry: Geometry, output_padding: tuple[int, ...]
) -> Tensor:
    """Transposed convolution of float operands, the weight as rows (`output_major`)."""
    return _transposed(x, input_major(rows, geometry.groups), bias, geometry, output_padding)


def _transposed(
    x: Tensor, filters: Tensor, bias: Tensor | None, g: Geometry, output_padding: tuple[int, ...]
) -> Tensor:
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[filters.dim() - 3]
    return function(x, filters, bias, g.stride, g.padding, output_padding, g.groups, g.dilation)


def output_major(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight as rows: ``[in, out / groups, *kernel] -> [out, in / groups, *kernel]``.

    >>> output_major(torch.zeros(6, 4, 3, 3), 2).shape
    torch.Size([8, 3, 3, 3])
    """
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def input_major(rows: Tensor, groups: int) -> Tensor:
    """The inverse of `output_major`; the same exchange of axes within each group."""
    return output_major(rows, groups)


def _scaled(acc: Tensor, x: Codes, weight: Codes, bias: Tensor | None) -> Tensor:
    """``acc * (s_x * s_w) + bias`` for sums whose channels are axis 1, or axis 0 without a batch."""
    shape = (-1, *[1] * (weight.values.dim() - 2))
    out = acc * (x.scale * weight.scale.view(-1)).view(shape)
    return out if bias is None else out + bias.view(shape)


def bag(rows: Tensor, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, bags: Bags) -> Tensor:
    """Reduce ``rows [n, features]``, looked up by the n ``ids``, to ``[bags, features]``; `nn.EmbeddingBag`.

    ``ids`` are ``[bags, n / bags]``, or ``[n]`` with the ``offsets`` of the bags; ``weights`` have the shape of ids.
    """
    places = torch.arange(len(rows), device=rows.device)
    if bags.padding_idx is not None:  # rows that take no part stand behind the last
        places = torch.where(ids.flatten() == bags.padding_idx, len(rows), places)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return F.embedding_bag(
        places.view(ids.shape), rows, offsets, mode=bags.mode, per_sample_weights=weights,
        include_last_offset=bags.include_last_offset, padding_idx=None if bags.padding_idx is None else len(rows) - 1,
    )  # fmt: skip


def add(a: Codes, b: Codes) -> Tensor:
    """Sum of two quantized tensors in float32: ``a * s_a + b * s_b``."""
    return a.values * a.scale + b.values * b.scale


def matmul(a: Codes, b: Codes) -> Tensor:
    """Integer product of two activations ``[..., m, k] x [..., k, n] -> [..., m, n]`` in float32; one scale each."""
    limit = a.limit * b.limit * a.values.shape[-1]
    return _exact(torch.matmul, a.values, b.values, limit, axis=-1, other=-2) * (a.scale * b.scale)


def _exact(
    product: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, limit: int, axis: int | None, other: int = 1
) -> Tensor:
    """The integer product rounded once to float32: by blocks along the input ``axis``, in float64 without one.

    ``other`` is the axis of ``w`` that meets ``axis``.
    """
    with torch.autocast(x.device.type, enabled=False):  # it would round the sums
        if limit <= EXACT:
            return product(x, w)
        size = 0 if axis is None else x.shape[axis] * EXACT // limit  # so many inputs cannot exceed EXACT
        if axis is None or not size:
            return product(x.double(), w.double()).float()
        parts = [product(a, b) for a, b in zip(x.split(size, axis), w.split(size, other), strict=True)]
        if len(parts) == 2:
            return parts[0] + parts[1]
        return torch.stack([part.double() for part in parts]).sum(0).float()
