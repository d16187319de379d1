"""Low-bit layers as ONNX nodes: second half of an export, which fills the holes that `graph.trace` left.

Each layer becomes the operator of its float original between ``QuantizeLinear`` / ``DequantizeLinear`` pairs, in the
order of operations that the kernels have. Static integer inputs give the QDQ pattern that runtimes fuse; dynamic ones
are spelled out in plain operators, since ``DynamicQuantizeLinear`` chooses ranges and rounds by other rules than ours.
The value that carries a layer's output is called ``<path>.output``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitwright.errors import ExportError
from bitwright.export.graph import DOMAIN, Lowbit, zero_pads
from bitwright.export.tidy import zeros_around
from bitwright.export.writer import Writer, storage, stored_weight
from bitwright.lowbit.conv import LowbitConv
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.embedding import LowbitEmbedding
from bitwright.lowbit.layer import LowbitLayer
from bitwright.numerics.affine import EPS
from bitwright.numerics.spec import QuantSpec

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

# In steps of s_x * s_w: what an int32 holds beside a sum of products, and what a float32 holds exactly.
_LARGEST_BIAS, _ROOMY_BIAS = 2.0**30, 2.0**24


def fill(graph: GraphProto, layers: dict[str, Lowbit]) -> None:
    """Replace every hole in ``graph``, in place, by the nodes and initializers of its layer.

    Raises `ExportError` that names the layer for a spec without an ONNX form.
    """
    writer, renamed, padded = Writer(), {}, {}
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        if node.domain != DOMAIN:
            padded[node.output[0]] = zeros_around(node, initializers)
            writer.nodes.append(node)
            continue
        call = _call(node, layers, padded)
        writer.begin(call.path)
        renamed[node.output[0]] = _write(writer, call)
    for output in graph.output:
        output.name = renamed.get(output.name, output.name)
    del graph.node[:]
    graph.node.extend(writer.nodes)
    graph.initializer.extend(writer.initializers.values())


@dataclass(frozen=True, slots=True)
class _Call:
    """One hole: which layer is called on what, the rank of the first input, and a convolution's zero padding."""

    path: str
    layer: Lowbit
    inputs: list[str]
    rank: int
    pads: list[int]


def _call(node: NodeProto, layers: dict[str, Lowbit], padded: dict[str, tuple[str, list[int]] | None]) -> _Call:
    values = {attribute.name: attribute for attribute in node.attribute}
    path, inputs, pads = values["path"].s.decode(), list(node.input), []
    layer = layers[path]
    if isinstance(layer, LowbitConv):
        pads = zero_pads(layer)
        if found := padded.get(inputs[0]):
            inputs, pads = [found[0]], [own + more for own, more in zip(pads, found[1], strict=True)]
    return _Call(path, layer, inputs, values["rank"].i, pads)


def _write(g: Writer, call: _Call) -> str:
    layer = call.layer
    if isinstance(layer, LowbitAdd):
        pairs = zip(call.inputs, layer.inputs, strict=True)
        sides = [g.encoded(x, f"input_{number}", side) for number, (x, side) in enumerate(pairs)]
        return g.add("Add", sides, "output")
    [x] = call.inputs
    if isinstance(layer, LowbitEmbedding):
        return _embedding(g, layer, x, call.rank)
    input = layer.input
    if input is None:
        return _product(g, call, layer, x, exact=False)
    spec, exact = input.spec, _integer(stored_weight(layer)[0])
    if not spec.format.is_integer:
        raise ExportError(f"{call.path}.input: {spec} has no ONNX form; use uint8/asym or set the site to 'float'")
    if not spec.dynamic:
        return _product(g, call, layer, g.encoded(x, "input", input), exact=exact)
    if exact and (spec.symmetric or spec.granularity.kind == "tensor"):
        return _live_product(g, call, layer, x, spec)
    codes, scale, zero = _live_codes(g, x, spec)
    centred = codes if zero is None else g.add("Sub", [codes, zero], "input_centred")
    return _product(g, call, layer, g.add("Mul", [centred, scale], "input_values"), exact=False)


def _integer(weight: QuantSpec) -> bool:
    """Whether codes of this weight can be multiplied as integers (the scale leaves the sum)."""
    return weight.format.is_integer and weight.symmetric and weight.granularity.kind in ("tensor", "channel")


def _product(g: Writer, call: _Call, layer: LowbitLayer, x: str, *, exact: bool) -> str:
    """Conv or MatMul of decoded operands, plus bias; ``exact`` says that both are integer codes times a scale."""
    if isinstance(layer, LowbitConv):
        return _conv(g, call, layer, x, exact=exact)
    weight = g.weight_values(layer, layer.weight_scale, widened=exact)
    bias = None if layer.bias is None else g.constant("bias", layer.bias, "FLOAT")
    if bias is None:
        return g.add("MatMul", [x, weight], "output")
    # ONNX Runtime rewrites MatMul + Add as a float Gemm before it looks for integer pairs; it leaves Sum alone.
    return g.add("Sum" if exact else "Add", [g.add("MatMul", [x, weight], "product"), bias], "output")


def _conv(g: Writer, call: _Call, layer: LowbitConv, x: str, *, exact: bool) -> str:
    scale, fits = _bias_scale(layer) if exact and layer.bias is not None else (layer.weight_scale, True)
    operands = [x, g.weight_values(layer, scale, widened=exact)]
    if layer.bias is None:
        return g.add("Conv", operands, "output", **_geometry(layer, call))
    if fits:
        bias = g.constant("bias", layer.bias, "FLOAT")
        return g.add("Conv", [*operands, bias], "output", **_geometry(layer, call))
    bias = g.constant("bias", layer.bias.reshape(-1, *[1] * layer.spatial), "FLOAT")
    return g.add("Sum", [g.add("Conv", operands, "product", **_geometry(layer, call)), bias], "output")


def _bias_scale(layer: LowbitConv) -> tuple[Tensor, bool]:
    """A weight scale with which the bias fits the int32 that ONNX Runtime makes of it, and whether there is one.

    Fused convolutions hold ``bias / (s_x * s_w)`` in 32 bits and saturate without a word. A channel that a batch norm
    switched off has a tiny scale and still a bias; as all its codes are zero, its scale may as well be larger.
    """
    assert layer.bias is not None
    assert layer.input_scale is not None
    scale, bias = layer.weight_scale.flatten(), layer.bias.abs()
    overflow = bias > _LARGEST_BIAS * layer.input_scale * scale
    if scale.numel() != bias.numel() or not overflow.any():
        return layer.weight_scale, not overflow.any()
    empty = (stored_weight(layer)[1].flatten(1) == 0).all(1)
    roomy = torch.where(overflow & empty, bias / (layer.input_scale * _ROOMY_BIAS), scale)
    return roomy.view_as(layer.weight_scale), not (overflow & ~empty).any()


def _geometry(layer: LowbitConv, call: _Call) -> dict[str, object]:
    g, count = layer.geometry, layer.spatial
    return {
        "kernel_shape": list(g.kernel_size[-count:]),
        "strides": list(g.stride[-count:]),
        "pads": call.pads,
        "dilations": list(g.dilation[-count:]),
        "group": g.groups,
    }


def _live_codes(g: Writer, x: str, spec: QuantSpec) -> tuple[str, str, str | None]:
    """Codes of ``x`` in float, their scale and zero point, from the live range: `live_qparams`, then `encode`."""
    fmt, nothing = spec.format, g.constant("nothing", 0.0, "FLOAT")
    smallest, largest = (g.constant(f"input_{name}", getattr(fmt, name), "FLOAT") for name in ("qmin", "qmax"))
    per_token = spec.granularity.kind == "token"
    axes = [g.constant("input_axes", [-1], "INT64")] if per_token else []

    def extreme(op: str, value: str) -> str:
        return g.add(op, [value, *axes], f"input_{op}", keepdims=int(per_token))

    if spec.symmetric:
        low, width = None, fmt.qmax
        span = extreme("ReduceMax", g.add("Abs", [x], "input_abs"))
    else:
        low, width = g.add("Min", [extreme("ReduceMin", x), nothing], "input_low"), fmt.qmax - fmt.qmin
        span = g.add("Sub", [g.add("Max", [extreme("ReduceMax", x), nothing], "input_high"), low], "input_span")
    step = g.add("Div", [span, g.constant("input_width", width, "FLOAT")], "input_step")
    scale = g.add("Max", [step, g.constant("smallest_scale", EPS, "FLOAT")], "input_scale")
    codes, zero = g.add("Round", [g.add("Div", [x, scale], "input_steps")], "input_rounded"), None
    if low is not None:
        below = g.add("Round", [g.add("Div", [low, scale], "input_low_steps")], "input_low_rounded")
        zero = g.add("Clip", [g.add("Sub", [smallest, below], "input_zero"), smallest, largest], "input_zero_point")
        codes = g.add("Add", [codes, zero], "input_shifted")
    return g.add("Clip", [codes, smallest, largest], "input_codes"), scale, zero


def _live_product(g: Writer, call: _Call, layer: LowbitLayer, x: str, spec: QuantSpec) -> str:
    """ConvInteger or MatMulInteger of live codes: ``acc * (s_x * s_w) + bias``."""
    codes, scale, zero = _live_codes(g, x, spec)
    qmin, axes = spec.format.qmin, (1,) * (layer.spatial if isinstance(layer, LowbitConv) else 0)

    def unsigned(value: str, name: str) -> str:
        moved = g.add("Sub", [value, g.constant("input_qmin", qmin, "FLOAT")], f"{name}_moved") if qmin else value
        return g.cast(moved, "UINT8", f"{name}_uint8")

    zero = g.constant("input_zero", -qmin, "UINT8") if zero is None else unsigned(zero, "input_zero_point")
    operands = [unsigned(codes, "input_codes"), g.weight_codes(layer, widened=True), zero]
    if isinstance(layer, LowbitConv):
        total = g.add("ConvInteger", operands, "total", **_geometry(layer, call))
    else:
        total = g.add("MatMulInteger", operands, "total")
    if spec.granularity.kind == "token":
        # An outer product: a Mul would make ONNX Runtime fuse MatMulIntegerToFloat, which reads the first scale only.
        row = layer.weight_scale.reshape(1, -1).expand(1, layer.shape[0])
        factor = g.add("MatMul", [scale, g.constant("weight_scale", row, "FLOAT")], "factor")
    else:
        weight_scale = g.constant("weight_scale", layer.weight_scale.reshape(-1, *axes), "FLOAT")
        factor = g.add("Mul", [scale, weight_scale], "factor")
    factors = [g.cast(total, "FLOAT", "total_float"), factor]
    if layer.bias is None:
        return g.add("Mul", factors, "output")
    bias = g.constant("bias", layer.bias.reshape(-1, *axes), "FLOAT")
    return g.add("Add", [g.add("Mul", factors, "product"), bias], "output")


def _embedding(g: Writer, layer: LowbitEmbedding, ids: str, rank: int) -> str:
    """Gather codes and scales of the rows, then decode: DequantizeLinear would decode the whole table every time."""
    spec, codes = stored_weight(layer)
    fmt, grouped = spec.format, spec.granularity.kind == "group"

    def rows(name: str, values: Tensor) -> str:
        if spec.granularity.kind == "tensor":
            return g.constant(name, values.reshape(()), "FLOAT")
        table = g.constant(name, values.unsqueeze(-1) if grouped else values, "FLOAT")
        return g.add("Gather", [table, ids], f"{name}_rows")

    table = g.constant("weight", spec.granularity.blocks(codes) if grouped else codes, storage(fmt))
    if storage(fmt).endswith("INT4"):  # Gather knows no 4-bit types; runtimes fold this cast when they load the file
        table = g.cast(table, storage(fmt).replace("4", "8"), "weight_codes")
    values = g.add("Gather", [table, ids], "rows")
    if fmt.codebook:
        steps = g.constant("codebook", torch.tensor(fmt.codebook), "FLOAT")
        values = g.add("Gather", [steps, g.cast(values, "INT32", "row_index")], "row_steps")
    else:
        values = g.cast(values, "FLOAT", "output" if fmt.dtype is not None else "row_codes")
    if fmt.dtype is not None:
        return values
    if layer.weight_zero_point is not None:
        values = g.add("Sub", [values, rows("weight_zero_point", layer.weight_zero_point)], "rows_centred")
    values = g.add("Mul", [values, rows("weight_scale", layer.weight_scale)], "row_blocks" if grouped else "output")
    if not grouped:
        return values
    shape = g.constant(f"row_shape_{rank}", [0] * rank + [layer.shape[1]], "INT64")  # 0 copies a dimension of the ids
    return g.add("Reshape", [values, shape], "output")
