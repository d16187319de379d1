"""The kernel table: which function computes an operator for a pair of specs on a machine.

Rows are tried in order and the first that serves is taken, so the choice is a pure function of operator, specs, shape
and CPU features. Every row lays out its own weights once (`pack`) and must equal the reference row bit for bit where
both operands are integers (contract C2); rows with float operands keep the codes exact (contract C3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bitwright.errors import KernelError
from bitwright.kernels import cpu, decoded, grouped, reference
from bitwright.kernels.reference import Codes, Geometry, codes_of, largest_code, not_integers, row_qparams
from bitwright.numerics.affine import decode, live_qparams, simulate
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.spec import QParams, QuantSpec

# int32 accumulators hold K products of a byte with a signed byte up to here.
_LARGEST_K = 65536
Product = Callable[..., Tensor]


class Packed(NamedTuple):
    """Constants of one layer in a row's own layout: codes, scales; zero points, sums of codes, a table where needed."""

    layout: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    sums: Tensor | None = None
    codebook: Tensor | None = None


class Activation(NamedTuple):
    """How a layer's input is encoded; ``qparams`` is None for dynamic specs."""

    spec: QuantSpec
    qparams: QParams | None


@dataclass(frozen=True, slots=True)
class Kernel:
    """One row: ``refuses`` says why it cannot serve a pair of specs (empty = it can), ``requires`` CPU features."""

    name: str
    op: str
    requires: frozenset[str]
    layout: str
    refuses: Callable[[QuantSpec, QuantSpec | None, tuple[int, ...]], str]
    pack: Callable[[QTensor, int], Packed]
    run: Callable[..., Tensor]


def _integers_only(weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...]) -> str:
    if weight.granularity.kind == "group" and len(shape) != 2:
        return "groups need a 2-d weight"
    return not_integers(weight, input)


def _native_integers(weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...]) -> str:
    if weight.granularity.kind == "group" and weight.granularity.size < shape[-1]:
        return "needs symmetric weights with one scale per tensor or output"
    reduction = int(torch.Size(shape[1:]).numel())
    if reduction > _LARGEST_K:
        return f"sums of {reduction} products may overflow int32"
    return _integers_only(weight, input, shape)


def _anything(weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...]) -> str:
    return ""


def _layout_bits(spec: QuantSpec) -> int:
    """Width of the native layout that holds a format's codes: 8, 4 or 2 bits."""
    return next(bits for bits in (2, 4, 8) if bits >= spec.format.bits)


def _pack_linear(weight: QTensor, groups: int) -> Packed:
    codes = weight.codes.to(torch.int8)
    layout = cpu.pack_linear(codes.contiguous(), _layout_bits(weight.spec))
    return Packed(layout, _per_output(weight), sums=codes.sum(1, dtype=torch.int32))


def _pack_conv(weight: QTensor, groups: int) -> Packed:
    codes = weight.codes.to(torch.int8)
    codes = codes.unsqueeze(2) if codes.dim() == 3 else codes
    layout = cpu.pack_conv(codes.contiguous(), groups)
    return Packed(layout, _per_output(weight), sums=codes.flatten(1).sum(1, dtype=torch.int32))


def _per_output(weight: QTensor) -> Tensor:
    return weight.qparams.scale.reshape(-1).expand(weight.shape[0]).contiguous()


def _run_native_linear(
    isa: int, x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation
) -> Tensor:
    fmt = input.spec.format
    return torch.ops.bitwright.linear(
        x.float(), packed.layout, packed.scale, packed.sums, bias, *_encoding(x, input),
        _layout_bits(weight), fmt.qmin, fmt.qmax, isa,
    )  # fmt: skip


def _encoding(x: Tensor, input: Activation) -> tuple[Tensor | None, Tensor | None]:
    """Scale and zero point for the native linear kernels, which find a symmetric scale per token themselves."""
    spec, qparams = input
    live_in_kernel = spec.dynamic and spec.symmetric and spec.granularity.kind == "token"
    if qparams is None and not live_in_kernel:
        qparams = live_qparams(x, spec)
    return (None, None) if qparams is None else (qparams.scale, qparams.zero_point)


def _pack_grouped(weight: QTensor, groups: int) -> Packed:
    layout, scale, sums = grouped.pack(weight)
    outputs = torch.empty(weight.shape[0], 0)  # no values: its shape says what padding hides
    return Packed(layout, scale, sums=sums, codebook=outputs)


def _run_grouped(
    isa: int, x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation
) -> Tensor:
    assert packed.codebook is not None
    fmt = input.spec.format
    return torch.ops.bitwright.grouped_linear(
        x.float(), packed.layout, packed.scale, packed.sums, bias, *_encoding(x, input), packed.codebook.shape[0],
        weight.granularity.size, grouped.layout_bits(weight), fmt.qmin, fmt.qmax, isa,
    )  # fmt: skip


def _run_native_conv(
    isa: int,
    x: Tensor,
    packed: Packed,
    weight: QuantSpec,
    bias: Tensor | None,
    input: Activation,
    g: Geometry,
) -> Tensor:
    spec, qparams = input
    qparams = live_qparams(x, spec) if qparams is None else qparams
    return torch.ops.bitwright.conv2d(
        x.float(), packed.layout, packed.scale, packed.sums, bias, qparams.scale, qparams.zero_point,
        g.kernel_size, g.stride, g.padding, g.dilation, g.groups, spec.format.qmin, spec.format.qmax, isa,
    )  # fmt: skip


def _pack_codes(weight: QTensor, groups: int) -> Packed:
    """One byte per code (two for 16 bits, four for uint16, which few operators of torch take); float32 scales."""
    fmt, qparams = weight.spec.format, weight.qparams
    dtype = fmt.dtype or (torch.int8 if fmt.qmin < 0 else torch.uint8)
    if fmt.is_integer and fmt.bits > 8:
        dtype = torch.int16 if fmt.qmin < 0 else torch.int32
    return Packed(weight.codes.to(dtype), qparams.scale, qparams.zero_point, codebook=qparams.codebook)


def _decodable(weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...]) -> str:
    return decoded.refuses(weight, shape)


def _pack_decoded(weight: QTensor, groups: int) -> Packed:
    layout, codebook, scale, zero_point = decoded.pack(weight)
    outputs = torch.empty(weight.shape[0], 0)  # no values: its shape says what padding hides
    return Packed(layout, scale, zero_point, outputs, codebook)


def _run_decoded(
    isa: int, x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation | None
) -> Tensor:
    assert packed.sums is not None
    return torch.ops.bitwright.decoded_linear(
        decoded_input(x, input).float(), packed.layout, packed.codebook, packed.scale, packed.zero_point, bias,
        packed.sums.shape[0], weight.granularity.size, decoded.layout_bits(weight), isa,
    )  # fmt: skip


def _integer_weight(packed: Packed, weight: QuantSpec) -> Codes:
    return Codes(packed.layout.float(), packed.scale, largest_code(weight))


def _decoded_weight(packed: Packed, weight: QuantSpec) -> Tensor:
    return decode(packed.layout, weight, QParams(packed.scale, packed.zero_point, packed.codebook))


def decoded_input(x: Tensor, input: Activation | None) -> Tensor:
    """The values of an input's codes, for products that are computed in float; ``x`` itself for float inputs."""
    if input is None:
        return x
    if input.qparams is not None:
        return simulate(x, input.spec, input.qparams)
    codes = codes_of(x, *input)
    return codes.values * codes.scale


def _integer_linear(x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation) -> Tensor:
    return reference.linear(codes_of(x, *input), _integer_weight(packed, weight), bias)


def _decoding_linear(
    x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation | None
) -> Tensor:
    return F.linear(decoded_input(x, input), _decoded_weight(packed, weight), bias)


def _integer_conv(
    x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation, geometry: Geometry
) -> Tensor:
    filters = _as_2d(_integer_weight(packed, weight).values)
    codes = _integer_weight(packed, weight)._replace(values=filters)
    return reference.conv2d(codes_of(x, *input), codes, bias, geometry)


def _decoding_conv(
    x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation | None, g: Geometry
) -> Tensor:
    filters = _as_2d(_decoded_weight(packed, weight))
    return F.conv2d(decoded_input(x, input), filters, bias, g.stride, g.padding, g.dilation, g.groups)


def _integer_volume(
    run: Product, x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation, *g: object
) -> Tensor:
    return run(codes_of(x, *input), _integer_weight(packed, weight), bias, *g)


def _decoding_volume(
    run: Product, x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, by: Activation | None, *g: object
) -> Tensor:
    return run(decoded_input(x, by), _decoded_weight(packed, weight), bias, *g)


def _as_2d(filters: Tensor) -> Tensor:
    return filters.unsqueeze(2) if filters.dim() == 3 else filters


def _gather(ids: Tensor, packed: Packed, weight: QuantSpec) -> Tensor:
    qparams = row_qparams(QParams(packed.scale, packed.zero_point, packed.codebook), weight, ids.flatten())
    rows = F.embedding(ids.flatten(), packed.layout)
    return decode(rows, weight, qparams).view(*ids.shape, packed.layout.shape[1])


def _reference_add(a: Tensor, b: Tensor, left: Activation, right: Activation) -> Tensor:
    return reference.add(codes_of(a, *left), codes_of(b, *right))


def _native_add(a: Tensor, b: Tensor, left: Activation, right: Activation) -> Tensor:
    (spec_a, params_a), (spec_b, params_b) = left, right
    assert params_a is not None
    assert params_b is not None
    return torch.ops.bitwright.add(
        a.float(), b.float(), params_a.scale, params_a.zero_point, params_b.scale, params_b.zero_point,
        (spec_a.format.qmin, spec_a.format.qmax), (spec_b.format.qmin, spec_b.format.qmax),
    )  # fmt: skip


def _reference_matmul(a: Tensor, b: Tensor, left: Activation, right: Activation) -> Tensor:
    return reference.matmul(codes_of(a, *left), codes_of(b, *right))


def _native_rows(isa: str) -> list[Kernel]:
    needs = frozenset({"native"} if isa == "portable" else {"native", isa})
    number = cpu.ISA[isa]
    return [
        Kernel(f"linear/{isa}", "linear", needs, "16-row blocks of 8, 4 or 2 bits", _native_integers,
               _pack_linear, partial(_run_native_linear, number)),
        Kernel(f"linear/groups/{isa}", "linear", needs, "16-row blocks of 8, 4, 3 or 2 bits", grouped.refuses,
               _pack_grouped, partial(_run_grouped, number)),
        Kernel(f"conv/{isa}", "conv", needs, "16-row blocks of 8 bits", _native_integers,
               _pack_conv, partial(_run_native_conv, number)),
    ]  # fmt: skip


def _decoding_row(isa: str) -> Kernel:
    """Comes behind the integer rows: for float activations, groups and tables."""
    needs = frozenset({"native"} if isa == "portable" else {"native", isa})
    layout = "16-row blocks of 8, 4, 3 or 2 bits"
    return Kernel(f"linear/decode/{isa}", "linear", needs, layout, _decodable, _pack_decoded,
                  partial(_run_decoded, cpu.ISA[isa]))  # fmt: skip


_NONE: frozenset[str] = frozenset()


def _volume_rows(op: str, integer: Product, decoding: Product) -> tuple[Kernel, Kernel]:
    code, exact, loose = "one byte per code", partial(_integer_volume, integer), partial(_decoding_volume, decoding)
    row = Kernel(f"{op}/reference", op, _NONE, code, _integers_only, _pack_codes, exact)
    return row, Kernel(f"{op}/decode", op, _NONE, code, _anything, _pack_codes, loose)


KERNELS: tuple[Kernel, ...] = (
    *(row for isa in ("avx512_vnni", "avx2", "portable") for row in _native_rows(isa)),
    Kernel("linear/reference", "linear", _NONE, "one byte per code", _integers_only, _pack_codes, _integer_linear),
    Kernel("conv/reference", "conv", _NONE, "one byte per code", _integers_only, _pack_codes, _integer_conv),
    *_volume_rows("conv3d", reference.conv3d, reference.float_conv3d),
    *_volume_rows("conv_transpose", reference.conv_transpose, reference.float_conv_transpose),
    *(_decoding_row(isa) for isa in ("avx512_vnni", "avx2", "portable")),
    Kernel("linear/decode", "linear", _NONE, "one byte per code", _anything, _pack_codes, _decoding_linear),
    Kernel("conv/decode", "conv", _NONE, "one byte per code", _anything, _pack_codes, _decoding_conv),
    Kernel("embedding/gather", "embedding", _NONE, "one byte per code", _anything, _pack_codes, _gather),
    Kernel("add/native", "add", frozenset({"native"}), "", _anything, _pack_codes, _native_add),
    Kernel("add/reference", "add", _NONE, "", _anything, _pack_codes, _reference_add),
    Kernel("matmul/reference", "matmul", _NONE, "", _anything, _pack_codes, _reference_matmul),
)


def select(
    op: str, weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...], features: frozenset[str]
) -> Kernel:
    """The first row that serves an operator with these specs and weight shape on a CPU with these features.

    >>> int8, uint8 = QuantSpec.parse("int8/channel"), QuantSpec.parse("uint8/asym")
    >>> select("linear", int8, uint8, (8, 16), frozenset()).name
    'linear/reference'
    """
    for kernel in KERNELS:
        if not _why_not(kernel, op, weight, input, shape, features):
            return kernel
    raise KernelError(f"no kernel for {op} with weight {weight} and input {input or 'float'}")


def explain(
    op: str, weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...], features: frozenset[str]
) -> list[tuple[str, str]]:
    """Every row of an operator with the reason why it cannot serve, or why it is (not) taken."""
    chosen = select(op, weight, input, shape, features)
    reasons = []
    for kernel in (row for row in KERNELS if row.op == op):
        reason = _why_not(kernel, op, weight, input, shape, features)
        reasons.append((kernel.name, reason or ("taken" if kernel is chosen else f"comes after {chosen.name}")))
    return reasons


def _why_not(
    kernel: Kernel,
    op: str,
    weight: QuantSpec,
    input: QuantSpec | None,
    shape: tuple[int, ...],
    features: frozenset[str],
) -> str:
    if kernel.op != op:
        return f"computes {kernel.op}"
    if missing := kernel.requires - features:
        return f"needs {', '.join(sorted(missing))}"
    return kernel.refuses(weight, input, shape)
