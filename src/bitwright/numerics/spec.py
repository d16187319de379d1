"""`QuantSpec`: what the stored numbers mean, in one frozen value with one spelling.

The text form is the same in plan files, on the command line, in errors, test names and checkpoint metadata::

    format [ /channel | /token | /groupN ] [ /asym ] [ /dynamic ] [ /scale(spec) ]

    int8/channel   uint8/asym   int4/group128   int8/token/dynamic   nf4/group64/scale(int8/group256)

Two published combinations may be written by name; they print as what they stand for: ``mxfp4`` (OCP Microscaling 1.0)
is ``fp4/group32/scale(e8m0)`` and ``nvfp4`` is ``fp4/group16/scale(fp8_e4m3)``.

How a scale was *found* is not part of a spec: that is the observer's business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bitwright.errors import NumericsError, SpecError
from bitwright.numerics.formats import Format, get_format

ALIASES = {"mxfp4": "fp4/group32/scale(e8m0)", "nvfp4": "fp4/group16/scale(fp8_e4m3)"}


@dataclass(frozen=True, slots=True)
class Granularity:
    """Which elements of a tensor share one scale.

    ======== ============================== ================= =====================
    kind     shares a scale                 tensor shape      shape of the scale
    ======== ============================== ================= =====================
    tensor   everything                     [A, B]            [1]
    channel  one index of axis 0            [O, I, kh, kw]    [O, 1, 1, 1]
    token    one row along the last axis    [N, T, F]         [N, T, 1]
    group    ``size`` neighbours of a row   [O, I]            [O, I / size]
    ======== ============================== ================= =====================

    Scales never have zero dimensions: sharded training cannot place a 0-d parameter.
    """

    kind: Literal["tensor", "channel", "token", "group"] = "tensor"
    size: int = 0

    def __str__(self) -> str:
        return self.kind + (str(self.size) if self.kind == "group" else "")

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of ``shape``.

        Raises `NumericsError` when a group size does not divide the last axis.

        >>> Granularity("group", 32).scale_shape([8, 64])
        (8, 2)
        """
        if self.kind == "tensor":
            return (1,)
        if self.kind == "channel":
            return (shape[0], *[1] * (len(shape) - 1))
        if self.kind == "token":
            return (*shape[:-1], 1)
        if shape[-1] % self.size:
            raise NumericsError(
                f"group{self.size} needs a last axis divisible by {self.size}, found shape {list(shape)}; "
                f"use channel or one of {_divisors(shape[-1])} as the group size"
            )
        return (*shape[:-1], shape[-1] // self.size)

    def blocks(self, x: Tensor) -> Tensor:
        """View of ``x`` in which each scale's elements are the last axis: ``[*scale_shape without trailing 1s, n]``.

        >>> import torch
        >>> Granularity("channel").blocks(torch.zeros(4, 3, 2, 2)).shape
        torch.Size([4, 12])
        """
        if self.kind == "tensor":
            return x.reshape(1, -1)
        if self.kind == "channel":
            return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
        if self.kind == "token":
            return x
        self.scale_shape(x.shape)
        return x.unflatten(-1, (-1, self.size))


def _divisors(count: int) -> list[int]:
    return [size for size in (128, 64, 48, 40, 32, 25, 24, 20, 16, 8) if count % size == 0] or [count]


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """What the stored numbers of a tensor mean: format, who shares a scale, zero point, where the scale comes from.

    ``symmetric`` means the zero point is 0. ``dynamic`` means the scale is computed from the live tensor.
    ``scale`` says that the scales are themselves quantized (QLoRA's double quantization, shared exponents). Formats
    with a fitted table have one table per channel with ``channel``, else one for the whole tensor.

    >>> spec = QuantSpec.parse("nf4/group64/scale(int8/group256)")
    >>> spec.granularity.size, str(spec.scale)
    (64, 'int8/group256')
    >>> str(QuantSpec.parse("uint8/asym"))
    'uint8/asym'
    """

    format: Format
    granularity: Granularity = Granularity()
    symmetric: bool = True
    dynamic: bool = False
    scale: QuantSpec | None = None

    def __post_init__(self) -> None:
        if not self.symmetric and not self.format.is_integer:
            raise SpecError(f"{self}: only integer formats have a zero point; remove asym")
        if self.granularity.kind == "group" and self.granularity.size < 2:
            raise SpecError(f"{self}: a group holds at least 2 elements; write e.g. group128")
        if self.granularity.kind == "token" and not self.dynamic:
            raise SpecError(f"{self}: one scale per token exists only at run time; write token/dynamic")
        if self.format.fit and self.dynamic:
            raise SpecError(f"{self}: the table of {self.format} is fitted and stored; remove dynamic")
        if self.scale is not None and not self.format.is_scaled:
            raise SpecError(f"{self}: {self.format} has no scale that could be quantized; remove scale(...)")
        if self.scale is not None and (self.dynamic or self.scale.dynamic):
            raise SpecError(f"{self}: quantized scales are stored, so neither spec can be dynamic")

    def __str__(self) -> str:
        parts = [self.format.name]
        if self.granularity.kind != "tensor":
            parts.append(str(self.granularity))
        if not self.symmetric:
            parts.append("asym")
        if self.dynamic:
            parts.append("dynamic")
        if self.scale is not None:
            parts.append(f"scale({self.scale})")
        return "/".join(parts)

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read the text form.

        Raises `SpecError` that names the part that cannot be read.

        >>> str(QuantSpec.parse("mxfp4"))
        'fp4/group32/scale(e8m0)'
        """
        text = ALIASES.get(text, text)
        if len(text) > 256:
            raise SpecError(f"cannot read quantization spec {text[:40]!r}...: {len(text)} characters are too many")
        head, found, inner = text.partition("/scale(")
        if found and not inner.endswith(")"):
            raise SpecError(f"cannot read quantization spec {text!r}: scale( is not closed by )")
        name, *words = head.split("/")
        granularity, symmetric, dynamic = Granularity(), True, False
        for word in words:
            if match := re.fullmatch(r"(channel|token)|group(\d+)", word):
                if granularity.kind != "tensor":
                    raise SpecError(f"quantization spec {text!r} names two granularities; keep one")
                granularity = Granularity(match[1] or "group", int(match[2] or 0))  # type: ignore[arg-type]
            elif word == "asym":
                symmetric = False
            elif word == "dynamic":
                dynamic = True
            else:
                raise SpecError(
                    f"cannot read {word!r} in quantization spec {text!r}; "
                    "expected channel, token, groupN, asym, dynamic or scale(...)"
                )
        return cls(get_format(name), granularity, symmetric, dynamic, cls.parse(inner[:-1]) if found else None)


@dataclass(frozen=True, slots=True)
class QParams:
    """The numbers that turn codes into values: ``value = (code - zero_point) * scale``.

    ``scale`` is float32 and > 0; ``zero_point`` is an integer-valued float32 tensor of the same shape, or None for 0.
    ``codebook`` is the table of a format with a fitted one, ascending float32, ``[levels]`` or ``[rows, levels]``, and
    None for all others: ``value = codebook[row, code] * scale``.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    codebook: Tensor | None = None
