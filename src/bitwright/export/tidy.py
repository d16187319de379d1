"""What a graph loses on its way to the file: zero padding in front of convolutions, dead nodes, the exporter's notes.

Padding matters for speed. ONNX Runtime computes a convolution in integers only where its output is quantized at once; a
``Pad`` in between (models ported from TensorFlow have one before every strided convolution) makes it compute in float.
Zeros are exact in every low-bit format, so they can as well be padded by the convolution behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bitwright.export.graph import DOMAIN

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto


def zeros_around(node: NodeProto, initializers: Mapping[str, TensorProto]) -> tuple[str, list[int]] | None:
    """What a Pad node pads and the zeros it adds, before each spatial axis and after each; None for any other node."""
    from onnx import numpy_helper

    if node.op_type != "Pad" or any(a.name == "mode" and a.s != b"constant" for a in node.attribute):
        return None
    source, sizes, value, axes = [*node.input, "", ""][:4]
    if axes or sizes not in initializers or (value and value not in initializers):
        return None
    pads = numpy_helper.to_array(initializers[sizes]).tolist()
    before, after = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    outside = any((*before[:2], *after[:2])) or min(pads) < 0
    if outside or (value and numpy_helper.to_array(initializers[value]).any()):
        return None
    return source, [*before[2:], *after[2:]]


def tidy(exported: ModelProto) -> None:
    """Drop what a runtime does not need: source locations of this machine, dead nodes, unused initializers."""
    standard = [entry for entry in exported.opset_import if entry.domain != DOMAIN]
    del exported.opset_import[:]
    exported.opset_import.extend(standard)
    exported.producer_name, exported.producer_version = "bitwright", ""
    graph = exported.graph
    graph.name = "bitwright"
    del graph.value_info[:]
    _name_batch(graph)
    _drop_dead(graph)
    for entry in (exported, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ""


def _name_batch(graph: GraphProto) -> None:
    """Call the dynamic size ``batch`` instead of what the tracer invented."""
    shapes = [value.type.tensor_type.shape for value in (*graph.input, *graph.output)]
    symbols = {shape.dim[0].dim_param for shape in shapes[: len(graph.input)] if shape.dim} - {""}
    for dim in (dim for shape in shapes for dim in shape.dim if dim.dim_param):
        for symbol in symbols:
            dim.dim_param = dim.dim_param.replace(symbol, "batch")


def _drop_dead(graph: GraphProto) -> None:
    """Remove nodes and initializers that no output needs."""
    needed = {output.name for output in graph.output}
    alive = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            alive.append(node)
            needed |= _read(node)
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:]
    del graph.initializer[:]
    graph.node.extend(reversed(alive))
    graph.initializer.extend(tensors)


def _read(node: NodeProto) -> set[str]:
    """Names that a node reads, in its branches too."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            names.update(*(_read(inner) for inner in attribute.g.node), (out.name for out in attribute.g.output))
    return names
