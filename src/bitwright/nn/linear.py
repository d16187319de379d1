"""`QLinear`: a linear layer that computes with codes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.nn.layer import QLayer


class QLinear(QLayer, nn.Linear):
    """`nn.Linear` on codes: ``(q_x @ q_w.T) * (s_x * s_w) + bias``; group-wise and float cases decode first."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        weight, bias = self.operands()
        quantize_weight, quantize_input = self.weight_quantizer, self.input_quantizer
        if quantize_weight is None or not self.simulating:
            if quantize_input is not None:
                quantize_input.observe(input)
            return self.normalized(F.linear(input, weight, bias))
        if quantize_input is not None and self.integer_product:
            out = self.product(input, weight, self.on_grid(bias), None)
        else:
            values = input if quantize_input is None else quantize_input.simulate(input)
            out = F.linear(values, quantize_weight.simulate(weight), bias)
        return self.normalized(out)
