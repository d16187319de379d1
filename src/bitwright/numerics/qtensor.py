"""`QTensor`: packed codes with the numbers that give them meaning.

A plain container, deliberately not a `torch.Tensor` subclass: its parts are ordinary tensors, so they go through
safetensors, `state_dict` and pickling-free loading unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.affine import EPS, decode, encode, live_qparams, shared_exponent, with_codebook
from bitwright.numerics.packing import pack, unpack
from bitwright.numerics.spec import QParams, QuantSpec


@dataclass(frozen=True, slots=True)
class QTensor:
    """A quantized tensor: ``packed`` bytes, its scale (itself a `QTensor` if quantized), zero point, spec and shape.

    ``codebook`` is the table of formats with a fitted one, ``[levels]`` or ``[rows, levels]``.
    """

    packed: Tensor
    scale: Tensor | QTensor
    zero_point: Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]
    codebook: Tensor | None = None

    @property
    def qparams(self) -> QParams:
        """Scale, zero point and codebook as tensors."""
        scale = self.scale
        if not isinstance(scale, Tensor):
            scale = decode_scale(scale, self.spec.granularity.scale_shape(self.shape))
        return QParams(scale, self.zero_point, self.codebook)

    @property
    def codes(self) -> Tensor:
        """Codes in the tensor's shape: int16; int32 of 16-bit integers, float32 of float formats."""
        rows = unpack(self.packed, self.spec.format, math.prod(self.shape[1:]))
        return rows.view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, zero points and codebook; a scale that is 1 by definition counts nothing."""
        parts = [self.packed, self.zero_point, self.codebook, self.scale if self.spec.format.is_scaled else None]
        return sum(part.nbytes for part in parts if part is not None)


def quantize(x: Tensor, spec: QuantSpec, qparams: QParams | None = None) -> QTensor:
    """Encode and pack ``x``; without ``qparams`` the range is its minimum and maximum.

    Quantized scales are rounded first, then the codes are found with the scales that are stored; a fitted table that
    ``qparams`` lacks is fitted then. Raises `NumericsError` for values that are not finite or that the format has no
    codes for, and for tensors without elements or dimensions.

    >>> q = quantize(torch.tensor([[0.0, 1.0, -7.0]]), QuantSpec.parse("int4/channel"))
    >>> q.codes.tolist(), q.nbytes
    ([[0, 1, -7]], 6)
    """
    if not x.dim() or not x.numel():
        raise NumericsError(
            f"cannot quantize to {spec}: needs at least one dimension and one value, found shape {list(x.shape)}"
        )
    if not torch.isfinite(x).all():
        count = int((~torch.isfinite(x)).sum())
        raise NumericsError(f"cannot quantize to {spec}: {count} of {x.numel()} values are NaN or infinite")
    if spec.format.name == "e8m0" and (x <= 0).any():
        raise NumericsError(f"cannot quantize to {spec}: it holds positive powers of two, found {x.min().item():g}")
    x = x.detach()
    given = live_qparams(x, spec) if qparams is None else qparams
    scale: Tensor | QTensor = given.scale.detach().clone() if spec.scale is None else quantize_scale(given.scale, spec)
    values = scale if isinstance(scale, Tensor) else decode_scale(scale, given.scale.shape)
    zero_point, codebook = (None if t is None else t.detach().clone() for t in (given.zero_point, given.codebook))
    stored = QParams(values, zero_point, codebook)
    if codebook is None:
        stored = with_codebook(x, spec, stored)
    return QTensor(pack_rows(encode(x, spec, stored), spec), scale, zero_point, spec, tuple(x.shape), stored.codebook)


def quantize_scale(scale: Tensor, spec: QuantSpec) -> QTensor:
    """Scales of a tensor of ``spec``, stored by ``spec.scale`` as one row.

    For ``scale(e8m0)`` a scale that is no power of two becomes the shared exponent of its block, whose largest
    magnitude is ``scale * largest``. Raises `NumericsError` when a group of scales does not divide their number.

    >>> quantize_scale(torch.tensor([[1.0, 0.3]]), QuantSpec.parse("mxfp4")).packed.tolist()
    [[127, 125]]
    """
    assert spec.scale is not None
    flat = scale.detach().float().reshape(1, -1)
    if spec.scale.format.name == "e8m0":
        flat = shared_exponent(flat * spec.format.largest, spec.format)
    return quantize(flat, spec.scale)


def decode_scale(scale: QTensor, shape: tuple[int, ...]) -> Tensor:
    """A quantized scale in float32; one that was rounded to 0 becomes the smallest scale: nothing divides by 0."""
    return dequantize(scale).clamp(min=EPS).view(shape)


def snap_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The float32 values that scales have once stored by ``spec``, same shape; as they are without ``scale(...)``.

    `quantize` with a scale stores exactly these values. Apply it once, to the scales that `quantize` is given: what is
    snapped already may move by a last bit when snapped again (not with e8m0).

    >>> snap_scale(torch.tensor([[1.0, 0.3]]), QuantSpec.parse("mxfp4"))
    tensor([[1.0000, 0.2500]])
    """
    return scale if spec.scale is None else decode_scale(quantize_scale(scale, spec), scale.shape)


def pack_rows(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Pack codes ``[rows, ...]`` with everything behind axis 0 as one row: uint8 ``[rows, bytes]``."""
    return pack(codes.reshape(codes.shape[0], -1), spec.format)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of a quantized tensor in its shape.

    >>> dequantize(quantize(torch.tensor([[0.0, 1.0, -7.0]]), QuantSpec.parse("int4/channel")))
    tensor([[ 0.,  1., -7.]])
    """
    return decode(q.codes, q.spec, q.qparams).to(dtype)
