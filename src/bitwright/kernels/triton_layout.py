"""Packed weights as the Triton kernels read them: dense, one row of bytes per output, in units of 32 inputs.

A unit of 32 codes of b bits has 4 b bytes: a slice for each power of two in b (3 = 2 + 1), the widest first, which
holds the lowest bits. In a slice of w bits, byte j holds w bits each of the inputs j, j + 4 w, j + 8 w, ...: neighbours
in memory are neighbours along the inputs, and no value crosses lanes. Ternary has units of 40 codes in 8 bytes: byte j
holds the base-3 digits of the inputs j, j + 8, ..., j + 32, the first least significant.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bitwright.numerics.formats import Format
from bitwright.numerics.packing import pack
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.spec import QuantSpec

BASE_3 = 0
"""Stands for the width of ternary codes."""
_TRITS = (1, 3, 9, 27, 81)


def width_of(fmt: Format) -> int:
    """Bits of a code in the layout; `BASE_3` for ternary.

    >>> from bitwright.numerics.formats import FORMATS
    >>> width_of(FORMATS["int3"]), width_of(FORMATS["ternary"])
    (3, 0)
    """
    return BASE_3 if fmt.name == "ternary" else fmt.bits


def row_bytes(k: int, bits: int) -> int:
    """Bytes of a row of k codes.

    >>> row_bytes(4096, 4), row_bytes(4096, 3), row_bytes(4096, BASE_3)
    (2048, 1536, 824)
    """
    return -(-k // 40) * 8 if bits == BASE_3 else -(-k // 32) * 4 * bits


def lay_out(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[n, k]`` from 0, uint8, as bytes ``[n, row_bytes]``; padding is the code 0.

    >>> lay_out(torch.tensor([[1, 2] + [0] * 14 + [15]], dtype=torch.uint8), 4).tolist()[0][:3]
    [241, 2, 0]
    """
    if bits == BASE_3:
        digits = F.pad(codes, (0, -codes.shape[1] % 40)).unflatten(1, (-1, 5, 8))
        weights = torch.tensor(_TRITS, dtype=torch.uint8, device=codes.device).unsqueeze(1)
        return (digits * weights).sum(2).to(torch.uint8).flatten(1)
    units, slices, taken = F.pad(codes, (0, -codes.shape[1] % 32)).unflatten(1, (-1, 32)), [], 0
    for width in (w for w in (8, 4, 2, 1) if bits & w):
        parts = (units >> taken) & ((1 << width) - 1)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device).unsqueeze(1)
        slices.append((parts.unflatten(2, (8 // width, 4 * width)) << shifts).sum(2).to(torch.uint8))
        taken += width
    return torch.cat(slices, 2).flatten(1)


def pack_rows(weight: QTensor) -> Tensor:
    """The codes of a weight ``[n, k]`` of at most 8 bits, laid out; floats of 8 bits as their bytes."""
    fmt = weight.spec.format
    codes = weight.packed if fmt.dtype is not None else (weight.codes - fmt.qmin).to(torch.uint8)
    return lay_out(codes, width_of(fmt))


def codes_of(layout: Tensor, bits: int, k: int) -> Tensor:
    """The codes ``[n, k]`` that `lay_out` laid out, uint8.

    >>> codes_of(lay_out(torch.tensor([[1, 2, 7, 0, 5]], dtype=torch.uint8), 3), 3, 5).tolist()
    [[1, 2, 7, 0, 5]]
    """
    if bits == BASE_3:
        weights = torch.tensor(_TRITS, dtype=torch.uint8, device=layout.device).unsqueeze(1)
        return (layout.unflatten(1, (-1, 1, 8)) // weights % 3).flatten(1)[:, :k]
    units, taken = layout.unflatten(1, (-1, 4 * bits)), 0
    codes = torch.zeros(*units.shape[:2], 32, dtype=torch.uint8, device=layout.device)
    for width in (w for w in (8, 4, 2, 1) if bits & w):
        part = units[:, :, 4 * taken : 4 * (taken + width)].unsqueeze(2)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=layout.device).unsqueeze(1)
        codes |= ((part >> shifts) & ((1 << width) - 1)).flatten(2) << taken
        taken += width
    return codes.flatten(1)[:, :k]


def unpack_rows(layout: Tensor, spec: QuantSpec, k: int) -> Tensor:
    """The packed bytes (`numerics.packing`) of a weight that `pack_rows` laid out."""
    fmt = spec.format
    codes = codes_of(layout, width_of(fmt), k)
    return codes if fmt.dtype is not None else pack(codes.to(torch.int16) + fmt.qmin, fmt)


def by_group(values: Tensor, n: int) -> Tensor:
    """Scales or zero points ``[1]``, ``[n, 1]`` or ``[n, groups]`` as float32 ``[groups, n]``."""
    rows = values.reshape(1, 1).expand(n, 1) if values.numel() == 1 else values.reshape(n, -1)
    return rows.float().t().contiguous()


def from_groups(values: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    """Scales or zero points in the shape that the spec gives them, the inverse of `by_group`."""
    rows = values.t()
    rows = rows[0] if spec.granularity.kind == "tensor" else rows
    return rows.reshape(spec.granularity.scale_shape(shape)).contiguous()
