"""`export`: a converted model as an ONNX file that ONNX Runtime executes on the same codes.

The file is a QDQ graph (opset 21) with a dynamic batch. Its weights are the model's codes as INT4 or INT8 initializers
with the model's scales; outputs agree with the converted model up to the runtime's own arithmetic, which `parity`
measures. What makes up the graph is told in `graph`, `writer` and `layers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bitwright.errors import ExportError, MissingExtraError
from bitwright.export.graph import DOMAIN, lowbit_layers, trace
from bitwright.export.layers import fill

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

_LARGEST_FILE = 2**31 - 1  # protobuf's limit


def export(model: nn.Module, path: str | Path, example: Any, *, format: str = "onnx") -> None:
    """Write a converted model to an ONNX file; ``example`` is one batch of inputs, dim 0 of each is the batch.

    The example may be a tensor, a tuple of positional or a dict of keyword arguments; only its shapes and types matter,
    and the file takes any batch size. Raises `ExportError` for a model that is not converted, cannot be traced or holds
    an operator without ONNX form, and for a path that cannot be written; nothing is left at ``path`` then.
    `MissingExtraError` without the packages of the ``onnx`` extra.
    """
    if format != "onnx":
        raise ExportError(f"unknown export format {format!r}; known formats: onnx")
    require_onnx()
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise ExportError(f"cannot write {path}: it is a folder; name a file, e.g. {path / 'model.onnx'}")
    layers = lowbit_layers(model)
    exported = trace(model, layers, example)
    fill(exported.graph, layers)
    _tidy(exported)
    _check(exported)
    _write(exported, path)


def require_onnx() -> None:
    """Raise `MissingExtraError` unless the packages of the ``onnx`` extra can be imported."""
    try:
        import onnx  # noqa: F401, PLC0415 - an optional extra
        import onnxruntime  # noqa: F401, PLC0415
        import onnxscript  # noqa: F401, PLC0415
    except ImportError as cause:
        raise MissingExtraError("onnx, onnxscript and onnxruntime", "onnx", "exporting to ONNX") from cause


def _tidy(exported: ModelProto) -> None:
    """Drop what only the exporter needs: its domain, source locations of the tracing machine, unused initializers."""
    standard = [entry for entry in exported.opset_import if entry.domain != DOMAIN]
    del exported.opset_import[:]
    exported.opset_import.extend(standard)
    exported.producer_name, exported.producer_version = "bitwright", ""
    graph = exported.graph
    graph.name = "bitwright"
    del graph.value_info[:]
    _name_batch(graph)
    for entry in (exported, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ""
    used = _used(graph) | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _name_batch(graph: GraphProto) -> None:
    """Call the dynamic size ``batch`` instead of what the tracer invented."""
    shapes = [value.type.tensor_type.shape for value in (*graph.input, *graph.output)]
    symbols = {shape.dim[0].dim_param for shape in shapes[: len(graph.input)] if shape.dim} - {""}
    for dim in (dim for shape in shapes for dim in shape.dim if dim.dim_param):
        for symbol in symbols:
            dim.dim_param = dim.dim_param.replace(symbol, "batch")


def _used(graph: GraphProto) -> set[str]:
    """Names that the nodes of a graph and of its branches read."""
    names = {name for node in graph.node for name in node.input}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= _used(attribute.g)
    return names


def _check(exported: ModelProto) -> None:
    """Refuse a file that would be too large or invalid."""
    import onnx  # noqa: PLC0415 - an optional extra

    size = sum(len(tensor.raw_data) for tensor in exported.graph.initializer)
    if size > _LARGEST_FILE:
        raise ExportError(
            f"the model holds {size / 2**30:.1f} GiB of weights, an ONNX file less than 2 GiB; use fewer bits or export parts"
        )
    try:
        onnx.checker.check_model(exported, full_check=True)
    except Exception as cause:
        raise ExportError(f"the exported graph is not valid ONNX: {cause}") from cause


def _write(exported: ModelProto, path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(exported.SerializeToString())
        temporary.replace(path)
    except OSError as cause:
        temporary.unlink(missing_ok=True)
        raise ExportError(f"cannot write {path}: {cause.strerror or cause}") from cause
