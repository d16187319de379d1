"""What a row of the kernel table is: constants laid out for it, the encoding of its input, and when it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitwright.kernels.reference import codes_of, not_integers
from bitwright.numerics.affine import simulate
from bitwright.numerics.codebook import look_up, nearest_code
from bitwright.numerics.qtensor import QTensor, pack_rows
from bitwright.numerics.spec import QParams, QuantSpec


class Packed(NamedTuple):
    """Constants of one layer in a row's own layout: codes, scales; zero points, sums of codes, a table where needed."""

    layout: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    sums: Tensor | None = None
    codebook: Tensor | None = None


class Activation(NamedTuple):
    """How a layer's input is encoded; ``qparams`` is None for dynamic specs."""

    spec: QuantSpec
    qparams: QParams | None


def pack_codes(weight: QTensor, groups: int, input: QuantSpec | None = None) -> Packed:
    """One byte per code (two for 16 bits, four for uint16, which few operators of torch take); float32 scales.

    Floats of 8 and 16 bits are held as their bytes, which no change of a layer's type touches.
    """
    fmt, qparams = weight.spec.format, weight.qparams
    if fmt.dtype is not None:
        layout = weight.packed.reshape(*weight.shape[:-1], -1)
    else:
        wide, signed = fmt.is_integer and fmt.bits > 8, fmt.qmin < 0
        dtype = (torch.int16 if signed else torch.int32) if wide else torch.int8 if signed else torch.uint8
        layout = weight.codes.to(dtype)
    return Packed(layout, qparams.scale, qparams.zero_point, codebook=qparams.codebook)


def product_codes(weight: QTensor) -> Tensor:
    """The whole numbers that integer kernels multiply, in the weight's shape: its codes, or the levels of its table."""
    return look_up(weight.codes, weight.spec.format) if weight.spec.format.is_table else weight.codes


def pack_products(products: Tensor, spec: QuantSpec) -> Tensor:
    """The packed bytes of a weight from its `product_codes`."""
    fmt = spec.format
    return pack_rows(nearest_code(products.float(), fmt) if fmt.is_table else products, spec)


def pack_integers(weight: QTensor, groups: int, input: QuantSpec | None = None) -> Packed:
    """`product_codes`, one byte each; float32 scales."""
    if not weight.spec.format.is_table:
        return pack_codes(weight, groups, input)
    return Packed(product_codes(weight).to(torch.int8), weight.qparams.scale)


def unpack_integers(packed: Packed, spec: QuantSpec, shape: tuple[int, ...], groups: int) -> Tensor:
    """The packed bytes of a weight that `pack_integers` laid out."""
    return pack_products(packed.layout, spec)


def held_codes(packed: Packed, spec: QuantSpec) -> Tensor:
    """The codes that `pack_codes` laid out, in the weight's shape."""
    return packed.layout if spec.format.dtype is None else packed.layout.view(spec.format.dtype)


def unpack_codes(packed: Packed, spec: QuantSpec, shape: tuple[int, ...], groups: int) -> Tensor:
    """The packed bytes of a weight that `pack_codes` laid out."""
    return packed.layout.flatten(1) if spec.format.dtype is not None else pack_rows(packed.layout, spec)


def held_qparams(packed: Packed, spec: QuantSpec, shape: tuple[int, ...]) -> QParams:
    """Scale, zero point and table of rows that hold them as they are stored."""
    return QParams(packed.scale, packed.zero_point, packed.codebook)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One row: ``refuses`` says why it cannot serve a pair of specs (empty = it can), ``requires`` device features.

    ``pack`` lays out a weight, given the groups of a convolution and the spec of the input. ``unpack`` and ``qparams``
    are its inverse: the packed bytes (`numerics.packing`), and scale, zero point and table as they are stored. So a
    layer needs no other copy of its weight than the constants of its row.
    """

    name: str
    op: str
    requires: frozenset[str]
    layout: str
    refuses: Callable[[QuantSpec, QuantSpec | None, tuple[int, ...]], str]
    pack: Callable[..., Packed]
    run: Callable[..., Tensor]
    unpack: Callable[[Packed, QuantSpec, tuple[int, ...], int], Tensor] = unpack_codes
    qparams: Callable[[Packed, QuantSpec, tuple[int, ...]], QParams] = held_qparams
    run_images: Callable[..., Tensor] | None = None  # the same from and to bytes, see `images`


def integers_only(weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...]) -> str:
    """Rows of integer products serve integer operands, and groups of linear layers only."""
    if weight.granularity.kind == "group" and len(shape) != 2:
        return "groups need a 2-d weight"
    return not_integers(weight, input)


def anything(weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...]) -> str:
    """Rows that decode serve every spec."""
    return ""


def decoded_input(x: Tensor, input: Activation | None) -> Tensor:
    """The values of an input's codes, for products that are computed in float; ``x`` itself for float inputs."""
    if input is None:
        return x
    if input.qparams is not None:
        return simulate(x, input.spec, input.qparams)
    codes = codes_of(x, *input)
    return codes.values * codes.scale
