"""`export`: a converted model as an ONNX file that ONNX Runtime executes on the same codes.

The file is a QDQ graph (opset 21) with a dynamic batch. Its weights are the model's codes as INT4 or INT8 initializers
``<path>.weight`` (a linear layer's are transposed) with the model's ``<path>.weight_scale``; outputs agree with the
converted model up to the runtime's own arithmetic, which `parity` measures. `writer` tells how the graph is spelled.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bitwright.errors import ExportError, MissingExtraError
from bitwright.export.graph import Lowbit, lowbit_layers, trace
from bitwright.export.layers import fill
from bitwright.export.tidy import tidy

if TYPE_CHECKING:
    from onnx import ModelProto

_LARGEST_FILE = 2**31 - 1  # protobuf's limit


def export(model: nn.Module, path: str | Path, example: Any, *, format: str = "onnx") -> None:
    """Write a converted model to an ONNX file; ``example`` is one batch of inputs, dim 0 of each is the batch.

    The example may be a tensor, a tuple of positional or a dict of keyword arguments; only its shapes and types matter,
    and the file takes any batch size. Raises `ExportError` for a model that is not converted, cannot be traced or holds
    an operator without ONNX form, and for a path that cannot be written; what was at ``path`` before stays then.
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
    _write(to_onnx(model, lowbit_layers(model), example), path)


def to_onnx(model: nn.Module, layers: dict[str, Lowbit], example: Any) -> ModelProto:
    """What `export` writes, for a model with these low-bit ``layers``; without any it is the float model's graph."""
    exported = trace(model, layers, example)
    fill(exported.graph, layers)
    tidy(exported)
    _check(exported)
    return exported


def require_onnx() -> None:
    """Raise `MissingExtraError` unless the packages of the ``onnx`` extra can be imported."""
    try:
        import onnx  # noqa: F401 - an optional extra
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as cause:
        raise MissingExtraError("onnx, onnxscript and onnxruntime", "onnx", "exporting to ONNX") from cause


def _check(exported: ModelProto) -> None:
    """Refuse a file that would be too large or invalid."""
    import onnx

    size = sum(len(tensor.raw_data) for tensor in exported.graph.initializer)
    if size > _LARGEST_FILE:
        raise ExportError(
            f"the weights take {size / 2**30:.1f} GiB, an ONNX file holds less than 2; use fewer bits, or export parts"
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
