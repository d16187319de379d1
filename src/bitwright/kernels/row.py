"""What a row of the kernel table is: constants laid out for it, the encoding of its input, and when it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitwright.kernels.reference import codes_of, not_integers
from bitwright.numerics.affine import simulate
from bitwright.numerics.qtensor import QTensor
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


@dataclass(frozen=True, slots=True)
class Kernel:
    """One row: ``refuses`` says why it cannot serve a pair of specs (empty = it can), ``requires`` device features."""

    name: str
    op: str
    requires: frozenset[str]
    layout: str
    refuses: Callable[[QuantSpec, QuantSpec | None, tuple[int, ...]], str]
    pack: Callable[[QTensor, int], Packed]
    run: Callable[..., Tensor]
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


def pack_codes(weight: QTensor, groups: int) -> Packed:
    """One byte per code (two for 16 bits, four for uint16, which few operators of torch take); float32 scales."""
    fmt, qparams = weight.spec.format, weight.qparams
    dtype = fmt.dtype or (torch.int8 if fmt.qmin < 0 else torch.uint8)
    if fmt.is_integer and fmt.bits > 8:
        dtype = torch.int16 if fmt.qmin < 0 else torch.int32
    return Packed(weight.codes.to(dtype), qparams.scale, qparams.zero_point, codebook=qparams.codebook)
