"""Number formats: which finite set of numbers a stored code can stand for.

First stop of the line: everything else asks a `Format` for its code range, its code table and its size in bytes.

Three kinds exist, told apart by two fields:

======== ========================== ================================== ==================
kind     example                    value of code ``q`` (before scale) stored as
======== ========================== ================================== ==================
integer  int8, uint4, ternary       ``q``                              bit stream of ``q - qmin``
codebook nf4                        ``codebook[q]``                    bit stream of ``q``
float    fp16, bf16                 the float itself; scale is 1       two bytes
======== ========================== ================================== ==================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitwright.errors import SpecError


@dataclass(frozen=True, slots=True)
class Format:
    """A finite set of numbers that a code can stand for.

    ``bits`` is the width of one stored code, ``qmin`` and ``qmax`` the smallest and largest code. Signed integers use
    the full range ``[-2**(bits-1), 2**(bits-1)-1]``; their symmetric scale is ``max|x| / qmax`` (see `affine`).

    >>> FORMATS["int4"].qmin, FORMATS["int4"].qmax, FORMATS["int4"].packed_bytes(3)
    (-8, 7, 2)
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    codebook: tuple[float, ...] = ()
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def is_integer(self) -> bool:
        """Whether the value of a code is the code itself."""
        return not self.codebook and self.dtype is None

    def packed_bytes(self, count: int) -> int:
        """Bytes that ``count`` codes take when packed: five ternary codes share a byte (3**5 = 243), the rest is dense.

        >>> FORMATS["ternary"].packed_bytes(10), FORMATS["int3"].packed_bytes(10)
        (2, 4)
        """
        return -(-count // 5) if self.name == "ternary" else -(-count * self.bits // 8)


# QLoRA (Dettmers 2023), appendix E: quantiles of N(0, 1) with an exact zero, normalised to [-1, 1].
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        *(Format(f"int{bits}", bits, -(1 << bits - 1), (1 << bits - 1) - 1) for bits in range(2, 9)),
        *(Format(f"uint{bits}", bits, 0, (1 << bits) - 1) for bits in range(1, 9)),
        Format("ternary", 2, -1, 1),
        Format("nf4", 4, 0, 15, codebook=_NF4),
        Format("fp16", 16, 0, 0, dtype=torch.float16),
        Format("bf16", 16, 0, 0, dtype=torch.bfloat16),
    )
}


def get_format(name: str) -> Format:
    """The format called ``name``.

    Raises `SpecError` that lists the known names.

    >>> get_format("uint8").qmax
    255
    """
    if name not in FORMATS:
        raise SpecError(f"unknown number format {name!r}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]
