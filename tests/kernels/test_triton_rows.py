"""The rows that run on a GPU against the reference rows: in Triton's interpreter without a GPU, compiled with one.

Triton decides once per process whether it interprets, so the last tests run this file again in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import KernelError
from bitwright.kernels import table
from bitwright.kernels.row import Activation, Packed
from bitwright.kernels.triton_layout import lay_out, row_bytes, width_of
from bitwright.numerics.affine import live_qparams
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.qtensor import QTensor, dequantize, quantize
from bitwright.numerics.spec import QParams, QuantSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
FEATURES = frozenset({"cuda", "triton"})
runs = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs on a GPU, or in a process that interprets")
outside = pytest.mark.skipif(INTERPRETED, reason="starts the process that interprets")

WEIGHTS = ("int8", "int7", "int6", "int5", "int4", "int3", "int2", "ternary")
INPUTS = ("int8", "uint8/asym", "int8/asym", "int4", "int8/token/dynamic", "uint8/token/asym/dynamic", "uint8/dynamic")


def spec_of(text: str | None) -> QuantSpec | None:
    return None if text is None else QuantSpec.parse(text)


def moved(weight: QTensor, device: str) -> QTensor:
    """The weight on another device, its float parts included."""
    scale = weight.scale.to(device) if isinstance(weight.scale, Tensor) else moved(weight.scale, device)
    zero_point, codebook = (None if t is None else t.to(device) for t in (weight.zero_point, weight.codebook))
    return QTensor(weight.packed.to(device), scale, zero_point, weight.spec, weight.shape, codebook)


def ran(features: frozenset[str], x: Tensor, weight: QTensor, bias: Tensor | None, input: Activation | None) -> Tensor:
    """The product by the row of these features, back on the CPU."""
    device = DEVICE if features else "cpu"
    row = table.select("linear", weight.spec, input and input.spec, weight.shape, features)
    assert ("triton" in row.name) == bool(features), row.name
    if input is not None and input.qparams is not None:
        zero_point = input.qparams.zero_point
        zero_point = None if zero_point is None else zero_point.to(device)
        input = Activation(input.spec, QParams(input.qparams.scale.to(device), zero_point))
    packed = row.pack(moved(weight, device), 1)
    bias = None if bias is None else bias.to(device)
    return row.run(x.to(device), packed, weight.spec, bias, input).cpu()


def activation(text: str, x: Tensor) -> Activation:
    spec = QuantSpec.parse(text)
    return Activation(spec, None if spec.dynamic else live_qparams(x, spec))


def agree(x: Tensor, weight: QTensor, bias: Tensor | None, input: Activation) -> None:
    out, expected = ran(FEATURES, x, weight, bias, input), ran(frozenset(), x, weight, bias, input)
    assert out.dtype is torch.float32
    assert torch.equal(out, expected)


@runs
@settings(max_examples=40)
@given(
    weight=st.sampled_from(WEIGHTS), input=st.sampled_from(INPUTS), kind=st.sampled_from(["", "/channel"]),
    m=st.integers(1, 20), n=st.integers(1, 70), k=st.integers(1, 300), bias=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_integer_products_equal_the_reference(
    weight: str, input: str, kind: str, m: int, n: int, k: int, bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 3 + 0.5
    packed = quantize(torch.randn(n, k, generator=generator), QuantSpec.parse(weight + kind))
    agree(x, packed, torch.randn(n, generator=generator) if bias else None, activation(input, x))


@runs
@settings(max_examples=25)
@given(
    weight=st.sampled_from(WEIGHTS), input=st.sampled_from(INPUTS), size=st.sampled_from([32, 64, 96, 128, 256]),
    groups=st.integers(1, 4), m=st.integers(1, 20), n=st.integers(1, 40), bias=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_groups_are_added_in_order(
    weight: str, input: str, size: int, groups: int, m: int, n: int, bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, size * groups, generator=generator) * 3 - 0.5
    packed = quantize(torch.randn(n, size * groups, generator=generator), QuantSpec.parse(f"{weight}/group{size}"))
    agree(x, packed, torch.randn(n, generator=generator) if bias else None, activation(input, x))


@runs
@pytest.mark.parametrize("input", ["uint8/asym", "int8/token/dynamic"])
def test_sums_beyond_what_float32_counts_are_rounded_once(input: str) -> None:
    x = torch.linspace(-255, -250, 5000).expand(2, -1).clone()
    x[1] *= -1
    weight = quantize(torch.cat([torch.full((1, 5000), -1.0), torch.ones(1, 5000)]), QuantSpec.parse("int8"))
    agree(x, weight, None, activation(input, x))


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_activations_are_encoded_as_their_values(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 70).to(dtype), quantize(torch.randn(5, 70), QuantSpec.parse("int4/channel"))
    for input in INPUTS:
        agree(x, weight, None, activation(input, x.float()))


@runs
def test_ties_and_clipped_codes() -> None:
    x = torch.tensor([[-900.0, -1.75, -0.75, -0.25, 0.0, 0.25, 0.75, 1.25, 1e30, torch.inf, -torch.inf]]) / 2
    weight, scale = quantize(torch.eye(11), QuantSpec.parse("int8")), torch.tensor([0.25])
    for text, zero in (("int8", None), ("uint8/asym", 7.0), ("int8/asym", -5.0), ("uint4/asym", 3.0)):
        zero_point = None if zero is None else torch.tensor([zero])
        agree(x, weight, None, Activation(QuantSpec.parse(text), QParams(scale, zero_point)))


@runs
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_is_not_finite_has_no_range() -> None:
    x = torch.randn(4, 40)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    weight, input = quantize(torch.randn(6, 40), QuantSpec.parse("int8/channel")), activation("int8/token/dynamic", x)
    out, rows = ran(FEATURES, x, weight, None, input), torch.tensor([0, 3])
    assert not out[1:3].isfinite().any()
    assert torch.equal(out[rows], ran(frozenset(), x[rows], weight, None, input))


# Codes within float16 and bfloat16 exactly, and tables, which are rounded once.
FLOAT_WEIGHTS = (
    *("int8/channel", "int4/group32", "int4/group16", "uint4/group48/asym", "uint8/channel/asym", "int3/channel"),
    *("int2/group32", "ternary/channel", "ternary/group64", "int5", "int6/channel", "int7/group96"),
    *("fp8_e4m3/channel", "fp8_e5m2", "mxfp4", "nvfp4", "nf4/group32/scale(int8/group3)"),
    *("nf4/channel", "kmeans4/channel", "kmeans2/group32", "quantile3", "apot4/channel", "pot3", "binary", "midrise2"),
)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", FLOAT_WEIGHTS)
def test_float_products_stay_within_the_bound(weight: str, dtype: torch.dtype) -> None:
    """``2 K eps`` of float32 for the sum, one rounding of a table and one of the result in the type of x."""
    spec = QuantSpec.parse(weight)
    packed, bias, x = quantize(torch.randn(21, 192), spec), torch.randn(21), torch.randn(5, 192).to(dtype)
    out, value = ran(FEATURES, x, packed, bias, None), dequantize(packed).double()
    expected, magnitude = x.double() @ value.t() + bias, x.double().abs() @ value.abs().t() + bias.abs()
    eps, narrow = torch.finfo(torch.float32).eps, 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps
    rounding = narrow * expected.abs() + (narrow * magnitude if spec.format.is_table else 0.0)
    assert out.dtype is dtype
    assert ((out.double() - expected).abs() <= 2 * 192 * eps * magnitude + rounding).all()
    assert expected.abs().max() > 1e2 * (2 * 192 * eps * magnitude).max()


@runs
@pytest.mark.parametrize("weight", FLOAT_WEIGHTS)
def test_every_code_is_decoded_exactly(weight: str) -> None:
    """A product with the identity: each value on its own."""
    packed = quantize(torch.randn(9, 192), QuantSpec.parse(weight))
    assert torch.equal(ran(FEATURES, torch.eye(192), packed, None, None), dequantize(packed).t())


@runs
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_every_finite_byte_of_a_float_is_decoded(name: str) -> None:
    spec, bytes = QuantSpec.parse(name), torch.arange(256, dtype=torch.uint8).view(4, 64)
    kept = bytes.view(spec.format.dtype).float().isfinite()  # type: ignore[arg-type]
    weight = QTensor(bytes.where(kept, 0), torch.ones(1), None, spec, (4, 64))
    assert torch.equal(ran(FEATURES, torch.eye(64), weight, None, None), dequantize(weight).t())


@runs
def test_quantized_inputs_meet_decoded_weights() -> None:
    weight, x = quantize(torch.randn(8, 64), QuantSpec.parse("uint4/group32/asym")), torch.randn(3, 64)
    input = activation("uint8/asym", x)
    assert torch.allclose(ran(FEATURES, x, weight, None, input), ran(frozenset(), x, weight, None, input), atol=1e-5)


@runs
@pytest.mark.parametrize("input", [None, "uint8/asym", "int8/token/dynamic"])
def test_rows_of_any_shape(input: str | None) -> None:
    weight, x = quantize(torch.randn(7, 64), QuantSpec.parse("int4/group32")), torch.randn(2, 3, 128)
    for part in (x[..., ::2], x[..., :64].transpose(0, 1), x[0, 0, :64], x[:0, :, :64]):
        encoding = None if input is None else activation(input, x)
        out, expected = (ran(features, part, weight, None, encoding) for features in (FEATURES, frozenset()))
        assert out.shape == expected.shape == (*part.shape[:-1], 7)
        assert torch.allclose(out, expected, atol=1e-5)
        assert input is None or torch.equal(out, expected)


def packed_row(weight: str, input: str | None) -> tuple[table.Kernel, Packed]:
    spec = QuantSpec.parse(weight)
    row = table.select("linear", spec, spec_of(input), (6, 64), FEATURES)
    return row, row.pack(moved(quantize(torch.randn(6, 64), spec), DEVICE), 1)


@runs
@pytest.mark.parametrize("input", [None, "int8/token/dynamic"])
def test_operands_that_would_be_misread_are_refused(input: str | None) -> None:
    row, packed = packed_row("int4/group32", input)
    encoding = None if input is None else Activation(QuantSpec.parse(input), None)
    x, half = torch.zeros(2, 64, device=DEVICE), packed.scale.half()
    for message, operand, constants in (
        ("x must be float32, float16 or bfloat16 .*, got torch.float64", x.double(), packed),
        ("x must be float32, float16 or bfloat16 .*, got torch.int64", x.long(), packed),
        ("rows of 32 bytes do not hold the codes of 96 inputs", torch.zeros(2, 96, device=DEVICE), packed),
        ("scale must be float32, got torch.float16", x, packed._replace(scale=half)),
    ):
        with pytest.raises(KernelError, match=message):
            row.run(operand, constants, QuantSpec.parse("int4/group32"), None, encoding)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs two devices")
def test_operands_on_two_devices_are_refused() -> None:
    row, packed = packed_row("int4/group32", None)
    apart = packed._replace(scale=packed.scale.cpu())
    with pytest.raises(KernelError, match="x is on cuda:0, scale on cpu; move the model to one device"):
        row.run(torch.zeros(2, 64, device=DEVICE), apart, QuantSpec.parse("int4/group32"), None, None)


@runs
@pytest.mark.parametrize("input", [None, "int8/token/dynamic"])
def test_a_compiled_layer_is_one_graph(input: str | None) -> None:
    row, packed = packed_row("int4/group32", input)
    spec, x = QuantSpec.parse("int4/group32"), torch.randn(3, 64, device=DEVICE)
    encoding = None if input is None else Activation(QuantSpec.parse(input), None)

    def layer(x: Tensor) -> Tensor:
        return row.run(x, packed, spec, None, encoding).relu()

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.bits <= 8 and fmt.dtype is None])
def test_a_layout_is_as_dense_as_the_format(name: str) -> None:
    fmt = FORMATS[name]
    for k in (4096, 11008):
        assert row_bytes(k, width_of(fmt)) <= 1.01 * fmt.packed_bytes(k)
    codes = torch.randint(0, fmt.qmax - fmt.qmin + 1, (3, 77), dtype=torch.uint8)
    layout = lay_out(codes, width_of(fmt))
    assert layout.shape == (3, row_bytes(77, width_of(fmt)))
    others = lay_out(codes.roll(1, 0), width_of(fmt)).roll(-1, 0)
    assert torch.equal(layout, others)  # rows are laid out alone


@pytest.mark.parametrize(
    ("weight", "input", "name"),
    [
        ("int8/channel", "uint8/asym", "linear/triton"),
        ("ternary/channel", "int8/token/dynamic", "linear/triton"),
        ("int4/group64", "int8", "linear/triton"),
        ("int4/group16", "int8", "linear/reference"),
        ("uint8/channel", "int8", "linear/reference"),
        ("int8/channel", "int8/group32/dynamic", "linear/reference"),
        ("int4/group16", None, "linear/decode/triton"),
        ("nf4/group64", None, "linear/decode/triton"),
        ("fp8_e4m3/channel", None, "linear/decode/triton"),
        ("uint4/group32/asym", "uint8/asym", "linear/decode/triton"),
        ("int4/group8", None, "linear/decode"),
        ("fp16", None, "linear/decode"),
        ("int16/channel", None, "linear/decode"),
    ],
)
def test_the_table_takes_them_on_a_gpu_with_triton(weight: str, input: str | None, name: str) -> None:
    spec, encoding = QuantSpec.parse(weight), spec_of(input)
    assert table.select("linear", spec, encoding, (8, 128), FEATURES).name == name
    without = table.select("linear", spec, encoding, (8, 128), frozenset({"cuda"})).name
    assert without in ("linear/reference", "linear/decode")
    reasons = dict(table.explain("linear", spec, encoding, (8, 128), frozenset()))
    assert reasons["linear/triton"] == "needs cuda, triton"


@outside
def test_without_an_interpreter_a_tensor_on_the_cpu_is_refused() -> None:
    pytest.importorskip("triton")
    for input in (None, Activation(QuantSpec.parse("int8/token/dynamic"), None)):
        row, packed = packed_row("int4/group32", input and str(input.spec))
        with pytest.raises(KernelError, match="Triton runs on CUDA devices, x is on cpu; move the model"):
            row.run(torch.zeros(2, 64), packed, QuantSpec.parse("int4/group32"), None, input)


@outside
def test_without_triton_the_package_works_and_the_rows_say_what_to_install() -> None:
    code = """
import sys
sys.modules["triton"] = None  # what a missing package looks like to an import
import torch, bitwright, bitwright.kernels.triton_rows
from bitwright.kernels import table
from bitwright.numerics.qtensor import quantize
spec = bitwright.QuantSpec.parse("int4/channel")
row = table.select("linear", spec, None, (4, 64), frozenset({"cuda", "triton"}))
try:
    row.run(torch.zeros(2, 64), row.pack(quantize(torch.randn(4, 64), spec), 1), spec, None, None)
except bitwright.BitwrightError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert "pip install 'bitwright[gpu]'" in done.stdout


@outside
@pytest.mark.slow
def test_the_interpreter_proves_the_rows() -> None:
    """Every test above in a process in which Triton interprets."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    root, variables = Path(__file__).parents[2], {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=variables, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 100  # a process that does not interpret would skip them
