"""Rows of the kernel table that run in C++: integer products, products with decoded weights, additions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bitwright.kernels import cpu, decoded, grouped, images
from bitwright.kernels.operators import call
from bitwright.kernels.reference import Geometry
from bitwright.kernels.row import (
    Activation,
    Kernel,
    Packed,
    anything,
    decoded_input,
    integers_only,
    pack_codes,
    pack_products,
    product_codes,
)
from bitwright.kernels.unpack import layout_bits, product_bits, unpack_conv, unpack_linear
from bitwright.numerics.affine import live_qparams
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.spec import QParams, QuantSpec

# int32 accumulators hold K products of a byte with a signed byte up to here.
_LARGEST_K = 65536
_ISAS = ("avx512_vnni", "avx2", "neon_i8mm", "neon_dotprod", "portable")


def _native_integers(weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...]) -> str:
    if weight.granularity.kind == "group" and weight.granularity.size < shape[-1]:
        return "needs symmetric weights with one scale per tensor or output"
    reduction = int(torch.Size(shape[1:]).numel())
    if reduction > _LARGEST_K:
        return f"sums of {reduction} products may overflow int32"
    return integers_only(weight, input, shape) or (grouped.SIGNED if grouped.unsigned(weight) else "")


def _offset(input: QuantSpec | None) -> bool:
    """Whether kernels may meet bytes of activations that are not the codes relative to their zero point."""
    return input is None or not input.symmetric or input.format.qmax > 127


def _pack_linear(weight: QTensor, groups: int, input: QuantSpec | None = None) -> Packed:
    codes, bits = product_codes(weight).to(torch.int8), product_bits(weight.spec)
    layout = cpu.pack_linear(codes.contiguous(), bits)
    sums = codes.sum(1, dtype=torch.int32) if bits == 8 or _offset(input) else None
    return Packed(layout, _per_output(weight), sums=sums)


def _unpack_linear(packed: Packed, spec: QuantSpec, shape: tuple[int, ...], groups: int) -> Tensor:
    return pack_products(unpack_linear(packed.layout, product_bits(spec), shape[0], shape[1]), spec)


def _output_qparams(packed: Packed, spec: QuantSpec, shape: tuple[int, ...]) -> QParams:
    scale = packed.scale[:1].clone() if spec.granularity.kind == "tensor" else packed.scale
    return QParams(scale.view(spec.granularity.scale_shape(shape)))


def _pack_conv(weight: QTensor, groups: int, input: QuantSpec | None = None) -> Packed:
    codes = product_codes(weight).to(torch.int8)
    codes = codes.unsqueeze(2) if codes.dim() == 3 else codes
    layout = cpu.pack_conv(codes.contiguous(), product_bits(weight.spec), groups)
    return Packed(layout, _per_output(weight), sums=codes.flatten(1).sum(1, dtype=torch.int32))


def _unpack_conv(packed: Packed, spec: QuantSpec, shape: tuple[int, ...], groups: int) -> Tensor:
    outputs, inputs, height, width = shape if len(shape) == 4 else (*shape[:2], 1, shape[2])
    codes = unpack_conv(packed.layout, product_bits(spec), (outputs, inputs, height, width), groups)
    return pack_products(codes, spec)


def _per_output(weight: QTensor) -> Tensor:
    return weight.qparams.scale.reshape(-1).expand(weight.shape[0]).contiguous()


def _run_native_linear(
    isa: int, x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation
) -> Tensor:
    fmt = input.spec.format
    return call(
        torch.ops.bitwright.linear.default,
        x.float(), packed.layout, packed.scale, packed.sums, bias, *_encoding(x, input),
        product_bits(weight), fmt.qmin, fmt.qmax, isa,
    )  # fmt: skip


def _encoding(x: Tensor, input: Activation) -> tuple[Tensor | None, Tensor | None]:
    """Scale and zero point for the native linear kernels, which find a symmetric scale per token themselves."""
    spec, qparams = input
    live_in_kernel = spec.dynamic and spec.symmetric and spec.granularity.kind == "token"
    if qparams is None and not live_in_kernel:
        qparams = live_qparams(x, spec)
    return (None, None) if qparams is None else (qparams.scale, qparams.zero_point)


def _pack_grouped(weight: QTensor, groups: int, input: QuantSpec | None = None) -> Packed:
    layout, scale, sums = grouped.pack(weight, _offset(input))
    outputs = torch.empty(weight.shape[0], 0)  # no values: its shape says what padding hides
    return Packed(layout, scale, sums=sums, codebook=outputs)


def _unpack_grouped(packed: Packed, spec: QuantSpec, shape: tuple[int, ...], groups: int) -> Tensor:
    return pack_products(unpack_linear(packed.layout, grouped.layout_bits(spec), shape[0], shape[1]), spec)


def _group_qparams(packed: Packed, spec: QuantSpec, shape: tuple[int, ...]) -> QParams:
    return QParams(grouped.from_lanes(packed.scale, shape[0]))


def _run_grouped(
    isa: int, x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation
) -> Tensor:
    assert packed.codebook is not None
    fmt = input.spec.format
    return call(
        torch.ops.bitwright.grouped_linear.default,
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
    return call(
        torch.ops.bitwright.conv2d.default,
        x.float(), packed.layout, packed.scale, packed.sums, bias, qparams.scale, qparams.zero_point,
        g.kernel_size, g.stride, g.padding, g.dilation, g.groups, product_bits(weight), spec.format.qmin,
        spec.format.qmax, isa,
    )  # fmt: skip


def _decodable(weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...]) -> str:
    return decoded.refuses(weight, shape)


def _pack_decoded(weight: QTensor, groups: int, input: QuantSpec | None = None) -> Packed:
    layout, codebook, scale, zero_point = decoded.pack(weight)
    outputs = torch.empty(weight.shape[0], 0)  # no values: its shape says what padding hides
    return Packed(layout, scale, zero_point, outputs, codebook)


def _decoded_weight(packed: Packed) -> decoded.DecodedWeight:
    assert packed.codebook is not None
    return decoded.DecodedWeight(packed.layout, packed.codebook, packed.scale, packed.zero_point)


def _unpack_decoded(packed: Packed, spec: QuantSpec, shape: tuple[int, ...], groups: int) -> Tensor:
    return decoded.unpack(_decoded_weight(packed), spec, shape)


def _decoded_qparams(packed: Packed, spec: QuantSpec, shape: tuple[int, ...]) -> QParams:
    return decoded.qparams(_decoded_weight(packed), spec, shape)


def _run_decoded(
    isa: int, x: Tensor, packed: Packed, weight: QuantSpec, bias: Tensor | None, input: Activation | None
) -> Tensor:
    assert packed.sums is not None
    return call(
        torch.ops.bitwright.decoded_linear.default,
        decoded_input(x, input).float(), packed.layout, packed.codebook, packed.scale, packed.zero_point, bias,
        packed.sums.shape[0], weight.granularity.size, layout_bits(weight), isa,
    )  # fmt: skip


def _native_add(a: Tensor, b: Tensor, left: Activation, right: Activation) -> Tensor:
    (spec_a, params_a), (spec_b, params_b) = left, right
    assert params_a is not None
    assert params_b is not None
    return call(
        torch.ops.bitwright.add.default,
        a.float(), b.float(), params_a.scale, params_a.zero_point, params_b.scale, params_b.zero_point,
        (spec_a.format.qmin, spec_a.format.qmax), (spec_b.format.qmin, spec_b.format.qmax),
    )  # fmt: skip


def _native_rows(isa: str) -> list[Kernel]:
    needs = frozenset({"native"} if isa == "portable" else {"native", isa})
    number = cpu.ISA[isa]
    return [
        Kernel(f"linear/{isa}", "linear", needs, "16-row blocks of 8, 4, 3 or 2 bits", _native_integers,
               _pack_linear, partial(_run_native_linear, number), _unpack_linear, _output_qparams),
        Kernel(f"linear/groups/{isa}", "linear", needs, "16-row blocks of 8, 4, 3 or 2 bits", grouped.refuses,
               _pack_grouped, partial(_run_grouped, number), _unpack_grouped, _group_qparams),
        Kernel(f"conv/{isa}", "conv", needs, "16-row blocks of 8, 4, 3 or 2 bits", _native_integers,
               _pack_conv, partial(_run_native_conv, number), _unpack_conv, _output_qparams,
               run_images=partial(images.convolve, number)),
    ]  # fmt: skip


def _decoding_row(isa: str) -> Kernel:
    """Comes behind the integer rows: for float activations, groups and tables."""
    needs = frozenset({"native"} if isa == "portable" else {"native", isa})
    layout = "16-row blocks of 8, 4, 3 or 2 bits"
    return Kernel(f"linear/decode/{isa}", "linear", needs, layout, _decodable, _pack_decoded,
                  partial(_run_decoded, cpu.ISA[isa]), _unpack_decoded, _decoded_qparams)  # fmt: skip


INTEGER_ROWS = tuple(row for isa in _ISAS for row in _native_rows(isa))
DECODING_ROWS = tuple(_decoding_row(isa) for isa in _ISAS)
ADD_ROW = Kernel(
    "add/native", "add", frozenset({"native"}), "", anything, pack_codes, _native_add, run_images=images.add
)
