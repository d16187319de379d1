"""`QMultiheadAttention`: `nn.MultiheadAttention` whose projections compute with codes.

Its output projection is a layer of its own, and its two attention products are the child ``attention_0``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.graph.calls import Attention
from bitwright.graph.multihead import CHILD, SIDES, Multihead, Side
from bitwright.kernels import reference
from bitwright.kernels.reference import Codes
from bitwright.nn.layer import Simulated, integer_product
from bitwright.nn.quantizer import Quantizer, Stage


class QMultiheadAttention(Simulated, Multihead, nn.MultiheadAttention):
    """`nn.MultiheadAttention` on codes, with all of its options; parameters and keys stay.

    Biases stay in float, as in the other modules with several products.
    """

    def attach(self, quantizers: Mapping[str, Quantizer | None]) -> None:
        """Give the module its quantizers, and the child for its products where the plan named none."""
        super().attach(quantizers)
        if not hasattr(self, CHILD):
            self.add_module(CHILD, Attention())

    def quantized_weights(self) -> dict[str, Tensor]:
        """The input projections that have a quantizer, by slot."""
        slots = dict.fromkeys(weight_slot(self, side) for side in SIDES)
        return {slot: getattr(self, slot) for slot in slots if self.quantizer(slot) is not None}

    def project(self, side: Side, x: Tensor) -> Tensor:
        """The input projection of one side: on integers, on decoded values, or in float."""
        slot, rows = weight_slot(self, side), rows_of(self, side)
        weight, bias = getattr(self, slot), bias_of(self, side)
        quantize_weight, quantize_input = self.quantizer(slot), self.quantizer(side)
        if quantize_weight is None or quantize_weight.stage is not Stage.SIMULATE:
            if quantize_input is not None:
                quantize_input.observe(x)
            return F.linear(x, weight[rows], bias)
        if quantize_input is not None and integer_product(quantize_weight, quantize_input):
            values, scale, limit = quantize_weight(weight)
            part = Codes(values[rows], scale if scale.numel() == 1 else scale[rows], limit)
            return reference.linear(quantize_input(x), part, bias)
        values = x if quantize_input is None else quantize_input.simulate(x)
        return F.linear(values, quantize_weight.simulate(weight)[rows], bias)


def weight_slot(module: nn.MultiheadAttention, side: Side) -> str:
    """The parameter that holds the projection of a side: all three in one where they have the same shape."""
    return "in_proj_weight" if module._qkv_same_embed_dim else f"{side[0]}_proj_weight"


def rows_of(module: nn.MultiheadAttention, side: Side) -> slice:
    """The rows of that parameter which belong to the side."""
    if not module._qkv_same_embed_dim:
        return slice(None)
    start = SIDES.index(side) * module.embed_dim
    return slice(start, start + module.embed_dim)


def bias_of(module: nn.MultiheadAttention, side: Side) -> Tensor | None:
    """The bias of the projection of a side."""
    return None if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[SIDES.index(side)]
