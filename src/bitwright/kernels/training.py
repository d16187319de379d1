"""The products of a training step on the CPU: forward by the shipped integer kernel, backward in float32 or bfloat16.

With ``xhat`` and ``what`` the values of the codes, the backward is that of ``y = xhat @ what.T + bias``; the gradients
then go through the quantizers by the rules of `numerics.ste`. Only the float operands are kept for it, which float
training keeps too: codes and masks follow from them. Under autocast to bfloat16 the two products of the backward are
computed in bfloat16, which holds 8-bit codes exactly, where the CPU multiplies it in hardware (elsewhere it would be
slower than float32); the forward is the same integers in every mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.kernels import cpu, passes  # passes registers the operators
from bitwright.kernels.operators import call
from bitwright.kernels.reference import Geometry, largest_code, not_integers
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.numerics.ste import Learning, Sums, range_gradients

_INT32 = 2**31 - 1
_HAS_BF16 = torch.cpu._is_avx512_bf16_supported()


@dataclass(frozen=True, slots=True)
class Operand:
    """How one operand is encoded and how its range learns; ``scale`` and ``offset`` are the parameters that learn."""

    spec: QuantSpec
    qparams: QParams
    learning: Learning
    scale: Tensor | None
    offset: Tensor | None

    @property
    def bounds(self) -> list[int]:
        """Smallest and largest code."""
        return [self.spec.format.qmin, self.spec.format.qmax]


def serves(x: Tensor, weight: Tensor, x_spec: QuantSpec, w_spec: QuantSpec) -> bool:
    """Whether the native kernels compute this product: float32 on the CPU, integer codes, a sum that fits 32 bits."""
    size = w_spec.granularity.size
    return (
        cpu.native is not None
        and not not_integers(w_spec, x_spec)
        and size % 4 == 0  # what the kernel reads at once
        and w_spec.format.qmin < 0
        and x.device.type == weight.device.type == "cpu"
        and x.dtype is weight.dtype is torch.float32
        and x.numel() > 0
        and (size or weight[0].numel()) * largest_code(x_spec) * largest_code(w_spec) <= _INT32
    )


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, input: Operand, stored: Operand, geometry: Geometry | None
) -> Tensor:
    """``[..., k] x [n, k] -> [..., n]``, or with a geometry ``[n, c, h, w] x [o, c/g, kh, kw] -> [n, o, h', w']``.

    Equal to `reference.linear` and `reference.conv2d` on the codes bit for bit; call it where `serves` says so.
    """
    narrow = _HAS_BF16 and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    return _Product.apply(  # type: ignore[no-any-return]
        x, weight, bias, input.scale, input.offset, stored.scale, input, stored, geometry, narrow
    )


def serves_add(a: Tensor, b: Tensor, left: QuantSpec, right: QuantSpec) -> bool:
    """Whether the native kernel adds these: two float32 CPU tensors of one shape with static ranges of 8 bits."""
    narrow = all(spec.format.is_integer and spec.format.bits <= 8 and not spec.dynamic for spec in (left, right))
    plain = all(x.dtype is torch.float32 and x.device.type == "cpu" for x in (a, b))
    return cpu.native is not None and narrow and plain and a.shape == b.shape and a.numel() > 0


def add(a: Tensor, b: Tensor, left: Operand, right: Operand) -> Tensor:
    """Sum of two quantized tensors, equal to `reference.add` on the codes bit for bit; only floats are kept."""
    return _Sum.apply(a, b, left.scale, left.offset, right.scale, right.offset, left, right)  # type: ignore[no-any-return]


def serves_values(x: Tensor, spec: QuantSpec) -> bool:
    """Whether the native kernels decode ``x``: float32 on the CPU, static codes of 8 bits with one scale."""
    narrow = spec.format.is_integer and spec.format.bits <= 8 and not spec.dynamic and spec.granularity.kind == "tensor"
    return cpu.native is not None and narrow and x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() > 0


def values(x: Tensor, operand: Operand) -> Tensor:
    """The values of the codes of ``x``, equal to `numerics.ste.simulated` bit for bit; only ``x`` is kept."""
    return _Values.apply(x, operand.scale, operand.offset, operand)  # type: ignore[no-any-return]


def moments(y: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased variance and mean over all axes but 1, float64; sums are taken of ``y - origin``, near the mean."""
    if cpu.native is None or y.device.type != "cpu" or y.dim() not in (2, 4):
        return torch.var_mean(y.double(), [axis for axis in range(y.dim()) if axis != 1], correction=1)
    total, square = torch.ops.bitwright.moments(y, origin)
    count = y.numel() // y.shape[1]
    return (square - total * total / count) / (count - 1), origin.double() + total / count


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, offset: Tensor | None, operand: Operand) -> Tensor:
        step, zero = operand.qparams.scale, operand.qparams.zero_point
        ctx.save_for_backward(x, step, zero)
        ctx.bounds, ctx.learning = operand.bounds, operand.learning
        codes, factor = _values(x, step, zero, operand.bounds, torch.float32)
        assert factor is not None
        return codes.mul_(factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        dx, sums = _through(grads[0], x, scale, zero, ctx.bounds, ctx.learning, rows=1)
        return (dx, *range_gradients(sums, ctx.bounds, zero, ctx.learning), None)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        left, right = rest[4:]
        ranges = [(side.qparams.scale, side.qparams.zero_point) for side in (left, right)]
        ctx.save_for_backward(a, b, *ranges[0], *ranges[1])
        ctx.sides = [(side.bounds, side.learning) for side in (left, right)]
        return call(torch.ops.bitwright.add, a, b, *ranges[0], *ranges[1], left.bounds, right.bounds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *ranges = ctx.saved_tensors
        through, learned = [], []
        for x, scale, zero, (bounds, learning) in ((a, *ranges[:2], ctx.sides[0]), (b, *ranges[2:], ctx.sides[1])):
            dx, sums = _through(grads[0], x, scale, zero, bounds, learning, rows=1)
            through.append(dx)
            learned += range_gradients(sums, bounds, zero, learning)
        return (*through, *learned, None, None)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        input, stored, geometry, narrow = rest[3:]
        ctx.save_for_backward(x, weight, input.qparams.scale, input.qparams.zero_point, stored.qparams.scale)
        ctx.input, ctx.stored = (input.spec, input.bounds, input.learning), (stored.bounds, stored.learning)
        ctx.geometry, ctx.narrow, ctx.has_bias = geometry, narrow, bias is not None
        ranges = (input.qparams.scale, input.qparams.zero_point, input.bounds, stored.qparams.scale, stored.bounds)
        if geometry is None:
            return torch.ops.bitwright.encoded_linear(x, weight, bias, *ranges)
        g = geometry
        return torch.ops.bitwright.encoded_conv2d(x, weight, bias, *ranges, g.stride, g.padding, g.dilation, g.groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_scale, x_zero, w_scale = ctx.saved_tensors
        (spec, x_bounds, x_learning), (w_bounds, w_learning) = ctx.input, ctx.stored
        needs = ctx.needs_input_grad
        dtype = torch.bfloat16 if ctx.narrow else torch.float32
        wanted = (needs[0] or needs[3] or needs[4], needs[1] or needs[5], ctx.has_bias and needs[2])
        values, factor = _values(x, x_scale, x_zero, x_bounds, dtype) if wanted[1] else (x, None)
        blocks = passes.blocks_of(weight, w_scale)
        codes = torch.ops.bitwright.weight_codes(weight, w_scale, w_bounds)[0].view(blocks.shape)
        gradients = _linear_gradients if ctx.geometry is None else _conv_gradients
        filters = (codes * w_scale.reshape(-1, *[1] * (weight.dim() - 1))).to(dtype).view(weight.shape)
        dx, dw, db = gradients(grads[0], values, filters, wanted, ctx.geometry)
        x_range: tuple[Tensor | None, Tensor | None] = (None, None)
        w_range: tuple[Tensor | None, Tensor | None] = (None, None)
        if dx is not None and spec.dynamic:  # a range taken from x itself clips nothing
            dx = dx.float()
        elif dx is not None:
            dx, sums = _through(dx, x, x_scale, x_zero, x_bounds, x_learning, rows=1)
            x_range = range_gradients(sums, x_bounds, x_zero, x_learning)
        if dw is not None:
            dw = dw.float() if factor is None else dw.float() * factor
            dw, sums = _through(dw.reshape(blocks.shape), blocks, w_scale, None, w_bounds, w_learning, len(blocks))
            dw = dw.view(weight.shape)
            w_range = range_gradients(sums, w_bounds, None, w_learning)
        return (
            dx if needs[0] else None, dw if needs[1] else None, db, *x_range, w_range[0], None, None, None, None,
        )  # fmt: skip


def _values(
    x: Tensor, scale: Tensor, zero: Tensor | None, bounds: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Codes of ``x`` and the factor that makes them values; with one scale per token: values, and no factor."""
    if scale.numel() == 1:
        return torch.ops.bitwright.centred_codes(x, scale, zero, bounds, dtype is torch.bfloat16), scale
    shift = torch.zeros_like(scale) if zero is None else zero
    codes = torch.clamp((x / scale).round(), bounds[0] - shift, bounds[1] - shift)
    return (codes * scale).to(dtype), None


def _through(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, bounds: list[int], learning: Learning, rows: int
) -> tuple[Tensor, Sums]:
    """The gradient to ``x`` and the sums in the shape of ``scale``."""
    dx, sums = torch.ops.bitwright.straight_through(grad, x, scale, zero, bounds, learning.rule != "none", rows)
    sums = sums if scale.numel() == rows else sums.sum(1, keepdim=True)
    return dx, Sums(*(part.view(scale.shape) for part in sums))


def _linear_gradients(
    grad: Tensor, values: Tensor, filters: Tensor, wanted: tuple[bool, ...], geometry: Geometry | None
) -> tuple[Tensor | None, ...]:
    flat = grad.reshape(-1, grad.shape[-1])
    db = flat.sum(0) if wanted[2] else None
    flat = flat.to(filters.dtype)
    dx = (flat @ filters).view(values.shape) if wanted[0] else None
    dw = flat.t() @ values.reshape(-1, values.shape[-1]) if wanted[1] else None
    return dx, dw, db


def _conv_gradients(
    grad: Tensor, values: Tensor, filters: Tensor, wanted: tuple[bool, ...], geometry: Geometry | None
) -> tuple[Tensor | None, ...]:
    assert geometry is not None
    g, layout = geometry, torch.channels_last
    grad = grad.contiguous(memory_format=layout)
    db = grad.sum((0, 2, 3)) if wanted[2] else None
    values, filters = (
        values.to(filters.dtype).contiguous(memory_format=layout),
        filters.contiguous(memory_format=layout),
    )
    grad = grad.to(filters.dtype)
    # For the weights of a 1x1 convolution with strides, oneDNN of torch 2.13 writes outside of its memory on AVX2
    # (channels-last, channels no multiple of 8): those see only the pixels that they read, without strides.
    thin = filters.shape[2:] == (1, 1) and max(g.stride) > 1 and max(g.padding) == 0
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad, values, filters, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups,
        [wanted[0], wanted[1] and not thin, False],
    )  # fmt: skip
    if wanted[1] and thin:
        read = values[:, :, :: g.stride[0], :: g.stride[1]].contiguous(memory_format=layout)
        _, dw, _ = torch.ops.aten.convolution_backward(
            grad, read, filters, None, [1, 1], [0, 0], [1, 1], False, [0, 0], g.groups, [False, True, False]
        )
    return (dx if wanted[0] else None), (dw if wanted[1] else None), db
