"""Integer products in Triton: rows of activations encoded to int8, int32 sums, the epilogue of `kernels.reference`.

Every float operation stands alone and rounds once, as in the definition: a true division, no fused multiply-adds.
"""
# What runs in a kernel is typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels.triton_codes import launch, run_length, tuned, unpack

_LONGEST = 4096  # inputs that a program encodes at once


class Range(NamedTuple):
    """Codes of an activation: bounds, and whether a range found from the rows has zero point 0."""

    qmin: int
    qmax: int
    symmetric: bool


@triton.jit
def _rint(x):
    # |x| < 2**22 here: the sum keeps no bits behind the point, rounded half to even
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _clip(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _extremes(x, k, block: tl.constexpr):
    # the range contains 0; the third result is 0, or NaN where a value is not finite
    lows = tl.zeros((block,), tl.float32)
    highs = tl.zeros((block,), tl.float32)
    poison = tl.zeros((block,), tl.float32)
    for first in range(0, k, block):
        at = first + tl.arange(0, block)
        values = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
        lows = tl.minimum(lows, values)
        highs = tl.maximum(highs, values)
        poison += values * 0.0
    return tl.min(lows, 0), tl.max(highs, 0), tl.sum(poison, 0)


@triton.jit
def encode_rows(
    x, codes, scales, shifts, scale, zero_point, k, per_row,
    qmin: tl.constexpr, qmax: tl.constexpr, symmetric: tl.constexpr, offset: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A row as bytes ``code - offset``, its scale, and the shift that makes them ``code - zero_point``.

    A row that is not finite has no range of its own: its scale is NaN, and so is what it is multiplied to.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * k
    codes += row * k
    if scale is None:
        low, high, poison = _extremes(x, k, block)
        if symmetric:
            step = tl.maximum(tl.div_rn(tl.maximum(-low, high), qmax), 1.1920928955078125e-07)
            zero = step * 0.0
        else:
            step = tl.maximum(tl.div_rn(high - low, qmax - qmin), 1.1920928955078125e-07)
            zero = _clip(qmin - _rint(tl.div_rn(low, step)), qmin * 1.0, qmax * 1.0)
        kept = step + poison
    else:
        step = tl.load(scale + row * per_row)
        kept = step
        if zero_point is None:
            zero = step * 0.0
        else:
            zero = tl.load(zero_point + row * per_row)
    for first in range(0, k, block):
        at = first + tl.arange(0, block)
        values = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
        # clipping before rounding is the same: rounding is monotone and the bounds are integers
        rounded = _rint(_clip(tl.div_rn(values, step), qmin - zero, qmax - zero))
        tl.store(codes + at, (rounded + (zero - offset)).to(tl.int8), mask=at < k)
    tl.store(scales + row, kept)
    tl.store(shifts + row, (offset - zero).to(tl.int32))


@triton.jit
def _sums(
    x, weight, rows, begin, end, k, inside, there, shift, sums, columns,
    bits: tl.constexpr, lowest: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((block_m, block_n), tl.int32)
    for first in range(begin, end, block_k):
        at = first + tl.arange(0, block_k)
        a = tl.load(x + rows[:, None] * k + at[None, :], mask=inside[:, None] & (at < end)[None, :], other=0)
        w = unpack(weight, at[:, None], (at < end)[:, None] & there[None, :], bits) + lowest
        acc = tl.dot(a, w.to(tl.int8), acc, out_dtype=tl.int32)
    return acc + shift[:, None] * tl.load(sums + columns, mask=there, other=0)[None, :]


@tuned("n", "k", "size", "bits")
@triton.jit
def integer_linear(
    x, scales, shifts, weight, weight_scale, sums, bias, y, k, row_bytes, m, n, bucket,
    bits: tl.constexpr, lowest: tl.constexpr, size: tl.constexpr, grouped: tl.constexpr, block_k: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """``acc * (s_x * s_w) + bias``, or with groups ``(sum_g acc_g * s_w_g) * s_x + bias``, groups in order."""
    rows = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)
    columns = tl.program_id(1) * block_n + tl.arange(0, block_n)
    inside = rows < m
    there = columns < n
    scale = tl.load(scales + rows, mask=inside, other=0.0)
    shift = tl.load(shifts + rows, mask=inside, other=0)
    weight += (columns.to(tl.int64) * row_bytes)[None, :]
    if grouped:
        total = tl.zeros((block_m, block_n), tl.float32)
        for begin in range(0, k, size):
            acc = _sums(x, weight, rows, begin, begin + size, k, inside, there, shift, sums, columns,
                        bits, lowest, block_m, block_n, block_k)  # fmt: skip
            step = tl.load(weight_scale + columns, mask=there, other=0.0)
            total = total + acc.to(tl.float32) * step[None, :]
            sums += n
            weight_scale += n
        out = total * scale[:, None]
    else:
        acc = _sums(x, weight, rows, 0, k, k, inside, there, shift, sums, columns,
                    bits, lowest, block_m, block_n, block_k)  # fmt: skip
        step = tl.load(weight_scale + columns, mask=there, other=0.0)
        out = acc.to(tl.float32) * (scale[:, None] * step[None, :])
    if bias is not None:
        out = out + tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * n + columns[None, :], out, mask=inside[:, None] & there[None, :])


def encode(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bounds: Range) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[m, k]`` as bytes, with a scale and a shift per row; without ``scale`` a row's own range is taken."""
    m, k = x.shape
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    shifts = torch.empty(m, dtype=torch.int32, device=x.device)
    per_row, offset = int(scale is not None and scale.numel() > 1), 128 if bounds.qmax > 127 else 0
    block = min(_LONGEST, triton.next_power_of_2(k))
    encode_rows[(m,)](
        x, codes, scales, shifts, scale, zero_point, k, per_row, *bounds, offset, block, enable_fp_fusion=False
    )
    return codes, scales, shifts


def product(
    x: tuple[Tensor, Tensor, Tensor], layout: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, y: Tensor,
    bits: int, lowest: int,
) -> None:  # fmt: skip
    """Fill ``y [m, n]`` with the product of encoded rows and packed weights; scales and sums are ``[groups, n]``."""
    k, (groups, n) = x[0].shape[1], scale.shape
    size = k // groups
    launch(
        integer_linear, len(y), n, *x, layout, scale, sums, bias, y, k, layout.shape[1],
        bits=bits, lowest=lowest, size=size, grouped=groups > 1, block_k=run_length(size, 128) if groups > 1 else 128,
    )  # fmt: skip
