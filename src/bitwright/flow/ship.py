"""The shipped form of each simulated module: a table that `convert` reads.

Adding a module: write its function here (or in a file beside this one) and add a row to `SHIPPED`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.graph.multihead import SIDES, Side
from bitwright.kernels.recurrent import recurrence_of
from bitwright.kernels.row import Activation
from bitwright.lowbit.attention import LowbitAttention, LowbitCat, LowbitMatMul
from bitwright.lowbit.conv import LowbitConv
from bitwright.lowbit.conv3d import LowbitConv3d
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.embedding import LowbitEmbedding, LowbitEmbeddingBag
from bitwright.lowbit.experts import LowbitExperts
from bitwright.lowbit.linear import LowbitLinear
from bitwright.lowbit.multihead import LowbitMultiheadAttention
from bitwright.lowbit.recurrent import LowbitGRU, LowbitLSTM
from bitwright.lowbit.transposed import LowbitConvTranspose
from bitwright.nn.attention import QAttention, QMatMul
from bitwright.nn.conv import geometry_of, prepad_of
from bitwright.nn.elementwise import QAdd, QCat
from bitwright.nn.embedding import bags_of
from bitwright.nn.experts import PAIRS, QExperts
from bitwright.nn.layer import QLayer, Simulated
from bitwright.nn.library import QInOutLinear
from bitwright.nn.multihead import QMultiheadAttention, bias_of, rows_of, weight_slot
from bitwright.nn.quantizer import Quantizer
from bitwright.nn.recurrent import QRecurrent
from bitwright.nn.transposed import geometry_of as geometry_of_transposed
from bitwright.numerics.affine import encode
from bitwright.numerics.qtensor import QTensor, pack_rows, quantize_scale
from bitwright.numerics.spec import QParams
from bitwright.plan.site import PRODUCTS

Features = frozenset[str]
_Key = tuple[int, int]


class PackedOnce:
    """Packed weights by identity of parameter and quantizer, so that tied weights are packed once.

    Kept are those of the parameters that several modules own, and the last one: the rest need not wait in memory.
    """

    def __init__(self, tied: frozenset[int]) -> None:
        self._tied = tied
        self._kept: dict[_Key, QTensor] = {}

    def get(self, weight: Tensor, quantizer: Quantizer, make: Callable[[], QTensor]) -> QTensor:
        """The packed weight of a parameter; ``make`` packs it."""
        key = (id(weight), id(quantizer))
        if key not in self._kept:
            self._kept = {other: kept for other, kept in self._kept.items() if other[0] in self._tied}
            self._kept[key] = make()
        return self._kept[key]


def activation(quantizer: Quantizer | None) -> Activation | None:
    """How a shipped module encodes an input; None for float inputs."""
    if quantizer is None:
        return None
    qparams = quantizer.qparams
    if qparams is not None:
        zero_point = qparams.zero_point
        qparams = QParams(qparams.scale.detach().clone(), None if zero_point is None else zero_point.clone())
    return Activation(quantizer.spec, qparams)


@torch.no_grad()
def pack_weight(weight: Tensor, quantizer: Quantizer) -> QTensor:
    """A float weight as it is stored: its codes, packed, with the quantizer's scale, zero point and table."""
    raw, qparams, spec = quantizer.raw_qparams, quantizer.qparams, quantizer.spec
    assert raw is not None
    assert qparams is not None
    scale = qparams.scale.clone() if spec.scale is None else quantize_scale(raw.scale, spec)
    zero_point, codebook = (None if part is None else part.clone() for part in (raw.zero_point, raw.codebook))
    packed = pack_rows(encode(weight, spec, qparams), spec)
    return QTensor(packed, scale, zero_point, spec, tuple(weight.shape), codebook)


def pack_once(weight: Tensor, quantizer: Quantizer, packed: PackedOnce) -> QTensor:
    """`pack_weight`, once per parameter and quantizer."""
    return packed.get(weight, quantizer, lambda: pack_weight(weight, quantizer))


@torch.no_grad()
def _weight(layer: QLayer, packed: PackedOnce) -> tuple[QTensor, Tensor | None]:
    """A layer's weight as stored, with its batch norm folded in, and its float bias."""
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    weight, bias = layer.folded()
    if layer.norm:  # folded into this layer alone
        return pack_weight(weight, quantizer), layer.on_grid(bias)
    return packed.get(layer.weight, quantizer, lambda: pack_weight(weight, quantizer)), layer.on_grid(bias)


def _linear(module: Any, features: Features, packed: PackedOnce) -> nn.Module:
    return LowbitLinear(*_weight(module, packed), activation(module.input_quantizer), features)


def _embedding(module: Any, features: Features, packed: PackedOnce) -> nn.Module:
    return LowbitEmbedding(_weight(module, packed)[0], None, None, features)


def _conv(module: Any, features: Features, packed: PackedOnce) -> nn.Module:
    weight, bias = _weight(module, packed)
    input = activation(module.input_quantizer)
    return LowbitConv(weight, bias, input, features, geometry_of(module), prepad_of(module))


def _conv3d(module: Any, features: Features, packed: PackedOnce) -> nn.Module:
    weight, bias = _weight(module, packed)
    input = activation(module.input_quantizer)
    return LowbitConv3d(weight, bias, input, features, geometry_of(module), prepad_of(module))


def _conv_transpose(module: Any, features: Features, packed: PackedOnce) -> nn.Module:
    weight, bias = _weight(module, packed)
    input, geometry = activation(module.input_quantizer), geometry_of_transposed(module)
    return LowbitConvTranspose(weight, bias, input, features, geometry, tuple(module.output_padding))


def _embedding_bag(module: Any, features: Features, packed: PackedOnce) -> nn.Module:
    return LowbitEmbeddingBag(_weight(module, packed)[0], features, bags_of(module))


def _add(module: QAdd, features: Features, packed: PackedOnce) -> nn.Module:
    left, right = activation(module.input_0_quantizer), activation(module.input_1_quantizer)
    assert left is not None
    assert right is not None
    return LowbitAdd((left, right), features)


def _operands(module: Simulated, op: str) -> dict[str, Activation | None]:
    slots = [slot for product in PRODUCTS[op](module) for slot in product.inputs]
    return {slot: activation(module.quantizer(slot)) for slot in slots}


def _matmul(module: QMatMul, features: Features, packed: PackedOnce) -> nn.Module:
    return LowbitMatMul(_operands(module, "matmul"), features)


def _cat(module: QCat, features: Features, packed: PackedOnce) -> nn.Module:
    return LowbitCat(_operands(module, "cat"))


def _attention(module: QAttention, features: Features, packed: PackedOnce) -> nn.Module:
    return LowbitAttention(_operands(module, "attention"), features)


def _multihead(module: QMultiheadAttention, features: Features, packed: PackedOnce) -> nn.Module:
    parts: dict[Side, tuple[str, nn.Module]] = {}
    for side in SIDES:
        slot, rows, bias = weight_slot(module, side), rows_of(module, side), bias_of(module, side)
        weight, quantizer = module.get_parameter(slot), module.quantizer(slot)
        if quantizer is None:
            parts[side] = slot, _float_linear(weight.detach()[rows], bias)
        else:
            some = take_rows(pack_once(weight, quantizer, packed), rows)
            parts[side] = slot, LowbitLinear(some, bias, activation(module.quantizer(side)), features)
    return LowbitMultiheadAttention(module, parts)


def _experts(module: Any, features: Features, packed: PackedOnce) -> nn.Module:
    parts: dict[str, list[nn.Module]] = {slot: [] for slot, _ in PAIRS}
    for slot, input in PAIRS:
        weight, quantizer = module.get_parameter(slot).detach(), module.quantizer(slot)
        whole = None if quantizer is None else pack_weight(module.as_rows(weight), quantizer)
        for expert, matrix in enumerate(weight):
            if whole is None:
                parts[slot].append(_float_linear(matrix, None))
            else:
                rows = take_rows(whole, slice(expert * len(matrix), (expert + 1) * len(matrix)))
                parts[slot].append(LowbitLinear(rows, None, activation(module.quantizer(input)), features))
    return LowbitExperts(parts["gate_up_proj"], parts["down_proj"], module.act_fn)


def take_rows(weight: QTensor, rows: slice) -> QTensor:
    """Some rows of a packed matrix, with their scales, zero points and tables."""
    count, whole = weight.shape[0], weight.spec.granularity.kind == "tensor"
    start, stop, _ = rows.indices(count)

    def some(part: Any) -> Any:
        if isinstance(part, QTensor):
            each = part.shape[1] // count
            return part if whole else _take_scales(part, start * each, stop * each)
        per_row = isinstance(part, Tensor) and part.shape[0] == count and part.dim() > 1
        return part[rows].clone() if per_row else part

    packed = weight.packed[rows].clone()
    shape = (packed.shape[0], *weight.shape[1:])
    return QTensor(packed, some(weight.scale), some(weight.zero_point), weight.spec, shape, some(weight.codebook))


def _take_scales(scale: QTensor, start: int, stop: int) -> QTensor:
    """Some of the scales of a matrix, which are stored as one row; groups of them are never cut (`plan.validate`)."""
    spec, codes, step, zero_point = scale.spec, scale.codes[:, start:stop], scale.qparams.scale, scale.zero_point
    if spec.granularity.kind == "group":
        groups = slice(start // spec.granularity.size, stop // spec.granularity.size)
        step, zero_point = step[:, groups].clone(), None if zero_point is None else zero_point[:, groups].clone()
    return QTensor(pack_rows(codes, spec), step, zero_point, spec, tuple(codes.shape))


def _float_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
    return linear


def _recurrent(module: QRecurrent, features: Features, packed: PackedOnce) -> nn.Module:
    parts = {
        slot: part_of(module, slot, module.bias_of(slot), activation(module.quantizer(input)), features, packed)
        for slot, input in module.pairs()
    }
    cls = LowbitLSTM if module.mode == "LSTM" else LowbitGRU
    return cls(recurrence_of(module), parts)


def part_of(
    module: Any, slot: str, bias: Tensor | None, input: Activation | None, features: Features, packed: PackedOnce
) -> nn.Module:
    """One linear product of a module with several: packed, or an `nn.Linear` where its weight stays in float."""
    weight, quantizer = module.get_parameter(slot), module.quantizer(slot)
    if quantizer is not None:
        return LowbitLinear(pack_once(weight, quantizer, packed), bias, input, features)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = weight
    linear.bias = bias  # type: ignore[assignment]
    return linear


SHIPPED: dict[type[nn.Module], Callable[[Any, Features, PackedOnce], nn.Module]] = {
    nn.Linear: _linear,
    QInOutLinear: _linear,
    nn.Embedding: _embedding,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv3d,
    nn.ConvTranspose1d: _conv_transpose,
    nn.ConvTranspose2d: _conv_transpose,
    nn.ConvTranspose3d: _conv_transpose,
    nn.EmbeddingBag: _embedding_bag,
    QAdd: _add,
    QMatMul: _matmul,
    QCat: _cat,
    QAttention: _attention,
    QMultiheadAttention: _multihead,
    QExperts: _experts,
    QRecurrent: _recurrent,
}
"""The first row whose class a simulated module is an instance of makes its shipped form."""
