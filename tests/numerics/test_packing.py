"""Codes <-> bytes. The golden bytes are read by other programs: they must never change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.numerics.formats import FORMATS, Format
from bitwright.numerics.packing import pack, unpack

PACKABLE = [name for name, fmt in FORMATS.items() if fmt.dtype is None]

# format: (codes, bytes in hexadecimal). Little-endian bit stream of code - qmin; ternary: five base-3 digits per byte.
GOLDEN = {
    "uint1": ([1, 0, 1, 1, 0, 0, 1, 0, 1], "4d 01"),
    "uint2": ([0, 1, 2, 3, 3], "e4 03"),
    "uint3": ([0, 1, 2, 3, 4, 5, 6, 7, 5], "88 c6 fa 05"),
    "uint4": ([0, 1, 15, 8, 7], "10 8f 07"),
    "uint5": ([0, 1, 30, 31, 16], "20 f8 0f 01"),
    "uint6": ([0, 1, 62, 63, 33], "40 e0 ff 21"),
    "uint7": ([0, 1, 126, 127, 65], "80 80 ff 1f 04"),
    "uint8": ([0, 1, 254, 255], "00 01 fe ff"),
    "int2": ([-2, -1, 0, 1, 1], "e4 03"),
    "int3": ([-4, -3, -2, -1, 0, 1, 2, 3, 1], "88 c6 fa 05"),
    "int4": ([-8, -7, 7, 0, -1], "10 8f 07"),
    "int5": ([-16, -15, 14, 15, 0], "20 f8 0f 01"),
    "int6": ([-32, -31, 30, 31, 1], "40 e0 ff 21"),
    "int7": ([-64, -63, 62, 63, 1], "80 80 ff 1f 04"),
    "int8": ([-128, -127, 126, 127], "00 01 fe ff"),
    "ternary": ([-1, 0, 1, -1, 1, 1], "b7 02"),
    "nf4": ([0, 1, 15, 8, 7], "10 8f 07"),
    "fp4": ([0, 1, 15, 8, 7], "10 8f 07"),
    "binary": ([1, 0, 1, 1, 0, 0, 1, 0, 1], "4d 01"),
    "int16": ([-32768, -32767, 32767, 0, 255], "00 00 01 00 ff ff 00 80 ff 80"),
    "uint16": ([0, 1, 65535, 256], "00 00 01 00 ff ff 00 01"),
}
# The other tables and fitted formats store their index as the unsigned integer of the same width.
GOLDEN |= {
    name: ([code for code in GOLDEN[f"uint{FORMATS[name].bits}"][0] if code <= FORMATS[name].qmax], None)
    for name in PACKABLE
    if name not in GOLDEN
}


@pytest.mark.parametrize("name", PACKABLE)
def test_bytes_are_the_golden_ones_and_come_back(name):
    codes, golden = GOLDEN[name]
    packed = pack(torch.tensor(codes), FORMATS[name])
    like = pack(torch.tensor(codes), FORMATS[f"uint{FORMATS[name].bits}"]) if golden is None else packed
    assert packed.numpy().tobytes().hex(" ") == (golden or like.numpy().tobytes().hex(" "))
    assert packed.dtype == torch.uint8
    back = unpack(packed, FORMATS[name], len(codes))
    assert back.dtype == (torch.int32 if FORMATS[name].bits == 16 else torch.int16)
    assert back.tolist() == codes


@pytest.mark.parametrize("name", [name for name in PACKABLE if name != "ternary"])
def test_the_stream_is_one_little_endian_number(name):
    fmt = FORMATS[name]
    codes = torch.randint(fmt.qmin, fmt.qmax + 1, (37,))
    number = sum((code - fmt.qmin) << (i * fmt.bits) for i, code in enumerate(codes.tolist()))
    assert pack(codes, fmt).numpy().tobytes() == number.to_bytes(fmt.packed_bytes(37), "little")


def test_a_ternary_byte_is_a_number_of_base_three():
    codes = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 5)
    weights = torch.tensor([1, 3, 9, 27, 81])
    found = pack(codes, FORMATS["ternary"])
    assert found.squeeze(1).tolist() == ((codes + 1) * weights).sum(1).tolist()
    assert sorted(found.flatten().tolist()) == list(range(243))


@st.composite
def packable(draw: st.DrawFn) -> tuple[Format, torch.Tensor]:
    fmt = FORMATS[draw(st.sampled_from(PACKABLE))]
    rows, count = draw(st.integers(1, 4)), draw(st.integers(1, 41))
    size = fmt.qmax - fmt.qmin + 1
    offsets = draw(st.binary(min_size=rows * count, max_size=rows * count))
    stretch = size // 256 + 1  # so that two-byte codes fill both of their bytes
    return fmt, torch.tensor([fmt.qmin + byte * stretch % size for byte in offsets]).view(rows, count)


@settings(max_examples=300)
@given(packable())
def test_unpacking_inverts_packing_for_all_formats_shapes_and_layouts(case):
    fmt, codes = case
    rows, count = codes.shape
    packed = pack(codes, fmt)
    assert packed.shape == (rows, fmt.packed_bytes(count))
    assert torch.equal(unpack(packed, fmt, count).long(), codes)
    transposed = codes.t().contiguous().t()  # same numbers, other strides
    assert torch.equal(pack(transposed, fmt), packed)
    strided = torch.stack([packed, packed], -1)[..., 0]
    assert torch.equal(unpack(strided, fmt, count).long(), codes)


@pytest.mark.parametrize("name", PACKABLE)
def test_every_row_starts_on_a_byte(name):
    fmt = FORMATS[name]
    codes = torch.randint(fmt.qmin, fmt.qmax + 1, (3, 2, 7))
    packed = pack(codes, fmt)
    assert packed.shape == (3, 2, fmt.packed_bytes(7))
    for row in range(3):
        assert torch.equal(packed[row, 1], pack(codes[row, 1], fmt))


@pytest.mark.parametrize("name", PACKABLE)
def test_all_codes_of_a_format_survive(name):
    fmt = FORMATS[name]
    codes = torch.arange(fmt.qmin, fmt.qmax + 1)
    assert torch.equal(unpack(pack(codes.float(), fmt), fmt, len(codes)).long(), codes)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_float_formats_store_their_own_bytes(name, dtype):
    x = torch.randn(3, 5).to(dtype).float()
    packed = pack(x, FORMATS[name])
    assert packed.shape == (3, 10)
    assert packed.numpy().tobytes() == x.to(dtype).view(torch.uint8).numpy().tobytes()
    assert torch.equal(unpack(packed, FORMATS[name], 5), x)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "e8m0"])
def test_every_byte_of_an_eight_bit_float_that_is_a_number_survives(name):
    packed = torch.arange(256, dtype=torch.uint8)
    values = unpack(packed, FORMATS[name], 256)
    numbers = values.isfinite()
    assert numbers.sum() == {"fp8_e4m3": 254, "fp8_e5m2": 248, "e8m0": 255}[name]
    assert torch.equal(pack(values[numbers], FORMATS[name]), packed[numbers])


@pytest.mark.parametrize("name", ["int8", "int3", "ternary", "fp16"])
def test_packing_stays_on_the_device_of_its_codes(name):
    fmt = FORMATS[name]
    packed = pack(torch.zeros(2, 10, device="meta"), fmt)
    assert (packed.device.type, packed.shape) == ("meta", (2, fmt.packed_bytes(10)))
    assert unpack(packed, fmt, 10).shape == (2, 10)
