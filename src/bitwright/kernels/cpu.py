"""Native CPU kernels as torch operators: checks, allocation and calls into ``bitwright._native``.

The native module knows no torch; it gets addresses and sizes. Here tensors are checked, outputs allocated and
``bitwright::linear``, ``bitwright::conv2d`` and ``bitwright::add`` registered with their shapes, so that
``torch.compile(fullgraph=True)`` sees through them. Each equals the simulation in torch bit for bit
(``csrc/dispatch.h`` states the arithmetic). Where the package was installed without a compiler, ``native`` is
None, ``cpu_features()`` is empty and every operator raises KernelError.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from bitwright.errors import KernelError, NumericsError
from bitwright.kernels.conv_sizes import conv2d_out
from bitwright.kernels.operators import address as _address
from bitwright.kernels.operators import register

try:
    import bitwright._native as native  # pyright: ignore[reportMissingImports]
except ImportError:
    native: Any = None

ISA: dict[str, int] = {"portable": 0, "avx2": 1, "avx512_vnni": 2, "neon_dotprod": 3, "neon_i8mm": 4}
"""Instruction sets by their name in ``cpu_features()``; ``portable`` runs wherever the module was built."""


def cpu_features() -> frozenset[str]:
    """What machine and installation offer: ``native`` when built, and the instruction sets among ``ISA``.

    >>> cpu_features() <= {"native", "avx2", "avx512_vnni", "neon_dotprod", "neon_i8mm"}
    True
    """
    return _FEATURES


_FEATURES: frozenset[str] = frozenset() if native is None else frozenset(["native", *native.features()])
BEST_ISA = max((ISA[name] for name in _FEATURES if name in ISA), default=ISA["portable"])
"""The widest instruction set of this machine; x86 and Arm names never meet."""


def pack_linear(codes: Tensor, bits: int) -> Tensor:
    """Lay out weight codes ``[n, k]`` (int8, within ``bits``) for ``bitwright::linear``: uint8 ``[bytes]``.

    ``bits`` is 8, 4, 3 or 2. Rows are padded to 16, inputs to 4, 8, 16 or 32; codes out of range raise KernelError.
    """
    _require_native()
    codes = _weight_codes(codes, 2)
    n, k = codes.shape
    try:
        out = torch.empty(native.linear_layout_bytes(bits, n, k), dtype=torch.uint8)
        native.pack_linear(codes.data_ptr(), bits, n, k, out.data_ptr())
    except ValueError as error:
        _refuse("pack_linear", error)
    return out


def pack_conv(codes: Tensor, bits: int, groups: int) -> Tensor:
    """Lay out filter codes ``[o, c / groups, kh, kw]`` (int8, within ``bits``) for ``bitwright::conv2d``: uint8.

    ``bits`` is 8, 4, 3 or 2; depthwise filters are bytes at every width. Per group, outputs are padded to 16 and
    channels to 4; codes out of range raise KernelError.
    """
    _require_native()
    codes = _weight_codes(codes, 4)
    o, c, kh, kw = codes.shape
    try:
        out = torch.empty(native.conv_layout_bytes(bits, o, c, kh, kw, groups), dtype=torch.uint8)
        native.pack_conv(codes.data_ptr(), bits, o, c, kh, kw, groups, out.data_ptr())
    except ValueError as error:
        _refuse("pack_conv", error)
    return out


def _linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_sum: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, zero_point: Tensor | None, bits: int, qmin: int, qmax: int, isa: int,
) -> Tensor:  # fmt: skip
    _require_native()
    _check_floats(x, "x")
    if x.dim() == 0:
        raise KernelError("linear: x needs at least one dimension")
    n, k = weight_scale.numel(), x.shape[-1]
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], n), dtype=torch.float32)
    m = y.numel() // n if n else 0
    if weight_sum is None:
        weight_scale, bias = _check_columns(n, weight_scale, bias)
    else:
        weight_scale, weight_sum, bias = _check_outputs(n, weight_scale, weight_sum, bias)
    per_row = 0
    if scale is not None:
        per_row = int(scale.numel() != 1)
        scale = _parameter(scale, (1, m), "scale")
        zero_point = None if zero_point is None else _parameter(zero_point, (scale.numel(),), "zero_point")
    elif zero_point is not None:
        raise KernelError("linear: a dynamic quantizer has no zero point")
    try:
        _check_layout(weight, native.linear_layout_bytes(bits, n, k))
        native.linear(
            isa, bits, x.data_ptr(), m, k, n, _address(scale), _address(zero_point), per_row, scale is None,
            qmin, qmax, weight.data_ptr(), weight_scale.data_ptr(), _address(weight_sum), _address(bias),
            y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    except ValueError as error:
        _refuse("linear", error)
    except OverflowError as error:  # of the range of a dynamic quantizer
        raise NumericsError(f"linear: {error}") from error
    return y


def _linear_shape(x: Tensor, weight: Tensor, weight_scale: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.numel()))


def _conv2d(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_sum: Tensor, bias: Tensor | None,
    scale: Tensor, zero_point: Tensor | None, kernel_size: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int, bits: int, qmin: int, qmax: int, isa: int,
) -> Tensor:  # fmt: skip
    _require_native()
    _check_floats(x, "x")
    if x.dim() != 4:
        raise KernelError(f"conv2d: x must be [n, c, h, w], got {list(x.shape)}")
    o = weight_scale.numel()
    weight_scale, weight_sum, bias = _check_outputs(o, weight_scale, weight_sum, bias)
    scale = _parameter(scale, (1,), "scale")
    zero_point = None if zero_point is None else _parameter(zero_point, (1,), "zero_point")
    if x.stride(1) != 1 and x.stride(3) != 1:
        x = x.contiguous()
    n, c, h, w = x.shape
    if groups < 1 or c % groups:
        raise KernelError(f"conv2d: {c} channels do not divide into {groups} groups")
    out = conv2d_out(x, o, kernel_size, stride, padding, dilation)
    try:
        _check_layout(weight, native.conv_layout_bytes(bits, o, c // groups, *kernel_size, groups))
        native.conv2d(
            isa, x.data_ptr(), n, c, h, w, *x.stride(), o, *kernel_size, *stride, *padding, *dilation, groups,
            bits, scale.item(), 0.0 if zero_point is None else zero_point.item(), qmin, qmax, weight.data_ptr(),
            weight_scale.data_ptr(), weight_sum.data_ptr(), _address(bias), out.data_ptr(), torch.get_num_threads(), 0,
            native.Bytes.none(),
        )  # fmt: skip
    except ValueError as error:
        _refuse("conv2d", error)
    return out


def _conv2d_shape(x: Tensor, weight: Tensor, weight_scale: Tensor, *rest: Any) -> Tensor:
    kernel_size, stride, padding, dilation = rest[4:8]
    return conv2d_out(x, weight_scale.numel(), kernel_size, stride, padding, dilation)


def _add(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    zero_a: Tensor | None,
    scale_b: Tensor,
    zero_b: Tensor | None,
    range_a: list[int],
    range_b: list[int],
) -> Tensor:
    _require_native()
    _check_floats(a, "a")
    _check_floats(b, "b")
    if a.shape != b.shape:
        raise KernelError(f"add: shapes differ: {list(a.shape)} and {list(b.shape)}")
    layout = _memory_format(a)
    a, b = a.contiguous(memory_format=layout), b.contiguous(memory_format=layout)
    out = torch.empty(a.shape, dtype=torch.float32, memory_format=layout)
    scale_a, scale_b = _parameter(scale_a, (1,), "scale_a"), _parameter(scale_b, (1,), "scale_b")
    zero_a = None if zero_a is None else _parameter(zero_a, (1,), "zero_a")
    zero_b = None if zero_b is None else _parameter(zero_b, (1,), "zero_b")
    try:
        native.add(
            BEST_ISA, a.data_ptr(), b.data_ptr(), a.numel(), scale_a.data_ptr(), _address(zero_a),
            scale_b.data_ptr(), _address(zero_b), *range_a, *range_b, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    except ValueError as error:
        _refuse("add", error)
    return out


def _add_shape(a: Tensor, *_: Any) -> Tensor:
    return torch.empty(a.shape, dtype=a.dtype, device=a.device, memory_format=_memory_format(a))


def _memory_format(x: Tensor) -> torch.memory_format:
    if not x.is_contiguous() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _require_native() -> None:
    if native is None:
        raise KernelError("no native kernels here: reinstall bitwright where there is a C++ compiler")


def _refuse(op: str, error: ValueError) -> NoReturn:
    raise KernelError(f"{op}: {error}") from error


def _weight_codes(codes: Tensor, dim: int) -> Tensor:
    if codes.dtype is not torch.int8 or not codes.is_cpu or codes.dim() != dim:
        raise KernelError(f"weight codes must be {dim}-d CPU int8, got {codes.dtype} {list(codes.shape)}")
    return codes.contiguous()


def _check_floats(x: Tensor, name: str) -> None:
    if x.dtype is not torch.float32:  # that it is on the CPU was the dispatcher's choice
        raise KernelError(f"{name} must be float32, got {x.dtype}")


def _parameter(value: Tensor, sizes: tuple[int, ...], name: str) -> Tensor:
    _check_floats(value, name)
    if value.numel() not in sizes:
        raise KernelError(f"{name} has {value.numel()} values, expected {' or '.join(map(str, sizes))}")
    return value.contiguous()


def _check_outputs(
    n: int, weight_scale: Tensor, weight_sum: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if weight_sum.dtype is not torch.int32 or weight_sum.numel() != n:
        raise KernelError(f"weight_sum must be {n} int32, got {weight_sum.numel()} {weight_sum.dtype}")
    weight_scale, bias = _check_columns(n, weight_scale, bias)
    return weight_scale, weight_sum.contiguous(), bias


def _check_columns(n: int, weight_scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    bias = None if bias is None else _parameter(bias, (n,), "bias")
    return _parameter(weight_scale, (n,), "weight_scale"), bias


def fills(x: Tensor, dtype: torch.dtype, count: int) -> bool:
    """Whether a tensor is ``count`` elements of a type in one piece of memory, as native code reads it.

    >>> fills(torch.zeros(4), torch.float32, 4), fills(torch.zeros(8)[::2], torch.float32, 4)
    (True, False)
    """
    return x.dtype is dtype and x.numel() == count and x.is_contiguous()


def _check_layout(weight: Tensor, expected: int) -> None:
    found = weight.numel() * weight.element_size()
    if found != expected or not weight.is_contiguous():
        raise KernelError(f"packed weights have {found} bytes, these shapes need {expected} contiguous bytes")


_OPERATORS = [
    (
        "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_sum, Tensor? bias, "
        "Tensor? scale, Tensor? zero_point, int bits, int qmin, int qmax, int isa) -> Tensor",
        _linear,
        _linear_shape,
    ),
    (
        "conv2d(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_sum, Tensor? bias, Tensor scale, "
        "Tensor? zero_point, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, "
        "int bits, int qmin, int qmax, int isa) -> Tensor",
        _conv2d,
        _conv2d_shape,
    ),
    (
        "add(Tensor a, Tensor b, Tensor scale_a, Tensor? zero_a, Tensor scale_b, Tensor? zero_b, "
        "int[2] range_a, int[2] range_b) -> Tensor",
        _add,
        _add_shape,
    ),
]
for _schema, _run, _shape in _OPERATORS:
    register(_schema, _run, _shape)
