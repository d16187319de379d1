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

import math

import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.codebook import fit_codebook, look_up, nearest_code
from bitwright.numerics.formats import Format
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


def round_stochastic(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``floor(x + u)`` with u uniform on [0, 1): x on average, with variance ``f (1 - f)`` of its fraction f.

    For gradients and optimizer states, never for weights or activations: their codes would not be reproducible.

    >>> round_stochastic(torch.tensor([2.0, -3.0])).tolist()
    [2.0, -3.0]
    """
    return torch.floor(x + torch.rand(x.shape, generator=generator, device=x.device))


def choose_qparams(lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
    """Scale and zero point for values in ``[lo, hi]``, one pair per entry.

    Symmetric: ``s = max(|lo|, |hi|) / largest``, where the format's largest value is qmax, the largest magnitude in its
    table, or the largest float. With ``scale(e8m0)`` it is a power of two instead: the shared exponent.
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
    if not fmt.is_scaled:
        return QParams(torch.ones_like(hi))
    if spec.symmetric:
        most = torch.maximum(-lo, hi)
        if spec.scale is not None and spec.scale.format.name == "e8m0":
            return QParams(shared_exponent(most, fmt))
        return QParams(
            (most / most.new_full((), fmt.largest)).clamp(min=EPS)
        )  # a GPU multiplies by 1 / (a Python number)
    scale = ((hi - lo) / lo.new_full((), fmt.qmax - fmt.qmin)).clamp(min=EPS)
    return QParams(scale, (fmt.qmin - (lo / scale).round()).clamp(fmt.qmin, fmt.qmax))


def shared_exponent(most: Tensor, fmt: Format) -> Tensor:
    """The power of two that blocks whose largest magnitude is ``most`` share, ``2**(floor(log2 most) - e)``.

    e is the exponent of the format's largest value, so the largest element may be clipped (OCP Microscaling Formats
    1.0, section 6.3). At least float32 epsilon, as every scale.

    >>> shared_exponent(torch.tensor([6.0, 7.9, 8.0]), QuantSpec.parse("fp4").format).tolist()
    [1.0, 1.0, 2.0]
    """
    exponent = torch.frexp(most.clamp(min=EPS)).exponent - math.frexp(fmt.largest)[1]
    return torch.ldexp(torch.ones_like(most), exponent).clamp(min=EPS)


def encode(x: Tensor, spec: QuantSpec, qparams: QParams) -> Tensor:
    """Codes of ``x`` as an integer-valued float32 tensor of the same shape; differentiable.

    ``code = clamp(rint(x / s) + z, qmin, qmax)``. Gradient to x: 1 where the code was not clipped, else 0. While the
    scale is being learned the clip comes before the rounding, which gives LSQ's gradient to the scale (Esser 2020,
    eq. 3). Table formats return the index of the nearest level; float formats return the rounded float itself, clipped
    to the largest one before the cast. Raises `NumericsError` when a fitted table is missing.

    >>> p = QParams(torch.tensor([0.5]), torch.tensor([1.0]))
    >>> encode(torch.tensor([0.25, 0.75, 1.25, -0.25]), QuantSpec.parse("uint8/asym"), p).tolist()
    [1.0, 3.0, 3.0, 1.0]
    """
    scale, zero_point = align(qparams, spec, x)
    blocks = spec.granularity.blocks(x) if spec.granularity.kind == "group" else x
    return _encode_aligned(blocks.float(), spec, scale, zero_point, qparams.codebook).view(x.shape)


def _encode_aligned(
    x: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None, codebook: Tensor | None
) -> Tensor:
    fmt = spec.format
    steps = x / scale if fmt.is_scaled else x
    if fmt.dtype is not None:
        return _CastSTE.apply(steps.clamp(-fmt.largest, fmt.largest), fmt.dtype)  # type: ignore[no-any-return]
    if fmt.is_table:
        return nearest_code(steps, fmt, codebook)
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

    Raises `NumericsError` when a fitted table is missing.

    >>> decode(torch.tensor([3.0]), QuantSpec.parse("uint8/asym"), QParams(torch.tensor([0.5]), torch.tensor([1.0])))
    tensor([1.])
    """
    fmt = spec.format
    if not fmt.is_scaled:
        return codes.float()
    scale, zero_point = align(qparams, spec, codes)
    blocks = spec.granularity.blocks(codes) if spec.granularity.kind == "group" else codes
    if fmt.is_table:
        return (look_up(blocks, fmt, qparams.codebook) * scale).view(codes.shape)
    return (centred(blocks.float(), zero_point) * scale).view(codes.shape)


class _ValueSTE(torch.autograd.Function):
    """Forward the second argument, send the gradient to the first."""

    @staticmethod
    def forward(ctx: object, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value``, whose gradient goes to ``x`` unchanged."""
    return _ValueSTE.apply(x, value)  # type: ignore[no-any-return]


def simulate(x: Tensor, spec: QuantSpec, qparams: QParams) -> Tensor:
    """``decode(encode(x))`` with its straight-through gradient (elsewhere called fake quantization).

    >>> simulate(torch.tensor([0.3, 9.0]), QuantSpec.parse("int4"), QParams(torch.tensor([0.5])))
    tensor([0.5000, 3.5000])
    """
    value = decode(encode(x, spec, qparams), spec, qparams)
    return straight_through(x, value) if spec.format.is_table else value


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
    """Scale and zero point from the extremes of a tensor, and its fitted table if any; constants for autograd.

    >>> live_qparams(torch.tensor([[1.0, -2.54]]), QuantSpec.parse("int8/token/dynamic")).scale
    tensor([[0.0200]])
    """
    with torch.no_grad():
        blocks = spec.granularity.blocks(x.detach().float())
        shape = spec.granularity.scale_shape(x.shape)
        found = choose_qparams(blocks.amin(-1).view(shape), blocks.amax(-1).view(shape), spec)
        return with_codebook(x.detach(), spec, found)


def with_codebook(x: Tensor, spec: QuantSpec, qparams: QParams, importance: Tensor | None = None) -> QParams:
    """``qparams`` with the table fitted to ``x`` by these scales; as they are for formats without a fitted table.

    The error that k-means minimises is that of the values: of x, not of ``x / s``. ``importance`` has the shape of x:
    a weight per element (SqueezeLLM, Kim 2024, section 4.1: the diagonal of the Fisher information).
    """
    if not spec.format.fit:
        return qparams
    scale, _ = align(qparams, spec, x)
    blocks = spec.granularity.blocks(x) if spec.granularity.kind == "group" else x
    weights = scale.square().expand(blocks.shape).reshape(x.shape)
    if importance is not None:
        weights = weights * importance
    table = fit_codebook((blocks.float() / scale).view(x.shape), spec, weights)
    return QParams(qparams.scale, qparams.zero_point, table)
