"""The layouts of the native module: their width, and codes back from them (the inverses of `cpu.pack_linear`...)."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.errors import KernelError
from bitwright.kernels import cpu
from bitwright.numerics.spec import QuantSpec


def layout_bits(spec: QuantSpec) -> int:
    """Width of the native layout that holds a format's codes: 8, 4, 3 or 2 bits.

    >>> layout_bits(QuantSpec.parse("int6/channel")), layout_bits(QuantSpec.parse("ternary"))
    (8, 2)
    """
    return next(bits for bits in (2, 3, 4, 8) if bits >= spec.format.bits)


def product_bits(spec: QuantSpec) -> int:
    """Width of the native layout that holds what integer kernels multiply (`product_codes`): 8, 4, 3 or 2 bits.

    >>> product_bits(QuantSpec.parse("int2/channel")), product_bits(QuantSpec.parse("midrise2/channel"))
    (2, 3)
    """
    fmt = spec.format.integer or spec.format
    return next(bits for bits in (2, 3, 4, 8) if bits >= fmt.bits)


def unpack_linear(layout: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The codes that `cpu.pack_linear` laid out: int8 ``[n, k]``; a layout of other sizes raises `KernelError`."""
    try:
        _check(layout, cpu.native.linear_layout_bytes(bits, n, k), (n, k))
        codes = torch.empty((n, k), dtype=torch.int8)
        cpu.native.unpack_linear(layout.data_ptr(), bits, n, k, codes.data_ptr())
    except ValueError as error:
        raise KernelError(f"unpack_linear: {error}") from error
    return codes


def unpack_conv(layout: Tensor, bits: int, shape: tuple[int, int, int, int], groups: int) -> Tensor:
    """The codes that `cpu.pack_conv` laid out: int8 ``shape``; a layout of other sizes raises `KernelError`."""
    try:
        _check(layout, cpu.native.conv_layout_bytes(bits, *shape, groups), shape)
        codes = torch.empty(shape, dtype=torch.int8)
        cpu.native.unpack_conv(layout.data_ptr(), bits, *shape, groups, codes.data_ptr())
    except ValueError as error:
        raise KernelError(f"unpack_conv: {error}") from error
    return codes


def unpack_decoded(layout: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The codes of a layout of `kernels.decoded`: uint8 ``[n, k]``; one of other sizes raises `KernelError`."""
    try:
        _check(layout, cpu.native.decoded_layout_bytes(bits, n, k), (n, k))
        codes = torch.empty((n, k), dtype=torch.uint8)
        cpu.native.unpack_decoded(layout.data_ptr(), bits, n, k, codes.data_ptr())
    except ValueError as error:
        raise KernelError(f"unpack_decoded: {error}") from error
    return codes


def _check(layout: Tensor, expected: int, shape: tuple[int, ...]) -> None:
    if not cpu.fills(layout, torch.uint8, expected):
        raise KernelError(f"{layout.numel()} bytes of weights do not fit {' x '.join(map(str, shape))} codes")
