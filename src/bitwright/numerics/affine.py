"""The one definition of value -> code and code -> value, with the gradients of training.

Simulation, packing, kernels and export all agree with this file bit for bit. The rounding rule as a table
(scale 1, format int4, codes -8..7):

========= ===== ==== ==== ==== ==== ==== ==== ===== =====
x / s      -9    -8.5 -1.5 -0.5  0.5  1.5  2.5  7.49  8
rint       -9    -8   -2   -0    0    2    2    7     8
code       -8    -8   -2    0    0    2    2    7     7
========= ===== ==== ==== ==== ==== ==== ==== ===== =====

* ``code = clamp(rint(x / s) + z, qmin, qmax)``: round half to even, *then* add the zero point. ``rint(x / s + z)``
  rounds ties the other way whenever z is odd.
* Always divide by the scale. ``x * (1 / s)`` lands on another code for some inputs.
* Scales are float32, also under autocast; their floor is float32 epsilon.
* The range always contains 0.0, so that padding, ReLU zeros and masks are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.codebook import nearest_code
from bitwright.numerics.spec import QParams, QuantSpec

EPS = torch.finfo(torch.float32).eps


class _RoundSTE(torch.autograd.Function):
    """Round half to even; the gradient passes through unchanged (straight-through, Bengio 2013)."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def round_ste(x: Tensor) -> Tensor:
    """``rint(x)`` with the gradient of the identity.

    >>> round_ste(torch.tensor([0.5, 1.5, 2.4])).tolist()
    [0.0, 2.0, 2.0]
    """
    return _RoundSTE.apply(x)  # type: ignore[no-any-return]


def choose_qparams(lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
    """Scale and zero point for values in ``[lo, hi]``, one pair per entry.

    Symmetric: ``s = max(|lo|, |hi|) / qmax`` (``max|x|`` of a codebook is 1, so s is the largest magnitude).
    Asymmetric: ``s = (hi - lo) / (qmax - qmin)``, ``z = clamp(qmin - rint(lo / s), qmin, qmax)`` on the range
    extended to contain 0 (Jacob 2018, section 2.1). Raises `NumericsError` when a bound is not finite.

    >>> p = choose_qparams(torch.tensor([-1.0]), torch.tensor([2.03]), QuantSpec.parse("uint8/asym"))
    >>> round(p.scale.item(), 6), p.zero_point.item()
    (0.011882, 84.0)
    """
    lo, hi = lo.float().clamp(max=0.0), hi.float().clamp(min=0.0)
    # a compiled graph cannot branch on data; there, dynamic scales pass NaN on instead of raising
    if not torch.compiler.is_compiling() and not (torch.isfinite(lo).all() and torch.isfinite(hi).all()):
        raise NumericsError(f"cannot choose a scale for {spec}: a range bound is NaN or infinite; clean the data first")
    fmt = spec.format
    if fmt.dtype is not None:
        return QParams(torch.ones_like(hi))
    if spec.symmetric:
        largest = 1.0 if fmt.codebook else float(fmt.qmax)
        return QParams((torch.maximum(-lo, hi) / largest).clamp(min=EPS))
    scale = ((hi - lo) / (fmt.qmax - fmt.qmin)).clamp(min=EPS)
    return QParams(scale, (fmt.qmin - (lo / scale).round()).clamp(fmt.qmin, fmt.qmax))


def encode(x: Tensor, spec: QuantSpec, qparams: QParams) -> Tensor:
    """Codes of ``x`` as an integer-valued float32 tensor of the same shape; differentiable.

    ``code = clamp(rint(x / s) + z, qmin, qmax)``. Gradient to x: 1 where the code was not clipped, else 0. While the
    scale is being learned the clip comes before the rounding, which gives LSQ's gradient to the scale (Esser 2020,
    eq. 3). Codebook formats return the index of the nearest entry; float formats return the rounded float itself.

    >>> p = QParams(torch.tensor([0.5]), torch.tensor([1.0]))
    >>> encode(torch.tensor([0.25, 0.75, 1.25, -0.25]), QuantSpec.parse("uint8/asym"), p).tolist()
    [1.0, 3.0, 3.0, 1.0]
    """
    scale, zero_point = align(qparams, spec, x)
    blocks = spec.granularity.blocks(x) if spec.granularity.kind == "group" else x
    return _encode_aligned(blocks.float(), spec, scale, zero_point).view(x.shape)


def _encode_aligned(x: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    fmt = spec.format
    if fmt.dtype is not None:
        limit = torch.finfo(fmt.dtype).max
        return _CastSTE.apply(x.clamp(-limit, limit), fmt.dtype)  # type: ignore[no-any-return]
    steps = x / scale
    if fmt.codebook:
        return nearest_code(steps, fmt.codebook)
    if scale.requires_grad:
        shift = torch.zeros_like(scale) if zero_point is None else zero_point
        rounded = _RoundSTE.apply(torch.clamp(steps, fmt.qmin - shift, fmt.qmax - shift))
        return rounded if zero_point is None else rounded + zero_point
    rounded = _RoundSTE.apply(steps)
    return torch.clamp(rounded if zero_point is None else rounded + zero_point, fmt.qmin, fmt.qmax)


class _CastSTE(torch.autograd.Function):
    """Round to a narrower float type; the gradient passes through unchanged."""

    @staticmethod
    def forward(ctx: object, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def decode(codes: Tensor, spec: QuantSpec, qparams: QParams) -> Tensor:
    """Values of ``codes``: ``(code - z) * s`` (or ``codebook[code] * s``), float32, same shape.

    >>> decode(torch.tensor([3.0]), QuantSpec.parse("uint8/asym"), QParams(torch.tensor([0.5]), torch.tensor([1.0])))
    tensor([1.])
    """
    fmt = spec.format
    if fmt.dtype is not None:
        return codes.float()
    scale, zero_point = align(qparams, spec, codes)
    blocks = spec.granularity.blocks(codes) if spec.granularity.kind == "group" else codes
    if fmt.codebook:
        table = torch.tensor(fmt.codebook, dtype=torch.float32, device=codes.device)
        return (table[blocks.long()] * scale).view(codes.shape)
    return (centred(blocks.float(), zero_point) * scale).view(codes.shape)


class _ValueSTE(torch.autograd.Function):
    """Forward the second argument, send the gradient to the first (straight-through for codebooks)."""

    @staticmethod
    def forward(ctx: object, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def simulate(x: Tensor, spec: QuantSpec, qparams: QParams) -> Tensor:
    """``decode(encode(x))`` with its straight-through gradient (elsewhere called fake quantization).

    >>> simulate(torch.tensor([0.3, 9.0]), QuantSpec.parse("int4"), QParams(torch.tensor([0.5])))
    tensor([0.5000, 3.5000])
    """
    value = decode(encode(x, spec, qparams), spec, qparams)
    return _ValueSTE.apply(x, value) if spec.format.codebook else value  # type: ignore[no-any-return]


def centred(codes: Tensor, zero_point: Tensor | None) -> Tensor:
    """``codes - zero_point``: what integer kernels multiply; 0 stands for the value 0.0."""
    return codes if zero_point is None else codes - zero_point


def align(qparams: QParams, spec: QuantSpec, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point shaped to broadcast against ``x`` (against its blocks, for groups)."""
    if spec.granularity.kind != "group":
        return qparams.scale, qparams.zero_point
    zero_point = qparams.zero_point
    return qparams.scale.unsqueeze(-1), None if zero_point is None else zero_point.unsqueeze(-1)


def live_qparams(x: Tensor, spec: QuantSpec) -> QParams:
    """Scale and zero point from the live tensor, for dynamic specs; constants for autograd.

    >>> live_qparams(torch.tensor([[1.0, -2.54]]), QuantSpec.parse("int8/token/dynamic")).scale
    tensor([[0.0200]])
    """
    with torch.no_grad():
        blocks = spec.granularity.blocks(x.detach().float())
        shape = spec.granularity.scale_shape(x.shape)
        return choose_qparams(blocks.amin(-1).view(shape), blocks.amax(-1).view(shape), spec)
