"""`QExperts`: experts of a mixture, whose 3-d weights are encoded with a scale per expert and output channel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.graph.experts import Product, mixture
from bitwright.kernels import reference
from bitwright.kernels.reference import Codes
from bitwright.nn.layer import Simulated, integer_product
from bitwright.nn.quantizer import Quantizer, Stage

PAIRS = (("gate_up_proj", "input"), ("down_proj", "hidden"))


class QExperts(Simulated):
    """Mixin for experts with ``gate_up_proj [e, 2 i, h]`` and ``down_proj [e, h, i]``; the router is elsewhere.

    A weight is encoded as rows ``[e * out, in]``. The activations have one range for all experts. ``hits`` counts the
    tokens that each expert got while ranges were observed.
    """

    num_experts: int
    act_fn: nn.Module

    def attach(self, quantizers: Mapping[str, Quantizer | None]) -> None:
        """Give the experts their quantizers."""
        super().attach(quantizers)
        self.hits = [0] * self.num_experts

    def as_rows(self, weight: Tensor) -> Tensor:
        """``[e, out, in] -> [e * out, in]``."""
        return weight.flatten(0, 1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """``[e * out, in] -> [e, out, in]``."""
        return rows.unflatten(0, (self.num_experts, -1))

    def quantized_weights(self) -> dict[str, Tensor]:
        """The weights that have a quantizer, as rows."""
        slots = [slot for slot, _ in PAIRS if self.quantizer(slot) is not None]
        return {slot: self.as_rows(self.get_parameter(slot)) for slot in slots}

    def unreached(self) -> list[str]:
        """Experts that no token reached while ranges were observed."""
        return [f"expert {number}" for number, count in enumerate(self.hits) if not count]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, features]`` with chosen experts and their shares, ``[tokens, k]`` each."""
        if any(q.stage is Stage.OBSERVE for q in self.children() if isinstance(q, Quantizer)):
            counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()
            self.hits = [before + now for before, now in zip(self.hits, counts, strict=False)]
        gate_up, down = (self._product(*pair) for pair in PAIRS)
        return mixture(hidden_states, top_k_index, top_k_weights, self.num_experts, gate_up, down, self.act_fn)

    def _product(self, slot: str, activation: str) -> Product:
        """``(expert, x) -> x @ W[expert].T`` with all weights encoded once."""
        weight = self.get_parameter(slot)
        quantize_weight, quantize_input = self.quantizer(slot), self.quantizer(activation)
        if quantize_weight is None or quantize_weight.stage is not Stage.SIMULATE:
            return partial(_observed, quantize_input, weight)
        if quantize_input is not None and integer_product(quantize_weight, quantize_input):
            codes, outputs = quantize_weight(self.as_rows(weight)), weight.shape[1]
            return partial(_integer, quantize_input, codes, outputs)
        values = self.from_rows(quantize_weight.simulate(self.as_rows(weight)))
        return partial(_decoded, quantize_input, values)


def _observed(quantizer: Quantizer | None, weight: Tensor, expert: int, x: Tensor) -> Tensor:
    if quantizer is not None:
        quantizer.observe(x)
    return F.linear(x, weight[expert])


def _integer(quantizer: Quantizer, weight: Codes, outputs: int, expert: int, x: Tensor) -> Tensor:
    rows = slice(expert * outputs, (expert + 1) * outputs)
    scale = weight.scale if weight.scale.numel() == 1 else weight.scale[rows]
    return reference.linear(quantizer(x), Codes(weight.values[rows], scale, weight.limit), None)


def _decoded(quantizer: Quantizer | None, weight: Tensor, expert: int, x: Tensor) -> Tensor:
    return F.linear(x if quantizer is None else quantizer.simulate(x), weight[expert])
