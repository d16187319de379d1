"""Native products of float activations with weights that are decoded on the way: ``bitwright::decoded_linear``.

The weight stays packed; a code becomes a value in a register, by a table of 16 entries (integers, ternary, NF4, FP4,
powers of two and fitted tables alike) or, at 8 bits, by conversion. Values are exact; sums are float32 sums in an
order of their own (contract C3). Many rows share the work of decoding: then panels of weights are decoded to float32
and multiplied by torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bitwright.errors import KernelError
from bitwright.kernels import cpu
from bitwright.kernels.grouped import LANES, from_lanes, lanes
from bitwright.kernels.operators import address, register
from bitwright.kernels.unpack import layout_bits, unpack_decoded
from bitwright.numerics.qtensor import QTensor, pack_rows
from bitwright.numerics.spec import QParams, QuantSpec

_FEW_ROWS = 64  # more rows of activations than these are multiplied by panels
_PANEL_BYTES = 8 << 20


class DecodedWeight(NamedTuple):
    """A weight as the kernel reads it: codes, table, scales and zero points ``[blocks, groups, 16]``."""

    layout: Tensor
    table: Tensor
    scales: Tensor
    zeros: Tensor | None


def refuses(spec: QuantSpec, shape: tuple[int, ...]) -> str:
    """Why the kernel cannot decode weights of this spec and shape; empty where it can.

    >>> refuses(QuantSpec.parse("int4/group32"), (8, 64)), refuses(QuantSpec.parse("fp16"), (8, 64))
    ('', 'fp16 is no code of at most 8 bits with a scale')
    """
    fmt, bits = spec.format, layout_bits(spec) if spec.format.bits <= 8 else 0
    if not bits or fmt.dtype is not None or (bits == 8 and not fmt.is_integer):
        return f"{fmt} is no code of at most 8 bits with a scale"
    if fmt.fit and spec.granularity.kind == "channel":
        return "a table per channel is not kept in registers"
    inputs = 32 if bits == 3 else 32 // bits
    if spec.granularity.size % inputs:
        return f"groups of {spec.granularity.size} are no multiple of {inputs} inputs"
    return ""


def pack(weight: QTensor) -> DecodedWeight:
    """Lay out a weight ``[n, k]`` that `refuses` accepts."""
    spec, qparams = weight.spec, weight.qparams
    fmt, bits, (n, k) = spec.format, layout_bits(spec), weight.shape
    codes, shift = weight.codes.to(torch.int16), _shift(spec)
    if bits == 8:
        stored = (codes - int(shift)).to(torch.int8).view(torch.uint8)
        table = torch.zeros(16)
    else:
        stored = (codes - (fmt.qmin if fmt.is_integer else 0)).to(torch.uint8)
        table = _table(spec, qparams.codebook)
    layout = torch.empty(cpu.native.decoded_layout_bytes(bits, n, k), dtype=torch.uint8)
    stored = stored.contiguous()
    cpu.native.pack_decoded(stored.data_ptr(), bits, n, k, layout.data_ptr())
    zero_point = qparams.zero_point
    if zero_point is None and shift:
        zero_point = torch.zeros_like(qparams.scale)
    zeros = None if zero_point is None else _lanes(zero_point - shift, n)
    return DecodedWeight(layout, table, _lanes(qparams.scale, n), zeros)


def unpack(weight: DecodedWeight, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    """The packed bytes (`numerics.packing`) of a weight that `pack` laid out."""
    bits, fmt = layout_bits(spec), spec.format
    codes = unpack_decoded(weight.layout, bits, shape[0], shape[1])
    if bits == 8:
        return pack_rows(codes.view(torch.int8).to(torch.int16) + int(_shift(spec)), spec)
    return pack_rows(codes.to(torch.int16) + fmt.qmin if fmt.is_integer else codes, spec)


def qparams(weight: DecodedWeight, spec: QuantSpec, shape: tuple[int, ...]) -> QParams:
    """Scale, zero point and fitted table of a weight that `pack` laid out."""
    scale_shape, zeros = spec.granularity.scale_shape(shape), None if spec.symmetric else weight.zeros

    def stored(values: Tensor) -> Tensor:
        rows = from_lanes(values, shape[0])
        return (rows[0] if spec.granularity.kind == "tensor" else rows).reshape(scale_shape)

    table = weight.table[: spec.format.qmax + 1] if spec.format.fit else None
    return QParams(stored(weight.scales), None if zeros is None else stored(zeros) + _shift(spec), table)


def _shift(spec: QuantSpec) -> float:
    """What is taken off codes of 8 bits, which are stored as signed bytes, whatever the format."""
    return 128.0 if layout_bits(spec) == 8 and spec.format.qmax > 127 else 0.0


def _table(spec: QuantSpec, codebook: Tensor | None) -> Tensor:
    fmt = spec.format
    if fmt.is_integer:
        values = torch.arange(fmt.qmin, fmt.qmax + 1, dtype=torch.float32)
    else:
        values = torch.tensor(fmt.codebook, dtype=torch.float32) if codebook is None else codebook.flatten().float()
    width = 1 << layout_bits(spec)
    values = F.pad(values, (0, width - len(values)))
    return values.repeat(16 // width).contiguous()


def _lanes(values: Tensor, n: int) -> Tensor:
    """One value per tensor, row, or row and group, as ``[blocks, groups, 16]``, padded with 0."""
    rows = values.reshape(-1, 1).expand(n, 1) if values.numel() in (1, n) else values.reshape(n, -1)
    return lanes(rows.float())


def _decoded_linear(
    x: Tensor, layout: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None,
    outputs: int, group_size: int, bits: int, isa: int,
) -> Tensor:  # fmt: skip
    if x.dtype is not torch.float32 or x.dim() == 0:
        raise KernelError(f"decoded_linear: x must be float32 with at least one dimension, got {x.dtype}")
    x, k = x.contiguous(), x.shape[-1]
    y = torch.empty((*x.shape[:-1], outputs))
    weight = DecodedWeight(layout, table, scales, zeros)
    try:
        _check_weight(weight, bias, (outputs, k, group_size, bits))
    except ValueError as error:
        raise KernelError(f"decoded_linear: {error}") from error
    m = y.numel() // outputs if outputs else 0
    if m > _FEW_ROWS and k:
        return _by_panels(x, weight, bias, y, (group_size or k, bits, isa))
    try:
        cpu.native.decoded_linear(
            isa, bits, x.data_ptr(), m, k, outputs, group_size or max(k, 1),
            layout.data_ptr(), table.data_ptr(), scales.data_ptr(), address(zeros), address(bias), y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    except ValueError as error:
        raise KernelError(f"decoded_linear: {error}") from error
    return y


def _check_weight(weight: DecodedWeight, bias: Tensor | None, sizes: tuple[int, int, int, int]) -> None:
    n, k, group_size, bits = sizes
    if group_size < 0 or (group_size and k % group_size):
        raise KernelError(f"decoded_linear: groups of {group_size} do not divide {k} inputs")
    if not cpu.fills(weight.layout, torch.uint8, cpu.native.decoded_layout_bytes(bits, n, k)):
        raise KernelError(f"decoded_linear: {weight.layout.numel()} bytes of weights do not fit {n} x {k} codes")
    count = -(-n // LANES) * max(k // group_size if group_size else 1, 1) * LANES
    constants = [(weight.table, 16), (weight.scales, count), (weight.zeros, count), (bias, n)]
    if not all(part is None or cpu.fills(part, torch.float32, size) for part, size in constants):
        raise KernelError(f"decoded_linear: table, scales, zeros or bias do not fit {n} x {k} codes")


def _by_panels(
    x: Tensor, weight: DecodedWeight, bias: Tensor | None, y: Tensor, options: tuple[int, int, int]
) -> Tensor:
    """The product by panels of decoded outputs, which stay in the last-level cache."""
    (group_size, bits, isa), k, n = options, x.shape[-1], y.shape[-1]
    unit = 32 if bits == 3 else 32 // bits
    padded, blocks = k + -k % unit, -(-n // LANES)
    width = max(4, _PANEL_BYTES // (4 * LANES * padded))
    panel, rows, out = torch.empty(padded, LANES * min(width, blocks)), x.view(-1, k), y.view(-1, n)
    for begin in range(0, blocks, width):
        end = min(begin + width, blocks)
        try:
            cpu.native.decode_panel(
                isa, bits, k, n, group_size, weight.layout.data_ptr(), weight.table.data_ptr(),
                weight.scales.data_ptr(), address(weight.zeros), begin, end, panel.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
        except ValueError as error:
            raise KernelError(f"decoded_linear: {error}") from error
        part = out[:, begin * LANES : end * LANES]
        values = panel.view(-1)[: padded * LANES * (end - begin)].view(padded, -1)[:k, : part.shape[1]]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            torch.mm(rows, values, out=part)
    return y if bias is None else y.add_(bias)


register(
    "decoded_linear(Tensor x, Tensor layout, Tensor table, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int outputs, int group_size, int bits, int isa) -> Tensor",
    _decoded_linear,
    lambda x, *rest: x.new_empty((*x.shape[:-1], rest[5])),
)
