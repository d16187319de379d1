"""Gradients of a quantizer whose range may be learned: what reaches x, the scale and the offset.

The forward is `affine.encode`. With ``v = x / s`` and codes clipped to ``[lo, hi] = [qmin - z, qmax - z]``:

======= ======================= ================== ================== ==================
rule    gradient to x           to s, inside       to s, at or below  to s, at or above
======= ======================= ================== ================== ==================
none    1 where not clipped     0                  0                  0
lsq     1 where lo <= v <= hi   rint(v) - v        lo                 hi
lsq+    1 where lo <= v <= hi   rint(v) - v        qmin               qmax
pact    1 where lo <= v <= hi   0                  0                  hi
======= ======================= ================== ================== ==================

``lsq+`` also learns an offset ``beta = -z s`` with gradient 1 where clipped, 0 inside. Sources: LSQ (Esser 2020,
eq. 3), LSQ+ (Bhalgat 2020, eq. 4-5), PACT (Choi 2018, eq. 3). Everything here is with respect to values: codes that
leave this file carry the scale's whole gradient, so whoever multiplies by the scale afterwards uses it as a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bitwright.numerics.affine import align, centred, encode, simulate, straight_through
from bitwright.numerics.codebook import look_up
from bitwright.numerics.spec import QParams, QuantSpec

Rule = Literal["none", "lsq", "lsq+", "pact"]


@dataclass(frozen=True, slots=True)
class Learning:
    """How a range learns: the rule, and the factor on the gradients of scale and offset."""

    rule: Rule = "none"
    gain: float = 1.0


class Sums(NamedTuple):
    """Sums of the gradient to values, per scale: times ``rint(v) - v`` inside, and where clipped below and above."""

    inside: Tensor
    below: Tensor
    above: Tensor


def codes_with_gradient(
    x: Tensor, spec: QuantSpec, qparams: QParams, learning: Learning, scale: Tensor | None, offset: Tensor | None
) -> Tensor:
    """Centred codes of ``x`` (`affine.encode` minus the zero point), differentiable in x, ``scale`` and ``offset``.

    ``scale`` and ``offset`` are the parameters behind ``qparams`` (None where not learned); the shapes are those of
    the spec's granularity. Of a table these are its levels, differentiable in x alone, clipped or not.

    >>> x, s = torch.tensor([-5.0, -1.3, 0.74, 9.0]), torch.tensor([0.5], requires_grad=True)
    >>> spec, learning = QuantSpec.parse("int4"), Learning("lsq")
    >>> codes = codes_with_gradient(x, spec, QParams(s.detach()), learning, s, None)
    >>> (codes * 0.5).sum().backward(); round(s.grad.item(), 2)
    -1.88
    """
    if spec.format.is_table:
        return _levels(x, spec, qparams)
    return _Codes.apply(x, scale, offset, spec, qparams, learning)  # type: ignore[no-any-return]


def _levels(x: Tensor, spec: QuantSpec, qparams: QParams) -> Tensor:
    blocks = spec.granularity.blocks(x) if spec.granularity.kind == "group" else x
    steps = blocks.float() / align(qparams, spec, x)[0]
    levels = look_up(encode(x, spec, qparams), spec.format, qparams.codebook)
    return straight_through(steps, levels.view(steps.shape)).view(x.shape)


def simulated(
    x: Tensor, spec: QuantSpec, qparams: QParams, learning: Learning, scale: Tensor | None, offset: Tensor | None
) -> Tensor:
    """Values of the codes of ``x`` with the gradients of `codes_with_gradient`; other formats as `affine.simulate`."""
    if not spec.format.is_integer:
        return simulate(x, spec, qparams)
    codes = codes_with_gradient(x, spec, qparams, learning, scale, offset)
    blocks = spec.granularity.blocks(codes) if spec.granularity.kind == "group" else codes
    return (blocks * align(qparams, spec, x)[0]).view(x.shape)


def range_gradients(
    sums: Sums, bounds: Sequence[int], zero_point: Tensor | None, learning: Learning
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of scale and offset by the table above, times the gain; ``bounds`` are qmin and qmax."""
    qmin, qmax = bounds
    shift = 0.0 if zero_point is None else zero_point
    if learning.rule == "lsq":
        return (sums.inside + (qmin - shift) * sums.below + (qmax - shift) * sums.above) * learning.gain, None
    if learning.rule == "lsq+":
        scale = (sums.inside + qmin * sums.below + qmax * sums.above) * learning.gain
        return scale, (sums.below + sums.above) * learning.gain
    if learning.rule == "pact":
        return (qmax - shift) * sums.above * learning.gain, None
    return None, None


def values_backward(
    grad: Tensor, x: Tensor, spec: QuantSpec, qparams: QParams, learning: Learning
) -> tuple[Tensor, Sums | None]:
    """Gradient to ``x`` and the sums, from the gradient to the values ``codes * scale``; shapes of x and the scale."""
    scale, zero_point = align(qparams, spec, x)
    grouped = spec.granularity.kind == "group"
    blocks = spec.granularity.blocks if grouped else lambda t: t
    steps, g = blocks(x).float() / scale, blocks(grad)
    lo = spec.format.qmin - (0.0 if zero_point is None else zero_point)
    hi = spec.format.qmax - (0.0 if zero_point is None else zero_point)
    rounded = steps.round()
    if learning.rule == "none":
        return (g * ((rounded >= lo) & (rounded <= hi))).view(x.shape), None
    below, above = steps <= lo, steps >= hi
    shape = qparams.scale.shape

    def total(part: Tensor) -> Tensor:
        return part.sum(-1) if grouped else part.sum_to_size(shape)

    sums = Sums(total(torch.where(below | above, 0.0, g * (rounded - steps))), total(g * below), total(g * above))
    return (g * ((steps >= lo) & (steps <= hi))).view(x.shape), sums


class _Codes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        spec: QuantSpec,
        qparams: QParams,
        learning: Learning,
    ) -> Tensor:
        ctx.save_for_backward(x, qparams.scale, qparams.zero_point)
        ctx.spec, ctx.learning = spec, learning
        return _centred(encode(x, spec, qparams), spec, qparams)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        qparams, spec = QParams(scale, zero_point), ctx.spec
        step = align(qparams, spec, x)[0]
        grad = spec.granularity.blocks(grads[0]) if spec.granularity.kind == "group" else grads[0]
        dx, sums = values_backward((grad / step).view(x.shape), x, spec, qparams, ctx.learning)
        none = (
            (None, None)
            if sums is None
            else range_gradients(sums, (spec.format.qmin, spec.format.qmax), zero_point, ctx.learning)
        )
        wanted = [grad if needed else None for grad, needed in zip(none, ctx.needs_input_grad[1:3], strict=True)]
        return (dx, *wanted, None, None, None)


def _centred(codes: Tensor, spec: QuantSpec, qparams: QParams) -> Tensor:
    if spec.granularity.kind != "group" or qparams.zero_point is None:
        return centred(codes, qparams.zero_point)
    return (spec.granularity.blocks(codes) - qparams.zero_point.unsqueeze(-1)).view(codes.shape)
