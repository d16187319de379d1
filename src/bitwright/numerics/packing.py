"""Codes to bytes and back: the one layout on disk.

Codes are stored as ``code - qmin`` (so 0 .. 2**bits - 1), as a little-endian bit stream: code i takes bits
``[i * bits, (i + 1) * bits)``, where bit b of the stream is bit ``b % 8`` of byte ``b // 8``. For 4 bits the first code
is the low nibble; codes of 16 bits are two bytes, the low one first. Each row (last axis) starts on a byte. Ternary
packs five codes in one byte as base-3 digits, first code least significant (3**5 = 243 <= 256): 1.6 bits per code.
Float formats store their own bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bitwright.numerics.formats import Format

_TRITS = (1, 3, 9, 27, 81)


def pack(codes: Tensor, fmt: Format) -> Tensor:
    """Pack integer-valued codes ``[..., n]`` into bytes ``uint8 [..., fmt.packed_bytes(n)]``.

    >>> from bitwright.numerics.formats import FORMATS
    >>> pack(torch.tensor([-8, 7, 0]), FORMATS["int4"]).tolist()
    [240, 8]
    """
    if fmt.dtype is not None:
        return codes.to(fmt.dtype).contiguous().view(torch.uint8)
    if fmt.bits == 16:
        wide = codes.to(torch.int32) - fmt.qmin
        return torch.stack([wide & 255, wide >> 8], -1).flatten(-2).to(torch.uint8)
    unsigned = (codes.to(torch.int16) - fmt.qmin).to(torch.uint8)
    if fmt.bits == 8:
        return unsigned
    if fmt.name == "ternary" or 8 % fmt.bits == 0:
        factors = _factors(fmt)
        fields = F.pad(unsigned, (0, -unsigned.shape[-1] % len(factors))).unflatten(-1, (-1, len(factors)))
        packed = fields[..., 0].clone()
        for place, factor in enumerate(factors[1:], 1):
            packed += fields[..., place] * factor
        return packed
    bits = (unsigned.unsqueeze(-1) >> torch.arange(fmt.bits, dtype=torch.uint8, device=codes.device)) & 1
    stream = bits.flatten(-2)
    stream = F.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, fmt: Format, count: int) -> Tensor:
    """Codes ``[..., count]`` of packed bytes, the inverse of `pack`: int16; int32 of 16 bits, float32 of float formats.

    >>> from bitwright.numerics.formats import FORMATS
    >>> unpack(torch.tensor([240, 8], dtype=torch.uint8), FORMATS["int4"], 3).tolist()
    [-8, 7, 0]
    """
    if fmt.dtype is not None:
        return packed.contiguous().view(fmt.dtype).float()
    if fmt.bits == 16:
        low, high = packed.to(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
        return (high << 8) + low + fmt.qmin
    if fmt.bits == 8:
        return packed.to(torch.int16) + fmt.qmin
    if fmt.name == "ternary":
        digits = (packed.unsqueeze(-1) // torch.tensor(_TRITS, dtype=torch.uint8, device=packed.device)) % 3
        return digits.flatten(-2)[..., :count].to(torch.int16) + fmt.qmin
    if 8 % fmt.bits == 0:
        shifts = torch.arange(0, 8, fmt.bits, dtype=torch.uint8, device=packed.device)
        fields = (packed.unsqueeze(-1) >> shifts) & ((1 << fmt.bits) - 1)
        return fields.flatten(-2)[..., :count].to(torch.int16) + fmt.qmin
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    codes = bits.flatten(-2)[..., : count * fmt.bits].unflatten(-1, (count, fmt.bits))
    return (codes << torch.arange(fmt.bits, dtype=torch.uint8, device=packed.device)).sum(-1).to(torch.int16) + fmt.qmin


def _factors(fmt: Format) -> tuple[int, ...]:
    """What the codes that share a byte are multiplied with, where codes end with bytes."""
    return _TRITS if fmt.name == "ternary" else tuple(1 << place for place in range(0, 8, fmt.bits))
