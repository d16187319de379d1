"""Rows of the kernel table that run on a GPU, in Triton: ``linear/triton`` and ``linear/decode/triton``.

Here is everything but the kernels: what a row refuses, its layout (`triton_layout`), and the operators
``bitwright::triton_integer_linear`` and ``bitwright::triton_decoded_linear``, opaque to ``torch.compile``. Triton is
imported when an operator runs; a product of integers equals `kernels.reference.linear` bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.errors import KernelError
from bitwright.kernels.operators import register
from bitwright.kernels.row import Activation, Kernel, Packed, decoded_input, integers_only
from bitwright.kernels.triton_layout import by_group, from_groups, pack_rows, row_bytes, unpack_rows, width_of
from bitwright.numerics.affine import live_qparams
from bitwright.numerics.formats import Format
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.spec import QParams, QuantSpec

_LARGEST_K = 65536  # int32 accumulators hold that many products of a byte with a signed byte
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LAYOUT = "rows of 8 to 1 bits, ternary in 1.6"


def _no_integers(weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...]) -> str:
    if reason := integers_only(weight, input, shape):
        return reason
    assert input is not None
    if weight.format.is_table:
        return "needs integer weights"
    if weight.format.qmax > 127:
        return "needs weights that fit a signed byte"
    if input.granularity.kind not in ("tensor", "token"):
        return "needs inputs with scales per tensor or token"
    size = _size(weight, shape)
    if size > _LARGEST_K:
        return f"sums of {size} products may overflow int32"
    return f"groups of {size} are no multiple of 32 inputs" if size < shape[1] and size % 32 else ""


def _not_decodable(weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...]) -> str:
    fmt, size = weight.format, _size(weight, shape)
    if fmt.bits > 8 or not fmt.is_scaled:
        return f"{fmt} is no code of at most 8 bits with a scale"
    return f"groups of {size} are no multiple of 16 inputs" if size < shape[1] and size % 16 else ""


def _size(weight: QuantSpec, shape: tuple[int, ...]) -> int:
    """Inputs of an output that share a scale."""
    return weight.granularity.size if weight.granularity.kind == "group" else shape[1]


def _pack_integers(weight: QTensor, groups: int, input: QuantSpec | None = None) -> Packed:
    scale = by_group(weight.qparams.scale, len(weight.packed))
    sums = weight.codes.unflatten(1, (len(scale), -1)).sum(-1, dtype=torch.int32)
    return Packed(pack_rows(weight), scale, sums=sums.t().contiguous())


def _pack_decoded(weight: QTensor, groups: int, input: QuantSpec | None = None) -> Packed:
    n, (scale, zero_point, codebook) = len(weight.packed), _parts(weight)
    zeros = None if zero_point is None else by_group(zero_point, n)
    return Packed(pack_rows(weight), by_group(scale, n), zeros, codebook=codebook)


def _parts(weight: QTensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scale, zero point and table of a weight; the table of a format that has a constant one included."""
    qparams, fmt = weight.qparams, weight.spec.format
    table = (
        torch.tensor(fmt.codebook, dtype=torch.float32, device=weight.packed.device)
        if fmt.codebook
        else qparams.codebook
    )
    return qparams.scale, qparams.zero_point, table


def _unpacked(packed: Packed, spec: QuantSpec, shape: tuple[int, ...], groups: int) -> Tensor:
    return unpack_rows(packed.layout, spec, shape[1])


def _qparams(packed: Packed, spec: QuantSpec, shape: tuple[int, ...]) -> QParams:
    scale, zeros = (
        None if part is None else from_groups(part, spec, shape) for part in (packed.scale, packed.zero_point)
    )
    assert scale is not None
    return QParams(scale, zeros, packed.codebook if spec.format.fit else None)


def _run_integers(x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation) -> Tensor:
    (spec, qparams), fmt = input, weight.format
    if qparams is None and spec.granularity.kind != "token":
        qparams = live_qparams(x, spec)
    scale, zero_point = (None, None) if qparams is None else (qparams.scale, qparams.zero_point)
    return torch.ops.bitwright.triton_integer_linear(
        x, packed.layout, packed.scale, packed.sums, bias, scale, zero_point, width_of(fmt), fmt.qmin,
        spec.format.qmin, spec.format.qmax, spec.symmetric,
    )  # fmt: skip


def _run_decoded(x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation | None) -> Tensor:
    fmt = weight.format
    return torch.ops.bitwright.triton_decoded_linear(
        decoded_input(x, input), packed.layout, packed.scale, packed.zero_point, packed.codebook, bias,
        width_of(fmt), _kind(fmt), fmt.qmin,
    )  # fmt: skip


def _kind(fmt: Format) -> str:
    return fmt.name if fmt.dtype is not None else "table" if fmt.is_table else "integer"


def _integer_linear(
    x: Tensor, layout: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, x_scale: Tensor | None,
    x_zero: Tensor | None, bits: int, lowest: int, qmin: int, qmax: int, symmetric: bool,
) -> Tensor:  # fmt: skip
    _check(x, layout, bits, {"scale": scale, "sums": sums, "bias": bias, "x_scale": x_scale, "x_zero": x_zero})
    from bitwright.kernels import triton_integer

    y = _integer_shape(x, layout)
    if y.numel():
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if x_scale is not None and x_scale.numel() not in (1, len(rows)):
            raise KernelError(f"linear: {x_scale.numel()} scales of the input do not fit {len(rows)} rows")
        with torch.cuda.device_of(x):
            bounds = triton_integer.Range(qmin, qmax, symmetric)
            encoded = triton_integer.encode(rows, x_scale, x_zero, bounds)
            triton_integer.product(encoded, layout, scale, sums, bias, y.view(len(rows), -1), bits, lowest)
    return y


def _decoded_linear(
    x: Tensor, layout: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None, bias: Tensor | None,
    bits: int, kind: str, lowest: int,
) -> Tensor:  # fmt: skip
    _check(x, layout, bits, {"scale": scale, "zero_point": zero_point, "table": table, "bias": bias})
    from bitwright.kernels import triton_decoded

    y = _decoded_shape(x, layout)
    if y.numel():
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        with torch.cuda.device_of(x):
            y_rows = y.view(len(rows), -1)
            triton_decoded.product(rows, layout, scale, zero_point, table, bias, y_rows, bits, kind, lowest)
    return y


def _integer_shape(x: Tensor, layout: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], layout.shape[0]), dtype=torch.float32)


def _decoded_shape(x: Tensor, layout: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], layout.shape[0]))


def _check(x: Tensor, layout: Tensor, bits: int, others: dict[str, Tensor | None]) -> None:
    """Raise `KernelError` for operands that the kernels would misread."""
    try:
        from bitwright.kernels.triton_codes import interpreted
    except ImportError as cause:
        raise KernelError(
            "linear: this row needs Triton, which is not installed: pip install 'bitwright[gpu]'"
        ) from cause
    if x.device.type != "cuda" and not interpreted():
        raise KernelError(
            f"linear: Triton runs on CUDA devices, x is on {x.device}; move the model and x to one device"
        )
    if x.dtype not in _FLOATS or x.dim() == 0:
        raise KernelError(f"linear: x must be float32, float16 or bfloat16 with at least one dimension, got {x.dtype}")
    if layout.shape[1] != row_bytes(x.shape[-1], bits):
        raise KernelError(f"linear: rows of {layout.shape[1]} bytes do not hold the codes of {x.shape[-1]} inputs")
    for name, tensor in {"weight": layout, **others}.items():
        if tensor is not None and tensor.device != x.device:
            raise KernelError(f"linear: x is on {x.device}, {name} on {tensor.device}; move the model to one device")
        if tensor is not None and name not in ("weight", "sums", "bias") and tensor.dtype is not torch.float32:
            raise KernelError(
                f"linear: {name} must be float32, got {tensor.dtype}; shipped layers move, but keep types"
            )


_KEYS = ("CPU", "CUDA")  # on the CPU the interpreter
register(
    "triton_integer_linear(Tensor x, Tensor layout, Tensor scale, Tensor sums, Tensor? bias, Tensor? x_scale, "
    "Tensor? x_zero, int bits, int lowest, int qmin, int qmax, bool symmetric) -> Tensor",
    _integer_linear,
    _integer_shape,
    _KEYS,
)
register(
    "triton_decoded_linear(Tensor x, Tensor layout, Tensor scale, Tensor? zero_point, Tensor? table, "
    "Tensor? bias, int bits, str kind, int lowest) -> Tensor",
    _decoded_linear,
    _decoded_shape,
    _KEYS,
)

_NEEDS = frozenset({"cuda", "triton"})
INTEGER_ROW = Kernel("linear/triton", "linear", _NEEDS, _LAYOUT, _no_integers, _pack_integers, _run_integers,
                     _unpacked, _qparams)  # fmt: skip
DECODING_ROW = Kernel("linear/decode/triton", "linear", _NEEDS, _LAYOUT, _not_decodable, _pack_decoded, _run_decoded,
                      _unpacked, _qparams)  # fmt: skip
