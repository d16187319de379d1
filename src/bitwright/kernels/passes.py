"""Native passes of a training step as torch operators: encode, product, straight-through gradient, moments.

Opaque to autograd (`kernels.training` builds the gradients from them) and to ``torch.compile``. All take float32 CPU
tensors whose elements fill their memory; `bounds` are (qmin, qmax).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.errors import KernelError
from bitwright.kernels import cpu
from bitwright.kernels.conv_sizes import conv2d_out
from bitwright.kernels.grouped import lanes
from bitwright.kernels.operators import call

_LIBRARY = torch.library.Library("bitwright", "FRAGMENT")


def blocks_of(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight with everything that shares a scale in one row: a matrix ``[n * groups, size]`` where groups do.

    >>> blocks_of(torch.zeros(6, 8), torch.ones(6, 2)).shape
    torch.Size([12, 4])
    """
    return weight if scale.numel() <= len(weight) else weight.reshape(scale.numel(), -1)


def _weight_codes(weight: Tensor, scale: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor]:
    blocks, scale = blocks_of(weight, scale).contiguous(), scale.contiguous()
    _check("weight_codes", (blocks, scale), scale, len(blocks))
    codes = torch.empty(weight.shape, dtype=torch.int8)
    sums = torch.empty(len(blocks), dtype=torch.int32)
    cpu.native.weight_codes(
        cpu.BEST_ISA, blocks.data_ptr(), len(blocks), blocks[0].numel(), scale.data_ptr(), int(scale.numel() > 1),
        *bounds, codes.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return codes, sums


def _poisoned(out: Tensor, x: Tensor) -> Tensor:
    """``out``, or NaN everywhere if ``x`` holds one: codes cannot carry it on, and training must not go on unaware."""
    x = _dense(x)
    if cpu.native.has_nan(x.data_ptr(), x.numel(), torch.get_num_threads()):
        out.fill_(torch.nan)
    return out


def _encoded_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_scale: Tensor, x_zero: Tensor | None, x_bounds: list[int],
    w_scale: Tensor, w_bounds: list[int],
) -> Tensor:  # fmt: skip
    codes, sums = _weight_codes(weight, w_scale, w_bounds)
    layout, rest = cpu.pack_linear(codes, 8), (bias, x_scale, x_zero)
    if len(sums) > len(weight):
        sums, sizes = sums.view(w_scale.shape), (len(weight), weight.numel() // len(sums))
        constants = (layout, lanes(w_scale), lanes(sums))
        out = call(torch.ops.bitwright.grouped_linear, x, *constants, *rest, *sizes, 8, *x_bounds, cpu.BEST_ISA)
        return _poisoned(out, x)
    per_row = w_scale.view(-1).expand(len(weight)).contiguous()
    out = call(torch.ops.bitwright.linear, x, layout, per_row, sums, *rest, 8, *x_bounds, cpu.BEST_ISA)
    return _poisoned(out, x)


def _encoded_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_scale: Tensor, x_zero: Tensor | None, x_bounds: list[int],
    w_scale: Tensor, w_bounds: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    codes, sums = _weight_codes(weight, w_scale, w_bounds)
    per_row = w_scale.view(-1).expand(len(weight)).contiguous()
    out = call(
        torch.ops.bitwright.conv2d, x, cpu.pack_conv(codes, 8, groups), per_row, sums, bias, x_scale, x_zero,
        list(weight.shape[2:]), stride, padding, dilation, groups, 8, *x_bounds, cpu.BEST_ISA,
    )  # fmt: skip
    return _poisoned(out, x)


def _encoded_conv2d_shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    stride, padding, dilation = rest[6:9]
    return conv2d_out(x, len(weight), list(weight.shape[2:]), stride, padding, dilation)


def _centred_codes(x: Tensor, scale: Tensor, zero: Tensor | None, bounds: list[int], narrow: bool) -> Tensor:
    x = _dense(x)
    _check("centred_codes", (x, scale, zero), scale, 1)
    out = _centred_codes_shape(x, scale, zero, bounds, narrow)
    wide, half = (0, out.data_ptr()) if narrow else (out.data_ptr(), 0)
    cpu.native.centred_codes(
        cpu.BEST_ISA, x.data_ptr(), x.numel(), scale.data_ptr(), _address(zero), *bounds, wide, half,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _centred_codes_shape(x: Tensor, scale: Tensor, zero: Tensor | None, bounds: list[int], narrow: bool) -> Tensor:
    return torch.empty_like(_dense(x), dtype=torch.bfloat16 if narrow else torch.float32)


def _straight_through(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, bounds: list[int], learned: bool, rows: int
) -> tuple[Tensor, Tensor]:
    x, scale = _dense(x) if rows == 1 else x.contiguous(), scale.contiguous()
    grad = grad.contiguous(memory_format=_format(x))
    wide = None if grad.dtype is torch.bfloat16 else grad
    _check("straight_through", (x, wide, scale, zero), scale, rows)
    if grad.shape != x.shape or x.numel() % rows:
        raise KernelError(f"straight_through: {list(x.shape)} in {rows} rows, gradient {list(grad.shape)}")
    dx, sums = torch.empty_like(x), torch.zeros(3, rows)
    wide, half = (0, grad.data_ptr()) if grad.dtype is torch.bfloat16 else (grad.data_ptr(), 0)
    cpu.native.straight_through(
        cpu.BEST_ISA, wide, half, x.data_ptr(), rows, x.numel() // rows, scale.data_ptr(), int(scale.numel() > 1),
        _address(zero), *bounds, learned, dx.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx, sums


def _straight_through_shape(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = rest[-1]
    return torch.empty_like(_dense(x) if rows == 1 else x.contiguous()), x.new_empty(3, rows)


def _moments(y: Tensor, origin: Tensor) -> Tensor:
    channels = origin.numel()
    y, origin = (y.permute(0, 2, 3, 1) if y.dim() == 4 else y).contiguous(), origin.contiguous()
    _check("moments", (y, origin), origin, y.shape[-1])
    sums = torch.empty(2, channels, dtype=torch.float64)
    cpu.native.moments(
        cpu.BEST_ISA, y.data_ptr(), y.numel() // channels, channels, origin.data_ptr(), sums[0].data_ptr(),
        sums[1].data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sums


def _check(op: str, floats: tuple[Tensor | None, ...], scale: Tensor, rows: int) -> None:
    for part in floats:
        if part is not None and part.dtype is not torch.float32:
            raise KernelError(f"{op}: takes float32, got {part.dtype}")
    if scale.numel() not in (1, rows):
        raise KernelError(f"{op}: {scale.numel()} values do not fit {rows} rows")


def _dense(x: Tensor) -> Tensor:
    """``x`` with its elements in one piece of memory, channels-last images as they are."""
    return x.contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


_ENCODED = "Tensor x, Tensor weight, Tensor? bias, Tensor x_scale, Tensor? x_zero, int[2] x_bounds, Tensor w_scale, int[2] w_bounds"  # noqa: E501
_OPERATORS = [
    (f"encoded_linear({_ENCODED}) -> Tensor", _encoded_linear, lambda x, w, *_: x.new_empty((*x.shape[:-1], len(w)))),
    (
        f"encoded_conv2d({_ENCODED}, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
        _encoded_conv2d,
        _encoded_conv2d_shape,
    ),
    (
        "weight_codes(Tensor weight, Tensor scale, int[2] bounds) -> (Tensor, Tensor)",
        _weight_codes,
        lambda w, scale, _: (
            w.new_empty(w.shape, dtype=torch.int8),
            w.new_empty(max(len(w), scale.numel()), dtype=torch.int32),
        ),
    ),
    (
        "centred_codes(Tensor x, Tensor scale, Tensor? zero, int[2] bounds, bool narrow) -> Tensor",
        _centred_codes,
        _centred_codes_shape,
    ),
    (
        "straight_through(Tensor grad, Tensor x, Tensor scale, Tensor? zero, int[2] bounds, bool learned, int rows) "
        "-> (Tensor, Tensor)",
        _straight_through,
        _straight_through_shape,
    ),
    ("snapshot(Tensor x) -> Tensor", torch.clone, torch.empty_like),
    (
        "moments(Tensor y, Tensor origin) -> Tensor",
        _moments,
        lambda y, origin: y.new_empty(2, origin.numel(), dtype=torch.float64),
    ),
]
for _schema, _run, _shape in _OPERATORS:
    _name = _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"bitwright::{_name}", _shape, lib=_LIBRARY)
