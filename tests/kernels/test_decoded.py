"""Float activations against decoded weights: every format, odd shapes, every instruction set, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from bitwright.errors import KernelError
from bitwright.kernels import cpu, decoded, operators, table
from bitwright.kernels.row import Activation
from bitwright.numerics.qtensor import dequantize, quantize
from bitwright.numerics.spec import QuantSpec

pytestmark = pytest.mark.skipif(cpu.native is None, reason="no native kernels here")

SPECS = (
    "int8/channel", "uint8/asym/channel", "int8/group32", "int6/channel", "int4", "int4/channel", "int4/group32",
    "uint4/asym/group32", "int3/channel", "int3/group32", "uint3/asym/group64", "int2/channel", "uint2/asym/group64",
    "ternary/channel", "binary/channel", "nf4/group64", "fp4/group32", "mxfp4", "pot4/channel", "kmeans4",
    "midrise2/group32", "midrise3/channel",
)  # fmt: skip
ISAS = [isa for isa in cpu.ISA if isa == "portable" or isa in cpu.cpu_features()]


@given(
    text=st.sampled_from(SPECS),
    isa=st.sampled_from(ISAS),
    m=st.integers(0, 14) | st.integers(64, 80),
    n=st.integers(1, 50),
    k=st.integers(1, 40),
    bias=st.booleans(),
)
def test_products_are_those_of_the_decoded_weight(text: str, isa: str, m: int, n: int, k: int, bias: bool) -> None:
    spec = QuantSpec.parse(text)
    size = spec.granularity.size
    k = max(size, k // size * size) if size else k
    torch.manual_seed(n * 100 + k)
    weight = quantize(torch.randn(n, k), spec)
    x, b = torch.randn(m, k), torch.randn(n) if bias else None
    kernel = next(row for row in table.KERNELS if row.name == f"linear/decode/{isa}")
    assert kernel.refuses(spec, None, (n, k)) == ""
    found = kernel.run(x, kernel.pack(weight, 1), spec, b, None)
    values = dequantize(weight).double()
    wanted = F.linear(x.double(), values, None if b is None else b.double())
    bound = 1e-6 * (2 + k) * (x.abs().double() @ values.abs().t() + 1)  # k roundings of a float32 sum
    assert found.shape == wanted.shape
    assert ((found - wanted).abs() <= bound).all()


@pytest.mark.parametrize("text", SPECS)
def test_many_rows_are_multiplied_by_several_panels(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "_PANEL_BYTES", 1)  # four blocks of outputs each
    spec = QuantSpec.parse(text)
    weight, x = quantize(torch.randn(150, 192), spec), torch.randn(5, 13, 192)
    kernel = table.select("linear", spec, None, weight.shape, cpu.cpu_features())
    values, b = dequantize(weight), torch.randn(150)
    found = kernel.run(x, kernel.pack(weight, 1), spec, b, None)
    bound = 1e-6 * 194 * (x.abs() @ values.abs().t() + 1)
    assert ((found - F.linear(x, values, b)).abs() <= bound).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernel.run(x.requires_grad_(), kernel.pack(weight, 1), spec, b, None), found)


def test_the_table_takes_it_for_float_inputs_and_groups_and_not_for_integers() -> None:
    features = cpu.cpu_features()
    uint8, grouped = QuantSpec.parse("uint8/asym"), QuantSpec.parse("int4/asym/group32")
    best = f"linear/decode/{ISAS[-1]}"
    assert table.select("linear", grouped, None, (16, 64), features).name == best
    assert table.select("linear", grouped, uint8, (16, 64), features).name == best
    assert table.select("linear", QuantSpec.parse("int4/channel"), uint8, (16, 64), features).name != best
    assert table.select("linear", grouped, None, (16, 64), frozenset()).name == "linear/decode"


def test_inputs_with_codes_are_decoded_first() -> None:
    spec, uint8 = QuantSpec.parse("int4/asym/group32"), QuantSpec.parse("uint8/asym/dynamic")
    weight, x = quantize(torch.randn(16, 64), spec), torch.randn(3, 64)
    kernel = table.select("linear", spec, uint8, (16, 64), cpu.cpu_features())
    other = table.select("linear", spec, uint8, (16, 64), frozenset())
    found, wanted = (row.run(x, row.pack(weight, 1), spec, None, Activation(uint8, None)) for row in (kernel, other))
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fp8_e4m3/channel", "fp8_e4m3 is no code of at most 8 bits"),
        ("int16/channel", "int16 is no code of at most 8 bits"),
        ("kmeans4/channel", "a table per channel"),
        ("int3/group8", "groups of 8 are no multiple of 32 inputs"),
    ],
)
def test_what_it_cannot_decode_is_refused_with_the_reason(text: str, reason: str) -> None:
    assert reason in decoded.refuses(QuantSpec.parse(text), (8, 64))


def test_nan_and_infinity_go_through_like_in_a_float_product() -> None:
    spec = QuantSpec.parse("int4/channel")
    kernel, weight = table.select("linear", spec, None, (16, 64), cpu.cpu_features()), torch.ones(16, 64)
    x = torch.zeros(2, 64)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    out = kernel.run(x, kernel.pack(quantize(weight, spec), 1), spec, None, None)
    assert out[0].isnan().all()
    assert out[1].isinf().all()


def test_weights_of_another_shape_are_refused() -> None:
    spec = QuantSpec.parse("int4/channel")
    kernel = table.select("linear", spec, None, (16, 64), cpu.cpu_features())
    packed = kernel.pack(quantize(torch.randn(16, 64), spec), 1)
    with pytest.raises(KernelError, match="512 bytes of weights do not fit 16 x 80 codes"):
        kernel.run(torch.zeros(2, 80), packed, spec, None, None)
    with pytest.raises(KernelError, match="x must be float32"):
        operators.call(
            torch.ops.bitwright.decoded_linear,
            torch.zeros(2, 64, dtype=torch.float64),
            packed.layout,
            packed.codebook,
            packed.scale,
            None,
            None,
            16,
            0,
            4,
            0,
        )


def test_a_compiled_layer_is_one_graph() -> None:
    spec = QuantSpec.parse("int4/group32")
    kernel = table.select("linear", spec, None, (16, 64), cpu.cpu_features())
    packed, x = kernel.pack(quantize(torch.randn(16, 64), spec), 1), torch.randn(3, 64)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return kernel.run(x, packed, spec, None, None).relu()

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
