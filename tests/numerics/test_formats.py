"""The registry of number formats: ranges, sizes, and the error for unknown names."""

from __future__ import annotations

import pytest
import torch

from bitwright.errors import SpecError
from bitwright.numerics.formats import FORMATS, get_format


@pytest.mark.parametrize("bits", range(2, 9))
def test_signed_formats_use_the_full_range(bits):
    fmt = FORMATS[f"int{bits}"]
    assert (fmt.bits, fmt.qmin, fmt.qmax) == (bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unsigned_formats_start_at_zero(bits):
    fmt = FORMATS[f"uint{bits}"]
    assert (fmt.bits, fmt.qmin, fmt.qmax) == (bits, 0, 2**bits - 1)


def test_exactly_these_formats_exist():
    expected = {f"int{b}" for b in range(2, 9)} | {f"uint{b}" for b in range(1, 9)} | {"ternary", "nf4", "fp16", "bf16"}
    assert set(FORMATS) == expected
    assert all(name == fmt.name == str(fmt) for name, fmt in FORMATS.items())


def test_only_formats_whose_codes_are_their_values_are_integer():
    assert {name for name, fmt in FORMATS.items() if not fmt.is_integer} == {"nf4", "fp16", "bf16"}
    assert FORMATS["fp16"].dtype is torch.float16
    assert FORMATS["bf16"].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("int8", 7, 7),
        ("uint1", 8, 1),
        ("uint1", 9, 2),
        ("int2", 5, 2),
        ("int3", 8, 3),
        ("int3", 9, 4),
        ("nf4", 5, 3),
        ("ternary", 5, 1),
        ("ternary", 6, 2),
        ("ternary", 10_000, 2000),  # 1.6 bits per code
        ("fp16", 3, 6),
        ("int4", 0, 0),
    ],
)
def test_packed_sizes(name, count, size):
    assert FORMATS[name].packed_bytes(count) == size


@pytest.mark.parametrize("name", ["int9", "int1", "INT8", "float8", ""])
def test_an_unknown_format_is_named_and_the_known_ones_listed(name):
    with pytest.raises(SpecError, match=f"unknown number format {name!r}.*int2.*uint8.*ternary.*nf4.*bf16"):
        get_format(name)
