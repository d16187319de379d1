"""Building blocks of a QDQ graph: constants in their ONNX storage types, encoded inputs, decoded weights.

What is written is exact: codes and scales are the model's own. Where ONNX Runtime offers several spellings of the same
numbers, these are the ones that it runs in integers:

* Activations are uint8 for every format. A signed code is stored as ``code - qmin`` with the zero point moved along
  (int8 becomes uint8 with zero point 128): signed activations make ONNX Runtime compute in float, and some graphs with
  them fail to load. Formats narrower than 8 bits are a ``Clip`` of uint8 codes, since 4-bit activations run in float.
* Weights of 4 bits and less are INT4 initializers. Where the input is quantized too, they are cast to INT8 before
  ``DequantizeLinear``; ONNX Runtime folds the cast when it loads the file and finds the 8-bit pair it has kernels for.
* Weights with float inputs stay INT4 up to ``DequantizeLinear``, which ``MatMul`` absorbs into ``MatMulNBits``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.errors import ExportError
from bitwright.kernels.row import Activation, product_codes
from bitwright.lowbit.layer import LowbitLayer
from bitwright.lowbit.linear import LowbitLinear
from bitwright.numerics.formats import Format
from bitwright.numerics.spec import QuantSpec

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

_DTYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "INT4": torch.int8,
    "UINT4": torch.uint8,
}


def storage(fmt: Format) -> str:
    """The ONNX type that holds a format's codes; raises `ExportError` for formats that this export cannot express.

    >>> from bitwright.numerics.formats import FORMATS
    >>> [storage(FORMATS[name]) for name in ("ternary", "int5", "uint3", "nf4", "bf16")]
    ['INT4', 'INT8', 'UINT4', 'UINT4', 'BFLOAT16']
    """
    if fmt.fit or (fmt.bits > 8 and fmt.is_integer) or (fmt.dtype is not None and fmt.is_scaled):
        raise ExportError(f"{fmt} has no ONNX form here; use nf4, fp16 or integers of at most 8 bits")
    if fmt.dtype is not None:
        return "FLOAT16" if fmt.dtype is torch.float16 else "BFLOAT16"
    return ("INT" if fmt.qmin < 0 else "UINT") + ("4" if fmt.bits <= 4 else "8")


def type_code(kind: str) -> int:
    """ONNX's number for an element type."""
    from onnx import TensorProto

    return TensorProto.DataType.Value(kind)


def stored_weight(layer: LowbitLayer) -> tuple[QuantSpec, Tensor]:
    """The spec and codes that a file holds: the layer's own, or of a table of whole numbers its values as integers."""
    weight, fmt = layer.weight, layer.weight_spec.format.integer
    if fmt is None or not weight.spec.format.is_table:
        return weight.spec, weight.codes
    return replace(weight.spec, format=fmt), product_codes(weight)


def value_name(path: str, name: str) -> str:
    """The name of a layer's value in the graph.

    >>> value_name("layer1.0.conv1", "output"), value_name("", "output")
    ('layer1.0.conv1.output', 'output')
    """
    return f"{path}.{name}" if path else name


class Writer:
    """Collects the nodes and initializers of a graph, named after the layer that is being written."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._calls: dict[str, int] = {}
        self._encoded: dict[tuple[object, ...], str] = {}
        self._path = self._scope = ""

    def begin(self, path: str) -> None:
        """Start to write a call of the layer at ``path``; later calls of one layer get numbered names."""
        count = self._calls[path] = self._calls.get(path, 0) + 1
        self._path, self._scope = path, path if count == 1 else value_name(path, f"call{count}")

    def constant(self, name: str, values: Tensor | float | list[int], kind: str) -> str:
        """An initializer of the current layer (one per name, also when the layer is called again)."""
        from onnx import helper

        full = value_name(self._path, name)
        if full not in self.initializers:
            tensor = torch.as_tensor(values).detach().cpu()
            raw = _raw(tensor.to(_DTYPES[kind]), nibbles=kind.endswith("INT4"))
            self.initializers[full] = helper.make_tensor(full, type_code(kind), tuple(tensor.shape), raw, raw=True)
        return full

    def add(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node of the current layer; returns the name of its output."""
        from onnx import helper

        output = value_name(self._scope, name)
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attributes))
        return output

    def cast(self, value: str, kind: str, name: str) -> str:
        """``value`` in another element type."""
        return self.add("Cast", [value], name, to=type_code(kind))

    def encoded(self, x: str, slot: str, input: Activation) -> str:
        """``x`` through static uint8 codes: QuantizeLinear, Clip for narrow formats, DequantizeLinear.

        Consumers of one tensor with the same parameters share one encoding.
        """
        fmt, qparams = input.spec.format, input.qparams
        assert qparams is not None
        zero_point = (0 if qparams.zero_point is None else int(qparams.zero_point)) - fmt.qmin
        largest = fmt.qmax - fmt.qmin
        key = (x, qparams.scale.item(), zero_point, largest)
        if key not in self._encoded:
            scale = self.constant(f"{slot}_scale", qparams.scale.reshape(()), "FLOAT")
            zero = self.constant(f"{slot}_zero_point", zero_point, "UINT8")
            codes = self.add("QuantizeLinear", [x, scale, zero], f"{slot}_codes")
            if largest < 255:
                limit = self.constant(f"{slot}_largest", largest, "UINT8")
                codes = self.add("Clip", [codes, "", limit], f"{slot}_clipped")
            self._encoded[key] = self.add("DequantizeLinear", [codes, scale, zero], f"{slot}_values")
        return self._encoded[key]

    def weight_codes(self, layer: LowbitLayer, *, widened: bool) -> str:
        """The codes as stored (a linear layer's transposed to ``[in, out]``), ``widened`` to 8 bits if asked."""
        spec, codes = stored_weight(layer)
        fmt, codes = spec.format, codes.T if isinstance(layer, LowbitLinear) else codes
        name = self.constant("weight", codes, storage(fmt))
        if not (widened and storage(fmt).endswith("INT4")):
            return name
        return self.cast(name, storage(fmt).replace("4", "8"), "weight_codes")

    def weight_values(self, layer: LowbitLayer, scale: Tensor, *, widened: bool) -> str:
        """The weight decoded with ``scale``, float32 (a linear layer's as ``[in, out]``)."""
        spec = stored_weight(layer)[0]
        if spec.format.dtype is not None:
            return self.cast(self.weight_codes(layer, widened=False), "FLOAT", "weight_values")
        if spec.format.codebook:
            return self._looked_up(layer, scale)
        transposed, kind = isinstance(layer, LowbitLinear), spec.granularity.kind
        stored = storage(spec.format).replace("4", "8") if widened else storage(spec.format)
        zero_point = layer.weight_zero_point
        if zero_point is None and stored.endswith("8"):
            # Zero by definition, but with session.x64quantprecision ONNX Runtime breaks per-axis nodes that omit it.
            zero_point = torch.zeros_like(scale)
        inputs = [
            self.weight_codes(layer, widened=widened),
            self.constant("weight_scale", _per_axis(scale, spec, transposed), "FLOAT"),
        ]
        if zero_point is not None:
            inputs.append(self.constant("weight_zero_point", _per_axis(zero_point, spec, transposed), stored))
        blocks = {"block_size": spec.granularity.size} if kind == "group" else {}
        axis = {} if kind == "tensor" else {"axis": int(transposed != (kind == "group"))}
        return self.add("DequantizeLinear", inputs, "weight_values", **axis, **blocks)

    def _looked_up(self, layer: LowbitLayer, scale: Tensor) -> str:
        """Weights of a codebook format: codes to table entries, times the scale; constants that any runtime folds."""
        spec, codes = layer.weight_spec, layer.weight.codes
        if spec.granularity.kind == "group":
            codes, scale = spec.granularity.blocks(codes), scale.unsqueeze(-1)
        if transposed := isinstance(layer, LowbitLinear):
            order = (1, 2, 0) if codes.dim() == 3 else (1, 0)
            codes = codes.permute(order)
            scale = scale.permute(order) if scale.dim() == codes.dim() else scale
        index = self.cast(self.constant("weight", codes, storage(spec.format)), "INT32", "weight_index")
        table = self.constant("codebook", torch.tensor(spec.format.codebook), "FLOAT")
        steps = self.add("Gather", [table, index], "weight_steps")
        values = self.add("Mul", [steps, self.constant("weight_scale", scale, "FLOAT")], "weight_values")
        if not (transposed and codes.dim() == 3):
            return values
        shape = self.constant("weight_shape", torch.tensor([layer.shape[1], layer.shape[0]]), "INT64")
        return self.add("Reshape", [values, shape], "weight_matrix")


def _per_axis(values: Tensor, spec: QuantSpec, transposed: bool) -> Tensor:
    """Scales or zero points in the shape that DequantizeLinear wants: a scalar, ``[out]``, or one per block."""
    if spec.granularity.kind == "tensor":
        return values.reshape(())
    if spec.granularity.kind == "channel":
        return values.reshape(-1)
    return values.T if transposed else values


def _raw(values: Tensor, nibbles: bool) -> bytes:
    """Little-endian bytes of a tensor; with ``nibbles`` two 4-bit codes per byte, the first in the low half."""
    flat = values.contiguous().reshape(-1)
    if nibbles:
        pairs = torch.zeros(2 * math.ceil(flat.numel() / 2), dtype=torch.uint8)
        pairs[: flat.numel()] = flat.view(torch.uint8) & 15
        flat = pairs[0::2] | pairs[1::2] << 4
    return flat.view(torch.uint8).numpy().tobytes()
