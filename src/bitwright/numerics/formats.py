"""Number formats: which finite set of numbers a stored code can stand for.

First stop of the line: everything else asks a `Format` for its code range, its code table and its size in bytes.

Kinds, told apart by three fields:

======== ================================ ================================== ==================
kind     examples                         value of code ``q`` (before scale) stored as
======== ================================ ================================== ==================
integer  int8, uint4, int16, ternary      ``q``                              bit stream of ``q - qmin``
table    nf4, fp4, midrise2, pot4, apot4 ``codebook[q]``                    bit stream of ``q``
fitted   kmeans4, quantile4               entry ``q`` of a table that was    bit stream of ``q``, and the table
                                          fitted to the tensor
float    fp8_e4m3, fp8_e5m2               the float itself                   one byte
float    fp16, bf16, e8m0                 the float itself; scale is 1       two bytes; one for e8m0
======== ================================ ================================== ==================

``e8m0`` holds positive powers of two, for the shared exponents of microscaling formats: it is a format of scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitwright.errors import SpecError
from bitwright.numerics import levels


@dataclass(frozen=True, slots=True)
class Format:
    """A finite set of numbers that a code can stand for.

    ``bits`` is the width of one stored code, ``qmin`` and ``qmax`` the smallest and largest code. Signed integers use
    the full range ``[-2**(bits-1), 2**(bits-1)-1]``; their symmetric scale is ``max|x| / qmax`` (see `affine`). Tables
    hold the value of each code in ``codebook``; ``order`` and ``thresholds`` find the nearest one
    (`levels.decision_points`). ``fit`` names the way a fitted table is found.

    >>> FORMATS["int4"].qmin, FORMATS["int4"].qmax, FORMATS["int4"].packed_bytes(3)
    (-8, 7, 2)
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    codebook: tuple[float, ...] = ()
    dtype: torch.dtype | None = None
    order: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    fit: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def is_integer(self) -> bool:
        """Whether the value of a code is the code itself, a whole number."""
        return not self.is_table and self.dtype is None

    @property
    def is_table(self) -> bool:
        """Whether codes are indices into a table of levels, a constant one or a fitted one."""
        return bool(self.codebook or self.fit)

    @property
    def integer(self) -> Format | None:
        """The integer format whose codes are this format's values before the scale; None where some are fractions.

        Integer kernels multiply values; a table may need one bit more for them than for its indices.

        >>> [str(FORMATS[name].integer) for name in ("int8", "midrise2", "midrise3", "nf4")]
        ['int8', 'int3', 'int4', 'None']
        """
        if self.is_integer:
            return self
        if not self.codebook or not all(level.is_integer() for level in self.codebook):
            return None
        return FORMATS[f"int{int(self.largest).bit_length() + 1}"]

    @property
    def is_scaled(self) -> bool:
        """Whether values are multiplied by a scale; formats as wide as fp16 need none."""
        return self.dtype in (None, torch.float8_e4m3fn, torch.float8_e5m2)

    @property
    def largest(self) -> float:
        """The value before the scale that the largest magnitude of a symmetric range maps to.

        >>> [FORMATS[name].largest for name in ("int8", "nf4", "fp4", "fp8_e4m3", "fp8_e5m2", "kmeans4")]
        [127.0, 1.0, 6.0, 448.0, 57344.0, 1.0]
        """
        if self.codebook:
            return max(abs(value) for value in self.codebook)
        if self.fit:
            return 1.0
        return float(self.qmax) if self.dtype is None else torch.finfo(self.dtype).max

    def packed_bytes(self, count: int) -> int:
        """Bytes that ``count`` codes take when packed: five ternary codes share a byte (3**5 = 243), the rest is dense.

        >>> FORMATS["ternary"].packed_bytes(10), FORMATS["int3"].packed_bytes(10)
        (2, 4)
        """
        return -(-count // 5) if self.name == "ternary" else -(-count * self.bits // 8)


def _table(name: str, bits: int, codebook: tuple[float, ...], *, ties_even: bool = False) -> Format:
    order, thresholds = levels.decision_points(codebook, ties_even=ties_even)
    return Format(name, bits, 0, len(codebook) - 1, codebook, None, order, thresholds)


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        *(Format(f"int{bits}", bits, -(1 << bits - 1), (1 << bits - 1) - 1) for bits in (*range(2, 9), 16)),
        *(Format(f"uint{bits}", bits, 0, (1 << bits) - 1) for bits in (*range(1, 9), 16)),
        Format("ternary", 2, -1, 1),
        _table("binary", 1, levels.BINARY, ties_even=True),  # 0 takes +1, as sign(0) in BWN (Rastegari 2016)
        _table("nf4", 4, levels.NF4),
        _table("fp4", 4, levels.E2M1, ties_even=True),
        *(_table(f"midrise{bits}", bits, levels.mid_rise(bits)) for bits in (2, 3)),
        *(_table(f"pot{bits}", bits, levels.signed(levels.power_of_two(bits - 1))) for bits in range(3, 6)),
        *(_table(f"apot{bits}", bits, levels.signed(levels.additive_power_of_two(bits - 1))) for bits in range(3, 8)),
        *(
            Format(f"{fit}{bits}", bits, 0, (1 << bits) - 1, fit=fit)
            for fit in ("kmeans", "quantile")
            for bits in range(2, 9)
        ),
        Format("fp8_e4m3", 8, 0, 0, dtype=torch.float8_e4m3fn),
        Format("fp8_e5m2", 8, 0, 0, dtype=torch.float8_e5m2),
        Format("e8m0", 8, 0, 0, dtype=torch.float8_e8m0fnu),
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
