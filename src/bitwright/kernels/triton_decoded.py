"""Float activations against packed weights in Triton: codes become values in registers, sums are float32.

Codes of integers and 8-bit floats are exact in float16 and bfloat16, so scales wait until a group's sum is complete:
nothing but the sum rounds. Entries of a table are rounded to the activations' type once.
"""
# What runs in a kernel is typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels.triton_codes import interpreted, launch, run_length, tuned, unpack

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# inputs of a block; float32 has no tensor cores here, and its unrolled sums take long to compile
_LONGEST = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}


@triton.jit
def _value(
    code, table, zero, columns, there,
    kind: tl.constexpr, lowest: tl.constexpr, levels: tl.constexpr, per_row: tl.constexpr,
):  # fmt: skip
    if kind == "table":
        if per_row:
            value = tl.load(table + (columns[None, :] * levels + code), mask=there[None, :], other=0.0)
        else:
            value = tl.load(table + code)
    elif kind == "fp8_e4m3":
        # the same bits in float16, whose exponents are larger by 8; subnormals included
        half = ((code & 128) << 8 | (code & 127) << 7).to(tl.uint16).to(tl.float16, bitcast=True)
        value = half.to(tl.float32) * 256.0
    elif kind == "fp8_e5m2":
        value = (code << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = (code + lowest).to(tl.float32)
        if zero is not None:
            value = value - zero[None, :]
    return value


@tuned("n", "k", "size", "bits")
@triton.jit
def decoded_linear(
    x, weight, weight_scale, zeros, table, bias, y, k, row_bytes, m, n, bucket,
    bits: tl.constexpr, kind: tl.constexpr, lowest: tl.constexpr, levels: tl.constexpr, per_row: tl.constexpr,
    dot_type: tl.constexpr, size: tl.constexpr, block_k: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """``sum_g s_g * sum_(k in g) x[k] * value[k] + bias``, rounded to the type of ``y`` at the end."""
    rows = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)
    columns = tl.program_id(1) * block_n + tl.arange(0, block_n)
    inside = rows < m
    there = columns < n
    weight += (columns.to(tl.int64) * row_bytes)[None, :]
    out = tl.zeros((block_m, block_n), tl.float32)
    for begin in range(0, k, size):
        acc = tl.zeros((block_m, block_n), tl.float32)
        if zeros is None:
            zero = None
        else:
            zero = tl.load(zeros + columns, mask=there, other=0.0)
            zeros += n
        for first in range(begin, begin + size, block_k):
            at = first + tl.arange(0, block_k)
            a = tl.load(x + rows[:, None] * k + at[None, :], mask=inside[:, None] & (at < k)[None, :], other=0.0)
            code = unpack(weight, at[:, None], (at < k)[:, None] & there[None, :], bits)
            value = _value(code, table, zero, columns, there, kind, lowest, levels, per_row)
            acc = tl.dot(a.to(dot_type), value.to(dot_type), acc, input_precision="ieee")
        out = out + acc * tl.load(weight_scale + columns, mask=there, other=0.0)[None, :]
        weight_scale += n
    if bias is not None:
        out = out + tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + rows[:, None] * n + columns[None, :], out.to(y.dtype.element_ty), mask=inside[:, None] & there[None, :]
    )


def product(
    x: Tensor, layout: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None, bias: Tensor | None,
    y: Tensor, bits: int, kind: str, lowest: int,
) -> None:  # fmt: skip
    """Fill ``y [m, n]`` with rows ``x [m, k]`` times packed weights; scales and zero points are ``[groups, n]``."""
    k, (groups, n) = x.shape[1], scale.shape
    size, levels = k // groups, 0 if table is None else table.shape[-1]
    # the interpreter multiplies bfloat16 as the integers that it holds them in
    dot_type = tl.float32 if interpreted() else _TYPES[x.dtype]
    longest = _LONGEST[x.dtype]
    launch(
        decoded_linear, len(y), n, x, layout, scale, zero_point, table, bias, y, k, layout.shape[1],
        bits=bits, kind=kind, lowest=lowest, levels=levels, per_row=table is not None and table.dim() > 1,
        dot_type=dot_type, size=size, block_k=run_length(size, longest) if groups > 1 else longest,
    )  # fmt: skip
