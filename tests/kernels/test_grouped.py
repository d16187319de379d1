"""Integer activations against weights with a scale per group: every row equals the definition, difference 0."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import KernelError
from bitwright.kernels import cpu, grouped, table
from bitwright.kernels.reference import codes_of
from bitwright.kernels.row import Activation
from bitwright.numerics.affine import live_qparams
from bitwright.numerics.qtensor import QTensor, quantize
from bitwright.numerics.spec import QParams, QuantSpec

native = pytest.mark.skipif(cpu.native is None, reason="no native kernels here")
ISAS = [isa for isa in cpu.ISA if isa in cpu.cpu_features() or (isa == "portable" and cpu.native is not None)]
ROWS = ["linear/reference", *(f"linear/groups/{isa}" for isa in ISAS)]
WEIGHTS = ("int8", "int6", "int4", "int3", "int2", "ternary")
INPUTS = ("int8/token/dynamic", "uint8/token/asym/dynamic", "int4/token/dynamic", "uint8/asym", "int8", "uint8/dynamic")


def activation(text: str, x: Tensor) -> Activation:
    """The encoding of ``x``, with its own range where the spec is static."""
    spec = QuantSpec.parse(text)
    return Activation(spec, None if spec.dynamic else live_qparams(x, spec))


def defined(x: Tensor, weight: QTensor, bias: Tensor | None, input: Activation) -> Tensor:
    """The definition, with integer sums in int64 and one float32 rounding per operation."""
    codes, size = codes_of(x, *input), weight.spec.granularity.size
    scale = weight.qparams.scale
    total = torch.zeros(*x.shape[:-1], len(scale))
    for group in range(scale.shape[1]):
        part = slice(group * size, (group + 1) * size)
        sums = codes.values[..., part].long() @ weight.codes[:, part].long().t()
        total = total + sums.float() * scale[:, group]
    total = total * codes.scale
    return total if bias is None else total + bias


def ran(name: str, x: Tensor, weight: QTensor, bias: Tensor | None, input: Activation) -> Tensor:
    row = next(row for row in table.KERNELS if row.name == name)
    assert row.refuses(weight.spec, input.spec, weight.shape) == ""
    return row.run(x, row.pack(weight, 1, input.spec), weight.spec, bias, input)


@given(
    name=st.sampled_from(ROWS),
    fmt=st.sampled_from(WEIGHTS),
    input=st.sampled_from(INPUTS),
    size=st.sampled_from([16, 32, 48, 64, 128]),
    groups=st.integers(2, 5),
    m=st.integers(1, 30),
    n=st.integers(1, 70),
    bias=st.booleans(),
)
def test_every_row_equals_the_definition(
    name: str, fmt: str, input: str, size: int, groups: int, m: int, n: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(n * 100 + m)
    weight = quantize(torch.randn(n, size * groups, generator=generator), QuantSpec.parse(f"{fmt}/group{size}"))
    x = torch.randn(m, size * groups, generator=generator) * 3 + 0.5
    b = torch.randn(n, generator=generator) if bias else None
    encoding = activation(input, x)
    assert torch.equal(ran(name, x, weight, b, encoding), defined(x, weight, b, encoding))


@pytest.mark.skipif(cpu.native is None, reason="no native kernels here")
@pytest.mark.parametrize("fmt", ["int8", "int4", "int3", "int2"])
def test_sums_are_held_where_inputs_may_have_a_zero_point_and_asked_for_there(fmt: str) -> None:
    weight, x = quantize(torch.randn(20, 64), QuantSpec.parse(f"{fmt}/group32")), torch.randn(6, 64)
    row = next(row for row in table.KERNELS if row.name == f"linear/groups/{ISAS[0]}")
    for text in ("int8/token/dynamic", "int4", "int8/dynamic"):
        assert row.pack(weight, 1, QuantSpec.parse(text)).sums is None
    for text in ("uint8/asym", "uint8", "int8/asym/dynamic"):
        assert row.pack(weight, 1, QuantSpec.parse(text)).sums is not None
    packed = row.pack(weight, 1, QuantSpec.parse("int8"))
    with pytest.raises(KernelError, match="a zero point or an offset need the sums"):
        row.run(x, packed, weight.spec, None, activation("uint8/asym", x))
    scale = x.abs().amax(1, keepdim=True) / 127  # per row, from outside
    symmetric = Activation(QuantSpec.parse("int8/token/dynamic"), QParams(scale))
    assert torch.equal(row.run(x, packed, weight.spec, None, symmetric), defined(x, weight, None, symmetric))


def test_no_rows_make_no_output() -> None:
    weight = quantize(torch.randn(5, 64), QuantSpec.parse("int4/group32"))
    input = Activation(QuantSpec.parse("int8"), QParams(torch.tensor([0.1])))
    for name in ROWS:
        assert ran(name, torch.empty(0, 64), weight, None, input).shape == (0, 5)


@pytest.mark.parametrize("input", ["int8/token/dynamic", "uint8/token/asym/dynamic"])
@pytest.mark.parametrize("fmt", ["int8", "int4", "int3", "int2"])
@pytest.mark.parametrize("name", ROWS)
def test_many_rows_and_columns(name: str, fmt: str, input: str) -> None:
    """More rows than a strip, more weights than a slab, on two threads."""
    generator = torch.Generator().manual_seed(1)
    weight = quantize(torch.randn(331, 2048, generator=generator), QuantSpec.parse(f"{fmt}/group128"))
    x, before = torch.randn(2, 103, 2048, generator=generator), torch.get_num_threads()
    encoding = activation(input, x)
    expected = defined(x, weight, None, encoding)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(ran(name, x, weight, None, encoding), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ROWS)
def test_extreme_codes_do_not_overflow(name: str) -> None:
    """Sums of a group beyond 2**24: exact in int32, rounded once."""
    spec = QuantSpec.parse("int8/group1024")
    weight = QTensor(torch.full((3, 2048), 0, dtype=torch.uint8), torch.ones(3, 2), None, spec, (3, 2048))
    assert weight.codes.float().eq(-128).all()
    x = torch.linspace(250, 255, 2048).expand(2, -1)
    input = Activation(QuantSpec.parse("uint8"), QParams(torch.ones(1)))
    assert torch.equal(ran(name, x, weight, None, input), defined(x, weight, None, input))


def test_the_table_takes_it_for_groups_and_integers() -> None:
    def taken(weight: str, input: str | None, features: frozenset[str], k: int = 64) -> str:
        spec = None if input is None else QuantSpec.parse(input)
        return table.select("linear", QuantSpec.parse(weight), spec, (16, k), features).name

    everything = frozenset({"native", "avx2", "avx512_vnni"})
    dynamic = "int8/token/dynamic"
    assert taken("int4/group32", dynamic, everything) == "linear/groups/avx512_vnni"
    assert taken("int4/group32", dynamic, everything - {"avx512_vnni"}) == "linear/groups/avx2"
    assert taken("int4/group32", dynamic, frozenset({"native"})) == "linear/groups/portable"
    assert taken("int4/group32", dynamic, frozenset()) == "linear/reference"
    assert taken("int4/group4", dynamic, everything) == "linear/reference"  # smaller than what is read at once
    assert taken("int4/group64", dynamic, everything) == "linear/avx512_vnni"  # one group is one scale per output
    assert taken("int4/group32", None, everything) == "linear/decode/avx512_vnni"
    assert taken("uint4/group32/asym", dynamic, everything) == "linear/decode/avx512_vnni"


@pytest.mark.parametrize("name", ["linear/reference", *(f"linear/{isa}" for isa in ISAS)])
def test_one_group_is_one_scale_per_output(name: str) -> None:
    w, x = torch.randn(9, 64), torch.randn(4, 64)
    input = activation("int8/token/dynamic", x)
    one, channel = (quantize(w, QuantSpec.parse(text)) for text in ("int4/group64", "int4/channel"))
    assert torch.equal(ran(name, x, one, None, input), ran(name, x, channel, None, input))


@pytest.mark.parametrize(
    ("weight", "input", "reason"),
    [
        ("int4/channel", "int8", "needs several scales per output"),
        ("int4/group64", "int8", "needs several scales per output"),
        ("int2/group8", "int8", "groups of 8 are no multiple of 16 inputs"),
        ("int3/group12", "int8", "groups of 12 are no multiple of 8 inputs"),
        ("nf4/group32", "int8", "needs whole numbers"),
        ("int4/group32", None, "needs an integer input"),
        ("int4/group32/scale(int8)", "int8", "needs scales in float32"),
    ],
)
def test_what_it_cannot_multiply_is_refused_with_the_reason(weight: str, input: str | None, reason: str) -> None:
    assert reason in grouped.refuses(QuantSpec.parse(weight), input and QuantSpec.parse(input), (8, 64))  # type: ignore[arg-type]


@native
def test_constants_of_other_shapes_are_refused() -> None:
    layout, scale, sums = grouped.pack(quantize(torch.randn(16, 64), QuantSpec.parse("int4/group32")))

    def call(x: Tensor, scale: Tensor = scale, live: Tensor | None = None, size: int = 32, bits: int = 4) -> Tensor:
        rest = (live, None, 16, size, bits, -128, 127, 0)
        return torch.ops.bitwright.grouped_linear(x, layout, scale, sums, None, *rest)

    for message, arguments in {
        "512 bytes of weights do not fit 16 x 128 codes": {"x": torch.zeros(2, 128)},
        "groups of 48 do not divide 64 inputs": {"x": torch.zeros(2, 64), "size": 48},
        "scales, sums or bias do not fit": {"x": torch.zeros(2, 64), "size": 16},
        "x must be float32": {"x": torch.zeros(2, 64).double()},
        "3 scales and their zero points do not fit 2 rows": {"x": torch.zeros(2, 64), "live": torch.ones(3, 1)},
        "weights are packed with 8, 4, 3 or 2 bits": {"x": torch.zeros(2, 64), "bits": 5},
    }.items():
        with pytest.raises((KernelError, ValueError), match=message):
            call(**arguments)  # type: ignore[arg-type]


@native
def test_a_compiled_layer_is_one_graph() -> None:
    weight, input = quantize(torch.randn(16, 64), QuantSpec.parse("int4/group32")), activation("int8", torch.randn(3))
    kernel = table.select("linear", weight.spec, input.spec, weight.shape, cpu.cpu_features())
    packed, x = kernel.pack(weight, 1), torch.randn(3, 64)

    def layer(x: Tensor) -> Tensor:
        return kernel.run(x, packed, weight.spec, None, input).relu()

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
