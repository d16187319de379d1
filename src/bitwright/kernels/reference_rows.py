"""Rows of the kernel table that define what each operator computes, in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from bitwright.kernels import reference
from bitwright.kernels.reference import Codes, Geometry, codes_of, largest_code, row_qparams
from bitwright.kernels.row import (
    Activation,
    Kernel,
    Packed,
    anything,
    decoded_input,
    held_codes,
    integers_only,
    pack_codes,
    pack_integers,
    unpack_integers,
)
from bitwright.numerics.affine import decode
from bitwright.numerics.packing import unpack
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.spec import QParams, QuantSpec

Product = Callable[..., Tensor]


def _codes(x: Tensor, input: Activation) -> Codes:
    """Codes of an activation; NaN becomes the lowest code, as in native code."""
    spec, qparams = input
    codes = codes_of(x, spec, qparams)
    if qparams is None or not spec.format.is_integer:
        return codes
    lowest = spec.format.qmin - (0.0 if qparams.zero_point is None else qparams.zero_point)
    return codes._replace(values=codes.values.where(~codes.values.isnan(), lowest))


def _integer_weight(packed: Packed, weight: QuantSpec) -> Codes:
    return Codes(packed.layout.float(), packed.scale, largest_code(weight))


def _decoded_weight(packed: Packed, weight: QuantSpec) -> Tensor:
    return decode(held_codes(packed, weight), weight, QParams(packed.scale, packed.zero_point, packed.codebook))


def _integer_linear(x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation) -> Tensor:
    return reference.linear(_codes(x, input), _integer_weight(packed, weight), bias)


def _decoding_linear(
    x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation | None
) -> Tensor:
    return F.linear(decoded_input(x, input), _decoded_weight(packed, weight), bias)


def _integer_conv(
    x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation, geometry: Geometry
) -> Tensor:
    filters = _as_2d(_integer_weight(packed, weight).values)
    codes = _integer_weight(packed, weight)._replace(values=filters)
    return reference.conv2d(_codes(x, input), codes, bias, geometry)


def _decoding_conv(
    x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation | None, g: Geometry
) -> Tensor:
    filters = _as_2d(_decoded_weight(packed, weight))
    return F.conv2d(decoded_input(x, input), filters, bias, g.stride, g.padding, g.dilation, g.groups)


def _integer_volume(
    run: Product, x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation, *g: object
) -> Tensor:
    return run(_codes(x, input), _integer_weight(packed, weight), bias, *g)


def _decoding_volume(
    run: Product, x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, by: Activation | None, *g: object
) -> Tensor:
    return run(decoded_input(x, by), _decoded_weight(packed, weight), bias, *g)


def _as_2d(filters: Tensor) -> Tensor:
    return filters.unsqueeze(2) if filters.dim() == 3 else filters


def _pack_rows(weight: QTensor, groups: int, input: QuantSpec | None = None) -> Packed:
    qparams, columns = weight.qparams, weight.packed.new_empty(weight.shape[1], 0)  # its shape says what padding hides
    return Packed(weight.packed, qparams.scale, qparams.zero_point, columns, qparams.codebook)


def _packed_rows(packed: Packed, spec: QuantSpec, shape: tuple[int, ...], groups: int) -> Tensor:
    return packed.layout


def _gather(ids: Tensor, packed: Packed, weight: QuantSpec) -> Tensor:
    assert packed.sums is not None
    qparams = row_qparams(QParams(packed.scale, packed.zero_point, packed.codebook), weight, ids.flatten())
    rows = unpack(F.embedding(ids.flatten(), packed.layout), weight.format, len(packed.sums))
    return decode(rows, weight, qparams).view(*ids.shape, len(packed.sums))


def _reference_add(a: Tensor, b: Tensor, left: Activation, right: Activation) -> Tensor:
    return reference.add(_codes(a, left), _codes(b, right))


def _reference_matmul(a: Tensor, b: Tensor, left: Activation, right: Activation) -> Tensor:
    return reference.matmul(_codes(a, left), _codes(b, right))


_NONE: frozenset[str] = frozenset()
_BYTES = "one byte per code"


def _integer_row(op: str, run: Product) -> Kernel:
    return Kernel(f"{op}/reference", op, _NONE, _BYTES, integers_only, pack_integers, run, unpack_integers)


def _volume_rows(op: str, integer: Product, decoding: Product) -> tuple[Kernel, Kernel]:
    exact, loose = partial(_integer_volume, integer), partial(_decoding_volume, decoding)
    return _integer_row(op, exact), Kernel(f"{op}/decode", op, _NONE, _BYTES, anything, pack_codes, loose)


INTEGER_ROWS = (
    _integer_row("linear", _integer_linear),
    _integer_row("conv", _integer_conv),
    *_volume_rows("conv3d", reference.conv3d, reference.float_conv3d),
    *_volume_rows("conv_transpose", reference.conv_transpose, reference.float_conv_transpose),
)
DECODING_ROWS = (
    Kernel("linear/decode", "linear", _NONE, _BYTES, anything, pack_codes, _decoding_linear),
    Kernel("conv/decode", "conv", _NONE, _BYTES, anything, pack_codes, _decoding_conv),
    Kernel("embedding/gather", "embedding", _NONE, "rows as in files", anything, _pack_rows, _gather, _packed_rows),
)
OPERATION_ROWS = (
    Kernel("add/reference", "add", _NONE, "", anything, pack_codes, _reference_add),
    Kernel("matmul/reference", "matmul", _NONE, "", anything, pack_codes, _reference_matmul),
)
