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
from bitwright.numerics.affine import EPS, choose_qparams, decode, encode
from bitwright.numerics.packing import pack, unpack
from bitwright.numerics.spec import QParams, QuantSpec


@dataclass(frozen=True, slots=True)
class QTensor:
    """A quantized tensor: ``packed`` bytes, its scale (itself a `QTensor` if quantized), zero point, spec and shape."""

    packed: Tensor
    scale: Tensor | QTensor
    zero_point: Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]

    @property
    def qparams(self) -> QParams:
        """Scale and zero point as tensors."""
        if isinstance(self.scale, Tensor):
            return QParams(self.scale, self.zero_point)
        return QParams(_decoded(self.scale, self.spec.granularity.scale_shape(self.shape)), self.zero_point)

    @property
    def codes(self) -> Tensor:
        """Integer codes, int16, in the tensor's shape."""
        rows = unpack(self.packed, self.spec.format, math.prod(self.shape[1:]))
        return rows.view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and zero points."""
        scale = self.scale.nbytes
        return self.packed.nbytes + scale + (0 if self.zero_point is None else self.zero_point.nbytes)


def quantize(x: Tensor, spec: QuantSpec, qparams: QParams | None = None) -> QTensor:
    """Encode and pack ``x``; without ``qparams`` the range is its minimum and maximum.

    Raises `NumericsError` for values that are not finite, and for tensors without elements or dimensions.

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
    if qparams is None:
        blocks = spec.granularity.blocks(x)
        shape = spec.granularity.scale_shape(x.shape)
        qparams = choose_qparams(blocks.amin(-1).view(shape), blocks.amax(-1).view(shape), spec)
    scale: Tensor | QTensor = qparams.scale.detach().clone()
    if spec.scale is not None:
        scale = quantize(scale.reshape(1, -1), spec.scale)
        qparams = QParams(_decoded(scale, qparams.scale.shape), qparams.zero_point)
    codes = encode(x.detach(), spec, qparams)
    zero_point = None if qparams.zero_point is None else qparams.zero_point.detach().clone()
    return QTensor(pack_rows(codes, spec), scale, zero_point, spec, tuple(x.shape))


def _decoded(scale: QTensor, shape: tuple[int, ...]) -> Tensor:
    """A quantized scale in float32; one that was rounded to 0 becomes the smallest scale: nothing divides by 0."""
    return dequantize(scale).clamp(min=EPS).view(shape)


def pack_rows(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Pack codes ``[rows, ...]`` with everything behind axis 0 as one row: uint8 ``[rows, bytes]``."""
    return pack(codes.reshape(codes.shape[0], -1), spec.format)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of a quantized tensor in its shape.

    >>> dequantize(quantize(torch.tensor([[0.0, 1.0, -7.0]]), QuantSpec.parse("int4/channel")))
    tensor([[ 0.,  1., -7.]])
    """
    return decode(q.codes, q.spec, q.qparams).to(dtype)
