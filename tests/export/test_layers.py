"""Every low-bit layer as ONNX nodes, without a model around it: ONNX Runtime finds the layer's own codes and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")

import onnx
import onnxruntime
from onnx import TensorProto, helper

from bitwright.errors import ExportError
from bitwright.export.graph import DOMAIN, OPSET, Lowbit
from bitwright.export.layers import fill
from bitwright.export.parity import settings
from bitwright.export.tidy import tidy
from bitwright.export.writer import Writer, storage
from bitwright.kernels.reference import Geometry
from bitwright.kernels.row import Activation
from bitwright.lowbit.conv import LowbitConv
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.embedding import LowbitEmbedding
from bitwright.lowbit.linear import LowbitLinear
from bitwright.numerics.affine import choose_qparams, simulate
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.qtensor import dequantize, quantize
from bitwright.numerics.spec import QParams, QuantSpec

INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer and fmt.bits <= 8]
SAME = (1, 1), (1, 1), (0, 0), (1, 1)  # kernel size, stride, padding, dilation of a pointwise convolution


def run(nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto], x: Tensor, out: str) -> Tensor:
    """The value ``out`` of a graph over ``x``, node by node in ONNX Runtime."""
    kind = TensorProto.FLOAT if x.is_floating_point() else TensorProto.INT64
    inputs = [helper.make_tensor_value_info("x", kind, [None] * x.dim())]
    outputs = [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "test", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return torch.from_numpy(session.run([out], {"x": x.numpy()})[0])


def filled(layer: Lowbit, x: Tensor, second: str = "") -> Tensor:
    """What a hole with this layer computes on ``x``, after it was filled."""
    hole = helper.make_node(
        "Layer", ["x", second] if second else ["x"], ["y"], domain=DOMAIN, path="layer", rank=x.dim()
    )
    graph = helper.make_graph([hole], "test", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    fill(graph, {"layer": layer})
    assert graph.output[0].name == "layer.output"
    return run(list(graph.node), list(graph.initializer), x, "layer.output")


def activation(spec: str, x: Tensor) -> Activation:
    parsed = QuantSpec.parse(spec)
    if parsed.dynamic:
        return Activation(parsed, None)
    return Activation(parsed, choose_qparams(x.min().view(1) * 0.8, x.max().view(1) * 0.8, parsed))


def linear(weight: str, input: Activation | None = None, inputs: int = 32) -> LowbitLinear:
    return LowbitLinear(quantize(torch.randn(6, inputs), QuantSpec.parse(weight)), torch.randn(6), input, frozenset())


@pytest.mark.parametrize("asymmetric", ["", "/asym"])
@pytest.mark.parametrize("name", INTEGERS)
def test_static_codes_of_every_format_are_ours(name: str, asymmetric: str) -> None:
    spec = QuantSpec.parse(name + asymmetric)
    zero_point = torch.tensor([float((spec.format.qmin + spec.format.qmax) // 2)]) if asymmetric else None
    for scale in (0.1, 0.0123, 1e-3):
        qparams = QParams(torch.tensor([scale]), zero_point)
        ties = torch.arange(-700, 700) * (scale / 2)
        x = torch.cat([ties, torch.randn(4000) * scale * 200, torch.tensor([1e9, -1e9, 0.0])])
        writer = Writer()
        writer.begin("layer")
        out = writer.encoded("x", "input", Activation(spec, qparams))
        found = run(writer.nodes, list(writer.initializers.values()), x, out)
        assert torch.equal(found, simulate(x, spec, qparams))


def test_one_tensor_is_encoded_once() -> None:
    writer, x = Writer(), torch.randn(8)
    for path in ("a", "b"):
        writer.begin(path)
        names = {writer.encoded("x", "input", activation("uint4/asym", x)) for _ in range(2)}
        assert names == {"a.input_values"}
    assert [node.op_type for node in writer.nodes] == ["QuantizeLinear", "Clip", "DequantizeLinear"]


WEIGHTS = [
    f"{name}{kind}"
    for name in (*INTEGERS, "nf4", "fp4", "binary", "midrise2", "midrise3", "pot5", "apot6", "fp16", "bf16")
    for kind in ("", "/channel", "/group8")
]
WEIGHTS += [f"{name}{kind}/asym" for name in INTEGERS for kind in ("", "/channel", "/group8")]


@pytest.mark.parametrize("spec", WEIGHTS)
def test_weights_of_every_spec_decode_to_ours(spec: str) -> None:
    weight = quantize(torch.randn(5, 24), QuantSpec.parse(spec))
    layer = LowbitLinear(weight, None, None, frozenset())
    writer = Writer()
    writer.begin("layer")
    out = writer.weight_values(layer, layer.weight_scale, widened=False)
    identity = [*writer.nodes, helper.make_node("Mul", [out, "x"], ["y"])]
    found = run(identity, list(writer.initializers.values()), torch.ones(1, 1), "y")
    assert torch.equal(found.T, dequantize(weight))


@pytest.mark.parametrize(
    ("name", "kind"), [("ternary", "INT4"), ("int3", "INT4"), ("int5", "INT8"), ("uint4", "UINT4"), ("uint8", "UINT8")]
)
def test_storage_types(name: str, kind: str) -> None:
    assert storage(FORMATS[name]) == kind


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "kmeans4", "int16"])
def test_formats_without_an_onnx_form_are_refused(name: str) -> None:
    with pytest.raises(ExportError, match=f"{name} has no ONNX form here; use nf4, fp16 or integers"):
        storage(FORMATS[name])


@pytest.mark.parametrize("weight", ["int8/channel", "int4", "ternary/channel", "uint4", "int8/group8", "nf4/channel"])
@pytest.mark.parametrize(
    "input",
    [
        "uint8/asym", "int8", "int4/asym", "uint3",
        "int8/token/dynamic", "uint8/asym/dynamic", "int6/dynamic", "uint8/token/asym/dynamic", "int5/asym/dynamic",
    ],
)  # fmt: skip
def test_linear(weight: str, input: str) -> None:
    x = torch.randn(3, 7, 32) * torch.logspace(-2, 2, 7).unsqueeze(-1)
    layer = linear(weight, activation(input, x))
    if weight == "int8/channel" and layer.input_spec.dynamic and "session.x64quantprecision" in settings():
        pytest.skip("without VNNI: ONNX Runtime's MatMulInteger of 8-bit weights saturates")
    expected = layer(x)
    assert torch.allclose(filled(layer, x), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("input", ["int8/token/dynamic", "uint8/asym/dynamic", "int4/dynamic"])
def test_dynamic_linear_is_bit_equal(input: str) -> None:
    x = torch.randn(5, 32)
    layer = linear("int4/channel", activation(input, x))
    assert torch.equal(filled(layer, x), layer(x))


def conv(weight: str, input: Activation | None, spatial: int, geometry: Geometry, prepad: object = None) -> LowbitConv:
    shape = (8, 4 // geometry.groups, *geometry.kernel_size[-spatial:])
    packed = quantize(torch.randn(shape), QuantSpec.parse(weight))
    return LowbitConv(packed, torch.randn(8), input, frozenset(), geometry, prepad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("spatial", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    ("weight", "input"),
    [
        ("int8/channel", "uint8/asym"), ("int4", "int8"), ("ternary/channel", "uint4/asym"), ("nf4/channel", None),
        ("uint4/channel/asym", None), ("bf16", None), ("int8/channel", "uint8/asym/dynamic"),
        ("int4/channel", "int6/dynamic"),
    ],
)  # fmt: skip
def test_conv(weight: str, input: str | None, groups: int, spatial: int) -> None:
    x = torch.randn(2, 4, *(9, 11)[-spatial:])
    given = None if input is None else activation(input, x)
    geometry = Geometry((3, 2), (2, 1), (1, 2), (1, 2), groups)
    if spatial == 1:
        geometry = Geometry((1, 2), (1, 1), (0, 2), (1, 2), groups)
    layer = conv(weight, given, spatial, geometry)
    expected = layer(x)
    found = filled(layer, x)
    if input is not None and "dynamic" in input:
        assert torch.equal(found, expected)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_uneven_zero_padding_is_the_convolutions_own() -> None:
    x = torch.randn(2, 4, 6, 6)
    layer = conv("int8/channel", activation("uint8/asym", x), 2, Geometry((2, 4), (1, 1), (0, 0), (1, 1), 1),
                 ((1, 2, 0, 1), "constant"))  # fmt: skip
    assert torch.allclose(filled(layer, x), layer(x), rtol=1e-5, atol=1e-5)


def padded_graph(pads: list[int], value: float, layer: Lowbit) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Pad", ["x", "pads", "value"], ["p"]),
        helper.make_node("Layer", ["p"], ["y"], domain=DOMAIN, path="layer", rank=4),
    ]
    tensors = [
        helper.make_tensor("pads", TensorProto.INT64, [8], pads),
        helper.make_tensor("value", TensorProto.FLOAT, [], [value]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    model = helper.make_model(helper.make_graph(nodes, "test", [], outputs, tensors))
    fill(model.graph, {"layer": layer})
    tidy(model)
    return model


@pytest.mark.parametrize(
    ("pads", "value", "absorbed"),
    [
        ([0, 0, 0, 1, 0, 0, 2, 1], 0.0, True),
        ([0, 0, 0, 1, 0, 0, 2, 1], 1.0, False),
        ([0, 1, 0, 0, 0, 0, 0, 0], 0.0, False),
        ([0, 0, 0, 0, 0, 0, -1, 0], 0.0, False),
    ],
)
def test_zero_padding_before_a_convolution_is_absorbed(pads: list[int], value: float, absorbed: bool) -> None:
    x = torch.randn(2, 4 - pads[1], 6, 6)
    layer = conv("int8/channel", activation("uint8/asym", x), 2, Geometry((3, 3), (2, 2), (1, 1), (1, 1), 1))
    graph = padded_graph(pads, value, layer).graph
    assert ("Pad" not in [node.op_type for node in graph.node]) == absorbed
    around = [pads[3], pads[7], pads[2], pads[6], pads[1], pads[5]]
    expected = layer(nn.functional.pad(x, around, value=value))
    found = run(list(graph.node), list(graph.initializer), x, "layer.output")
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ids", [torch.tensor([3, 0, 9]), torch.randint(0, 10, (2, 5))])
@pytest.mark.parametrize(
    "spec",
    ["int8/channel", "int4/group8", "uint4/group4/asym", "uint8/asym", "ternary", "nf4/group8", "nf4", "fp16", "bf16"],
)
def test_embedding_rows_are_bit_equal(spec: str, ids: Tensor) -> None:
    layer = LowbitEmbedding(quantize(torch.randn(10, 16), QuantSpec.parse(spec)), None, None, frozenset())
    assert torch.equal(filled(layer, ids), layer(ids))


def test_add_is_bit_equal() -> None:
    x = torch.randn(4, 9)
    layer = LowbitAdd((activation("uint8/asym", x), activation("int6/asym", x)), frozenset())
    assert torch.equal(filled(layer, x, second="x"), layer(x, x))


def test_a_float_format_for_an_input_is_refused() -> None:
    x = torch.randn(2, 32)
    layer = linear("fp16", Activation(QuantSpec.parse("fp16"), QParams(torch.ones(1))))
    with pytest.raises(ExportError, match=r"layer\.input: fp16 has no ONNX form; use uint8/asym"):
        filled(layer, x)
