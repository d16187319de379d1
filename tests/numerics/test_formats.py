"""The registry of number formats: ranges, sizes, and the error for unknown names."""

from __future__ import annotations

import pytest
import torch

from bitwright.errors import SpecError
from bitwright.numerics.formats import FORMATS, get_format


@pytest.mark.parametrize("bits", [*range(2, 9), 16])
def test_signed_formats_use_the_full_range(bits):
    fmt = FORMATS[f"int{bits}"]
    assert (fmt.bits, fmt.qmin, fmt.qmax) == (bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", [*range(1, 9), 16])
def test_unsigned_formats_start_at_zero(bits):
    fmt = FORMATS[f"uint{bits}"]
    assert (fmt.bits, fmt.qmin, fmt.qmax) == (bits, 0, 2**bits - 1)


TABLES = {"binary", "midrise2", "midrise3", "nf4", "fp4", "pot3", "pot4", "pot5", *(f"apot{b}" for b in range(3, 8))}
FITTED = {f"{fit}{b}" for fit in ("kmeans", "quantile") for b in range(2, 9)}
FLOATS = {"fp8_e4m3", "fp8_e5m2", "e8m0", "fp16", "bf16"}


def test_exactly_these_formats_exist():
    integers = {f"int{b}" for b in range(2, 9)} | {f"uint{b}" for b in range(1, 9)} | {"int16", "uint16", "ternary"}
    assert set(FORMATS) == integers | TABLES | FITTED | FLOATS
    assert all(name == fmt.name == str(fmt) for name, fmt in FORMATS.items())


def test_only_formats_whose_codes_are_their_values_are_integer():
    assert {name for name, fmt in FORMATS.items() if not fmt.is_integer} == TABLES | FITTED | FLOATS
    assert {name for name, fmt in FORMATS.items() if fmt.is_table} == TABLES | FITTED
    assert {name for name, fmt in FORMATS.items() if fmt.fit} == FITTED
    assert {name for name, fmt in FORMATS.items() if not fmt.is_scaled} == {"fp16", "bf16", "e8m0"}
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
        ("int16", 3, 6),
        ("binary", 9, 2),
        ("fp4", 5, 3),
        ("pot3", 8, 3),
        ("apot7", 8, 7),
        ("kmeans3", 9, 4),
        ("fp8_e4m3", 3, 3),
        ("e8m0", 3, 3),
    ],
)
def test_packed_sizes(name, count, size):
    assert FORMATS[name].packed_bytes(count) == size


@pytest.mark.parametrize("name", ["int9", "int1", "INT8", "float8", ""])
def test_an_unknown_format_is_named_and_the_known_ones_listed(name):
    with pytest.raises(SpecError, match=f"unknown number format {name!r}.*int2.*uint8.*ternary.*nf4.*bf16"):
        get_format(name)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_table_fits_its_bits_and_every_code_but_minus_zero_is_found_by_its_level(name):
    fmt = FORMATS[name]
    assert len(fmt.codebook) == fmt.qmax + 1 <= 2**fmt.bits
    assert len(set(fmt.codebook)) == len(fmt.order) == len(fmt.thresholds) + 1
    assert list(fmt.thresholds) == sorted(set(fmt.thresholds))
    assert {-value for value in fmt.codebook} == set(fmt.codebook) or name == "nf4"
    levels = [fmt.codebook[code] for code in fmt.order]
    assert levels == sorted(levels)
